"""The command line as a user meets it, in a subprocess or through `main`."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import assert_refused, call
from safetensors.torch import load_file

from sparse_cocktail import data as data_sets
from sparse_cocktail import load_compressed, load_slim, models
from sparse_cocktail.cli.base import runs_shown
from sparse_cocktail.methods import METHODS
from sparse_cocktail.stopping import Interrupted

QUICK = ["--recipe", "digits", "--epochs", "1", "--stages", "2", "--search-samples", "0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run on digits, made by the command itself."""
    folder = tmp_path_factory.mktemp("run")
    whole = ["--interpolation", "true", "--consolidate", "1", "--out", str(folder)]
    command = [sys.executable, "-m", "sparse_cocktail.cli", "train", *QUICK, *whole]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_train_leaves_everything_in_one_folder(finished):
    folder, output = finished
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    plots = {"plots/accuracy.png", "plots/interpolation.png", "plots/training.png"}
    files = {"results.json", "cocktail.safetensors", "log.jsonl", "config.json"}
    assert plots | files <= names
    for name in plots:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert (folder / name).stat().st_size > 10_000
    for name in ("dense", "unstructured-0.3600", "channel-0.1900", "1:2", "mean of 2"):
        assert name in output


def test_eval_reproduces_the_results(finished):
    folder, _ = finished
    code, output, _ = call("eval", folder)
    assert code == 0
    for subnet in json.loads((folder / "results.json").read_text())["subnets"]:
        line = next(x for x in output.splitlines() if subnet["name"] in x)
        assert f"{subnet['accuracy']:.2f}" in line


def test_eval_of_one_subnet_on_the_holdout(finished):
    code, output, _ = call("eval", finished[0], "--subnet", "1:2", "--split", "holdout")
    assert code == 0 and "1:2" in output and "channel" not in output


@pytest.mark.parametrize("subnet", ["dense", "1:2", "channel-0.1900"])
def test_exports_run_without_the_library(finished, tmp_path, subnet):
    folder, _ = finished
    results = json.loads((folder / "results.json").read_text())
    wanted = next(s["accuracy"] for s in results["subnets"] if s["name"] == subnet)
    test = data_sets.load("digits").test

    plain = tmp_path / "net.safetensors"
    assert call("export", folder, subnet, "--out", plain)[0] == 0
    network = models.build("resnet8", {"width": 8, "inputs": 1, "classes": 10}).eval()
    network.load_state_dict(load_file(plain))
    assert accuracy(network, test) == pytest.approx(wanted, abs=1e-3)

    program = tmp_path / "net.pt2"
    assert call("export", folder, subnet, "--out", program)[0] == 0
    loaded = torch.export.load(str(program)).module()
    assert accuracy(loaded, test) == pytest.approx(wanted, abs=1e-3)


def test_slim_exports_are_smaller_and_score_the_same(finished, tmp_path):
    folder, _ = finished
    results = json.loads((folder / "results.json").read_text())
    channels = [s for s in results["subnets"] if s["pattern"] == "channel"]
    row = max(channels, key=lambda s: s["sparsity"])
    subnet, wanted = row["name"], row["accuracy"]
    test = data_sets.load("digits").test
    whole, plain, program = (
        tmp_path / name for name in ("whole.safetensors", "a.safetensors", "a.pt2")
    )
    assert call("export", folder, subnet, "--out", whole)[0] == 0
    for out in (plain, program):
        code, said, _ = call("export", folder, subnet, "--slim", "--out", out)
        assert code == 0 and "parameters in all" in said
    assert plain.stat().st_size < 0.9 * whole.stat().st_size
    network = models.build("resnet8", {"width": 8, "inputs": 1, "classes": 10}).eval()
    load_slim(network, load_file(plain))
    assert accuracy(network, test) == pytest.approx(wanted, abs=1e-3)
    loaded = torch.export.load(str(program)).module()
    assert accuracy(loaded, test) == pytest.approx(wanted, abs=1e-3)


def test_compressed_exports_hold_what_is_kept(finished, tmp_path):
    folder, out = finished[0], tmp_path / "a.safetensors"
    results = json.loads((folder / "results.json").read_text())
    wanted = {row["name"]: row["accuracy"] for row in results["subnets"]}
    code, said, _ = call("export", folder, "1:2", "--compressed", "--out", out)
    assert code == 0 and "in the masked layers, nothing else" in said
    network = models.build("resnet8", {"width": 8, "inputs": 1, "classes": 10})
    network = load_compressed(network, load_file(out))
    found = accuracy(network, data_sets.load("digits").test)
    assert found == pytest.approx(wanted["1:2"], abs=1e-3)
    assert_refused(
        "is of kind dense; leave", "export", folder, "dense", "--compressed", "--out", out
    )
    for options, message in (
        (("channel-0.1900", "--out", out), "is of kind channel; leave it out, or use --slim"),
        (("1:2", "--slim", "--out", out), "but --slim is given too"),
        (("1:2", "--out", tmp_path / "a.pt2"), "give FILE.safetensors alone"),
        (("unstructured-0.2", "--out", out), "keeps more than half of its weights"),
    ):
        assert_refused(message, "export", folder, "--compressed", *options)


