"""Compressed N:M weights against oracles in pure Python, and products against fp64.

Every test of a `level` runs on the reference and on the C++ of every instruction set. Triton is
compared on the samples of test_ops.py, and has its own file.
"""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sparse_cocktail import ops, reference_nm
from sparse_cocktail.ops import nm, nm_packed

LEVELS = ("reference", *ops.cpu_levels())
RATIOS = (
    (1, 2),
    (2, 4),
    (4, 8),
    (1, 4),
    (2, 8),
    (8, 16),
    (31, 32),
    (1, 3),
    (3, 7),
    (7, 32),
    (5, 12),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PRODUCTS = (torch.float32, torch.bfloat16, torch.float16)
RAW = {2: torch.int16, 4: torch.int32, 8: torch.int64}

each_level = pytest.mark.parametrize("level", LEVELS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
each_ratio = pytest.mark.parametrize("ratio", RATIOS, ids=lambda r: f"{r[0]}of{r[1]}")


def at(level):
    """The level's C++ kernels, or the reference."""
    stack = contextlib.ExitStack()
    stack.enter_context(ops.backend("reference" if level == "reference" else "cpp"))
    if level != "reference":
        stack.enter_context(ops.cpu_level(level))
    return stack


def raw(tensor):
    """The bits of numbers: NaN equals itself, and -0.0 is not 0.0."""
    return tensor.contiguous().view(RAW[tensor.element_size()])


def assert_same(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert torch.equal(raw(got), raw(expected))


def special(shape, dtype):
    """Ties, zeros of both signs, infinities, NaN of both signs, subnormals."""
    infinity = torch.tensor(math.inf, dtype=dtype)
    nan = (raw(infinity) | 1).view(dtype)
    pool = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, math.inf, -math.inf, torch.finfo(dtype).tiny / 2]
    pool = torch.cat([torch.tensor(pool, dtype=dtype), nan.view(1), -nan.view(1)])
    return pool[torch.randint(len(pool), shape)]


def normal(shape, dtype):
    return torch.randn(shape).to(dtype)


def view_of(tensor):
    """(out, taps, in)."""
    return tensor.reshape(*tensor.shape[:2], -1).transpose(1, 2)


def thinned(bits, shape, share=0.7):
    """The same bits without some of them, so that groups keep fewer than n, and rows none."""
    mask = torch.rand(shape) < share
    mask[:1] = False
    return ops.mask_and(bits, ops.pack_mask(mask))


# ---- compress and decompress ---------------------------------------------------------------------


def oracle_values(weight, mask, n, m):
    """Raw values of the kept elements of each group, in order, then zeros."""
    numbers, keeps, groups = raw(view_of(weight)).tolist(), view_of(mask).tolist(), []
    for tap_numbers, tap_keeps in zip(numbers, keeps, strict=True):
        for row, keep in zip(tap_numbers, tap_keeps, strict=True):
            for first in range(0, len(row), m):
                kept = [row[j] for j in range(first, first + m) if keep[j]]
                groups.append(kept + [0] * (n - len(kept)))
    out, inputs = weight.shape[:2]
    flat = torch.tensor(groups, dtype=RAW[weight.element_size()]).view(weight.dtype)
    return flat.view(out, math.prod(weight.shape[2:]), inputs // m * n)


def shapes_for(m):
    """In whole words, within one, beyond one, over many of the chunks that C++ works in."""
    return ((3, m), (2, 32 * m), (2, 5 * m, 3, 1), (2, 8 * m, 3, 3), (3, 7 * m, 5), (1, 288 * m))


@each_level
@each_ratio
@pytest.mark.parametrize("values", [normal, special])
def test_compress_and_back(level, ratio, values):
    n, m = ratio
    for dtype in DTYPES:
        for shape in shapes_for(m):
            weight = values(shape, dtype)
            bits = ops.nm_mask(weight, n, m)
            mask = ops.unpack_mask(bits, shape)
            with at(level):
                found, found_bits = ops.nm_compress(weight, n, m)
                dense = ops.nm_decompress(found, found_bits, n, m, shape)
            assert torch.equal(found_bits, bits)
            assert_same(found, oracle_values(weight, mask, n, m))
            assert_same(dense, weight.masked_fill(~mask, 0.0))


@each_level
@each_ratio
def test_given_bits_may_keep_fewer(level, ratio):
    n, m = ratio
    for dtype in DTYPES:
        for shape in shapes_for(m):
            older = normal(shape, torch.float32)  # the mask does not follow from the weight
            bits = thinned(ops.nm_mask(older, n, m), shape)
            weight, mask = special(shape, dtype), ops.unpack_mask(bits, shape)
            with at(level):
                found, found_bits = ops.nm_compress(weight, n, m, bits)
                dense = ops.nm_decompress(found, found_bits, n, m, shape)
                again = ops.nm_decompress(  # what pads a group has no meaning
                    found + (found == 0), bits, n, m, shape
                )
            assert found_bits.data_ptr() != bits.data_ptr() and torch.equal(found_bits, bits)
            assert_same(found, oracle_values(weight, mask, n, m))
            assert_same(dense, weight.masked_fill(~mask, 0.0))
            assert (again[~mask] == 0).all()


@given(
    m=st.integers(2, 32),
    groups=st.integers(1, 9),
    rows=st.integers(1, 3),
    taps=st.integers(1, 3),
    data=st.data(),
)
def test_round_trip_of_drawn_masks(m, groups, rows, taps, data):
    n = data.draw(st.integers(1, m - 1))
    counts = data.draw(st.lists(st.integers(0, n), min_size=groups, max_size=groups))
    shape = (rows, groups * m, taps, 1)
    ranks = torch.rand(rows, taps, groups, m).argsort(-1)
    keep = (ranks < torch.tensor(counts)[:, None]).flatten(-2).transpose(1, 2).reshape(shape)
    weight, bits = torch.randn(shape), ops.pack_mask(keep)
    for level in LEVELS:
        with at(level):
            values, found = ops.nm_compress(weight, n, m, bits)
            assert torch.equal(found, bits), level
            assert_same(
                ops.nm_decompress(values, bits, n, m, shape), weight.masked_fill(~keep, 0.0)
            )
            assert_same(values, oracle_values(weight, keep, n, m))


LAYOUTS = {
    "contiguous": lambda w: w,
    "channels_last": lambda w: w.to(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "kernel_transposed": lambda w: w.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda w: w.repeat(2, 2, 2, 2)[: w.shape[0], : w.shape[1], : w.shape[2], ::2],
}


@each_level
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 64, 2, 4), (3, 36, 3, 2)], ids=str)
def test_any_strides_and_memory_order_on_the_way_back(level, layout, shape):
    weight = layout(torch.randn(shape))
    with at(level):
        values, bits = ops.nm_compress(weight, 2, 4)
        dense = ops.nm_decompress(values, bits, 2, 4, weight.shape)
    expected, expected_bits = ops.nm_compress(weight.contiguous(), 2, 4)
    assert torch.equal(values, expected) and torch.equal(bits, expected_bits)
    assert values.is_contiguous() and torch.equal(dense, ops.masked_weight(weight, bits))
    assert dense.is_contiguous(memory_format=torch.channels_last)


@each_level
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 4, 3, 3), (2, 4, 0, 3)], ids=str)
def test_nothing_to_compress(level, shape):
    with at(level):
        values, bits = ops.nm_compress(torch.ones(shape), 2, 4)
        dense = ops.nm_decompress(values, bits, 2, 4, shape)
    assert values.shape == (shape[0], math.prod(shape[2:]), shape[1] // 2)
    assert dense.shape == shape and values.numel() == 0


@each_level
@each_dtype
def test_values_of_another_dtype_are_ranked_before_and_rounded_after(level, dtype):
    weight = 1 + torch.randn(5, 96).to(dtype) * torch.finfo(dtype).eps  # equal once rounded
    weight[0, :12] = special((12,), dtype)
    expected, bits = ops.nm_compress(weight, 2, 4)
    for to in DTYPES:
        with at(level):
            values, found = ops.nm_compress(weight, 2, 4, None, to)
            given, _ = ops.nm_compress(weight, 2, 4, thinned(bits, weight.shape), to)
        assert torch.equal(found, bits) and values.dtype == given.dtype == to
        torch.testing.assert_close(values, expected.to(to), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(ops.extension_path is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("inputs", [4096, 4100])
def test_large_weights_go_past_the_caches_unharmed(threads, inputs):
    threads(2)
    weight = torch.randn(2100, inputs)  # 17 MB of values, streamed; its parts are not
    values, bits = ops.nm_compress(weight, 2, 4)
    halves, _ = ops.nm_compress(weight, 2, 4, bits, torch.bfloat16)
    dense = ops.nm_decompress(values, bits, 2, 4, weight.shape)
    for part in range(0, 2100, 300):
        rows = slice(part, part + 300)
        some, words = ops.nm_compress(weight[rows], 2, 4)
        assert torch.equal(values[rows], some) and torch.equal(bits[rows], words)
        assert torch.equal(halves[rows], some.bfloat16())
        assert torch.equal(dense[rows], ops.masked_weight(weight[rows], words))


# ---- linear --------------------------------------------------------------------------------------


def check(got, exact, peer):
    """At most twice the error of the same product in torch."""
    assert got.shape == peer.shape and got.dtype == peer.dtype
    error, allowed = ((r.double() - exact).abs().max().item() for r in (got, peer))
    tiny = torch.finfo(torch.float32).eps * max(1.0, exact.abs().max().item())
    assert error <= 2 * allowed + tiny, f"error {error:.2g}, torch {allowed:.2g}"


def activated(y, activation):
    return {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu}[activation](y)


def compressed(out, inputs, ratio, dtype, full=True):
    weight = torch.randn(out, inputs) / math.sqrt(inputs)
    bits = ops.nm_mask(weight, *ratio)
    bits = bits if full else thinned(bits, weight.shape)
    return ops.nm_compress(weight, *ratio, bits, dtype)


@each_level
@each_ratio
@pytest.mark.parametrize("dtype", PRODUCTS, ids=lambda d: str(d)[6:])
def test_linear_equals_torch(level, ratio, dtype):
    m = ratio[1]
    cases = ((1, m, 1), (5, 3 * m, 2), (9, 64 * m, 3), (6, 33 * m, 7), (3, 2 * m, 130))
    for index, (out, inputs, rows) in enumerate(cases):
        values, bits = compressed(out, inputs, ratio, dtype, full=index % 2 == 0)
        weight = ops.nm_decompress(values, bits, *ratio, (out, inputs))
        x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(out).to(dtype)
        for b, activation in ((bias, "none"), (None, "relu"), (bias, "gelu")):
            wide = None if b is None else b.double()
            exact = activated(F.linear(x.double(), weight.double(), wide), activation)
            with at(level):
                got = ops.nm_linear(x, values, bits, *ratio, b, activation)
            check(got, exact, activated(F.linear(x, weight, b), activation))


@each_level
@pytest.mark.parametrize("of_x", PRODUCTS, ids=lambda d: f"x_{str(d)[6:]}")
@pytest.mark.parametrize("of_values", PRODUCTS, ids=lambda d: f"values_{str(d)[6:]}")
def test_linear_of_two_dtypes_and_of_few_and_many_rows(level, of_x, of_values):
    values, bits = compressed(10, 72, (4, 8), of_values)
    weight = ops.nm_decompress(values, bits, 4, 8, (10, 72))
    for rows in (0, 1, 4, 16, 17, 64, 65):  # to either side of FEW_ROWS
        x = torch.randn(rows, 72).to(of_x)
        with at(level):
            got = ops.nm_linear(x, values, bits, 4, 8)
        assert got.shape == (rows, 10)
        if rows:
            exact = F.linear(x.double(), weight.double())
            check(got, exact, F.linear(x, weight.to(of_x)))


@each_level
def test_linear_of_any_shape_and_strides_of_x(level):
    values, bits = compressed(4, 40, (2, 4), torch.float32)
    x = torch.randn(40, 3, 2).permute(2, 1, 0)
    with at(level):
        got = ops.nm_linear(x, values, bits, 2, 4)
        vector = ops.nm_linear(x[0, 0], values, bits, 2, 4)
    assert got.shape == (2, 3, 4) and vector.shape == (4,)
    torch.testing.assert_close(got[0, 0], vector)


@pytest.mark.parametrize("level", ops.cpu_levels()[1:])
def test_a_row_of_x_gives_the_same_bits_in_any_company(level, threads):
    values, bits = compressed(203, 512, (2, 4), torch.float32)
    x = torch.randn(16, 512)
    with at(level):
        whole = ops.nm_linear(x, values, bits, 2, 4)
        threads(2)
        again = ops.nm_linear(x, values, bits, 2, 4)
        single = torch.stack([ops.nm_linear(row, values, bits, 2, 4) for row in x])
    assert torch.equal(whole, again) and torch.equal(whole, single)


def test_linear_under_autocast():
    values, bits = compressed(4, 40, (2, 4), torch.bfloat16)
    x = torch.randn(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.nm_linear(x, values, bits, 2, 4)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, ops.nm_linear(x.bfloat16(), values, bits, 2, 4))


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3)])
def test_gradients(n, m):
    weight = torch.randn(3, 2 * m, dtype=torch.float64)
    bits = thinned(ops.nm_mask(weight, n, m), weight.shape)
    values = ops.nm_compress(weight, n, m, bits)[0]
    x = torch.randn(2, 2 * m, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    weight.requires_grad_(), values.requires_grad_()

    def decompress(v):
        return ops.nm_decompress(v, bits, n, m, weight.shape)

    assert torch.autograd.gradcheck(lambda w: ops.nm_compress(w, n, m, bits)[0], weight)
    assert torch.autograd.gradcheck(decompress, values)
    for activation in nm.ACTIVATIONS:
        assert torch.autograd.gradcheck(
            lambda x, v, b, a=activation: ops.nm_linear(x, v, bits, n, m, b, a), (x, values, bias)
        )
    assert torch.autograd.gradgradcheck(
        lambda x, v, b: ops.nm_linear(x, v, bits, n, m, b, "gelu"), (x, values, bias)
    )


def test_compressing_has_the_gradient_of_the_masked_weight():
    weight = torch.randn(4, 8, 3, 3, requires_grad=True)
    values, bits = ops.nm_compress(weight, 2, 4, None, torch.bfloat16)
    values.sum().backward()
    assert weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, ops.unpack_mask(bits, weight.shape).float())


