"""MaskBank and the masks of a whole network: memory, agreement with the ops, exact counts."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_cocktail import NM, Block, Channel, Dense, MaskBank, Unstructured, ops
from sparse_cocktail.schedules import keep_count
from sparse_cocktail.selection import eligible, magnitude_masks, unified_stage

# A depthwise, an odd, a two-word and a linear weight (in = 1, 7, 40, 24): few patterns fit all.
SHAPES = [(8, 1, 3, 3), (5, 7, 3, 3), (12, 40, 1, 1), (16, 24)]
TOTAL = 8 * 9 + 5 * 7 * 9 + 12 * 40 + 16 * 24


@pytest.fixture
def weights():
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


@pytest.fixture
def bank(weights):
    return MaskBank(weights)


def unpack(weights, bits):
    return [ops.unpack_mask(b, w.shape) for b, w in zip(bits, weights, strict=True)]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(map(torch.equal, ours, theirs))


def alive(bits):
    """Channels of each weight that keep anything."""
    return [b.flatten(1).ne(0).any(1) for b in bits]


def assert_whole_rows(weights, bits):
    for mask in unpack(weights, bits):
        rows = mask.flatten(1)
        assert torch.equal(rows.any(1), rows.all(1)), "a channel is neither kept nor pruned"


def inside(small, large):
    return all(not ops.mask_andnot(s, g).any() for s, g in zip(small, large, strict=True))


# ---- rows ----------------------------------------------------------------------------------------


def test_rows_start_pruned_and_views_share_their_memory(bank, weights):
    row = bank.add()
    assert (row, len(bank), bank.numel, bank.count(row)) == (0, 1, TOTAL, 0)
    assert [tuple(v.shape) for v in bank.views(row)] == [
        (8, 9, 1),
        (5, 9, 1),
        (12, 1, 2),
        (16, 1, 1),
    ]
    bank.flat(row).fill_(1)
    assert all((view == 1).all() for view in bank.views(row))
    assert sum(v.numel() for v in bank.views(row)) == bank.flat(row).numel()
    bank.views(row)[-1].zero_()
    assert bank.count(row) == bank.flat(row).numel() - 16


def test_a_flat_tensor_is_split_into_views_of_it(bank):
    flat = torch.zeros_like(bank.flat(bank.add()))
    for value, view in enumerate(bank.split(flat)):
        view.fill_(value + 1)
    sizes = [view.numel() for view in bank.split(flat)]
    assert torch.equal(flat, torch.arange(1, 5).int().repeat_interleave(torch.tensor(sizes)))


def test_rows_and_views_follow_the_weights_to_another_device(bank, weights):
    rows = bank.add(ops.topk_masks(weights, 100)), bank.add()
    bank.weights[:] = [w.detach().to("meta") for w in weights]
    for row in (*rows, bank.add()):
        assert {t.device.type for t in (bank.flat(row), *bank.views(row))} == {"meta"}


def test_addresses_are_stable_and_rows_independent(bank, weights):
    first = bank.add(ops.topk_masks(weights, 100))
    addresses = [v.data_ptr() for v in bank.views(first)]
    flat, digest = bank.flat(first).data_ptr(), bank.digest(first)
    for _ in range(20):
        bank.topk_(bank.add(), TOTAL)
    assert len(bank) == 21 and bank.flat(first).data_ptr() == flat
    assert [v.data_ptr() for v in bank.views(first)] == addresses
    assert bank.digest(first) == digest and bank.count(first) == 100
    bank.topk_(first, 7)
    assert [v.data_ptr() for v in bank.views(first)] == addresses and bank.count(first) == 7


def test_digest_tells_masks_apart(bank, weights):
    a, b = bank.add(ops.topk_masks(weights, 50)), bank.add(ops.topk_masks(weights, 50))
    assert bank.digest(a) == bank.digest(b) and len(bank.digest(a)) == 64
    bank.views(b)[2][0, 0, 0] ^= 1
    assert bank.digest(a) != bank.digest(b)


def test_set_refuses_other_shapes(bank, weights):
    row = bank.add(ops.topk_masks(weights, 50))
    digest = bank.digest(row)
    masks = ops.topk_masks(weights, 60)
    for wrong in (masks[:-1], masks[::-1], [*masks[:-1], masks[-1][:3]]):
        with pytest.raises(ValueError, match=r"MaskBank: bits.* (has 3 entries|mask bits \(out)"):
            bank.set_(row, wrong)
    assert bank.digest(row) == digest


def test_a_selection_ranks_the_present_values(bank, weights):
    row = bank.add()
    bank.topk_(row, 10)
    with torch.no_grad():
        weights[0].zero_(), weights[3].mul_(100)
    bank.topk_(row, 10)
    assert_same(bank.views(row), ops.topk_masks(weights, 10))
    assert [int(ops.mask_count(v)) for v in bank.views(row)] == [0, 0, 0, 10]


def test_bank_without_weights():
    bank = MaskBank([])
    assert bank.numel == 0 and bank.count(bank.add()) == 0


# ---- selections equal the ops --------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 333, TOTAL])
@pytest.mark.parametrize("kind", [int, torch.tensor], ids=["int", "tensor"])
def test_topk(bank, weights, keep, kind):
    row = bank.add()
    bank.topk_(row, kind(keep))
    assert_same(bank.views(row), ops.topk_masks(weights, keep))
    assert bank.count(row) == keep


def test_topk_within(bank, weights):
    candidates, row = bank.add(), bank.add()
    for view, weight in zip(bank.views(candidates), weights, strict=True):
        view.copy_(ops.pack_mask(torch.rand_like(weight) < 0.5))
    bank.topk_(row, 200, within=candidates)
    assert_same(bank.views(row), ops.topk_masks(weights, 200, bank.views(candidates)))
    assert bank.count(row) == 200 and inside(bank.views(row), bank.views(candidates))
    bank.topk_(row, TOTAL, within=candidates)
    assert bank.digest(row) == bank.digest(candidates), "fewer are eligible: all of them are kept"


def test_topk_within_its_own_row(bank, weights):
    row = bank.add()
    bank.topk_(row, 300)
    before = [v.clone() for v in bank.views(row)]
    bank.topk_(row, 100, within=row)
    assert bank.count(row) == 100 and inside(bank.views(row), before)


def test_nm():
    weights = [torch.randn(6, 8, 3, 3), torch.randn(5, 36)]
    bank = MaskBank(weights)
    row = bank.add()
    bank.nm_(row, 2, 4)
    assert_same(bank.views(row), [ops.nm_mask(w, 2, 4) for w in weights])
    assert bank.count(row) == bank.numel // 2
    with pytest.raises(ValueError, match="in=36, which is not a multiple of m=8"):
        bank.nm_(row, 2, 8)


class Allocations(TorchDispatchMode):
    """Names of torch's ops that return new memory."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "aten" and not op.is_view:
            self.names.append(str(op))
        return op(*args, **(kwargs or {}))


