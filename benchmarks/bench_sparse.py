"""Inference with packed unstructured weights on the CPU, against PyTorch's dense products.

    sparse-cocktail bench sparse                    all layers, about four minutes
    python benchmarks/bench_sparse.py --quick       the same command, small and short

Every group of rows is a layer: ours at each sparsity, and F.conv2d or F.linear with all weights;
convolutions in both layouts of x. What counts is the fastest dense time over the fastest of ours.
The same layer converted to oneDNN's own tensors is given beside, in the same unit.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from sparse_cocktail.files import read_json
from sparse_cocktail.ops import routes
from sparse_cocktail.plots import save_figure

from groups_sparse import LAYOUTS, ONEDNN, SparseInputs  # isort: skip - neighbours, not packages
from groups_sparse import layers, positions, sparse_group  # isort: skip
from machine import cache_bytes  # isort: skip
from output import LIMIT, PEERS, aligned, groups  # isort: skip
from record import Record, failures, place_of, report, title  # isort: skip
from timing import Plan, broken, measure, runner  # isort: skip

__all__ = ["choices", "failures", "redraw", "run", "save", "summary"]

SPARSITIES = (0.75, 0.87, 0.95)
COLUMNS = (ONEDNN, *map(str, SPARSITIES))  # of the ratios
LEGEND = {"fontsize": 8, "frameon": False, "ncols": 5}
REMARKS = (
    "Inference in fp32: layers of ResNet-50 and linear layers, random values, the smallest weights "
    "pruned. Ours packs the kept weights beforehand (`sparse_pack`, not timed); dense is F.conv2d "
    "or F.linear with all weights. The implementations of a table are timed in turn, each sample "
    "on other tensors than the one before, of two to four sets. A result is timed when its error "
    "against float64 (parts of large layers) is at most twice that of PyTorch in the same layout.",
    "",
    "## Times faster than dense",
    "",
    "The fastest dense time (contiguous or channels_last) over the fastest of ours, by sparsity; "
    "and over that of the dense layer converted by torch.utils.mkldnn, with its input in oneDNN's "
    "own layout: no drop-in, but what PyTorch can do.",
    "",
)


def run(
    out: Path | None = None,
    quick: bool = False,
    threads: int | None = None,
    batch: int | None = None,
    pictures: bool = True,
    tell: Callable[[str], None] = print,
) -> tuple[dict[str, Any], list[Path]]:
    """Measure; write cpu.json, cpu.md and cpu.png into a folder.

    Args:
        out: folder (default: benchmarks/results/sparse).
        quick: small layers, few samples.
        batch: images of convolutions, rows of linear layers (default: 1 and 8; 1, 8, 64, 197).

    Returns:
        The benchmark's content and the files written.
    """
    place = place_of("bench sparse", "cpu", threads)
    plan = Plan(seconds=0.4, many=10, most=40)
    if quick:
        plan = Plan(seconds=0.05, few=3, many=5, most=10, rounds=3)
    record = Record("sparse", place, out, lambda result: ratios(result["rows"]))
    clock, cache, inputs = runner(place), 0 if quick else cache_bytes(), None
    for network, layer in layers(quick, batch):
        conv = len(layer.input) == 4
        case = f"{network}, {layer.name}" + (f", batch {layer.input[0]}" if conv else "")
        shape = {"network": network, "weight_shape": layer.weight, "positions": positions(layer)}
        try:
            inputs = SparseInputs(layer, SPARSITIES, cache, case, inputs)
            group, facts = sparse_group(inputs, SPARSITIES)
        except Exception as error:  # noqa: BLE001 - such as no memory: the other layers go on
            op = "sparse_conv2d" if conv else "sparse_linear"
            record.add([{**broken(op, case, error), **shape}])
            continue
        tell(case)
        rows = measure(group, inputs, plan, clock)
        record.add([{**row, **shape, **facts[row["impl"]]} for row in rows])
    record.save()
    return record.result, redraw(record.path, pictures)


# ---- ratios --------------------------------------------------------------------------------------


def _timed(rows: Iterable[dict], **wanted) -> float | None:
    """The shortest median of the rows that have these values."""
    found = [r for r in rows if r["ok"] and all(r.get(k) == v for k, v in wanted.items())]
    return min((row["median_us"] for row in found), default=None)


def _kind(row: dict) -> str:
    """Layers whose geometric mean is taken together."""
    kernel = row["weight_shape"][2:]
    size = row["case"].rpartition(", ")[2]
    return f"{'x'.join(map(str, kernel))} convolutions, {size}" if kernel else f"linear, {size}"


def ratios(rows: Sequence[dict]) -> list[dict[str, Any]]:
    """Per layer, and as geometric means: how many times faster than dense, by sparsity.

    A layer counts in the means of its kind and of all where ours and dense were timed.
    """
    lines = []
    for (op, case), some in groups(rows).items():
        plain = [_timed(some, sparsity=None, layout=layout) for layout in LAYOUTS]
        dense = min((time for time in plain if time), default=None)
        if dense is None:
            continue
        times = {ONEDNN: _timed(some, sparsity=None, layout=ONEDNN)}
        times |= {str(s): _timed(some, sparsity=s) for s in SPARSITIES}
        gains = {key: round(dense / time, 3) for key, time in times.items() if time}
        lines.append({"op": op, "case": case, "kind": _kind(some[0]), "dense_us": dense, **gains})
    kinds = dict.fromkeys(line["kind"] for line in lines)
    means = [_mean(kind, [line for line in lines if line["kind"] == kind]) for kind in kinds]
    for op in dict.fromkeys(line["op"] for line in lines):
        means.append(_mean(f"all {op}", [line for line in lines if line["op"] == op]))
    return [*means, *lines]


def _mean(name: str, lines: Sequence[dict]) -> dict[str, Any]:
    mean = {"op": "geometric mean", "case": f"{name} ({len(lines)} layers)"}
    for key in COLUMNS:
        values = [line[key] for line in lines if key in line]
        if values:
            mean[key] = round(statistics.geometric_mean(values), 3)
    return mean


def choices(rows: Sequence[dict]) -> dict[str, list[float]]:
    """By bucket of `ops.routes`, dense times over ours.

    Of a convolution, the smaller ratio of the two layouts: what is chosen pays in both.
    """
    found: dict[str, list[float]] = {}
    for (op, _), some in groups(rows).items():
        for sparsity in SPARSITIES:
            gains = []
            for layout in LAYOUTS:
                dense = _timed(some, sparsity=None, layout=layout)
                ours = _timed(some, sparsity=sparsity, layout=layout)
                gains += [dense / ours] if dense and ours else []
            if gains:
                shape = torch.Size(some[0]["weight_shape"])
                sizes = some[0]["positions"], shape, 1 - sparsity
                found.setdefault(routes.sparse_bucket(op, *sizes), []).append(min(gains))
    return found


def save(result: dict[str, Any]) -> Path:
    """Write the table of `ops.routes` for the CPU of a result."""
    facts = result["environment"]
    card = f"cpu-{facts['cpu_level'] or 'torch'}"
    return routes.save(card, facts, choices(result["rows"]), routes.SPARSE_ROUTES)


# ---- files ---------------------------------------------------------------------------------------


def table_of_ratios(lines: Sequence[dict]) -> list[list[str]]:
    """Cells of the ratios, headed by a line."""
    heads = (f"ours, {100 * s:.0f} % zeros" for s in SPARSITIES)
    cells = [["op", "case", "dense", "dense in oneDNN's layout", *heads]]
    for line in lines:
        dense = f"{line['dense_us'] / 1e3:.3g} ms" if "dense_us" in line else ""
        gains = [f"{line[k]:.2f}x" if k in line else "" for k in COLUMNS]
        cells.append([line["op"], line["case"], dense, *gains])
    return cells


def summary(result: dict[str, Any]) -> str:
    """The ratios as text in columns."""
    return aligned(table_of_ratios(ratios(result["rows"])))


def redraw(path: Path, pictures: bool = True) -> list[Path]:
    """Markdown and a picture beside a benchmark JSON, from its rows alone."""
    result = read_json(path)
    lines, subject = ratios(result["rows"]), "Packed sparse inference"
    made = report(path, result, subject, REMARKS, table_of_ratios(lines))
    panels: dict[str, list[dict]] = {}
    for line in lines:
        if "kind" in line:
            conv = line["op"] == "sparse_conv2d"
            name = line["kind"].rpartition(", ")[2] if conv else "linear layers"
            panels.setdefault(f"convolutions, {name}" if conv else name, []).append(line)
    if pictures and panels:
        head = title(subject, result["environment"])
        made.append(_draw(path.with_suffix(".png"), head, panels))
    return made


def _draw(path: Path, head: str, panels: dict[str, list[dict]]) -> Path:
    """Bars per layer and sparsity, the line of equal speed drawn in."""

    def draw(figure) -> None:
        figure.suptitle(head, fontsize=11)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (name, lines) in zip(axes, panels.items(), strict=True):
            _draw_panel(ax, name, lines)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", **LEGEND)

    most = max(map(len, panels.values()))
    return save_figure(path, draw, (5.4 * len(panels), 1.2 + 0.36 * most))


def _draw_panel(ax, name: str, lines: Sequence[dict]) -> None:
    for turn, (sparsity, colour) in enumerate(zip(SPARSITIES, PEERS, strict=False)):
        shown = [(i, line[str(sparsity)]) for i, line in enumerate(lines) if str(sparsity) in line]
        places = [i + 0.27 * (turn - 1) for i, _ in shown]
        gains = [gain for _, gain in shown]
        ax.barh(places, gains, 0.25, color=colour, label=f"ours, {100 * sparsity:.0f} % zeros")
        for place, gain in zip(places, gains, strict=True):
            ax.text(gain, place, f" {gain:.1f}x", va="center", fontsize=5.5)
    other = [(line[ONEDNN], i) for i, line in enumerate(lines) if ONEDNN in line]
    if other:
        values, places = zip(*other, strict=True)
        label = "dense in oneDNN's layout"
        ax.plot(values, places, ls="", marker="|", ms=16, mew=1.4, color="black", label=label)
    ax.axvline(1, color=LIMIT, lw=1.2, label="dense")
    labels = [line["case"].partition(", ")[2].rpartition(", ")[0] for line in lines]
    if lines[0]["op"] == "sparse_linear":
        labels = [line["case"].partition(", ")[2] for line in lines]
    ax.set_yticks(range(len(lines)), labels, fontsize=7)
    ax.set_ylim(len(lines) - 0.4, -0.6)
    ax.set_xlim(0, ax.get_xlim()[1] * 1.08)
    ax.set_xlabel("times faster than dense", fontsize=8)
    ax.tick_params(axis="x", labelsize=7)
    ax.set_title(name, fontsize=9, loc="left")


if __name__ == "__main__":
    from sparse_cocktail.cli import main

    sys.argv[1:1] = ["bench", "sparse"]
    main()
