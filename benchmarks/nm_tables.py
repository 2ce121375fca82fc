"""Tables and pictures of `bench_nm.py`, from the rows of its JSON alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparse_cocktail.files import read_json
from sparse_cocktail.plots import save_figure

from output import LIMIT, OURS, PEERS, aligned, groups  # isort: skip - neighbours
from peers_nm import DENSE  # isort: skip
from record import report, title  # isort: skip

__all__ = ["ratios", "redraw", "summary"]

SPARSE_PEAK = {  # TFLOP/s of 2:4 in 16 bits, from the data sheets; the first name that fits counts
    "H100 PCIe": 1513.0,
    "H100": 1979.0,
    "H200": 1979.0,
    "A100": 624.0,
}
MOST_PANELS = 8  # layers in a picture
MODULE = "ours/NMLinear"  # the route it takes is among the others already
KEYS = ("network", "layer", "pattern", "dtype", "memory", "mode")
REMARKS = (
    "Layer shapes of real networks, random values, the largest magnitudes of each group kept. The "
    "implementations of a table are timed in turn. Cold: each sample takes other tensors than the "
    "one before, or on a GPU the L2 was overwritten. Warm: all take the same, from the caches. "
    "What is compressed is timed when it equals the reference in every bit, a product when its "
    "error against float64 (parts of large layers) is at most twice that of the dense product in "
    "the same dtype on the same weight. On the CPU, results get memory that was touched before; in "
    "new memory each of them, as any copy, would pay page faults besides.",
    "",
    "Read passes: the time over that of `torch/sum`, one read of the same weights. GB/s: the "
    "fewest bytes that the op must move, over the time; of copy: its share of what `torch/copy` "
    "moves (bytes read plus bytes written). Modes: eager, or graph (replay of a CUDA graph).",
    "",
    "## Products, in units of dense",
    "",
    "Times faster than F.linear with the same weight and its zeros; `best`: the fastest of ours. "
    "TFLOP/s count the dense product. GB/s count x, y and the compressed weight. Host: what the "
    "host needs for a call, ours and dense.",
)


def peak(facts: dict[str, Any], dtype: str) -> float | None:
    """TFLOP/s of the card's sparse tensor cores, where it is known."""
    if dtype not in ("bf16", "fp16"):
        return None
    return next((p for name, p in SPARSE_PEAK.items() if name in facts.get("gpu", "")), None)


