"""Masked layers against plain torch with a dense mask, and against the layer without a mask.

    sparse-cocktail bench masked                    the CPU; --device cuda for a GPU
    python benchmarks/bench_masked.py --quick       the same command, small and short

Every group of rows (a layer and its input, dtypes, forward or forward + backward) has ours as
dispatched, as a module and by every route, the layer without a mask, and the usual ways to write a
mask: `w * m` and torch.nn.utils.prune. The group `network` is a training step of a ResNet.
What counts are ratios to the layer without a mask, in one run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparse_cocktail.files import read_json
from sparse_cocktail.ops import routes
from sparse_cocktail.patterns import parse

from groups_masked import OURS, layer_group  # isort: skip - neighbours, not packages
from groups_networks import PREMASKED, Networks, loop_group, network_group  # isort: skip
from machine import cache_bytes  # isort: skip
from output import aligned, draw_bars, groups  # isort: skip
from peers_masked import DENSE, PRUNE  # isort: skip
from record import Record, known, place_of, report  # isort: skip
from record import failures as all_failures  # isort: skip
from shapes import LAYERS, Layer, LayerInputs, layers_of  # isort: skip
from timing import Plan, broken, measure, runner  # isort: skip

CASES = ("network", *(name for name in LAYERS if name != "small"))
PATTERN = "unstructured-0.8"  # of layers
PATTERNS = (PATTERN, "2:4", "channel-0.5")  # of the network
NETWORKS = {  # and their images
    "cuda": [("resnet50", (256, 3, 224, 224))],
    "cpu": [
        ("resnet8", (64, 1, 8, 8)),
        ("resnet18", (32, 3, 32, 32)),
        ("resnet50", (8, 3, 64, 64)),
        ("resnet50", (4, 3, 224, 224)),
    ],
    "quick": [("resnet8", (4, 3, 16, 16))],
}
PASSES = {"forward": False, "train": True}
DTYPES = {  # (x, weight)
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16, fp32 weights": (torch.bfloat16, torch.float32),
}
REMARKS = (
    "Layer shapes of real networks, random values, 80 % of each weight pruned by magnitude; "
    "convolutions in channels_last. The implementations of a table are timed in turn; on the CPU "
    "each sample takes other tensors, up to eight sets of them, on a GPU the L2 was overwritten. A "
    "result is timed when its error against float64 (parts of large layers) is at most twice that "
    "of plain torch in the same dtypes, and pruned weights get a gradient of exactly zero.",
    "",
    "`torch/dense` is the layer without a mask: not a peer but the goal. `w*m`: the faster of a "
    "bool and a floating-point mask. `premasked`: all masked weights of a network in one call, and "
    "kept for the backward; so the engine trains networks of up to 4 MB. {memory}",
)
MEMORY = {
    "cpu": "Memory: bytes that a forward keeps for its backward, parameters not counted.",
    "cuda": "Memory: bytes that a training step needs at its peak, over tensors it was given.",
}


def default_dtypes(gpu: bool) -> list[str]:
    """bf16 on a GPU; fp32 on the CPU, and bf16 where its products are instructions."""
    if gpu:
        return ["bf16, fp32 weights", "bf16"]
    return ["fp32", "bf16"] if torch.cpu._is_avx512_bf16_supported() else ["fp32"]


class _Run:
    """What the parts of a run share."""

    def __init__(self, record: Record, quick: bool, tell: Callable) -> None:
        self.record, self.place, self.quick, self.tell = record, record.place, quick, tell
        place = record.place
        self.plan = Plan(seconds=0.5 if place.type == "cpu" else 0.2, many=10, most=40)
        if quick:
            self.plan = Plan(seconds=0.05, few=3, many=5, most=10, rounds=3)
        self.clock, self.cache = runner(place), 0 if quick else cache_bytes()
        record.environment["memory"] = MEMORY[place.type]

    def add(self, op: str, inputs: Any, make: Callable, extra: dict[str, Any]) -> None:
        """Measure one group and write what there is."""
        try:
            group, memory = make()
        except Exception as error:  # noqa: BLE001 - such as no memory: the other groups go on
            self.record.add([{**broken(op, inputs.case.name, error), **extra}])
            return
        self.tell(f"{inputs.case.name}: {group.op} {group.setting}")
        rows = measure(group, inputs, self.plan, self.clock)
        for row in rows:
            row |= extra
            row["memory_bytes"] = None
            if row["ok"] and row["impl"] in memory:
                row["memory_bytes"] = memory[row["impl"]]()
        self.record.add(rows)


def _layers(run: _Run, network: str, layers: list[Layer], dtypes: list[str], passes) -> None:
    pattern = parse(PATTERN)
    for layer in layers:
        images = f", {layer.input[0]} images" if len(layer.input) == 4 else ""
        name = f"{network}, {layer.name}{images}"
        op = "masked_conv2d" if images else "masked_linear"
        for dtype in dtypes:
            try:
                inputs = LayerInputs(layer, run.place, DTYPES[dtype], pattern, run.cache, name)
            except torch.OutOfMemoryError:
                run.tell(f"{name}: left out, it does not fit into the memory of this GPU")
                continue
            outputs = math.prod(layer.output) // layer.weight[0]
            positions = [math.prod(layer.input) // layer.weight[1], outputs]
            for what in passes:
                extra = {"network": network, "count": layer.count, "pass": what, "dtype": dtype}
                extra |= {"weight_shape": layer.weight, "positions": positions}
                extra["rows"] = layer.input[0] if layer.weight[2:] == () else None
                setting = f"{dtype}, {'forward' if what == 'forward' else 'forward + backward'}"

                def make(inputs=inputs, what=what, setting=setting):
                    return layer_group(inputs, PASSES[what], setting)

                run.add(op, inputs, make, extra)


def _network(run: _Run, batch: int | None, passes: Sequence[str]) -> None:
    if "train" not in passes:
        return
    kind = "quick" if run.quick else run.place.type
    for name, shape in NETWORKS[kind]:
        networks = Networks(name, (batch or shape[0], *shape[1:]), run.place)
        extra = {"network": name, "count": 1, "pass": "train", "dtype": "", "rows": None}
        run.add("network", networks, partial(loop_group, networks, PATTERNS), extra)
        for pattern in PATTERNS:
            for whole in (False, True):
                make = partial(network_group, networks, pattern, whole)
                run.add("network", networks, make, extra)


def run(
    out: Path | None = None,
    device: str = "cpu",
    quick: bool = False,
    threads: int | None = None,
    cases: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    passes: Sequence[str] = (),
    batch: int | None = None,
    pictures: bool = True,
    tell: Callable[[str], None] = print,
) -> tuple[dict[str, Any], list[Path]]:
    """Measure; write NAME.json, NAME.md and a picture into a folder after each group.

    Args:
        out: folder (default: benchmarks/results/masked). NAME is cpu or that of the GPU.
        quick: small layers, a small network, few samples.
        cases: network, resnet50, resnet50-64 (on a GPU only if named), vit-b16, llama-7b (default:
            all), small.
        dtypes: names of DTYPES; passes: forward, train (forward + backward).
        batch: images of convolutions and of the network.

    Returns:
        The benchmark's content and the files written.
    """
    what = "bench masked"
    place = place_of(what, device, threads)
    usual = ["network", "small"] if quick else CASES
    if place.type == "cuda" and not quick:  # few positions are a matter of the CPU's kernels
        usual = [case for case in CASES if case != "resnet50-64"]
    cases = known(what, "case", cases, (*CASES, "small")) or usual
    dtypes = known(what, "dtype", dtypes, list(DTYPES)) or default_dtypes(place.type == "cuda")
    passes = known(what, "pass", passes, list(PASSES)) or list(PASSES)
    record = Record("masked", place, out, lambda result: ratios(result["rows"]))
    state = _Run(record, quick, tell)
    for case in cases:
        if case == "network":
            _network(state, batch, passes)
        else:
            layers = layers_of(case, place.type == "cuda", batch)
            _layers(state, case, layers, list(dtypes), passes)
    record.save()
    return record.result, redraw(record.path, pictures)


# ---- ratios --------------------------------------------------------------------------------------


def ratios(rows: Sequence[dict]) -> list[dict[str, Any]]:
    """Per group and mode, times in units of the layer without a mask, and bytes of memory.

    `dense_us` is that unit, `ours` the op (the module in a network), `product` the faster `w*m`.
    Convolutions of a whole network are added up, as often as it has them.
    """
    table = []
    for (op, case), some in groups(rows).items():
        for mode in dict.fromkeys(row["mode"] for row in some):
            found = {r["impl"]: r for r in some if r["mode"] == mode and r["ok"]}
            table.append(_ratio(op, case, mode, found))
    return [line for line in [*_totals(rows), *table] if line]


def _ratio(op: str, case: str, mode: str, found: dict[str, dict]) -> dict[str, Any] | None:
    dense, ours = found.get(DENSE), next((found[n] for n in OURS if n in found), None)
    if not dense or not ours:
        return None
    products = [row for name, row in found.items() if name.startswith("torch/w*m")]
    product = min(products, key=lambda row: row["median_us"], default=None)
    parts = {"ours": ours, "module": found.get(OURS[1]), "product": product}
    parts["prune"], parts["premasked"] = found.get(PRUNE), found.get(PREMASKED)
    line = {"op": op, "case": case, "mode": mode, "dense_us": dense["median_us"]}
    for name, row in parts.items():
        line[name] = round(row["median_us"] / dense["median_us"], 3) if row else None
    for name, row in {"dense": dense, **parts}.items():
        line[f"{name}_bytes"] = row.get("memory_bytes") if row else None
    return line


def _totals(rows: Sequence[dict]) -> list[dict[str, Any] | None]:
    """A line per network, dtype, pass and mode: the sum over layers of time times count."""
    keys = ("op", "network", "rows", "dtype", "pass", "mode")
    sums: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        if row["op"] != "network" and row["impl"].startswith(("ours/", "torch/")):
            key = tuple(row.get(k) for k in keys)
            sums.setdefault(key, {}).setdefault(row["impl"], []).append(row)
    lines = []
    for (op, network, count, dtype, what, mode), impls in sums.items():
        most = max(map(len, impls.values()))
        if most < 2:
            continue
        found = {}
        for name, some in impls.items():
            if len(some) == most and all(row["ok"] for row in some):
                found[name] = {
                    "median_us": sum(r["median_us"] * r["count"] for r in some),
                    "memory_bytes": _sum(r.get("memory_bytes") for r in some),
                }
        layers = sum(row["count"] for row in impls.get(DENSE, ()))
        size = f", {count} rows" if count else ""
        case = f"{network}, its {layers} layers{size}, {dtype}, {what}"
        lines.append(_ratio(f"{op}, sum", case, mode, found))
    return lines


def _sum(values) -> int | None:
    values = list(values)
    return None if None in values else sum(values)


def choices(rows: Sequence[dict]) -> dict[str, list[float]]:
    """By bucket of `ops.routes`, times by layer over times fused, where both are correct.

    The forward decides for the layer, forward + backward for both gradients; each mode counts.
    """
    found: dict[str, list[float]] = {}
    for (op, _), some in groups(rows).items():
        first = some[0]
        wrong = [r for r in some if _is_route(r) and not r["ok"] and r["error_bound"]]
        if "weight_shape" not in first or wrong:
            continue
        kind, shape = op.removeprefix("masked_"), torch.Size(first["weight_shape"])
        dtype, (x_rows, y_rows) = DTYPES[first["dtype"]][0], first["positions"]
        keys = [routes.bucket(kind, dtype, x_rows, shape)]
        if first["pass"] == "train":  # a gradient's first argument is that of the output
            grads = (f"{kind}_input_grad", f"{kind}_weight_grad")
            keys = [routes.bucket(grad, dtype, y_rows, shape) for grad in grads]
        for mode in dict.fromkeys(row["mode"] for row in some):
            times = {r["impl"]: r["median_us"] for r in some if r["mode"] == mode and _is_route(r)}
            fused, layer = (times.get(f"ours/route {name}") for name in routes.ROUTES)
            for key in keys if fused and layer else ():
                found.setdefault(key, []).append(layer / fused)
    return found


def _is_route(row: dict) -> bool:
    return row["impl"].startswith("ours/route")


def save(result: dict[str, Any]) -> Path:
    """Write the table of `ops.routes` for the device of a result."""
    facts = result["environment"]
    card = facts.get("gpu") or f"cpu-{facts['cpu_level'] or 'torch'}"
    return routes.save(card, facts, choices(result["rows"]), routes.ROUTES)


def table_of_ratios(lines: Sequence[dict]) -> list[list[str]]:
    """Cells of the ratios, headed by a line."""
    head = ["op", "case", "mode", "dense", "ours", "module", "premasked", "w*m", "prune"]
    head.append("faster than w*m")
    cells = [[*head, "memory: dense", "ours", "w*m"]]
    for line in lines:
        values = [line[name] for name in ("ours", "module", "premasked", "product", "prune")]
        against = line["product"] or line["prune"]
        gain = f"{against / line['ours']:.2f}x" if against else ""
        memory = [line["dense_bytes"], line["ours_bytes"]]
        memory.append(line["product_bytes"] or line["prune_bytes"])
        cells.append(
            [
                *(line[name] for name in ("op", "case", "mode")),
                f"{line['dense_us'] / 1e3:.3g} ms",
                *("" if v is None else f"{v:.2f}x" for v in values),
                gain,
                *("" if m is None else f"{m / 2**20:.1f} MB" for m in memory),
            ]
        )
    return cells


def summary(result: dict[str, Any]) -> str:
    """The ratios as text in columns."""
    return aligned(table_of_ratios(result["ratios"]))


def redraw(path: Path, pictures: bool = True) -> list[Path]:
    """Markdown and a picture beside a benchmark JSON, from its rows alone."""
    result = read_json(path)
    remarks = [remark.format(memory=result["environment"]["memory"]) for remark in REMARKS]
    remarks += ["", "## In units of the layer without a mask", ""]
    cells = table_of_ratios(ratios(result["rows"]))
    made = report(path, result, "Masked layers", remarks, cells)
    if pictures and result["rows"]:
        made.append(draw_bars(path.with_suffix(".png"), result, _panels(result)))
    return made


def _panels(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Training steps: of each network with each pattern, and the slowest layer of each network."""
    found = [line for line in ratios(result["rows"]) if "sum" not in line["op"]]
    picked = [line for line in found if line["case"].endswith("with SGD")]
    slowest: dict[str, dict] = {}
    for line in found:
        if line["op"] != "network" and line["case"].endswith("backward"):
            key = line["case"].partition(",")[0]
            slowest[key] = max(line, slowest.get(key, line), key=lambda each: each["dense_us"])
    return [(line["op"], line["case"]) for line in (*picked, *slowest.values())][:8]


def failures(result: dict[str, Any]) -> list[dict]:
    """Rows of ours that were wrong or broke; a route may refuse what it cannot compute."""
    return [r for r in all_failures(result) if r["error_bound"] or not _is_route(r)]


if __name__ == "__main__":
    from sparse_cocktail.cli import main

    sys.argv[1:1] = ["bench", "masked"]
    main()
