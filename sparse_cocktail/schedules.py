"""Schedules as pure functions of progress: density of a stage, learning rate of a step."""

from __future__ import annotations

import math

__all__ = ["cosine", "cyclic_cosine", "geometric_density", "keep_count", "length_in_steps"]


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


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
