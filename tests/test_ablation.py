"""`ablate`: variants over seeds, what is skipped, what is resumed, the table and its pictures."""

import json
import signal
import subprocess
import sys
import time
from statistics import mean, stdev

import pytest
import yaml
from commands import call

from sparse_cocktail import runs
from sparse_cocktail.ablation import VARIANTS, ablate, markdown, variant_fields
from sparse_cocktail.ablation_plots import plot_ablation
from sparse_cocktail.checkpoint import load_checkpoint
from sparse_cocktail.config import split_fields
from sparse_cocktail.methods.cocktail_options import PAPER

RECIPE = {
    "data": "digits",
    "model": "resnet8",
    "model_args": {"width": 4, "inputs": 1, "classes": 10},
    "epochs": 1,
    "stages": 2,
    "batch_size": 256,
    "threads": 1,
    "search_samples": 0,
    "recalibrate_samples": 256,
    "consolidate": 1.0,
    "paper": {"epochs": 2},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return str(path)


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    """Folder and summary of two variants with two seeds, all at a time."""
    out, told = tmp_path_factory.mktemp("ablation"), []
    names = ["default", "paper"]
    summary = ablate(recipe, out, (1, 2), names, {"lr": 0.05}, 4, lambda *what: told.append(what))
    assert [(d, total) for d, total, _ in told] == [(i, 4) for i in range(1, 5)]
    return out, summary


def test_every_variant_is_a_valid_run_of_its_own():
    fields = {v.name: variant_fields("digits", v, {}) for v in VARIANTS}
    assert len(fields) == len(VARIANTS)
    for name, values in fields.items():
        config, options = split_fields(values)
        options.check(config.epochs)
        paper = {k: values.get(k) for k in PAPER} == PAPER
        assert paper == (name not in ("default", "no-interpolation")), name
    different = {json.dumps(values, sort_keys=True) for values in fields.values()}
    assert len(different) == len(VARIANTS)


def test_the_summary_is_the_mean_over_subnets_and_seeds(done):
    out, summary = done
    assert [row["name"] for row in summary["rows"]] == ["paper", "default"]
    for row in summary["rows"]:
        runs = [
            json.loads((out / row["name"] / f"seed-{seed}" / "results.json").read_text())
            for seed in (1, 2)
        ]
        of_seed = [
            mean(s["accuracy"] for s in run["subnets"] if s["pattern"] == "channel") for run in runs
        ]
        channel = row["accuracy"]["channel"]
        assert channel == {"mean": mean(of_seed), "std": stdev(of_seed), "by_seed": of_seed}
        passes = [sum(v for k, v in run["passes"].items() if k != "evaluate") for run in runs]
        assert row["passes"] == pytest.approx(mean(passes))
        assert {run["config"]["lr"] for run in runs} == {0.05}
        assert {run["config"]["epochs"] for run in runs} == {1 if row["name"] == "default" else 2}
    assert json.loads((out / "ablation.json").read_text()) == json.loads(json.dumps(summary))


def test_the_table_has_a_row_per_variant(done):
    out, summary = done
    text = (out / "ablation.md").read_text()
    assert text == markdown(summary)
    for row in summary["rows"]:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {row['name']} |")]
        dense = row["accuracy"]["dense"]
        assert f"{dense['mean']:.2f} ± {dense['std']:.2f}" in line


def test_pictures(done):
    out, _ = done
    pictures = plot_ablation(out)
    assert [p.name for p in pictures] == ["curves.png", "differences.png", "search.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)


def test_a_second_call_trains_nothing_again(done, recipe, monkeypatch):
    out, summary = done
    monkeypatch.setattr(runs.subprocess, "Popen", lambda *a, **k: pytest.fail("trained again"))
    again = ablate(recipe, out, (1,), ["paper"], {"lr": 0.05})
    assert again["rows"][0]["accuracy"]["all"]["std"] is None
    assert (
        again["rows"][0]["accuracy"]["all"]["mean"]
        == summary["rows"][0]["accuracy"]["all"]["by_seed"][0]
    )
    with pytest.raises(ValueError, match="with other fields .*lr.*; choose another --out"):
        ablate(recipe, out, (1,), ["paper"], {"lr": 0.1})


def test_a_failing_run_says_why(recipe, tmp_path):
    with pytest.raises(RuntimeError, match="seed-1 failed: .*not finite|seed-1 failed: .*the loss"):
        ablate(recipe, tmp_path, (1,), ["paper"], {"lr": 1e30})


def test_a_run_that_starts_while_another_fails_is_ended(recipe, tmp_path, monkeypatch):
    started, start = [], subprocess.Popen

    def failing_then_slow(_, **how):
        code = "import sys, time; " + ("time.sleep(30)" if started else "sys.exit(3)")
        if started:
            started[0].wait()
            time.sleep(0.5)  # the failure is being dealt with
        started.append(start([sys.executable, "-c", code], **how))
        return started[-1]

    monkeypatch.setattr(runs.subprocess, "Popen", failing_then_slow)
    fields = variant_fields(recipe, VARIANTS[0], {})
    both = {name: (fields, tmp_path / name, 1) for name in ("a", "b")}
    with pytest.raises(runs.RunFailed, match="seed-1 failed"):
        runs.train_all(both, jobs=2)
    assert [process.returncode for process in started] == [3, -signal.SIGTERM]


def test_no_run_starts_when_the_others_have_been_ended():
    processes = runs._Processes()
    processes.stop()
    assert processes.run([sys.executable, "-c", "raise SystemExit(3)"]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "no-such"], "variant 'no-such' is unknown; use some of paper, no-umg"),
        (["--set", "epochs"], "--set 'epochs' is not FIELD=VALUE"),
        (["--set", "epoch=3"], "field 'epoch' is unknown; did you mean epochs?"),
        (["--recipe", "none"], "recipe 'none' is neither one of"),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, message):
    code, _, error = call("ablate", "--out", tmp_path, *arguments)
    assert code == 2 and message in error and "Traceback" not in error


def test_the_command(recipe, done):
    out, summary = done
    arguments = ["--recipe", recipe, "--out", out, "--seeds", 2, "--set", "lr=0.05"]
    names = ["--variant", "paper", "--variant", "default"]
    code, text, error = call("ablate", *arguments, *names)
    assert code == 0, error
    for name in ("paper", "default", "curves.png", "ablation.md"):
        assert name in text


def test_sigterm_ends_the_runs_in_order(recipe, tmp_path):
    """What is under way writes a checkpoint and ends; no process is left behind."""
    command = [sys.executable, "-m", "sparse_cocktail.cli", "ablate", "--recipe", recipe]
    command += ["--variant", "paper", "--seeds", "1", "--out", str(tmp_path)]
    command += ["--set", "epochs=500", "--set", "checkpoint_every=5"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    checkpoint = tmp_path / "paper/seed-1/checkpoint.safetensors"
    end = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < end:
        time.sleep(0.2)
    process.terminate()
    _, words = process.communicate(timeout=60)
    assert process.returncode == 143, words
    assert load_checkpoint(checkpoint)["step"] > 0
    log = [json.loads(x) for x in (tmp_path / "paper/seed-1/log.jsonl").read_text().splitlines()]
    time.sleep(1.0)
    again = (tmp_path / "paper/seed-1/log.jsonl").read_text().splitlines()
    assert len(again) == len(log), "the run goes on without its parent"
