"""What a benchmark leaves: JSON, a Markdown table and pictures, all from the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparse_cocktail.files import write_atomic
from sparse_cocktail.plots import save_figure

from timing import COPY, LIMITS, READ_PASS, REFERENCE  # isort: skip - a neighbour, not a package

__all__ = [
    "aligned",
    "best_peer",
    "draw_bars",
    "draw_growth",
    "groups",
    "markdown",
    "overview",
    "write",
]

OURS, PEER, PLAIN, LIMIT = "#1b6ca8", "#b8b8b8", "#dedede", "#c0392b"
PEERS = ("#7f7f7f", "#e08a1e", "#3f8f4f", "#8e6bb0", "#a07040")


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the benchmark JSON, a row per line: format, environment, rows (see README)."""
    head = {k: v for k, v in result.items() if k != "rows"}
    lines = [json.dumps(row, allow_nan=False) for row in result["rows"]]
    text = json.dumps(head, indent=2, allow_nan=False)[:-2]
    text += ',\n  "rows": [\n' + ",\n".join("    " + line for line in lines) + "\n  ]\n}\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def groups(rows: Sequence[dict]) -> dict[tuple[str, str], list[dict]]:
    """Rows by (op, case), in the order of measuring."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["op"], row["case"]), []).append(row)
    return found


def _fastest(rows: Sequence[dict]) -> dict | None:
    timed = [row for row in rows if row["ok"] and row["median_us"]]
    return min(timed, key=lambda row: row["median_us"], default=None)


def _is_ours(row: dict) -> bool:
    return row["impl"].startswith("ours/")


def best_peer(rows: Sequence[dict]) -> dict | None:
    """The fastest correct peer of a group, in its fastest mode."""
    return _fastest([r for r in rows if not _is_ours(r) and r["impl"] not in (REFERENCE, *LIMITS)])


def _limit(rows: Sequence[dict], name: str, mode: str) -> dict | None:
    return _fastest([r for r in rows if r["impl"] == name and r["mode"] == mode])


def _bandwidth(rows: Sequence[dict], mode: str) -> float | None:
    """GB/s of a copy, bytes read plus bytes written."""
    copy = _limit(rows, COPY, mode)
    return copy["bytes"] / copy["median_us"] / 1e3 if copy else None


def _time(microseconds: float | None) -> str:
    if microseconds is None:
        return ""
    if microseconds < 1e3:
        return f"{microseconds:.1f} us"
    return f"{microseconds / 1e3:.2f} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.2f} s"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}x" if value < 100 else f"{value:.0f}x"


def _derived(row: dict, rows: Sequence[dict]) -> tuple[str, str, str]:
    """Read passes, GB/s of the floor's bytes, share of the copy bandwidth."""
    read, copy = _limit(rows, READ_PASS, row["mode"]), _bandwidth(rows, row["mode"])
    if not row["median_us"]:
        return "", "", ""
    speed = row["bytes"] / row["median_us"] / 1e3
    passes = f"{row['median_us'] / read['median_us']:.2f}" if read else ""
    return passes, f"{speed:.1f}", f"{100 * speed / copy:.0f} %" if copy else ""


