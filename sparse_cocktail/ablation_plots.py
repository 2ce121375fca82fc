"""Pictures of ablations, made from ablation.json alone (as the paper's Figures 3, 6 and 7)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .patterns import family
from .plots import PATTERNS, save_figure

__all__ = ["Looks", "draw_curves", "draw_search", "plot_ablation"]

# Of rows by name: label, colour, marker, line.
Looks = dict[str, tuple[str, str, str, str]]

# Rows of the curves, in this order; the scatter of all rows has its own picture.
_LOOKS: Looks = {
    "paper": ("published procedure", "#222222", "o", "-"),
    "no-umg": ("w/o UMG", "#e69f00", "v", "--"),
    "ast-order": ("dense pivot → AST's order", "#0072b2", "s", "--"),
    "no-interpolation": ("w/o interpolation", "#cc79a7", "D", "--"),
    "no-rewind": ("w/o rewinding", "#d55e00", "^", "--"),
    "default": ("with consolidation (ours)", "#009e73", "*", "-"),
}
_PANELS = ("unstructured", "channel", "n:m", "block")
_FAR = 8.0  # points: a gap beyond is written, not drawn
_SEARCHES = ("paper", "ast-order", "no-rewind")


def plot_ablation(folder: str | Path) -> list[Path]:
    """Draw FOLDER/ablation.json into FOLDER/*.png; returns the files."""
    folder = Path(folder)
    summary = json.loads((folder / "ablation.json").read_text())
    rows = {row["name"]: row for row in summary["rows"]}
    made = []
    if looks := {name: look for name, look in _LOOKS.items() if name in rows}:
        draw = lambda figure: draw_curves(figure, summary, rows, looks)  # noqa: E731
        made.append(save_figure(folder / "curves.png", draw, (11.0, 4.2)))
    if "paper" in rows and len(rows) > 1:
        height = 1.6 + 0.24 * len(rows)
        draw = lambda figure: _differences(figure, summary, rows)  # noqa: E731
        made.append(save_figure(folder / "differences.png", draw, (10.0, height)))
    searched = {n: _LOOKS[n] for n in _SEARCHES if n in rows and rows[n]["choices"][0]}
    if searched:
        draw = lambda figure: draw_search(figure, rows, searched)  # noqa: E731
        made.append(save_figure(folder / "search.png", draw, (8.0, 5.5)))
    return made


def _title(summary: dict[str, Any]) -> str:
    count = len(summary["seeds"])
    return f"{summary['model']} on {summary['data']}, {count} seed{'s' if count > 1 else ''}"


def draw_curves(figure, summary: dict[str, Any], rows: dict[str, Any], looks: Looks) -> None:
    """Accuracy of every subnet: a panel per pattern, a line per row, bars = std over seeds."""
    families = [k for k in _PANELS if any(k in rows[name]["accuracy"] for name in looks)]
    widths = [1.0 if key != "n:m" else 0.6 for key in families]
    panels = figure.subplots(1, len(families), width_ratios=widths, squeeze=False)[0]
    for panel, key in zip(panels, families, strict=True):
        groups = {
            name: [s for s in rows[name]["subnets"] if family(s["pattern"]) == key]
            for name in looks
            if key in rows[name]["accuracy"]
        }
        if key == "n:m":  # these share one sparsity: side by side, by their names
            found = [s for members in groups.values() for s in members]
            order = sorted((s["nominal"], len(s["name"]), s["name"]) for s in found)
            places = {name: i for i, name in enumerate(dict.fromkeys(n for *_, n in order))}
            panel.set_xticks(range(len(places)), list(places))
        for place, (name, members) in enumerate(groups.items()):
            label, colour, marker, line = looks[name]
            members.sort(key=lambda s: s["sparsity"])
            x = [100 * s["sparsity"] for s in members]
            if key == "n:m":
                aside = min(0.11, 0.8 / len(groups)) * (place - (len(groups) - 1) / 2)
                x = [places[s["name"]] + aside for s in members]
            y, bars = [s["mean"] for s in members], [s["std"] or 0.0 for s in members]
            style = {"ls": "none" if key == "n:m" else line, "marker": marker, "color": colour}
            style["ms"] = 9 if marker == "*" else 5
            panel.errorbar(x, y, bars, label=label, lw=1.4, elinewidth=0.8, **style)
        panel.set_title(PATTERNS[key][0], fontsize=11)
        panel.set_xlabel("Pattern" if key == "n:m" else "Zeros in the masked layers (%)")
        panel.grid(alpha=0.25)
    if families:
        panels[0].set_ylabel("Test accuracy (%)")
    figure.suptitle(f"{_title(summary)} (bars: standard deviation)")
    shown = {}  # one handle per label, from the first panel that has it
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    below = {"loc": "outside lower center", "frameon": False}
    figure.legend(shown.values(), shown, ncols=3 if len(shown) <= 6 else 5, **below)


def _differences(figure, summary: dict[str, Any], rows: dict[str, Any]) -> None:
    """Every variant's accuracy minus the published procedure's, seed by seed, per pattern."""
    families = [key for key in PATTERNS if key in rows["paper"]["accuracy"]]
    names = [name for name in rows if name != "paper"]
    panels = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    for panel, key in zip(panels, families, strict=True):
        title, colour, marker = PATTERNS[key]
        base = rows["paper"]["accuracy"][key]["by_seed"]
        gaps = {
            name: [a - b for a, b in zip(rows[name]["accuracy"][key]["by_seed"], base, strict=True)]
            for name in names
        }
        near = [abs(gap) for values in gaps.values() for gap in values if abs(gap) <= _FAR]
        edge = 1.15 * max([0.5, *near])
        for place, values in enumerate(gaps.values()):
            middle = sum(values) / len(values)
            if abs(middle) > edge:  # far off: as a number, or nobody could read the others
                panel.text(-0.97 * edge, place, f"◀ {middle:.1f}", color=colour, va="center")
                continue
            panel.plot(values, [place] * len(values), "|", color=colour, ms=8, alpha=0.7)
            panel.plot(middle, place, marker, color=colour, ms=6)
        panel.axvline(0, color="#222222", lw=1, ls=":")
        panel.set_xlim(-edge, edge)
        panel.set_title(title, fontsize=11)
        panel.grid(alpha=0.25)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    words = (
        "Points of test accuracy over the published procedure (marks: seeds; ◀: beyond the axis)"
    )
    figure.supxlabel(words, fontsize=10)
    figure.suptitle(_title(summary))


def draw_search(figure, rows: dict[str, Any], looks: Looks) -> None:
    """Chosen factors (Fig. 6) and the scores of all candidates, first seed (Fig. 7)."""
    factors, scores = figure.subplots(2, 1, sharex=True)
    for name, (label, colour, marker, line) in looks.items():
        runs = rows[name]["choices"]
        stages = [choice["stage"] for choice in runs[0]]
        chosen = [[run[i]["alpha"] for run in runs] for i in range(len(stages))]
        means = [sum(values) / len(values) for values in chosen]
        middle = [k + 0.5 for k in stages]
        factors.plot(middle, means, marker=marker, color=colour, ls=line, label=label, ms=5)
        for index, choice in enumerate(runs[0]):
            tried = sorted((choice["stage"] + 1 - a, s) for a, s in choice["tried"])
            scores.plot(
                *zip(*tried, strict=True), color=colour, lw=1.2, label=None if index else label
            )
            scores.plot(
                choice["stage"] + 1 - choice["alpha"], choice["score"], marker, color=colour, ms=5
            )
    for panel in (factors, scores):
        panel.grid(alpha=0.25)
    factors.set_ylabel("Chosen $\\alpha_k$\n(share of the weights so far)")
    factors.set_title("Greedy interpolation: mean of the chosen factors over seeds", fontsize=11)
    scores.set_title("Candidates' scores, first seed (marker: chosen)", fontsize=11)
    scores.set_ylabel("Mean hold-out accuracy (%)")
    scores.set_xlabel("Stage k; within it, 1 − α grows from 0 to 1")
    factors.set_ylim(0, 1.05)
    handles, labels = factors.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
