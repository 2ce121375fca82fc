"""How the kept weights of a network are shared among its layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .schedules import keep_count

__all__ = ["ALLOCATIONS", "layer_counts"]

ALLOCATIONS = ("global", "uniform", "erk")


def layer_counts(shapes: Sequence[Sequence[int]], density: float, how: str) -> list[int] | int:
    """How many weights to keep, as `ops.topk_masks` takes it; the total is exact.

    Args:
        shapes: of the weights, (out, in, *taps) each.
        density: share of all weights together, in (0, 1].
        how: "global": one number over all layers, which compete by magnitude. "uniform": the same
            density in every layer. "erk": density of a layer proportional to (out + in + taps...) /
            (out * in * taps...), at most 1 (Erdos-Renyi-Kernel; Evci et al., RigL, section 3.1).

    Returns:
        One int for "global", else one per weight: at least 1, at most its size. Their sum is
        `keep_count(density, total)`, or the number of layers where that is more.

    Raises:
        ValueError: for an unknown `how`, a density out of range or no shape.
    """
    if how not in ALLOCATIONS:
        raise ValueError(f"layer_counts: how={how!r} is not one of {', '.join(ALLOCATIONS)}")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"layer_counts: density={density} is not in (0, 1]; give a kept share")
    if not shapes:
        raise ValueError("layer_counts: shapes is empty; give the shape of at least one weight")
    sizes = [math.prod(shape) for shape in shapes]
    keep = keep_count(density, sum(sizes))
    if how == "global":
        return keep
    keep = max(keep, len(sizes))
    parts = sizes if how == "uniform" else [sum(shape) for shape in shapes]
    return _rounded(_proportional(sizes, parts, keep), sizes, keep)


def _proportional(sizes: list[int], parts: list[int], total: int) -> list[float]:
    """`total` split in proportion to `parts`, at most `sizes`: full layers give to the others."""
    full: set[int] = set()
    while True:
        rest = [i for i in range(len(sizes)) if i not in full]
        left = total - sum(sizes[i] for i in full)
        scale = left / sum(parts[i] for i in rest) if rest else 0.0
        over = {i for i in rest if scale * parts[i] > sizes[i]}
        if not over:
            return [float(sizes[i]) if i in full else scale * parts[i] for i in range(len(sizes))]
        full |= over


def _rounded(shares: list[float], sizes: list[int], total: int) -> list[int]:
    """Whole numbers of this total, from 1 to the sizes: the largest remainders are rounded up."""
    counts = [min(size, max(1, math.floor(x))) for x, size in zip(shares, sizes, strict=True)]
    order = sorted(range(len(sizes)), key=lambda i: (counts[i] - shares[i], i))
    while (missing := total - sum(counts)) > 0:
        for i in [i for i in order if counts[i] < sizes[i]][:missing]:
            counts[i] += 1
    for _ in range(-missing):  # layers that were raised to 1 take from the largest
        counts[max(range(len(sizes)), key=lambda i: (counts[i], -i))] -= 1
    return counts
