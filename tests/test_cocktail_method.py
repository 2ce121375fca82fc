"""Sparse Cocktail as a method: the menu, the schedule of stages and steps, rewinding, results."""

import dataclasses
import json
import math
from itertools import pairwise

import pytest
import torch
from test_engine import MODEL, SHORT, model, run, same, toy
from test_method_imp import hard

from sparse_cocktail import Cocktail, ops
from sparse_cocktail.averaging import interpolate
from sparse_cocktail.config import split_fields
from sparse_cocktail.data import Split
from sparse_cocktail.engine import Trainer, train
from sparse_cocktail.files import read_tensors
from sparse_cocktail.methods import METHODS, Pass
from sparse_cocktail.methods.cocktail import SparseCocktail
from sparse_cocktail.recalibrate import recalibrate
from sparse_cocktail.schedules import keep_count
from sparse_cocktail.stepping import Stepper


@pytest.fixture(scope="module")
def ten_stages(tmp_path_factory):
    """Folder and results of a whole run: 10 stages of one epoch, consolidation."""
    folder = tmp_path_factory.mktemp("cocktail")
    results = run(folder, stages=10, search_samples=64)
    return folder, results


def test_the_menu_has_24_networks(ten_stages):
    names = [s["name"] for s in ten_stages[1]["subnets"]]
    assert len(names) == 24
    assert [n for n in names if ":" in n] == ["1:2", "2:4", "4:8"]
    assert names[0] == "dense"
    assert [n for n in names if n.startswith("u")] == [
        f"unstructured-{1 - 0.8**k:.4f}" for k in range(1, 11)
    ]
    assert [n for n in names if n.startswith("c")] == [
        f"channel-{1 - 0.9**k:.4f}" for k in range(1, 11)
    ]


def test_every_mask_is_exact(ten_stages):
    cocktail = Cocktail.load(ten_stages[0] / "cocktail.safetensors")
    nnz = {s["name"]: s["nnz"] for s in ten_stages[1]["subnets"]}
    for k in range(1, 11):
        assert nnz[f"unstructured-{1 - 0.8**k:.4f}"] == keep_count(0.8**k, cocktail.bank.numel)
        shapes = [w.shape for w in cocktail.bank.weights]
        kept = sum(keep_count(0.9**k, s[0]) * s[1:].numel() for s in shapes)
        assert nnz[f"channel-{1 - 0.9**k:.4f}"] == kept
    for name, n, m in (("1:2", 1, 2), ("2:4", 2, 4), ("4:8", 4, 8)):
        views = cocktail.bank.views(cocktail.subnets[name].row)
        for bits, weight in zip(views, cocktail.bank.weights, strict=True):
            mask = ops.unpack_mask(bits, weight.shape).flatten(2).transpose(1, 2)
            if weight.shape[1] % m == 0:
                assert (mask.unflatten(2, (-1, m)).sum(3) == n).all()
            else:
                assert mask.all()


def test_unstructured_masks_are_nested(ten_stages):
    cocktail = Cocktail.load(ten_stages[0] / "cocktail.safetensors")
    rows = [cocktail.bank.flat(s.row) for n, s in cocktail.subnets.items() if n[0] == "u"]
    assert all(not ops.mask_andnot(sparser, denser).any() for denser, sparser in pairwise(rows))


@pytest.mark.parametrize("nested", [True, False])
def test_channel_nesting_is_an_option(tmp_path, nested):
    run(tmp_path, stages=4, nested_channels=nested)
    cocktail = Cocktail.load(tmp_path / "cocktail.safetensors")
    rows = [cocktail.bank.flat(s.row) for n, s in cocktail.subnets.items() if n[0] == "c"]
    outside = [int(ops.mask_andnot(b, a).ne(0).sum()) for a, b in pairwise(rows)]
    assert (sum(outside) == 0) == nested


def test_results_file(ten_stages):
    folder, results = ten_stages
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {"format", "method", "data", "model", "seed", "config", "seconds"} <= results.keys()
    assert {"total", "mask", "interpolate", "evaluate"} <= results["seconds"].keys()
    for subnet in results["subnets"]:
        for field in ("accuracy", "accuracy_own", "accuracy_interpolated"):
            assert 0 <= subnet[field] <= 100
        assert subnet["flops"] > 0 and subnet["parameters"] > subnet["nnz"] > 0
    dense = results["subnets"][0]
    assert dense["sparsity"] == 0 and dense["accuracy"] > 90


