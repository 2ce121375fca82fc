"""The benchmark of co-training: the engine's period, its gate, ours and peers, one short run."""

import json
import re

import bench_train
import groups_masked
import groups_train
import pytest
import timing
import torch
from commands import assert_refused, call, short_bench

from sparse_cocktail.stepping import Stepper

CPU = torch.device("cpu")
PERIOD = tuple(range(groups_train.PERIOD))
ONCE = timing.Plan(seconds=0.0, few=1, many=1, most=1, rounds=1)


def tiny(gpu=False):
    training = groups_train.Training("resnet8", (4, 3, 8, 8), CPU)
    if gpu:  # its precision: bf16, gated by float32
        training.gpu, training.wide = True, torch.float32
    return training


@pytest.fixture(scope="module")
def bench():
    return groups_train.Bench(tiny())


def outcome(group, name, training):
    impl = next(impl for impl in group.impls if impl.name == name)
    return impl.result(impl.bind(training).run())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run of the command, and everything it wrote."""
    return short_bench(tmp_path_factory, "train", "--batch", 2)


# ---- what is timed -------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [True, False])
def test_a_period_is_the_methods_own_and_changes_no_weight(bench, pair):
    engine = bench.engine
    before = [p.detach().clone() for p in engine.ctx.model.parameters()]
    engine.start(0, pair)
    for place in PERIOD:
        engine.step(place)
    shown = [(step, subnet) for step, subnet, _ in engine.stepper.losses]
    u, c = "unstructured-0.6723", "channel-0.4095"
    assert shown == list(enumerate(["dense", u, "dense", c, "dense", "2:4"]))
    assert engine.names == {0: "dense", 1: u, 3: c, 5: "2:4"}
    assert all(map(torch.equal, engine.ctx.model.parameters(), before))
    state = engine.ctx.optimizer.state
    assert len(state) == len(before) and all(s["momentum_buffer"].any() for s in state.values())


def test_masks_leave_no_layer_silent(bench):
    """Rows that are not computed would make unstructured steps too fast."""
    cocktail = bench.engine.ctx.cocktail
    for place in (1, 5):
        rows = cocktail.subnets[bench.names[place]].rows
        widths = [len(layer.weight) for layer in cocktail.layers.values()]
        assert all(len(r) > 0.9 * w for r, w in zip(rows, widths, strict=True))
    assert cocktail.subnets[bench.names[1]].pattern.density == pytest.approx(0.8**5, abs=1e-4)


def test_a_sparse_step_needs_its_teacher(bench):
    """With `pair_batches` the first batch and its dense outputs, else a forward on the second."""
    for pair in (True, False):
        bench.engine.start(3, pair)
        bench.engine.step(3)
        model, (x, target) = bench.peer.by_place[3], bench.engine.batches[0 if pair else 1]
        logits, taught = model(x), bench.peer.models[0](x).softmax(1)
        losses = [torch.nn.functional.cross_entropy(logits, t) for t in (target, taught)]
        assert float(bench.engine.found()[0]) == pytest.approx(
            float(sum(losses).detach() / 2), abs=1e-5
        )


def test_stages_are_as_long_as_the_recipes():
    assert bench_train.stage_steps("resnet50") == 90 * 5004
    assert bench_train.stage_steps("resnet18") == 150 * 371
    assert bench_train.stage_steps("resnet8") == 4 * 20


# ---- the gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", [False, True], ids=["fp32", "bf16"])
def test_ours_and_every_peer_pass_the_gate(bench, gpu, monkeypatch):
    if gpu:
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
        bench = groups_train.Bench(tiny(gpu=True))
    settings = [(PERIOD, True), (PERIOD, False), *(((p,), True) for p in (0, 1, 3, 5))]
    for places, pair in settings:
        group, memory = bench.steps("", places, pair)
        assert set(memory) == {impl.name for impl in group.impls}
        peers = {"torch/dense", *(["torch/dense, deterministic"] if gpu else [])}
        assert {*memory} == {"ours/engine", *peers, *(["torch/prune"] if places != (0,) else [])}
        for impl in group.impls:
            verdict = group.gate(impl.result(impl.bind(bench.training).run()))
            assert verdict.ok, f"{impl.name} at {places}: {verdict.says}"
            fixed = impl.name in (groups_train.ENGINE, groups_train.FIXED)
            assert not gpu or torch.backends.cudnn.deterministic == fixed


@pytest.mark.parametrize("places", [PERIOD, (0,), (3,)], ids=["period", "dense", "channel"])
def test_the_gate_refuses_wrong_values(bench, places):
    group, _ = bench.steps("", places, True)
    right = outcome(group, groups_train.ENGINE, bench.training)
    assert group.gate(right).ok
    for place in range(1, len(right)):
        for spoil in (lambda t: t * (1 + 1e-4), lambda t: t / t.new_zeros(())):
            wrong = list(right)
            wrong[place] = spoil(wrong[place])
            assert not group.gate(wrong).ok, place
    losses = right[1].clone()
    losses[-1] *= 1 + 1e-4  # of one step
    assert not group.gate([right[0], losses, *right[2:]]).ok
    assert not group.gate([right[0], right[1][:-1], *right[2:]]).ok


def test_the_gate_tells_dense_steps_from_pruned_ones(bench):
    group, _ = bench.steps("", PERIOD, True)
    ours, dense = (outcome(group, n, bench.training) for n in ("ours/engine", "torch/dense"))
    assert group.gate(dense).ok and not group.gate(list(dense)).ok
    assert not group.gate(groups_masked.Dense(ours)).ok
    own, _ = bench.steps("", PERIOD, False)
    assert not own.gate(ours).ok  # another batch


def test_an_engine_that_goes_wrong_is_a_failed_row(bench, monkeypatch):
    group, _ = bench.steps("", (1,), True)
    right = Stepper._loss
    monkeypatch.setattr(Stepper, "_loss", lambda *args: right(*args) * 1.001)
    rows = {r["impl"]: r for r in timing.measure(group, bench.training, ONCE)}
    assert not rows["ours/engine"]["ok"] and "times that of plain torch" in str(rows)
    assert rows["torch/dense"]["ok"] and rows["torch/prune"]["ok"]
    assert bench_train.failures({"rows": list(rows.values())}) == [rows["ours/engine"]]


def test_mask_steps_and_switches_are_compared(bench):
    group = bench.masks()
    rows = outcome(group, "ours/before_stage", bench.training)
    assert len(rows) == 2 * 10 + 3 and group.gate(rows).ok
    rows[7][0] ^= 1
    assert group.gate(rows).error == 1
    group = bench.activate()
    bits = [b.clone() for b in outcome(group, "ours/activate", bench.training)]
    assert group.gate(bits).ok
    bits[0][0, 0, 0] ^= 1
    assert group.gate(bits).error == 1


# ---- files, command ------------------------------------------------------------------------------


def test_the_json_has_the_documented_form(finished):
    _, result, _ = finished
    assert (result["format"], result["bench"]) == (1, "train")
    kinds = ["pair_batches", "own batches", *groups_train.TURNS, "masks", "activate"]
    assert list(dict.fromkeys(row["kind"] for row in result["rows"])) == kinds
    for row in result["rows"]:
        assert row["ok"] and row["samples_us"] and row["images"] == 2, row
        assert isinstance(row["memory_bytes"], int) == (row["op"] == "step")
        if row["steps"]:
            images = row["images_per_second"] * row["median_us"] / 1e6
            assert images == pytest.approx(2 * row["steps"], rel=1e-2)
            assert row["error"] <= row["error_bound"] == groups_masked.BOUND
    kept = {(r["kind"], r["impl"]): r["memory_bytes"] for r in result["rows"]}
    assert kept["dense", "ours/engine"] == kept["dense", "torch/dense"]
    assert kept["n:m", "ours/engine"] > kept["n:m", "torch/dense"]


def test_ratios_are_those_of_the_rows(finished):
    _, result, _ = finished
    times = {(r["kind"], r["impl"]): r["median_us"] for r in result["rows"]}
    lines = {line["kind"]: line for line in result["ratios"]}
    for kind in ("pair_batches", "own batches", *groups_train.TURNS):
        line, unit = lines[kind], times[kind, "torch/dense"]
        assert line["dense_us"] == unit and line["deterministic"] is None
        assert line["ours"] == round(times[kind, "ours/engine"] / unit, 4)
        pruned = times.get((kind, "torch/prune"))
        assert line["prune"] == (round(pruned / unit, 4) if pruned else None)
    step = times["dense", "torch/dense"]
    share = times["masks", "ours/before_stage"] / 10 / step / 80  # digits: stages of 80 steps
    assert lines["masks"]["share"] == pytest.approx(share)
    assert lines["activate"]["share"] == pytest.approx(
        times["activate", "ours/activate"] / 4 / step
    )
    for kind in ("pair_batches", "own batches"):
        assert lines[kind]["share"] == pytest.approx(lines[kind]["ours"] - 1 + share)


def test_tables_and_pictures_are_written(finished):
    folder, result, said = finished
    assert (folder / "cpu.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "cpu.md").read_text()
    assert not re.search(r"/(home|tmp|root|work|usr)/", text) and "{" not in text
    for line in result["ratios"]:
        assert f"| {line['op']} | {line['case']} |" in text and line["case"][:44] in said
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    bench_train.redraw(folder / "cpu.json")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_wrong_engine_is_a_row_and_exit_code_1(monkeypatch, tmp_path):
    right = Stepper._loss
    monkeypatch.setattr(Stepper, "_loss", lambda *args: right(*args) * 1.001)
    options = ["--quick", "--batch", 2, "--no-pictures", "--out", tmp_path]
    code, said, _ = call("bench", "train", *options)
    (row,) = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert code == 1 and not row["ok"] and row["impl"] == "ours/set-up"
    assert "the engine's step of dense in torch.float64 is not that of PyTorch" in row["note"]
    assert f"FAILED: {row['op']}, {row['case']}" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--cases", "resnet51"],
            "bench train: case='resnet51' is unknown; use resnet18, resnet50",
        ),
        (["--quick", "--cases", "resnet18"], "case='resnet18' is unknown; use resnet8"),
        (["--device", "tpu"], "bench train: device='tpu' is not one of cpu, cuda"),
        (["--redraw", "none.json"], "none.json"),
    ],
)
def test_errors_are_one_line(arguments, message):
    assert_refused(message, "bench", "train", *arguments)
