"""Pictures and tables of a run, made from its results.json and log.jsonl alone."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from .files import write_atomic
from .patterns import family, parse

__all__ = ["PATTERNS", "pictures", "plot_run", "render", "results_table", "save_figure"]

# One look per pattern in every picture: (title, colour, marker). Colours differ in lightness too.
PATTERNS = {
    "dense": ("Dense", "#222222", "*"),
    "unstructured": ("Unstructured", "#0072b2", "o"),
    "channel": ("Channel", "#d55e00", "s"),
    "n:m": ("N:M", "#009e73", "D"),
    "block": ("Block", "#cc79a7", "^"),
}
CHOSEN = "#6a3d9a"  # what the interpolation chose: a colour that is no pattern's


def grouped(subnets: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Subnets per family, in the order of PATTERNS."""
    groups = {key: [s for s in subnets if family(s["pattern"]) == key] for key in PATTERNS}
    return {key: members for key, members in groups.items() if members}


def counted(results: dict[str, Any]) -> str:
    """How many networks a run left, and how many weight sets they share, in words."""
    networks, sets = results["subnets"], {s.get("weights") for s in results["subnets"]}
    some = "1 network" if len(networks) == 1 else f"{len(networks)} networks"
    return f"{some} from {'one weight set' if len(sets) == 1 else f'{len(sets)} weight sets'}"


def shown_name(subnet: dict[str, Any], subnets: list[dict[str, Any]]) -> str:
    """A subnet's name; where another has the same one, with the weights that it computes with."""
    if sum(s["name"] == subnet["name"] for s in subnets) == 1 or not subnet.get("weights"):
        return subnet["name"]
    return f"{subnet['name']} ({Path(subnet['weights']).stem})"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def plain(value: Any) -> str:
    """Text from a file, fit to be drawn or written: what cannot be printed becomes U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(value))


# ---- the table -----------------------------------------------------------------------------------

COLUMNS = ("subnet", "zeros", "acc.", "gap", "own", "interp.", "params", "FLOPs")
LEGEND = (
    "acc.: test accuracy in percent; gap: to dense, or to the mean of several dense networks; "
    "own: with that stage's own weights; "
    "interp.: one weight set before consolidation; params: nonzero; "
    "FLOPs: multiply-adds per sample"
)


def table_groups(results: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Rows of the table in the order of COLUMNS, per family; the last of several is their mean."""
    groups = grouped(results["subnets"])
    dense = mean([s["accuracy"] for s in groups["dense"]]) if "dense" in groups else None
    rows: dict[str, list[list[str]]] = {}
    for key, members in groups.items():
        rows[key] = [
            [
                *(shown_name(s, members), f"{100 * s['sparsity']:.1f} %"),
                *_accuracies([s], dense),
                f"{s['parameters']:,}",
                "" if s.get("flops") is None else f"{s['flops']:,}",
            ]
            for s in members
        ]
        if len(members) > 1:
            rows[key].append([f"mean of {len(members)}", "", *_accuracies(members, dense), "", ""])
    return rows


def shown_table(results: dict[str, Any]) -> tuple[list[str], list[list[list[str]]]]:
    """COLUMNS and the rows of every family, less the columns that a run leaves blank."""
    groups = list(table_groups(results).values())
    used = [i for i in range(len(COLUMNS)) if any(row[i] for rows in groups for row in rows)]
    return [COLUMNS[i] for i in used], [[[row[i] for i in used] for row in rows] for rows in groups]


def _accuracies(members: list[dict[str, Any]], dense: float | None) -> list[str]:
    """Columns "acc." to "interp.", averaged; blank where a value is missing."""
    means = []
    for field in ("accuracy", "accuracy_own", "accuracy_interpolated"):
        values = [m.get(field) for m in members]
        means.append(None if None in values else mean(values))
    final, own, mixed = ("" if m is None else f"{m:.2f}" for m in means)
    return [final, "" if dense is None else f"{means[0] - dense:+.2f}", own, mixed]


