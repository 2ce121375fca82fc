"""SET, RigL, GraNet and gradual magnitude pruning: numbers, growth, schedules, what stays zero."""

import functools
import math
from itertools import pairwise

import pytest
import torch
from test_engine import MODEL, Stop, _quiet, crash_before, model, same, toy

from sparse_cocktail import ops
from sparse_cocktail.allocation import layer_counts
from sparse_cocktail.config import split_fields
from sparse_cocktail.engine import Trainer, train
from sparse_cocktail.files import read_tensors
from sparse_cocktail.methods import METHODS, dynamic
from sparse_cocktail.methods.dynamic_options import Timetable
from sparse_cocktail.methods.gradual import _with_density
from sparse_cocktail.patterns import parse
from sparse_cocktail.schedules import keep_count
from sparse_cocktail.selection import magnitude_masks
from sparse_cocktail.stepping import Stepper

# 3 steps an epoch: 12 steps, changes after steps 1, 2, ... 9 unless a test says otherwise
FIELDS = {
    "epochs": 4,
    "update_every": 0.1,
    "patterns": "unstructured-0.7",
    "threads": 1,
    "recalibrate_samples": 64,
    **MODEL,
}
DENSITY = 0.3
NAME = "unstructured-0.7000"


def prepared(method: str, folder, **fields) -> Trainer:
    trainer = Trainer(*split_fields({**FIELDS, "method": method, **fields}), folder, _quiet())
    trainer.prepare("resnet8", toy())
    return trainer


