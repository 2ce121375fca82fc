"""Channel scores, channel, block and unified masks, against exact Python integers."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cocktail import ops

LARGEST = 2**63 - 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((1, 1), (5, 37), (8, 16, 3, 3), (4, 33, 1, 2), (6, 12, 5))

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def each_backend(op):
    return pytest.mark.parametrize("backend", ops.implementations(op))


def fixed(value):
    """round(|value| * 2^38), half to even; saturates."""
    if math.isnan(value) or math.isinf(value):
        return LARGEST
    return min(round(Fraction(abs(value)) * 2**38), LARGEST)


def row_sums(weight, mask):
    """Saturated fixed-point sum of every output row over a bool mask."""
    values, masks = weight.double().flatten(1).tolist(), mask.flatten(1).tolist()
    return [
        min(sum(fixed(v) for v, m in zip(row, keep, strict=True) if m), LARGEST)
        for row, keep in zip(values, masks, strict=True)
    ]


def oracle_scores(weight, unstructured, nm, parts):
    sums = zip(row_sums(weight, unstructured), row_sums(weight, nm), strict=True)
    return [min(min(parts[0] * u, LARGEST) + min(parts[1] * n, LARGEST), LARGEST) for u, n in sums]


def scores_of(weight, unstructured, nm, beta=0.8):
    packed = [ops.pack_mask(mask) for mask in (unstructured, nm)]
    return ops.channel_scores([weight], packed[:1], packed[1:], beta)[0]


def ones(weight):
    return torch.ones(weight.shape, dtype=torch.bool, device=weight.device)


def masks_of(bits, shapes):
    return [ops.unpack_mask(b.cpu(), s) for b, s in zip(bits, shapes, strict=True)]


# ---- scores --------------------------------------------------------------------------------------

BETAS = {0.8: (4, 1), 0.0: (0, 1), 1.0: (1, 0), 0.5: (1, 1), 0.25: (1, 3), 1 / 3: (1, 2)}


@each_backend("channel_scores")
@each_dtype
@pytest.mark.parametrize(("beta", "parts"), BETAS.items(), ids=lambda v: str(v)[:5])
def test_scores_are_exact_integers(backend, device, dtype, beta, parts):
    for shape in SHAPES:
        weight = (torch.randn(shape) * 10.0 ** torch.randint(-14, 6, shape)).to(dtype)
        masks = [torch.rand(shape) < 0.5 for _ in range(2)]
        with ops.backend(backend):
            got = scores_of(weight.to(device), *(m.to(device) for m in masks), beta)
        assert got.dtype == torch.int64
        assert got.tolist() == oracle_scores(weight, *masks, parts), shape


@each_backend("channel_scores")
@pytest.mark.parametrize(
    ("row", "beta", "expected"),
    [
        ([math.inf, 1.0], 0.8, LARGEST),
        ([math.nan, 0.0], 0.8, LARGEST),
        ([-math.nan, -math.inf], 0.5, LARGEST),
        ([1e30, -1e30], 0.8, LARGEST),
        ([2.0**24, 2.0**24], 1.0, LARGEST),  # 2^63: one above the largest
        ([2.0**24, 0.0], 1.0, 2**62),
        ([2.0**23, 2.0**22], 0.5, 3 * 2**61),  # both halves of beta = 1/2 are 3 * 2^60
        ([2.0**24, 0.0], 0.5, LARGEST),  # 2^62 + 2^62
        ([2.0**22, 0.0], 0.8, 5 * 2**60),
        ([2.0**23, 0.0], 0.8, LARGEST),  # 4 * 2^61 alone is 2^63
        ([2.0**-38, -(2.0**-38)], 1.0, 2),
        ([2.0**-39, 0.0], 1.0, 0),  # one half goes to the even 0 ...
        ([3 * 2.0**-39, 0.0], 1.0, 2),  # ... and 3/2 to the even 2
        ([0.0, -0.0], 0.8, 0),
    ],
    ids=str,
)
def test_scores_saturate_and_round(backend, device, row, beta, expected):
    weight = torch.tensor([row], device=device)
    with ops.backend(backend):
        assert scores_of(weight, ones(weight), ones(weight), beta).tolist() == [expected]


@each_backend("channel_scores")
@each_dtype
def test_many_saturated_elements_do_not_wrap(backend, device, dtype):
    weight = torch.full((2, 1025, 3), math.inf, dtype=dtype, device=device)
    with ops.backend(backend):
        assert scores_of(weight, ones(weight), ones(weight)).tolist() == [LARGEST] * 2


@each_backend("channel_scores")
def test_pruned_nan_counts_nothing(backend, device):
    weight = torch.tensor([[math.nan, 1.0]], device=device)
    mask = torch.tensor([[False, True]], device=device)
    with ops.backend(backend):
        assert scores_of(weight, mask, mask).tolist() == [5 * 2**38]


@each_backend("channel_scores")
@each_dtype
def test_scores_do_not_depend_on_the_order(backend, device, dtype):
    weight = (torch.randn(16, 999) * 10.0 ** torch.randint(-9, 5, (16, 999))).to(dtype)
    mask = torch.rand(weight.shape) < 0.5
    order = torch.randperm(weight.shape[1])
    with ops.backend(backend):
        plain = scores_of(weight.to(device), mask.to(device), ones(weight).to(device))
        permuted = scores_of(
            weight[:, order].to(device), mask[:, order].to(device), ones(weight).to(device)
        )
    assert torch.equal(plain, permuted)


# ---- channel masks -------------------------------------------------------------------------------


@each_backend("channel_masks")
def test_channel_ties_go_to_the_lower_channel(backend, device):
    scores = [torch.tensor([3, 7, 7, 0, 7, LARGEST]), torch.tensor([0, 0, 0])]
    shapes = [(6, 33, 3, 3), (3, 2)]
    with ops.backend(backend):
        bits = ops.channel_masks([s.to(device) for s in scores], [3, 1], shapes)
    rows = [mask.flatten(1) for mask in masks_of(bits, shapes)]
    assert all(((r.all(1)) == r.any(1)).all() for r in rows), "a row is kept in part"
    assert rows[0][:, 0].tolist() == [False, True, True, False, False, True]
    assert rows[1][:, 0].tolist() == [True, False, False]
    assert int(ops.mask_count(bits[0])) == 3 * 33 * 9, "padding bits are set"


@each_backend("channel_masks")
@pytest.mark.parametrize(("keep", "expected"), [(0, 0), (2, 2), (3, 2), (4, 2)])
def test_negative_scores_are_never_kept(backend, device, keep, expected):
    scores = torch.tensor([-1, 5, 0, -(2**63)], device=device)
    with ops.backend(backend):
        (bits,) = ops.channel_masks([scores], [keep], [(4, 10)])
    assert int(ops.mask_count(bits)) == 10 * expected


# ---- blocks --------------------------------------------------------------------------------------


def block_slices(shape, block):
    """{(out block, tap, in block): index of the (out, taps, in) view}, in the order of ties."""
    out, inputs, *taps = shape
    rows = out if block[0] == -1 else block[0]
    whole = block[1] == -1
    cols = inputs if whole else block[1]
    return [
        (
            slice(o, o + rows),
            slice(None) if whole else slice(t, t + 1),
            slice(i, i + cols),
        )
        for o in range(0, out, rows)
        for t in range(1 if whole else math.prod(taps))
        for i in range(0, inputs, cols)
    ]


def viewed(tensor):
    return tensor.reshape(*tensor.shape[:2], -1).transpose(1, 2)


def oracle_blocks(weights, keep, block, within=None):
    """Bool masks (out, taps, in) of the blocks kept over all weights together."""
    candidates = []
    for index, weight in enumerate(weights):
        for number, place in enumerate(block_slices(weight.shape, block)):
            if within is None or viewed(within[index])[place].any():
                values = viewed(weight.double())[place].flatten().tolist()
                score = min(sum(map(fixed, values)), LARGEST)
                candidates.append((-score, index, number, place))
    masks = [torch.zeros(viewed(w).shape, dtype=torch.bool) for w in weights]
    for _, index, _, place in sorted(candidates, key=lambda c: c[:3])[:keep]:
        masks[index][place] = True
    return masks


BLOCKS = ((1, 1), (4, 4), (2, 6), (1, -1), (-1, 3), (-1, -1), (4, -1))


@each_backend("block_masks")
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["all", "within"])
def test_blocks_with_the_largest_sums_are_kept(backend, device, block, nested):
    shapes = ((8, 12), (4, 12, 3, 3), (12, 24, 1, 2))
    weights = [torch.randint(-2, 3, shape).float() for shape in shapes]
    within = [torch.rand(shape) < 0.02 for shape in shapes] if nested else None
    bits = [ops.pack_mask(w.to(device)) for w in within] if nested else None
    total = sum(len(block_slices(shape, block)) for shape in shapes)
    for keep in (0, 1, total // 2, total):
        with ops.backend(backend):
            got = ops.block_masks([w.to(device) for w in weights], keep, block, bits)
        expected = oracle_blocks(weights, keep, block, within)
        for mask, want in zip(masks_of(got, shapes), expected, strict=True):
            assert torch.equal(viewed(mask), want), f"keep={keep} of {total}"


@each_backend("block_masks")
def test_blocks_per_tensor_with_nan_and_saturation(backend, device):
    first = torch.ones(4, 8)
    first[0, 5], first[2, 1], first[3, 7] = math.nan, math.inf, 1e38
    weights = [first, torch.zeros(2, 4, 3)]
    with ops.backend(backend):
        bits = ops.block_masks([w.to(device) for w in weights], [2, 1], (2, 4))
    for weight, keep, b in zip(weights, (2, 1), bits, strict=True):
        (mask,) = masks_of([b], [weight.shape])
        assert torch.equal(viewed(mask), oracle_blocks([weight], keep, (2, 4))[0])


def test_block_of_one_element_is_unstructured():
    weights = [torch.randint(-9, 9, shape).float() for shape in SHAPES]
    for keep in (1, 50, 500):
        blocks = ops.block_masks(weights, keep, (1, 1))
        assert all(map(torch.equal, blocks, ops.topk_masks(weights, keep))), keep


# ---- unified -------------------------------------------------------------------------------------

UNIFIED_SHAPES = ((6, 8), (4, 6, 3, 3), (5, 16, 1, 2), (3, 7))  # in = 6 and 7 do not divide by 4


def compose(weights, keep, nm, channel_keep, beta, within, nm_bits):
    """The three steps from the single ops of the reference backend."""
    with ops.backend("reference"):
        unstructured = ops.topk_masks(weights, keep, within)
        everything = [ops.pack_mask(ones(w)) for w in weights]
        if nm is None:
            ranked = everything if nm_bits is None else nm_bits
        else:
            ranked = [
                everything[i] if w.shape[1] % nm[1] else ops.nm_mask(w, *nm)
                for i, w in enumerate(weights)
            ]
        scores = ops.channel_scores(weights, unstructured, ranked, beta)
        channel = ops.channel_masks(scores, channel_keep, [w.shape for w in weights])
    return unstructured, ranked, channel


@each_backend("unified_masks")
@each_dtype
@pytest.mark.parametrize("nm", [(2, 4), (1, 2), None, "given"], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["all", "within"])
def test_unified_equals_the_three_steps(backend, device, dtype, nm, nested):
    weights = [(torch.randn(s) * 4).round().to(device, dtype) for s in UNIFIED_SHAPES]
    drawn = [
        [ops.pack_mask(torch.rand(s) < 0.6).to(device) for s in UNIFIED_SHAPES] for _ in range(2)
    ]
    within = drawn[0] if nested else None
    # Interpreted, a call of the kernels takes 0.1 s: half of the pairs for one value of `nested`,
    # the other half for the other one.
    thinned = backend == "triton" and device.type == "cpu"
    nm, nm_bits = (None, drawn[1]) if nm == "given" else (nm, None)
    keeps, betas = (0, 1, 99, sum(w.numel() for w in weights)), (0.8, 0.0, 1.0)
    pairs = list(itertools.product(enumerate(keeps), enumerate(betas)))
    for (i, keep), (j, beta) in pairs:
        if thinned and (i + j) % 2 != nested:
            continue
        arguments = weights, keep, nm, [3, 1, 5, 0], beta, within, nm_bits
        with ops.backend(backend):
            got = ops.unified_masks(*arguments)
        for name, mine, theirs in zip(("u", "nm", "c"), got, compose(*arguments), strict=True):
            assert all(map(torch.equal, mine, theirs)), f"{name}, keep={keep}, beta={beta}"


@each_backend("unified_masks")
def test_unified_passes_nm_bits_on_as_a_copy(backend, device):
    weights = [torch.randn(3, 8, device=device)]
    given_bits = [ops.pack_mask(torch.rand(3, 8, device=device) < 0.5)]
    with ops.backend(backend):
        _, passed, _ = ops.unified_masks(weights, 5, None, [2], nm_bits=given_bits)
    assert torch.equal(passed[0], given_bits[0])
    assert passed[0].data_ptr() != given_bits[0].data_ptr()


@each_backend("unified_masks")
def test_unified_of_nothing(backend):
    with ops.backend(backend):
        assert ops.unified_masks([], 0, (2, 4), []) == ([], [], [])


@each_backend("unified_masks")
def test_unified_of_many_elements_on_any_thread_count(backend, device, threads):
    shapes = ((64, 64, 3, 3), (64, 128, 1, 1), (50, 333))
    weights = [torch.randn(s, device=device) for s in shapes]
    weights[0] = weights[0].to(memory_format=torch.channels_last)
    total = sum(w.numel() for w in weights)
    arguments = weights, total // 5, (2, 4), [50, 40, 27], 0.8, None, None
    expected = compose(*arguments)
    for count in (1, 2, 5):
        threads(count)
        with ops.backend(backend):
            got = ops.unified_masks(*arguments)
        for mine, theirs in zip(got, expected, strict=True):
            assert all(map(torch.equal, mine, theirs)), f"{count} threads"


@given(data=st.data(), out=st.integers(1, 6), inputs=st.sampled_from([1, 4, 6, 8, 36]))
def test_unified_counts(usable, data, out, inputs):
    size = out * inputs
    pool = st.sampled_from([0.0, 1.0, -1.0, 1e30, math.inf, math.nan])
    drawn = data.draw(st.lists(pool, min_size=size, max_size=size))
    keep, channels = data.draw(st.tuples(st.integers(0, size), st.integers(0, out)))
    for backend, device in usable("unified_masks"):
        weight = torch.tensor(drawn, device=device).view(out, inputs)
        with ops.backend(backend):
            masks = ops.unified_masks([weight], keep, (2, 4), [channels])
        counts = [int(ops.mask_count(bits[0])) for bits in masks]
        ranked = size if inputs % 4 else size // 2
        assert counts == [keep, ranked, channels * inputs], backend


@pytest.mark.parametrize("shape", [(8,), (7, 4), (8, -5), (8, 4, -1)], ids=str)
def test_channel_masks_of_wrong_shapes(shape):
    with pytest.raises(ValueError, match=r"channel_masks: shapes\[0\]=.* is no shape \(out, in"):
        ops.channel_masks([torch.arange(8)], [3], [shape])


@pytest.mark.parametrize("backend", ops.implementations("block_masks"))
@pytest.mark.parametrize("block", [(1, -1), (-1, 1), (-1, -1), (1, 1)], ids=str)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 5, 0, 3)], ids=str)
def test_blocks_of_nothing(backend, device, block, shape):
    weights = [torch.randn(shape, device=device), torch.randn(4, 4, device=device)]
    with ops.backend(backend):
        empty, bits = ops.block_masks(weights, 1, block)
    assert empty.numel() == 0 and bits.any()
    with pytest.raises(ValueError, match=r"keep=1 is not in \[0, 0\]"):
        ops.block_masks(weights[:1], 1, block)
