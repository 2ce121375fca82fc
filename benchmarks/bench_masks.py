"""The mask ops against plain torch and numpy, and against the speed of memory.

    sparse-cocktail bench masks                     the CPU; --device cuda for a GPU
    python benchmarks/bench_masks.py --quick        the same command, small and short
    pytest benchmarks/bench_masks.py --benchmark-only

Every group of rows (an op, its arguments, a list of weights) has ours, the reference, peers, and
two limits of the machine on the same bytes: `torch/sum` reads the weights once, `torch/copy` also
writes them. Peers give bool masks, a byte per weight; ours are packed, a bit per weight.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparse_cocktail.files import read_json

from groups_masks import GROWTH, makers  # isort: skip - neighbours, not packages
from machine import cache_bytes, memory_bytes  # isort: skip
from output import aligned, draw_bars, draw_growth, groups, overview  # isort: skip
from record import Record, known, place_of, report  # isort: skip
from shapes import CASES, Inputs  # isort: skip
from timing import LIMITS, Plan, broken, measure, runner  # isort: skip

LISTS = ("resnet50", "vit-b16", "resnet50-contiguous", "resnet50-bf16")
GRAPH_LIMIT = 2e8  # weights above which peers are eager only: a graph holds its temporaries
QUICK = ("small", "1e4", "1e5")
OPS = (
    "unified_masks",
    "topk_masks",
    "nm_mask",
    "masked_weights",
    "block_masks",
    "pack_mask",
    "unpack_mask",
    "mask_count",
)
PANELS = ("keep 20 %, 2:4, channels 50 %", "keep 20 %", "2:4", "keep 20 %, fp32")
REMARKS = (
    "Layer shapes of real networks, random values: normal with a standard deviation of "
    "1 / sqrt(fan-in) per layer, by a fixed seed (no trained weights are downloaded here). "
    "{order} Only results that equal the definition exactly are timed. Peers give bool masks (a "
    "byte per weight), ours are packed (a bit per weight).",
    "",
    "Read passes: the time over that of `torch/sum`, one read of the same weights. GB/s: the "
    "fewest bytes that the op must move, over the time; of copy: its share of what `torch/copy` "
    "moves (bytes read plus bytes written). Modes: eager, or graph (replay of a CUDA graph).",
)
COLD = (
    "All implementations of a table are timed in turn, each sample on other weights than the one "
    "before: on the CPU from sets that are together twice the last-level cache, on a GPU after its "
    "L2 was overwritten."
)
WARM = (
    "Warm: each implementation is timed in one go, every sample on the same weights, of which the "
    "caches keep what they can."
)


def default_cases(gpu: bool, quick: bool) -> list[str]:
    """Names of the weights that are run when none are given."""
    if quick:
        return list(QUICK)
    first, *others = LISTS  # what matters most comes first: a run may be cut off
    return [first, "1e6", "1e7", "1e8", *(["1e9"] if gpu else []), *others]


def run(
    out: Path | None = None,
    device: str = "cpu",
    quick: bool = False,
    threads: int | None = None,
    cases: Sequence[str] = (),
    only: Sequence[str] = (),
    pictures: bool = True,
    tell: Callable[[str], None] = print,
    warm: bool = False,
) -> tuple[dict[str, Any], list[Path]]:
    """Measure; write NAME.json, NAME.md and pictures into a folder after each list of weights.

    Args:
        out: folder (default: benchmarks/results/masks). NAME is cpu or that of the GPU.
        quick: small weights and few samples.
        cases, only: names of weights and of ops (default: all).
        warm: each implementation in one go on the same weights (CPU); NAME gets "-warm".

    Returns:
        The benchmark's content and the files written.
    """
    what = "bench masks"
    place = place_of(what, device, threads)
    cases = known(what, "case", cases, list(CASES)) or default_cases(place.type == "cuda", quick)
    only = known(what, "op", only, OPS) or list(OPS)
    plan = Plan(seconds=1.0 if place.type == "cpu" else 0.3)
    if quick:
        plan = Plan(seconds=0.05, few=3, many=5, most=10, rounds=3)
    if warm:
        plan = replace(plan, rounds=1)
    record = Record("masks", place, out, suffix="-warm" if warm else "")
    record.environment["warm"] = warm
    clock, cache = runner(place), 0 if quick else cache_bytes()  # quick: two sets of weights
    for case in cases:
        wanted = [pair for pair in makers(case) if pair[0] in only]
        try:
            inputs = Inputs(CASES[case], place, cache, memory_bytes() // 8, warm=warm)
        except torch.OutOfMemoryError:
            tell(f"{case}: left out, the weights do not fit into the memory of this GPU")
            continue
        for op, make in wanted:
            try:
                inputs.first()
                group = make(inputs.sets[0])
            except Exception as error:  # noqa: BLE001 - such as no memory: the other groups go on
                record.add([broken(op, case, error)])
                continue
            tell(f"{case}: {group.op} {group.setting}")
            for impl in group.impls if inputs.case.numel > GRAPH_LIMIT else ():
                impl.graph = impl.graph and (impl.ours or impl.name in LIMITS)
            record.add(measure(group, inputs, plan, clock))
        record.save()
        redraw(record.path, pictures=False)
    return record.result, redraw(record.path, pictures)


def summary(result: dict[str, Any]) -> str:
    """The fastest of ours in each group, as text in columns."""
    return aligned(overview(result["rows"], short=True))


def redraw(path: Path, pictures: bool = True) -> list[Path]:
    """Markdown and pictures beside a benchmark JSON, from its rows alone."""
    result = read_json(path)
    order = WARM if result["environment"].get("warm") else COLD
    made = report(path, result, "Mask ops", [remark.format(order=order) for remark in REMARKS])
    if pictures and result["rows"]:
        made.append(draw_bars(path.with_suffix(".png"), result, _panels(result)))
        sizes = [r["weights"] for r in result["rows"] if _of_growth(r)]
        if len(set(sizes)) > 1:
            growth = path.with_name(f"{path.stem}-growth.png")
            ops = ("topk_masks", "unified_masks")
            made.append(draw_growth(growth, result, ops, _of_growth))
    return made


def _of_growth(row: dict) -> bool:
    return row["case"].partition(",")[0] in GROWTH


def _panels(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The main groups of the first list of weights."""
    first = result["rows"][0]["case"].partition(",")[0]
    found = [key for key in groups(result["rows"]) if key[1].partition(", ")[0] == first]
    return [key for key in found if key[1].partition(", ")[2] in PANELS] or found[:4]


def failures(result: dict[str, Any]) -> list[dict]:
    """Rows of ours, or of the reference, that were wrong or broke.

    In a CUDA graph only the bank's forms must run: others may take counts from the host.
    """
    ours = [r for r in result["rows"] if r["impl"].startswith(("ours/", "reference"))]
    return [r for r in ours if not r["ok"] and (r["mode"] == "eager" or r["impl"].endswith("bank"))]


# ---- pytest-benchmark ----------------------------------------------------------------------------


def test_masks(benchmark, prepared) -> None:
    """One implementation on ResNet-50's weights, gated; conftest.py lists and binds them."""
    impl, gate, calls = prepared
    if impl.name not in LIMITS:
        verdict = gate(impl.result(calls[0].run()))
        assert verdict.ok, f"{impl.name} is not timed: {verdict.says}"
    turn = iter(calls * 100)

    def other_weights():
        bound = next(turn)
        if bound.reset is not None:
            bound.reset()
        return (bound.call,), {}

    benchmark.pedantic(lambda call: call(), setup=other_weights, rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    from sparse_cocktail.cli import main

    sys.argv[1:1] = ["bench", "masks"]
    main()
