"""Linear mode connectivity: barriers, baked masks, ends that are the networks, 15 stages."""

import json
import shutil
from itertools import combinations

import pytest
import torch
from commands import call
from test_engine import MODEL, SHORT, toy

from sparse_cocktail import Cocktail
from sparse_cocktail.averaging import interpolate
from sparse_cocktail.cocktail_file import read_cocktail
from sparse_cocktail.connectivity import baked, barrier, lines_of, measure_connectivity
from sparse_cocktail.connectivity_plots import plot_connectivity
from sparse_cocktail.engine import train
from sparse_cocktail.files import read_tensors, write_tensors
from sparse_cocktail.methods.cocktail import pool_file
from sparse_cocktail.ops import unpack_mask
from sparse_cocktail.plots import plot_run
from sparse_cocktail.recalibrate import recalibrate

FIELDS = {**SHORT, **MODEL, "stages": 3, "nm": {"2:4": 2}, "prune_channel": 0.4}
FIELDS |= {"interpolation": False, "consolidate": 0.0, "rewind": 0, "epochs": 2}
U, C = ("unstructured-0.2000", "unstructured-0.3600"), ("channel-0.4000", "channel-0.6400")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three stages; the channel subnets of stages 2 and 3 have silent channels."""
    folder = tmp_path_factory.mktemp("run")
    train("resnet8", toy(), folder, **FIELDS)
    return folder


@pytest.fixture(scope="module")
def measured(run):
    told = []
    tell = lambda done, total, what: told.append((done, total))  # noqa: E731
    result = measure_connectivity(run, loaded(run), toy(), points=5, matrix_points=3, tell=tell)
    assert json.loads(json.dumps(result)) == json.loads((run / "connectivity.json").read_text())
    lines = [*result["stages"], *result["patterns"]]
    total = len(result["networks"]) + sum(len(line["alphas"]) - 2 for line in lines)
    assert told == [(i, total) for i in range(total + 1)]  # no network is measured twice
    return result


def loaded(folder) -> Cocktail:
    return Cocktail.load(folder / "cocktail.safetensors")


def pool(folder, stage: int) -> dict[str, torch.Tensor]:
    return read_tensors(folder / pool_file(stage))[0]


def error_of(model: torch.nn.Module) -> float:
    """Hold-out error with the statistics that the run takes."""
    data = toy()
    recalibrate(model, data.calibration(SHORT["recalibrate_samples"], 256))
    right = model(data.holdout.inputs).argmax(1) == data.holdout.targets
    return 100.0 - 100.0 * int(right.sum()) / len(right)


# ---- the formula ---------------------------------------------------------------------------------


def test_barrier_of_a_hand_made_function():
    alphas = [1.0, 0.75, 0.5, 0.25, 0.0]
    assert barrier(alphas, [4.0, 6.0, 9.0, 7.0, 2.0]) == 6.0  # at the middle: 9 - 3
    assert barrier(alphas, [0.0, 0.0, 3.0, 9.5, 8.0]) == 3.5  # 9.5 - 0.75 * 8, no other
    assert barrier(alphas, [1.0, 2.0, 3.0, 4.0, 5.0]) == 0.0  # a slope is no barrier
    assert barrier(alphas, [5.3, 0.1, 0.1, 0.1, 0.7]) == 0.0  # nor is a valley
    assert barrier([1.0, 0.9, 0.0], [0.1, 0.1, 0.1]) == 0.0


def test_identical_weights_have_no_barrier(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    shutil.copy(folder / pool_file(2), folder / pool_file(3))
    result = measure_connectivity(folder, loaded(folder), toy(), points=7, matrix_points=3)
    rows = {(*r["patterns"], r["a"].stage, r["b"].stage): r for r in result["stages"]}
    for pattern in ("dense", "n:m"):  # the same mask besides
        row = rows[pattern, 2, 3]
        assert row["barrier"] == 0.0 and len(set(row["errors"])) == 1 and len(row["errors"]) == 7


# ---- lines and their ends ------------------------------------------------------------------------


def test_lines_join_every_pair_of_stages_and_of_patterns(run):
    lines = lines_of(loaded(run), 9, 4)
    ends = {(line.patterns, tuple(line.a), tuple(line.b)): line.points for line in lines}
    assert len(ends) == len(lines) == 6 + 3 + 3 + 1 + 3 + 2 + 2
    assert ends[("dense",), (0, "dense"), (3, "dense")] == 4
    assert ends[("dense",), (2, "dense"), (3, "dense")] == 9
    assert ends[("channel",), (1, C[0]), (2, C[1])] == 9
    assert ends[("n:m",), (2, "2:4"), (3, "2:4")] == 9  # the mask stays in force
    assert ends[("unstructured", "channel"), (1, U[0]), (1, C[0])] == 9
    assert ends[("channel", "n:m"), (2, C[1]), (2, "2:4")] == 9


def test_ends_are_the_networks_as_the_run_measured_them(run, measured):
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    own = {
        (entry["stage"], name): 100.0 - accuracy
        for entry in log
        if entry["event"] == "stage"
        for name, accuracy in entry["holdout"].items()
    }
    errors = {(n["stage"], n["subnet"]): n["error"] for n in measured["networks"]}
    assert errors == {**own, (3, "2:4"): errors[3, "2:4"]}  # the log has a mask's first stage
    for row in (*measured["stages"], *measured["patterns"]):
        a, b = tuple(row["a"]), tuple(row["b"])
        assert (row["errors"][0], row["errors"][-1]) == (errors[a], errors[b])
        assert (row["alphas"][0], row["alphas"][-1]) == (1.0, 0.0)
        assert row["barrier"] == barrier(row["alphas"], row["errors"]) >= 0.0
    assert len({e for row in measured["stages"] for e in row["errors"]}) > 3  # there is something


@pytest.mark.parametrize("name", [U[1], C[1], "2:4"])
def test_baked_weights_compute_as_the_exported_subnet(run, name):
    cocktail, batches = loaded(run), toy().calibration(64, 64)
    ours = cocktail.export("dense", plain=True)
    ours.load_state_dict(baked(cocktail, cocktail.model.state_dict(), name))
    theirs = cocktail.export(name, plain=True)
    for model in (ours, theirs):
        recalibrate(model, batches)
    assert torch.equal(ours(batches[0]), theirs(batches[0]))


def test_points_have_weights_where_either_end_has(run, measured):
    cocktail = loaded(run)
    a = baked(cocktail, pool(run, 1), C[0])
    b = baked(cocktail, pool(run, 2), C[1])
    mixed, silent = interpolate(a, b, 0.25), 0
    behind = {m.source: n for n, m in cocktail.model.named_modules() if hasattr(m, "source")}
    masks = zip(cocktail.layers.items(), cocktail.masks(C[0]), cocktail.masks(C[1]), strict=True)
    for (name, layer), *bits in masks:
        first, second = (unpack_mask(x, layer.weight.shape) for x in bits)
        assert torch.equal(mixed[f"{name}.weight"] != 0, first | second)
        norm = behind[name]
        alive = [mask.flatten(1).any(1) for mask in (first, second)]
        for end, own in zip((a, b), alive, strict=True):
            assert torch.equal(end[f"{norm}.weight"] != 0, own)
            assert not end[f"{norm}.bias"][~own].any()
        assert torch.equal(mixed[f"{norm}.weight"] != 0, alive[0] | alive[1])
        silent += int((~alive[1]).sum())
    assert silent > 10
    model = cocktail.export("dense", plain=True)
    model.load_state_dict({k: 0.5 * a[k] + 0.5 * b[k] for k in a})
    (row,) = [
        r for r in measured["stages"] if (tuple(r["a"]), tuple(r["b"])) == ((1, C[0]), (2, C[1]))
    ]
    assert row["alphas"][2] == 0.5 and row["errors"][2] == error_of(model)


def test_without_samples_the_statistics_are_mixed_too(run):
    cocktail, data = loaded(run), toy()
    result = measure_connectivity(run, cocktail, data, points=3, matrix_points=3, samples=0)
    (row,) = [r for r in result["stages"] if (r["a"], r["b"]) == ((0, "dense"), (3, "dense"))]
    first, last = pool(run, 0), pool(run, 3)
    model = cocktail.export("dense", plain=True)
    for weights, error in zip(
        (first, interpolate(first, last, 0.5), last), row["errors"], strict=True
    ):
        model.load_state_dict(weights)
        right = model(data.holdout.inputs).argmax(1) == data.holdout.targets
        assert error == 100.0 - 100.0 * int(right.sum()) / len(right)


def test_the_training_part_can_be_measured(run):
    result = measure_connectivity(run, loaded(run), toy(), points=3, matrix_points=3, split="train")
    assert (result["split"], result["measured_on"]) == ("train", len(toy().train))


# ---- pictures, the command, many stages ----------------------------------------------------------


def pictures(folder) -> list[str]:
    files = plot_connectivity(folder)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert all(file.stat().st_size > 20_000 for file in files)
    return [str(file.relative_to(folder)) for file in files]


BOTH = ["plots/connectivity-stages.png", "plots/connectivity-patterns.png"]


def test_the_command_measures_and_draws(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    few = ("--points", 3, "--matrix-points", 3)
    code, output, errors = call("connect", folder, "--data", "test_engine:toy", *few)
    assert code == 0, errors
    assert "20 lines, 32 networks to evaluate" in output
    for words in ("dense, all stages", "n:m, adjacent stages", "unstructured to channel", *BOTH):
        assert words in output
    assert all((folder / name).is_file() for name in BOTH)


def test_data_given_in_python_is_a_clear_error(run):
    code, _, errors = call("connect", run)
    assert code == 2 and "names no data set that can be loaded; give --data" in errors


def small() -> torch.nn.Module:
    """Many of these are evaluated in a second."""
    layers = [torch.nn.Conv2d(1, 8, 3, 2), torch.nn.Conv2d(8, 16, 2), torch.nn.BatchNorm2d(16)]
    return torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3))


def test_fifteen_stages(tmp_path):
    """As many nested masks as four bits of a level hold."""
    fields = {**FIELDS, "stages": 15, "epochs": 1, "prune_channel": 0.1, "batch_size": 224}
    results = train(small(), toy(), tmp_path, **{**fields, "nm": {"1:2": 3, "2:4": 9}})
    cocktail = Cocktail.load(tmp_path / "cocktail.safetensors", small())
    header, tensors = read_cocktail(tmp_path / "cocktail.safetensors")
    assert len(header["nested"]) == 15 and "levels" in tensors
    assert len(results["subnets"]) == 1 + 15 + 15 + 2
    kept = [s["sparsity"] for s in results["subnets"] if s["pattern"] == "unstructured"]
    assert len(kept) == 15 and kept == sorted(kept) and kept[-1] > 0.96
    assert len(plot_run(tmp_path)) >= 2
    found = measure_connectivity(tmp_path, cocktail, toy(), points=3, matrix_points=3)
    pairs = [len(list(combinations(range(n), 2))) for n in (16, 15, 15, 13)]
    assert len(found["stages"]) == sum(pairs)
    assert len(found["patterns"]) == 15 + 2 * 13
    assert pictures(tmp_path) == BOTH


# ---- errors --------------------------------------------------------------------------------------


def another_network(folder) -> None:
    weights = pool(folder, 2)
    write_tensors(folder / pool_file(2), {**weights, "fc.weight": torch.zeros(3, 5)}, {})


def another_method(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "method": "imp"}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no run"),
        (another_method, "method='imp', which keeps no weights of stages"),
        (lambda f: (f / "cocktail.safetensors").unlink(), "not finished.*sparse-cocktail resume"),
        (lambda f: shutil.rmtree(f / "pool"), r"lacks pool/stage-00.*pool/stage-03\.safetensors"),
        (lambda f: (f / pool_file(1)).unlink(), r"lacks pool/stage-01\.safetensors, the weights"),
        (another_network, r"stage-02\.safetensors holds the weights of another network"),
    ],
    ids=["no run", "method", "unfinished", "no pool", "one stage missing", "other weights"],
)
def test_runs_that_cannot_be_connected(run, tmp_path, spoil, words):
    folder = shutil.copytree(run, tmp_path / "run")
    cocktail = loaded(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=rf"connect: .*{words}"):
        measure_connectivity(folder, cocktail, toy(), points=3, matrix_points=3)
    with pytest.raises(ValueError, match="connect: run=.*holds no run"):
        measure_connectivity(tmp_path / "nowhere", cocktail, toy())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"points": 2}, "points=2 is below 3"),
        ({"matrix_points": 1}, "matrix_points=1 is below 3"),
        ({"samples": -1}, "samples=-1 is below 0"),
        ({"split": "test"}, "split='test' is neither holdout nor train"),
    ],
    ids=["points", "matrix points", "samples", "split"],
)
def test_options_that_make_no_sense(run, options, words):
    with pytest.raises(ValueError, match=f"connect: {words}"):
        measure_connectivity(run, loaded(run), toy(), **options)