def test_saved_subnets_score_as_reported(ten_stages):
    folder, results = ten_stages
    cocktail, data = Cocktail.load(folder / "cocktail.safetensors"), toy()
    for subnet in results["subnets"]:
        exported = cocktail.export(subnet["name"])
        correct = (exported(data.test.inputs).argmax(1) == data.test.targets).float().mean()
        assert 100 * correct.item() == pytest.approx(subnet["accuracy"], abs=1e-3)


def plan_of(tmp_path, **fields) -> Trainer:
    from rich.console import Console

    trainer = Trainer(*split_fields({"threads": 1, **fields}), tmp_path, Console(quiet=True))
    trainer.prepare(model(), toy(), resume=False, overwrite=False)
    return trainer


def test_stages_and_learning_rates(tmp_path):
    trainer = plan_of(tmp_path, epochs=12)
    stages, steps = trainer.ctx.stages, trainer.ctx.steps_per_epoch
    assert [s.name for s in stages] == [
        "dense",
        *(f"stage {k}" for k in range(1, 11)),
        "consolidate",
    ]
    assert [s.start_from for s in stages] == [None, *["rewind.safetensors"] * 10, None]
    lr = stages[3].lr
    assert lr(0) == 0.1
    assert [lr(8 * steps), lr(10 * steps)] == pytest.approx([0.01, 0.01])  # restarts
    assert stages[-1].lr(102 * steps - 1) < 0.0011
    assert lr(8 * steps - 1) < 0.002 and lr(10 * steps - 1) < 0.005
    assert stages[-1].epochs == 102 and stages[-1].lr(0) == 0.1


def test_every_step_has_its_rate_on_the_cosines(tmp_path):
    lengths = {"epochs": 6, "stages": 2, "first_cycle": 4, "cycle": 1, "consolidate": 0.6}
    rates = {"lr": 0.2, "restart_lr": 0.05, "min_lr": 0.004, "consolidate_lr": 0.25}
    trainer = plan_of(tmp_path, **lengths, **rates)
    stages, steps = trainer.ctx.stages, trainer.ctx.steps_per_epoch
    assert [s.epochs for s in stages] == [6, 6, 6, 4]  # 3.6 epochs, to nearest

    def fall(high: float, length: int) -> list[float]:
        shares = [0.5 * (1 + math.cos(math.pi * t / length)) for t in range(length)]
        return [0.004 + (high - 0.004) * share for share in shares]

    for stage in stages[:3]:
        wanted = fall(0.2, 4 * steps) + 2 * fall(0.05, steps)
        assert list(map(stage.lr, range(6 * steps))) == pytest.approx(wanted)
    assert list(map(stages[3].lr, range(4 * steps))) == pytest.approx(fall(0.05, 4 * steps))


@pytest.mark.parametrize("fields", [{"consolidate": 0}, {"consolidate": 0.0}])
def test_without_consolidation_the_interpolated_weights_are_final(tmp_path, fields):
    results = run(tmp_path, **fields)
    assert all(s["accuracy"] == s["accuracy_interpolated"] for s in results["subnets"])
    final = read_tensors(tmp_path / "cocktail.safetensors")[0]
    for name, tensor in read_tensors(tmp_path / "interpolated.safetensors")[0].items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(final[f"model.{name}"], tensor)


def test_steps_of_a_stage_take_turns(tmp_path):
    trainer = plan_of(tmp_path, epochs=1, stages=2)
    ctx, method = trainer.ctx, trainer.method
    ctx.stage = 1
    method._make_masks(ctx, 1)
    u, c = "unstructured-0.2000", "channel-0.1000"
    wanted = ["dense", u, "dense", c, "dense", "dense"] * 2  # 1:1 before the first N:M mask
    passes = []
    for ctx.step in range(12):
        ctx.epoch, ctx.steps_per_epoch = 0, 12
        (only,) = method.step(ctx)
        passes.append(only.subnet)
        assert only.teacher == (None if ctx.step % 2 == 0 else "dense")
    assert passes == wanted
    method._make_masks(ctx, 2)
    ctx.stage, ctx.step = 2, 5
    assert method.step(ctx) == [Pass("1:2", teacher="dense")]


def test_turns_begin_anew_with_every_epoch(tmp_path):
    trainer = plan_of(tmp_path, epochs=3, stages=1)
    ctx, method = trainer.ctx, trainer.method
    ctx.stage, ctx.steps_per_epoch = 1, 7
    method._make_masks(ctx, 1)
    for ctx.epoch in range(3):
        names = []
        first = 7 * ctx.epoch
        for ctx.step in range(first, first + 5):
            names += [each.subnet for each in method.step(ctx)]
        assert names == ["dense", "unstructured-0.2000", "dense", "channel-0.1000", "dense"]


