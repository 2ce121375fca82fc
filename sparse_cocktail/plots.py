"""Pictures and tables of a run, made from its results.json and log.jsonl alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from .files import write_atomic
from .patterns import parse

__all__ = ["PATTERNS", "plot_run", "results_table"]

# One look per pattern in every picture: (title, colour, marker). Colours differ in lightness too.
PATTERNS = {
    "dense": ("Dense", "#222222", "*"),
    "unstructured": ("Unstructured", "#0072b2", "o"),
    "channel": ("Channel", "#d55e00", "s"),
    "n:m": ("N:M", "#009e73", "D"),
    "block": ("Block", "#cc79a7", "^"),
}


def family(pattern: str) -> str:
    """Key of PATTERNS for the `pattern` of a result ("2:4" -> "n:m")."""
    return "n:m" if ":" in pattern else pattern


def grouped(subnets: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Subnets per family, in the order of PATTERNS."""
    groups = {key: [s for s in subnets if family(s["pattern"]) == key] for key in PATTERNS}
    return {key: members for key, members in groups.items() if members}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# ---- the table -----------------------------------------------------------------------------------


def results_table(results: dict[str, Any]) -> Table:
    """All subnets, grouped by pattern with their means, as in the paper's Tables 1 and 2."""
    subnets = results["subnets"]
    dense = next(s["accuracy"] for s in subnets if s["pattern"] == "dense")
    table = Table(
        title="{method} on {data} ({model}, seed {seed})".format(**results),
        caption="acc.: test accuracy in percent; gap: to dense; own: with that stage's own "
        "weights; interp.: one weight set before consolidation; params: nonzero; "
        "FLOPs: multiply-adds per sample",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("subnet", "zeros", "acc.", "gap", "own", "interp.", "params", "FLOPs"):
        justify = "left" if column == "subnet" else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for members in grouped(subnets).values():
        for s in members:
            table.add_row(
                s["name"],
                f"{100 * s['sparsity']:.1f} %",
                f"{s['accuracy']:.2f}",
                f"{s['accuracy'] - dense:+.2f}",
                _percent(s["accuracy_own"]),
                _percent(s["accuracy_interpolated"]),
                f"{s['parameters']:,}",
                "" if s["flops"] is None else f"{s['flops']:,}",
            )
        if len(members) > 1:
            average = mean([s["accuracy"] for s in members])
            table.add_row(
                f"mean of {len(members)}",
                "",
                f"{average:.2f}",
                f"{average - dense:+.2f}",
                _percent(_mean_of(members, "accuracy_own")),
                _percent(_mean_of(members, "accuracy_interpolated")),
                style="bold",
            )
        table.add_section()
    return table


def _mean_of(members: list[dict[str, Any]], field: str) -> float | None:
    values = [m[field] for m in members]
    return None if None in values else mean(values)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


# ---- the pictures --------------------------------------------------------------------------------


def plot_run(folder: str | Path) -> list[Path]:
    """Draw what a finished run shows into FOLDER/plots/*.png; returns the files."""
    folder = Path(folder)
    results = json.loads((folder / "results.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    made = [_save(folder, "accuracy", lambda ax: _accuracy(ax, results))]
    if choices := results.get("method_state", {}).get("choices"):
        made.append(_save(folder, "interpolation", lambda ax: _interpolation(ax, choices)))
    made.append(_save(folder, "training", lambda ax: _training(ax, log)))
    return made


def _save(folder: Path, name: str, draw: Callable) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(7.0, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    path = folder / "plots" / f"{name}.png"
    write_atomic(path, lambda file: figure.savefig(file, format="png"))
    return path


def _accuracy(axes, results: dict[str, Any]) -> None:
    """Accuracy against sparsity, a line per pattern; filled: final, hollow: interpolated."""
    for key, members in grouped(results["subnets"]).items():
        title, colour, marker = PATTERNS[key]
        if key == "dense":
            axes.axhline(members[0]["accuracy"], color=colour, lw=1, ls=":", label=title)
            continue
        members = sorted(members, key=lambda s: s["sparsity"])
        x = [100 * s["sparsity"] for s in members]
        line = "none" if key == "n:m" else "-"
        for field, style in (
            ("accuracy_interpolated", {"alpha": 0.45, "lw": 1, "ms": 4, "mfc": "white"}),
            ("accuracy", {"lw": 2, "ms": 6, "label": title}),
        ):
            y = [s[field] for s in members]
            if None not in y:
                axes.plot(x, y, marker=marker, ls=line, color=colour, **style)
    axes.set(xlabel="Sparsity of the masked layers (%)", ylabel="Test accuracy (%)")
    axes.set_title(f"{len(results['subnets'])} networks from one weight set, {results['data']}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, title="filled: final\nhollow: interpolated only", loc="lower left")


def _interpolation(axes, choices: list[dict[str, Any]]) -> None:
    """The hold-out score of every factor that was tried, and the one that was taken."""
    for index, choice in enumerate(choices):
        colour = (0.0, 0.25 + 0.6 * index / max(len(choices) - 1, 1), 0.7)
        alphas, scores = zip(*choice["tried"], strict=True)
        axes.plot(alphas, scores, color=colour, lw=1.2, label=f"stage {choice['stage']}")
        axes.plot(choice["alpha"], choice["score"], "o", color=colour, ms=6)
    axes.set(xlabel="Share of the current weights (1 = leave the stage out)")
    axes.set(ylabel="Mean hold-out accuracy of the subnets (%)")
    axes.set_title("Greedy interpolation: factors tried and chosen")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, ncols=2)


def _training(axes, log: list[dict[str, Any]]) -> None:
    """Training loss per pattern over the optimizer steps of the whole run."""
    train = [entry for entry in log if entry["event"] == "train"]
    curves: dict[str, list[tuple[int, float]]] = {}
    start = last = stage = 0
    for entry in train:
        if entry["stage"] != stage:
            start, stage = last, entry["stage"]
            axes.axvline(start, color="#cccccc", lw=0.8, zorder=0)
        last = start + entry["step"]
        losses: dict[str, list[float]] = {}
        for name, loss in entry["loss"].items():
            losses.setdefault(family(parse(name).kind), []).append(loss)
        for key, values in losses.items():
            curves.setdefault(key, []).append((last, mean(values)))
    for key in PATTERNS:
        if key in curves:
            title, colour, _ = PATTERNS[key]
            axes.plot(*zip(*curves[key], strict=True), color=colour, lw=1, alpha=0.85, label=title)
    axes.set_yscale("log")
    axes.set(xlabel="Optimizer steps (vertical lines: new stage)", ylabel="Training loss")
    axes.set_title("Training loss by pattern", pad=26)
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
