"""Schedules as pure functions of progress: density of a stage, learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = [
    "cosine",
    "cubic",
    "cyclic_cosine",
    "decay_at",
    "geometric_density",
    "keep_count",
    "length_in_steps",
    "linear",
    "triangular",
]


def _clipped(progress: float) -> float:
    return min(max(progress, 0.0), 1.0)


def linear(start: float, end: float, progress: float) -> float:
    """A line from `start` at progress 0 to `end` at progress 1."""
    return start + (end - start) * _clipped(progress)


def cubic(start: float, end: float, progress: float) -> float:
    """Fast at first, flat at the end: the density ramp of gradual pruning (Zhu and Gupta, 2017)."""
    return end + (start - end) * (1.0 - _clipped(progress)) ** 3


def triangular(low: float, high: float, progress: float) -> float:
    """From `low` up to `high` at progress 1/2 and back (the cycles of Sup-tickets)."""
    return linear(low, high, 1.0 - abs(2.0 * _clipped(progress) - 1.0))


def decay_at(value: float, progress: float, milestones: Sequence[float], factor: float) -> float:
    """`value`, multiplied by `factor` at every milestone that progress has reached."""
    return value * factor ** sum(progress >= milestone for milestone in milestones)


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * _clipped(progress)))


def cyclic_cosine(
    step: int, first: int, cycle: int, lr: float, restart_lr: float, min_lr: float
) -> float:
    """Cosine from `lr` to `min_lr` over `first` steps, then cosine restarts of `cycle` steps.

    Every restart goes from `restart_lr` to `min_lr` (Sparse Cocktail, Tables 5 and 6).
    """
    if step < first or cycle < 1:
        return cosine(lr, min_lr, step / max(first, 1))
    return cosine(restart_lr, min_lr, (step - first) % cycle / cycle)


def geometric_density(rate: float, stage: int) -> float:
    """Density after `stage` rounds that each remove the share `rate` of what is left."""
    return (1.0 - rate) ** stage


def keep_count(density: float, total: int) -> int:
    """How many of `total` units a density keeps: to nearest (half up), at least one."""
    return min(total, max(1, math.floor(density * total + 0.5)))


def length_in_steps(length: float, epochs: int, steps_per_epoch: int) -> int:
    """A recipe's length in steps: an int counts epochs, a float is a share of the stage."""
    if isinstance(length, int):
        return length * steps_per_epoch
    return round(length * epochs * steps_per_epoch)