def test_selections_allocate_nothing_after_the_first():
    weights = [torch.randn(6, 8, 3, 3), torch.randn(300, 360), torch.randn(5, 32)]
    bank = MaskBank(weights)
    u, n, c = (bank.add() for _ in range(3))
    keep, channels = torch.tensor(20_000), torch.tensor([3, 150, 4])

    def select():
        bank.topk_(u, keep)
        bank.topk_(u, keep, within=u)
        bank.nm_(n, 2, 4)
        bank.unified_((u, n, c), keep, (2, 4), channels)

    select()
    with Allocations() as seen:
        select()
    assert seen.names == []
    expected = ops.unified_masks(weights, 20_000, (2, 4), [3, 150, 4])
    for row, masks in zip((u, n, c), expected, strict=True):
        assert_same(bank.views(row), masks)


def test_counts_in_tensors_are_read_late_and_clamped(bank):
    row, keep = bank.add(), torch.tensor(5)
    for count, kept in ((7, 7), (-3, 0), (TOTAL + 99, TOTAL)):
        keep.fill_(count)
        bank.topk_(row, keep)
        assert bank.count(row) == kept
    with pytest.raises(ValueError, match=r"MaskBank.topk_: keep=-1 is not in \[0, "):
        bank.topk_(row, -1)
    with pytest.raises(TypeError, match="keep is torch.int32 .*int64"):
        bank.topk_(row, keep.int())
    with pytest.raises(ValueError, match=r"channel_keep\[1\]=6 is not in \[0, 5\]"):
        bank.unified_((row, None, bank.add()), 5, None, [1, 6, 1, 1])


