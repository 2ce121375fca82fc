"""Measured tables that choose between ways to compute a layer: one per device, in choices/.

Masked layers (`sparse-cocktail bench masked --save-choices`):

    fused     our kernels: the mask is applied to the weight inside the product. On a GPU these are
              Triton's, on a CPU those of linear layers of few rows (`few_rows`)
    layer     W*m of this layer is made, and the vendor's library multiplies (`layerwise`)

Masked layers in inference on a CPU (`sparse-cocktail bench sparse --save-choices`):

    sparse    the kept weights are packed, and only they are multiplied (`sparse_product`)
    dense     as in training: W*m, and PyTorch's product

A table is keyed by op and a bucket of shapes. Where nobody measured, it is `layer` and `dense`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..files import write_json
from .dispatch import cpu_levels

__all__ = [
    "ROUTES",
    "SPARSE_ROUTES",
    "bucket",
    "cards",
    "chosen_sparse",
    "cpu_card",
    "route",
    "routed",
    "save",
    "sparse_bucket",
    "table",
    "this_card",
]

ROUTES = ("fused", "layer")
SPARSE_ROUTES = ("sparse", "dense")
MOST_ROWS = 512  # of more, the vendor's products are the faster ones on any CPU
FOLDER = Path(__file__).parent.parent / "choices"

# By pair of routes; one for all threads: a backward pass on CUDA runs in another thread.
_forced: dict[tuple[str, str], str] = {}


@contextmanager
def route(name: str) -> Iterator[None]:
    """Force one route inside the `with` block: fused or layer, sparse or dense.

    What the kernels do not take (fp64; whole pruned rows left out, training) goes the other way
    even so.
    """
    global _forced
    names = next((names for names in (ROUTES, SPARSE_ROUTES) if name in names), None)
    if names is None:
        known = ", ".join(ROUTES + SPARSE_ROUTES)
        raise ValueError(f"ops.route: name={name!r} is unknown; use one of {known}")
    before, _forced = _forced, {**_forced, names: name}
    try:
        yield
    finally:
        _forced = before


def power_of_4(count: int) -> int:
    """The nearest power of 4."""
    return max(1, count).bit_length() // 2


def bucket(op: str, dtype: torch.dtype, rows: int, weight: Tensor | torch.Size) -> str:
    """Key of a measurement: the op, the dtype of x, and rows and weights to the nearest power of 4.

    Args:
        rows: of the first argument, x or a gradient: all of its sizes but that of the channels.
        weight: the weight, or its shape.
    """
    size = f"rows-4^{power_of_4(rows)}/weights-4^{power_of_4(weight.numel())}"
    return f"{_measured_as(op, weight)}/{str(dtype)[6:]}/{size}"


def _measured_as(op: str, weight: Tensor | torch.Size) -> str:
    """Convolutions of one tap have buckets of their own: no windows are copied."""
    shape = weight.shape if isinstance(weight, Tensor) else weight
    return op.replace("conv2d", "conv2d-1x1") if tuple(shape[2:]) == (1, 1) else op


def sparse_bucket(op: str, rows: int, weight: Tensor | torch.Size, density: float) -> str:
    """Key of a measurement of `sparse_linear` or `sparse_conv2d`, with the density to a power of 2.

    Args:
        rows: of x, or batch * height * width of the output of a convolution.
        weight: the weight, or its shape.
        density: kept share of the weight, from 0 to 1.
    """
    return _sparse_key(op, power_of_4(rows), power_of_4(weight.numel()), _halvings(density))


def _sparse_key(op: str, rows: int, weights: int, halvings: int) -> str:
    return f"{op}/float32/rows-4^{rows}/weights-4^{weights}/density-2^-{halvings}"


def _halvings(density: float) -> int:
    return min(8, round(-math.log2(max(density, 2.0**-8))))


def _path(card: str) -> Path:
    return FOLDER / f"{card.replace(' ', '-')}.json"


def cards() -> list[str]:
    """Names of the devices that were measured."""
    return [json.loads(path.read_text())["card"] for path in sorted(FOLDER.glob("*.json"))]


@cache
def table(card: str) -> dict[str, dict]:
    """What was measured on a device: bucket -> {"route", "ratio": the other route's time over its
    own, ...}; empty where nobody measured."""
    path = _path(card)
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    if content.get("format") != 1:
        raise ValueError(
            f"ops.route: {path} has format {content.get('format')!r}, but this version reads 1; "
            "remove it and measure again with 'sparse-cocktail bench masked --save-choices'"
        )
    return content["buckets"]


def save(
    card: str,
    environment: Mapping,
    measured: Mapping[str, Sequence[float]],
    names: tuple[str, str],
) -> Path:
    """Write what was measured into the table of a device; buckets not measured now are kept.

    Args:
        card: from `this_card`.
        environment: of the benchmark: versions, threads, processor.
        measured: bucket -> time of names[1] over that of names[0], of one or several layers: their
            geometric mean decides.
        names: ROUTES or SPARSE_ROUTES.
    """
    table.cache_clear()
    buckets = dict(table(card))
    for key, ratios in measured.items():
        ratio = statistics.geometric_mean(ratios)
        first = ratio >= 1
        buckets[key] = {
            "route": names[0 if first else 1],
            "ratio": round(max(ratio, 1 / ratio), 3),
            "measurements": len(ratios),
        }
    content = {"format": 1, "card": card, "environment": dict(environment)}
    write_json(_path(card), {**content, "buckets": dict(sorted(buckets.items()))})
    table.cache_clear()
    _sparse_pays.cache_clear()
    _nearest_route.cache_clear()
    return _path(card)


@cache
def gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@cache
def cpu_card() -> str:
    """The key of the table of this machine's CPU."""
    return f"cpu-{(cpu_levels() or ('torch',))[-1]}"