def test_consolidation_steps_draw_two_subnets_taught_by_the_pivot(tmp_path):
    trainer = plan_of(tmp_path, epochs=1, stages=2)
    ctx, method = trainer.ctx, trainer.method
    for k in (1, 2):
        ctx.stage = k
        method._make_masks(ctx, k)
    ctx.stage, seen = 3, set()
    for ctx.step in range(40):
        pivot, *others = method.step(ctx)
        assert pivot == Pass("dense") and len({p.subnet for p in others}) == 2
        assert all(p.teacher == 0 and p.weight == 0.5 for p in others)
        seen |= {p.subnet for p in others}
        assert method.step(ctx) == [pivot, *others]  # a function of seed and position
    assert seen == set(ctx.cocktail.subnets) - {"dense"}


def test_rewinding_restores_weights_and_statistics(tmp_path, monkeypatch):
    seen = {}
    original = Stepper.step

    def look(self, *args):
        ctx = self.ctx
        state = {k: v.clone() for k, v in ctx.model.state_dict().items()}
        if ctx.stage and ctx.step == 0:
            seen[ctx.stage] = state
            assert len(ctx.optimizer.state) == 0  # no momentum
        if ctx.stage == 0 and ctx.step == ctx.steps_per_epoch:  # one completed epoch
            seen["snapshot"] = state
        original(self, *args)

    monkeypatch.setattr(Stepper, "step", look)
    run(tmp_path, epochs=2, stages=2, consolidate=0)
    for stage in (1, 2):  # from that of stage 0, not of the stage before
        assert all(torch.equal(seen[stage][k], v) for k, v in seen["snapshot"].items())


def test_masks_come_from_the_weights_before_rewinding(tmp_path):
    run(tmp_path, epochs=2, stages=1)
    cocktail = Cocktail.load(tmp_path / "cocktail.safetensors")
    trained = read_tensors(tmp_path / "pool" / "stage-00.safetensors")[0]
    values = [trained[f"{name}.weight"] for name in cocktail.layers]
    expected = ops.topk_masks(values, keep_count(0.8, cocktail.bank.numel))
    row = cocktail.subnets["unstructured-0.2000"].row
    assert all(map(torch.equal, cocktail.bank.views(row), expected))


def test_masks_follow_the_definition_however_far_the_weights_have_moved(tmp_path):
    """Unstructured within the stage before; channels by what this and the N:M mask keep."""
    beta, rates = 0.3, {"prune_unstructured": 0.4, "prune_channel": 0.4}
    fields = {"nm": {"1:2": 1, "2:4": 2}, "beta": beta, "stages": 3, "epochs": 1, **rates}
    trainer = plan_of(tmp_path, **fields)
    ctx, bank, before = trainer.ctx, trainer.ctx.cocktail.bank, None
    for k, nm in ((1, "1:2"), (2, "2:4"), (3, "2:4")):
        values = [w.detach().normal_() for w in bank.weights]
        trainer.method._make_masks(ctx, k)
        unstructured, channel = map(str, ctx.options.patterns(k))
        wanted = ops.topk_masks(values, keep_count(0.6**k, bank.numel), before)
        before = ctx.cocktail.masks(unstructured)
        assert all(map(torch.equal, before, wanted))
        triples = zip(values, before, ctx.cocktail.masks(nm), strict=True)
        for index, (value, u, n) in enumerate(triples):
            mu, mn = (ops.unpack_mask(bits, value.shape).double() for bits in (u, n))
            scores = ((beta * mu + (1 - beta) * mn) * value.abs()).flatten(1).sum(1)
            live = ctx.cocktail.subnets[channel].live[index]
            assert int(live.sum()) == keep_count(0.6**k, len(value))
            assert scores[live].min() >= scores[~live].max()


def test_layers_that_a_pattern_cannot_take_are_reported_before_training(tmp_path):
    nm = {"4:8": 1}  # width 4: some layers have in=4
    train(model(), toy(), tmp_path, epochs=1, stages=1, threads=1, nm=nm)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    left = [entry for entry in log if entry["event"] == "left_dense"]
    assert {entry["pattern"] for entry in left} == {"4:8"}
    assert all("not a multiple of 8" in entry["reason"] for entry in left)
    assert [e["event"] for e in log].index("train") > [e["event"] for e in log].index("left_dense")