def test_scratch_follows_threads_backend_and_weights(weights, threads):
    bank = MaskBank(weights)
    row = bank.add()
    expected = ops.topk_masks(weights, 300)
    for count in (1, 4, 2):
        threads(count)
        bank.topk_(row, 300)
        assert_same(bank.views(row), expected)
    with ops.backend("reference"):
        bank.topk_(row, 300)
    assert_same(bank.views(row), expected)
    with torch.no_grad():
        weights[3].data = torch.randn_like(weights[3]) * 9
    bank.topk_(row, 300)
    assert_same(bank.views(row), ops.topk_masks(weights, 300))


def test_scratch_of_weights_that_are_gone_is_freed(weights, threads):
    bank = MaskBank(weights)
    row = bank.add()
    for _ in range(3):
        for count in (1, 2):  # a captured graph may hold that of other threads
            threads(count)
            bank.topk_(row, 300)
        backend = ops.chosen("topk_row_", weights[0].device)
        assert len(bank._scratches) == (2 if backend == "cpp" else 1)
        with torch.no_grad():
            weights[0].data = weights[0].data.clone()


def test_channel_counts_in_a_column_of_a_table():
    weights = [torch.randn(8, 64), torch.randn(6, 64)]
    bank, table = MaskBank(weights), torch.tensor([[3, 8], [2, 6]])
    u, n, c = bank.add(), bank.add(), bank.add()
    bank.unified_((u, n, c), 100, (2, 4), table[:, 0])
    assert [int(a.sum()) for a in alive(bank.views(c))] == [3, 2]
    with pytest.raises(ValueError, match="channel_keep has 1 entries for 2 weights"):
        bank.unified_((u, n, c), 100, (2, 4), [3])


def test_a_selection_between_forward_and_backward_is_noticed():
    """Kernels write rows behind autograd's back, but the row's version counts it."""
    weight = torch.randn(6, 64, requires_grad=True)
    bank = MaskBank([weight])
    row, other = bank.add(), bank.add()
    for select in (
        lambda: bank.topk_(row, 10),
        lambda: bank.nm_(row, 1, 4),
        lambda: bank.unified_((other, row, bank.add()), 10, (2, 4), [3]),
    ):
        bank.topk_(row, 200)
        output = ops.masked_linear(torch.randn(3, 64), weight, bank.views(row)[0])
        select()
        with pytest.raises(RuntimeError, match="inplace operation|changed in place"):
            output.sum().backward()


def test_rows_that_would_overwrite_each_other_are_refused(bank):
    u, n, c = bank.add(), bank.add(), bank.add()
    for rows, others in (
        ((u, u, c), {}),
        ((u, None, u), {}),
        ((u, None, c), {"nm_from": u}),
        ((u, None, c), {"nm_from": c}),
        ((u, n, c), {"within": c}),
    ):
        nm = (2, 4) if rows[1] is not None else None
        with pytest.raises(ValueError, match="unified_rows_: .* are the same row"):
            bank.unified_(rows, 400, nm, [3, 2, 6, 8], **others)
    with pytest.raises(ValueError, match=r"nm=\(2, 4\) is given without a row"):
        bank.unified_((u, None, c), 400, (2, 4), [3, 2, 6, 8])


def test_weights_whose_kernel_axes_do_not_merge():
    weights = [torch.randn(4, 32, 3, 5).transpose(2, 3), torch.randn(6, 40)]
    bank = MaskBank(weights)
    row = bank.add()
    bank.topk_(row, 300)
    assert_same(bank.views(row), ops.topk_masks([w.contiguous() for w in weights], 300))


