"""Packing and selecting masks, against oracles in pure Python that sort tuples."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cocktail import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 1), (1, 37), (5, 7), (2, 64), (3, 33, 1, 1), (5, 4, 3, 3), (2, 31, 1, 2), (3, 8, 5))

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def each_backend(op):
    return pytest.mark.parametrize("backend", ops.implementations(op))


# ---- the oracle ----------------------------------------------------------------------------------


def positions(shape):
    """(out, tap, in) of every element, in order."""
    out, inputs, *taps = shape
    return [(o, t, i) for o in range(out) for t in range(math.prod(taps)) for i in range(inputs)]


def values_at(weight):
    """{(out, tap, in): value} with exact Python floats."""
    out, inputs = weight.shape[:2]
    rows = weight.double().reshape(out, inputs, -1).tolist()
    return {(o, t, i): rows[o][i][t] for o, t, i in positions(weight.shape)}


def kept(bits):
    """Positions of all set bits, those of the padding too."""
    return {
        (o, t, 32 * w + j)
        for o, row in enumerate(bits.tolist())
        for t, words in enumerate(row)
        for w, word in enumerate(words)
        for j in range(32)
        if word >> j & 1
    }


def rank(value):
    """Sorts the largest |value| first, NaN before everything."""
    return (0, 0.0) if math.isnan(value) else (1, -abs(value))


def oracle_topk(weights, keep, eligible=None):
    """One set of kept positions per weight."""
    candidates = sorted(
        (rank(value), index, position)
        for index, weight in enumerate(weights)
        for position, value in values_at(weight).items()
        if eligible is None or position in eligible[index]
    )
    chosen = [set() for _ in weights]
    for _, index, position in candidates[:keep]:
        chosen[index].add(position)
    return chosen


def oracle_nm(weight, n, m):
    values = values_at(weight)
    chosen = set()
    for o, t, start in values:
        if start % m == 0:
            group = sorted((rank(values[o, t, start + j]), j) for j in range(m))
            chosen |= {(o, t, start + j) for _, j in group[:n]}
    return chosen


# ---- adversarial values --------------------------------------------------------------------------


def _nans(dtype):
    """NaN of both signs, quiet and signalling, with small and full payloads."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    infinity = torch.tensor(math.inf, dtype=dtype).view(integer)
    largest, lowest = torch.iinfo(integer).max, torch.iinfo(integer).min
    positive = [infinity | payload for payload in (1, 3, largest)]
    return torch.stack([*positive, *(p | lowest for p in positive)]).view(dtype)


def _pick(pool, shape):
    return pool[torch.randint(len(pool), shape)]


def _special(dtype):
    plain = [math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0]
    limits = [torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).tiny]
    return torch.tensor(plain + limits, dtype=dtype)


def _denormals(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    step = tiny * torch.finfo(dtype).eps  # the smallest denormal
    return torch.tensor([step * k for k in (0, 1, -1, 2, -2, 3)] + [tiny, -tiny], dtype=dtype)


VALUES = {
    "normal": lambda dtype, shape: torch.randn(shape).to(dtype),
    "ties": lambda dtype, shape: torch.randint(-2, 3, shape).to(dtype),
    "all_equal": lambda dtype, shape: torch.full(shape, -1.5, dtype=dtype),
    "signed_zeros": lambda dtype, shape: _pick(torch.tensor([0.0, -0.0], dtype=dtype), shape),
    "denormals": lambda dtype, shape: _pick(_denormals(dtype), shape),
    "special": lambda dtype, shape: _pick(_special(dtype), shape),
    "nan": lambda dtype, shape: _pick(torch.cat([_nans(dtype), _special(dtype)]), shape),
    "nan_only": lambda dtype, shape: _pick(_nans(dtype), shape),
}
each_value = pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)


def _sliced(weight):
    """The same values at strides that are neither dense nor contiguous."""
    wide = torch.full([2 * size for size in weight.shape], math.nan, dtype=weight.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in weight.shape)]
    return view.copy_(weight)