def test_transforms_of_torch_func():
    weight, x = torch.randn(3, 8), torch.randn(5, 8)
    values, bits = ops.nm_compress(weight, 2, 4)

    def dense(values):
        return ops.nm_decompress(values, bits, 2, 4, (3, 8))

    def linear(x):
        return ops.nm_linear(x, values, bits, 2, 4, None, "relu")

    by_row = torch.func.vmap(linear)(x)
    torch.testing.assert_close(by_row, linear(x))
    _, forward = torch.func.jvp(dense, (values,), (torch.ones_like(values),))
    mask = ops.unpack_mask(bits, weight.shape)
    assert torch.equal(forward, mask.float())
    pruned = torch.func.grad(lambda w: ops.nm_compress(w, 2, 4, bits)[0].sum())(weight)
    assert torch.equal(pruned, mask.float())


# ---- packed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ops.implementations("nm_pack_weight")[:2])
@pytest.mark.parametrize("dtype", nm_packed.PACKED_DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(1, 4), (5, 12), (64, 64), (70, 132), (0, 8)], ids=str)
def test_packing_keeps_the_weight(backend, dtype, shape):
    weight = torch.randn(shape)
    for ratio in ((2, 4), (1, 2)):
        bits = thinned(ops.nm_mask(weight, *ratio), shape)
        with ops.backend(backend):
            packed, meta = ops.nm_pack_weight(weight, bits, dtype)
        compressed_values = ops.nm_compress(weight, *ratio, bits, dtype)[0]
        with ops.backend(backend if backend in ops.implementations("nm_pack") else "reference"):
            again = ops.nm_pack(compressed_values, bits, *ratio)
        assert (tuple(packed.shape), tuple(meta.shape)) == reference_nm.packed_shapes(*shape)
        assert torch.equal(again[0], packed) and torch.equal(again[1], meta)
        dense = reference_nm.nm_unpack(packed, meta, shape)
        assert torch.equal(dense, ops.masked_weight(weight, bits, dtype))


