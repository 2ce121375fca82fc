"""Packing of 2:4 weights in C++ and CUDA, equal to the reference to the last bit.

The CUDA kernel runs on a GPU where there is one, and everywhere as the same source on the host: see
tests/cuda_host.
"""

import ctypes
import math

import pytest
import torch
from cuda_host import build
from nm_cases import CPP, DTYPES, SHAPES, bits_of, named, needs_cpp, raw, weight_of

from sparse_cocktail import ops, reference_nm

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def any_numbers(dtype, seed=3):
    """All bit patterns alike: NaN of both signs, infinities, subnormals."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.float32:
        return torch.randint(-(2**31), 2**31, (96, 192), generator=generator).int().view(dtype)
    return torch.randint(-(2**15), 2**15, (96, 192), generator=generator).short().view(dtype)


def assert_equal(found, expected):
    """The same bits; NaN stays NaN, but which one is the converter's business."""
    packed, meta = (tensor.cpu() for tensor in found)
    assert torch.equal(meta, expected[1])
    numbers = ~expected[0].isnan()
    assert torch.equal(raw(packed)[numbers], raw(expected[0])[numbers])
    assert packed[~numbers].isnan().all()


# ---- packing in C++ ------------------------------------------------------------------------------


@needs_cpp
@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", (torch.float32, *DTYPES), ids=str)
def test_cpp_packs_any_number_as_the_reference(source, target):
    weight = any_numbers(source)
    assert_equal(
        CPP.nm_pack_weight(weight, None, target),
        reference_nm.nm_pack_weight(weight, None, target),
    )


@needs_cpp
@pytest.mark.parametrize("shape", SHAPES, ids=named)
def test_cpp_reads_weights_of_any_strides(shape):
    weight = weight_of(*shape)
    expected = reference_nm.nm_pack_weight(weight, None, torch.bfloat16)
    wide = torch.full((shape[0], 2 * shape[1] + 1), 9.0)
    wide[:, 1::2] = weight
    as_conv = weight[:, :, None, None].to(memory_format=torch.channels_last)
    for strided in (wide[:, 1::2], weight.T.contiguous().T, as_conv, weight.double()):
        packed, meta = CPP.nm_pack_weight(strided, None, torch.bfloat16)
        assert torch.equal(raw(packed), raw(expected[0])) and torch.equal(meta, expected[1])


@needs_cpp
@pytest.mark.parametrize("shape", SHAPES, ids=named)
def test_1_2_packs_as_2_4(shape):
    weight = weight_of(*shape, torch.float16)
    pairs = ops.unpack_mask(ops.nm_mask(weight, 1, 2), weight.shape)
    mask = pairs & (torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.7)
    bits = ops.pack_mask(mask)
    values = reference_nm.nm_compress(weight, 1, 2, bits)[0].contiguous()
    expected = reference_nm.nm_pack_weight(weight, bits)
    packed, meta = CPP.nm_pack(values, bits, 1, 2)
    assert torch.equal(raw(packed), raw(expected[0])) and torch.equal(meta, expected[1])


@needs_cpp
def test_cpp_refuses_what_has_no_packed_form():
    weight, bits = weight_of(8, 36), bits_of(8, 36)
    values = reference_nm.nm_compress(weight, 2, 4, bits, torch.bfloat16)[0].contiguous()
    full = ops.pack_mask(torch.ones(8, 36, dtype=torch.bool))
    for call, says in (
        (lambda: CPP.nm_pack(values, bits, 4, 8), "nm_pack: pattern is 4:8, but only 2:4 and 1:2"),
        (lambda: CPP.nm_pack(values.float(), bits, 2, 4), "dtype of values is Float"),
        (
            lambda: CPP.nm_pack(values, full, 2, 4),
            "keep more than n=2 of a group of m=4 in columns",
        ),
        (lambda: CPP.nm_pack(values[:, 0], bits, 2, 4), r"contiguous values \(out, 1, in / 2\)"),
        (lambda: CPP.nm_pack(values, bits[1:], 2, 4), r"nm_pack: bits has shape \(7, 1, 2\)"),
        (lambda: CPP.nm_pack_weight(weight[:, :34], None, torch.float16), "in=34, which is not a"),
        (lambda: CPP.nm_pack_weight(weight, None, torch.float32), "dtype is Float, but packed"),
        (lambda: CPP.nm_pack_weight(weight, full, torch.float16), "nm_pack_weight: bits of row"),
        (lambda: CPP.nm_pack_weight(weight.view(8, 4, 3, 3), None, torch.float16), "1, 1"),
    ):
        with pytest.raises(RuntimeError, match=says):
            call()