def this_card() -> str:
    """The key of this machine's table: its GPU, or the instruction set of its CPU."""
    if torch.cuda.is_available():
        return gpu_name(torch.cuda.current_device())
    return cpu_card()


def chosen_route(op: str, x: Tensor, weight: Tensor, rows: int, on: str = "cuda") -> str:
    """The route that a masked layer takes now: forced, or measured on this card.

    On a CPU a bucket that was not measured counts as the nearest one, by rows and then by weights.

    Args:
        on: the type of device that the fused kernels are for: on others they are not chosen.
    """
    if ROUTES in _forced:
        return _forced[ROUTES]
    if x.device.type != on:
        return "layer"
    if on == "cpu":
        if rows > MOST_ROWS:
            return "layer"
        sizes = power_of_4(rows), power_of_4(weight.numel())
        return _nearest_route(FOLDER, cpu_card(), _measured_as(op, weight), x.dtype, *sizes)
    device = x.device.index if x.device.index is not None else torch.cuda.current_device()
    row = table(gpu_name(device)).get(bucket(op, x.dtype, rows, weight))
    return "layer" if row is None else row["route"]


@cache
def _nearest_route(
    folder: Path, card: str, op: str, dtype: torch.dtype, rows: int, weights: int
) -> str:
    measured, start = table(card), f"{op}/{str(dtype)[6:]}"
    near = [
        (abs(a - rows), abs(b - weights), row["route"])
        for a in range(32)
        for b in range(32)
        if (row := measured.get(f"{start}/rows-4^{a}/weights-4^{b}"))
    ]
    return min(near)[2] if near else "layer"


def chosen_sparse(op: str, rows: int, weight: Tensor, density: float) -> bool:
    """Whether inference on the CPU takes the packed weight now: forced, or measured.

    A bucket that was not measured counts as the nearest one of the op: of up to four times more or
    fewer weights first, then of any number of rows; in it a weight sparser than all that were
    measured counts as the sparsest of these. Where there is none, the dense way is taken.

    Args:
        op, rows, weight, density: as in `sparse_bucket`.
    """
    if SPARSE_ROUTES in _forced:
        return _forced[SPARSE_ROUTES] == "sparse"
    sizes = power_of_4(rows), power_of_4(weight.numel()), _halvings(density)
    return _sparse_pays(FOLDER, cpu_card(), op, *sizes)


@cache
def _sparse_pays(folder: Path, card: str, op: str, rows: int, weights: int, halvings: int) -> bool:
    measured = table(card)
    for place in range(halvings, -1, -1):  # what pays at a density pays at a lower one
        near = [
            (abs(b - weights), abs(a - rows), a, b)
            for b in (weights, weights - 1, weights + 1)
            for a in range(32)
            if _sparse_key(op, a, b, place) in measured
        ]
        if near:
            *_, a, b = min(near)
            return measured[_sparse_key(op, a, b, place)]["route"] == "sparse"
    return False


# Which arguments of an op are the weight and the rows.
_PLACES = {
    "linear": (1, 4),
    "linear_input_grad": (1, 3),
    "linear_weight_grad": (2, 4),
    "conv2d": (1, 4),
    "conv2d_input_grad": (2, 4),
    "conv2d_weight_grad": (2, 4),
}


def routed(op: str, fused: Callable | None, layer: Callable, on: str = "cuda") -> Callable | None:
    """A function that takes the chosen route, with the arguments of an op of masked layers, whose
    first is x or a gradient. None without fused kernels (no Triton); `on` as in `chosen_route`."""
    if fused is None:
        return None
    weight_at, rows_at = _PLACES[op]

    def call(*args):
        x, weight = args[0], args[weight_at]
        # rows of the product: what is not the channel dimension of x or of the gradient
        channels = x.shape[1] if weight.dim() == 4 else x.shape[-1]
        route = chosen_route(op, x, weight, x.numel() // max(1, channels), on)
        if route == "layer" or args[rows_at] is not None:
            return layer(*args)
        return layer(*args) if torch.float64 in (x.dtype, weight.dtype) else fused(*args)

    return call
