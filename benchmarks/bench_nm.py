"""The N:M ops: compressing weights, and products with them by every route, against dense ones.

    sparse-cocktail bench nm                        the CPU; --device cuda for a GPU
    python benchmarks/bench_nm.py --quick           the same command, small and short
    sparse-cocktail tune                            only routes, for the table that chooses them

A group of rows (a layer, a pattern, a dtype, a number of rows of x) has ours by every route and as
`NMLinear`, the dense product with the same weight, and the 2:4 products of torch. What counts is
the time of dense over that of ours. What a machine does not have is a row that says so.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparse_cocktail.ops import nm_routes
from sparse_cocktail.patterns import NM, parse

from groups_compress import SHORT, compress_cases, makers  # isort: skip - neighbours, not packages
from groups_nm import LAYERS, NMInputs, host_us, layers, linear_group  # isort: skip
from machine import cache_bytes, memory_bytes  # isort: skip
from nm_tables import ratios, redraw, summary  # isort: skip
from peers_nm import NotHere  # isort: skip
from record import Record, known, one_or_more, place_of  # isort: skip
from record import failures as all_failures  # isort: skip
from shapes import Inputs, Layer  # isort: skip
from timing import Plan, broken, measure, runner  # isort: skip

__all__ = ["choices", "failures", "redraw", "run", "save", "summary", "tune"]

CASES = ("compress", *(name for name in LAYERS if name != "small"))
ROWS = {"cuda": tuple(2**i for i in range(15)), "cpu": tuple(2**i for i in range(11))}
PATTERNS = {"cuda": ("2:4",), "cpu": ("2:4", "4:8")}
DTYPES = {name: dtype for dtype, name in SHORT.items()}
MEMORIES = ("cold", "warm")  # whether a weight lies in memory or, where it fits, in a cache
QUICK_ROWS = (1, 33)
SQUARE_ROWS = 8192  # of the case `square`
# What `tune` measures where it is not told: weights of 4^7 to 4^13, and two that are not square.
GRID = (
    *((size, size) for size in (128, 256, 512, 1024, 2048, 4096, 8192)),
    (4096, 1024),
    (1024, 4096),
    (11008, 4096),
)
# More rows are slower than dense on the CPU: their weight is decompressed first.
TUNE_ROWS = {"cuda": ROWS["cuda"], "cpu": tuple(2**i for i in range(9))}
GRID_ON_CPU = ((256, 64), (1024, 256), (256, 1024), (3072, 768), (768, 3072), (4096, 4096))


class Sweep(NamedTuple):
    """What of a layer is measured."""

    rows: tuple[int, ...]
    patterns: tuple[NM, ...]
    dtypes: tuple[torch.dtype, ...]
    tiles: bool = False
    every: bool = True


class _Run:
    """What the parts of a run share."""

    def __init__(self, record: Record, quick: bool, tell: Callable) -> None:
        self.record, self.place, self.quick, self.tell = record, record.place, quick, tell
        place = record.place
        few = Plan(seconds=0.05, few=3, many=5, most=10, rounds=3)
        if place.type == "cpu":
            self.plan = few if quick else Plan(seconds=0.2, many=20, most=40)
            self.compress_plan = few if quick else Plan(seconds=0.5, few=3, many=10, most=40)
        else:
            self.plan = few if quick else Plan(seconds=0.03, many=10, most=30, rounds=5)
            self.compress_plan = self.plan
        self.clock, self.cache = runner(place), 0 if quick else cache_bytes()

    def compress(self) -> None:
        memory = memory_bytes() // 8
        for case in compress_cases(self.quick):
            try:
                inputs = Inputs(case, self.place, self.cache, memory)
            except torch.OutOfMemoryError:
                self.tell(f"{case.name}: left out, it does not fit into the memory of this GPU")
                continue
            for make in makers(case):
                inputs.first()
                try:
                    group = make(inputs.sets[0])
                except Exception as error:  # noqa: BLE001 - such as no memory: the others go on
                    self.record.add([broken("nm_compress", case.name, error)])
                    continue
                self.tell(f"{case.name}: {group.op} {group.setting}")
                self.record.add(measure(group, inputs, self.compress_plan, self.clock))

    def layer(self, network: str, name: str, shape: tuple[int, int], sweep: Sweep) -> None:
        """One layer at every pattern, dtype and number of rows."""
        for pattern in sweep.patterns:
            for dtype in sweep.dtypes:
                # small models stay in the caches, and there a compressed weight gains less
                fits = self.quick or math.prod(shape) * dtype.itemsize <= self.cache
                memories = MEMORIES if self.place.type == "cpu" and fits else MEMORIES[:1]
                inputs = None
                for rows in sweep.rows:
                    for memory in memories:
                        at = pattern, dtype, rows, memory
                        found = self._product(network, name, shape, at, sweep, inputs)
                        inputs = found if memory == "cold" else inputs
                self.record.save()

    def _product(self, network: str, name: str, shape, at: tuple, sweep: Sweep, before):
        """One group of products; its inputs, whose weights the next one may take over."""
        (pattern, dtype, rows, memory), (out, ins) = at, shape
        label = " ".join(filter(None, (name, "" if name.endswith(str(out)) else f"{ins} to {out}")))
        case = f"{network}, {label}, {pattern}, {SHORT[dtype]}, {rows} row{'s' * (rows > 1)}"
        case += ", warm" if memory == "warm" else ""
        extra = {"network": network, "layer": label, "pattern": str(pattern), "rows": rows}
        extra |= {"dtype": SHORT[dtype], "memory": memory, "weight_shape": shape, "host_us": None}
        try:
            layer = Layer(label, shape, (rows, ins))
            kind = layer, (pattern.n, pattern.m), dtype, self.place, self.cache, case
            inputs = NMInputs(*kind, before, memory == "warm")
            group, facts = linear_group(inputs, sweep.tiles, sweep.every and memory == "cold")
        except Exception as error:  # noqa: BLE001 - such as no memory: the other sizes go on
            row = {**broken("nm_linear", case, error), **extra, "route": None}
            self.record.rows.append(row)
            return before
        self.tell(case)
        for row in measure(group, inputs, self.plan, self.clock):
            self.record.rows.append({**row, **extra, **facts[row["impl"]]})
        if self.place.type == "cuda":
            self._host(group, inputs)
        return inputs

    def _host(self, group, inputs) -> None:
        """What the host needs for a call, in the rows of eager mode."""
        count = sum(1 + impl.graph for impl in group.impls)
        found = {row["impl"]: row for row in self.record.rows[-count:] if row["mode"] == "eager"}
        for impl in group.impls:
            row = found.get(impl.name)
            if row and row["ok"]:
                row["host_us"] = host_us(impl, inputs.sets[0])


@contextmanager
def _kept_memory() -> Iterator[None]:
    """Results lie in memory that was touched before.

    glibc gives blocks of more than 32 MB back, and each call would pay the page faults of its
    result: 5 times a copy of 64 MB. Without glibc nothing is done.
    """
    most_mapped, trim = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        yield
        return
    mallopt(most_mapped, 0)
    mallopt(trim, 2**31 - 1)
    try:
        yield
    finally:  # their defaults
        mallopt(most_mapped, 65536)
        mallopt(trim, 2**17)


# ---- arguments -----------------------------------------------------------------------------------


def _sweep(
    what: str,
    place: torch.device,
    quick: bool,
    rows: Sequence[int],
    patterns: Sequence[str],
    dtypes: Sequence[str],
    **how,
) -> Sweep:
    """Arguments of a run, with what they are where they are not given."""
    usual = QUICK_ROWS if quick else ROWS[place.type]
    rows = one_or_more(what, "rows", rows, "--rows 1,16,256") or usual
    found = []
    for name in patterns or PATTERNS[place.type]:
        found.append(parse(name))
        if not isinstance(found[-1], NM):
            raise ValueError(f"{what}: pattern={name!r} is not N:M such as 2:4")
    names = known(what, "dtype", dtypes, list(DTYPES))
    if not names:
        fast = place.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        names = ["bf16"] if place.type == "cuda" else ["fp32", *(["bf16"] if fast else [])]
    return Sweep(rows, tuple(found), tuple(DTYPES[name] for name in names), **how)


def run(
    out: Path | None = None,
    device: str = "cpu",
    quick: bool = False,
    threads: int | None = None,
    cases: Sequence[str] = (),
    rows: Sequence[int] = (),
    patterns: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    tiles: bool = False,
    pictures: bool = True,
    tell: Callable[[str], None] = print,
) -> tuple[dict[str, Any], list[Path]]:
    """Measure; write NAME.json, NAME.md and a picture into a folder.

    Args:
        out: folder (default: benchmarks/results/nm). NAME is cpu or that of the GPU.
        quick: small weights and layers, few samples.
        cases: of CASES (default: all; the CPU leaves `square` and vit-l16 out), small.
        rows: of x (default: powers of 2, to 16384 on a GPU and 1024 on the CPU).
        patterns: N:M (default: 2:4, on the CPU also 4:8); dtypes: of DTYPES (default: bf16, on the
            CPU also fp32).
        tiles: also every tile of our kernels (GPU).

    Returns:
        The benchmark's content and the files written.
    """
    what = "bench nm"
    place = place_of(what, device, threads)
    gpu = place.type == "cuda"
    cases = known(what, "case", cases, (*CASES, "small"))
    if not cases:
        cases = [name for name in CASES if gpu or name not in ("square", "vit-l16")]
        cases = ["compress", "small"] if quick else cases
    sweep = _sweep(what, place, quick, rows, patterns, dtypes, tiles=tiles)
    record = Record("nm", place, out, ratios)
    state = _Run(record, quick, tell)
    with _kept_memory():
        for case in cases:
            if case == "compress":
                state.compress()
                continue
            own = (SQUARE_ROWS,) if case == "square" and not rows else sweep.rows
            for name, *shape in layers(case, gpu):
                state.layer(case, name, tuple(shape), sweep._replace(rows=own))
    record.save()
    return record.result, redraw(record.path, pictures)


def tune(
    device: str = "cpu",
    shapes: Sequence[tuple[int, int]] = (),
    rows: Sequence[int] = (),
    patterns: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    quick: bool = False,
    threads: int | None = None,
    tell: Callable[[str], None] = print,
) -> tuple[dict[str, Any], Path]:
    """Measure the routes of layers on this machine, and write the table they are chosen by.

    Args:
        shapes: (out, in) of layers (default: GRID, or GRID_ON_CPU).
        rows: of x (default: powers of 2, to 256 on the CPU); patterns, dtypes: as in `run`.
        quick: few samples.

    Returns:
        The rows in a result as of `run`, and the table's path.
    """
    what = "tune"
    place = place_of(what, device, threads)
    rows = rows or TUNE_ROWS[place.type]
    sweep = _sweep(what, place, False, rows, patterns, dtypes, every=False)
    most = max(pattern.m for pattern in sweep.patterns)
    for out, ins in shapes:
        if out < 1 or ins < 1 or ins % most:
            raise ValueError(
                f"tune: layer {out}x{ins} is not OUTxIN with IN a multiple of m={most}; leave it "
                "out, it stays dense"
            )
    record = Record("nm", place, saved=False)
    state = _Run(record, quick, tell)
    with _kept_memory():
        for shape in shapes or (GRID if place.type == "cuda" else GRID_ON_CPU):
            state.layer("layer", "", tuple(shape), sweep)
    return record.result, save(record.result)


# ---- choices -------------------------------------------------------------------------------------


def choices(rows: Sequence[dict]) -> dict[str, list[dict[str, float]]]:
    """By bucket of `ops.nm_routes`, times of the routes: per layer the medians, and the 10 % marks.

    Cold and warm ones count alike: a route that is chosen wins in a usual call and in an
    undisturbed one, from memory and from the cache.
    """
    found: dict[str, dict[tuple, dict[str, float]]] = {}
    for row in rows:
        if not row.get("route") or not row["ok"]:
            continue
        pattern, dtype = parse(row["pattern"]), DTYPES[row["dtype"]]
        sizes = (row["rows"], *row["weight_shape"])
        key = nm_routes.bucket(dtype, pattern.n, pattern.m, *sizes, row["mode"])
        for which in ("median_us", "p10_us"):
            times = found.setdefault(key, {}).setdefault((row["case"], which), {})
            times[row["route"]] = row[which]
    return {key: list(layers.values()) for key, layers in found.items()}


def save(result: dict[str, Any]) -> Path:
    """Write the table of `ops.nm_routes` for the device of a result."""
    facts = result["environment"]
    card = facts.get("gpu") or f"cpu-{facts['cpu_level'] or 'torch'}"
    return nm_routes.save(card, facts, choices(result["rows"]))


def failures(result: dict[str, Any]) -> list[dict]:
    """Rows of ours that were wrong or broke; not those of what this machine does not have."""
    absent = NotHere.__name__
    return [row for row in all_failures(result) if not row["note"].startswith(absent)]


if __name__ == "__main__":
    from sparse_cocktail.cli import main

    sys.argv[1:1] = ["bench", "nm"]
    main()
