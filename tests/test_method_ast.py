"""AST: turns, gradient correction, norms of one's own, the schedule and the masks of subnets."""

import functools
import json
from itertools import pairwise

import pytest
import torch
from test_engine import MODEL, Stop, crash_before, model, position, same, toy, weights

from sparse_cocktail import Cocktail, ops
from sparse_cocktail.checkpoint import load_checkpoint, restore_dataclass, save_checkpoint
from sparse_cocktail.config import split_fields
from sparse_cocktail.engine import Trainer, train
from sparse_cocktail.methods import METHODS
from sparse_cocktail.methods.ast import AST, without_conflict
from sparse_cocktail.methods.ast_masks import next_masks
from sparse_cocktail.patterns import NM, Unstructured, parse
from sparse_cocktail.reference import ones
from sparse_cocktail.schedules import cosine, cubic, keep_count
from sparse_cocktail.stepping import Stepper

FIELDS = {"method": "ast", "threads": 1, "recalibrate_samples": 64, "batch_size": 16, "epochs": 2}
FIELDS |= {"patterns": "unstructured-0.5,unstructured-0.8,unstructured-0.9", "lr": 0.05}
STEPS = 14  # of an epoch of 224 samples
GENTLE = "unstructured-0.3,unstructured-0.4,unstructured-0.5"  # keeps some of every layer
TWO_STEPS = {"epochs": 1, "batch_size": 112}
NAMES = ["unstructured-0.5000", "unstructured-0.8000", "unstructured-0.9000"]


def prepared(folder, **fields) -> Trainer:
    from rich.console import Console

    trainer = Trainer(*split_fields({**FIELDS, **fields}), folder, Console(quiet=True))
    trainer.prepare(model(), toy(), resume=False, overwrite=False)
    return trainer


class Watched(AST):
    """Notes what its steps do; `watched` registers it as ast."""

    notes: list

    def step(self, ctx):
        passes = super().step(ctx)
        norms = {n: [t.clone() for t in s.affine or []] for n, s in ctx.cocktail.subnets.items()}
        layers = [layer.weight for layer in ctx.cocktail.layers.values()]
        self.notes.append(
            {
                "name": passes[0].subnet,
                "updates": passes[0].dense_grad,
                "masks": bools(ctx.cocktail, passes[0].subnet),
                "weights": [w.detach().clone() for w in layers],
                "norms": norms,
            }
        )
        return passes

    def before_step(self, ctx):
        weights = [layer.weight for layer in ctx.cocktail.layers.values()]
        note = self.notes[-1]
        note["raw"] = [w.grad.clone() for w in weights]
        super().before_step(ctx)
        note["grad"] = [w.grad.clone() for w in weights]
        note["known"] = momenta(ctx)

    def after_step(self, ctx):
        note = self.notes[-1]
        note["learned"] = momenta(ctx)
        note["stepped"] = [layer.weight.detach().clone() for layer in ctx.cocktail.layers.values()]
        super().after_step(ctx)
        note["new masks"] = bools(ctx.cocktail, note["name"])


def bools(cocktail: Cocktail, name: str) -> list[torch.Tensor]:
    pairs = zip(cocktail.masks(name), cocktail.bank.weights, strict=True)
    return [ops.unpack_mask(bits, w.shape) for bits, w in pairs]


def momenta(ctx) -> list[torch.Tensor]:
    """Of all scales and shifts, zeros where there is none."""
    found = [ctx.optimizer.state.get(p, {}).get("momentum_buffer") for p in ctx.cocktail.affine()]
    pairs = zip(found, ctx.cocktail.affine(), strict=True)
    return [torch.zeros_like(p) if m is None else m.clone() for m, p in pairs]


def run(folder, **fields):
    """Notes of every step of a run, and its trainer."""
    kind = type("Noted", (Watched,), {"notes": []})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "ast", kind)
        trainer = prepared(folder, **fields)
        trainer.run()
    return kind.notes, trainer


