"""AC/DC: where phases begin, what a switch does, which weights are the two networks."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from test_engine import MODEL, Stop, crash_before, toy
from test_methods import left

from sparse_cocktail import Cocktail, ops
from sparse_cocktail.engine import train
from sparse_cocktail.files import read_tensors
from sparse_cocktail.methods import METHODS
from sparse_cocktail.methods.acdc import ACDC, ACDCOptions, phases
from sparse_cocktail.methods.updates import reset_momentum
from sparse_cocktail.selection import magnitude_masks

MENU = ("unstructured-0.8000", "2:4", "channel-0.5000", "block-4x4-0.5000")
# 14 steps an epoch and 28 for a network: phases begin at 0, 6, 10, 14 (dense) and 22 (sparse)
PHASES = [(0, "dense"), (6, "sparse"), (10, "dense"), (14, "sparse"), (18, "dense"), (22, "sparse")]
FIELDS = {
    "method": "acdc",
    "threads": 1,
    "recalibrate_samples": 64,
    "batch_size": 16,
    "epochs": 2,
    "first_dense": 6 / 28,
    "phase": 4 / 28,
    "last_dense": 4 / 28,
    "last_sparse": 6 / 28,
    **MODEL,
}

# ---- the schedule --------------------------------------------------------------------------------


def test_the_papers_hundred_epochs():
    made = ACDCOptions().phases(100, 10)
    turns = [(10 * e, "dense" if e // 5 % 2 else "sparse") for e in range(10, 75, 5)]
    assert made == [(0, "dense"), *turns, (750, "dense"), (850, "sparse")]
    assert turns[-1] == (700, "sparse")


def test_lengths_in_epochs():
    made = ACDCOptions(first_dense=10, phase=20, last_dense=30, last_sparse=20).phases(200, 7)
    starts = [0, 10, 30, 50, 70, 90, 110, 130, 150, 180]
    assert made == [(7 * e, ("dense", "sparse")[i % 2]) for i, e in enumerate(starts)]


def test_long_phases_begin_with_epochs_and_short_ones_anywhere():
    long, short = ACDCOptions().phases(150, 10), ACDCOptions().phases(12, 10)
    assert all(step % 10 == 0 for step, _ in long)  # 7.5 epochs each
    assert len(long) == len(short) == 16  # as many as in the paper's schedule
    assert [step for step, _ in short][:4] == [0, 12, 18, 24]


def test_the_dense_networks_own_stage_is_epochs_or_a_share():
    lengths = {0: 0, 3: 3, 0.25: 10, 0.001: 1}
    for finetune, epochs in lengths.items():
        options = ACDCOptions(finetune=finetune, stages=2)
        assert options.finetune_epochs(40) == epochs
        assert ACDC.cost(options, 40) == 2 * (40 + epochs)


@pytest.mark.parametrize("unit", [1, 5])
@pytest.mark.parametrize("steps", [2, 3, 4, 7, 10, 29, 100])
def test_any_run_alternates_and_ends_dense_sparse(steps, unit):
    for share in (0.01, 0.05, 0.3):
        made = phases(steps, *(round(s * steps) for s in (0.1, share, 0.1, 0.15)), unit)
        assert made[0] == (0, "dense") and made[-1][1] == "sparse" and made[-1][0] < steps
        assert all(a[0] < b[0] and a[1] != b[1] for a, b in pairwise(made))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"first_dense": 0.8}, r"acdc: first_dense=0.8.* make no schedule of 2 epochs"),
        ({"phase": 0.0}, r"acdc: .*phase=0.0.* must be positive"),
        ({"last_sparse": -1.0}, r"acdc: last_sparse=-1.0 is not 0 or more"),
        ({"finetune": float("nan")}, r"acdc: finetune=nan is not 0 or more"),
    ],
)
def test_schedules_that_make_no_sense(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        train("resnet8", toy(), tmp_path, **{**FIELDS, **fields})


# ---- a run ---------------------------------------------------------------------------------------


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


class Recorded(ACDC):
    """Notes what every step left: before the switch that may follow it, and after."""

    lines: dict = {}

    def after_step(self, ctx):
        def snapshot():
            states = [ctx.optimizer.state[layer.weight] for layer in ctx.cocktail.layers.values()]
            name = str(self.present(ctx)[0])
            line = {
                "subnet": ctx.cocktail.active,
                "state": {k: v.clone() for k, v in ctx.weights().items()},
                "momentum": flat(s["momentum_buffer"] for s in states),
                "all": sum(
                    float(s["momentum_buffer"].abs().sum()) for s in ctx.optimizer.state.values()
                ),
            }
            if name in ctx.cocktail.subnets:
                masks = zip(ctx.cocktail.masks(name), ctx.cocktail.layers.values(), strict=True)
                line["kept"] = flat(ops.unpack_mask(b, w.weight.shape) for b, w in masks)
                line["weights"] = flat(w.weight for w in ctx.cocktail.layers.values())
            return line

        before = snapshot()
        super().after_step(ctx)
        self.lines[ctx.stage, ctx.step] = before, snapshot()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(folder, results, lines by (stage, step)) of a run of four kinds of patterns."""
    folder = tmp_path_factory.mktemp("acdc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "acdc", Recorded)
        patch.setattr(Recorded, "lines", {})
        results = train("resnet8", toy(), folder, patterns=",".join(MENU), **FIELDS)
        return folder, results, Recorded.lines


EACH = pytest.mark.parametrize("stage, name", list(enumerate(MENU)), ids=MENU)


def kind_at(step: int) -> str:
    return [kind for start, kind in PHASES if start <= step][-1]


@EACH
def test_a_sparse_phase_keeps_its_masks_and_its_zeros(recorded, stage, name):
    lines, seen = recorded[2], []
    for step in range(28):
        (before, after), sparse = lines[stage, step], kind_at(step) == "sparse"
        assert before["subnet"] == (name if sparse else "dense")
        if sparse:
            masks = lines[stage, step - 1][1]["kept"]  # of the step before, or of the switch
            assert torch.equal(before["kept"], masks)
            assert not before["weights"][~masks].any() and not before["momentum"][~masks].any()
            moved = before["weights"] != lines[stage, step - 1][1]["weights"]
            assert moved[masks].float().mean() > 0.8  # channels behind a dead ReLU do not move
            seen.append(masks)
        elif step == 12:
            assert before["weights"][~before["kept"]].any()  # a dense phase trains everything
        if (step + 1, "sparse") in PHASES:
            assert not after["weights"][~after["kept"]].any()
    assert len(seen) == 14


@EACH
def test_masks_are_those_of_the_largest_weights_at_the_switch(recorded, stage, name):
    folder, _, lines = recorded
    cocktail = Cocktail.load(folder / f"networks/{name}.safetensors")
    pattern, layers = cocktail.subnets[name].pattern, cocktail.layers
    for step in (5, 13, 21):
        before, after = lines[stage, step]
        weights = [before["state"][f"{layer}.weight"] for layer in layers]
        bits = magnitude_masks(weights, pattern, cocktail.outputs)
        masks = [ops.unpack_mask(b, w.shape) for b, w in zip(bits, weights, strict=True)]
        assert torch.equal(after["kept"], flat(masks))
        assert torch.equal(after["weights"], flat(weights) * after["kept"])


@EACH
def test_momentum_is_forgotten_where_a_dense_phase_begins(recorded, stage, name):
    for step in range(1, 27):
        before, after = recorded[2][stage, step]
        assert before["all"] > 0
        if (step + 1, "dense") in PHASES:
            assert after["all"] == 0
        else:  # a sparse phase goes on with that of what it keeps
            kept = after.get("kept", slice(None)) if kind_at(step + 1) == "sparse" else slice(None)
            assert torch.equal(before["momentum"][kept], after["momentum"][kept])


@EACH
def test_the_dense_network_is_what_the_last_dense_phase_ends_with(recorded, stage, name):
    folder, _, lines = recorded
    stored, _ = read_tensors(folder / f"pool/dense-{name}.safetensors")
    before, _ = lines[stage, 21]
    assert all(torch.equal(stored[k], v) for k, v in before["state"].items())
    sparse, _ = read_tensors(folder / f"pool/{name}.safetensors")
    assert torch.equal(sparse["fc.weight"], lines[stage, 27][1]["state"]["fc.weight"])
    network = Cocktail.load(folder / f"networks/dense-{name}.safetensors")
    assert torch.equal(network.model.fc.weight, before["state"]["fc.weight"])


def test_a_run_leaves_a_pair_for_every_pattern(recorded):
    folder, results, _ = recorded
    rows = {row["weights"]: row for row in results["subnets"]}
    assert len(rows) == len(results["subnets"]) == 2 * len(MENU)
    test = toy().test
    for name in MENU:
        pair = rows[f"networks/dense-{name}.safetensors"], rows[f"networks/{name}.safetensors"]
        assert [row["name"] for row in pair] == ["dense", name]
        for row in pair:
            cocktail = Cocktail.load(folder / row["weights"])
            network = cocktail.export(row["name"], plain=True)
            right = (network(test.inputs).argmax(1) == test.targets).float().mean()
            assert row["accuracy"] == pytest.approx(100 * float(right))
        dense = cocktail.subnets["dense"]  # the pair's other file has its accuracy and statistics
        assert dense.accuracy is None and dense.statistics is None


def test_every_change_of_masks_is_logged(recorded):
    folder, _, lines = recorded
    read = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    logged = [(e["stage"], e["step"], e["changed"]) for e in read if e["event"] == "masks"]
    assert [line[:2] for line in logged] == [(s, t) for s in range(4) for t in (13, 21)]
    for stage, step, changed in logged:
        before, after = (line["kept"] for line in lines[stage, step])
        assert changed == pytest.approx(float((after & ~before).sum() / after.sum()))


def test_forgotten_moments_of_adamw_begin_anew():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
    for gradient in ([1.0, 2.0, 3.0], [3.0, -1.0, 0.5], [-0.1, 0.1, 0.2]):
        reset_momentum(SimpleNamespace(optimizer=optimizer))
        before, weight.grad = weight.detach().clone(), torch.tensor(gradient)
        optimizer.step()  # the first of AdamW is lr times the gradient's sign
        torch.testing.assert_close(weight.detach() - before, -0.1 * weight.grad.sign())


def test_momentum_can_be_forgotten_at_both_switches(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "acdc", Recorded)
    monkeypatch.setattr(Recorded, "lines", {})
    train("resnet8", toy(), tmp_path, patterns=MENU[0], reset_at_sparse=True, **FIELDS)
    switches = [start - 1 for start, _ in PHASES[1:]]
    assert all((Recorded.lines[0, t][1]["all"] == 0) == (t in switches) for t in range(27))


def test_the_dense_network_can_be_trained_further(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "acdc", Recorded)
    monkeypatch.setattr(Recorded, "lines", {})
    results = train("resnet8", toy(), tmp_path, patterns=MENU[0], finetune=0.5, lr=0.01, **FIELDS)
    lines, options = Recorded.lines, ACDCOptions(patterns=MENU[0], finetune=0.5)
    assert results["passes"]["train"] == ACDC.cost(options, 2) * 14 == 3 * 14
    assert {lines[1, step][0]["subnet"] for step in range(14)} == {"dense"}
    start, first = lines[0, 21][0]["state"], lines[1, 0][1]["state"]
    assert 0 < float((start["fc.weight"] - first["fc.weight"]).norm()) < 0.1  # one step away
    stored, _ = read_tensors(tmp_path / f"pool/dense-{MENU[0]}.safetensors")
    assert torch.equal(stored["fc.weight"], lines[1, 13][1]["state"]["fc.weight"])
    kept = lines[0, 27][1]["kept"]
    read = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    measured = [list(line["holdout"]) for line in read if line["event"] == "stage"]
    assert measured == [[MENU[0]], ["dense"]]
    for step in range(14):  # no phases: no new masks, nothing forgotten or made zero
        before, after = lines[1, step]
        assert torch.equal(before["weights"], after["weights"])
        assert torch.equal(kept, after["kept"]) and before["all"] == after["all"] > 0
    row = next(r for r in results["subnets"] if r["name"] == MENU[0])
    assert row["nnz"] == int(kept.sum())


@pytest.mark.parametrize("step", [9, 20])
def test_resume_inside_any_phase_is_bit_exact(recorded, tmp_path, monkeypatch, step):
    fields = {**FIELDS, "patterns": ",".join(MENU), "checkpoint_every": 5}
    undo = crash_before(monkeypatch, 1, step)
    with pytest.raises(Stop):
        train("resnet8", toy(), tmp_path, **fields)
    undo()
    resumed = train("resnet8", toy(), tmp_path, resume=True, **fields)
    whole, broken = left(recorded[0]), left(tmp_path)
    assert whole.keys() == broken.keys()
    for file, tensors in whole.items():
        assert all(torch.equal(tensors[k], broken[file][k]) for k in tensors), file
    assert resumed["subnets"] == recorded[1]["subnets"]