# ---- the search, and what results say of weights that are not the last ---------------------------


class Scored(SparseCocktail):
    """Notes which subnets the search counts for every stage."""

    counted: dict

    def _objective(self, o, stage, scores):
        self.counted.setdefault(stage, set()).add(frozenset(scores))
        return super()._objective(o, stage, scores)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """(folder, results, counted) of three stages under noise, without consolidation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "cocktail", type("Noted", (Scored,), {"counted": {}}))
        folder = tmp_path_factory.mktemp("searched")
        return folder, search(folder, hard()), METHODS["cocktail"].counted


def search(folder, data, **changes) -> dict:
    fields = {**SHORT, **MODEL, "stages": 3, "consolidate": 0, "nm": {"2:4": 3}, "lr": 0.2}
    return train("resnet8", data, folder, **{**fields, **changes})


def pool_of(folder, stage: int) -> dict[str, torch.Tensor]:
    return read_tensors(folder / f"pool/stage-{stage:02d}.safetensors")[0]


def test_the_search_folds_the_stages_from_the_first_on(searched):
    folder, results, _ = searched
    choices = results["method_state"]["choices"]
    assert [choice["stage"] for choice in choices] == [2, 3]
    wanted = pool_of(folder, 1)  # the dense stage's weights take no part
    for choice in choices:
        wanted = interpolate(wanted, pool_of(folder, choice["stage"]), choice["alpha"])
    assert same(read_tensors(folder / "interpolated.safetensors")[0], wanted)


def test_the_search_counts_the_subnets_found_so_far(searched):
    _, results, counted = searched
    names = [row["name"] for row in results["subnets"]]
    assert counted == {2: {frozenset(names[:5])}, 3: {frozenset(names)}}  # dense, two a stage
    assert len(names) == 8 and names[-1] == "2:4"


@pytest.mark.parametrize("samples", [0, 64], ids=["mixed", "recalibrated"])
def test_candidates_have_the_statistics_that_are_asked_for(searched, tmp_path, samples):
    folder, results, _ = searched  # without samples
    if samples:
        folder, results = tmp_path, search(tmp_path, hard(), search_samples=samples)
    cocktail, data, scores = Cocktail.load(folder / "cocktail.safetensors"), hard(), []
    for name in list(cocktail.subnets)[:5]:
        cocktail.activate("dense")
        cocktail.subnets[name].statistics = None
        cocktail.model.load_state_dict(pool_of(folder, 1))
        with cocktail.using(name):
            if samples:
                recalibrate(cocktail.model, data.calibration(samples, 256))
            right = cocktail.model.eval()(data.holdout.inputs).argmax(1) == data.holdout.targets
        scores.append(100 * float(right.float().mean()))
    tried = dict(map(tuple, results["method_state"]["choices"][0]["tried"]))
    assert tried[1.0] == pytest.approx(sum(scores) / 5)


def test_the_search_sees_the_holdout_only(searched, tmp_path):
    data, (folder, results, _) = hard(), searched
    other = dataclasses.replace(data, test=Split(data.test.inputs * 0 + 1, data.test.targets))
    blind = search(tmp_path, other)
    assert blind["method_state"] == results["method_state"]
    assert same(*(read_tensors(f / "interpolated.safetensors")[0] for f in (folder, tmp_path)))
    scores = [[row["accuracy_interpolated"] for row in r["subnets"]] for r in (blind, results)]
    assert scores[0] != scores[1]


def test_accuracies_are_those_of_a_stages_own_and_of_the_interpolated_weights(searched):
    folder, results, _ = searched
    cocktail, data = Cocktail.load(folder / "cocktail.safetensors"), hard()
    (batch,) = data.calibration(64, 256)
    stages = {name: subnet.stage or 0 for name, subnet in cocktail.subnets.items()}
    assert list(stages.values()) == [0, 1, 1, 2, 2, 3, 3, 3]
    interpolated = read_tensors(folder / "interpolated.safetensors")[0]
    for row in results["subnets"]:
        own = pool_of(folder, stages[row["name"]])
        for what, weights in (("own", own), ("interpolated", interpolated)):
            cocktail.activate("dense")
            cocktail.model.load_state_dict(weights)
            with cocktail.using(row["name"]):
                recalibrate(cocktail.model, [batch])
                right = cocktail.model.eval()(data.test.inputs).argmax(1) == data.test.targets
            assert row[f"accuracy_{what}"] == pytest.approx(100 * float(right.float().mean()))