def recorded(method: str, folder, **fields):
    """Run a method; what it was after every step, and before and after every change."""
    steps, changes = [], []

    def look(ctx, name):
        weights = [layer.weight for layer in ctx.cocktail.layers.values()]
        bits = ctx.cocktail.masks(name)
        momentum = [ctx.optimizer.state[w]["momentum_buffer"].clone() for w in weights]
        return {
            "step": ctx.step,
            "masks": [ops.unpack_mask(b, w.shape) for b, w in zip(bits, weights, strict=True)],
            "weights": [w.detach().clone() for w in weights],
            "momentum": momentum,
            "gradients": [w.grad.clone() for w in weights],
        }

    class Recorded(METHODS[method]):
        def after_step(self, ctx):
            super().after_step(ctx)
            steps.append(look(ctx, self.name(ctx)))

        def change(self, ctx):
            before = look(ctx, self.name(ctx))
            super().change(ctx)
            changes.append((before, look(ctx, self.name(ctx))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, method, Recorded)
        prepared(method, folder, **fields).run()
    return steps, changes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`runs(method, field=...)` is `recorded`; tests that want the same run share it."""

    @functools.cache
    def run(method: str, **fields):
        return recorded(method, tmp_path_factory.mktemp(method), **fields)

    return run


def counts(masks) -> list[int]:
    return [int(m.sum()) for m in masks]


def shapes() -> list[tuple[int, ...]]:
    """Of the masked layers: all convolutions but the first."""
    weights = [m.weight for m in model().modules() if isinstance(m, torch.nn.Conv2d)]
    return [tuple(w.shape) for w in weights[1:]]


NUMEL = sum(math.prod(shape) for shape in shapes())


# ---- what holds at every step --------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["erk", "uniform"])
@pytest.mark.parametrize("method", ["set", "rigl"])
def test_every_layer_keeps_its_number_of_weights(method, allocation, runs):
    steps, changes = runs(method, **{} if allocation == "erk" else {"allocation": allocation})
    wanted = layer_counts(shapes(), DENSITY, allocation)
    assert len(steps) == 12 and all(counts(s["masks"]) == wanted for s in steps)
    assert sum(wanted) == keep_count(DENSITY, NUMEL)
    assert [c["step"] for c, _ in changes] == list(range(1, 10))
    different = [not _equal(a["masks"], b["masks"]) for a, b in changes]
    assert all(different[:7])  # the last ones may find the same weights, and change nothing


def _equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("method", "mask_update"),
    [(m, how) for how in ("freeze", "shared") for m in ("set", "rigl", "granet", "gmp")],
)
def test_nothing_is_left_outside_the_mask(method, mask_update, runs):
    steps, _ = runs(method, **{} if mask_update == "freeze" else {"mask_update": mask_update})
    for seen in steps:
        for what in ("weights", "momentum"):
            for tensor, mask in zip(seen[what], seen["masks"], strict=True):
                assert not tensor[~mask].any()
    assert all(w[m].ne(0).any() for w, m in zip(seen["weights"], seen["masks"], strict=True))


def test_zeros_are_left_to_the_engine_between_changes(monkeypatch, tmp_path):
    done, original = [], dynamic.zero_pruned

    def counted(ctx, name):
        done.append(ctx.step)
        original(ctx, name)

    monkeypatch.setattr(dynamic, "zero_pruned", counted)
    recorded("rigl", tmp_path, update_every=1)
    assert sorted(set(done)) == [0, 3, 6, 9]


@pytest.mark.parametrize("method", ["set", "rigl", "granet"])
def test_what_grows_starts_at_zero_without_momentum(method, runs):
    _, changes = runs(method)
    grown = 0
    for before, after in changes:
        for what in ("weights", "momentum"):
            for old, new, tensor in zip(before["masks"], after["masks"], after[what], strict=True):
                assert not tensor[new & ~old].any()
                grown += int((new & ~old).sum())
    assert grown > 100


# ---- growth --------------------------------------------------------------------------------------


def test_rigl_grows_where_the_dense_gradient_is_largest(monkeypatch, tmp_path):
    """Against the gradients of a plain network with the pruned weights at zero."""
    original, plain = Stepper.step, {}

    def keep(self, inputs, targets, lr):
        copy = self.ctx.cocktail.export(NAME, plain=True).train()
        self.ctx.task.loss(copy(inputs), targets).backward()
        layers = dict(copy.named_modules())
        names = self.ctx.cocktail.layers
        plain[self.ctx.step] = [layers[name].weight.grad for name in names]
        original(self, inputs, targets, lr)

    monkeypatch.setattr(Stepper, "step", keep)
    steps, changes = recorded("rigl", tmp_path)
    for before, after in changes:
        drop = 0.5 * 0.5 * (1 + math.cos(math.pi * before["step"] / 9))
        layers = zip(
            before["weights"],
            before["masks"],
            after["masks"],
            before["gradients"],
            plain[before["step"]],
            strict=True,
        )
        for weight, old, new, gradient, dense in layers:
            torch.testing.assert_close(gradient, dense, atol=1e-5, rtol=1e-4)
            grow = math.floor(drop * int(old.sum()) + 0.5)
            stay = int(old.sum()) - grow
            order = weight.abs().masked_fill(~old, -1).flatten().topk(stay).indices
            kept = torch.zeros(weight.numel(), dtype=torch.bool).index_fill(0, order, True)
            grown = new.flatten() & ~kept
            assert (new.flatten() & kept).sum() == stay and grown.sum() == grow
            left = ~new.flatten()
            if grow and left.any():
                size = gradient.abs().flatten()
                assert size[grown].min() >= size[left].max()
    updated = {before["step"] for before, _ in changes}
    for seen in steps:  # pruned weights have gradients in the steps that need them only
        pruned = [g[~m] for g, m in zip(seen["gradients"], seen["masks"], strict=True)]
        if seen["step"] not in updated:
            assert not any(g.any() for g in pruned)


def before_each_step(monkeypatch, change) -> None:
    """`change(stepper)` comes before every optimizer step."""
    original = Stepper.step

    def step(self, *batch_and_lr):
        change(self)
        original(self, *batch_and_lr)

    monkeypatch.setattr(Stepper, "step", step)


def test_rigl_grows_by_gradients_that_the_optimizer_changes_in_place(monkeypatch, tmp_path):
    """As SGD does with Nesterov momentum and without decay, where it takes all tensors at once."""
    ends = []
    for together in (False, True):

        def choose(stepper, together=together):
            stepper.ctx.optimizer.param_groups[0]["foreach"] = together

        with monkeypatch.context() as patch:
            before_each_step(patch, choose)
            fields = {"nesterov": True, "weight_decay": 0.0}
            steps, _ = recorded("rigl", tmp_path / str(together), **fields)
        ends.append(steps)
    (one, other), middle = ends, 5
    assert not _equal(one[middle]["gradients"], other[middle]["gradients"])
    assert all(_equal(a["masks"], b["masks"]) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("method", ["rigl", "granet"])
def test_an_infinite_gradient_chooses_no_weights(method, monkeypatch, tmp_path):
    """As in the steps that the scaler of fp16 leaves out."""

    def overflow(stepper):
        scale = 2.0**40 if stepper.ctx.step == 4 else 2.0**8
        stepper.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    before_each_step(monkeypatch, overflow)
    steps, changes = recorded(method, tmp_path, precision="fp16")
    assert not any(g.isfinite().all() for g in steps[4]["gradients"])
    moved = {before["step"]: (before, after) for before, after in changes}
    before, after = moved[4]
    if method == "rigl":
        assert _equal(before["masks"], after["masks"])
    else:  # the kept share falls all the same
        keep = keep_count(DENSITY + (0.5 - DENSITY) * (1 - 4 / 6) ** 3, NUMEL)
        bits = [ops.pack_mask(mask) for mask in before["masks"]]
        made = ops.topk_masks(before["weights"], keep, within=bits)
        shapes_and_bits = zip(made, after["masks"], strict=True)
        assert all(torch.equal(ops.unpack_mask(b, m.shape), m) for b, m in shapes_and_bits)
    assert not _equal(*(seen["masks"] for seen in moved[5]))


def test_set_grows_anywhere_and_repeats_by_seed(runs, tmp_path):
    made = []
    for steps, changes in (runs("set"), recorded("set", tmp_path), runs("set", seed=2)):
        made.append([s["masks"] for s in steps])
        for seen, _ in changes:
            pairs = zip(seen["gradients"], seen["masks"], strict=True)
            assert not any(g[~m].any() for g, m in pairs)  # at changes no more than else
        for seen in steps:
            pruned = [g[~m] for g, m in zip(seen["gradients"], seen["masks"], strict=True)]
            if seen["step"] not in range(1, 10):
                assert not any(g.any() for g in pruned)  # no dense gradient is made
    assert all(_equal(a, b) for a, b in zip(made[0], made[1], strict=True))
    assert not any(_equal(a, c) for a, c in zip(made[0], made[2], strict=True))


@pytest.mark.parametrize("method", ["set", "rigl", "granet"])
def test_every_network_draws_its_first_masks_anew(method, tmp_path):
    fields = {"patterns": "unstructured-0.5,unstructured-0.7", "start_density": 0.5}
    if method != "granet":
        del fields["start_density"]
    trainer, drawn = prepared(method, tmp_path, **fields, allocation="uniform"), []
    for trainer.ctx.stage, name in enumerate(("unstructured-0.5000", NAME)):
        trainer.method.before_stage(trainer.ctx)
        bits = zip(trainer.ctx.cocktail.masks(name), shapes(), strict=True)
        drawn.append(torch.cat([ops.unpack_mask(b, shape).flatten() for b, shape in bits]))
    shared = float((drawn[0] & drawn[1]).sum() / drawn[1].sum())
    assert shared == pytest.approx(0.5, abs=0.05)  # what the first network keeps by chance


def test_drop_share_is_a_cosine_to_the_last_change(tmp_path):
    fields = {"drop": 0.4, "drop_end": 0.1, "update_until": 2, "update_every": 1 / 12}
    trainer = prepared("rigl", tmp_path, **fields)
    assert [s for s in range(12) if trainer.method.timetable.due(s)] == [1, 2, 3, 4, 5, 6]
    for step in range(1, 7):
        trainer.ctx.step = step
        share = 0.1 + 0.3 * 0.5 * (1 + math.cos(math.pi * step / 6))
        assert trainer.method.drop(trainer.ctx) == pytest.approx(share)


def test_the_last_change_ends_the_cosine_and_the_ramp(tmp_path):
    """Where lengths are no multiples of the time between changes, too."""
    fields = {"update_every": 3 / 12, "update_until": 8 / 12, "ramp_end": 5 / 12}
    trainer = prepared("granet", tmp_path, **fields, drop=0.4, drop_end=0.1, start_density=0.6)
    ctx, method = trainer.ctx, trainer.method
    assert [step for step in range(12) if method.timetable.due(step)] == [3, 6]
    for ctx.step, drop, left in ((0, 0.4, 1.0), (3, 0.25, 0.0), (6, 0.1, 0.0)):
        assert method.drop(ctx) == pytest.approx(drop)
        density = method.density(ctx, parse(NAME), ctx.step)
        assert density == pytest.approx(DENSITY + (0.6 - DENSITY) * left)


# ---- schedules -----------------------------------------------------------------------------------


def test_granet_density_falls_by_the_cubic_schedule(runs):
    steps, _ = runs("granet")  # ramp_end 0.5: step 6
    for seen in steps:
        t = min(seen["step"], 9)
        density = DENSITY + (0.5 - DENSITY) * (1 - min(t / 6, 1)) ** 3
        assert sum(counts(seen["masks"])) == keep_count(density, NUMEL)
    assert sum(counts(steps[0]["masks"])) == keep_count(0.5, NUMEL)
    assert counts(steps[0]["masks"]) == layer_counts(shapes(), 0.5, "erk")
    profile = layer_counts(shapes(), DENSITY, "erk")
    assert counts(steps[-1]["masks"]) != profile  # pruned over all layers together


def test_granet_never_starts_below_its_target(runs):
    steps, _ = runs("granet", patterns="unstructured-0.2", start_density=0.5)
    assert {sum(counts(s["masks"])) for s in steps} == {keep_count(0.8, NUMEL)}


KINDS = ["unstructured-0.7", "channel-0.5", "1:4", "block-2x2-0.6"]


@pytest.mark.parametrize("pattern", KINDS)
def test_gradual_pruning_only_takes_away(pattern, runs):
    steps, changes = runs("gmp", patterns=pattern, ramp_start=0.25, ramp_end=0.75)
    for a, b in pairwise(steps):
        assert not any((new & ~old).any() for old, new in zip(a["masks"], b["masks"], strict=True))
    kept = [sum(counts(s["masks"])) for s in steps]
    assert kept[:4] == [NUMEL] * 4 and kept[4] < NUMEL  # pruning starts with step 3, at 0
    assert len(set(kept)) >= 4 and kept[9:] == [kept[-1]] * 3
    (before, after), density = changes[-1], parse(pattern).density
    bits = magnitude_masks(before["weights"], parse(pattern))
    wanted = [ops.unpack_mask(b, w.shape) for b, w in zip(bits, before["weights"], strict=True)]
    assert _equal(after["masks"], wanted)
    assert kept[-1] == pytest.approx(density * NUMEL, rel=0.05)
    if pattern == KINDS[0]:
        for seen in steps:
            now = density + (1 - density) * (1 - min(max((seen["step"] - 3) / 6, 0), 1)) ** 3
            assert sum(counts(seen["masks"])) == keep_count(now, NUMEL)


@pytest.mark.parametrize(
    ("density", "now"),
    [(1.0, "dense"), (0.751, "dense"), (0.75, "3:4"), (0.51, "3:4"), (0.5 + 1e-12, "2:4")]
    + [(0.26, "2:4"), (0.25, "1:4"), (0.1, "1:4")],
)
def test_nm_patterns_fall_by_the_next_higher_number(density, now):
    assert str(_with_density(parse("1:4"), density)) == now


@pytest.mark.parametrize(
    ("every", "until", "due"),
    [
        (0.1, 0.75, [2, 4, 6, 8, 10, 12, 14]),  # of 20 steps
        (1, 3, [5, 10, 15]),  # epochs
        (0.5, 0.3, [6]),  # at least one
        (0.001, 0.1, [1, 2]),
        (0.5, 1.0, [10]),
        (3, 4, [15]),
        (9, 9, [18]),  # a step without a change follows
    ],
)
def test_timetable(every, until, due):
    table = Timetable.of("rigl", every, until, epochs=4, per_epoch=5)
    assert [step for step in range(20) if table.due(step)] == due
    assert table.last() == due[-1]


@pytest.mark.parametrize("steps", [3, 4, 7, 50])
@pytest.mark.parametrize("every", [0.02, 0.3, 1])
def test_the_ramp_ends_with_a_change(steps, every):
    table = Timetable.of("granet", every, 0.75, epochs=1, per_epoch=steps)
    for end in (1, steps // 2, steps):
        assert table.due(table.last(end))


@pytest.mark.parametrize("schedule", ["cosine", "steps"])
@pytest.mark.parametrize("method", ["rigl", "gmp"])
def test_learning_rate(method, schedule, tmp_path):
    lr = prepared(method, tmp_path, lr_schedule=schedule, lr=0.2).ctx.stages[0].lr
    if schedule == "steps":
        assert [lr(s) for s in (0, 5, 6, 8, 9, 11)] == pytest.approx(
            [0.2, 0.2, 0.02, 0.02, 0.002, 0.002]
        )
    else:
        wanted = [0.001 + 0.199 * 0.5 * (1 + math.cos(math.pi * s / 12)) for s in range(12)]
        assert [lr(s) for s in range(12)] == pytest.approx(wanted)


# ---- runs ----------------------------------------------------------------------------------------


def final(folder) -> dict[str, dict[str, torch.Tensor]]:
    return {f.name: read_tensors(f)[0] for f in (folder / "networks").iterdir()}


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_resume_is_bit_exact(method, monkeypatch, tmp_path):
    fields = {**FIELDS, "patterns": "unstructured-0.7,unstructured-0.9", "checkpoint_every": 2}
    whole = train("resnet8", toy(), tmp_path / "whole", method=method, **fields)
    undo = crash_before(monkeypatch, 1, 5)
    with pytest.raises(Stop):
        train("resnet8", toy(), tmp_path / "broken", method=method, **fields)
    undo()
    resumed = train("resnet8", toy(), tmp_path / "broken", method=method, resume=True, **fields)
    assert whole["subnets"] == resumed["subnets"]
    a, b = final(tmp_path / "whole"), final(tmp_path / "broken")
    assert len(a) == 2 and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    cost = METHODS[method].cost(split_fields({**fields, "method": method})[1], epochs=4)
    assert whole["passes"]["train"] == cost * 3


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("rigl", {"patterns": "2:4"}, r"2:4 cannot be trained; the method takes unstruct"),
        ("set", {"patterns": "channel-0.5"}, r"channel-0.5000 cannot be trained"),
        ("granet", {"patterns": "block-4x4-0.5"}, r"block-4x4-0.5000 cannot be trained"),
        (
            "rigl",
            {"lr_schedule": "line"},
            r"config: lr_schedule='line' is not one of cosine, steps",
        ),
        ("rigl", {"update_every": 0}, r"rigl: update_every=0 is not positive"),
        ("rigl", {"update_until": -1}, r"rigl: update_until=-1 is not positive"),
        ("set", {"drop": 1.5}, r"set: drop=1.5 is not in \[0, 1\]"),
        ("set", {"allocation": "er"}, r"set: allocation='er' is not one of global, uniform, erk"),
        ("granet", {"start_density": 0.0}, r"granet: start_density=0.0 is not in \(0, 1\]"),
        ("gmp", {"ramp_start": -0.1}, r"gmp: ramp_start=-0.1 is not 0 or more"),
        (
            "gmp",
            {"ramp_start": 8 / 12},
            r"is step 8, but the last change .* is step 8",
        ),
        ("gmp", {"ramp_start": 0.8}, r"gmp: ramp_start=0.8 is step 10, but the last change up to"),
        ("rigl", {"epochs": 1, "batch_size": 224}, r"rigl: a network trains for 1 steps"),
    ],
)
def test_bad_fields(method, fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train("resnet8", toy(), tmp_path, method=method, **{**FIELDS, **fields})
