"""The benchmark of exported subnets: its gate, its files, its table."""

import bench_serve
import pytest
import timing
import torch
from commands import assert_refused, short_bench

from sparse_cocktail.patterns import family, parse

CPU = torch.device("cpu")
SHORT = timing.Plan(seconds=0.0, few=2, many=2, most=2, rounds=2, fast=10.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run of the command, and everything it wrote."""
    return short_bench(tmp_path_factory, "serve", "--batch", "1,3")


def test_every_network_is_timed_at_every_batch(finished):
    _, result, said = finished
    assert result["bench"] == "serve" and result["network"] == "resnet8"
    impls = ["unstructured-0.9000", "unstructured-0.9000, zeros", "channel-0.5000", "2:4"]
    wanted = ["torch/dense", "torch/dense, contiguous", *(f"ours/{name}" for name in impls)]
    for batch in (1, 3):
        rows = [row for row in result["rows"] if row["batch"] == batch]
        assert [row["impl"] for row in rows] == wanted
        assert all(row["ok"] and row["median_us"] > 0 for row in rows), rows
        assert all(row["error"] <= row["error_bound"] for row in rows)
    for name in impls:
        assert name in said


def test_rows_say_what_a_subnet_weighs(finished):
    sizes = {row["impl"]: row["weight_bytes"] for row in finished[1]["rows"]}
    dense = sizes["torch/dense"]
    assert sizes["ours/unstructured-0.9000, zeros"] == dense
    assert sizes["ours/unstructured-0.9000"] < 0.25 * dense
    assert sizes["ours/channel-0.5000"] < 0.5 * dense and sizes["ours/2:4"] < 0.7 * dense
    kept = {row["subnet"]: row["sparsity"] for row in finished[1]["rows"]}
    assert kept["dense"] == 0.0 and kept["2:4"] == 0.5


def test_ratios_are_to_the_faster_dense_network_of_the_batch():
    def row(impl, subnet, batch, us, ok=True):
        facts = {"impl": impl, "subnet": subnet, "batch": batch, "mode": "eager", "ok": ok}
        return {**facts, "median_us": us, "sparsity": 0.5, "weight_bytes": 1, "peak_bytes": None}

    rows = [
        row("torch/dense", "dense", 1, 100.0),
        row("torch/dense, contiguous", "dense", 1, 80.0),
        row("ours/2:4", "2:4", 1, 40.0),
        row("torch/dense", "dense", 8, 500.0),
        row("ours/2:4", "2:4", 8, 250.0),
        row("ours/1:2", "1:2", 8, None, ok=False),
    ]
    gains = {(e["impl"], e["batch"]): e["gain"] for e in bench_serve.ratios(rows)}
    assert gains["ours/2:4", 1] == 2.0 and gains["ours/2:4", 8] == 2.0
    assert gains["torch/dense", 1] == 0.8 and ("ours/1:2", 8) not in gains
    cells = bench_serve.table_of_ratios(bench_serve.ratios(rows))
    assert ["2:4", "50 %", "1e-06 MB", "0.04 ms", "2.00x", "0.25 ms", "2.00x"] in cells


def test_files_are_drawn_again_from_the_json(finished, tmp_path):
    folder, result, _ = finished
    copy = tmp_path / "cpu.json"
    copy.write_bytes((folder / "cpu.json").read_bytes())
    made = bench_serve.redraw(copy)
    assert [path.name for path in made] == ["cpu.json", "cpu.md", "cpu.png"]
    assert (tmp_path / "cpu.md").read_text() == (folder / "cpu.md").read_text()
    assert "| channel-0.5000 |" in (tmp_path / "cpu.md").read_text()
    assert (tmp_path / "cpu.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["ours/channel-0.5000", "ours/2:4", "ours/unstructured-0.5000"])
def test_wrong_networks_are_not_timed(name):
    menu = bench_serve.Menu("resnet8", ["unstructured-0.5", "channel-0.5", "2:4"], CPU)
    with torch.no_grad():
        network = menu.networks[name][1]
        next(network.parameters()).mul_(1.01)  # the first convolution, that no subnet prunes
    group, _ = bench_serve.serve_group(menu, 2)
    served = bench_serve.Served("resnet8", menu.images(2))
    rows = {row["impl"]: row for row in timing.measure(group, served, SHORT)}
    assert not rows[name]["ok"] and "times that of plain torch" in rows[name]["note"]
    assert bench_serve.failures({"rows": list(rows.values())}) == [rows[name]]


def test_the_menu_is_the_one_of_the_method():
    kinds = [family(parse(name).kind) for name in bench_serve.MENU]
    assert [kinds.count(k) for k in ("unstructured", "channel", "n:m")] == [10, 10, 3]
    assert bench_serve.MENU[9] == "unstructured-0.8926"


@pytest.mark.parametrize(
    "options, says",
    [
        (["--network", "vgg"], "network='vgg' is unknown; use resnet50"),
        (["--batch", "0"], "batch=0 is not 1 or more"),
        (["--batch", "many"], "batch='many' is not a list of whole numbers"),
        (["--device", "tpu"], "device='tpu' is not one of cpu, cuda"),
    ],
)
def test_bad_arguments(options, says, tmp_path):
    assert_refused(says, "bench", "serve", "--quick", "--out", tmp_path, *options)
    assert not list(tmp_path.iterdir())
