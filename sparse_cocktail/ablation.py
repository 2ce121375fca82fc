"""Ablations: one recipe trained with single decisions changed, over several seeds, in one table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from .config import read_recipe, split_fields
from .files import read_json, write_atomic, write_json
from .methods.cocktail_options import PAPER, PARITY
from .patterns import family, parse
from .run_folder import changed_fields

__all__ = [
    "VARIANTS",
    "RunFailed",
    "Variant",
    "ablate",
    "collect",
    "markdown",
    "spread",
    "train_all",
]

FORMAT = 1


@dataclass(frozen=True)
class Variant:
    """A recipe with some fields changed.

    Attributes:
        name: of its folder and row.
        says: what it changes, in words.
        fields: recipe fields.
        paper: start from the published procedure; else from the recipe's defaults.
    """

    name: str
    says: str
    fields: dict[str, Any] = field(default_factory=dict)
    paper: bool = True


# The published procedure comes first: every other row but the last two changes one thing in it.
VARIANTS = (
    Variant("paper", "the published procedure, with the decisions of this library"),
    # the paper's own ablation (Figure 3)
    Variant("no-umg", "channels by the L1 norm of their weights (w/o UMG)", {"umg": False}),
    Variant(
        "ast-order", "subnets take turns, no dense pivot (AST's order)", {"dense_pivot": False}
    ),
    Variant("no-interpolation", "the last stage's weights for all", {"interpolation": False}),
    Variant("no-rewind", "stages train on without rewinding", {"rewind": 0}),
    Variant("no-distill", "no distillation from the dense network", {"distill": False}),
    # where paper, code and common practice differ
    Variant("nested-channels", "channels nested, too", {"nested_channels": True}),
    Variant("pair-batches", "the dense step's batch and output reused", {"pair_batches": True}),
    Variant("shared-update", "pruned weights decay and drift", {"mask_update": "shared"}),
    Variant("loud-channels", "BatchNorm of pruned channels not silenced", {"silence": False}),
    Variant("teacher-updates", "the teacher updates statistics", {"teacher_statistics": "update"}),
    Variant("measured-counts", "counts from measured sparsity", {"counts": "measured"}),
    Variant("mixed-statistics", "no recalibration in the search", {"search_samples": 0}),
    Variant(
        "no-recalibration",
        "no recalibration at all",
        {"search_samples": 0, "recalibrate_samples": 0},
    ),
    Variant("never-abandon", "the search keeps some of every stage", {"abandon": False}),
    Variant("stage-objective", "the search's score per stage", {"objective": "stages"}),
    Variant(
        "code-schedule",
        "learning rate of the public code",
        {name: PARITY[name] for name in ("first_cycle", "cycle")},
    ),
    Variant("parity", "all of the public code's ways", {k: v for k, v in PARITY.items()}),
    Variant("default", "the recipe as it is, with consolidation", paper=False),
)


class RunFailed(RuntimeError):
    """A run of an ablation ended with an error."""


def ablate(
    recipe: str,
    out: str | os.PathLike,
    seeds: Iterable[int] = range(1, 6),
    names: Iterable[str] = (),
    changes: dict[str, Any] | None = None,
    jobs: int = 1,
    tell: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, Any]:
    """Train every variant with every seed, and write OUT/ablation.json and OUT/ablation.md.

    Runs lie in OUT/VARIANT/seed-S; finished ones are kept and unfinished ones resumed, so the same
    call goes on after a stop.

    Args:
        recipe: name or YAML file.
        out: folder.
        seeds: one run each.
        names: of variants (all by default).
        changes: recipe fields for all variants, such as a smaller number of epochs.
        jobs: runs at a time, each in a process of its own.
        tell: called as tell(runs done, runs in all, what was done) after every run.

    Raises:
        ValueError: for an unknown variant, bad fields, or a folder with runs of other fields.
        RunFailed: when a run fails; its last words are in the message.
    """
    seeds, out = list(seeds), Path(out)
    chosen = _chosen(list(names))
    if not seeds or jobs < 1:
        raise ValueError(f"ablate: seeds={seeds}, jobs={jobs}; give at least one of each")
    recipes = {v.name: variant_fields(recipe, v, changes or {}) for v in chosen}
    for fields in recipes.values():
        split_fields(fields)  # bad fields fail before the first run
    order = [(v.name, seed) for seed in seeds for v in chosen]  # all rows of a seed come together
    runs = {f"{name}, seed {s}": (recipes[name], out / name, s) for name, s in order}
    train_all(runs, jobs, tell)
    summary = collect(out, recipe, chosen, seeds, changes or {})
    write_json(out / "ablation.json", summary, indent=None)  # thousands of numbers
    text = markdown(summary)
    write_atomic(out / "ablation.md", lambda stream: stream.write(text.encode()))
    return summary


def _chosen(names: list[str]) -> list[Variant]:
    known = {variant.name: variant for variant in VARIANTS}
    for name in names:
        if name not in known:
            raise ValueError(f"ablate: variant {name!r} is unknown; use some of {', '.join(known)}")
    return [v for v in VARIANTS if v.name in names or not names]


def variant_fields(recipe: str, variant: Variant, changes: dict[str, Any]) -> dict[str, Any]:
    """The complete fields of a variant: recipe, published procedure, changes, its own."""
    fields = read_recipe(recipe)
    paper = fields.pop("paper", {})
    if fields.get("method", "cocktail") != "cocktail":
        raise ValueError(
            f"ablate: recipe {recipe} trains {fields['method']}, but the ablations are of cocktail"
        )
    if variant.paper:
        fields.update({**paper, **PAPER})
    return {**fields, **changes, **variant.fields}


def train_all(
    runs: dict[str, tuple[dict[str, Any], Path, int]],
    jobs: int = 1,
    tell: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> None:
    """Train many runs, `jobs` at a time, each in a process of its own.

    On an error, Ctrl-C or SIGTERM the runs that are under way write a checkpoint and end.

    Args:
        runs: by name: (recipe fields, folder, seed); the run lies in FOLDER/seed-SEED. Finished
            ones are kept, unfinished ones resumed.
        jobs, tell: as in `ablate`.
    """
    for fields, folder, seed in runs.values():
        _check_folder(fields, folder, seed)
    for folder, fields in {folder: fields for fields, folder, _ in runs.values()}.items():
        text = yaml.safe_dump(fields, sort_keys=False).encode()
        write_atomic(folder / "recipe.yaml", lambda stream, text=text: stream.write(text))
    finished: list[str] = []
    active: set[subprocess.Popen] = set()

    def one(name: str) -> None:
        _, folder, seed = runs[name]
        _train(folder, seed, active)
        finished.append(name)
        tell(len(finished), len(runs), name)

    with _sigterm_raises(), ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(one, name) for name in runs]
        try:
            for each in as_completed(waiting):
                each.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(active):
                process.terminate()
            raise


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit, so that what is under way can be ended in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_folder(fields: dict[str, Any], folder: Path, seed: int) -> None:
    """Refuse a folder that holds a run with other fields."""
    stored = folder / f"seed-{seed}" / "config.json"
    if stored.is_file():
        config, options = split_fields({**fields, "seed": seed})
        facts = json.loads(json.dumps({**vars(config), **vars(options)}))
        if changed := changed_fields(read_json(stored), facts):
            raise ValueError(
                f"ablate: {stored.parent} holds a run with other fields (run, now): {changed}; "
                "choose another --out or remove it"
            )


def _train(folder: Path, seed: int, active: set[subprocess.Popen]) -> None:
    """One run in a process of its own, resumed where one was stopped."""
    run = folder / f"seed-{seed}"
    if (run / "results.json").is_file():
        return
    command = [sys.executable, "-m", "sparse_cocktail.cli", "train", "--no-plots"]
    command += ["--recipe", str(folder / "recipe.yaml"), "--seed", str(seed), "--out", str(run)]
    command += ["--resume"] if (run / "config.json").is_file() else []
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    # a session of its own: Ctrl-C reaches this process alone, which then ends the others once
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    active.add(process)
    try:
        _, words = process.communicate()
    finally:
        active.discard(process)
    if process.returncode:
        raise RunFailed(f"ablate: the run in {run} failed: {words[-2000:].strip()}")


# ---- the table -----------------------------------------------------------------------------------


def collect(
    out: str | os.PathLike,
    recipe: str,
    variants: Iterable[Variant],
    seeds: list[int],
    changes: dict[str, Any],
) -> dict[str, Any]:
    """Means and standard deviations over seeds, from the runs' results.json."""
    rows = []
    for variant in variants:
        folders = [Path(out) / variant.name / f"seed-{seed}" for seed in seeds]
        results = [json.loads((f / "results.json").read_text()) for f in folders]
        rows.append(
            {
                "name": variant.name,
                "says": variant.says,
                "fields": variant.fields,
                "paper": variant.paper,
                "accuracy": _families(results),
                "subnets": _subnets(results),
                "choices": [r["method_state"]["choices"] for r in results],
                "passes": mean(_trained(r) for r in results),
                "seconds": mean(r["seconds"]["total"] for r in results),
            }
        )
    first = json.loads((Path(out) / rows[0]["name"] / f"seed-{seeds[0]}/results.json").read_text())
    return {
        "format": FORMAT,
        "recipe": str(recipe),
        "changes": changes,
        "seeds": seeds,
        **{name: first[name] for name in ("data", "model", "environment")},
        "rows": rows,
    }