def accuracy(network, split) -> float:
    with torch.no_grad():
        return 100 * (network(split.inputs).argmax(1) == split.targets).float().mean().item()


def test_info_of_the_machine_and_of_a_file(finished):
    code, output, _ = call("info")
    assert code == 0 and "topk_masks" in output and torch.__version__ in output
    code, output, _ = call("info", finished[0])
    assert code == 0 and "unstructured-0.3600" in output and "nnz" in output


def test_paper_mode_and_help(tmp_path):
    code, output, _ = call("train", *QUICK, "--stages", "1", "--paper", "--out", tmp_path)
    assert code == 0
    assert json.loads((tmp_path / "config.json").read_text())["consolidate"] == 0
    code, output, _ = call("train", "--help")
    assert code == 0 and "--weight-decay" in output and "--consolidate" in output
    words = " ".join(output.replace("│", " ").split())
    assert "(ast, set, rigl, granet, gmp; default 0.02; ast 0.016)" in words
    assert "(all methods but cocktail; default cosine; sup-tickets steps)" in words
    for method, kind in METHODS.items():
        for field in dataclasses.fields(kind.Options):
            assert words.count(f"--{field.name.replace('_', '-')} ") == 1, (method, field.name)


def test_names_need_no_four_decimals(finished):
    code, output, _ = call("eval", finished[0], "--subnet", "unstructured-0.2")
    assert code == 0 and "unstructured-0.2000" in output


@pytest.mark.parametrize(
    ("text", "message"), [('{"epochs":', "is no whole JSON"), ("[1, 2]", "holds a list")]
)
def test_a_damaged_config_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    for arguments in (["resume", tmp_path], ["train", "--resume", "--out", tmp_path]):
        code, _, error = call(*arguments)
        assert code == 2 and message in error and str(tmp_path / "config.json") in error


def test_resume_takes_the_fields_of_the_run(finished):
    folder, _ = finished
    before = json.loads((folder / "results.json").read_text())["subnets"]
    code, _, errors = call("train", "--resume", "--out", folder)
    assert code == 0, errors
    assert json.loads((folder / "results.json").read_text())["subnets"] == before


def test_resume_of_a_finished_run_shows_it(finished):
    folder, _ = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    code, output, errors = call("resume", folder)
    assert code == 0 and output.startswith(f"{folder} is finished already\n"), errors
    assert "unstructured-0.3600" in output and " networks in " in output
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)], ids=["int", "term"]
)
def test_many_runs_that_are_stopped_say_how_to_go_on(raised, code):
    message = "runs are kept; the same command goes on"
    with pytest.raises(Interrupted, match=message) as stop, runs_shown():
        raise raised
    assert 128 + stop.value.number == code


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--recipe", "nope", "--out", "{}"], "recipe 'nope' is neither"),
        (["train", "--epochs", "many", "--out", "{}"], "epochs='many' is a str"),
        (["train", "--data", "mnist", "--out", "{}"], "data: name='mnist' is unknown"),
        (["train", "--model", "vgg", "--out", "{}"], "models: name='vgg' is unknown"),
        (["train", "--nm", '{"4:2": 1}', "--out", "{}"], "n=4, m=2 breaks 1 <= n < m <= 32"),
        (["eval", "{}/none.safetensors"], "does not exist"),
        (["eval", "RUN", "--subnet", "3:4"], "subnet '3:4' is unknown"),
        (["eval", "RUN", "--split", "dev"], "split='dev' is not one of"),
        (["export", "RUN", "1:2", "--out", "{}/x.onnx"], "must end in .safetensors or .pt2"),
        (["export", "RUN", "1:2", "--out", "{}/x.pt2", "--sample", "big"], "'big' is no shape"),
        (
            ["train", "--paper", "--consolidate", "1", "--out", "{}"],
            "--paper means consolidate=0.0",
        ),
        (["train", "--paper", "--parity", "--out", "{}"], "two procedures; give one of them"),
        (
            ["train", "--method", "rigl", "--paper", "--out", "{}"],
            "preset 'paper' is one of method cocktail, not of rigl",
        ),
        (
            ["train", "--method", "spartan", "--patterns", "2:4", "--out", "{}"],
            "takes unstructured, channel and block patterns, such as unstructured-0.9. Methods for "
            "N:M: ast, acdc, gmp",
        ),
        (["resume", "{}"], "holds no run; give the folder that train was writing to"),
        (["train", "--recipe", "[log]x", "--out", "{}"], "recipe '[log]x' is neither"),
        (["train", "--nm", "{bad", "--out", "{}/x"], "nm='{bad' is no valid value"),
        (["train", "--recipe", "digits", "--out", "RUN"], "holds a run already"),
    ],
    ids=lambda v: v if isinstance(v, str) else v[0],
)
def test_errors_are_one_line(finished, tmp_path, arguments, message):
    filled = [
        str(finished[0]) if a == "RUN" else a.replace("{}", str(tmp_path)) if "{}" in a else a
        for a in arguments
    ]
    code, _, errors = call(*filled)
    assert code == 2
    assert message in " ".join(errors.split()) and "Traceback" not in errors


