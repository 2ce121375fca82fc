"""Pictures of a comparison, made from compare.json alone (as the paper's Figures 4 to 7)."""

from __future__ import annotations

import json
from pathlib import Path

from .ablation_plots import Looks, draw_curves, draw_search
from .compare import ENTRIES
from .plots import save_figure

__all__ = ["LOOKS", "plot_comparison"]

# Colours that the colour-blind tell apart; a second round has other lines and markers.
_COLOURS = (
    *("#222222", "#d55e00", "#0072b2", "#009e73"),
    *("#cc79a7", "#e69f00", "#56b4e9", "#8c564b"),
)
_MARKERS = "*osD^vP<>XphdH8."


def _label(name: str) -> str:
    """An entry's name without its pattern, which its panel has: one look for all."""
    for tag in ("-unstructured", "-channel", "-nm"):
        name = name.removesuffix(tag)
    return name


def _looks() -> Looks:
    """Of every entry; a method looks the same whichever others are drawn."""
    labels = list(dict.fromkeys(_label(entry.name) for entry in ENTRIES))
    of = {
        label: (label, _COLOURS[i % len(_COLOURS)], _MARKERS[i], "-" if i < len(_COLOURS) else "--")
        for i, label in enumerate(labels)
    }
    return {entry.name: of[_label(entry.name)] for entry in ENTRIES}


LOOKS = _looks()


def plot_comparison(folder: str | Path) -> list[Path]:
    """Draw FOLDER/compare.json into FOLDER/*.png; returns the files."""
    folder = Path(folder)
    summary = json.loads((folder / "compare.json").read_text())
    rows = {row["name"]: row for row in summary["rows"]}
    looks = {name: look for name, look in LOOKS.items() if name in rows}
    draw = lambda figure: draw_curves(figure, summary, rows, looks)  # noqa: E731
    made = [save_figure(folder / "curves.png", draw, (13.0, 5.4))]
    if searched := {n: look for n, look in looks.items() if any(rows[n]["choices"])}:
        draw = lambda figure: draw_search(figure, rows, searched)  # noqa: E731
        made.append(save_figure(folder / "search.png", draw, (8.0, 5.5)))
    return made