def test_a_row_may_be_its_own_candidates_when_the_bracket_misses():
    """Few are sampled that are large: more than one read, so `within` must be kept."""
    weight = torch.rand(256, 1024)
    weight.view(-1, 32)[:, :16] += 2
    bank = MaskBank([weight])
    row = bank.add()
    bank.topk_(row, 200_000)
    before = [v.clone() for v in bank.views(row)]
    bank.topk_(row, 150_000, within=row)
    assert_same(bank.views(row), ops.topk_masks([weight], 150_000, before))


@pytest.mark.parametrize("nm", [(2, 4), None], ids=["2:4", "from_row"])
@pytest.mark.parametrize("nested", [False, True], ids=["free", "within"])
def test_unified(bank, weights, nm, nested):
    rows = bank.add(), bank.add(), bank.add()
    older, before = bank.add(), bank.add()
    bank.topk_(before, 900)
    bank.set_(older, magnitude_masks(weights, NM(1, 4)))
    within = before if nested else None
    nm_from = None if nm else older
    bank.unified_(rows, 400, nm, [3, 2, 6, 8], 0.8, within, nm_from)
    expected = ops.unified_masks(
        weights,
        400,
        nm,
        [3, 2, 6, 8],
        0.8,
        bank.views(before) if nested else None,
        None if nm else bank.views(older),
    )
    for row, masks in zip(rows, expected, strict=True):
        assert_same(bank.views(row), masks)
    assert bank.count(rows[0]) == 400
    assert [int(a.sum()) for a in alive(bank.views(rows[2]))] == [3, 2, 6, 8]
    assert inside(bank.views(rows[0]), bank.views(before)) or not nested


def test_unified_leaves_a_missing_row_alone(bank):
    u, c, other = bank.add(), bank.add(), bank.add()
    bank.unified_((u, None, c), 400, None, [3, 2, 6, 8], nm_from=None)
    assert bank.count(other) == 0 and bank.count(u) == 400


# ---- which layers can take a pattern -------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "pattern", "reason"),
    [
        ((5, 7, 3, 3), Dense(), None),
        ((5, 7, 3, 3), Unstructured(0.9), None),
        ((5, 7, 3, 3), Channel(0.9), None),
        ((5, 8, 3, 3), NM(2, 4), None),
        ((5, 7, 3, 3), NM(2, 4), "in=7 is not a multiple of 4"),
        ((8, 1, 3, 3), NM(1, 2), "in=1 is not a multiple of 2"),
        ((4, 48), NM(2, 32), "in=48 is not a multiple of 32"),
        ((8, 8), Block(4, 2, 0.5), None),
        ((6, 8), Block(4, 2, 0.5), "out=6 is not a multiple of 4"),
        ((8, 6), Block(2, 4, 0.5), "in=6 is not a multiple of 4"),
        ((5, 7), Block(-1, -1, 0.5), None),
        ((5, 7), Block(1, -1, 0.5), None),
        ((5, 7), Block(-1, 2, 0.5), "in=7 is not a multiple of 2"),
    ],
    ids=str,
)
def test_eligible(shape, pattern, reason):
    assert eligible(shape, pattern) == reason


PATTERNS = {
    "dense": (Dense(), []),
    "unstructured": (Unstructured(0.9), [0, 1, 2, 3]),
    "channel": (Channel(0.6), [0, 1, 2, 3]),
    "2:4": (NM(2, 4), [2, 3]),
    "1:8": (NM(1, 8), [2, 3]),
    "block": (Block(4, 4, 0.7), [2, 3]),
    "row": (Block(1, -1, 0.5), [0, 1, 2, 3]),
    "none": (Block(7, 7, 0.5), []),
}