@pytest.fixture
def watched(tmp_path):
    """`watched(fields)`: `run` in the test's own folder."""
    return functools.partial(run, tmp_path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """`run` of `FIELDS`, whose trainer knows the folder."""
    return run(tmp_path_factory.mktemp("plain"))


def total(masks: list[torch.Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks)


# ---- gradient correction -------------------------------------------------------------------------


def test_a_conflicting_gradient_becomes_orthogonal():
    torch.manual_seed(1)
    previous = torch.randn(5, 7, dtype=torch.float64)
    gradient = torch.randn(5, 7, dtype=torch.float64) - 0.5 * previous
    assert (gradient * previous).sum() < 0
    corrected = without_conflict(gradient, previous)
    assert (corrected * previous).sum().abs() < 1e-12
    removed = gradient - corrected  # nothing but what lies along the previous one
    cosine_of = (removed * previous).sum() / removed.norm() / previous.norm()
    assert cosine_of.item() == pytest.approx(-1.0, abs=1e-12)


@pytest.mark.parametrize("factor", [0.3, 0.0])
def test_an_agreeing_gradient_stays_as_it_is(factor):
    torch.manual_seed(1)
    previous = factor * torch.randn(5, 7)
    gradient = previous + 0.1 * previous.sign()
    assert torch.equal(without_conflict(gradient, previous), gradient)


@pytest.mark.parametrize("mask_update", ["freeze", "shared"])
def test_gradients_are_corrected_by_the_one_before_in_the_group(watched, mask_update):
    notes, _ = watched(mask_update=mask_update, update_every=0.1)
    conflicts = 0
    for step, (before, note) in enumerate(pairwise(notes), start=1):
        for layer, mask in enumerate(note["masks"]):
            gradient, corrected = note["raw"][layer] * mask, note["grad"][layer]
            # the uncorrected one; at updates the raw one is dense
            previous = before["raw"][layer] * before["masks"][layer]
            if mask_update == "freeze":
                assert not corrected[~mask].any()
                previous = previous * mask
            if step % 3 == 0 or (gradient * previous).sum() >= 0:
                assert torch.equal(corrected, gradient)  # another group, or no conflict
                continue
            conflicts += 1
            bound = 1e-5 * gradient.norm() * previous.norm()
            assert (corrected * previous).sum().abs() < bound
            share = (gradient * previous).sum() / (previous**2).sum()
            torch.testing.assert_close(corrected, gradient - share * previous)
    assert conflicts > 5


def test_the_correction_can_be_switched_off(watched):
    notes, trainer = watched(correct_gradients=False, epochs=1)
    for note in notes:
        for raw, mask, used in zip(note["raw"], note["masks"], note["grad"], strict=True):
            assert torch.equal(raw * mask, used)
    assert trainer.method.state.previous == []


# ---- order and schedule --------------------------------------------------------------------------


def test_subnets_take_turns(plain):
    notes, _ = plain
    assert [note["name"] for note in notes] == [NAMES[step % 3] for step in range(2 * STEPS)]


def test_updates_are_staggered(tmp_path):
    trainer = prepared(tmp_path, epochs=60, update_every=0.05, offset=0.3)
    method, steps = trainer.method, 60 * STEPS
    end, stop = round(0.6875 * steps), round(0.8 * steps)
    period = round(0.05 * steps / 3)
    assert period == 14
    for index in range(3):
        own = [s for s in range(index, steps, 3) if method.updates(trainer.ctx, s)]
        closing = min(s for s in range(end, steps) if s % 3 == index)
        assert closing in own  # the ramp ends on time, between two updates or not
        regular = [s // 3 for s in own if s != closing]
        shift = round(index * 0.3 * period)
        expected = [k for k in range(shift, steps // 3, period) if 3 * k + index < stop]
        assert [k for k in expected if 3 * k + index != closing] == regular
        assert shift == (0, 4, 8)[index]


def test_density_follows_the_ramp_and_ends_exactly(watched):
    notes, trainer = watched(epochs=3, update_every=0.05, ramp_start=0.1, ramp_end=0.7)
    steps, size = 3 * STEPS, trainer.ctx.cocktail.bank.numel
    start, end, stop = (round(share * steps) for share in (0.1, 0.7, 0.8))
    seen = dict.fromkeys(NAMES, 0)
    for step, note in enumerate(notes):
        if not note["updates"]:
            assert total(note["new masks"]) == total(note["masks"])
            continue
        seen[note["name"]] += 1
        progress = min(1.0, (step - start) / (end - start))
        density = cubic(1.0, parse(note["name"]).density, progress)
        assert start <= step < stop
        assert total(note["new masks"]) == keep_count(density, size)
    assert min(seen.values()) >= 5
    assert total(notes[0]["masks"]) == size  # dense before the ramp
    for name in NAMES:
        assert total(bools(trainer.ctx.cocktail, name)) == keep_count(parse(name).density, size)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({**TWO_STEPS, "patterns": GENTLE}, id="fewer-steps-than-subnets"),
        pytest.param({"ramp_end": 1.0, "update_until": 1.0}, id="ramp-to-the-end"),
        pytest.param({"ramp_start": 0.5, "ramp_end": 0.5, "update_until": 0.5}, id="no-ramp"),
        pytest.param({"update_every": 0, "offset": 0.0}, id="update-at-every-step"),
        pytest.param({"mask_update": "shared", "own_norms": False}, id="parity"),
        pytest.param({"optimizer": "adamw", "lr": 0.01}, id="adamw"),
    ],
)
def test_final_counts_are_exact(tmp_path, fields):
    results = train("resnet8", toy(), tmp_path, **{**FIELDS, **MODEL, **fields})
    cocktail = Cocktail.load(tmp_path / "cocktail.safetensors")
    assert len(results["subnets"]) == 3
    for row in results["subnets"]:
        pattern = parse(row["name"])
        assert row["nnz"] == keep_count(pattern.density, cocktail.bank.numel)


def test_a_run_costs_one_pass_a_step(plain):
    results = json.loads((plain[1].folder / "results.json").read_text())
    _, options = split_fields(FIELDS)
    assert results["passes"]["train"] == AST.cost(options, 2) * STEPS
    assert set(results["passes"]) == {"train", "evaluate"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ramp_start": 0.8}, r"ast: ramp_start=0.8, ramp_end=0.6875 .*not in order"),
        ({"update_until": 0.5}, r"ast: .*update_until=0.5 are not in order"),
        ({"update_until": 3}, r"not in order within epochs=2"),
        ({"ramp_start": -0.1}, r"ast: ramp_start=-0.1 is not 0 or more"),
        ({"update_every": float("nan")}, r"ast: update_every=nan is not 0 or more; give epochs"),
        ({"drop": 1.5}, r"ast: drop=1.5 is not in \[0, 1\]"),
        ({"patterns": "block-4x4-0.5"}, r"cannot .* unstructured, channel and N:M patterns"),
    ],
)
def test_errors(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, **fields)


# ---- masks ---------------------------------------------------------------------------------------


def layers(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator) for s in ((6, 8), (4, 16, 3, 3), (5, 3, 3, 3))]


def unpacked(masks, tensors):
    return [ops.unpack_mask(bits, t.shape) for bits, t in zip(masks, tensors, strict=True)]


def test_pruned_weights_still_compete_in_the_ramp():
    values, pattern = layers(1), Unstructured(0.75)
    empty = [torch.zeros_like(ones(w)) for w in values]
    made = unpacked(next_masks(values, pattern, empty, 0.5), values)
    keep = keep_count(cubic(1.0, 0.25, 0.5), sum(w.numel() for w in values))
    threshold = torch.cat([w.abs().flatten() for w in values]).sort(descending=True)[0][keep - 1]
    for mask, weight in zip(made, values, strict=True):
        assert torch.equal(mask, weight.abs() >= threshold)  # one threshold for all layers


def test_behind_the_ramp_layers_only_exchange_weights():
    values, gradients, pattern = layers(1), layers(2), Unstructured(0.75)
    present = next_masks(layers(3), pattern, [ones(w) for w in values], 1.0)
    before = unpacked(present, values)
    after = unpacked(next_masks(values, pattern, present, None, gradients, 0.25), values)
    for old, new, weight, gradient in zip(before, after, values, gradients, strict=True):
        moved = int(0.25 * old.sum() + 0.5)
        assert new.sum() == old.sum()
        order = torch.where(old, weight.abs(), torch.inf).flatten().argsort()
        stays = old.flatten().clone()
        stays[order[:moved]] = False
        assert new.flatten()[stays].all()
        grown = new.flatten() & ~stays
        rest = gradient.abs().flatten()[~stays & ~grown]
        assert gradient.abs().flatten()[grown].min() >= rest.max()


def test_regrowth_uses_dense_gradients_and_pruned_weights_stay_put(watched):
    notes, _ = watched(epochs=3, ramp_end=0.3, update_every=0.1, weight_decay=0.1)
    steps, grown = 3 * STEPS, 0
    for step, note in enumerate(notes):
        for mask, new, raw, old, stepped in zip(
            *(note[k] for k in ("masks", "new masks", "raw", "weights", "stepped")), strict=True
        ):
            assert torch.equal(stepped[~mask], old[~mask])  # frozen, at updates too
            if not note["updates"]:
                assert not raw[~mask].any()
            elif step >= round(0.3 * steps) + 3:
                drop = cosine(0.5, 0.005, step / round(0.8 * steps))
                assert int((new & ~mask).sum()) <= int(drop * int(mask.sum()) + 0.5)
                grown += int((new & ~mask).sum())
                if (new & ~mask).any() and not new.all():
                    assert raw.abs()[new & ~mask].min() >= raw.abs()[~new].max() > 0
    assert grown > 0


def test_the_replaced_share_is_a_cosine_from_the_ramps_start_to_the_last_update(tmp_path):
    drops = {}

    class Noted(AST):
        def _update(self, ctx, index, gradients=None, drop=0.0):
            drops[ctx.step] = drop
            super()._update(ctx, index, gradients, drop)

    fields = {"ramp_start": 0.25, "ramp_end": 0.5, "update_every": 0.1, "drop": 0.4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "ast", Noted)
        prepared(tmp_path, **fields, drop_end=0.1).run()
    start, stop = 7, round(0.8 * 2 * STEPS)
    assert len(drops) > 6 and min(drops) >= start and max(drops) < stop
    for step, drop in drops.items():
        assert drop == pytest.approx(cosine(0.4, 0.1, (step - start) / (stop - start)))


def test_by_an_infinite_gradient_nothing_regrows(watched, monkeypatch):
    """As in the steps that the scaler of fp16 leaves out; densities go on as they should."""
    original = Stepper.step

    def overflow(self, *batch_and_lr):
        scale = 2.0**40 if self.method.updates(self.ctx, self.ctx.step) else 2.0**8
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        original(self, *batch_and_lr)

    monkeypatch.setattr(Stepper, "step", overflow)
    notes, trainer = watched(precision="fp16", update_every=0.1, patterns=GENTLE)
    size, end, updates = trainer.ctx.cocktail.bank.numel, round(0.6875 * 2 * STEPS), 0
    for step, note in enumerate(notes):
        wanted = note["masks"]
        if note["updates"]:
            assert not all(raw.isfinite().all() for raw in note["raw"])
            assert all(map(torch.equal, note["weights"], note["stepped"]))
            updates += 1
        if note["updates"] and step < end + 3:
            density = cubic(1.0, parse(note["name"]).density, min(1.0, step / end))
            bits = ops.topk_masks(note["weights"], keep_count(density, size))
            wanted = unpacked(bits, note["weights"])
        assert all(map(torch.equal, note["new masks"], wanted))
    assert updates >= 9


def nm_groups(tensor: torch.Tensor, m: int) -> torch.Tensor:
    """(out, in / m, *taps, m)"""
    return tensor.unflatten(1, (-1, m)).movedim(2, -1)


@pytest.mark.parametrize("ramp", [0.0, 0.4, 0.9, 1.0, None])
def test_the_share_of_nm_groups_grows(ramp):
    values, pattern = layers(1), NM(2, 4)
    masks = unpacked(next_masks(values, pattern, [ones(w) for w in values], ramp), values)
    assert masks[2].all()  # in=3 has no groups of 4
    losses, free = [], []
    for mask, weight in zip(masks[:2], values[:2], strict=True):
        kept = nm_groups(mask, 4).sum(-1)
        assert ((kept == 2) | (kept == 4)).all()
        free.append((kept == 4).flatten())
        smallest = nm_groups(weight.abs(), 4).sort(-1).values[..., :2].sum(-1)
        losses.append(smallest.flatten())
        inside, sizes = nm_groups(mask, 4)[kept == 2], nm_groups(weight.abs(), 4)[kept == 2]
        weakest = sizes[inside].view(-1, 2).amin(1)
        assert (weakest >= (sizes * ~inside).amax(1)).all()
    losses, free = torch.cat(losses), torch.cat(free)
    assert free.sum() == round(len(free) * (0.0 if ramp is None else (1 - ramp) ** 3))
    if 0 < free.sum() < len(free):
        assert losses[free].min() >= losses[~free].max()


def test_nm_groups_are_exchanged_as_units():
    values, gradients, pattern = layers(1), layers(2), NM(1, 4)
    full = [ones(w) for w in values]
    plain = unpacked(next_masks(values, pattern, full, 0.3), values)
    moved = unpacked(next_masks(values, pattern, full, 0.3, gradients, 0.5), values)
    pairs = zip(plain[:2], moved[:2], values[:2], gradients[:2], strict=True)
    for old, new, weight, gradient in pairs:
        before, after = (nm_groups(mask, 4).sum(-1) == 4 for mask in (old, new))
        losses = nm_groups(weight.abs(), 4).sort(-1).values[..., :3].sum(-1)
        weakest = losses[before].sort().values[: int(0.5 * before.sum() + 0.5)]
        assert after[before & (losses > weakest[-1])].all()  # those give way that lose the least
        assert before.sum() == after.sum() and not torch.equal(before, after)
        pruned = nm_groups(gradient.abs() * ~old, 4).sum(-1)
        grown = after & ~before
        assert pruned[grown].min() >= pruned[~before & ~after].max()


def test_nm_subnets_of_a_run_are_exact(tmp_path):
    fields = {**FIELDS, "patterns": "", "ladder": "n:m"}
    train(model(), toy(), tmp_path, **fields)
    plain = Cocktail.load(tmp_path / "cocktail.safetensors", model())
    assert list(plain.subnets) == ["dense", "1:2", "2:4", "4:8"]
    for name, n, m in (("1:2", 1, 2), ("2:4", 2, 4), ("4:8", 4, 8)):
        for mask in bools(plain, name):
            if mask.shape[1] % m:
                assert mask.all()
            else:
                assert (nm_groups(mask, m).sum(-1) == n).all()


# ---- norms of one's own --------------------------------------------------------------------------


def test_norms_and_their_momentum_belong_to_one_subnet(plain):
    notes, trainer = plain
    for before, note in pairwise(notes):  # a step changes the norms of its own subnet only
        for name in NAMES:
            pairs = zip(before["norms"][name], note["norms"][name], strict=True)
            changed = any(not torch.equal(a, b) for a, b in pairs)
            assert changed == (name == before["name"])
    for first, again in zip(notes, notes[3:], strict=False):  # a subnet and its next step
        assert any(m.any() for m in first["learned"])
        assert all(map(torch.equal, first["learned"], again["known"]))
    assert not any(m.any() for note in notes[:3] for m in note["known"])
    shared = trainer.ctx.cocktail
    shared.activate("dense")
    assert all((p == p.round()).all() for p in shared.affine())  # as initialised: ones and zeros


def test_own_norms_are_saved_and_loaded(plain):
    folder = plain[1].folder
    cocktail = Cocktail.load(folder / "cocktail.safetensors", model())
    results = json.loads((folder / "results.json").read_text())
    affine = [torch.cat(cocktail.subnets[name].affine) for name in NAMES]
    statistics = [torch.cat(cocktail.subnets[name].statistics) for name in NAMES]
    for own in (affine, statistics):
        assert not any(torch.equal(a, b) for a, b in pairwise(own))
    data = toy()
    for row in results["subnets"]:
        exported = cocktail.export(row["name"])
        correct = (exported(data.test.inputs).argmax(1) == data.test.targets).float().mean()
        assert 100 * correct.item() == pytest.approx(row["accuracy"], abs=1e-3)


def test_norms_can_be_shared(tmp_path):
    train("resnet8", toy(), tmp_path, **FIELDS, **MODEL, own_norms=False)
    cocktail = Cocktail.load(tmp_path / "cocktail.safetensors")
    assert all(cocktail.subnets[name].affine is None for name in NAMES)


# ---- resume --------------------------------------------------------------------------------------


def test_a_gradient_from_a_checkpoint_corrects_by_the_same_bits(tmp_path):
    """Sums round by strides, those of channels_last here, which files do not keep."""
    trainer = prepared(tmp_path / "run", channels_last=True, own_norms=False, mask_update="shared")
    ctx, method, ends = trainer.ctx, trainer.method, []
    method.before_stage(ctx)
    ctx.step = 1
    method.step(ctx)
    layers = [layer.weight for layer in ctx.cocktail.layers.values()]
    assert any(not weight.is_contiguous() for weight in layers)
    gradients = [torch.randn_like(weight) for weight in layers]
    method.state.previous = [torch.randn_like(g) - g for g in gradients]  # conflicts with them
    save_checkpoint(tmp_path / "state", {"method": method.state})
    for resumed in (False, True):
        if resumed:
            restore_dataclass(method.state, load_checkpoint(tmp_path / "state")["method"])
        for weight, gradient in zip(layers, gradients, strict=True):
            weight.grad = gradient.clone()
        method.before_step(ctx)
        ends.append([weight.grad for weight in layers])
    assert not any(map(torch.equal, ends[0], gradients))
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize(
    ("fields", "saved"),  # after one or two of a group's three steps
    [({}, 7), ({"optimizer": "adamw", "lr": 0.01}, 5)],
    ids=["sgd", "adamw"],
)
def test_resume_in_the_middle_of_a_group_is_bit_exact(tmp_path, monkeypatch, fields, saved):
    fields = {**FIELDS, **MODEL, **fields, "epochs": 1, "checkpoint_every": saved}
    fields["update_every"] = 0.1
    train("resnet8", toy(), tmp_path / "whole", **fields)
    undo = crash_before(monkeypatch, 0, saved + 2)
    with pytest.raises(Stop):
        train("resnet8", toy(), tmp_path / "broken", **fields)
    undo()
    assert position(tmp_path / "broken") == (0, saved)
    resumed = train("resnet8", toy(), tmp_path / "broken", resume=True, **fields)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert resumed["subnets"] == whole["subnets"]
