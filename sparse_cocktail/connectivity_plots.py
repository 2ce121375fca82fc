"""Pictures of linear mode connectivity, made from connectivity.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .files import read_json
from .plots import PATTERNS, plain, save_figure

__all__ = ["plot_connectivity"]

_CONNECTED = 2.0  # points; Frankle et al. (2020) call less of a barrier connected
# (colour, marker) of lines between two patterns: the colour of neither.
_PAIRS = (("#882255", "o"), ("#44aa99", "s"), ("#b8860b", "D"))
_BELOW = {"loc": "outside lower center", "frameon": False, "fontsize": 9}


def plot_connectivity(folder: str | Path) -> list[Path]:
    """Draw RUN/connectivity.json into RUN/plots/connectivity-*.png; returns the files."""
    folder = Path(folder)
    result, place = read_json(folder / "connectivity.json"), folder / "plots"
    made, kinds = [], len({row["patterns"][0] for row in result["stages"]})
    if kinds:
        size = (max(7.0, 4.3 * kinds), 7.4)
        draw = lambda figure: _stages(figure, result)  # noqa: E731
        made.append(save_figure(place / "connectivity-stages.png", draw, size))
    if result["patterns"]:
        draw = lambda figure: _patterns(figure, result)  # noqa: E731
        made.append(save_figure(place / "connectivity-patterns.png", draw, (9.0, 7.4)))
    return made


def _title(what: str, result: dict[str, Any]) -> str:
    sample = 100.0 / result["measured_on"]
    words = f"{plain(result['model'])} on {plain(result['data'])}, seed {result['seed']}"
    return f"{what}: {words} (one sample is {sample:.2g} points)"


def _error(result: dict[str, Any]) -> str:
    return "Training error (%)" if result["split"] == "train" else "Hold-out error (%)"


# ---- between stages ------------------------------------------------------------------------------


def _stages(figure, result: dict[str, Any]) -> None:
    """Per pattern the barriers of all pairs of stages, and the error along the adjacent ones."""
    rows = {key: [r for r in result["stages"] if r["patterns"] == [key]] for key in PATTERNS}
    rows = {key: found for key, found in rows.items() if found}
    last = max(row["b"][0] for row in result["stages"])
    largest = max(row["barrier"] for row in result["stages"])
    layout = {"squeeze": False, "height_ratios": (1.15, 1), "sharex": "row"}
    maps, curves = figure.subplots(2, len(rows), **layout)
    for panel, key in zip(maps, rows, strict=True):
        image = _heat_map(panel, rows[key], last, max(1.0, largest))
        panel.set_title(PATTERNS[key][0], fontsize=11)
    for panel, key in zip(curves, rows, strict=True):
        _chain(panel, key, [r for r in rows[key] if r["b"][0] == r["a"][0] + 1])
        panel.set_xlim(-0.3, last + 0.3)
    named = range(0, last + 1, 1 + last // 8)
    for panel in (*maps, *curves):
        panel.set_xticks(named)
    for panel in maps:
        panel.set_yticks(named)
    maps[0].set_ylabel("Stage k")
    curves[0].set_ylabel(f"{_error(result)}\nfrom each stage to the next")
    figure.colorbar(image, ax=list(maps), label="Barrier (points)", shrink=0.8, pad=0.01)
    figure.suptitle(_title("Error barriers between stages", result), parse_math=False)


def _heat_map(panel, rows: list[dict[str, Any]], last: int, top: float):
    """Barriers below the diagonal, with numbers while there is room for them."""
    values = [[float("nan")] * (last + 1) for _ in range(last + 1)]
    for row in rows:
        values[row["b"][0]][row["a"][0]] = row["barrier"]
    image = panel.imshow(values, cmap="YlOrRd", vmin=0.0, vmax=top)
    size = min(9.0, 92 / (last + 1))
    for row in rows:
        (j, _), (k, _), found = row["a"], row["b"], row["barrier"]
        text = f"{found:.1f}" if found < 9.95 else f"{found:.0f}"
        colour = "white" if found > 0.6 * top else "#222222"
        number = panel.text(j, k, text, ha="center", va="center", fontsize=size, color=colour)
        number.set_in_layout(False)  # the layout would measure hundreds of them, for seconds
    panel.set_xlabel("Stage j")
    panel.spines[:].set_visible(False)
    return image


def _chain(panel, key: str, rows: list[dict[str, Any]]) -> None:
    """The error along D_j to D_j+1 to D_j+2, one continuous line; markers are the stages."""
    _, colour, marker = PATTERNS[key]
    points = [
        (row["a"][0] + 1.0 - alpha, error)
        for row in rows
        for alpha, error in zip(row["alphas"], row["errors"], strict=True)
    ]
    stages = [(x, error) for x, error in points if x == int(x)]
    panel.plot(*zip(*points, strict=True), color=colour, lw=1.3)
    panel.plot(
        *zip(*stages, strict=True), marker, ls=":", lw=0.8, color=colour, ms=5, clip_on=False
    )
    panel.grid(alpha=0.25)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("Stage; dotted: no barrier")


# ---- between patterns ----------------------------------------------------------------------------


def _patterns(figure, result: dict[str, Any]) -> None:
    """Per pair of patterns the error along the line in every stage; barriers against stages."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    pairs = list(dict.fromkeys(tuple(row["patterns"]) for row in result["patterns"]))
    rows = {pair: [r for r in result["patterns"] if tuple(r["patterns"]) == pair] for pair in pairs}
    stages = [row["a"][0] for row in result["patterns"]]
    shades, scale = colormaps["viridis_r"], Normalize(min(stages), max(stages) + 1e-9)
    panels = figure.subplots(2, 2, squeeze=False).flatten()
    for panel, (p, q) in zip(panels, pairs, strict=False):
        for row in rows[p, q]:
            x = [1.0 - alpha for alpha in row["alphas"]]
            panel.plot(x, row["errors"], ".-", color=shades(scale(row["a"][0])), lw=1.2, ms=4)
        names = [PATTERNS[key][0] for key in (p, q)]
        panel.set_title(" to ".join(names), fontsize=11)
        panel.set_xticks((0, 0.5, 1), (names[0], "half", names[1]))
        panel.set_ylabel(_error(result))
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.25)
    for panel in panels[len(pairs) : 3]:
        panel.set_visible(False)
    _against_stages(panels[3], rows)
    if max(stages) > min(stages):
        colours = ScalarMappable(Normalize(min(stages), max(stages)), shades)
        figure.colorbar(colours, ax=list(panels), label="Stage", shrink=0.6, pad=0.01)
    figure.suptitle(_title("Error barriers between patterns", result), parse_math=False)
    figure.legend(*panels[3].get_legend_handles_labels(), ncols=2, **_BELOW)


def _against_stages(panel, rows: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    for (colour, marker), (pair, found) in zip(_PAIRS, rows.items(), strict=False):
        x, y = [row["a"][0] for row in found], [row["barrier"] for row in found]
        names = " to ".join(PATTERNS[key][0] for key in pair)
        label = f"{names} (mean {sum(y) / len(y):.2f})"
        panel.plot(x, y, marker=marker, color=colour, lw=1.4, ms=5, clip_on=False, label=label)
    panel.axhline(_CONNECTED, color="#777777", lw=1, ls=":", label="2 points (Frankle et al.)")
    panel.set_title("Barrier in every stage", fontsize=11)
    panel.set(xlabel="Stage", ylabel="Barrier (points)")
    panel.set_ylim(bottom=0)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.25)
