"""Sparse Cocktail as a method: the menu, the schedule of stages and steps, rewinding, results."""

import json
from itertools import pairwise

import pytest
import torch
from test_engine import model, run, toy

from sparse_cocktail import Cocktail, ops
from sparse_cocktail.config import split_fields
from sparse_cocktail.engine import Trainer, train
from sparse_cocktail.files import read_tensors
from sparse_cocktail.methods import Pass
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
        if ctx.stage == 1 and ctx.step == 0:
            seen["model"] = {k: v.clone() for k, v in ctx.model.state_dict().items()}
            seen["momentum"] = len(ctx.optimizer.state)
        if ctx.stage == 0 and ctx.step == ctx.steps_per_epoch:  # one completed epoch
            seen["snapshot"] = {k: v.clone() for k, v in ctx.model.state_dict().items()}
        original(self, *args)

    monkeypatch.setattr(Stepper, "step", look)
    run(tmp_path, epochs=2, stages=1)
    assert seen["momentum"] == 0
    assert all(torch.equal(seen["model"][k], v) for k, v in seen["snapshot"].items())


def test_masks_come_from_the_weights_before_rewinding(tmp_path):
    run(tmp_path, epochs=2, stages=1)
    cocktail = Cocktail.load(tmp_path / "cocktail.safetensors")
    trained = read_tensors(tmp_path / "pool" / "stage-00.safetensors")[0]
    values = [trained[f"{name}.weight"] for name in cocktail.layers]
    expected = ops.topk_masks(values, keep_count(0.8, cocktail.bank.numel))
    row = cocktail.subnets["unstructured-0.2000"].row
    assert all(map(torch.equal, cocktail.bank.views(row), expected))


def test_layers_that_a_pattern_cannot_take_are_reported_before_training(tmp_path):
    nm = {"4:8": 1}  # width 4: some layers have in=4
    train(model(), toy(), tmp_path, epochs=1, stages=1, threads=1, nm=nm)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    left = [entry for entry in log if entry["event"] == "left_dense"]
    assert {entry["pattern"] for entry in left} == {"4:8"}
    assert all("not a multiple of 8" in entry["reason"] for entry in left)
    assert [e["event"] for e in log].index("train") > [e["event"] for e in log].index("left_dense")
