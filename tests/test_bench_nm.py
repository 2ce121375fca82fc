"""The benchmark of N:M weights and `sparse-cocktail tune`: gates, files, table, one short run."""

import re

import bench_nm
import gpu
import groups_compress
import groups_nm
import nm_tables
import peers_nm
import pytest
import shapes
import timing
import torch
from commands import assert_refused, call, short_bench

from sparse_cocktail import ops, reference_nm
from sparse_cocktail.ops import nm_routes, routes

CPU = torch.device("cpu")
SHORT = timing.Plan(seconds=0.0, few=2, many=2, most=2, rounds=2, fast=10.0)
LAYER = groups_nm.Layer("", (48, 104), (5, 104))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run of the command, and everything it wrote."""
    return short_bench(tmp_path_factory, "nm")


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """An empty folder of measured tables."""
    monkeypatch.setattr(routes, "FOLDER", tmp_path)
    for cached in (routes.table, nm_routes._read):
        cached.cache_clear()
    yield tmp_path
    for cached in (routes.table, nm_routes._read):
        cached.cache_clear()


# ---- what is measured ----------------------------------------------------------------------------


def test_layers():
    assert len(groups_nm.layers("resnet50", gpu=True)) == 12
    assert groups_nm.layers("vit-l16", gpu=True)[0] == ("qkv", 3072, 1024)
    assert {name for name, *_ in groups_nm.layers("llama-7b", gpu=False)} == {"q k v o", "gate up"}
    for network in groups_nm.LAYERS:
        for gpu_too in (False, True):
            assert all(ins % 8 == 0 for _, _, ins in groups_nm.layers(network, gpu_too))
    cases = {case.name: case for case in groups_compress.compress_cases(False)}
    assert cases["resnet50"].numel == 25_502_912 - 2048 * 1000 - 64 * 3 * 49
    assert cases["11008x4096-bf16"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("place", [0, 1], ids=["convolutions", "linear"])
def test_compressed_forms_pass_the_gate_and_others_do_not(place, dtype):
    case = groups_compress.compress_cases(True)[place]
    case = shapes.Case(case.name, case.shapes, dtype=bench_nm.DTYPES[dtype])
    inputs = shapes.Inputs(case, CPU, 0, 0)
    made = [make(inputs.sets[0]) for make in groups_compress.makers(case)]
    names = {group.op for group in made}
    assert names == {"nm_compress", "nm_decompress"} | ({"nm_pack_weight"} if place else set())
    for group in made:
        exact = 0
        for impl in group.impls:
            if impl.name in timing.LIMITS:
                continue
            result = impl.result(impl.bind(inputs.sets[0])())
            verdict = group.gate(result)
            ties = dtype == "bf16" and "topk" in impl.name
            assert verdict.ok or ties, f"{group.op} {group.setting}, {impl.name}: {verdict.says}"
            exact += impl.name.startswith("torch/") and verdict.ok
            if group.op != "nm_pack_weight":
                assert not group.gate([-result[0], *result[1:]]).ok, impl.name
                assert not group.gate(result[1:]).ok
        assert exact, group.op
    if place:
        other = reference_nm.nm_pack_weight(-inputs.sets[0].tensors[0], None, torch.bfloat16)
        assert not made[-1].gate(["ours", other]).ok
        values = peers_nm.sparse_semi_structured_from_dense_cutlass(other[0].new_zeros(64, 256))
        assert not made[-1].gate(["torch", values]).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)], ids=str)
def test_products_pass_the_gate_and_wrong_ones_do_not(pattern, dtype):
    inputs = groups_nm.NMInputs(LAYER, pattern, dtype, CPU, 0, "layer")
    group, facts = groups_nm.linear_group(inputs)
    assert [impl.name for impl in group.impls] == list(facts)
    assert {f["route"] for f in facts.values()} == {"compressed", "dense", None}
    held = inputs.sets[0]
    for impl in group.impls:
        if "oneDNN" in impl.name and dtype == torch.bfloat16 and not impl.graph:
            continue  # this processor has none
        if impl.name == "ours/compressed" and not impl.graph:
            continue  # the extension is not built
        y = impl.bind(held)()
        assert group.gate(impl.result(y)).ok, impl.name
        y = y.to_dense() if y.is_mkldnn else y
        for wrong in (y * 1.1, y * float("nan"), y[:-1], y.double()):
            assert not group.gate(impl.result(wrong)).ok, impl.name
    assert held.weight.dense.count_nonzero() == 48 * 104 // 2
    assert facts["torch/dense"]["flops"] == 2 * 5 * 48 * 104


def test_weights_are_made_once_for_all_rows():
    made = [groups_nm.NMInputs(LAYER, (2, 4), torch.float32, CPU, 0, "")]
    more = groups_nm.Layer("", (48, 104), (7, 104))
    made.append(groups_nm.NMInputs(more, (2, 4), torch.float32, CPU, 0, "", made[0]))
    made.append(groups_nm.NMInputs(more, (4, 8), torch.float32, CPU, 0, "", made[0]))
    first, second, third = ([held.weight for held in inputs.sets] for inputs in made)
    assert all(a is b for a, b in zip(first, second, strict=True)) and first[0] is not third[0]
    assert made[1].sets[0].x.shape == (7, 104)
    assert [made[1].next() for _ in range(3)] == [1, 0, 1] and made[1].first() == 0


def test_what_a_machine_lacks_is_a_row():
    inputs = groups_nm.NMInputs(LAYER, (2, 4), torch.bfloat16, CPU, 0, "layer")
    group, _ = groups_nm.linear_group(inputs)
    missing = peers_nm._cutlass_missing(CPU)
    bind = groups_nm.partial(groups_nm._absent, missing)
    group.impls = [timing.Impl("ours/gemm", bind, graph=False), group.impls[-2]]
    absent, there = timing.measure(group, inputs, SHORT)
    assert absent["note"] == "NotHere: torch's CUTLASS 2:4 needs a GPU" and not absent["ok"]
    assert there["ok"] and bench_nm.failures({"rows": [absent, there]}) == []
    broken = timing.broken("nm_linear", "layer", RuntimeError("no memory"))
    assert bench_nm.failures({"rows": [broken]}) == [broken]
    assert peers_nm._cusparselt_missing(CPU) == "cuSPARSELt needs a GPU"


def test_a_layer_that_breaks_is_a_row(tmp_path, monkeypatch):
    def explode(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(bench_nm, "linear_group", explode)
    how = {"quick": True, "cases": ["small"], "pictures": True, "tell": lambda _: None}
    result, files = bench_nm.run(tmp_path, **how)
    assert {row["note"] for row in result["rows"]} == {"RuntimeError: no memory"}
    assert len(bench_nm.failures(result)) == len(result["rows"]) and len(files) == 2


# ---- files ---------------------------------------------------------------------------------------


def test_the_json_has_the_documented_form(finished):
    _, result, _ = finished
    assert (result["format"], result["bench"]) == (1, "nm")
    products = [row for row in result["rows"] if row["op"] == "nm_linear"]
    ops_there = {"nm_compress", "nm_decompress", "nm_pack_weight", "nm_linear"}
    assert {row["op"] for row in result["rows"]} == ops_there
    for row in products:
        assert (row["layer"], row["weight_shape"]) == ("104 to 48", [48, 104])
        assert row["rows"] in (1, 33) and row["pattern"] in ("2:4", "4:8")
        assert row["route"] in (*nm_routes.NM_ROUTES, None) and row["host_us"] is None
        assert row["ok"] == bool(row["samples_us"]) and (row["ok"] or row["note"])
    wrong = [row for row in result["rows"] if not row["ok"] and "NotHere" not in row["note"]]
    assert wrong == []
    warm = [row for row in products if row["memory"] == "warm"]
    assert len({row["case"] for row in warm}) == 8 == len({row["case"] for row in products}) / 2
    assert all(row["route"] and row["case"].endswith(", warm") for row in warm)
    modules = [row for row in products if row["impl"] == "ours/NMLinear"]
    assert modules and all(row["note"].startswith("runs ") for row in modules)


def test_ratios_are_those_of_the_rows(finished):
    _, result, _ = finished
    assert len(result["ratios"]) == len({r["case"] for r in result["rows"] if "layer" in r})
    line = result["ratios"][0]
    times = {r["impl"]: r["median_us"] for r in result["rows"] if r["case"] == line["case"]}
    assert line["dense_us"] == times["torch/dense"] and "torch/dense" not in line["gains"]
    for name, gain in line["gains"].items():
        assert gain == round(line["dense_us"] / times[name], 3)
    assert line["best"] in (None, "ours/compressed") and "ours/NMLinear" in line["gains"]
    assert "ours/NMLinear" not in result["ratios"][1]["gains"], "a warm one"


def test_rates_and_shares_of_the_peak():
    row = {"flops": 4e9, "bytes": 2e6, "median_us": 10.0}
    rates = nm_tables._rates(row, nm_tables.peak({"gpu": "NVIDIA H200"}, "bf16"))
    assert rates == {"tflops": 400.0, "peak_percent": 20.2, "gb_per_s": 200.0}
    assert nm_tables.peak({"gpu": "NVIDIA A100-SXM4-80GB"}, "fp16") == 624
    assert nm_tables.peak({"gpu": "NVIDIA H100 PCIe"}, "bf16") == 1513
    assert nm_tables.peak({"gpu": "NVIDIA H200"}, "fp32") is None
    assert nm_tables.peak({"cpu": "x"}, "bf16") is nm_tables.peak({"gpu": "T4"}, "bf16") is None


def test_tables_and_pictures_are_written(finished):
    folder, result, said = finished
    assert (folder / "cpu.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "cpu.md").read_text()
    assert not re.search(r"/(home|tmp|root|work|usr)/", text)
    assert "### small, 104 to 48, 2:4, fp32, cold, eager" in text and "## nm_pack_weight: " in text
    for line in result["ratios"]:
        assert line["case"] in said
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert call("bench", "nm", "--redraw", str(folder / "cpu.json"))[0] == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ---- choices -------------------------------------------------------------------------------------


def product_row(route, time, rows=16, mode="eager", case="a", **other):
    row = {"op": "nm_linear", "case": case, "impl": "x", "route": route, "mode": mode, "rows": rows}
    row |= {"pattern": "2:4", "dtype": "bf16", "weight_shape": [64, 64], "median_us": time}
    row["p10_us"] = time and time / 2
    return {**row, "ok": time is not None, **other}


def test_choices_are_times_by_route_of_each_layer(tables):
    rows = [product_row("dense", 4.0), product_row("gemm", 2.0), product_row(None, 1.0)]
    rows += [product_row("skinny", None), product_row("gemm", 3.0, mode="graph")]
    rows += [product_row("dense", 6.0, case="b"), product_row("dense", 9.0, 1024)]
    rows.append({"op": "nm_compress", "ok": True})
    key = "nm_linear/2:4/bfloat16/{}/rows-2^{}/weights-4^6"
    found = bench_nm.choices(rows)
    assert found == {
        key.format("eager", 4): [
            {"dense": 4.0, "gemm": 2.0},
            {"dense": 2.0, "gemm": 1.0},
            {"dense": 6.0},
            {"dense": 3.0},
        ],
        key.format("graph", 4): [{"gemm": 3.0}, {"gemm": 1.5}],
        key.format("eager", 10): [{"dense": 9.0}, {"dense": 4.5}],
    }
    result = {"rows": rows[:2], "environment": {"gpu": "Some Card", "cpu_level": "avx2"}}
    assert bench_nm.save(result) == tables / "nm-Some-Card.json"
    assert nm_routes.table("Some Card")[key.format("eager", 4)]["route"] == "gemm"


def test_choices_are_saved_from_a_result(tables, finished):
    folder, result, _ = finished
    code, said, _ = call("bench", "nm", "--redraw", str(folder / "cpu.json"), "--save-choices")
    (path,) = tables.iterdir()
    assert code == 0 and path.name in said and path.name == f"nm-{routes.cpu_card()}.json"
    assert set(nm_routes.table(routes.cpu_card())) == set(bench_nm.choices(result["rows"]))


def test_tune_writes_the_table(tables):
    options = ["--layers", "48x104,64x64", "--rows", "2,40", "--patterns", "2:4", "--dtype", "fp32"]
    code, said, _ = call("tune", *options, "--quick")
    assert code == 0, said
    (path,) = tables.iterdir()
    found = nm_routes.table(routes.cpu_card())
    assert path.name in said and path.name == f"nm-{routes.cpu_card()}.json"
    keys = [nm_routes.bucket(torch.float32, 2, 4, n, 64, 64) for n in (2, 40)]
    assert list(found) == sorted(keys) and all(e["measurements"] == 8 for e in found.values())
    fast = {"dense", *(["compressed"] if "cpp" in ops.implementations("nm_linear") else [])}
    assert all(set(entry["us"]) == fast for entry in found.values())
    assert "layer, 104 to 48, 2:4, fp32, 2 rows" in said
    code, said, _ = call("info", "--choices")
    assert code == 0 and "nm_linear/2:4/float32/eager" in said.replace("\n", "")
    plan = nm_routes.plan(torch.empty(1), 2, 4, 64, 64)
    assert "not measured" not in str(plan)


def test_tune_takes_the_layers_of_a_model(tables):
    from sparse_cocktail.cli import tune

    found = tune._shapes_of("resnet50")
    assert (64, 64) in found and (1000, 2048) in found and (512, 256) not in found
    assert len(found) == len(set(found)) == 13


# ---- command, make -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "nm", "--cases", "gpt"], "bench nm: case='gpt' is unknown; use compress, llama"),
        (["bench", "nm", "--dtype", "int8"], "bench nm: dtype='int8' is unknown; use fp32, bf16"),
        (["bench", "nm", "--rows", "1,x"], "bench nm: rows='1,x' is not a list of whole numbers"),
        (["bench", "nm", "--rows", "0"], "bench nm: rows=0 is not 1 or more"),
        (["bench", "nm", "--patterns", "channel-0.5"], "pattern='channel-0.5' is not N:M"),
        (["bench", "nm", "--device", "tpu"], "device='tpu' is not one of cpu, cuda"),
        (["bench", "nm", "--quick", "--save-choices"], "save_choices=True with quick=True"),
        (["bench", "nm", "--redraw", "none.json"], "none.json"),
        (["tune", "--device", "tpu"], "tune: device='tpu' is not one of cpu, cuda"),
        (["tune", "--layers", "64"], "tune: layers has '64', which is not OUTxIN"),
        (
            ["tune", "--layers", "64x30"],
            "tune: layer 64x30 is not OUTxIN with IN a multiple of m=8",
        ),
        (["tune", "--layers", "64x64", "--model", "resnet50"], "layers and model are both given"),
        (["tune", "--model", "resnet51"], "resnet51"),
        (["tune", "--rows", "2,-1"], "tune: rows=-1 is not 1 or more"),
    ],
)
def test_errors_are_one_line(tables, arguments, message):
    assert_refused(message, *arguments)
    assert list(tables.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("arguments", [["bench", "nm"], ["tune"]], ids=" ".join)
def test_no_gpu(arguments):
    assert_refused("torch sees no GPU here", *arguments, "--device", "cuda")


def test_make_gpu_measures_this_family(tmp_path):
    assert "nm" in gpu.BENCHES and "tests/test_nm_routes.py" in gpu.tests("full")
    command = gpu.bench_command("nm", "full", "cuda", tmp_path)
    options = dict(zip(command[5::2], command[6::2], strict=False))
    assert set(options["--cases"].split(",")) <= set(bench_nm.CASES)
    assert all(int(rows) in bench_nm.ROWS["cuda"] for rows in options["--rows"].split(","))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_tile_on_a_card(tmp_path):
    how = {"quick": True, "cases": ["small"], "rows": [16], "tiles": True, "tell": lambda _: None}
    result, _ = bench_nm.run(tmp_path, "cuda", **how)
    assert bench_nm.failures(result) == []
    assert any("tile 1" in row["impl"] for row in result["rows"])