@pytest.mark.parametrize("activation", nm.ACTIVATIONS)
def test_packed_linear(activation):
    weight = torch.randn(70, 68).bfloat16()
    packed, meta = ops.nm_pack_weight(weight)
    dense = ops.masked_weight(weight, ops.nm_mask(weight, 2, 4))
    x, bias = torch.randn(2, 3, 68).bfloat16().requires_grad_(), torch.randn(70, requires_grad=True)
    y = ops.nm_linear_packed(x, packed, meta, 70, bias, activation)
    exact = activated(F.linear(x.double(), dense.double(), bias.double()), activation)
    peer = activated(F.linear(x, dense, bias.bfloat16()), activation)
    check(y, exact, peer)
    grad = torch.randn_like(y)
    got, wide, other = (
        torch.autograd.grad(result, (x, bias), grad.to(result.dtype), retain_graph=True)
        for result in (y, exact, peer)
    )
    for one, expected, allowed in zip(got, wide, other, strict=True):
        check(one, expected.double(), allowed)


@pytest.mark.parametrize(
    ("kernel", "rows", "major", "name"),
    [
        ("auto", 1, 8, "nm_skinny"),
        ("auto", 16, 9, "nm_skinny"),
        ("auto", 17, 8, "nm_gemm_sm80"),
        ("auto", 17, 9, "nm_gemm_sm90"),
        ("auto", 17, 12, "nm_gemm_sm80"),
        ("gemm", 1, 9, "nm_gemm_sm90"),
        ("skinny", 8, 9, "nm_skinny"),
    ],
)
def test_choice_of_the_cuda_kernel(kernel, rows, major, name):
    assert nm_packed.kernel_for(kernel, rows, major) == name
