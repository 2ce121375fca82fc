"""The benchmark of packed sparse inference: its gate, its ratios, its choices, one short run."""

import json
import re

import bench_masked
import bench_sparse
import groups_sparse
import pytest
from commands import assert_refused, call, short_bench

from sparse_cocktail.ops import routes

SPARSITIES = bench_sparse.SPARSITIES
SMALL = {layer.name.partition(" ")[0]: layer for _, layer in groups_sparse.layers(True, None)}
each_layer = pytest.mark.parametrize("kind", SMALL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run of the command, and everything it wrote."""
    return short_bench(tmp_path_factory, "sparse")


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """An empty folder of measured tables."""
    monkeypatch.setattr(routes, "FOLDER", tmp_path)
    routes.table.cache_clear()
    yield tmp_path
    routes.table.cache_clear()


# ---- layers, gate --------------------------------------------------------------------------------


def test_layers():
    found = groups_sparse.layers(False, None)
    assert len(found) == 2 * 22 + 4 * 4
    first, last = found[0][1], found[-1][1]
    assert groups_sparse.positions(first) == 56 * 56 and first.weight[2:] == (1, 1)
    assert groups_sparse.positions(last) == 197 and last.weight == (11008, 4096)
    assert {layer.input[0] for _, layer in groups_sparse.layers(False, 3)} == {3}


def test_weights_are_made_once_for_all_rows():
    small, large = (
        groups_sparse.SparseInputs(groups_sparse.Layer("", (8, 4), (n, 4)), SPARSITIES, 0, "")
        for n in (2, 3)
    )
    after = groups_sparse.SparseInputs(large.sets[0].layer, SPARSITIES, 0, "", small)
    assert after.sets[1].weights is small.sets[1].weights is not large.sets[1].weights
    assert after.sets[1].x["contiguous"].shape == (3, 4)
    assert [after.next() for _ in range(3)] == [1, 0, 1] and after.first() == 0


@each_layer
def test_ours_and_dense_pass_the_gate_and_wrong_values_do_not(kind, monkeypatch):
    monkeypatch.setattr(groups_sparse, "LOOKED_AT", {2: (5, 7), 4: (1, 5)})
    inputs = groups_sparse.SparseInputs(SMALL[kind], SPARSITIES, 0, kind)
    group, facts = groups_sparse.sparse_group(inputs, SPARSITIES)
    layouts = 1 if kind == "linear" else 2
    assert len(group.impls) == len(facts) == layouts * (1 + len(SPARSITIES)) + 1
    for impl in group.impls:
        y = impl.bind(inputs.sets[0])()
        verdict = group.gate(impl.result(y))
        assert verdict.ok, f"{impl.name}: {verdict.says}"
        y = y.to_dense() if y.is_mkldnn else y
        for wrong in (y * (1 + 1e-5), y * float("nan"), y[:-1], y.double()):
            assert not group.gate(impl.result(wrong)).ok
        sparsity, layout = (facts[impl.name][name] for name in ("sparsity", "layout"))
        other = 0.75 if sparsity == 0.95 else 0.95
        assert impl.result(y) == [sparsity, layout, y]
        assert not group.gate([other, layout, y]).ok, "a result of another sparsity"


# ---- files, command ------------------------------------------------------------------------------


def test_the_json_has_the_documented_form(finished):
    _, result, _ = finished
    assert (result["format"], result["bench"]) == (1, "sparse")
    assert len(result["rows"]) == 5 + 2 * 9
    for row in result["rows"]:
        assert row["ok"] and row["samples_us"] and row["error"] <= row["error_bound"], row
        assert (row["sparsity"] is None) == row["impl"].startswith("torch/dense")
    dense, ours = (
        next(r for r in result["rows"] if r["sparsity"] == s and r["network"] == "small")
        for s in (None, 0.75)
    )
    assert dense["flops"] == 2 * 33 * 100 * 48 and ours["flops"] == dense["flops"] / 4


def test_ratios_are_those_of_the_rows(finished):
    _, result, _ = finished
    line = next(e for e in result["ratios"] if e["op"] == "sparse_conv2d")
    rows = [r for r in result["rows"] if r["case"] == line["case"]]
    dense = min(r["median_us"] for r in rows if r["impl"].startswith("torch/dense, c"))
    ours = min(r["median_us"] for r in rows if r["sparsity"] == 0.87)
    assert line["dense_us"] == dense and line["0.87"] == round(dense / ours, 3)
    means = [e for e in result["ratios"] if e["op"] == "geometric mean"]
    assert [e["case"] for e in means][-2:] == ["all sparse_linear (1 layers)"] + [
        "all sparse_conv2d (2 layers)"
    ]


def test_tables_and_pictures_are_written(finished):
    folder, result, said = finished
    assert (folder / "cpu.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "cpu.md").read_text()
    assert not re.search(r"/(home|tmp|root|work|usr)/", text)
    for line in result["ratios"]:
        assert f"| {line['op']} | {line['case']} |" in text and line["case"][:44] in said
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert call("bench", "sparse", "--redraw", str(folder / "cpu.json"))[0] == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_layer_that_breaks_is_a_row(tmp_path, monkeypatch):
    def explode(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(bench_sparse, "sparse_group", explode)
    result, files = bench_sparse.run(tmp_path, quick=True, pictures=False, tell=lambda _: None)
    assert [row["note"] for row in result["rows"]] == ["RuntimeError: no memory"] * len(SMALL)
    assert len(bench_sparse.failures(result)) == len(SMALL) and len(files) == 2


# ---- choices -------------------------------------------------------------------------------------


def sparse_row(case, time, sparsity=None, layout="contiguous", ok=True):
    return {
        "op": "sparse_conv2d",
        "case": case,
        "sparsity": sparsity,
        "layout": layout,
        "ok": ok,
        "median_us": time,
        "weight_shape": [64, 64, 1, 1],
        "positions": 64,
    }


def test_sparse_choices_pay_in_both_layouts():
    both = ("contiguous", "channels_last")
    rows = [sparse_row("a", time, None, at) for time, at in zip((12.0, 6.0), both, strict=True)]
    rows += [sparse_row("a", time, 0.75, at) for time, at in zip((4.0, 4.0), both, strict=True)]
    rows += [
        sparse_row("b", 9.0),
        sparse_row("b", 3.0, 0.75),
        sparse_row("b", None, 0.95, ok=False),
    ]
    key = "sparse_conv2d/float32/rows-4^3/weights-4^6/density-2^-2"
    assert bench_sparse.choices(rows) == {key: [1.5, 3.0]}


def test_choices_are_saved_from_a_result(tables, finished):
    folder, result, _ = finished
    code, said, _ = call("bench", "sparse", "--redraw", str(folder / "cpu.json"), "--save-choices")
    assert code == 0
    rows = routes.table(routes.cpu_card())
    (path,) = tables.iterdir()
    assert path.name in said and set(rows) == set(bench_sparse.choices(result["rows"]))
    assert json.loads(path.read_text())["environment"] == result["environment"]


def masked_row(route, time, what="forward", mode="eager", **other):
    row = {"op": "masked_conv2d", "case": what, "impl": f"ours/route {route}", "mode": mode}
    row |= {"pass": what, "dtype": "bf16, fp32 weights", "median_us": time, "ok": True}
    row |= {"weight_shape": [64, 32, 3, 3], "positions": [1024, 256], "error_bound": 2.0}
    return row | other


def test_masked_choices(tables):
    rows = [masked_row("fused", 2.0), masked_row("layer", 4.0)]
    rows += [masked_row("fused", 3.0, mode="graph"), masked_row("layer", 3.0, mode="graph")]
    rows += [masked_row("fused", 5.0, "train"), masked_row("layer", 4.0, "train")]
    rows += [masked_row("fused", None, "train", "graph", ok=False, error_bound=None)]
    rows += [masked_row("layer", 4.0, "train", "graph"), masked_row("dense", 1.0, impl="torch/x")]
    at = "bfloat16/rows-4^{}/weights-4^7"
    result = {"rows": rows, "environment": {"gpu": "Some Card"}}
    assert bench_masked.save(result) == tables / "Some-Card.json"
    assert {key: row["route"] for key, row in routes.table("Some Card").items()} == {
        f"conv2d/{at.format(5)}": "fused",
        f"conv2d_input_grad/{at.format(4)}": "layer",
        f"conv2d_weight_grad/{at.format(4)}": "layer",
    }
    wrong = [masked_row("fused", None, ok=False), masked_row("layer", 4.0)]
    assert bench_masked.choices(wrong) == {}


def test_tables_are_printed(tables):
    key = "sparse_linear/float32/rows-4^0/weights-4^11/density-2^-3"
    routes.save(routes.cpu_card(), {}, {key: [2.5]}, routes.SPARSE_ROUTES)
    _, said, _ = call("info", "--choices")
    assert re.search(re.escape(key) + r".*sparse.*2\.50x", said), said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sparse", "--quick", "--save-choices"], "bench sparse: save_choices=True with quick"),
        (["masked", "--quick", "--save-choices"], "bench masked: save_choices=True with quick"),
        (["sparse", "--redraw", "none.json"], "none.json"),
    ],
)
def test_errors_are_one_line(arguments, message):
    assert_refused(message, "bench", *arguments)
