"""Every conversion of nm_formats, against PyTorch's own and there and back again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nm_cases import DTYPES, bits_of, masked, named, raw, weight_of
from torch.sparse import _semi_structured_conversions as torchs

from sparse_cocktail import nm_formats, ops, reference_nm

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")


def compressed(out, inputs, dtype=torch.bfloat16, seed=0):
    """Values and bits without kept zeros, and the dense weight."""
    weight = weight_of(out, inputs, dtype, seed)
    weight = torch.where(weight == 0, torch.full_like(weight, 5.0), weight)
    bits = bits_of(out, inputs, seed)
    values = reference_nm.nm_compress(weight, 2, 4, bits)[0].contiguous()
    return values, bits, masked(weight, bits)


sizes = st.tuples(st.integers(1, 70), st.integers(1, 40).map(lambda groups: 4 * groups))


@settings(max_examples=30)
@given(shape=sizes, seed=st.integers(0, 1000), dtype=st.sampled_from(DTYPES))
def test_packed_round_trip(shape, seed, dtype):
    values, bits, dense = compressed(*shape, dtype, seed)
    packed, meta = nm_formats.to_packed(values, bits)
    expected = reference_nm.nm_pack_weight(dense, bits)
    assert torch.equal(raw(packed), raw(expected[0])) and torch.equal(meta, expected[1])
    again, again_bits = nm_formats.from_packed(packed, meta, *shape)
    assert torch.equal(again_bits, bits) and torch.equal(raw(again), raw(values))


@settings(max_examples=30)
@given(shape=sizes, seed=st.integers(0, 1000))
def test_nibbles_stand_for_two_bits_of_each_group(shape, seed):
    bits = bits_of(*shape, seed)
    nibbles = nm_formats.bits_to_nibbles(bits, shape[1])
    assert nibbles.shape == (shape[0], -(-shape[1] // 8)) and nibbles.dtype == torch.uint8
    nm_formats.validate_nibbles(nibbles, shape[1])
    two = nm_formats.nibbles_to_bits(nibbles, shape[1])
    mask, filled = ops.unpack_mask(bits, shape), ops.unpack_mask(two, shape)
    groups = filled.view(shape[0], -1, 4)
    assert (groups.sum(-1) == 2).all() and not (mask & ~filled).any()
    added = (filled & ~mask).view(groups.shape)
    free = ~mask.view(groups.shape)
    lower_free = torch.zeros_like(free)
    lower_free[..., 1:] = free[..., :-1].cumsum(-1) > added[..., :-1].cumsum(-1)
    assert not (added & lower_free).any(), "zeros take the lowest free places"
    assert torch.equal(nm_formats.bits_to_nibbles(two, shape[1]), nibbles)


def test_nibbles_by_hand():
    mask = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0]], dtype=torch.bool)
    nibbles = nm_formats.bits_to_nibbles(ops.pack_mask(mask), 16)
    assert nibbles.tolist() == [[0x9C, 0x4C]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((32, 64), (64, 192), (160, 128)), ids=named)
def test_cutlass_layout_is_that_of_torch(shape, dtype):
    values, bits, dense = compressed(*shape, dtype)
    expected = torchs.sparse_semi_structured_from_dense_cutlass(dense)
    packed, meta = nm_formats.to_cutlass(values, bits)
    assert torch.equal(raw(packed), raw(expected[0])) and torch.equal(meta, expected[1])
    assert torch.equal(torchs.sparse_semi_structured_to_dense_cutlass(packed, meta), dense)
    again, again_bits = nm_formats.from_cutlass(*expected)
    assert torch.equal(again_bits, bits) and torch.equal(raw(again), raw(values))


@pytest.mark.parametrize("shape", ((32, 64), (64, 128)), ids=named)
def test_1_2_has_the_forms_of_2_4(shape):
    weight = weight_of(*shape, torch.float16)
    pairs = ops.unpack_mask(ops.nm_mask(weight, 1, 2), shape)
    some = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.7
    bits = ops.pack_mask(pairs & some & (weight != 0))
    values = reference_nm.nm_compress(weight, 1, 2, bits)[0].contiguous()
    dense = masked(weight, bits)
    cut, meta = nm_formats.to_cutlass(values, bits, 1, 2)
    expected = torchs.sparse_semi_structured_from_dense_cutlass(dense)
    assert torch.equal(raw(cut), raw(expected[0])) and torch.equal(meta, expected[1])
    as_2_4 = reference_nm.nm_compress(dense, 2, 4, bits)[0]
    for back in (
        nm_formats.from_packed(*nm_formats.to_packed(values, bits, 1, 2), *shape),
        nm_formats.from_semi_structured(nm_formats.to_semi_structured(values, bits, 1, 2)),
    ):
        assert torch.equal(back[1], bits) and torch.equal(raw(back[0]), raw(as_2_4))
    with pytest.raises(ValueError, match="validate_compressed: n=4, m=8, but 2:4 has these forms"):
        nm_formats.validate_compressed(values, bits, 4, 8)


def test_semi_structured_tensors_go_in_and_out():
    values, bits, dense = compressed(64, 128)
    tensor = nm_formats.to_semi_structured(values, bits)
    assert type(tensor) is torch.sparse.SparseSemiStructuredTensorCUTLASS
    assert tensor.shape == dense.shape and tensor.dtype == dense.dtype
    restored = torchs.sparse_semi_structured_to_dense_cutlass(tensor.packed, tensor.meta)
    assert torch.equal(restored, dense)
    again, again_bits = nm_formats.from_semi_structured(tensor)
    assert torch.equal(raw(again), raw(values)) and torch.equal(again_bits, bits)
    with pytest.raises(ValueError, match=r"holds only its transpose; pass tensor\.t\(\)"):
        nm_formats.from_semi_structured(tensor.t())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_torch_multiplies_with_our_semi_structured_tensor():
    if torch.cuda.get_device_capability()[0] != 8:
        pytest.skip("PyTorch's CUTLASS kernels run on compute capability 8.x only")
    values, bits, dense = compressed(64, 128, torch.float16)
    x = torch.randint(-3, 4, (128, 64), device="cuda").half()
    tensor = nm_formats.to_semi_structured(values.cuda(), bits.cuda())
    assert torch.equal(torch.mm(tensor, x), torch.mm(dense.cuda(), x))


@pytest.mark.parametrize("shape", ((32, 64), (64, 128)), ids=named)
def test_zeros_of_both_signs_count_as_pruned(shape):
    values, bits, dense = compressed(*shape)
    zeroed = torch.where(values == 5, torch.full_like(values, -0.0), values)
    sparse = torch.where(dense == 5, torch.zeros_like(dense), dense)
    back = (
        nm_formats.from_packed(*nm_formats.to_packed(zeroed, bits), *shape),
        nm_formats.from_cutlass(*nm_formats.to_cutlass(zeroed, bits)),
    )
    for found, found_bits in back:
        assert torch.equal(ops.unpack_mask(found_bits, shape), sparse != 0)
        restored = reference_nm.nm_decompress(found, found_bits, 2, 4, shape)
        assert torch.equal(raw(restored.contiguous()), raw(sparse))


# ---- validators ----------------------------------------------------------------------------------


def changed(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def test_validators_name_what_is_wrong():
    f = nm_formats
    values, bits, _ = compressed(40, 68)
    packed, meta = f.to_packed(values, bits)
    nibbles = f.bits_to_nibbles(bits, 68)
    cut, cut_meta = f.to_cutlass(*compressed(32, 64)[:2])
    full = changed(bits, (3, 0, 0), 0b111 << 8)
    beyond = changed(bits, (0, 0, 2), 1 << 4)
    cases = (
        (
            lambda: f.validate_nibbles(changed(nibbles, (2, 1), 0x45), 68),
            "nibble 0x5 at row 2, gro",
        ),
        (
            lambda: f.validate_nibbles(changed(nibbles, (2, 8), 0x94), 68),
            "beyond in=68 that is not",
        ),
        (
            lambda: f.validate_nibbles(nibbles, 80),
            r"shape \(40, 9\) .* contiguous of shape \(40, 1",
        ),
        (lambda: f.validate_nibbles(nibbles, 66), "in=66 is not a multiple of m=4"),
        (
            lambda: f.validate_packed(packed, changed(meta, (0, 0, 5), 0), 40, 68),
            "nibble 0x0 at ro",
        ),
        (
            lambda: f.validate_packed(changed(packed, (3, 0, 0, 0, 0), 1), meta, 40, 68),
            "padding row",
        ),
        (
            lambda: f.validate_packed(packed, changed(meta, (3, 1, 1), 0x44448444), 40, 68),
            "padding",
        ),
        (lambda: f.validate_packed(packed, meta, 40, 64), r"of shape \(4, 1, 2, 32, 8\)"),
        (lambda: f.validate_packed(packed, meta, 40, 60), r"of shape \(4, 1, 2, 32, 8\)"),
        (lambda: f.validate_packed(packed, meta, 4, 68), r"padding rows beyond \(4, 68\)"),
        (lambda: f.validate_cutlass(cut, changed(cut_meta, (0, 0), 0x1234)), "nibble 0x"),
        (lambda: f.validate_cutlass(cut[:16], cut_meta[:16]), r"needs multiples of \(32, 64\)"),
        (lambda: f.validate_cutlass(cut, cut_meta[:, :2]), r"contiguous of shape \(32, 4\)"),
        (
            lambda: f.validate_compressed(values, full),
            "bits of row 3 keep more than n=2 .* 8 to 11",
        ),
        (lambda: f.validate_compressed(values, beyond), "bits are set beyond in=68"),
        (lambda: f.validate_compressed(values[:3], bits), "bits have 40 rows, but values have 3"),
        (lambda: f.to_cutlass(values, bits), r"weight is \(40, 68\), but PyTorch's layout needs"),
    )
    for call, says in cases:
        with pytest.raises(ValueError, match=says):
            call()
    types = (
        (lambda: f.validate_packed(packed.float(), meta, 40, 68), "packed has dtype torch.float32"),
        (lambda: f.validate_packed(packed, meta.long(), 40, 68), "meta has dtype torch.int64"),
        (
            lambda: f.validate_cutlass(cut, cut_meta.int()),
            "meta has dtype torch.int32, but it is i",
        ),
        (lambda: f.from_semi_structured(values), "tensor is a Tensor, not a SparseSemiStructured"),
    )
    for call, says in types:
        with pytest.raises(TypeError, match=says):
            call()


def test_cusparselt_tensors_are_refused():
    blob = torch.zeros(32 * 64 * 9 // 16, dtype=torch.bfloat16)
    kind = torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    tensor = kind(torch.Size((32, 64)), blob, None, None, None, None)
    with pytest.raises(TypeError, match="whose layout is private to cuSPARSELt; call its to_dense"):
        nm_formats.from_semi_structured(tensor)
