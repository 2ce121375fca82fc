"""Spartan: soft masks by their definition, the schedule, the freeze, and what a run leaves."""

import math
from functools import partialmethod

import pytest
import torch
from test_engine import MODEL, Stop, _quiet, crash_before, model, toy
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_cocktail import Cocktail, ops
from sparse_cocktail.config import split_fields
from sparse_cocktail.engine import Trainer, train
from sparse_cocktail.files import read_tensors
from sparse_cocktail.methods import METHODS
from sparse_cocktail.methods.spartan import Spartan, SpartanOptions
from sparse_cocktail.patterns import parse
from sparse_cocktail.pruning import followers
from sparse_cocktail.soft_masks import SoftMasks, block_of, spread, unit_values

FIELDS = {"method": "spartan", "threads": 1, "recalibrate_samples": 64, "epochs": 5, **MODEL}
SHAPES = {0: (8, 4, 3, 3), 2: (8, 12), 3: (4, 8, 1, 1)}  # the weight at 1 is not pruned
PATTERNS = ["unstructured-0.7", "block-4x2-0.6", "block--1x1-0.5", "block-2x-1-0.5", "channel-0.5"]
PROGRESS = [(0.0, 0.0), (0.4, 0.1), (1.0, 0.6), (1.0, 1.0)]


def weights(dtype=torch.float64) -> list[torch.Tensor]:
    shapes = {**SHAPES, 1: (5, 7)}
    return [torch.randn(shapes[i], dtype=dtype) * 0.5 for i in sorted(shapes)]


def masks_of(pattern: str, **changes) -> SoftMasks:
    made = parse(pattern)
    return SoftMasks(SHAPES, block_of(made), made.density, **changes)


