"""The C++ kernels alone, called without the Python package, against an oracle made of lists.

The oracle shares no code with `sparse_cocktail.reference`: two independent definitions have to
agree with the kernels.
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
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

LEVELS = ["portable", "avx2", "avx512"][: cpp.best_cpu_level() + 1]


@pytest.fixture(autouse=True, params=range(len(LEVELS)), ids=LEVELS)
def _level(request):
    """Every test runs at every instruction set of this machine."""
    cpp.force_cpu_level(request.param)
    yield
    cpp.force_cpu_level(-1)


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


def masked_weight(weight, bits, dtype=None):
    result = torch.empty_like(weight, dtype=dtype)
    cpp.masked_weights_into([weight], [bits], [result])
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_masked_weight(shape, dtype):
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5
    bits = cpp.pack_mask(mask)
    for weight in layouts(special_weight(shape, dtype)):
        result = masked_weight(weight, bits)
        assert result.dtype == dtype and result.stride() == weight.stride()
        # Compared as integers: NaN payloads survive, and what is pruned is +0, never -0.
        expected = torch.where(mask, weight.contiguous().view(integer), 0)
        assert torch.equal(result.contiguous().view(integer), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masked_weight_with_a_cast(dtype):
    """Rounded to nearest even like torch's own cast: every exponent, ties, subnormals, limits."""
    exponents = torch.arange(0, 0x7F800000, 0x00400000, dtype=torch.int32)
    offsets = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0x18000])
    finite = (exponents[:, None] + offsets.int()).flatten().view(torch.float32)
    special = special_weight((640,), torch.float32)
    weight = torch.cat([finite, -finite, special])
    weight = weight[: weight.numel() // 64 * 64].view(-1, 64)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) < 0.7
    for part in (slice(0, 64), slice(0, 33)):  # full words, and an edge
        source, kept = weight[:, part].contiguous(), mask[:, part]
        result = masked_weight(source, cpp.pack_mask(kept.contiguous()), dtype)
        expected = torch.where(kept, source, 0.0).to(dtype)
        assert torch.equal(result.isnan(), expected.isnan())
        same = result.view(torch.int16) == expected.view(torch.int16)
        assert (same | result.isnan()).all()
        strided = torch.empty(source.shape[::-1]).t().copy_(source)
        again = masked_weight(strided, cpp.pack_mask(kept.contiguous()), dtype)
        assert ((again.view(torch.int16) == expected.view(torch.int16)) | again.isnan()).all()


def test_nm_mask_of_a_slice():
    weight = torch.randn(6, 40, 3, 3)[:, 3:36]
    assert torch.equal(cpp.nm_mask(weight, 2, 3), cpp.nm_mask(weight.contiguous(), 2, 3))


# ---- passes over the weights ---------------------------------------------------------------------

SIZE = (512, 1024)
PASSES = {
    "normal": (lambda: torch.randn(SIZE), 1),
    "all_equal": (lambda: torch.full(SIZE, 0.5), 2),
    "two_values": (lambda: (torch.rand(SIZE) < 0.3) + 1.0, 2),
    "nan": (lambda: torch.full(SIZE, math.nan), 2),
    "denormals": (lambda: torch.randn(SIZE) * 1e-40, 1),
    "mostly_zero": (lambda: torch.randn(SIZE) * (torch.rand(SIZE) < 0.2), 2),
    "one_octave": (lambda: 1 + torch.rand(SIZE), 1),
    "sorted": (lambda: torch.arange(math.prod(SIZE)).view(SIZE) * 1e-6, 1),
    "sample_misled": (lambda: _large_where_sampled(), 2),
    "few_values": (lambda: (torch.randn(SIZE) * 4).round(), 2),
}


def test_one_pass_over_layers_of_many_shapes():
    """Short rows must not count more in the sample, nor may one layer hold all candidates."""
    generator = torch.Generator().manual_seed(5)
    wide = torch.randn(512, 1024, generator=generator)
    short = torch.randn(32_768, 16, generator=generator) * 4
    bands = [torch.rand(256, 1024, generator=generator) + 2**i for i in range(8)]
    for weights in ([wide, short], bands):
        total = sum(w.numel() for w in weights)
        for keep in (total // 20, total // 4, total // 2 + 20_000, total * 3 // 4):
            before = cpp.weight_passes()
            check_topk_fast(weights, keep)
            assert cpp.weight_passes() - before == 1, keep


def check_topk_fast(weights, keep):
    """Exactness of contiguous linear weights by one stable argsort."""
    order = torch.cat([w.flatten() for w in weights]).abs().argsort(descending=True, stable=True)
    expected = torch.zeros(len(order), dtype=torch.bool)
    expected[order[:keep]] = True
    bits = cpp.topk_masks(weights, [keep], None)
    got = [cpp.unpack_mask(b, list(w.shape)).flatten() for b, w in zip(bits, weights, strict=True)]
    assert torch.equal(torch.cat(got), expected)


def _large_where_sampled():
    """Keys that the sample meets (the first 16 of a word) are large, all others small."""
    weight = torch.rand(SIZE)
    weight.view(-1, 32)[:, :16] += 2
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("values,most", PASSES.values(), ids=PASSES)
def test_exact_in_few_passes(values, most, dtype):
    weight = values().to(dtype)
    key = torch.where(weight.isnan(), math.inf, weight.abs().double()).flatten()
    order = key.argsort(descending=True, stable=True)
    for keep in (1, 100_000, int((key > 0).sum()), weight.numel() - 5):
        before = cpp.weight_passes()
        (bits,) = cpp.topk_masks([weight], [keep], None)
        passes = cpp.weight_passes() - before
        expected = torch.zeros(weight.numel(), dtype=torch.bool)
        expected[order[:keep]] = True
        assert torch.equal(cpp.unpack_mask(bits, SIZE).flatten(), expected), keep
        assert 1 <= passes <= most, f"{passes} passes for keep={keep}"


def test_more_than_two_to_the_31_elements():
    """One row, seen 40,000 times through a stride of 0, and another weight after it."""
    row, other = torch.randn(1, 65_536), torch.randn(100, 1000)
    weight = row.expand(40_000, -1)
    total = weight.numel() + other.numel()
    keep = total // 3 + 12_345
    assert total > 2**31
    first, second = cpp.topk_masks([weight, other], [keep], None)
    assert int(cpp.mask_count(first)) + int(cpp.mask_count(second)) == keep
    keys, order = torch.cat([row[0].abs(), other.flatten().abs()]).sort(descending=True)
    copies = torch.where(order < 65_536, 40_000, 1).cumsum(0)
    threshold = keys[(copies >= keep).nonzero()[0, 0]]
    top = cpp.unpack_mask(first[:1].contiguous(), [1, 65_536])
    end = cpp.unpack_mask(first[-1:].contiguous(), [1, 65_536])
    assert torch.equal(top | (row.abs() == threshold), row.abs() >= threshold)
    assert torch.equal(end | (row.abs() == threshold), row.abs() >= threshold)
    rows_kept = cpp.mask_count(first[:, :, 0].contiguous() & 1)
    assert rows_kept in (0, 40_000) or abs(row[0, 0]) == threshold


# ---- rows of a mask bank -------------------------------------------------------------------------


def test_calls_at_the_same_time():
    """Scratch stays from call to call; calls that overlap do not share it, whatever their size."""
    weights = [torch.randn(64, 32 * n, generator=torch.manual_seed(n)) for n in (9, 30, 3, 17)]
    alone = [cpp.topk_masks([w], [w.numel() // 3], None)[0] for w in weights]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(8):
            calls = [
                threads.submit(cpp.topk_masks, [w], [w.numel() // 3], None) for w in weights * 2
            ]
            for call, expected in zip(calls, alone * 2, strict=True):
                assert torch.equal(call.result()[0], expected)


def test_rows_need_enough_scratch():
    weights = [torch.randn(64, 640), torch.randn(7, 33)]
    row = torch.zeros(64 * 20 + 7 * 2, dtype=torch.int32)
    scratch = torch.empty(cpp.workspace_bytes(weights), dtype=torch.uint8)
    cpp.topk_row_(weights, torch.tensor(1000), None, row, scratch)
    assert cpp.mask_count(row) == 1000
    with pytest.raises(RuntimeError, match="topk_row_: scratch has .* bytes left.*ops.workspace"):
        cpp.topk_row_(weights, torch.tensor(1000), None, row, scratch[:64])
    spread = torch.empty(1, dtype=torch.uint8).expand(len(scratch))
    with pytest.raises(RuntimeError, match="topk_row_: scratch has dtype Byte .*contiguous uint8"):
        cpp.topk_row_(weights, torch.tensor(1000), None, row, spread)
    cpp.topk_row_(weights, torch.tensor(1000), None, row, scratch[1:].clone())  # aligned inside
    with pytest.raises(RuntimeError, match="a row of these weights is 1294 contiguous int32"):
        cpp.topk_row_(weights, torch.tensor(1000), None, row[:-1], scratch)


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
    "mixed dtypes": (
        lambda: cpp.topk_masks([WEIGHT, WEIGHT.half()], [1], None),
        r"weights\[1\] has dtype Half, but weights\[0\] has Float",
    ),
    "cast": (
        lambda: masked_weight(WEIGHT.double(), BITS, torch.float16),
        "masked_weights: weights of dtype Double cannot become Half",
    ),
    "level": (lambda: cpp.force_cpu_level(7), "level is 7, but this machine has levels 0 to"),
    "bits dtype": (lambda: masked_weight(WEIGHT, BITS.long()), r"bits\[0\] has dtype Long"),
}


@pytest.mark.parametrize("call,message", WRONG.values(), ids=WRONG)
def test_errors_name_value_rule_and_remedy(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