def expected_masks(pattern, weights):
    """The op of the pattern on the eligible weights; every count is spelled out."""
    if isinstance(pattern, NM):
        return [ops.nm_mask(w, pattern.n, pattern.m) for w in weights]
    if isinstance(pattern, Unstructured):
        return ops.topk_masks(weights, 125)  # 0.1 * 1251 = 125.1
    if isinstance(pattern, Channel):  # 0.4 of 8, 5, 12, 16 channels
        return ops.block_masks(weights, [3, 2, 5, 6], (1, -1))
    keep = 21 if pattern.cols == -1 else 16  # 0.5 * 41 rows; 0.3 * (30 + 24) blocks
    return ops.block_masks(weights, keep, (pattern.rows, pattern.cols))


@pytest.mark.parametrize(("pattern", "chosen"), PATTERNS.values(), ids=PATTERNS)
def test_magnitude_masks_with_mixed_layers(weights, pattern, chosen):
    masks = magnitude_masks(weights, pattern)
    assert not any(m.requires_grad for m in masks)
    if chosen:
        expected = expected_masks(pattern, [weights[i].detach() for i in chosen])
        assert_same([masks[i] for i in chosen], expected)
    for index, mask in enumerate(unpack(weights, masks)):
        if index not in chosen:
            assert mask.all(), f"layer {index} cannot take {pattern} and was pruned"
    if isinstance(pattern, Channel):
        assert_whole_rows(weights, masks)


def test_at_least_one_is_kept():
    weights = [torch.randn(3, 5), torch.randn(4, 4)]
    masks = magnitude_masks(weights, Unstructured(0.99))
    assert sum(int(ops.mask_count(m)) for m in masks) == 1
    rows = magnitude_masks(weights, Channel(0.99))
    assert [int(a.sum()) for a in alive(rows)] == [1, 1]


# ---- a stage of Sparse Cocktail ------------------------------------------------------------------


def stage(bank, sparsity, previous=None, nm=None, nested=False, unified=True):
    u, c, n = previous or (None, None, None)
    return unified_stage(
        bank,
        keep_count(1 - sparsity, TOTAL),
        [keep_count(1 - sparsity / 2, shape[0]) for shape in SHAPES],
        nm,
        0.8,
        within=u,
        nm_from=n,
        channels_within=c if nested else None,
        unified=unified,
    )


@pytest.mark.parametrize("nested", [False, True], ids=["free_channels", "nested_channels"])
def test_stages_keep_exact_counts_and_nest(bank, weights, nested):
    previous, plan = None, [(0.2, None), (0.5, NM(2, 4)), (0.75, None), (0.9, NM(1, 4))]
    for sparsity, nm in plan:
        with torch.no_grad():  # the ranking changes between stages
            for weight in weights:
                weight.copy_(torch.randn_like(weight))
        u, c, n = stage(bank, sparsity, previous, nm, nested)
        assert bank.count(u) == int((1 - sparsity) * TOTAL + 0.5)
        channels = alive(bank.views(c))
        counts = [max(1, int((1 - sparsity / 2) * w.shape[0] + 0.5)) for w in weights]
        assert [int(a.sum()) for a in channels] == counts
        assert_whole_rows(weights, bank.views(c))
        if nm is not None:
            assert_same(bank.views(n), magnitude_masks(weights, nm))
        else:
            assert n == (previous and previous[2]), "the N:M row in force was not passed on"
        if previous is not None:
            assert inside(bank.views(u), bank.views(previous[0]))
            within = inside(bank.views(c), bank.views(previous[1]))
            assert within or not nested, "channels came back although they are nested"
        previous = u, c, n


def test_free_channels_are_those_of_the_scores(bank, weights):
    u, c, n = stage(bank, 0.5, nm=NM(2, 4))
    scores = ops.channel_scores(
        [w.detach() for w in weights], bank.views(u), bank.views(n), beta=0.8
    )
    assert_same(bank.views(c), ops.channel_masks(scores, [6, 4, 9, 12], SHAPES))