def whole(values: torch.Tensor, block: tuple[int, int], shape) -> torch.Tensor:
    """Every weight's unit entry, by index arithmetic: one unit after the other."""
    result = torch.empty(shape, dtype=values.dtype)
    for place in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        out, inputs, *taps = place
        row = 0 if block[0] == -1 else out // block[0]
        tap = torch.arange(math.prod(taps and shape[2:])).view(shape[2:] or (1,))
        tap = int(tap[tuple(taps)]) if taps else 0
        unit = (row, 0, 0) if block[1] == -1 else (row, inputs // block[1], tap)
        result[tuple(place)] = values[unit]
    return result


def by_definition(pattern: str, some, fall, rise, sharpness=10.0, costs=None):
    """(soft mask, hard mask, beta, price per weight) of single weights, the slow way, globally."""
    block = block_of(parse(pattern))
    units, cost, numbers = [], [], []
    for i, shape in SHAPES.items():
        rows = shape[0] if block[0] == -1 else block[0]
        taps = math.prod(shape[2:])
        cols, span = (shape[1], taps) if block[1] == -1 else (block[1], 1)
        grid = (shape[0] // rows, shape[1] // cols, taps // span)
        start = sum(map(len, units))
        index = torch.arange(start, start + math.prod(grid)).view(grid)
        numbers.append(whole(index, block, shape))
        sums = torch.zeros(start + math.prod(grid), dtype=torch.float64)
        sums.index_add_(0, numbers[-1].flatten(), some[i].detach().abs().flatten())
        units.append(sums[start:])
        each = rows * cols * span * (costs[i] if costs else 1)
        cost.append(torch.full((math.prod(grid),), float(each), dtype=torch.float64))
    values, cost = torch.cat(units), torch.cat(cost)
    total, size = float(cost.sum()), sum(math.prod(s) for s in SHAPES.values())
    final = parse(pattern).density * total
    if len(cost.unique()) == 1:
        final = math.floor(parse(pattern).density * len(cost) + 0.5) * float(cost[0])
    budget = total + (final - total) * fall
    beta = 1 + (sharpness * math.sqrt(size / len(cost)) - 1) * rise
    ratio = values / cost * (total / size)  # costs are 1 per weight on average
    low, high = -1e4, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        spent = float((cost * torch.sigmoid(beta * (ratio - middle))).sum())
        low, high = (middle, high) if spent > budget else (low, middle)
    soft = torch.sigmoid(beta * (ratio - low))
    hard, paid = torch.zeros(len(cost), dtype=torch.bool), 0.0
    for unit in ratio.argsort(descending=True).tolist():
        if paid < budget - 1e-6:
            hard[unit], paid = True, paid + float(cost[unit])
    at = {i: n for i, n in zip(SHAPES, numbers, strict=True)}
    return (
        {i: soft[n] for i, n in at.items()},
        {i: hard[n] for i, n in at.items()},
        beta,
        {i: cost[n] for i, n in at.items()},
        at,
    )


# ---- the masks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (8, 12)], ids=["conv", "linear"])
def test_units_and_their_weights(pattern, shape):
    block = block_of(parse(pattern))
    weight = torch.randn(shape, dtype=torch.float64)
    values = unit_values(weight, block)
    if block == (1, 1):
        assert torch.equal(values, weight.abs()) and spread(values, shape, block) is values
        return
    assert torch.equal(spread(values, shape, block), whole(values, block, shape))
    torch.testing.assert_close(values.sum(), weight.abs().sum())
    rows, cols = (n if b == -1 else b for n, b in zip(shape, block, strict=False))
    tile = weight[:rows, :cols]
    if block[1] != -1 and len(shape) == 4:
        tile = tile[..., 0, 0]
    torch.testing.assert_close(values[0, 0, 0], tile.abs().sum())


@pytest.mark.parametrize("costs", [None, {0: 16, 2: 1, 3: 4}], ids=["sparsity", "flops"])
@pytest.mark.parametrize("progress", PROGRESS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_forward_weights_are_those_of_the_definition(pattern, progress, costs):
    some = weights()
    made, bits, _ = masks_of(pattern, costs=costs).weights(some, *progress)
    soft, hard, *_ = by_definition(pattern, some, *progress, costs=costs)
    assert made[1] is some[1] and int(ops.mask_count(bits[1])) == some[1].numel()
    for i in SHAPES:
        assert torch.equal(made[i] != 0, hard[i])
        assert torch.equal(ops.unpack_mask(bits[i], SHAPES[i]), hard[i])
        torch.testing.assert_close(made[i], some[i] * soft[i] * hard[i], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("costs", [None, {0: 16, 2: 1, 3: 4}], ids=["sparsity", "flops"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradient_is_the_formula(pattern, costs):
    """m g + J' (w g), with J' h = beta q (h / c - sum h q / sum c q) per unit, and sign(w)."""
    some = [w.requires_grad_() for w in weights()]
    masks = masks_of(pattern, costs=costs)
    made, *_ = masks.weights(some, 0.7, 0.5)
    grads = {i: torch.randn_like(some[i]) for i in SHAPES}
    outputs, inputs = ([tensors[i] for i in SHAPES] for tensors in (made, some))
    found = torch.autograd.grad(outputs, inputs, list(grads.values()))
    soft, _, beta, cost, at = by_definition(pattern, some, 0.7, 0.5, costs=costs)
    units = 1 + max(int(n.max()) for n in at.values())
    h, m, c = (torch.zeros(units, dtype=torch.float64) for _ in range(3))
    for i, n in at.items():
        h.index_add_(0, n.flatten(), (some[i].detach() * grads[i]).flatten())
        m[n.flatten()], c[n.flatten()] = soft[i].flatten(), cost[i].flatten()
    c = c / masks.budgets[0].scale
    q = m * (1 - m)
    back = beta * q * (h / c - (h * q).sum() / (c * q).sum())
    for i, grad in zip(SHAPES, found, strict=True):
        wanted = soft[i] * grads[i] + back[at[i]] * some[i].detach().sign()
        torch.testing.assert_close(grad, wanted, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("normalise", [False, True], ids=["raw", "rms"])
@pytest.mark.parametrize("pattern", ["unstructured-0.7", "channel-0.5"])
def test_gradient_is_the_slope_of_the_soft_weights(pattern, normalise):
    """Central differences of sum(g w m): zeroing passes gradients straight through."""
    some = [w.requires_grad_() for w in weights()]
    masks = masks_of(pattern, normalise=normalise)
    grads = [torch.randn_like(w) for w in some]

    def loss() -> torch.Tensor:
        soft, _ = masks.soft(masks.values(some), 0.8, 0.7)
        made = masks.products(some, soft)
        return sum((g * w).sum() for g, w in zip(grads, made, strict=True))

    made, *_ = masks.weights(some, 0.8, 0.7)
    found = torch.autograd.grad(made, some, grads)
    step = 1e-5
    with torch.no_grad():
        for i, place in ((0, (1, 2, 0, 1)), (0, (7, 3, 2, 2)), (2, (3, 5)), (3, (0, 0, 0, 0))):
            some[i][place] += step
            above = loss()
            some[i][place] -= 2 * step
            below = loss()
            some[i][place] += step
            torch.testing.assert_close(
                found[i][place], (above - below) / (2 * step), atol=1e-6, rtol=1e-5
            )


def test_rms_makes_masks_blind_to_a_layer_s_scale():
    some = weights()
    scaled = [w * s for w, s in zip(some, (0.01, 1.0, 5.0, 300.0), strict=True)]
    masks = masks_of("unstructured-0.7", normalise=True)
    plain, other = (masks.soft(masks.values(w), 1.0, 1.0)[0] for w in (some, scaled))
    for i in SHAPES:
        torch.testing.assert_close(plain[i], other[i])
    zero = [torch.zeros_like(w).requires_grad_() for w in some]
    made, *_ = masks.weights(zero, 1.0, 0.5)
    (grad,) = torch.autograd.grad(made[0].sum(), zero[0])
    assert grad.isfinite().all()


@pytest.mark.parametrize("how", ["uniform", "erk"])
def test_allocations_have_a_budget_per_layer(how):
    from sparse_cocktail.allocation import layer_counts

    some, masks = weights(), masks_of("unstructured-0.7", allocation=how)
    bits = masks.hard(masks.values(some), 1.0)
    found = [int(ops.mask_count(bits[i])) for i in SHAPES]
    assert found == layer_counts(list(SHAPES.values()), 0.3, how)
    soft, roots = masks.soft(masks.values(some), 1.0, 1.0)
    assert [float(soft[i].sum()) for i in SHAPES] == pytest.approx(found, rel=1e-6)
    assert len(roots) == 3


def test_costs_in_flops_move_the_cut_to_the_costly_layer():
    some, costs = weights(), {0: 64, 2: 1, 3: 16}
    plain, costly = masks_of("unstructured-0.7"), masks_of("unstructured-0.7", costs=costs)
    kept = [m.hard(m.values(some), 1.0) for m in (plain, costly)]
    left = [{i: int(ops.mask_count(bits[i])) / math.prod(SHAPES[i]) for i in bits} for bits in kept]
    assert left[1][0] < left[0][0] and left[1][2] > left[0][2]
    spent = sum(costs[i] * int(ops.mask_count(b)) for i, b in kept[1].items())
    budget = 0.3 * sum(costs[i] * math.prod(s) for i, s in SHAPES.items())
    assert budget <= spent < budget + 64


def test_equal_values_are_kept_by_index_and_the_budget_holds():
    ones = [torch.ones(s, dtype=torch.float32) for s in ((64, 512), (64, 512))]
    costs = {0: 1, 1: 1}
    same = SoftMasks({0: (64, 512), 1: (64, 512)}, (1, 1), 0.25, costs=costs)
    assert int(ops.mask_count(same.hard(same.values(ones), 1.0)[0])) == 16384
    # ratios 1 and 1 at costs 1 and 2: every weight ties, the first layer stays as far as it goes
    other = SoftMasks({0: (64, 512), 1: (64, 512)}, (1, 1), 0.5, costs={0: 1, 1: 2})
    bits = other.hard({0: ones[0], 1: 2 * ones[1]}, 1.0)
    assert int(ops.mask_count(bits[0])) == 32768
    assert int(ops.mask_count(bits[1])) == 8192
    assert ops.unpack_mask(bits[1], (64, 512)).flatten()[:8192].all()


@pytest.mark.parametrize("share", [1e-5, 0.1, 0.5, 0.97, 1.0])
def test_bisection_finds_what_sorting_all_would(share):
    shapes, costs = {0: (100, 300), 1: (64, 500), 2: (10, 10)}, {0: 7, 1: 3, 2: 50}
    values = {i: torch.randn(s).abs().round(decimals=3) for i, s in shapes.items()}  # ties
    masks = SoftMasks(shapes, (1, 1), share, costs=costs)
    bits = masks.hard(values, 1.0)
    found = torch.cat([ops.unpack_mask(bits[i], shapes[i]).flatten() for i in shapes])
    ratios = torch.cat([v.flatten() / costs[i] for i, v in values.items()])
    prices = torch.cat([torch.full((v.numel(),), costs[i]) for i, v in values.items()])
    order = ratios.argsort(descending=True, stable=True)
    before = prices[order].cumsum(0) - prices[order]
    wanted = torch.zeros_like(found)
    wanted[order] = before < math.ceil(masks.budgets[0].final - 1e-6)
    assert torch.equal(found, wanted)


def test_schedule():
    masks = masks_of("block-4x2-0.6", sharpness=20.0)
    (budget,) = masks.budgets
    assert (budget.total, budget.final) == (416, 0.4 * 416 // 8 * 8 + 8)  # 21 of 52 blocks: 168
    assert [budget.at(p) for p in (0, 0.25, 1, 2)] == [416, 416 - 62, 168, 168]
    assert [budget.units(p) for p in (0, 0.25, 0.251, 1)] == [52, 45, 45, 21]
    last = 20 * math.sqrt(8)
    assert [masks.beta(budget, p) for p in (0, 0.5, 1)] == pytest.approx([1, (1 + last) / 2, last])


# ---- a run ---------------------------------------------------------------------------------------


def planned(folder, data=None, net=None, **fields):
    """A trainer before its first step, 3 steps an epoch."""
    fields = {k: v for k, v in FIELDS.items() if k != "model_args"} | fields
    trainer = Trainer(*split_fields(fields), folder, _quiet())
    trainer.prepare(net or model(), data or toy(), False, False)
    return trainer


class Recorded(Spartan):
    """Keeps what every step had: budget, sharpness, soft costs, hard counts, frozen values."""

    def __init__(self):
        super().__init__()
        self.seen, self.frozen = [], []

    def after_step(self, ctx):
        _, masks, _ = self._present(ctx)
        frozen = bool(self.state.kept)
        if frozen:
            self.frozen.append({i: m.clone() for i, m in self.state.kept.items()})
        elif self.at is not None:
            fall, rise = self.progress(ctx.step)
            (budget,) = masks.budgets
            beta = masks.beta(budget, rise)
            self.seen.append((budget.at(fall) / budget.total, beta, *self.at, budget.total))
        super().after_step(ctx)

    def _soft_weights(self, ctx):
        _, masks, some = self._present(ctx)
        made = super()._soft_weights(ctx)
        roots = self.state.roots
        fall, rise = self.progress(ctx.step)
        with torch.no_grad():
            soft, _ = masks.soft(masks.values(some), fall, rise, roots)
        costs = dict(zip(masks.budgets[0].members, masks.budgets[0].costs, strict=True))
        spent = sum(c * float(soft[i].double().sum()) for i, c in costs.items())
        self.at = spent, sum(int(made[i].count_nonzero()) for i in masks.shapes)
        return made


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setitem(METHODS, "spartan", Recorded)


@pytest.mark.parametrize("pattern", ["unstructured-0.8", "block-4x4-0.5", "channel-0.5"])
def test_budgets_hold_in_training_and_soft_values_freeze(tmp_path, recorded, pattern):
    trainer = planned(tmp_path, patterns=pattern)
    trainer.run()
    seen, frozen = trainer.method.seen, trainer.method.frozen
    density = parse(pattern).density
    assert (len(seen), len(frozen)) == (12, 3)  # of 15 steps
    assert [share for share, *_ in seen] == pytest.approx(
        [1, 1 - (1 - density) / 3, 1 - (1 - density) * 2 / 3, *[density] * 9], abs=1e-3
    )
    last = 10 * math.sqrt({"u": 1, "b": 16}.get(pattern[0], 4768 / trainer_units(trainer)))
    assert [beta for _, beta, *_ in seen] == pytest.approx(
        [1 + (last - 1) * t / 12 for t in range(12)]
    )
    for share, _, spent, nonzero, total in seen:
        assert spent == pytest.approx(share * total, rel=1e-6)
        largest = {"u": 1, "b": 16}.get(pattern[0], 16 * 9)
        assert share * total - 1e-3 <= nonzero < share * total + largest
    for values in frozen[1:]:
        assert all(torch.equal(values[i], frozen[0][i]) for i in values)
    kept = torch.cat([m.flatten() for m in frozen[0].values()])
    assert (kept[kept != 0] < 1).any()  # soft ones, not rounded


def test_pruned_weights_train_until_the_masks_freeze(tmp_path, monkeypatch):
    moved = []

    class Moved(Spartan):
        def before_step(self, ctx):
            super().before_step(ctx)
            self.before = [w.detach().clone() for w in self._present(ctx)[2]]

        def after_step(self, ctx):
            name, _, weights = self._present(ctx)
            triples = zip(weights, self.before, ctx.cocktail.masks(name), strict=True)
            some = [(w != b)[~ops.unpack_mask(bits, w.shape)] for w, b, bits in triples]
            moved.append(torch.cat(some).float())
            super().after_step(ctx)

    monkeypatch.setitem(METHODS, "spartan", Moved)
    planned(tmp_path, patterns="unstructured-0.8").run()
    assert len(moved[0]) == 0 and len(moved[-1]) > 3000  # the budget falls
    assert all(some.mean() > 0.99 for some in moved[1:12])
    assert not any(some.any() for some in moved[12:])


class Silent(Spartan):
    """Counts channels that are all zero, and what of the network still listens to them."""

    found = 0

    def before_step(self, ctx):
        super().before_step(ctx)
        _, _, weights = self._present(ctx)
        for norm, index in followers(ctx.model, ctx.cocktail.layers):
            dead = ~norm.live
            kept = ops.unpack_mask(
                ctx.cocktail.masks("channel-0.7000")[index], weights[index].shape
            )
            assert torch.equal(kept.flatten(1).any(1), norm.live)
            assert not norm.weight.grad[dead].any()
            Silent.found += int(dead.sum()) if not self.state.kept else 0


def test_channels_without_weights_are_silent_in_the_soft_phase_too(tmp_path, monkeypatch):
    """Else BatchNorm, which divides by their sqrt(eps), lets gradients explode."""
    monkeypatch.setitem(METHODS, "spartan", Silent)
    trainer = planned(tmp_path, patterns="channel-0.7")
    trainer.run()
    assert Silent.found > 50
    assert all(float(w.detach().norm()) < 30 for w in trainer.ctx.cocktail.bank.weights)


def trainer_units(trainer) -> int:
    return sum(layer.weight.shape[0] for layer in trainer.ctx.cocktail.layers.values())


@pytest.mark.parametrize("pattern", ["unstructured-0.8", "channel-0.5", "block-4x4-0.5"])
def test_the_saved_network_is_plain(tmp_path, pattern):
    results = train("resnet8", toy(), tmp_path, patterns=pattern, **FIELDS)
    (row,) = results["subnets"]
    cocktail = Cocktail.load(tmp_path / row["weights"])
    name = row["name"]
    nonzero = 0
    for layer, bits in zip(cocktail.layers.values(), cocktail.masks(name), strict=True):
        assert torch.equal(layer.weight, ops.masked_weight(layer.weight, bits))
        nonzero += int(layer.weight.count_nonzero())
    assert nonzero == row["nnz"]
    if pattern.startswith("unstr"):
        assert nonzero == round(0.2 * cocktail.bank.numel)
    plain = cocktail.export(name)
    data = toy().test
    with torch.no_grad():
        answers = plain(data.inputs).argmax(1)
    assert 100 * float((answers == data.targets).float().mean()) == pytest.approx(row["accuracy"])
    assert results["method_state"] == {"roots": [], "kept": {}}
    assert results["passes"]["train"] == 15 == 3 * Spartan.cost(SpartanOptions(patterns=pattern), 5)


TWO = {"patterns": "unstructured-0.8,block-4x4-0.5", "allocation": "uniform", "checkpoint_every": 7}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, train("resnet8", toy(), folder, **FIELDS, **TWO)


# the mask freezes after step 12; checkpoints lie at steps 7 and 14, so a resume goes on from there
@pytest.mark.parametrize(
    "stage, step", [(0, 8), (0, 14), (1, 12)], ids=["soft", "frozen", "second"]
)
def test_resume_is_bit_exact(undisturbed, tmp_path, monkeypatch, stage, step):
    undo = crash_before(monkeypatch, stage, step)
    with pytest.raises(Stop):
        train("resnet8", toy(), tmp_path, **FIELDS, **TWO)
    undo()
    resumed = train("resnet8", toy(), tmp_path, resume=True, **FIELDS, **TWO)
    folder, straight = undisturbed
    assert resumed["subnets"] == straight["subnets"]
    for row in straight["subnets"]:
        a, b = (read_tensors(at / row["weights"])[0] for at in (tmp_path, folder))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_norms() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, padding=1, stride=2),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 16, 3),
    )


def test_accumulation_changes_only_rounding(tmp_path):
    ends = []
    for parts in (1, 2):
        torch.manual_seed(1)
        net = without_norms()
        fields = {"patterns": "unstructured-0.5", "lr": 0.02, "accumulate": parts, "epochs": 2}
        trainer = planned(tmp_path / str(parts), net=net, **fields)
        trainer.run()
        ends.append([w.detach().clone() for w in trainer.ctx.cocktail.bank.weights])
    for one, two in zip(*ends, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


class Calls(TorchDispatchMode):
    """The ops of this library that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, list] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("sparse_cocktail"):
            self.of.setdefault(func.overloadpacket.__name__, []).append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pattern", ["unstructured-0.5", "block-4x4-0.5", "channel-0.5"])
def test_equal_costs_are_not_listed(pattern):
    """Ops then read none; a sharpness on another scale stands for them."""
    some = [torch.randn(8, 4, 3, 3), torch.randn(4, 8, 3, 3)]
    shapes = {i: tuple(w.shape) for i, w in enumerate(some)}
    made = parse(pattern)
    masks = SoftMasks(shapes, block_of(made), made.density)
    unequal = pattern.startswith("channel")
    with Calls() as calls:
        for _ in range(2):
            masks.soft(masks.values(some), 0.5, 0.5)
    (_, first, *_), (_, second, *_) = calls.of["soft_topk_multi"]
    if unequal:
        assert [t.data_ptr() for t in first] == [t.data_ptr() for t in second]  # made once
    else:
        assert first is second is None


def test_parts_of_a_batch_share_their_masks(tmp_path, monkeypatch):
    """Weights do not change between the parts, so neither does what is kept."""
    called = []

    def note(masks, *args, of):
        called.append(of.__name__)
        return of(masks, *args)

    for name in ("hard", "soft"):
        plain = getattr(SoftMasks, name)
        monkeypatch.setattr(SoftMasks, name, partialmethod(note, of=plain))
    trainer = planned(tmp_path, patterns="unstructured-0.5", accumulate=2, epochs=2, soft_phase=2)
    trainer.run()
    steps = 2 * trainer.ctx.steps_per_epoch
    assert called.count("soft") == 2 * steps + 1  # and once to freeze them
    assert called.count("hard") == steps + 1


# ---- options -------------------------------------------------------------------------------------


def test_options_reach_the_masks(tmp_path):
    """Sharpness grows with the root of a block's size."""
    fields = {"patterns": "unstructured-0.8,block-4x4-0.5", "sharpness": 7.0}
    fields |= {"allocation": "uniform", "normalise": "rms"}
    made = planned(tmp_path, **fields).method._masks
    for name, root in (("unstructured-0.8000", 1.0), ("block-4x4-0.5000", 4.0)):
        budgets = made[name].budgets
        assert made[name].normalise and [budget.members for budget in budgets] == [
            [i] for i in range(8)
        ]
        assert {made[name].beta(budget, 1.0) for budget in budgets} == {7.0 * root}


@pytest.mark.parametrize("pattern", ["unstructured-0.8", "channel-0.5"])
def test_soft_values_are_multiplied_into_the_weights_in_the_end(tmp_path, monkeypatch, pattern):
    class Ended(Spartan):
        def after_epoch(self, ctx):
            _, _, weights = self._present(ctx)
            before, kept = [w.detach().clone() for w in weights], dict(self.state.kept)
            super().after_epoch(ctx)
            if ctx.epoch + 1 < 5:
                assert all(map(torch.equal, weights, before))
                return
            assert sorted(kept) == list(range(8)) and any((m < 0.999).any() for m in kept.values())
            for i, soft in kept.items():
                spread_out = soft if soft.shape == before[i].shape else soft.view(-1, 1, 1, 1)
                torch.testing.assert_close(weights[i].detach(), before[i] * spread_out)

    monkeypatch.setitem(METHODS, "spartan", Ended)
    planned(tmp_path, patterns=pattern).run()


def test_costs_of_layers_and_of_the_whole_network(tmp_path):
    fields = {"patterns": "unstructured-0.8", "cost_model": "flops"}
    trainer = planned(tmp_path / "flops", **fields)
    (budget,) = trainer.method._masks["unstructured-0.8000"].budgets
    assert budget.costs == [64, 64, 16, 16, 16, 4, 4, 4]  # pictures of 8x8, halved twice
    results = train("resnet8", toy(), tmp_path / "run", **FIELDS, **fields)
    cocktail = Cocktail.load(tmp_path / "run" / results["subnets"][0]["weights"])
    counts = [int(ops.mask_count(b)) for b in cocktail.masks("unstructured-0.8000")]
    spent = sum(n * c for n, c in zip(counts, budget.costs, strict=True))
    assert budget.final <= spent < budget.final + 64


def test_adjusted_costs_count_what_cannot_be_pruned(tmp_path):
    results = train(
        "resnet8", toy(), tmp_path / "run", patterns="unstructured-0.8", adjust_cost=True, **FIELDS
    )
    everything = sum(p.numel() for p in model().parameters())
    (row,) = results["subnets"]
    masked = round(row["nnz"] / (1 - row["sparsity"]))
    assert everything - masked + row["nnz"] == pytest.approx(0.2 * everything, abs=0.5)
    with pytest.raises(ValueError, match=r"adjust_cost=True.*unstructured-0.9900 cannot prune"):
        planned(tmp_path / "no", patterns="unstructured-0.99", adjust_cost=True)


def test_layers_that_blocks_do_not_divide_stay_dense(tmp_path):
    trainer = planned(tmp_path, patterns="block-8x4-0.5")
    trainer.run()
    events = (tmp_path / "log.jsonl").read_text()
    assert '"left_dense"' in events and "out=4 is not a multiple of 8" in events
    masks = trainer.ctx.cocktail.masks("block-8x4-0.5000")
    layers = list(trainer.ctx.cocktail.layers.values())
    full = [int(ops.mask_count(b)) == m.weight.numel() for b, m in zip(masks, layers, strict=True)]
    assert full[:2] == [True, True] and not all(full)  # width 4


def test_a_class_head_keeps_its_channels(tmp_path):
    trainer = planned(tmp_path, patterns="channel-0.5", mask_linear=True)
    assert max(trainer.ctx.cocktail.outputs) not in trainer.method._masks["channel-0.5000"].shapes


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"patterns": "2:4"}, r"spartan: 2:4 cannot be trained"),
        ({"compile": True}, r"spartan: compile=True, but Spartan makes .* set compile=False"),
        ({"sharpness": -1.0}, r"spartan: sharpness=-1.0 is not in \[0, 1e6\]"),
        ({"sharpness": float("nan")}, r"spartan: sharpness=nan"),
        ({"cost_model": "bytes"}, r"spartan: cost_model='bytes' is not one of sparsity, flops"),
        ({"normalise": "max"}, r"spartan: normalise='max'"),
        ({"allocation": "fair"}, r"spartan: allocation='fair' is not one of global"),
        ({"allocation": "erk", "cost_model": "flops"}, r"cost_model='flops' needs allocation='glo"),
        ({"soft_phase": 0}, r"spartan: soft_phase=0 is not positive"),
        ({"soft_phase": 1.2}, r"soft_phase=1.2 are 3 and 18 steps of 15"),
        ({"budget_ramp": 0.9}, r"budget_ramp=0.9 and soft_phase=0.8 are 14 and 12 steps"),
        ({"budget_ramp": -0.1}, r"spartan: budget_ramp=-0.1"),
        ({"patterns": "block-64x64-0.5"}, r"spartan: no masked layer of .* can take block-64x64"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_wrong_options(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        planned(tmp_path, **{"patterns": "unstructured-0.5", **fields})


def test_soft_to_the_end_and_no_ramp(tmp_path):
    fields = {"patterns": "unstructured-0.8", "soft_phase": 5, "budget_ramp": 0, "epochs": 5}
    trainer = planned(tmp_path, **fields)
    assert (trainer.method.progress(0), trainer.method.progress(15)) == ((1.0, 0.0), (1.0, 1.0))
    trainer.run()
    cocktail = trainer.ctx.cocktail
    masks = cocktail.masks("unstructured-0.8000")
    assert sum(int(ops.mask_count(b)) for b in masks) == round(0.2 * cocktail.bank.numel)
