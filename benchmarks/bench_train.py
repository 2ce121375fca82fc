"""What a co-training run costs: the engine's optimizer steps against plain steps of the network.

    sparse-cocktail bench train                     the CPU; --device cuda for a GPU
    python benchmarks/bench_train.py --quick        the same command, a tiny network

For each network a real `Trainer` with method cocktail stands in pruning stage 5 of 10. Timed are
its six steps from one unstructured step to the next, with and without the field `pair_batches`,
each kind of step alone, the mask steps of a whole run and the switch between subnets. What counts
are ratios to as many steps of plain PyTorch on the dense network, in one run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparse_cocktail.config import read_recipe
from sparse_cocktail.files import read_json
from sparse_cocktail.plots import save_figure

from groups_train import ENGINE, FIXED, PERIOD, TURNS, Bench, Training  # isort: skip - neighbours
from output import OURS, PEER, aligned, groups  # isort: skip
from peers_masked import DENSE, PRUNE  # isort: skip
from record import Record, failures, known, place_of, report  # isort: skip
from timing import Group, Plan, broken, measure, runner  # isort: skip

__all__ = ["failures", "redraw", "run", "summary"]

NETWORKS = {  # and a batch of images
    "cuda": {"resnet50": (256, 3, 224, 224), "resnet18": (128, 3, 32, 32)},
    "cpu": {"resnet18": (32, 3, 32, 32), "resnet50": (4, 3, 224, 224)},
    "quick": {"resnet8": (4, 3, 16, 16)},
}
RECIPES = {  # whose stages the mask steps are a share of, and its training images
    "resnet50": ("imagenet", 1_281_167),
    "resnet18": ("cifar10", 47_500),
    "resnet8": ("digits", 1_280),
}
PAIRS = {"pair_batches": True, "own batches": False}
REMARKS = (
    "Stage 5 of 10 of method cocktail: subnets with 33 % of the weights, with 59 % of the channels "
    "and 2:4; random images and weights, channels_last, {precision}. The learning rate is 0, so "
    "that every sample finds the same weights; momentum, weight decay and what freezes pruned "
    "weights are computed. A result is timed when losses and gradients of five weights have an "
    "error at most twice that of PyTorch with torch.nn.utils.prune, against the same steps in "
    "{wide} by the definition of every op.",
    "",
    "`torch/dense`: as many plain steps of the dense network, the goal. `prune`: the same steps "
    "with torch.nn.utils.prune, on copies of the network that are never switched. A period is six "
    "steps: dense, unstructured, dense, channel, dense, N:M. With `pair_batches` a sparse step is "
    "taught by the dense step before it, on its batch; with own batches by a forward more. "
    "{memory}",
    "",
    "Share: of a period, what the method takes over as many dense steps, mask steps included; of "
    "a mask step, its part of a stage of the network's recipe in dense steps; of a switch, its "
    "part of a dense step.",
)
FACTS = {
    "cpu": {
        "precision": "fp32",
        "wide": "float64",
        "memory": "Memory: bytes that a step keeps for its backward, parameters not counted.",
    },
    "cuda": {
        "precision": "bf16 autocast",
        "wide": "float32",
        "memory": "Memory: bytes that steps need at their peak, over what was there before. The "
        "engine takes cuDNN's algorithms that repeat their bits, PyTorch its defaults; "
        "`deterministic` is the dense network with the former.",
    },
}


def stage_steps(network: str) -> int:
    """Optimizer steps of a stage of the network's recipe."""
    name, images = RECIPES[network]
    fields = read_recipe(name)
    return fields["epochs"] * (images // fields["batch_size"])


class _Run:
    """What the parts of a run share."""

    def __init__(self, record: Record, quick: bool, tell: Callable) -> None:
        self.record, self.place, self.tell = record, record.place, tell
        self.clock = runner(self.place)
        self.plan = Plan(seconds=1.0, few=5, many=10, most=40)
        if quick:
            self.plan = Plan(seconds=0.02, few=2, many=2, most=5, rounds=2)
        record.environment |= FACTS[self.place.type]

    def network(self, name: str, shape: tuple[int, ...]) -> None:
        """All groups of one network; what breaks is a row."""
        facts = {"network": name, "images": shape[0], "steps": None, "kind": ""}
        case = f"{name}, {shape[0]} images of {'x'.join(map(str, shape[2:]))}"
        self.tell(f"{case}: masks and gates")
        try:
            training = Training(name, shape, self.place)
            bench = Bench(training)
        except Exception as error:  # noqa: BLE001 - such as no memory: other networks go on
            self.record.add([{**broken("step", case, error), **facts}])
            return
        single = {kind: ((place,), True) for kind, place in TURNS.items()}
        period = {kind: (tuple(range(PERIOD)), pair) for kind, pair in PAIRS.items()}
        for kind, (places, pair) in {**period, **single}.items():
            extra = facts | {"kind": kind, "steps": len(places)}
            setting = kind if len(places) > 1 else bench.names[places[0]]
            self._group(training, lambda: bench.steps(setting, places, pair), extra)  # noqa: B023
        extra = facts | {"kind": "masks", "stage_steps": stage_steps(name)}
        extra |= {"recipe": RECIPES[name][0], "count": bench.engine.ctx.options.stages}
        self._group(training, lambda: (bench.masks(), {}), extra)
        extra = facts | {"kind": "activate", "count": len(bench.names)}
        self._group(training, lambda: (bench.activate(), {}), extra)

    def _group(self, training: Training, make: Callable, extra: dict[str, Any]) -> None:
        try:
            group, memory = make()
            self.tell(f"{training.case.name}: {group.op}, {group.setting}")
            rows = self._measured(group, memory, training, extra)
        except Exception as error:  # noqa: BLE001
            rows = [{**broken("step", f"{training.case.name}, {extra['kind']}", error), **extra}]
        self.record.add(rows)

    def _measured(self, group: Group, memory: dict, training: Training, extra: dict) -> list[dict]:
        rows = measure(group, training, self.plan, self.clock)
        for row in rows:
            row |= {**extra, "memory_bytes": None, "images_per_second": None}
            if row["ok"] and extra["steps"]:
                row["memory_bytes"] = memory[row["impl"]]()
                images = extra["images"] * extra["steps"]
                row["images_per_second"] = round(images / row["median_us"] * 1e6, 1)
        return rows


def run(
    out: Path | None = None,
    device: str = "cpu",
    quick: bool = False,
    threads: int | None = None,
    cases: Sequence[str] = (),
    batch: int | None = None,
    pictures: bool = True,
    tell: Callable[[str], None] = print,
) -> tuple[dict[str, Any], list[Path]]:
    """Measure; write NAME.json, NAME.md and a picture into a folder after each group.

    Args:
        out: folder (default: benchmarks/results/train). NAME is cpu or that of the GPU.
        quick: a tiny network, few samples.
        cases: resnet50, resnet18 (default: both); quick: resnet8.
        batch: images of a batch.

    Returns:
        The benchmark's content and the files written.
    """
    what = "bench train"
    place = place_of(what, device, threads)
    networks = NETWORKS["quick" if quick else place.type]
    cases = known(what, "case", cases, networks) or networks
    record = Record("train", place, out, lambda result: ratios(result["rows"]))
    state = _Run(record, quick, tell)
    for name in cases:
        shape = networks[name]
        state.network(name, (batch or shape[0], *shape[1:]))
    record.save()
    return record.result, redraw(record.path, pictures)


# ---- ratios --------------------------------------------------------------------------------------


def ratios(rows: Sequence[dict]) -> list[dict[str, Any]]:
    """Per group, times in units of as many plain dense steps, memory, images a second and shares.

    `dense_us` is that unit. Of mask steps and switches `ours` is one of them in dense steps.
    """
    steps = {  # a plain dense step by network
        row["network"]: row["median_us"]
        for row in rows
        if row["ok"] and row["impl"] == DENSE and row["kind"] == "dense"
    }
    lines = []
    for (op, case), some in groups(rows).items():
        found = {row["impl"]: row for row in some if row["ok"]}
        first = some[0]
        line = {"op": op, "case": case, "kind": first["kind"], "network": first["network"]}
        step = steps.get(first["network"])
        if op in ("step", "period"):
            line = _of_steps(line, found)
        elif step and found:
            (ours,) = found.values()
            line = _of_parts(line, ours, step)
        else:
            line = None
        if line:
            lines.append(line)
    return _with_overhead(lines)


_NAMES = {"ours": ENGINE, "deterministic": FIXED, "prune": PRUNE}


def _of_steps(line: dict[str, Any], found: dict[str, dict]) -> dict[str, Any] | None:
    dense = found.get(DENSE)
    if not dense or ENGINE not in found:
        return None
    line |= {"dense_us": dense["median_us"], "share": None}
    for name, impl in _NAMES.items():
        row = found.get(impl)
        line[name] = round(row["median_us"] / dense["median_us"], 4) if row else None
    for name, impl in {"dense": DENSE, **_NAMES}.items():
        row = found.get(impl, {})
        line[f"{name}_bytes"] = row.get("memory_bytes")
        line[f"{name}_images_per_second"] = row.get("images_per_second")
    return line


def _of_parts(line: dict[str, Any], ours: dict[str, Any], step: float) -> dict[str, Any]:
    one = ours["median_us"] / ours["count"] / step
    share = one / ours.get("stage_steps", 1)
    empty = dict.fromkeys(("deterministic", "prune"))
    return {**line, "dense_us": step, "ours": round(one, 5), "share": share, **empty}


def _with_overhead(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A period's share: what it takes over its dense steps, and its part of the mask steps."""
    masks = {line["network"]: line["share"] for line in lines if line["op"] == "masks"}
    for line in lines:
        if line["op"] == "period" and line["network"] in masks:
            line["share"] = line["ours"] - 1 + masks[line["network"]]
    return lines


def table_of_ratios(lines: Sequence[dict]) -> list[list[str]]:
    """Cells of the ratios, headed by a line."""
    head = ["op", "case", "dense", "ours", "prune", "deterministic", "share", "images/s: dense"]
    cells = [[*head, "ours", "memory: dense", "ours", "prune"]]
    for line in lines:
        memory = [line.get(f"{name}_bytes") for name in ("dense", "ours", "prune")]
        speed = [line.get(f"{name}_images_per_second") for name in ("dense", "ours")]
        times, share = [line[name] for name in ("ours", "prune", "deterministic")], line["share"]
        cells.append(
            [
                line["op"],
                line["case"],
                f"{line['dense_us'] / 1e3:.3g} ms",
                *("" if v is None else f"{v:.3g}x" for v in times),
                "" if share is None else f"{100 * share:.2g} %",
                *("" if v is None else f"{v:.0f}" for v in speed),
                *("" if m is None else f"{m / 2**20:.1f} MB" for m in memory),
            ]
        )
    return cells


def summary(result: dict[str, Any]) -> str:
    """The ratios as text in columns."""
    return aligned(table_of_ratios(result["ratios"]))


# ---- files ---------------------------------------------------------------------------------------


def redraw(path: Path, pictures: bool = True) -> list[Path]:
    """Markdown and a picture beside a benchmark JSON, from its rows alone."""
    result = read_json(path)
    lines = ratios(result["rows"])
    remarks = [remark.format(**result["environment"]) for remark in REMARKS]
    remarks += ["", "## In units of plain dense steps", ""]
    made = report(path, result, "Co-training", remarks, table_of_ratios(lines))
    bars = [line for line in lines if line["op"] in ("step", "period")]
    if pictures and bars:
        made.append(_draw(path.with_suffix(".png"), bars))
    return made


def _draw(path: Path, lines: Sequence[dict]) -> Path:
    """Bars of the ratios to plain dense steps, a panel per network."""
    networks = list(dict.fromkeys(line["network"] for line in lines))

    def draw(figure) -> None:
        axes = figure.subplots(1, len(networks), squeeze=False, sharey=True)[0]
        for ax, network in zip(axes, networks, strict=True):
            some = [line for line in lines if line["network"] == network]
            for shift, name, colour in ((-0.2, "ours", OURS), (0.2, "prune", PEER)):
                bars = [(i + shift, line[name]) for i, line in enumerate(some) if line[name]]
                places, values = zip(*bars, strict=True) if bars else ((), ())
                ax.barh(places, values, 0.38, color=colour, label=_NAMES[name])
                for place, value in bars:
                    ax.text(value, place, f" {value:.2f}", va="center", fontsize=7)
            ax.axvline(1.0, color="black", lw=1.0, ls="--")
            ax.set_yticks(range(len(some)), [line["kind"] for line in some], fontsize=8)
            ax.set_xlabel("time / plain dense steps", fontsize=8)
            ax.set_title(some[0]["case"].rpartition(", ")[0], fontsize=9, loc="left")
        axes[0].invert_yaxis()
        axes[-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return save_figure(path, draw, (4.6 * len(networks) + 1.2, 3.0))


if __name__ == "__main__":
    from sparse_cocktail.cli import main

    sys.argv[1:1] = ["bench", "train"]
    main()