def overview(rows: Sequence[dict], short: bool = False) -> list[list[str]]:
    """Cells of the summary: a line per implementation of ours and group, headed by a line.

    `short`: of those that are right, only the fastest of a group.
    """
    table = [["op", "case", "ours", "mode", "median", "read passes", "of copy", "faster than", ""]]
    for (op, case), some in groups(rows).items():
        peer = best_peer(some)
        mine = [r for r in some if _is_ours(r)] or [r for r in some if r["impl"] == REFERENCE]
        if short:
            fastest = _fastest(mine)
            mine = [r for r in mine if r is fastest or (not r["ok"] and r["mode"] == "eager")]
        for row in mine:
            passes, _, share = _derived(row, some)
            cells = [op, case, row["impl"], row["mode"]]
            if not row["ok"]:
                table.append([*cells, "FAILED", "", "", row["note"], ""])
                continue
            gain = [f"{peer['impl']} ({peer['mode']})"] if peer else [""]
            gain += [_ratio(peer["median_us"] / row["median_us"] if peer else None)]
            table.append([*cells, _time(row["median_us"]), passes, share, *gain])
    return table


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """The same cells as plain text in columns, for a terminal or a log."""
    widths = [min(max(map(len, column)), 44) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def _table(cells: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + "---|" * len(cells[0]), *lines[1:]]


def markdown(result: dict[str, Any], title: str, remarks: Sequence[str] = ()) -> str:
    """Summary, then a table per op and case, then the environment."""
    rows = result["rows"]
    lines = [f"# {title}", "", *remarks, "", "## Summary", ""]
    lines += ["Ours against the fastest correct peer in its fastest mode.", ""]
    lines += _table(overview(rows))
    for (op, case), some in groups(rows).items():
        lines += ["", f"## {op}: {case}", ""]
        head = ["implementation", "mode", "median", "p10 to p90", "samples", "ours is faster by"]
        cells = [[*head, "read passes", "GB/s", "of copy", "remarks"]]
        for row in some:
            ours = _fastest([r for r in some if _is_ours(r) and r["mode"] == row["mode"]])
            other = row["ok"] and ours and not _is_ours(row) and row["impl"] not in LIMITS
            gain = row["median_us"] / ours["median_us"] if other else None
            between = f"{_time(row['p10_us'])} to {_time(row['p90_us'])}" if row["ok"] else ""
            state = _time(row["median_us"]) if row["ok"] else "not timed"
            name = f"**{row['impl']}**" if _is_ours(row) else row["impl"]
            first = [name, row["mode"], state, between, str(len(row["samples_us"])), _ratio(gain)]
            cells.append([*first, *_derived(row, some), row["note"].replace("|", "/")])
        lines += _table(cells)
    lines += ["", "## Environment", ""]
    lines += _table([["what", "value"], *([k, str(v)] for k, v in result["environment"].items())])
    return "\n".join(lines) + "\n"


# ---- pictures ------------------------------------------------------------------------------------


def draw_bars(path: Path, result: dict[str, Any], panels: Sequence[tuple[str, str]]) -> Path:
    """Bars of the (op, case) pairs, with a read pass and the floor at copy bandwidth drawn in."""
    found = groups(result["rows"])
    panels = [panel for panel in panels if panel in found]
    height = sum(0.9 + 0.24 * len(_bars(found[panel])) for panel in panels)

    def draw(figure) -> None:
        ratios = [0.9 + 0.24 * len(_bars(found[panel])) for panel in panels]
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
        for ax, panel in zip(axes, panels, strict=True):
            _draw_panel(ax, panel, found[panel])

    return save_figure(path, draw, (10.0, max(2.5, height)))


def _bars(rows: Sequence[dict]) -> list[dict]:
    """The fastest mode of each implementation: ours, peers, the reference."""
    names = list(dict.fromkeys(r["impl"] for r in rows if r["impl"] not in LIMITS))
    names.sort(key=lambda name: (not name.startswith("ours/"), name == REFERENCE))
    best = [_fastest([r for r in rows if r["impl"] == name]) for name in names]
    return [row for row in best if row]


def _draw_panel(ax, panel: tuple[str, str], rows: Sequence[dict]) -> None:
    bars = _bars(rows)
    times = [row["median_us"] / 1e3 for row in bars]
    colours = [OURS if _is_ours(r) else PLAIN if r["impl"] == REFERENCE else PEER for r in bars]
    ax.barh(range(len(bars)), times, color=colours)
    for place, (row, value) in enumerate(zip(bars, times, strict=True)):
        ax.text(value, place, f" {_time(row['median_us'])}", va="center", fontsize=7)
    labels = [r["impl"] + (f" ({r['mode']})" if r["mode"] != "eager" else "") for r in bars]
    ax.set_yticks(range(len(bars)), labels, fontsize=7)
    ax.invert_yaxis()
    mode = bars[0]["mode"] if bars else "eager"
    read, copy = _limit(rows, READ_PASS, mode), _bandwidth(rows, mode)
    marks = []
    if read:
        marks.append((read["median_us"] / 1e3, "--", "one sum()"))
    if copy and bars:
        floor = bars[0]["bytes"] / copy / 1e6
        marks.append((floor, ":", f"fewest bytes at copy speed ({copy:.0f} GB/s)"))
    for value, style, label in marks:
        ax.axvline(value, color=LIMIT, ls=style, lw=1.2, label=label)
    ax.set_xscale("log")
    if times:
        lowest = min([*times, *(value for value, _, _ in marks)])
        ax.set_xlim(lowest / 1.6, max(times) * 4)
    ax.set_xlabel("ms", fontsize=8)
    ax.tick_params(axis="x", labelsize=7)
    ax.set_title(f"{panel[0]}: {panel[1]}", fontsize=9, loc="left")
    if marks:
        corner = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.1}
        ax.legend(fontsize=6.5, frameon=False, ncols=2, **corner)


def draw_growth(path: Path, result: dict[str, Any], ops: Sequence[str], cases: Callable) -> Path:
    """Time per weight against the number of weights, a panel per op; `cases(row)` picks rows."""
    rows = [r for r in result["rows"] if r["op"] in ops and r["ok"] and cases(r)]

    def draw(figure) -> None:
        axes = figure.subplots(1, len(ops), squeeze=False, sharey=True)[0]
        for ax, op in zip(axes, ops, strict=True):
            _draw_growth(ax, op, [r for r in rows if r["op"] == op])

    return save_figure(path, draw, (4.6 * len(ops), 4.8))


def _draw_growth(ax, op: str, rows: Sequence[dict]) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    sizes = sorted({row["weights"] for row in rows})
    for name in dict.fromkeys(row["impl"] for row in rows if row["impl"] not in (REFERENCE, COPY)):
        for size in sizes:
            best = _fastest([r for r in rows if r["impl"] == name and r["weights"] == size])
            if best:
                lines.setdefault(name, []).append((size, best["median_us"] * 1e3 / size))
    others = iter(PEERS * 2)
    for name, points in lines.items():
        ours, read = name.startswith("ours/"), name == READ_PASS
        colour = OURS if ours else LIMIT if read else next(others)
        style = {"lw": 2.2} if ours else {"lw": 1.2, "ls": "--" if read else "-", "alpha": 0.9}
        if ours and name.endswith("bank"):
            style["ls"] = ":"
        ax.plot(*zip(*points, strict=True), marker="o", ms=3.5, color=colour, label=name, **style)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("weights")
    ax.set_ylabel("ns per weight")
    ax.set_title(op, fontsize=10)
    ax.grid(alpha=0.25)
    if lines:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
        ax.legend(fontsize=6.5, frameon=False, ncols=2, **below)