def ratios(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Per group of products and mode: the time of dense, and how many times faster each one is.

    `best` is the fastest of ours, `peer` the fastest that is not ours, dense left out.
    """
    rows, lines = result["rows"], []
    for (op, case), some in groups(rows).items():
        for mode in dict.fromkeys(row["mode"] for row in some) if op == "nm_linear" else ():
            timed = {r["impl"]: r for r in some if r["mode"] == mode and r["ok"]}
            if DENSE not in timed:
                continue
            dense, kept = timed[DENSE]["median_us"], _of(timed, ours=True)
            gains = {n: round(dense / r["median_us"], 3) for n, r in timed.items() if n != DENSE}
            line = {"case": case, **{key: some[0][key] for key in KEYS[:5]}, "mode": mode}
            line |= {"rows": some[0]["rows"], "dense_us": dense, "gains": gains}
            line |= {"best": kept, "peer": _of(timed, ours=False)}
            if kept:
                line |= _rates(timed[kept], peak(result["environment"], line["dtype"]))
            hosts = [timed[name].get("host_us") for name in (kept, DENSE) if name in timed]
            lines.append({**line, "host_us": hosts if len(hosts) == 2 and all(hosts) else None})
    return lines


def _of(timed: dict[str, dict], ours: bool) -> str | None:
    names = [n for n in timed if n.startswith("ours/") == ours and n not in (DENSE, MODULE)]
    return min(names, key=lambda name: timed[name]["median_us"], default=None)


def _rates(row: dict, most: float | None) -> dict[str, Any]:
    tera = row["flops"] / row["median_us"] / 1e6
    share = round(100 * tera / most, 1) if most else None
    speed = round(row["bytes"] / row["median_us"] / 1e3, 1)
    return {"tflops": round(tera, 4), "peak_percent": share, "gb_per_s": speed}


def _sheets(lines: Iterable[dict]) -> dict[tuple, list[dict]]:
    """Lines of one layer, pattern, dtype and mode, by these."""
    found: dict[tuple, list[dict]] = {}
    for line in lines:
        found.setdefault(tuple(line[key] for key in KEYS), []).append(line)
    return found


def _time(microseconds: float) -> str:
    return f"{microseconds:.1f} us" if microseconds < 1e3 else f"{microseconds / 1e3:.2f} ms"


def _short(name: str | None) -> str:
    return (name or "").removeprefix("ours/")


def _gain(line: dict, name: str | None) -> str:
    return f"{line['gains'][name]:.2f}x" if name in line["gains"] else ""


def overview(lines: Sequence[dict]) -> list[list[str]]:
    """Cells of the summary: a line per group and mode."""
    cells = [["case", "mode", "dense", "best of ours", "", "fastest of the others", ""]]
    for line in lines:
        best, peer = line["best"], line["peer"]
        first = [line["case"], line["mode"], _time(line["dense_us"]), _short(best)]
        cells.append([*first, _gain(line, best), peer or "", _gain(line, peer)])
    return cells


def summary(result: dict[str, Any]) -> str:
    """The products as text in columns."""
    return aligned(overview(ratios(result)))


def _sheet(lines: Sequence[dict]) -> list[list[str]]:
    """Cells of one layer: a line per number of rows."""
    names = list(dict.fromkeys(name for line in lines for name in line["gains"]))
    head = ["rows", "dense", *map(_short, names), "best", "TFLOP/s", "of sparse peak", "GB/s"]
    cells = [[*head, "host"]]
    for line in lines:
        tera, share = line.get("tflops"), line.get("peak_percent")
        rates = [f"{tera:.3g}" if tera else "", f"{share:.0f} %" if share else ""]
        rates.append(f"{line['gb_per_s']:.0f}" if tera else "")
        hosts = " / ".join(map(_time, line["host_us"] or ()))
        values = [_gain(line, name) for name in names]
        first = [str(line["rows"]), _time(line["dense_us"]), *values, _short(line["best"])]
        cells.append([*first, *rates, hosts])
    used = [i for i, column in enumerate(zip(*cells[1:], strict=True)) if any(column)]
    return [[row[i] for i in used] for row in cells]


def _table(cells: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + "---|" * len(cells[0]), *lines[1:]]


def redraw(path: Path, pictures: bool = True) -> list[Path]:
    """Markdown and a picture beside a benchmark JSON."""
    result = read_json(path)
    lines, subject = ratios(result), "N:M weights"
    remarks = list(REMARKS)
    for key, some in _sheets(lines).items():
        remarks += ["", f"### {', '.join(key)}", "", *_table(_sheet(some))]
    if absent := _absent(result["rows"]):
        remarks += ["", "Not measured here:", "", *(f"* {text}" for text in absent)]
    compressed = [row for row in result["rows"] if row["op"] != "nm_linear"]
    heads = ("\n## Summary\n", "\n## Compressing, decompressing, packing\n")
    shown = {**result, "rows": compressed}
    made = report(path, shown, subject, remarks, change=lambda text: text.replace(*heads))
    if pictures and lines:
        cold = [line for line in lines if line["memory"] == "cold"]
        head = title(subject, result["environment"])
        made.append(_draw(path.with_suffix(".png"), head, _sheets(cold)))
    return made


def _absent(rows: Sequence[dict]) -> list[str]:
    """What products failed, once per reason."""
    failed = [row for row in rows if row["op"] == "nm_linear" and not row["ok"]]
    return list(dict.fromkeys(f"{row['impl']}: {row['note']}".replace("|", "/") for row in failed))


# ---- the picture ---------------------------------------------------------------------------------


def _draw(path: Path, head: str, sheets: dict[tuple, list[dict]]) -> Path:
    """Times faster than dense against rows: layers below each other, patterns and dtypes beside."""
    down = list(dict.fromkeys(key[:2] for key in sheets))[:MOST_PANELS]
    across = list(dict.fromkeys(key[2:] for key in sheets))
    names = list(dict.fromkeys(n for lines in sheets.values() for e in lines for n in e["gains"]))
    names = [name for name in names if name != MODULE]
    ours = [name for name in names if name.startswith("ours/")]
    colours = dict(zip(ours, (OURS, "#d55e00", "#009e73", "#cc79a7") * 8, strict=False))
    others = [name for name in names if name not in colours]
    colours |= dict(zip(others, PEERS * 8, strict=False))

    def draw(figure) -> None:
        figure.suptitle(head, fontsize=11)
        shape = (len(down), len(across))
        axes = figure.subplots(*shape, squeeze=False, sharex=True, sharey="row")
        for i, layer in enumerate(down):
            for j, kind in enumerate(across):
                lines = sheets.get((*layer, *kind), [])
                _draw_panel(axes[i, j], lines, colours)
                axes[i, j].set_title(f"{', '.join(layer)}: {', '.join(kind)}", fontsize=7)
        for ax in axes[-1]:
            ax.set_xlabel("rows of x", fontsize=8)
        for ax in axes[:, 0]:
            ax.set_ylabel("times faster than dense", fontsize=7)
        handles = {}
        for ax in axes.flat:
            handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        below = {"loc": "outside lower center", "ncols": 5, "fontsize": 8, "frameon": False}
        figure.legend(handles.values(), handles.keys(), **below)

    return save_figure(path, draw, (3.4 * len(across), 0.9 + 2.0 * len(down)))


def _draw_panel(ax, lines: Sequence[dict], colours: dict[str, str]) -> None:
    for name, colour in colours.items():
        points = [(e["rows"], e["gains"][name]) for e in lines if name in e["gains"]]
        if points:
            ours = name.startswith("ours/")
            style = {"lw": 1.8 if ours else 1.0, "ls": "-" if ours else "--", "ms": 3}
            ax.plot(*zip(*points, strict=True), marker="o", color=colour, label=name, **style)
    ax.axhline(1, color=LIMIT, lw=1.0, label="dense")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.tick_params(labelsize=6, which="both")
    ax.grid(alpha=0.25, which="both")