def _families(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per family: mean over its subnets, for each seed; mean and standard deviation of these."""
    made = {}
    for name in dict.fromkeys(family(s["pattern"]) for s in results[0]["subnets"]):
        by_seed = [
            mean(s["accuracy"] for s in r["subnets"] if family(s["pattern"]) == name)
            for r in results
        ]
        made[name] = _spread(by_seed)
    made["all"] = _spread([mean(s["accuracy"] for s in r["subnets"]) for r in results])
    return made


def _subnets(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for index, subnet in enumerate(results[0]["subnets"]):
        accuracy = _spread([r["subnets"][index]["accuracy"] for r in results])
        kind = {name: subnet[name] for name in ("name", "pattern", "sparsity")}
        rows.append({**kind, **accuracy, "nominal": parse(subnet["name"]).sparsity})
    return rows


def _spread(values: list[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for a single value)."""
    return {
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "by_seed": values,
    }


def _trained(results: dict[str, Any]) -> float:
    """Passes that a run spent on its method: all but what measures it for the report."""
    return sum(count for what, count in results["passes"].items() if what != "evaluate")


def markdown(summary: dict[str, Any]) -> str:
    """The table as Markdown, with what its columns mean."""
    families = list(summary["rows"][0]["accuracy"])
    lines = [
        f"# Ablation: {summary['recipe']} ({summary['model']} on {summary['data']})",
        "",
        f"Test accuracy in percent, mean over the subnets of a pattern and over the seeds "
        f"{', '.join(map(str, summary['seeds']))}; ± is the standard deviation over seeds. Passes: "
        "forward-backward passes of one batch, a forward alone counted as a third; the search's "
        "included, measuring for the report left out.",
        "",
        "| variant | what it changes | " + " | ".join(families) + " | passes |",
        "|---|---|" + "---|" * (len(families) + 1),
    ]
    for row in summary["rows"]:
        cells = [spread(row["accuracy"][name]) for name in families]
        cells.append(f"{row['passes']:,.0f}")
        lines.append(f"| {row['name']} | {row['says']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(value: dict[str, Any]) -> str:
    """Mean ± standard deviation, as tables show it."""
    return f"{value['mean']:.2f}" + ("" if value["std"] is None else f" ± {value['std']:.2f}")