LAYOUTS = {
    "contiguous": lambda w: w,
    "channels_last": lambda w: w.to(memory_format=torch.channels_last) if w.dim() == 4 else w,
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": _sliced,
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


# ---- pack, unpack, combine -----------------------------------------------------------------------


@each_backend("pack_mask")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_sets_exactly_the_mask_and_no_padding(backend, device, shape):
    mask = torch.rand(shape) < 0.5
    with ops.backend(backend):
        bits = ops.pack_mask(mask.to(device))
    assert bits.dtype == torch.int32
    assert tuple(bits.shape) == (shape[0], math.prod(shape[2:]), -(-shape[1] // 32))
    assert kept(bits) == {p for p, value in values_at(mask).items() if value}


@each_backend("unpack_mask")
@each_layout
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (3, 0)], ids=str)
def test_unpack_inverts_pack(backend, device, layout, shape):
    mask = layout(torch.rand(shape) < 0.5)
    with ops.backend(backend):
        back = ops.unpack_mask(ops.pack_mask(mask.to(device)), shape)
    assert back.dtype == torch.bool and back.is_contiguous()
    assert torch.equal(back.cpu(), mask)


@each_backend("pack_mask")
def test_bit_31_is_the_sign_of_the_word(backend, device):
    mask = torch.zeros(1, 64, dtype=torch.bool)
    mask[0, 31] = mask[0, 32] = True
    with ops.backend(backend):
        bits = ops.pack_mask(mask.to(device))
        assert bits.tolist() == [[[-(2**31), 1]]]
        assert int(ops.mask_count(bits)) == 2


@each_backend("mask_count")
@pytest.mark.parametrize("shape", [(0,), (1,), (1000,), (7, 9, 3)], ids=str)
def test_count_of_any_words(backend, device, shape):
    words = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)
    with ops.backend(backend):
        count = ops.mask_count(words.to(device))
    assert count.shape == () and count.dtype == torch.int64
    expected = sum(int(word & 0xFFFFFFFF).bit_count() for word in words.flatten().tolist())
    assert int(count) == expected


@pytest.mark.parametrize("name", ["mask_and", "mask_or", "mask_andnot"])
def test_combinations_are_set_operations(name):
    a, b = (ops.pack_mask(torch.rand(5, 37, 3, 3) < 0.5) for _ in range(2))
    operation = {"mask_and": set.__and__, "mask_or": set.__or__, "mask_andnot": set.__sub__}
    assert kept(getattr(ops, name)(a, b)) == operation[name](kept(a), kept(b))


@given(out=st.integers(1, 4), inputs=st.integers(1, 70), taps=st.integers(1, 4), data=st.data())
def test_round_trip_of_drawn_masks(usable, out, inputs, taps, data):
    size = out * inputs * taps
    drawn = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    mask = torch.tensor(drawn).view(out, inputs, taps)
    for backend, device in usable("pack_mask"):
        with ops.backend(backend):
            bits = ops.pack_mask(mask.to(device))
            assert torch.equal(ops.unpack_mask(bits, mask.shape).cpu(), mask), backend
            assert int(ops.mask_count(bits)) == sum(drawn), backend


# ---- N:M -----------------------------------------------------------------------------------------

RATIOS = ((1, 2), (2, 4), (4, 8), (1, 3), (2, 5), (3, 7), (1, 32), (31, 32))


@each_backend("nm_mask")
@each_dtype
@each_value
def test_nm_keeps_the_n_largest_of_every_group(backend, device, dtype, values):
    for n, m in RATIOS:
        for shape in ((1, m), (3, 3 * m), (2, 2 * m, 3, 1)):
            weight = values(dtype, shape)
            with ops.backend(backend):
                bits = ops.nm_mask(weight.to(device), n, m)
            assert kept(bits) == oracle_nm(weight, n, m), f"{n}:{m} of {shape}"


@each_backend("nm_mask")
@each_layout
@pytest.mark.parametrize("shape", [(5, 64), (3, 20, 3, 3), (2, 36, 5)], ids=str)
def test_nm_reads_any_strides(backend, device, layout, shape):
    weight = layout(torch.randint(-3, 4, shape).float())
    with ops.backend(backend):
        bits = ops.nm_mask(weight.to(device), 2, 4)
    assert kept(bits) == oracle_nm(weight, 2, 4)


