"""Many trainings: each in a process of its own, resumed after a stop, summed up over seeds."""

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
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from .config import split_fields
from .files import read_json, write_atomic, write_json
from .patterns import family, parse
from .run_folder import changed_fields

__all__ = [
    "RunFailed",
    "Tell",
    "heading",
    "is_finished",
    "markdown_table",
    "over_runs",
    "over_seeds",
    "read_runs",
    "spread",
    "told",
    "train_all",
    "trained",
    "write_summary",
]

FORMAT = 1

# Called as tell(runs done, runs in all, what was done) after every run.
Tell = Callable[[int, int, str], None]


class RunFailed(RuntimeError):
    """One of many runs ended with an error."""


def told(done: int, total: int, what: str) -> None:
    """A `Tell` that says nothing."""


def train_all(
    runs: dict[str, tuple[dict[str, Any], Path, int]], jobs: int = 1, tell: Tell = told
) -> None:
    """Train many runs, `jobs` at a time, each in a process of its own.

    On an error, Ctrl-C or SIGTERM the runs that are under way write a checkpoint and end.

    Args:
        runs: by name: (recipe fields, folder, seed); the run lies in FOLDER/seed-SEED. Finished
            ones are kept, unfinished ones resumed.
        jobs: runs at a time.
        tell: called after every run.

    Raises:
        ValueError: for nothing to do, bad fields, or a folder with a run of other fields.
        RunFailed: when a run fails; its last words are in the message.
    """
    if not runs or jobs < 1:
        raise ValueError(f"train: {len(runs)} runs, jobs={jobs}; give at least one of each")
    for fields, folder, seed in runs.values():
        _check_folder(fields, folder, seed)
    for folder, fields in {folder: fields for fields, folder, _ in runs.values()}.items():
        text = yaml.safe_dump(fields, sort_keys=False).encode()
        write_atomic(folder / "recipe.yaml", lambda stream, text=text: stream.write(text))
    finished: list[str] = []
    active = _Processes()

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
            active.stop()
            raise


class _Processes:
    """What runs at the moment, in threads that each wait for one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # no process starts while others are ended
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def run(self, command: list[str]) -> tuple[int, str] | None:
        """Exit status and error output of a command; None where `stop` came before it."""
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with self._lock:
            if self._stopped:
                return None
            # a session of its own: Ctrl-C reaches this process alone, which ends the others once
            process = subprocess.Popen(command, start_new_session=True, **pipes)
            self._running.add(process)
        try:
            _, words = process.communicate()
        finally:
            self._running.discard(process)
        return process.returncode, words

    def stop(self) -> None:
        """End all with SIGTERM, and start no more."""
        with self._lock:
            self._stopped = True
            for process in list(self._running):
                process.terminate()


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
    """Refuse bad fields, and a folder that holds a run with other fields."""
    config, options = split_fields({**fields, "seed": seed})
    stored = folder / f"seed-{seed}" / "config.json"
    if stored.is_file():
        facts = json.loads(json.dumps({**vars(config), **vars(options)}))
        if changed := changed_fields(read_json(stored), facts):
            raise ValueError(
                f"train: {stored.parent} holds a run with other fields (run, now): {changed}; "
                "choose another --out or remove it"
            )


def is_finished(folder: Path, seeds: Iterable[int]) -> bool:
    """Whether the runs of all seeds in a folder of `train_all` are complete."""
    return all((folder / f"seed-{seed}" / "results.json").is_file() for seed in seeds)


def _train(folder: Path, seed: int, active: _Processes) -> None:
    """One run in a process of its own, resumed where one was stopped."""
    run = folder / f"seed-{seed}"
    if is_finished(folder, [seed]):
        return
    command = [sys.executable, "-m", "sparse_cocktail.cli", "train", "--no-plots"]
    command += ["--recipe", str(folder / "recipe.yaml"), "--seed", str(seed), "--out", str(run)]
    command += ["--resume"] if (run / "config.json").is_file() else []
    status, words = active.run(command) or (1, "stopped before it began")
    if status:
        raise RunFailed(f"train: the run in {run} failed: {words[-2000:].strip()}")


# ---- what they say together ----------------------------------------------------------------------


def read_runs(folder: Path, seeds: Iterable[int]) -> list[dict[str, Any]]:
    """results.json of every seed in a folder of `train_all`."""
    return [json.loads((folder / f"seed-{s}" / "results.json").read_text()) for s in seeds]


def over_runs(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies per family and per subnet, passes and seconds: means over runs that differ in
    their seed only, and standard deviations."""
    return {
        "accuracy": _families(results),
        "subnets": _subnets(results),
        "passes": mean(trained(r) for r in results),
        "seconds": mean(r["seconds"]["total"] for r in results),
    }


def _families(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per family: mean over its subnets, for each seed; mean and standard deviation of these."""
    made = {}
    for name in dict.fromkeys(family(s["pattern"]) for s in results[0]["subnets"]):
        by_seed = [
            mean(s["accuracy"] for s in r["subnets"] if family(s["pattern"]) == name)
            for r in results
        ]
        made[name] = over_seeds(by_seed)
    made["all"] = over_seeds([mean(s["accuracy"] for s in r["subnets"]) for r in results])
    return made


def _subnets(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for index, subnet in enumerate(results[0]["subnets"]):
        accuracy = over_seeds([r["subnets"][index]["accuracy"] for r in results])
        kind = {name: subnet[name] for name in ("name", "pattern", "sparsity")}
        rows.append({**kind, **accuracy, "nominal": parse(subnet["name"]).sparsity})
    return rows


def over_seeds(values: list[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for a single value)."""
    return {
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "by_seed": values,
    }


def spread(value: dict[str, Any]) -> str:
    """Mean ± standard deviation, as tables show it."""
    return f"{value['mean']:.2f}" + ("" if value["std"] is None else f" ± {value['std']:.2f}")


def trained(results: dict[str, Any]) -> float:
    """Passes that a run spent on its method: all but what measures it for the report."""
    return sum(count for what, count in results["passes"].items() if what != "evaluate")


def heading(
    recipe: str, changes: dict[str, Any], seeds: list[int], results: dict[str, Any]
) -> dict[str, Any]:
    """What stands above the rows of a summary; `results` of one of its runs."""
    return {
        "format": FORMAT,
        "recipe": str(recipe),
        "changes": changes,
        "seeds": seeds,
        **{name: results[name] for name in ("data", "model", "environment")},
    }


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a Markdown table."""
    head = list(head)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def write_summary(path: str | os.PathLike, summary: dict[str, Any], text: str) -> None:
    """Write PATH.json and PATH.md."""
    write_json(f"{path}.json", summary, indent=None)  # thousands of numbers
    write_atomic(f"{path}.md", lambda stream: stream.write(text.encode()))
