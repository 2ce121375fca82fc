"""Every backend gives the bits of the reference, on drawn shapes, dtypes, layouts and values.

Hypothesis draws shapes and a seed; values come from torch's generator, which is fast enough for a
million elements. Where C++ has several instruction sets, each of them is a backend of its own.
"""

import math
from contextlib import ExitStack

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sparse_cocktail import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# ---- values --------------------------------------------------------------------------------------


def _picked(numbers, dtype, size, g):
    pool = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    return pool[torch.randint(len(pool), (size,), generator=g)]


def _normal(dtype, size, g):
    return torch.randn(size, generator=g).to(dtype)


def _any_pattern(dtype, size, g):
    """Random bits: every exponent, NaN of every kind, infinities, denormals."""
    words = torch.randint(-(2**15), 2**15, (size * dtype.itemsize // 2,), generator=g)
    return words.to(torch.int16).view(dtype)


def _sprinkled(dtype, size, g):
    """Normal values with few zeros, infinities and NaN among them."""
    rare = _picked([0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan], dtype, size, g)
    return torch.where(torch.rand(size, generator=g) < 0.02, rare, _normal(dtype, size, g))


def _saturating(dtype, size, g):
    """Around 2^25, where a score |w| * 2^38 leaves int64, and sums that leave it later."""
    edge = [2.0**25, 2.0**25 - 2, -(2.0**25), 2.0**24, 2.0**26, 2.0**15, math.inf, math.nan]
    common = _picked([2.0**14, 1.0, -3.0, 2.0**10, 2.0**20, 2.0**22], dtype, size, g)
    return torch.where(torch.rand(size, generator=g) < 0.01, _picked(edge, dtype, size, g), common)


def _halves(dtype, size, g):
    """Multiples of 2^-39: in a score, half of them round to the nearest even number."""
    return torch.randint(-9, 10, (size,), generator=g).to(dtype) * 2.0**-39


def _denormals(dtype, size, g):
    return torch.randint(-9, 10, (size,), generator=g).to(dtype) * (
        torch.finfo(dtype).smallest_normal / 8
    )


VALUES = {
    "normal": _normal,
    "ties": lambda d, n, g: torch.randint(-3, 4, (n,), generator=g).to(d),
    "all_equal": lambda d, n, g: torch.full((n,), -1.5, dtype=d),
    "zeros": lambda d, n, g: _picked([0.0, -0.0], d, n, g),
    "mostly_zero": lambda d, n, g: _normal(d, n, g) * (torch.rand(n, generator=g) < 0.02),
    "one_octave": lambda d, n, g: (1 + torch.rand(n, generator=g)).to(d),
    "sorted": lambda d, n, g: (torch.arange(n) / n).to(d),
    "any_pattern": _any_pattern,
    # so many of each that a count ends among infinities or between them and NaN
    "special": lambda d, n, g: _picked(
        [math.inf, -math.inf, math.nan, -math.nan, 0.0, 1.0, torch.finfo(d).max], d, n, g
    ),
    "sprinkled": _sprinkled,
    "saturating": _saturating,
    "halves": _halves,
    "denormals": _denormals,
    "nan_only": lambda d, n, g: _any_pattern(d, n, g) * math.nan,
}


def _sliced(weight):
    """The same values at strides that are neither dense nor contiguous."""
    wide = weight.new_full([2 * size for size in weight.shape], math.nan)
    return wide[tuple(slice(None, None, 2) for _ in weight.shape)].copy_(weight)


LAYOUTS = {
    "contiguous": lambda w: w,
    "channels_last": lambda w: w.to(memory_format=torch.channels_last) if w.dim() == 4 else w,
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": _sliced,
}

# ---- weights -------------------------------------------------------------------------------------

# Elements of all weights together, and how many cases are drawn. Medium ones fill many tiles, large
# ones every thread. Triton's interpreter takes one in six of the small ones: a selection is some
# 0.3 s there, whatever its size, and one per tensor 0.3 s each.
SIZES = {"small": (4_000, 40), "medium": (60_000, 20), "large": (1_000_000, 6)}
TAPS = ((), (1, 1), (3, 3), (1, 2), (7, 7), (3,), (2, 1, 2))


@st.composite
def units_and_shapes(draw, size, units, most):
    """((down, along), shapes): `out` of every weight is a multiple of `down`, `in` of `along`."""
    down, along = draw(units) if units is not None else (1, 1)
    count = draw(st.integers(1, most))
    each = SIZES[size][0] // count
    shapes = []
    for _ in range(count):
        taps = draw(st.sampled_from(TAPS))
        if down * along * math.prod(taps) > each:
            taps = ()
        unit = down * along * math.prod(taps)
        widest = min(each // unit, (40 if size == "small" else 1500) // along)
        inputs = draw(st.integers(1, max(1, widest)))
        most_rows = max(1, each // (unit * inputs))
        rows = draw(st.integers(1 if size == "small" else -(-most_rows // 2), most_rows))
        shapes.append((rows * down, inputs * along, *taps))
    return (down, along), shapes


class Case:
    """A list of weights and everything else that is random about a call."""

    def __init__(self, size, unit_and_shapes, dtype, values, layout, seed) -> None:
        self.unit, self.shapes = unit_and_shapes
        self.generator = torch.Generator().manual_seed(seed)
        self.interpreted = size == "small" and self.number(0, 5) == 0
        sizes = [math.prod(shape) for shape in self.shapes]
        flat = VALUES[values](dtype, sum(sizes), self.generator)
        parts = zip(flat.split(sizes), self.shapes, strict=True)
        self.weights = [LAYOUTS[layout](part.view(shape)) for part, shape in parts]
        self.total = sum(sizes)

    def masks(self, density=0.5):
        rand = torch.rand
        return [rand(shape, generator=self.generator) < density for shape in self.shapes]

    def bits(self, density=0.5):
        """Random mask bits, made by the reference."""
        with ops.backend("reference"):
            return [ops.pack_mask(mask) for mask in self.masks(density)]

    def number(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def keep(self, most):
        """Nothing, everything, nearly so, or any count."""
        edges = [0, most, min(1, most), max(most - 1, 0)]
        return [*edges, *(self.number(0, most) for _ in range(4))][self.number(0, 7)]

    def __repr__(self) -> str:
        first = self.weights[0]
        return f"{self.shapes} {first.dtype} strides {[w.stride() for w in self.weights]}"


def cases(size, units, most):
    return st.builds(
        Case,
        st.just(size),
        units_and_shapes(size, units, most),
        st.sampled_from(DTYPES),
        st.sampled_from(list(VALUES)),
        st.sampled_from(list(LAYOUTS)),
        st.integers(0, 2**32),
    )


def on_cases(units=None, most=6, **strategies):
    """A test of (usable, case, ...) becomes one per size, each on that size's number of draws."""

    def decorate(test):
        @pytest.mark.parametrize("size", SIZES)
        def on_draws(usable, size):
            # a failure is made smaller where that is quick
            phases = [Phase.generate, Phase.shrink] if size == "small" else [Phase.generate]

            @settings(max_examples=SIZES[size][1], phases=phases)
            @given(case=cases(size, units, most), **strategies)
            def once(**drawn):
                test(usable, **drawn)

            once()

        return on_draws

    return decorate


# ---- backends ------------------------------------------------------------------------------------


def _moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(v, device) for v in value)
    return value


def _flat(value):
    """The tensors of a nest of lists and tuples, on the CPU."""
    if isinstance(value, torch.Tensor):
        return [value.cpu()]
    return [tensor for part in value for tensor in _flat(part)]


def _levels(backend):
    return ops.cpu_levels() if backend == "cpp" and hasattr(ops, "cpu_levels") else [None]


def check(usable, interpreted, op, *arguments, same=None):
    """Call an op with every backend of this machine and compare with the reference.

    `interpreted` says whether Triton's interpreter takes part, too.
    Returns what the reference gave, as a flat list.
    """
    same = same or _equal
    call = getattr(ops, op)
    with ops.backend("reference"):
        expected = _flat(call(*arguments))
    for backend, device in usable(op):
        by_interpreter = backend == "triton" and device.type == "cpu"
        if backend == "reference" or by_interpreter and not interpreted:
            continue
        for level in _levels(backend):
            with ExitStack() as stack:
                stack.enter_context(ops.backend(backend))
                if level is not None:
                    stack.enter_context(ops.cpu_level(level))
                found = _flat(call(*_moved(arguments, device)))
            assert len(found) == len(expected), backend
            for i, (got, wanted) in enumerate(zip(found, expected, strict=True)):
                problem = same(got, wanted)
                assert not problem, f"{op} by {backend} {level or ''}, result {i}: {problem}"
    return expected


def _equal(got, wanted):
    """What is wrong with a result of integers or bools, or None."""
    if (got.dtype, got.shape) != (wanted.dtype, wanted.shape):
        return f"{got.dtype} {tuple(got.shape)}, not {wanted.dtype} {tuple(wanted.shape)}"
    differ = (got != wanted).nonzero()
    if len(differ):
        return f"{len(differ)} of {got.numel()} differ, first at {differ[0].tolist()}"
    return None


def _equal_patterns(got, wanted):
    """The same for floats: bit patterns, and strides."""
    if got.stride() != wanted.stride():
        return f"strides {got.stride()}, not {wanted.stride()}"
    integer = INTEGERS[wanted.dtype.itemsize]
    return _equal(got.view(integer), wanted.view(integer)) if got.dtype == wanted.dtype else "dtype"


def _equal_but_nan(got, wanted):
    """After a cast, which NaN it is may differ."""
    if not torch.equal(got.isnan(), wanted.isnan()):
        return "NaN at other places"
    return _equal_patterns(got.nan_to_num(nan=1.0), wanted.nan_to_num(nan=1.0))


def count(bits):
    with ops.backend("reference"):
        return sum(int(ops.mask_count(b)) for b in bits)


# ---- pack ----------------------------------------------------------------------------------------


@on_cases(most=2)
def test_pack_unpack_and_count(usable, case):
    for mask, weight in zip(case.masks(), case.weights, strict=True):
        mask = torch.empty_like(weight, dtype=torch.bool).copy_(mask)  # strides of the weight
        (bits,) = check(usable, case.interpreted, "pack_mask", mask)
        (back,) = check(usable, case.interpreted, "unpack_mask", bits, mask.shape)
        (kept,) = check(usable, case.interpreted, "mask_count", bits)
        assert torch.equal(back, mask) and int(kept) == int(mask.sum())


@on_cases()
def test_packed_sliced_masks(usable, case):
    for mask in case.masks(0.1):
        wide = mask.new_ones([2 * size for size in mask.shape])
        sliced = wide[tuple(slice(1, None, 2) for _ in mask.shape)].copy_(mask)
        (bits,) = check(usable, case.interpreted, "pack_mask", sliced)
        assert count([bits]) == int(mask.sum())


# ---- N:M -----------------------------------------------------------------------------------------

COMMON = ((1, 2), (2, 4), (4, 8), (1, 4), (2, 8))


@on_cases(units=st.tuples(st.just(1), st.sampled_from([2, 4, 8]) | st.integers(2, 32)), most=2)
def test_nm(usable, case):
    m = case.unit[1]
    n = case.number(1, m - 1)
    for weight in case.weights:
        bits = check(usable, case.interpreted, "nm_mask", weight, n, m)
        assert count(bits) * m == weight.numel() * n


@pytest.mark.parametrize("ratio", COMMON, ids=str)
@pytest.mark.parametrize("values", VALUES)
def test_common_ratios_on_all_values(usable, values, ratio):
    """in = 232 is 29 groups of 8: no multiple of a word or of a vector."""
    for dtype in DTYPES:
        for shape, layout in (((5, 232), "contiguous"), ((2, 40, 3, 3), "channels_last")):
            (weight,) = Case("small", ((1, 1), [shape]), dtype, values, layout, 1).weights
            check(usable, True, "nm_mask", weight, *ratio)


# ---- top-k ---------------------------------------------------------------------------------------


@on_cases()
def test_topk_over_all_tensors(usable, case):
    keep = case.keep(case.total)
    masks = check(usable, case.interpreted, "topk_masks", case.weights, keep)
    assert count(masks) == keep


@on_cases(density=st.sampled_from([0.0, 0.01, 0.3, 0.99, 1.0]))
def test_topk_within(usable, case, density):
    within = case.bits(density)
    keep = case.keep(case.number(0, 1) * (case.total - count(within)) + count(within))
    masks = check(usable, case.interpreted, "topk_masks", case.weights, keep, within)
    assert count(masks) == min(keep, count(within))


@on_cases(some=st.booleans())
def test_topk_per_tensor(usable, case, some):
    keep = [case.keep(w.numel()) for w in case.weights]
    within = case.bits(0.5) if some else None
    interpreted = case.interpreted and len(keep) <= 2
    check(usable, interpreted, "topk_masks", case.weights, keep, within)


@on_cases()
def test_topk_of_one_count_less_drops_one(usable, case):
    """Neighbouring counts: the threshold crosses every tie of the sequence in its order."""
    keep = case.number(1, case.total)
    more = check(usable, case.interpreted, "topk_masks", case.weights, keep)
    fewer = check(usable, False, "topk_masks", case.weights, keep - 1)
    assert all(not (f & ~m).any() for f, m in zip(fewer, more, strict=True))
    assert (count(more), count(fewer)) == (keep, keep - 1)


# ---- blocks and channels -------------------------------------------------------------------------


@on_cases(
    units=st.tuples(st.sampled_from([1, 2, 3, 4, 16]), st.sampled_from([1, 2, 4, 16, 33])),
    per_tensor=st.booleans(),
    some=st.booleans(),
)
def test_blocks(usable, case, per_tensor, some):
    rows, cols = ((case.unit[i], -1)[case.number(0, 3) == 0] for i in (0, 1))
    with_blocks = [_block_count(shape, rows, cols) for shape in case.shapes]
    keep = [case.keep(n) for n in with_blocks] if per_tensor else case.keep(sum(with_blocks))
    within = case.bits(0.02) if some else None
    check(usable, case.interpreted, "block_masks", case.weights, keep, (rows, cols), within)


def _block_count(shape, rows, cols):
    out, inputs, *taps = shape
    down = 1 if rows == -1 else out // rows
    return down * (1 if cols == -1 else math.prod(taps) * (inputs // cols))


BETAS = st.sampled_from([0.0, 0.8, 0.5, 1.0, 1 / 3, 0.999])


@on_cases(beta=BETAS)
def test_channel_scores(usable, case, beta):
    masks = case.bits(0.5), case.bits(0.9)
    scores = check(usable, case.interpreted, "channel_scores", case.weights, *masks, beta)
    assert all((score >= 0).all() for score in scores)


@pytest.mark.parametrize("beta", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("magnitude", [2.0**10, 2.0**14, 2.0**25 - 2, 2.0**25, 3e38, math.inf])
def test_channel_scores_at_the_edge_of_int64(usable, magnitude, beta):
    """Rows hold 0, 60, 120, ... of these: the last sum fits int64 at 2^10 and not from 2^14 on."""
    weight = (torch.arange(2200) < torch.arange(0, 2200, 60)[:, None]) * 1.0
    weight = torch.where(weight > 0, magnitude, 0.0)
    with ops.backend("reference"):
        bits = [ops.pack_mask(torch.ones_like(weight, dtype=torch.bool))]
    (scores,) = check(usable, False, "channel_scores", [weight], bits, bits, beta)
    assert scores[0] == 0 and (scores.diff() >= 0).all()
    assert (scores[-1] == torch.iinfo(torch.int64).max) == (magnitude > 2.0**10)


@on_cases(largest=st.sampled_from([1, 3, 2**62]))
def test_channel_masks(usable, case, largest):
    draw = {"generator": case.generator}
    scores = [torch.randint(-1, largest + 1, s[:1], **draw) for s in case.shapes]
    keep = [case.keep(s[0]) for s in case.shapes]
    check(usable, case.interpreted, "channel_masks", scores, keep, case.shapes)


# ---- one stage -----------------------------------------------------------------------------------


@on_cases(
    nm=st.sampled_from(["none", "given", *COMMON, (3, 7), (5, 16)]),
    within=st.sampled_from([None, 0.5, 0.05]),
    beta=BETAS,
)
def test_unified(usable, case, nm, within, beta):
    """Layers whose inputs are no multiple of m keep everything in the N:M mask."""
    within = None if within is None else case.bits(within)
    nm_bits = case.bits(0.5) if nm == "given" else None
    ratio = None if isinstance(nm, str) else nm
    channels = [case.keep(shape[0]) for shape in case.shapes]
    arguments = (case.weights, case.keep(case.total), ratio, channels, beta, within, nm_bits)
    check(usable, case.interpreted, "unified_masks", *arguments)


@on_cases(units=st.tuples(st.just(1), st.sampled_from([2, 4, 8])), beta=BETAS)
def test_unified_where_every_layer_takes_the_ratio(usable, case, beta):
    m = case.unit[1]
    n = case.number(1, m - 1)
    channels = [case.keep(shape[0]) for shape in case.shapes]
    within = case.bits(0.7) if case.number(0, 1) else None
    arguments = (case.weights, case.keep(case.total), (n, m), channels, beta, within)
    bits = check(usable, case.interpreted, "unified_masks", *arguments)
    assert count(bits[len(channels) : 2 * len(channels)]) * m == case.total * n


# ---- masked weights ------------------------------------------------------------------------------


@on_cases(cast=st.sampled_from([None, *DTYPES]))
def test_masked_weights(usable, case, cast):
    bits = case.bits(0.5)
    same = _equal_patterns if cast in (None, case.weights[0].dtype) else _equal_but_nan
    found = check(usable, case.interpreted, "masked_weights", case.weights, bits, cast, same=same)
    for weight, words, result in zip(case.weights, bits, found, strict=True):
        (one,) = check(usable, case.interpreted, "masked_weight", weight, words, cast, same=same)
        assert _equal_patterns(one, result) is None
        pruned = ~ops.unpack_mask(words, weight.shape)
        assert not result[pruned].any() and not result[pruned].signbit().any()