def test_runs_that_are_not_finished_and_folds(tmp_path):
    code, _, errors = call("eval", tmp_path)
    assert code == 2 and "holds no finished run" in " ".join(errors.split())
    arguments = ["train", *QUICK, "--stages", "1", "--data", "digits@0/5", "--out", tmp_path]
    assert call(*arguments)[0] == 0
    code, output, _ = call("eval", tmp_path)
    wanted = json.loads((tmp_path / "results.json").read_text())["subnets"][0]["accuracy"]
    assert code == 0 and f"{wanted:.2f}" in output


def test_networks_of_separate_weights(tmp_path):
    """A method that trains one network per pattern: each has a file, which commands find."""
    menu = ["--method", "acdc", "--patterns", "unstructured-0.5,2:4", "--epochs", "2"]
    run = tmp_path / "run"
    code, output, error = call("train", *menu, "--out", run)
    assert code == 0, error
    assert "4 networks" in output and str(run / "networks") in output
    rows = json.loads((run / "results.json").read_text())["subnets"]
    assert [row["name"] for row in rows] == ["dense", "dense", "unstructured-0.5000", "2:4"]
    assert len({row["weights"] for row in rows}) == 4
    code, output, _ = call("eval", run)
    assert code == 0
    for row in rows:
        assert f"{row['accuracy']:.2f}" in output and row["name"] in output
    code, output, _ = call("info", run)
    assert output.count("dense") == 2 and "2:4" in output
    out = tmp_path / "net.safetensors"
    code, output, _ = call("export", run, "2:4", "--out", out)
    assert code == 0 and load_file(out)
    dense = [Path(row["weights"]).stem for row in rows[:2]]
    assert dense == ["dense-unstructured-0.5000", "dense-2:4"]
    network = models.build("resnet8", {"width": 8, "inputs": 1, "classes": 10}).eval()
    test = data_sets.load("digits").test
    for stem, row in zip(dense, rows[:2], strict=True):
        code, output, error = call("eval", run, "--subnet", stem)
        assert code == 0 and f"{row['accuracy']:.2f}" in output, error
        assert call("export", run, stem, "--out", out)[0] == 0
        network.load_state_dict(load_file(out))
        assert accuracy(network, test) == pytest.approx(row["accuracy"], abs=1e-3)
    limit = max(row["bytes"] for row in rows[2:])
    code, output, _ = call("export", run, "--max-bytes", limit, "--out", out)
    fitting = [row for row in rows if row["bytes"] <= limit]
    picked = next(row for row in fitting if f"{row['name']} of {run / row['weights']} ->" in output)
    assert code == 0 and picked["accuracy"] == max(row["accuracy"] for row in fitting)
    sparse = run / rows[3]["weights"]
    for arguments, message in (
        (("export", run, "dense", "--out", out), "has 2 networks dense; name the file of one: "),
        (("export", sparse, "dense", "--out", out), "holds no dense network of its own"),
        (("eval", sparse, "--subnet", "dense"), "weights serve 2:4 alone; name one of these"),
        (("eval", run, "--subnet", "dense"), ", ".join(dense)),
        (
            ("export", run, "1:4", "--out", out),
            "has no network 1:4; name one of dense, dense-unstr",
        ),
        (("eval", run, "--subnet", "best"), "has no network best; name one of dense, dense-uns"),
        (("export", run, "--max-bytes", "9", "--out", out), "the smallest there are: bytes"),
    ):
        code, _, error = call(*arguments)
        assert code == 2 and message in " ".join(error.split())


def test_averages_are_found_by_the_names_of_their_tickets(tmp_path):
    """Files of a run's networks may have other names than the networks."""
    fields = ["--method", "lottery-pools", "--epochs", "1", "--stages", "1", "--batch-size", "512"]
    arguments = [*fields, "--search-samples", "0", "--neighbours", "1", "--no-plots"]
    run, out = tmp_path / "run", tmp_path / "net.safetensors"
    assert call("train", *arguments, "--out", run)[0] == 0
    for row in json.loads((run / "results.json").read_text())["subnets"]:
        assert row["weights"] == f"networks/average-{row['name']}.safetensors"
        for name in (row["name"], f"average-{row['name']}"):
            code, output, error = call("eval", run, "--subnet", name)
            assert code == 0, error
            (line,) = [line for line in output.splitlines() if row["name"] in line]
            assert f"{row['accuracy']:.2f}" in line
            code, _, error = call("export", run, name, "--out", out)
            assert code == 0 and load_file(out), error
