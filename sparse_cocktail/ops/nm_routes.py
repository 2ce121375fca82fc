"""Measured tables that choose how a linear layer with an N:M weight is computed: one per device.

    dense        F.linear on the weight with its zeros, which the layer then holds
    gemm         the packed 2:4 weight on sparse tensor cores (`nm_linear_packed`)
    skinny       the same weight, for up to 16 rows, at the speed of memory
    cusparselt   the vendor's 2:4 product through torch
    compressed   `nm_linear` from values and bits: C++ on the CPU, Triton on a GPU

A table, choices/nm-<card>.json, has an entry per pattern, dtype, rows of x and size of the weight,
with the times of all routes that were measured. `plan` reads it once, when a layer is packed. What
nobody measured near enough is dense, on every device; so is what does not win clearly.

    sparse-cocktail tune            measures this machine
    sparse-cocktail info --choices  prints the tables
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..files import read_json, write_json
from . import routes
from .dispatch import PREFERRED, implementations
from .nm_packed import PACKED_DTYPES, SKINNY_ROWS, built, kernel_for

__all__ = [
    "DENSE",
    "MODES",
    "NM_ROUTES",
    "Plan",
    "ROWS",
    "available",
    "bucket",
    "card_of",
    "cards",
    "choose",
    "forced",
    "forced_route",
    "plan",
    "row_bucket",
    "save",
    "table",
]

NM_ROUTES = ("dense", "gemm", "skinny", "cusparselt", "compressed")
MODES = ("eager", "graph")  # by a call from Python, or as part of a CUDA graph
ROWS = (1, 2**14)  # fewest and most that are told apart
MARGIN = 1.03  # how much faster than dense a route must be; less is the noise of a measurement
NEAR_ROWS, NEAR_WEIGHTS = 2, 1  # powers of 2 and of 4 that a measurement may be away
CUSPARSELT_MULTIPLE = 16  # of out and in, for 16 bits
PACKED_PATTERNS = ((2, 4), (1, 2))  # 1:2 runs as 2:4
COMPRESSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_forced: str | None = None  # one for all threads, as in `routes`


# ---- what can run --------------------------------------------------------------------------------


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _cusparselt_built() -> bool:
    found = getattr(torch.backends, "cusparselt", None)
    return found is not None and found.is_available() and hasattr(torch, "_cslt_sparse_mm")


def available(
    device: torch.device | str,
    dtype: torch.dtype,
    n: int,
    m: int,
    in_features: int,
    out_features: int,
) -> tuple[str, ...]:
    """Routes that a layer (out_features, in_features) in a dtype can take here, dense first.

    It looks at what is built and at the card's compute capability, and never waits for the device.
    That `skinny` takes at most 16 rows is seen to by `choose`.
    """
    device, found = torch.device(device), ["dense"]
    if device.type == "cuda" and dtype in PACKED_DTYPES and (n, m) in PACKED_PATTERNS:
        major = _capability(_index(device))[0]
        if major >= 8 and in_features % 8 == 0:
            for name in ("gemm", "skinny"):
                if built(torch.ops.sparse_cocktail_cuda, kernel_for(name, 1, major)) is not None:
                    found.append(name)
        whole = in_features % CUSPARSELT_MULTIPLE == 0 == out_features % CUSPARSELT_MULTIPLE
        if major >= 8 and whole and _cusparselt_built():
            found.append("cusparselt")
    if in_features % m == 0 and dtype in COMPRESSED_DTYPES:
        fast = set(PREFERRED.get(device.type, ())) & set(implementations("nm_linear"))
        found += ["compressed"] if fast else []
    return tuple(found)


# ---- tables --------------------------------------------------------------------------------------


def _row_power(rows: int) -> int:
    return min(ROWS[1].bit_length() - 1, max(0, round(math.log2(max(1, rows)))))


def row_bucket(rows: int) -> int:
    """The power of 2 nearest to a number of rows, from 1 to 16384."""
    return 2 ** _row_power(rows)


def _key(n: int, m: int, dtype: torch.dtype, mode: str, rows: int, weights: int) -> str:
    size = f"rows-2^{rows}/weights-4^{weights}"
    return f"nm_linear/{n}:{m}/{str(dtype)[6:]}/{mode}/{size}"


def bucket(
    dtype: torch.dtype,
    n: int,
    m: int,
    rows: int,
    out_features: int,
    in_features: int,
    mode: str = "eager",
) -> str:
    """Key of a measurement: rows to the nearest power of 2, weights to the nearest power of 4.

    Args:
        rows: of x, all its sizes but the last.
        mode: eager, or graph (in a CUDA graph, where the host's time does not count).
    """
    _check_mode("nm_routes.bucket", mode)
    weights = routes.power_of_4(out_features * in_features)
    return _key(n, m, dtype, mode, _row_power(rows), weights)


def _check_mode(op: str, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"{op}: mode={mode!r} is unknown; use one of {', '.join(MODES)}")


def card_of(device: torch.device | str) -> str:
    """The key of a device's table: the name of the GPU, or the instruction set of the CPU."""
    device = torch.device(device)
    return routes.gpu_name(_index(device)) if device.type == "cuda" else routes.cpu_card()


def _path(card: str) -> Path:
    return routes.FOLDER / f"nm-{re.sub(r'[^A-Za-z0-9_.]+', '-', card)}.json"


def cards() -> list[str]:
    """Names of the devices whose N:M routes were measured."""
    return [read_json(path)["card"] for path in sorted(routes.FOLDER.glob("nm-*.json"))]


@cache
def _read(path: Path) -> dict[str, dict]:
    if not path.is_file():
        return {}
    content = read_json(path)
    if content.get("format") != 1:
        raise ValueError(
            f"nm_routes: {path} has format {content.get('format')!r}, but this version reads 1; "
            "remove it and measure again with 'sparse-cocktail tune'"
        )
    return content["buckets"]


def table(card: str) -> dict[str, dict]:
    """What was measured on a device, by bucket; empty where nobody measured.

    An entry has `route`, the fastest that wins clearly; `ratio`, the time of dense over its own;
    `us`, the time of each route (a geometric mean over the measurements of the bucket); `least`, by
    route, the smallest ratio of any of them; and how many `measurements` there were.
    """
    return _read(_path(card))


def save(
    card: str, environment: Mapping, measured: Mapping[str, Sequence[Mapping[str, float]]]
) -> Path:
    """Write what was measured into the table of a device; buckets not measured now are kept.

    Args:
        card: from `card_of`.
        environment: of the measurement: versions, threads, processor.
        measured: bucket -> microseconds by route, of one or several layers. Those without `dense`
            do not count, and a route does that was measured in all others.
    """
    entries = {}
    for key, given in measured.items():
        for name in sorted({name for times in given for name in times}):
            _check_route("nm_routes.save", name)
        given = [times for times in given if times.get("dense")]
        if given:
            entries[key] = _entry(given)
    path = _path(card)
    _read.cache_clear()
    buckets = dict(sorted({**_read(path), **entries}.items()))
    content = {"format": 1, "card": card, "environment": dict(environment), "buckets": buckets}
    write_json(path, content)
    _read.cache_clear()
    return path


def _check_route(op: str, name: str) -> None:
    if name not in NM_ROUTES:
        raise ValueError(f"{op}: name={name!r} is unknown; use one of {', '.join(NM_ROUTES)}")


def _entry(given: Sequence[Mapping[str, float]]) -> dict:
    names = [name for name in NM_ROUTES if all(times.get(name) for times in given)]
    us = {n: round(statistics.geometric_mean(t[n] for t in given), 2) for n in names}
    least = {n: round(min(t["dense"] / t[n] for t in given), 3) for n in names if n != "dense"}
    entry = {"us": us, "least": least, "measurements": len(given)}
    route = _fastest(entry, names)
    return {"route": route, "ratio": round(us["dense"] / us[route], 3), **entry}


def _fastest(entry: Mapping, allowed: Sequence[str]) -> str:
    """The fastest allowed route of those that beat dense in every measurement, or else dense."""
    winners = [n for n, ratio in entry["least"].items() if n in allowed and ratio >= MARGIN]
    return min(winners, key=entry["us"].__getitem__, default="dense")


# ---- choosing ------------------------------------------------------------------------------------


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Force one route inside the `with` block, for what is packed or chosen there.

    Where it cannot run (such as `skinny` for more than 16 rows) the measured choice holds.
    """
    global _forced
    _check_route("nm_routes.forced", name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced_route() -> str | None:
    """The route that is forced now."""
    return _forced


def _same_speed(n: int, m: int, dtype: torch.dtype, card: str) -> Iterator[tuple]:
    """(n, m, dtype) whose measurements count for these too, the best first.

    1:2 has the packed form of 2:4, and tensor cores take both 16-bit formats at one speed.
    """
    dtypes = [dtype]
    if dtype in PACKED_DTYPES and not card.startswith("cpu-"):
        dtypes += [other for other in PACKED_DTYPES if other != dtype]
    for pattern in [(n, m)] + [(2, 4)] * ((n, m) == (1, 2)):
        for other in dtypes:
            yield (*pattern, other)


def _nearest(card: str, n: int, m: int, dtype, mode: str, rows: int, weights: int) -> dict | None:
    """The entry of the nearest measured bucket; weights first, then rows."""
    measured = table(card)
    if not measured:
        return None
    places = [
        (abs(w - weights), abs(r - rows), r, w)
        for w in range(weights - NEAR_WEIGHTS, weights + NEAR_WEIGHTS + 1)
        for r in range(rows - NEAR_ROWS, rows + NEAR_ROWS + 1)
    ]
    for kind in _same_speed(n, m, dtype, card):
        for *_, r, w in sorted(places):
            entry = measured.get(_key(*kind, mode, r, w))
            if entry is not None:
                return entry
    return None


def choose(
    card: str,
    dtype: torch.dtype,
    n: int,
    m: int,
    rows: int,
    out_features: int,
    in_features: int,
    mode: str = "eager",
    allowed: Sequence[str] = NM_ROUTES,
) -> str:
    """The route for one number of rows: forced, or the fastest that was measured on this card.

    The nearest bucket counts, up to 4 times more or fewer weights and rows; where there is none,
    the answer is `dense`. In a graph, measurements of eager calls count where there are no others.

    Args:
        card: from `card_of`.
        allowed: from `available`; the others are passed over.
    """
    _check_mode("nm_routes.choose", mode)
    allowed = [name for name in allowed if name != "skinny" or rows <= SKINNY_ROWS]
    if _forced in (*allowed, "compressed"):  # which the reference computes anywhere
        return _forced
    entry = _measured(card, dtype, n, m, rows, out_features * in_features, mode)
    return "dense" if entry is None else _fastest(entry, allowed)


def _measured(card: str, dtype, n: int, m: int, rows: int, weights: int, mode: str) -> dict | None:
    """The entry that counts for these sizes."""
    sizes = _row_power(rows), routes.power_of_4(weights)
    for measured in dict.fromkeys((mode, "eager")):
        entry = _nearest(card, n, m, dtype, measured, *sizes)
        if entry is not None:
            return entry
    return None


@dataclass(frozen=True)
class Plan:
    """The route for every number of rows that a layer may meet, chosen when it is packed.

    Args:
        steps: (most rows, route) in order; what has more rows than the last takes its route.
        why: what is to be said about it, such as that nobody measured this card.
    """

    steps: tuple[tuple[int, str], ...]
    why: str = ""

    @property
    def routes(self) -> tuple[str, ...]:
        """All routes that some number of rows takes."""
        return tuple(dict.fromkeys(route for _, route in self.steps))

    def route(self, rows: int) -> str:
        """The route of a number of rows, by comparisons that torch.compile can guard."""
        for most, route in self.steps:
            if rows <= most:
                return route
        return self.steps[-1][1]

    def __str__(self) -> str:
        *parts, (_, last) = self.steps
        words = [f"{route} up to {most} row{'s' * (most > 1)}" for most, route in parts]
        text = ", ".join([*words, f"{last} beyond" if words else last])
        return f"{text} ({self.why})" if self.why else text


DENSE = Plan(((ROWS[1], "dense"),))  # of layers that have no other route


def plan(
    values: Tensor,
    n: int,
    m: int,
    out_features: int,
    in_features: int,
    rows: tuple[int, int] = ROWS,
    mode: str = "eager",
    card: str | None = None,
    allowed: Sequence[str] | None = None,
) -> Plan:
    """Choose the routes of a layer (out_features, in_features) on the device of its values.

    Args:
        values: of the compressed weight; their dtype is that of x.
        rows: fewest and most rows of x.
        mode: eager, or graph for layers that run inside CUDA graphs.
        card, allowed: as in `choose` (default: those of the device).
    """
    least, most = rows
    if not 1 <= least <= most:
        raise ValueError(
            f"nm_routes.plan: rows={tuple(rows)} is not 1 <= fewest <= most; for example (1, 4096)"
        )
    device, dtype = values.device, values.dtype
    card = card_of(device) if card is None else card
    kind = card, dtype, n, m
    if allowed is None:
        allowed = available(device, dtype, n, m, in_features, out_features)
    sizes = out_features, in_features, mode, allowed
    steps: list[tuple[int, str]] = []
    for power in range(_row_power(least), _row_power(most) + 1):
        last = math.isqrt(2 ** (2 * power + 1))  # rows that count as 2^power
        parts = [(2**power, last)]
        if last > SKINNY_ROWS >= 2**power:  # 12 to 22 rows, of which `skinny` takes 16
            parts = [(2**power, SKINNY_ROWS), (SKINNY_ROWS + 1, last)]
        for count, upper in parts:
            route = choose(*kind, count, *sizes)
            if steps and steps[-1][1] == route:
                steps.pop()
            steps.append((upper, route))
    weights = out_features * in_features
    known = any(_measured(*kind, count, weights, mode) for count in (least, most))
    return Plan(tuple(steps), "" if known or _forced else f"not measured on {card}")