# ---- top-k ---------------------------------------------------------------------------------------


@each_backend("topk_masks")
@each_dtype
@each_value
def test_topk_over_all_tensors(backend, device, dtype, values):
    weights = [values(dtype, shape) for shape in SHAPES]
    total = sum(w.numel() for w in weights)
    for keep in (0, 1, total // 10, total // 2, total - 1, total):
        with ops.backend(backend):
            masks = ops.topk_masks([w.to(device) for w in weights], keep)
        assert [kept(bits) for bits in masks] == oracle_topk(weights, keep), f"keep={keep}"


@each_backend("topk_masks")
@each_value
def test_topk_per_tensor(backend, device, values):
    weights = [values(torch.float32, shape) for shape in SHAPES]
    keep = [w.numel() * index // len(SHAPES) for index, w in enumerate(weights)]
    with ops.backend(backend):
        masks = ops.topk_masks([w.to(device) for w in weights], keep)
    for weight, count, bits in zip(weights, keep, masks, strict=True):
        assert [kept(bits)] == oracle_topk([weight], count), f"{tuple(weight.shape)}, {count}"


@each_backend("topk_masks")
@each_dtype
@each_value
def test_topk_within_eligible_elements(backend, device, dtype, values):
    weights = [values(dtype, shape) for shape in SHAPES]
    within = [ops.pack_mask(torch.rand(shape) < 0.3) for shape in SHAPES]
    eligible = [kept(bits) for bits in within]
    most = sum(map(len, eligible))
    for keep in (0, 1, most // 2, most, most + 1, sum(w.numel() for w in weights)):
        with ops.backend(backend):
            masks = ops.topk_masks(
                [w.to(device) for w in weights], keep, [b.to(device) for b in within]
            )
        expected = oracle_topk(weights, keep, eligible)
        assert [kept(bits) for bits in masks] == expected, f"keep={keep} of {most} eligible"


@each_backend("topk_masks")
@each_layout
def test_topk_reads_any_strides(backend, device, layout):
    weights = [layout(torch.randint(-3, 4, shape).float()) for shape in SHAPES]
    with ops.backend(backend):
        masks = ops.topk_masks([w.to(device) for w in weights], 100)
    assert [kept(bits) for bits in masks] == oracle_topk(weights, 100)


@each_backend("topk_masks")
def test_topk_of_nothing(backend, device):
    with ops.backend(backend):
        assert ops.topk_masks([], 0) == ops.topk_masks([], []) == []
        empty = ops.topk_masks(
            [torch.ones(0, 5, device=device), torch.ones(2, 3, device=device)], 2
        )
        shapes = [tuple(bits.shape) for bits in empty]
    assert shapes == [(0, 1, 1), (2, 1, 1)]
    assert kept(empty[1]) == {(0, 0, 0), (0, 0, 1)}


LARGE = {
    "normal": lambda size: torch.randn(size),
    "ties": lambda size: (torch.randn(size) * 8).round(),
    "one_octave": lambda size: 1 + torch.rand(size),
    "wide_range": lambda size: torch.randn(size) * 10.0 ** torch.randint(-30, 30, (size,)),
    "sorted": lambda size: torch.arange(size) / size,
    "mostly_zero": lambda size: torch.randn(size) * (torch.rand(size) < 0.01),
}


@each_backend("topk_masks")
@each_dtype
@pytest.mark.parametrize("values", LARGE.values(), ids=LARGE)
def test_topk_of_many_elements(backend, device, dtype, values):
    shapes = ((64, 67, 3, 3), (1, 1), (40, 1001))
    sizes = [math.prod(shape) for shape in shapes]
    flat = values(sum(sizes)).to(dtype)
    # in memory order (out, tap, in), which channels_last weights have, an argsort is the oracle
    order = np.argsort(-flat.abs().double().numpy(), kind="stable")
    first = flat[: sizes[0]].view(64, 3, 3, 67).permute(0, 3, 1, 2)
    weights = [first, flat[sizes[0], None, None], flat[sizes[0] + 1 :].view(shapes[2])]
    for keep in (1, sum(sizes) // 7, sum(sizes) - 3):
        expected = np.zeros(len(flat), dtype=bool)
        expected[order[:keep]] = True
        with ops.backend(backend):
            bits = ops.topk_masks([w.to(device) for w in weights], keep)
        masks = [ops.unpack_mask(b.cpu(), s) for b, s in zip(bits, shapes, strict=True)]
        masks[0] = masks[0].permute(0, 2, 3, 1)
        got = torch.cat([mask.reshape(-1) for mask in masks]).numpy()
        wrong = np.flatnonzero(got != expected)
        assert not len(wrong), f"keep={keep}: {len(wrong)} differ, first at {wrong[:5]}"


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("op", ["topk_masks", "nm_mask"])
def test_thread_count_does_not_matter(threads, count, op):
    weight = (torch.randn(97, 1024, 3, 1) * 5).round()
    threads(4)
    expected = _select(op, weight)
    threads(count)
    assert torch.equal(_select(op, weight), expected)


def _select(op, weight):
    return ops.nm_mask(weight, 3, 8) if op == "nm_mask" else ops.topk_masks([weight], 12345)[0]


# ---- properties ----------------------------------------------------------------------------------

POOL = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-40, 3e38, math.inf, -math.inf, math.nan])
FLOATS = POOL | st.floats(width=32)


@st.composite
def weight_lists(draw):
    weights = []
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 2)))
        size = math.prod(shape)
        drawn = draw(st.lists(POOL, min_size=size, max_size=size))
        weights.append(torch.tensor(drawn).view(shape))
    return weights


