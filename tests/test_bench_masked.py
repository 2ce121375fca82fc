"""The benchmark of masked layers: its gate, its memory count, ours and peers, one short run."""

import dataclasses
import re

import bench_masked
import groups_masked
import peers_masked
import pytest
import shapes
import timing
import torch
from commands import assert_refused, short_bench

from sparse_cocktail import ops
from sparse_cocktail.ops import routes
from sparse_cocktail.patterns import parse

CPU = torch.device("cpu")
SMALL = {layer.name.partition(" ")[0]: layer for layer in shapes.layers_of("small", gpu=False)}
DTYPES = bench_masked.DTYPES


def inputs(kind, dtype="fp32", rows=None):
    layer = SMALL[kind]
    if rows is not None:
        layer = dataclasses.replace(layer, input=(rows, *layer.input[1:]))
    return shapes.LayerInputs(layer, CPU, DTYPES[dtype], parse("2:4"), 0, kind)


def called(name, held, train):
    way = next(w for w in ways(held) if w.name == name)
    return groups_masked._call(way, held, train)()


def ways(held, device=CPU):
    return [*groups_masked._our_ways(device, held), *peers_masked.layer_peers()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run of the command, and everything it wrote."""
    return short_bench(tmp_path_factory, "masked", "--dtype", "fp32")


# ---- layers --------------------------------------------------------------------------------------


def test_layers_have_the_published_sizes():
    resnet = shapes.layers_of("resnet50", gpu=False, batch=1)
    assert sum(layer.count for layer in resnet) == 52 and len(resnet) == 22
    first = 2 * 64 * 3 * 49 * 112 * 112
    flops = sum(layer.flops * layer.count for layer in resnet) + first + 2 * 2048 * 1000
    assert round(flops / 2e9, 2) == 4.09  # multiply-adds of ResNet-50, its classifier included
    for name, blocks in (("vit-b16", 84_934_656), ("llama-7b", 6_476_005_376)):
        layers = {layer.weight: layer for layer in shapes.layers_of(name, gpu=True)}
        weights = sum(out * inputs * layer.count for (out, inputs), layer in layers.items())
        assert weights == blocks, name


def test_sets_are_distinct_and_taken_in_turn():
    some = inputs("linear")
    assert len(some.sets) == 2 and not some.sets[0].x.equal(some.sets[1].x)
    assert [some.next() for _ in range(4)] == [1, 0, 1, 0] and some.first() == 0
    held = inputs("3x3").sets[0]
    tensors = (held.x, held.weight, held.grad, held.mask)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
    assert torch.equal(ops.pack_mask(held.mask), held.bits)


def test_one_set_changes_its_sign():
    one = inputs("linear")
    del one.sets[1:]
    before = one.sets[0].x.detach().clone()
    one.next()
    assert torch.equal(one.sets[0].x, -before)
    one.first()
    assert torch.equal(one.sets[0].x, before)


# ---- gate, memory --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "looked_at", [{2: (64, 64, 64), 4: (2, 16, 16)}, {2: (5, 7, 3), 4: (1, 5, 3)}]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SMALL)
def test_ours_and_every_peer_pass_the_gate(monkeypatch, kind, dtype, looked_at):
    monkeypatch.setattr(groups_masked, "LOOKED_AT", looked_at)
    some = inputs(kind, dtype)
    for train in (False, True):
        group, memory = groups_masked.layer_group(some, train, "")
        assert bool(memory) == train and group.op.startswith("masked_")
        for impl in group.impls:
            call = impl.bind(some.sets[0])
            for _ in range(2):
                verdict = group.gate(impl.result(call()))
                assert verdict.ok, f"{impl.name}: {verdict.says}"


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_the_gate_refuses_wrong_values(kind, place):
    held = inputs(kind).sets[0]
    gate = groups_masked.LayerGate(held, train=True)
    right = called("ours/op", held, train=True)
    for spoil in (lambda t: t * (1 + 1e-4), lambda t: t / t.new_zeros(()), lambda t: t[:-1]):
        wrong = list(right)
        wrong[place] = spoil(wrong[place])
        assert not gate(wrong).ok
    assert gate(right).ok


def test_the_gate_refuses_a_gradient_of_a_pruned_weight_and_a_dense_result():
    held = inputs("linear").sets[0]
    gate = groups_masked.LayerGate(held, train=True)
    right = called("ours/op", held, train=True)
    wrong = [t.clone() for t in right]
    wrong[2][~held.mask] = 1e-30
    assert gate(wrong).says == "a pruned weight has a gradient"
    dense = called("torch/dense", held, train=True)
    assert gate(groups_masked.Dense(dense)).ok and not gate(dense).ok
    assert not gate(groups_masked.Dense(right)).ok
    assert not gate([right[0].double(), *right[1:]]).ok


def test_the_gate_refuses_less_precision():
    held = inputs("linear").sets[0]
    gate = groups_masked.LayerGate(held, train=False)
    y = called("torch/w*m bool", held, train=False)[0]
    assert gate([y]).ok and not gate([y.bfloat16().float()]).ok


@pytest.mark.parametrize("kind", SMALL)
def test_saved_bytes(kind):
    held = inputs(kind).sets[0]
    _, memory = groups_masked.layer_group(inputs(kind), True, "")
    found = {name: measure() for name, measure in memory.items()}
    x, weight = held.x.nbytes, held.weight.nbytes
    assert found["torch/dense"] == x
    assert found["ours/op"] == x + held.bits.nbytes
    assert found["torch/w*m bool"] == x + weight + held.mask.nbytes
    assert found["torch/w*m float"] == found["torch/prune"] == x + 2 * weight


# ---- routes --------------------------------------------------------------------------------------


def test_routes_are_forced(monkeypatch):
    seen = []
    layer = inputs("linear").sets[0]
    linear = ops.masked_linear
    monkeypatch.setattr(
        ops, "masked_linear", lambda *a: seen.append(routes._forced[routes.ROUTES]) or linear(*a)
    )
    found = [way for way in ways(layer) if way.name.startswith("ours/route")]
    for way in found:
        groups_masked._call(way, layer, train=False)()
    assert seen == list(routes.ROUTES)
    many = inputs("linear", rows=1000).sets[0]
    assert not any("route" in way.name for way in ways(many)), "the CPU has one"


# ---- files, command ------------------------------------------------------------------------------


def test_the_json_has_the_documented_form(finished):
    _, result, _ = finished
    assert (result["format"], result["bench"]) == (1, "masked")
    for row in result["rows"]:
        assert row["ok"] == (row["median_us"] is not None) == bool(row["samples_us"]), row
        assert row["ok"], row
        trained = row["pass"] == "train" and "SGD" not in row["case"]
        assert isinstance(row["memory_bytes"], int) == trained
        assert row["error"] <= row["error_bound"] == groups_masked.BOUND
    impls = {row["impl"] for row in result["rows"]}
    assert {"ours/op", "ours/module", "torch/dense", "torch/w*m bool", "torch/prune"} <= impls
    assert {row["op"] for row in result["rows"]} == {"network", "masked_linear", "masked_conv2d"}
    patterns = {line["case"] for line in result["ratios"] if line["op"] == "network"}
    assert len(patterns) == 2 * len(bench_masked.PATTERNS) + 1  # and all of them in turn


def test_ratios_are_those_of_the_rows(finished):
    _, result, _ = finished
    lines = {(line["op"], line["case"]): line for line in result["ratios"]}
    row = next(r for r in result["rows"] if r["impl"] == "ours/op" and r["pass"] == "train")
    same = [r for r in result["rows"] if (r["op"], r["case"]) == (row["op"], row["case"])]
    times = {r["impl"]: r["median_us"] for r in same}
    line = lines[row["op"], row["case"]]
    dense = times["torch/dense"]
    assert line["ours"] == round(times["ours/op"] / dense, 3) and line["dense_us"] == dense
    best = min(times["torch/w*m bool"], times["torch/w*m float"])
    assert line["product"] == round(best / dense, 3)
    assert line["ours_bytes"] == next(r["memory_bytes"] for r in same if r["impl"] == "ours/op")
    total = lines["masked_conv2d, sum", "small, its 3 layers, fp32, train"]
    parts = [
        r["median_us"] * r["count"]
        for r in result["rows"]
        if (r["op"], r["impl"], r["pass"]) == ("masked_conv2d", "torch/dense", "train")
    ]
    assert len(parts) == 2 and total["dense_us"] == pytest.approx(sum(parts))


def test_tables_and_pictures_are_written(finished):
    folder, result, said = finished
    assert (folder / "cpu.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "cpu.md").read_text()
    assert not re.search(r"/(home|tmp|root|work|usr)/", text)
    for line in result["ratios"]:
        assert f"| {line['op']} | {line['case']} |" in text and line["case"][:44] in said
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    bench_masked.redraw(folder / "cpu.json")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_failures():
    row = {"op": "masked_linear", "case": "c", "ok": False, "error_bound": None}
    refused, wrong = (
        row | {"impl": "ours/route x"},
        row | {"impl": "ours/route y", "error_bound": 2},
    )
    broken, peer = row | {"impl": "ours/op"}, row | {"impl": "torch/prune", "error_bound": 2}
    assert bench_masked.failures({"rows": [refused, wrong, broken, peer]}) == [wrong, broken]


def test_a_group_that_breaks_is_a_row(tmp_path, monkeypatch):
    def explode(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(bench_masked, "layer_group", explode)
    how = {"quick": True, "cases": ["small"], "dtypes": ["fp32"], "passes": ["forward"]}
    result, files = bench_masked.run(tmp_path, pictures=False, tell=lambda _: None, **how)
    assert [row["note"] for row in result["rows"]] == ["RuntimeError: no memory"] * len(SMALL)
    assert len(bench_masked.failures(result)) == len(SMALL) and len(files) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "resnet51"], "case='resnet51' is unknown; use network"),
        (["--dtype", "fp8"], "dtype='fp8' is unknown; use fp32"),
        (["--passes", "backward"], "pass='backward' is unknown; use forward, train"),
        (["--device", "tpu"], "bench masked: device='tpu' is not one of cpu, cuda"),
        (["--redraw", "none.json"], "none.json"),
    ],
)
def test_errors_are_one_line(arguments, message):
    assert_refused(message, "bench", "masked", *arguments)


def test_default_dtypes():
    assert bench_masked.default_dtypes(gpu=True) == ["bf16, fp32 weights", "bf16"]
    assert bench_masked.default_dtypes(gpu=False)[0] == "fp32"
    assert timing.Plan(seconds=0.5, many=10, most=40).samples(2.0) == 5