# ---- the CUDA kernel -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_the_host(tmp_path_factory):
    """nm_pack_weight of csrc/cuda/nm_pack.cu, run by tests/cuda_host."""
    if build.compiler() is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda_host")
    library = build.load_driver("pack_driver", folder, build.compile_driver("pack_driver", folder))

    def pack(weight, bits, dtype, order=0):
        out, inputs = weight.shape[:2]
        shapes = reference_nm.packed_shapes(out, inputs)
        outputs = [  # with a tail that must stay as it is
            torch.full((math.prod(shape) + 64,), -1, dtype=number)
            for shape, number in zip(shapes, (torch.int16, torch.int32), strict=True)
        ]
        library.reset()
        library.set_options(order, ctypes.c_int64(0))
        storage = weight.untyped_storage()
        for data, size in (
            (storage.data_ptr(), storage.nbytes()),
            *(() if bits is None else ((bits.data_ptr(), 4 * bits.numel()),)),
        ):
            library.register_array(ctypes.c_void_p(data), ctypes.c_int64(size))
        sizes = (out, inputs, weight.stride(0), weight.stride(1))
        failed = library.nm_pack_weight(
            weight.itemsize,
            int(weight.dtype == torch.bfloat16),
            int(dtype == torch.bfloat16),
            ctypes.c_void_p(weight.data_ptr()),
            ctypes.c_void_p(0 if bits is None else bits.data_ptr()),
            *map(ctypes.c_int64, sizes),
            *(ctypes.c_void_p(output.data_ptr()) for output in outputs),
        )
        assert not failed, library.last_error().decode()
        assert all((output[-64:] == -1).all() for output in outputs), "wrote beyond the end"
        packed, meta = (o[:-64].view(shape) for o, shape in zip(outputs, shapes, strict=True))
        return packed.view(dtype), meta

    return pack


def strided_forms(weight):
    """A weight as it may lie in memory: by itself, unaligned, with longer rows, transposed."""
    out, inputs = weight.shape
    yield "contiguous", weight
    yield "unaligned", torch.cat((weight.new_zeros(1), weight.flatten()))[1:].view(out, inputs)
    for name, extra in (("long rows", 4), ("odd rows", 3)):
        wide = weight.new_full((out, inputs + extra), 9.0)
        wide[:, :inputs] = weight
        yield name, wide[:, :inputs]
    yield "transposed", weight.T.contiguous().T


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", (torch.float32, *DTYPES), ids=str)
def test_cuda_source_packs_any_number(on_the_host, source, target):
    weight = any_numbers(source)
    bits = bits_of(*weight.shape)
    for given in (None, bits):
        expected = reference_nm.nm_pack_weight(weight, given, target)
        found = on_the_host(weight, given, target, order=7)
        assert_equal(found, expected)
        if ops.extension_path is not None:  # these two agree about NaN as well
            assert torch.equal(raw(found[0]), raw(CPP.nm_pack_weight(weight, given, target)[0]))


@pytest.mark.parametrize("given_bits", (False, True), ids=("pruned", "given"))
@pytest.mark.parametrize("source", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=named)
def test_cuda_source_reads_any_strides(on_the_host, shape, source, given_bits):
    weight = weight_of(*shape, source)
    bits = bits_of(*shape) if given_bits else None
    expected = reference_nm.nm_pack_weight(weight, bits, torch.bfloat16)
    for name, form in strided_forms(weight):
        packed, meta = on_the_host(form, bits, torch.bfloat16)
        assert torch.equal(raw(packed), raw(expected[0])), name
        assert torch.equal(meta, expected[1]), name


@needs_gpu
@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", (torch.float32, *DTYPES), ids=str)
def test_gpu_packs_any_number_and_any_strides(source, target):
    if not hasattr(torch.ops.sparse_cocktail_cuda, "nm_pack_weight"):
        pytest.skip("the CUDA kernels are not built")
    kernel = torch.ops.sparse_cocktail_cuda.nm_pack_weight
    weight = any_numbers(source)
    bits = bits_of(*weight.shape)
    for given in (None, bits):
        expected = reference_nm.nm_pack_weight(weight, given, target)
        on_card = given if given is None else given.cuda()
        assert_equal(kernel(weight.cuda(), on_card, target), expected)
    for shape in SHAPES:
        weight = weight_of(*shape, source)
        expected = reference_nm.nm_pack_weight(weight, None, target)
        for _, form in strided_forms(weight.cuda()):
            assert_equal(kernel(form, None, target), expected)
    with pytest.raises(RuntimeError, match="in=34, which is not a multiple of m=4"):
        kernel(torch.zeros(8, 34, device="cuda"), None, target)