def _counts(masks):
    return sum(int(ops.mask_count(bits)) for bits in masks)


@given(weights=weight_lists(), data=st.data())
def test_topk_is_exact_nested_and_complementary(usable, weights, data):
    total = sum(w.numel() for w in weights)
    fewer, more = sorted(data.draw(st.tuples(*[st.integers(0, total)] * 2)))
    everything = [ops.pack_mask(torch.ones_like(w, dtype=torch.bool)) for w in weights]
    for backend, device in usable("topk_masks"):
        placed = [w.to(device) for w in weights]
        with ops.backend(backend):
            large = ops.topk_masks(placed, more)
            small = ops.topk_masks(placed, fewer)
            nested = ops.topk_masks(placed, fewer, large)
            refilled = ops.topk_masks(placed, more, small)
        assert _counts(large) == more, backend
        assert [kept(b) for b in large] == oracle_topk(weights, more), backend
        assert all(map(torch.equal, nested, small)), f"{backend}: within changed the choice"
        assert all(map(torch.equal, refilled, small)), f"{backend}: left the eligible ones"
        rest = [ops.mask_andnot(e, b.cpu()) for e, b in zip(everything, large, strict=True)]
        assert _counts(rest) == total - more, backend
        assert not any(ops.mask_and(r, b.cpu()).any() for r, b in zip(rest, large, strict=True))


@given(m=st.integers(2, 32), data=st.data())
def test_nm_keeps_exactly_n_in_every_group(usable, m, data):
    n = data.draw(st.integers(1, m - 1))
    drawn = data.draw(st.lists(FLOATS, min_size=2 * 2 * m, max_size=2 * 2 * m))
    weight = torch.tensor(drawn).view(2, 2 * m)
    for backend, device in usable("nm_mask"):
        with ops.backend(backend):
            bits = ops.nm_mask(weight.to(device), n, m)
        counts = ops.unpack_mask(bits.cpu(), weight.shape).view(2, 2, m).sum(-1)
        assert (counts == n).all(), f"{backend}: {counts.tolist()}"
        assert kept(bits) == oracle_nm(weight, n, m), backend


@pytest.mark.parametrize("op", ["nm_mask", "topk_masks"])
def test_parameters_are_taken_and_nothing_requires_grad(op):
    bits = _select(op, torch.nn.Parameter(torch.randn(16, 1024)))
    assert not bits.requires_grad
    assert int(ops.mask_count(bits)) == (6144 if op == "nm_mask" else 12345)
