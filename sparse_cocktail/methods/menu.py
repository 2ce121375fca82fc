"""The menu that most methods train: subnets by name, or a ladder of ratios of one pattern."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..patterns import Block, Channel, Pattern, Unstructured, parse
from ..schedules import cosine, decay_at, geometric_density
from ..selection import eligible
from .base import Context, option

__all__ = ["MenuOptions", "ScheduleOptions", "ladder", "report_ineligible"]

# Share of what is left that a rung removes: Sparse Cocktail's ratios.
RATES = {"unstructured": 0.2, "channel": 0.1, "block": 0.2}
NM_RUNGS = ("1:2", "2:4", "4:8")
LR_SCHEDULES = ("cosine", "steps")


def ladder(kind: str, stages: int) -> list[Pattern]:
    """Patterns of growing sparsity, those of Sparse Cocktail's stages 1 to `stages`.

    Args:
        kind: unstructured (density 0.8^k), channel (0.9^k), block-RxC (0.8^k), or n:m (1:2, 2:4
            and 4:8, whatever `stages` is).
    """
    if kind == "n:m":
        return [parse(name) for name in NM_RUNGS]
    family, *size = kind.split("-", 1)
    if family not in RATES or (family == "block") != bool(size):
        raise ValueError(
            f"ladder: kind={kind!r} is not unstructured, channel, n:m or block-RxC, as in "
            "block-16x16"
        )
    shares = [1.0 - geometric_density(RATES[family], k) for k in range(1, stages + 1)]
    if family == "block":
        found = re.fullmatch(r"(-?\d+)x(-?\d+)", size[0])
        if not found:
            raise ValueError(f"ladder: kind={kind!r} has no size RxC, as in block-16x16")
        return [Block(int(found[1]), int(found[2]), share) for share in shares]
    return [(Channel if family == "channel" else Unstructured)(share) for share in shares]


@dataclass
class ScheduleOptions:
    """Recipe fields of a learning rate that falls over a stage."""

    lr_schedule: str = option(
        "cosine", "cosine from lr to min_lr, or steps: a tenth at every milestone"
    )
    milestones: str = option("0.5,0.75", "of steps, as shares of the stage")
    min_lr: float = option(0.001, "learning rate at the end of a cosine")

    def learning_rate(self, lr: float, steps: int) -> Callable[[int], float]:
        """The learning rate of each of a stage's steps; ValueError for bad fields."""
        if not self.min_lr >= 0:
            raise ValueError(f"config: min_lr={self.min_lr} is not 0 or more")
        if self.lr_schedule not in LR_SCHEDULES:
            known = ", ".join(LR_SCHEDULES)
            raise ValueError(f"config: lr_schedule={self.lr_schedule!r} is not one of {known}")
        if self.lr_schedule == "cosine":
            return lambda step: cosine(lr, self.min_lr, step / steps)
        try:
            shares = [float(share) for share in self.milestones.split(",") if share.strip()]
        except ValueError as error:
            raise ValueError(
                f"config: milestones={self.milestones!r} are no shares such as 0.5,0.75"
            ) from error
        return lambda step: decay_at(lr, step / steps, shares, 0.1)


@dataclass
class MenuOptions(ScheduleOptions):
    """Recipe fields of a method that trains given patterns."""

    patterns: str = option(
        "", "subnets by name, as in unstructured-0.9,2:4 (empty: the rungs of ladder)"
    )
    ladder: str = option(
        "unstructured", "ratios of one pattern: unstructured, channel, n:m or block-RxC"
    )
    stages: int = option(10, "rungs of the ladder")

    # What a method can train; None: anything.
    FAMILIES = None

    def menu(self) -> list[Pattern]:
        """The patterns to train, in order; ValueError for what the method cannot train."""
        if self.stages < 1:
            raise ValueError(f"menu: stages={self.stages} is below 1; 10 is Sparse Cocktail's")
        given = [name.strip() for name in self.patterns.split(",") if name.strip()]
        made = [parse(name) for name in given] or ladder(self.ladder, self.stages)
        names = [str(pattern) for pattern in made]
        if len(set(names)) < len(names) or "dense" in names:
            raise ValueError(f"menu: patterns={names} has dense or a name twice (four decimals)")
        kinds = self.FAMILIES
        for pattern in made:
            if kinds is not None and not isinstance(pattern, kinds):
                known = ", ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"menu: this method does not train {pattern}; it takes {known}")
        return made


def report_ineligible(ctx: Context, patterns: Iterable[Pattern]) -> None:
    """Log which layers the patterns leave dense, before the first step."""
    for pattern in patterns:
        for name, layer in ctx.cocktail.layers.items():
            if reason := eligible(layer.weight.shape, pattern):
                ctx.log("left_dense", pattern=str(pattern), layer=name, reason=reason)
