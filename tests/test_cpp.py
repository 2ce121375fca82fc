"""The C++ kernels alone, called without the Python package, against an oracle made of lists.

The oracle shares no code with `sparse_cocktail.reference`: two independent definitions have to
agree with the kernels.
"""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

LIBRARIES = sorted(Path(__file__).parents[1].glob("sparse_cocktail/_C*.so"))
if not LIBRARIES:
    pytest.skip(
        "no C++ extension in this checkout: python setup.py build_ext --inplace",
        allow_module_level=True,
    )
torch.ops.load_library(str(LIBRARIES[0]))
cpp = torch.ops.sparse_cocktail_cpp

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [
    (1, 1),
    (7, 32),
    (5, 33),
    (3, 130),
    (6, 31, 3, 3),
    (2, 64, 1, 3),
    (4, 3, 7, 7),
    (3, 40, 5),
    (2, 7, 2, 1, 3),
]
EMPTY = [(0, 4), (3, 0), (2, 5, 0, 3)]
# Both zeros, both infinities, several NaN, and (added below) the subnormals of each dtype.
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1.5, math.inf, -math.inf, math.nan, -math.nan]


def special_weight(shape, dtype, seed=0):
    """Few distinct values, so ties are everywhere; NaN of both signs with different payloads."""
    tiny = torch.finfo(dtype).smallest_normal
    subnormal = [tiny / 2, -tiny / 4, torch.finfo(dtype).smallest_normal]
    values = torch.tensor(SPECIAL + subnormal, dtype=torch.float64).to(dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    payload = values[7:8].view(integer) + 1  # another NaN
    values = torch.cat([values, payload.view(dtype)])
    generator = torch.Generator().manual_seed(seed)
    return values[torch.randint(len(values), shape, generator=generator)]


def random_weight(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layouts(weight):
    """The same weight, contiguous and (where it exists) channels_last."""
    yield weight.contiguous()
    if weight.dim() == 4:
        yield weight.to(memory_format=torch.channels_last)


def positions(shape):
    """Index tuples of a weight in the order (out, tap, in)."""
    out, inputs, *taps = shape
    tap_indices = list(itertools.product(*map(range, taps)))
    return [(o, i, *t) for o in range(out) for t in tap_indices for i in range(inputs)]


def rank(value):
    """Python's sort key of the order: NaN on top, all alike, then |value|."""
    return (1, 0.0) if math.isnan(value) else (0, abs(value))


def values_in_order(weight):
    out, inputs, *taps = weight.shape
    return weight.double().reshape(out, inputs, math.prod(taps)).transpose(1, 2).flatten().tolist()


def oracle_pack(mask):
    """bool mask -> nested lists of unsigned words, as (out, taps) rows."""
    out, inputs, *taps = mask.shape
    flat = [bool(mask[p]) for p in positions(mask.shape)]
    rows = [flat[r * inputs : (r + 1) * inputs] for r in range(out * math.prod(taps))]
    return [
        [sum(b << j for j, b in enumerate(row[w : w + 32])) for w in range(0, inputs, 32)]
        for row in rows
    ]


def rows_of(bits):
    """Mask bits as the oracle writes them."""
    return [[word & 0xFFFFFFFF for word in row] for row in bits.flatten(0, 1).tolist()]


def flat_of(bits, inputs):
    """Mask bits as a flat list of 0 and 1 in the order (out, tap, in)."""
    return [row[i // 32] >> (i % 32) & 1 for row in rows_of(bits) for i in range(inputs)]


def oracle_topk(weights, keep, eligible=None):
    """Flat 0/1 lists per weight: the `keep` best of all weights together."""
    values = [v for weight in weights for v in values_in_order(weight)]
    allowed = [e for flags in eligible for e in flags] if eligible else [1] * len(values)
    candidates = [i for i, a in enumerate(allowed) if a]
    # sorted() keeps the order of equals in reverse too, so lower positions come first.
    kept = set(sorted(candidates, key=lambda i: rank(values[i]), reverse=True)[:keep])
    flags = [int(i in kept) for i in range(len(values))]
    ends = list(itertools.accumulate(w.numel() for w in weights))
    return [flags[end - w.numel() : end] for end, w in zip(ends, weights, strict=True)]


def check_topk(weights, keep, within=None):
    """Runs the kernel, compares it with the oracle, returns the bits."""
    bits = cpp.topk_masks(weights, keep, within)
    got = [flat_of(b, w.shape[1]) for b, w in zip(bits, weights, strict=True)]
    flags = []
    if within is not None:
        flags = [flat_of(b, w.shape[1]) for b, w in zip(within, weights, strict=True)]
    if len(keep) == 1:
        assert got == oracle_topk(weights, keep[0], flags)
    else:
        for i, (weight, count) in enumerate(zip(weights, keep, strict=True)):
            assert [got[i]] == oracle_topk([weight], count, [flags[i]] if flags else None), i
    for b, w in zip(bits, weights, strict=True):
        assert int(cpp.mask_count(b)) == sum(flat_of(b, w.shape[1])), "padding bits are set"
    return bits


@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_pack_unpack_count(shape):
    dense = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    for mask in layouts(dense):
        bits = cpp.pack_mask(mask)
        out, inputs, *taps = shape
        assert bits.dtype == torch.int32
        assert bits.shape == (out, math.prod(taps), -(-inputs // 32))
        if mask.numel():
            assert rows_of(bits) == oracle_pack(mask)
        back = cpp.unpack_mask(bits, shape)
        assert back.dtype == torch.bool and back.is_contiguous() and torch.equal(back, dense)
        count = cpp.mask_count(bits)
        assert count.shape == () and count.dtype == torch.int64 and count.item() == dense.sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,m", [(1, 2), (2, 4), (4, 8), (3, 5), (7, 13), (1, 32), (31, 32)])
def test_nm_mask(dtype, n, m):
    # 70 groups: full blocks of 32, and a rest; taps and out of more than one.
    for shape, make in itertools.product(
        [(3, 70 * m), (2, m, 3, 3), (2, 3 * m, 3)], [special_weight, random_weight]
    ):
        for weight in layouts(make(shape, dtype, seed=n)):
            values = values_in_order(weight)
            expected = []
            for g in range(0, len(values), m):
                order = sorted(range(g, g + m), key=lambda i: rank(values[i]), reverse=True)
                kept = set(order[:n])
                expected += [int(i in kept) for i in range(g, g + m)]
            assert flat_of(cpp.nm_mask(weight, n, m), shape[1]) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [special_weight, random_weight])
def test_topk_of_one(make, dtype):
    for shape in SHAPES:
        for weight in layouts(make(shape, dtype)):
            count = weight.numel()
            for keep in {0, 1, count // 3, count // 2, count - 1, count}:
                check_topk([weight], [keep])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("within", [False, True])
def test_topk_of_many(dtype, within):
    weights = [special_weight(shape, dtype, seed) for seed, shape in enumerate(SHAPES + EMPTY)]
    weights[4] = weights[4].to(memory_format=torch.channels_last)
    masks = None
    if within:
        masks = [cpp.pack_mask(torch.rand(w.shape) < 0.4) for w in weights]
    total = sum(w.numel() for w in weights)
    for keep in (0, 1, total // 7, total // 2, total):
        check_topk(weights, [keep], masks)
    check_topk(weights, [w.numel() // 2 for w in weights], masks)
    check_topk(weights, [w.numel() for w in weights], masks)  # more than are eligible


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_topk_property(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    shapes = data.draw(
        st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=4), min_size=1, max_size=4)
    )
    seed = data.draw(st.integers(0, 1000))
    weights = [special_weight(shape, dtype, seed + i) for i, shape in enumerate(shapes)]
    total = sum(w.numel() for w in weights)
    within = None
    if data.draw(st.booleans()):
        within = [cpp.pack_mask(torch.rand(w.shape) < 0.5) for w in weights]
    check_topk(weights, [data.draw(st.integers(0, total))], within)


def test_topk_of_none():
    assert cpp.topk_masks([], [0], None) == cpp.topk_masks([], [], []) == []


def test_topk_of_mixed_narrow_dtypes():
    """Widening fp16 and bf16 keys must keep every order and every tie, subnormals included."""
    half = torch.arange(0, 0x7C02, 7, dtype=torch.int16).view(torch.float16)[None]
    weights = [half, half.float(), half.bfloat16(), special_weight((3, 50), torch.float32)]
    total = sum(w.numel() for w in weights)
    for keep in (1, 500, 3000, 9000, 12000, total - 400, total - 200, total - 60):  # to subnormals
        check_topk(weights, [keep])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_topk_ties_across_threads(threads, dtype):
    """Big enough that every thread has its own slot, with ties that span all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(3)
        shapes = [(64, 1000), (20, 600, 3, 3), (1, 70001)]
        weights = [torch.randint(-2, 3, s, generator=generator).to(dtype) for s in shapes]
        check_topk(weights, [sum(w.numel() for w in weights) * 11 // 20])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_masked_weight(shape, dtype):
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5
    bits = cpp.pack_mask(mask)
    for weight in layouts(special_weight(shape, dtype)):
        result = cpp.masked_weight(weight, bits)
        assert result.dtype == dtype and result.stride() == weight.stride()
        # Compared as integers: NaN payloads survive, and what is pruned is +0, never -0.
        expected = torch.where(mask, weight.contiguous().view(integer), 0)
        assert torch.equal(result.contiguous().view(integer), expected)


def test_masked_weight_of_a_slice():
    weight = torch.randn(6, 40, 3, 3)[:, 3:36]
    mask = torch.rand(weight.shape) < 0.5
    result = cpp.masked_weight(weight, cpp.pack_mask(mask))
    assert torch.equal(result, torch.where(mask, weight, 0))
    assert torch.equal(cpp.nm_mask(weight, 2, 3), cpp.nm_mask(weight.contiguous(), 2, 3))


WEIGHT = torch.zeros(4, 30)
BITS = torch.zeros(4, 1, 1, dtype=torch.int32)
WRONG = {
    "mask dtype": (lambda: cpp.pack_mask(WEIGHT), "pack_mask: mask has dtype Float"),
    "one axis": (lambda: cpp.pack_mask(torch.zeros(3) > 0), r"mask has shape \(3\)"),
    "count dtype": (lambda: cpp.mask_count(WEIGHT), "mask_count: bits have dtype Float"),
    "unpack shape": (lambda: cpp.unpack_mask(BITS, [4, 33]), r"unpack_mask: bits.*\(4, 1, 2\)"),
    "in % m": (lambda: cpp.nm_mask(WEIGHT, 2, 4), "in=30, which is not a multiple of m=4"),
    "n == m": (lambda: cpp.nm_mask(WEIGHT, 2, 2), "pattern is 2:2"),
    "m > 32": (lambda: cpp.nm_mask(WEIGHT, 2, 33), "pattern is 2:33"),
    "integer weight": (lambda: cpp.nm_mask(WEIGHT.int(), 1, 2), "weight has dtype Int"),
    "taps": (
        lambda: cpp.nm_mask(torch.zeros(2, 2, 3, 4).transpose(2, 3), 1, 2),
        "trailing axes do not merge",
    ),
    "keep < 0": (lambda: cpp.topk_masks([WEIGHT], [-1], None), "keep is -1 of 120"),
    "keep > all": (lambda: cpp.topk_masks([WEIGHT] * 2, [241], None), "keep is 241 of 240"),
    "keep length": (lambda: cpp.topk_masks([WEIGHT] * 3, [1, 2], None), "keep has 2 entries for 3"),
    "within length": (
        lambda: cpp.topk_masks([WEIGHT] * 2, [1], [BITS]),
        "within has 1 masks for 2 weights",
    ),
    "within shape": (
        lambda: cpp.topk_masks([WEIGHT] * 2, [1], [BITS, BITS[1:]]),
        r"within\[1\] has shape \(3, 1, 1\)",
    ),
    "fp64 with fp32": (
        lambda: cpp.topk_masks([WEIGHT, WEIGHT.double()], [1], None),
        "mix float64 with narrower dtypes",
    ),
    "bits dtype": (lambda: cpp.masked_weight(WEIGHT, BITS.long()), "bits has dtype Long"),
}


@pytest.mark.parametrize("call,message", WRONG.values(), ids=WRONG)
def test_errors_name_value_rule_and_remedy(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