def results_table(results: dict[str, Any]) -> Table:
    """All subnets, grouped by pattern with their means, as in the paper's Tables 1 and 2."""
    title = "{method} on {data} ({model}, seed {seed}): ".format(**results)
    table = Table(
        title=title + counted(results),
        caption=LEGEND,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    columns, groups = shown_table(results)
    for column in columns:
        justify = "left" if column == "subnet" else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for rows in groups:
        for index, row in enumerate(rows):
            table.add_row(*row, style="bold" if 0 < index == len(rows) - 1 else None)  # the mean
        table.add_section()
    return table


# ---- the pictures --------------------------------------------------------------------------------


def choices_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The interpolation's choices {stage, alpha, score, tried}, or none.

    A method of your own may keep choices of another kind in its state; they are not shown.
    """
    state = results.get("method_state")
    choices = state.get("choices") if isinstance(state, dict) else None
    try:
        return [
            {
                "stage": int(c["stage"]),
                "alpha": float(c["alpha"]),
                "score": float(c["score"]),
                "tried": [(float(alpha), float(score)) for alpha, score in c["tried"]],
            }
            for c in choices or []
        ]
    except (KeyError, TypeError, ValueError):
        return []


class Picture(NamedTuple):
    """`draw(figure)` fills a figure of `size` inches; `words` say what is to be seen."""

    draw: Callable[[Any], None]
    size: tuple[float, float]
    words: str


def pictures(results: dict[str, Any], log: list[dict[str, Any]]) -> dict[str, Picture]:
    """What can be drawn of a run, by name. Without its log or its choices there is less."""
    found = {
        "accuracy": Picture(
            lambda figure: _accuracy(figure, results),
            (7.0, 4.9),
            "Test accuracy of every subnet against the share of zeros in its masked layers.",
        )
    }
    if choices := choices_of(results):
        found["interpolation"] = Picture(
            lambda figure: _interpolation(figure, choices),
            (7.0, 5.4),
            "Greedy interpolation: the hold-out score of every factor α that was tried, stage by "
            "stage, and the factor that was chosen; α is the share of the weights so far, 1 − α "
            "that of the stage.",
        )
    if any(entry["event"] == "train" for entry in log):
        found["training"] = Picture(
            lambda figure: _training(figure, log),
            (7.0, 4.5),
            "Training loss over the optimizer steps of all stages, averaged per pattern.",
        )
    return found


def plot_run(folder: str | Path) -> list[Path]:
    """Draw what a finished run shows into FOLDER/plots/*.png; returns the files."""
    folder = Path(folder)
    results = json.loads((folder / "results.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found, place = pictures(results, log), folder / "plots"
    return [save_figure(place / f"{name}.png", p.draw, p.size) for name, p in found.items()]


def save_figure(path: str | Path, draw: Callable[[Any], None], size=(7.0, 4.5)) -> Path:
    """Write what `draw(figure)` draws to FILE.png or FILE.svg; `size` in inches."""
    data = render(draw, size, Path(path).suffix.lstrip("."))
    write_atomic(path, lambda file: file.write(data))
    return Path(path)


def render(draw: Callable[[Any], None], size=(7.0, 4.5), kind: str = "png") -> bytes:
    """The bytes of a picture: equal content gives equal bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    looks = {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "sparse"}
    dateless = {"Date": None} if kind == "svg" else None
    stream = io.BytesIO()
    with rc_context(looks):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        draw(figure)
        figure.savefig(stream, format=kind, metadata=dateless)
    return stream.getvalue()


def _accuracy(figure, results: dict[str, Any]) -> None:
    """Accuracy against sparsity, a line per pattern; N:M patterns side by side, by their names.

    They often share one sparsity, and would lie on top of each other on the axis of the others.
    """
    groups = grouped(results["subnets"])
    hollow, words = _compared(results["subnets"])
    nm = sorted(groups.get("n:m", []), key=lambda s: (s["sparsity"], len(s["name"]), s["name"]))
    share = min(0.12 + 0.07 * len(nm), 0.6)  # of the width: room for every name
    if nm:
        panels = figure.subplots(1, 2, sharey=True, width_ratios=(1 - share, share))
        _name_patterns(panels[1], nm)
        _draw_family(panels[1], "n:m", nm, list(range(len(nm))), hollow)
    else:
        panels = [figure.subplots()]
    axes = panels[0]
    for key, members in groups.items():
        if key not in ("dense", "n:m"):
            members = sorted(members, key=lambda s: s["sparsity"])
            _draw_family(axes, key, members, [100 * s["sparsity"] for s in members], hollow)
    if set(groups) <= {"dense", "n:m"}:
        axes.set_xlim(0, 100)  # no line that would set the limits
    axes.set(xlabel="Zeros in the masked layers (%)", ylabel="Test accuracy (%)")
    for panel in panels:
        panel.grid(alpha=0.25)
        if dense := [s["accuracy"] for s in groups.get("dense", [])]:
            colour = PATTERNS["dense"][1]
            panel.axhline(mean(dense), color=colour, lw=1, ls=":")
            if len(dense) > 1:  # a line for each would hide the rest
                panel.axhspan(min(dense), max(dense), color=colour, lw=0, alpha=0.08)
    figure.suptitle(f"{counted(results)}: {plain(results['data'])}", parse_math=False)
    figure.legend(handles=_handles(groups, words), ncols=3, **_BELOW)


_BELOW = {"loc": "outside lower center", "frameon": False, "fontsize": 9}  # legends hide no data
_FILLED = {"lw": 2, "ms": 6}
_HOLLOW = {"lw": 1, "ms": 5, "mfc": "white"}


def _draw_family(axes, key: str, members: list, x: list[float], hollow: str | None) -> None:
    """One pattern: filled markers for the final accuracies, hollow ones for the field `hollow`."""
    _, colour, marker = PATTERNS[key]
    line = {"ls": "none" if key == "n:m" else "-", "marker": marker}
    if hollow:
        y = [float("nan") if s.get(hollow) is None else s[hollow] for s in members]
        aside = 0.15 if key == "n:m" else 0.0  # equal accuracies would hide each other
        axes.plot([at - aside for at in x], y, color=_paler(colour), **line, **_HOLLOW)
        x = [at + aside for at in x]
    axes.plot(x, [s["accuracy"] for s in members], color=colour, **line, **_FILLED)


def _paler(colour: str) -> tuple[float, ...]:
    """Half-way to white; unlike transparency it does not let lines shine through a marker."""
    from matplotlib.colors import to_rgb

    return tuple(0.5 + 0.5 * part for part in to_rgb(colour))


def _compared(subnets: list[dict[str, Any]]) -> tuple[str | None, str]:
    """The accuracies that are worth a hollow marker: the first kind that differs from the final."""
    for field, words in (
        ("accuracy_interpolated", "interpolated, before consolidation"),
        ("accuracy_own", "the stage's own weights"),
    ):
        if any(s.get(field) not in (None, s["accuracy"]) for s in subnets):
            return field, words
    return None, ""


def _handles(groups: dict[str, Any], words: str) -> list[Any]:
    """The legend: a colour per pattern, then filled and hollow in grey."""
    from matplotlib.lines import Line2D

    looks = []
    for key in groups:
        title, colour, marker = PATTERNS[key]
        look = {"ls": ":", "lw": 1} if key == "dense" else {"marker": marker, **_FILLED}
        line = {"ls": "none"} if key == "n:m" else {}
        looks.append({"label": title, "color": colour, **look, **line})
    if words:
        looks.append({"label": "final", "color": "#555555", "marker": "o", **_FILLED})
        looks.append({"label": words, "color": _paler("#555555"), "marker": "o", **_HOLLOW})
    return [Line2D([], [], **look) for look in looks]


def _name_patterns(side, nm: list[dict[str, Any]]) -> None:
    """The names of the N:M patterns under their points, and the zeros each has."""
    zeros = [f"{100 * s['sparsity']:.0f} %" for s in nm]
    one = len(set(zeros)) == 1
    names = [plain(s["name"])[:12] for s in nm]
    if not one:
        names = [f"{name}\n{share}" for name, share in zip(names, zeros, strict=True)]
    side.set_xticks(range(len(nm)), names, fontsize=9 if len(nm) < 7 else 7, parse_math=False)
    side.set_xlim(-0.6, len(nm) - 0.4)
    side.set_xlabel(f"N:M ({zeros[0]} zeros)" if one else "N:M")
    side.tick_params(labelleft=False, left=False)
    side.spines["left"].set_visible(False)


def _interpolation(figure, choices: list[dict[str, Any]]) -> None:
    """Scores of all factors on one continuous axis (above), the chosen factors (below).

    The step that mixes stage k in fills [k, k + 1): x = k + 1 - alpha, so that the left edge is
    "leave the stage out" and the right edge "take the stage alone" (paper, Figures 6 and 7).
    """
    scores, factors = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for index, choice in enumerate(choices):
        k, alpha = choice["stage"], choice["alpha"]
        for panel in (scores, factors):
            if index % 2:
                panel.axvspan(k, k + 1, color="#f0f0f0", lw=0, zorder=0)
        tried = sorted((k + 1 - a, s) for a, s in choice["tried"])
        words = ("tried", "chosen", "weights so far (α)", "this stage (1 − α)")
        a, b, c, d = words if index == 0 else [None] * 4  # the legend names each look once
        if tried:
            x, y = zip(*tried, strict=True)
            scores.plot(x, y, ".-", color="#777777", lw=1, ms=4, label=a)
        scores.plot(k + 1 - alpha, choice["score"], "o", color=CHOSEN, ms=7, label=b)
        wide = {"x": k + 0.5, "width": 0.56, "edgecolor": CHOSEN, "lw": 1}
        factors.bar(height=alpha, color=CHOSEN, label=c, **wide)
        factors.bar(height=1 - alpha, bottom=alpha, color="white", label=d, **wide)
        if len(choices) <= 14:  # beyond, numbers would run into each other
            factors.text(k + 0.5, 1.05, f"{alpha:g}", ha="center", fontsize=9, color=CHOSEN)
    stages = [choice["stage"] for choice in choices]
    named = stages[:: -(-len(stages) // 14)]
    factors.set_xticks([k + 0.5 for k in named], list(map(str, named)))
    scores.tick_params(axis="x", length=0)
    factors.tick_params(axis="x", length=0)
    room = max(0.1, (4 - len(stages)) / 2)  # a single step must not fill the whole width
    factors.set_xlim(min(stages) - room, max(stages) + 1 + room)
    factors.set(ylabel="Share of the mix", ylim=(0, 1.25), yticks=(0, 0.5, 1))
    factors.set_xlabel("Stage k mixed in; within its band α falls from 1 (left out) to 0 (alone)")
    scores.set_ylabel("Mean hold-out accuracy (%)\nof the subnets up to stage k")
    scores.grid(axis="y", alpha=0.25)
    figure.suptitle("Greedy interpolation of the stages' weights")
    handles = [h for panel in (scores, factors) for h in panel.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, ncols=4, **_BELOW)


def _training(figure, log: list[dict[str, Any]]) -> None:
    """Training loss per pattern over the optimizer steps of the whole run.

    A line ends with its stage: the next one starts from rewound weights, not from where it was.
    """
    axes = figure.subplots()
    curves, stages = _losses(log)
    for key in PATTERNS:
        if key in curves:
            title, colour, _ = PATTERNS[key]
            x, y = zip(*curves[key], strict=True)
            size = 2.5 if len(x) > 60 else 7  # a stage may be one point, without a line
            axes.plot(x, y, ".-", color=colour, lw=1.2, ms=size, alpha=0.9, label=title)
    for start, *_ in stages[1:]:
        axes.axvline(start, color="#cccccc", lw=0.8, zorder=0)
    losses = [loss for points in curves.values() for _, loss in points if loss == loss]  # no NaN
    if losses and min(losses) > 0:
        from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

        axes.set_yscale("log")
        span = max(losses) / min(losses)
        decade = (1, 1.5, 2, 3, 5, 7) if span < 20 else (1, 2, 5) if span < 1000 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=decade))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    _name_stages(axes, stages)
    end = max((end for _, end, _ in stages), default=1)
    axes.set(xlabel="Optimizer steps", ylabel="Training loss", xlim=(0, 1.01 * end))
    axes.grid(axis="y", alpha=0.25)
    figure.suptitle("Training loss by pattern")
    figure.legend(ncols=len(curves), **_BELOW)


def _name_stages(axes, stages: list[tuple[int, int, str]]) -> None:
    """The stages' names along the top; of many stages only some, which do not touch."""
    named = stages[:: -(-len(stages) // 14)]
    top = axes.secondary_xaxis("top")
    middles = [(start + end) / 2 for start, end, _ in named]
    top.set_xticks(middles, [name[:14] for *_, name in named], fontsize=8, parse_math=False)
    top.tick_params(length=0)
    top.set_xlabel("Stage", fontsize=9)
    top.spines[:].set_visible(False)


def _losses(log: list[dict[str, Any]]) -> tuple[dict[str, list], list[tuple[int, int, str]]]:
    """Points (step, mean loss) per family, NaN between stages; (start, end, name) of stages."""
    curves: dict[str, list[tuple[float, float]]] = {}
    stages: dict[int, tuple[int, int, str]] = {}
    last = 0
    for entry in log:
        if entry["event"] not in ("train", "stage"):
            continue
        start, _, name = stages.get(entry["stage"], (last, last, str(entry["stage"])))
        if entry["stage"] not in stages:
            for points in curves.values():
                points.append((start, float("nan")))
        if entry["event"] == "stage":  # "stage 3" -> "3": the axis says "Stage"
            name = plain(entry.get("name", name)).removeprefix("stage ")
        last = start + entry["step"]
        stages[entry["stage"]] = (start, last, name)
        losses: dict[str, list[float]] = {}
        for subnet, loss in entry.get("loss", {}).items():
            losses.setdefault(family(parse(subnet).kind), []).append(loss)
        for key, values in losses.items():
            curves.setdefault(key, []).append((last, mean(values)))
    return curves, list(stages.values())
