"""Recipe fields of the methods whose masks change at regular times, and the times."""

from __future__ import annotations

from dataclasses import dataclass

from ..allocation import ALLOCATIONS
from ..patterns import Unstructured
from ..schedules import length_in_steps
from .base import check_choices, check_range, option
from .menu import MenuOptions

__all__ = ["DynamicOptions", "GraNetOptions", "GradualOptions", "Timetable"]


@dataclass
class TimetableOptions(MenuOptions):
    """Recipe fields of methods that change masks at regular times."""

    update_every: float = option(
        0.02, "between two changes of the mask: epochs (int) or share of a network's (float)"
    )

    def check(self, method: str) -> None:
        """Raise ValueError for fields out of range."""
        lengths = [n for n in ("update_every", "update_until", "ramp_end") if hasattr(self, n)]
        check_range(method, self, "(0, inf)", lengths, "give epochs or a share")


@dataclass
class DynamicOptions(TimetableOptions):
    """Recipe fields of SET and RigL."""

    FAMILIES = (Unstructured,)

    update_until: float = option(
        0.75, "the last change of the mask: epochs (int) or share of a network's (float)"
    )
    drop: float = option(0.5, "share of every layer's weights that are replaced at first")
    drop_end: float = option(0.0, "the same at the last change; a cosine in between")
    allocation: str = option("erk", "kept weights per layer: global, uniform or erk")

    def check(self, method: str) -> None:
        super().check(method)
        check_range(method, self, "[0, 1]", ("drop", "drop_end"), "0.5 is usual")
        check_choices(method, self, {"allocation": ALLOCATIONS})


@dataclass
class GraNetOptions(DynamicOptions):
    """Recipe fields of GraNet."""

    drop_end: float = option(0.5, "the same at the last change; a cosine in between")
    start_density: float = option(0.5, "kept share at the start; at least that of the pattern")
    ramp_end: float = option(
        0.5, "the kept share has reached its target: epochs (int) or share of a network's (float)"
    )

    def check(self, method: str) -> None:
        super().check(method)
        check_range(method, self, "(0, 1]", ["start_density"], "0.5 is usual")


@dataclass
class GradualOptions(TimetableOptions):
    """Recipe fields of gradual magnitude pruning."""

    ramp_start: float = option(0.1, "pruning starts: epochs (int) or share of a network's (float)")
    ramp_end: float = option(
        0.7, "the kept share has reached its target: epochs (int) or share of a network's (float)"
    )

    def check(self, method: str) -> None:
        super().check(method)
        check_range(method, self, "[0, inf)", ["ramp_start"], "give epochs or a share")


@dataclass(frozen=True)
class Timetable:
    """Masks change in the steps every, 2 * every, ... up to `until`, counted from 0."""

    every: int
    until: int

    @classmethod
    def of(cls, method: str, every: float, until: float, epochs: int, per_epoch: int) -> Timetable:
        """From lengths in epochs (int) or shares (float); ValueError where no step is left.

        At least one change comes, and a step without one follows the last.
        """
        steps = epochs * per_epoch
        if steps < 3:
            raise ValueError(
                f"{method}: a network trains for {steps} steps, but a change of the mask needs one "
                "before and one after it; give more epochs or smaller batches"
            )
        last = min(max(1, length_in_steps(until, epochs, per_epoch)), steps - 2)
        return cls(min(max(1, length_in_steps(every, epochs, per_epoch)), last), last)

    def due(self, step: int) -> bool:
        return 0 < step <= self.until and step % self.every == 0

    def last(self, until: int | None = None) -> int:
        """The last change that comes up to a step; the first one, where that comes later."""
        until = self.until if until is None else min(until, self.until)
        return max(1, until // self.every) * self.every