def test_channels_by_their_own_weights_ignore_the_other_masks(bank, weights):
    """The ablation without unified mask generation: L1 norms of whole rows."""
    u, c, n = stage(bank, 0.9, nm=NM(1, 4), unified=False)
    rows = [w.detach().abs().flatten(1).sum(1) for w in weights]
    for kept, score, count in zip(alive(bank.views(c)), rows, [4, 3, 7, 9], strict=True):
        assert int(kept.sum()) == count
        assert score[kept].min() >= score[~kept].max()
    other = stage(bank, 0.9, nm=NM(1, 4))
    assert not all(map(torch.equal, bank.views(c), bank.views(other[1])))


def test_nested_channels_are_the_best_of_the_survivors(bank, weights):
    first = stage(bank, 0.5, nm=NM(2, 4))
    survivors = alive(bank.views(first[1]))
    with torch.no_grad():
        for weight, live in zip(weights, survivors, strict=True):
            weight[~live] *= 100  # the dead look best now
    u, c, n = stage(bank, 0.8, first, nested=True)
    scores = ops.channel_scores(
        [w.detach() for w in weights], bank.views(u), bank.views(n), beta=0.8
    )
    for live, score, kept, count in zip(
        survivors, scores, alive(bank.views(c)), [5, 3, 7, 10], strict=True
    ):
        assert not (kept & ~live).any() and int(kept.sum()) == count
        assert score[kept].min() >= score[live & ~kept].max()


BANK_ERRORS = {
    "one": (lambda bank: MaskBank(bank.weights[0]), TypeError, r"weights is a Par.* list"),
    "vector": (
        lambda bank: MaskBank([torch.zeros(3)]),
        ValueError,
        r"weights\[0\] has shape",
    ),
    "modules": (
        lambda bank: MaskBank([torch.nn.Linear(2, 2)]),
        TypeError,
        r"weights\[0\] is a Linear, but it must be a torch.Tensor",
    ),
    "row": (lambda bank: bank.topk_(7, 3), ValueError, r"row=7 is not there, the bank has 1 rows"),
    "row_none": (
        lambda bank: bank.views(None),
        TypeError,
        r"row=None is not an integer",
    ),
    "within": (lambda bank: bank.topk_(0, 3, 5), ValueError, r"row=5 is not there"),
    "share": (lambda bank: bank.topk_(0, 0.5), TypeError, r"topk_: keep=0.5 is not an int.*round"),
    "nm": (lambda bank: bank.nm_(0, 2.0, 4), TypeError, r"nm_row_: n=2.0 is a float"),
    "rows": (
        lambda bank: bank.unified_((None, 0, 0), 3, None, [1] * 4),
        ValueError,
        r"unified_: rows=\(None, 0, 0\) is not \(unstructured, N:M, channel\)",
    ),
    "ratio": (
        lambda bank: bank.unified_((0, 0, 0), 3, NM(2, 4), [1] * 4),
        TypeError,
        r"unified_: nm=NM\(n=2, m=4\) is no pair of ints",
    ),
    "channels": (
        lambda bank: bank.unified_((0, 0, 0), 3, None, 2),
        TypeError,
        r"unified_: channel_keep=2 is no list of counts",
    ),
    "int64": (
        lambda bank: bank.add([b.long() for b in bank.views(0)]),
        TypeError,
        r"bits\[0\] has dtype torch.int64.*pack_mask",
    ),
    "bits": (lambda bank: bank.set_(0, None), TypeError, r"bits=None .* list; give one tensor per"),
}


@pytest.mark.parametrize(("call", "error", "match"), BANK_ERRORS.values(), ids=BANK_ERRORS)
def test_errors_name_row_value_and_rule(bank, call, error, match):
    bank.add()
    with pytest.raises(error, match=match):
        call(bank)


def test_bits_may_come_from_a_generator(bank, weights):
    masks = ops.topk_masks(weights, 50)
    assert_same(bank.views(bank.add(bits for bits in masks)), masks)


def test_nested_channels_stay_dead_where_the_others_are_zero_too(bank, weights):
    first = stage(bank, 0.5, nm=NM(2, 4))
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
    _, channels, _ = stage(bank, 0.8, first, nested=True)
    assert inside(bank.views(channels), bank.views(first[1]))
    assert [int(a.sum()) for a in alive(bank.views(channels))] == [5, 3, 7, 10]
