"""Two ways to a masked layer on a GPU, and the measured table that chooses between them.

    fused     our Triton kernels: the mask is applied to the weight's tiles inside the product
    layer     W*m of this layer is made, and the vendor's library multiplies (`layerwise`)

The table is measured by `sparse-cocktail bench masked --save-choices` and keyed by card, op and a
bucket of shapes. A card or bucket that nobody has measured takes the vendor's library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .dispatch import cpu_level

__all__ = ["ROUTES", "bucket", "cards", "route", "routed", "table", "this_card"]

ROUTES = ("fused", "layer")
FOLDER = Path(__file__).parent.parent / "choices"

_forced: str | None = None  # one for all threads: a backward pass on CUDA runs in another thread


@contextmanager
def route(name: str) -> Iterator[None]:
    """Force one route for masked layers inside the `with` block: fused or layer.

    What the fused kernels do not take (fp64, whole pruned rows left out) goes by layer even so.
    """
    global _forced
    if name not in ROUTES:
        raise ValueError(f"ops.route: name={name!r} is unknown; use one of {', '.join(ROUTES)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def bucket(op: str, dtype: torch.dtype, rows: int, weight: Tensor | torch.Size) -> str:
    """Key of a measurement: the op, the dtype of x, and rows and weights to the nearest power of 4.

    Args:
        rows: rows of the product: of x, or positions of the output of a convolution.
        weight: the weight, or its shape.
    """
    shape = weight.shape if isinstance(weight, Tensor) else weight
    sizes = (max(1, rows), max(1, shape.numel()))
    powers = [(n.bit_length() - 1 + 1) // 2 for n in sizes]
    return f"{op}/{str(dtype)[6:]}/rows-4^{powers[0]}/weights-4^{powers[1]}"


def cards() -> list[str]:
    """Names of the devices that were measured."""
    return [json.loads(path.read_text())["card"] for path in sorted(FOLDER.glob("*.json"))]


@cache
def table(card: str) -> dict[str, dict]:
    """What was measured on a device: bucket -> {"route", "ratio": the other route's time over its
    own, ...}; empty where nobody measured."""
    path = FOLDER / f"{card.replace(' ', '-')}.json"
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    if content.get("format") != 1:
        raise ValueError(
            f"ops.route: {path} has format {content.get('format')!r}, but this version reads 1; "
            "measure again with 'sparse-cocktail bench masked --save-choices'"
        )
    return content["buckets"]


@cache
def _card(index: int) -> str:
    return torch.cuda.get_device_name(index)


def this_card() -> str:
    """The key of this machine's table: its GPU, or the instruction set of its CPU."""
    if torch.cuda.is_available():
        return _card(torch.cuda.current_device())
    return f"cpu-{cpu_level() or 'torch'}"


def chosen_route(op: str, x: Tensor, weight: Tensor, rows: int) -> str:
    """The route that a masked layer takes now: forced, or measured on this card."""
    if _forced is not None:
        return _forced
    if x.device.type != "cuda":
        return "layer"
    device = x.device.index if x.device.index is not None else torch.cuda.current_device()
    row = table(_card(device)).get(bucket(op, x.dtype, rows, weight))
    return "layer" if row is None else row["route"]


def routed(op: str, fused: Callable | None, layer: Callable) -> Callable | None:
    """A function that takes the chosen route, with the arguments of an op of masked layers: x or a
    gradient first, then maybe another, the weight, its bits. None without Triton."""
    if fused is None:
        return None

    def call(*args):
        place = next(i for i, a in enumerate(args) if a.dtype == torch.int32)  # of the bits
        x, weight, after = args[0], args[place - 1], args[place + 1 :]
        whole = not any(isinstance(a, Tensor) and a.dtype == torch.int64 for a in after)
        # rows of the product: what is not the channel dimension of x or of the gradient
        channels = x.shape[1] if weight.dim() == 4 else x.shape[-1]
        route = chosen_route(op, x, weight, x.numel() // max(1, channels))
        if route == "fused" and whole and torch.float64 not in (x.dtype, weight.dtype):
            return fused(*args)
        return layer(*args)

    return call
