"""The menu that most methods train: subnets by name, or a ladder of ratios of one pattern."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..patterns import NM, Block, Channel, Pattern, Unstructured, parse
from ..schedules import cosine, decay_at, geometric_density
from ..selection import eligible
from .base import Context, check_choices, check_range, option

__all__ = ["MenuOptions", "ScheduleOptions", "ladder", "layers_to_prune", "report_ineligible"]

# Share of what is left that a rung removes: Sparse Cocktail's ratios.
RATES = {"unstructured": 0.2, "channel": 0.1, "block": 0.2}
NM_RUNGS = ("1:2", "2:4", "4:8")
_FAMILY_NAMES = {Unstructured: "unstructured", Channel: "channel", NM: "N:M", Block: "block"}
LR_SCHEDULES = ("cosine", "steps")


def ladder(kind: str, stages: int) -> list[Pattern]:
    """Patterns of growing sparsity, those of Sparse Cocktail's stages 1 to `stages`.

    Args:
        kind: unstructured (density 0.8^k), channel (0.9^k), block-RxC (0.8^k), n:m (1:2, 2:4 and
            4:8, whatever `stages` is), or several, as in unstructured+n:m.
    """
    return [pattern for one in kind.split("+") for pattern in _rungs(one, stages)]


def _rungs(kind: str, stages: int) -> list[Pattern]:
    """The ladder of a single pattern."""
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
        check_range("config", self, "[0, inf)", ["min_lr"], "0 is where a cosine may end")
        check_choices("config", self, {"lr_schedule": LR_SCHEDULES})
        if self.lr_schedule == "cosine":
            if self.min_lr > lr:
                raise ValueError(
                    f"config: min_lr={self.min_lr} is above lr={lr}, but a cosine falls from lr to "
                    "min_lr; lower min_lr or raise lr"
                )
            return lambda step: cosine(lr, self.min_lr, step / steps)
        try:
            shares = [float(share) for share in self.milestones.split(",") if share.strip()]
        except ValueError as error:
            raise ValueError(
                f"config: milestones={self.milestones!r} are no shares such as 0.5,0.75"
            ) from error
        if beyond := [share for share in shares if not 0 < share < 1]:
            raise ValueError(
                f"config: milestones={self.milestones!r} has {beyond[0]:g}, which is no share of a "
                "stage in (0, 1); divide epochs by those of the stage, as in 0.5,0.75"
            )
        return lambda step: decay_at(lr, step / steps, shares, 0.1)


@dataclass
class MenuOptions(ScheduleOptions):
    """Recipe fields of a method that trains given patterns."""

    patterns: str = option(
        "", "subnets by name, as in unstructured-0.9,2:4 (empty: the rungs of ladder)"
    )
    ladder: str = option(
        "unstructured",
        "ratios of a pattern: unstructured, channel, n:m or block-RxC; several as unstructured+n:m",
    )
    stages: int = option(10, "rungs of the ladder")

    # What a method can train; None: anything.
    FAMILIES = None

    def menu(self) -> list[Pattern]:
        """The patterns to train, in order; ValueError for what the method cannot train."""
        if self.stages < 1:
            raise ValueError(
                f"{self._method()}: stages={self.stages} is below 1; 10 is Sparse Cocktail's"
            )
        given = [name.strip() for name in self.patterns.split(",") if name.strip()]
        made = [parse(name) for name in given] or ladder(self.ladder, self.stages)
        names = [str(pattern) for pattern in made]
        if len(set(names)) < len(names) or "dense" in names:
            raise ValueError(
                f"{self._method()}: patterns={names} has dense or a name twice (four decimals); "
                "name each once, without dense, or use fewer stages"
            )
        kinds = self.FAMILIES
        for pattern in made:
            if kinds is not None and not isinstance(pattern, kinds):
                takes = [_FAMILY_NAMES[kind] for kind in kinds]
                listed = " and ".join(", ".join(takes).rsplit(", ", 1))
                others = ", ".join(_methods_for(type(pattern)))
                raise ValueError(
                    f"{self._method()}: {pattern} cannot be trained; the method takes "
                    f"{listed} patterns, such as {takes[0]}-0.9. Methods for "
                    f"{_FAMILY_NAMES[type(pattern)]}: {others}"
                )
        return made

    def _method(self) -> str:
        """Name of the method whose fields these are, for messages."""
        from . import METHODS  # whose modules import this one

        found = [name for name, method in METHODS.items() if method.Options is type(self)]
        return "/".join(found) or type(self).__name__


def _methods_for(kind: type[Pattern]) -> list[str]:
    """Methods whose menus take patterns of a family, whatever their other fields are."""
    from . import METHODS  # whose modules import this one

    menus = {n: m.Options for n, m in METHODS.items() if issubclass(m.Options, MenuOptions)}
    sure = {n: menu for n, menu in menus.items() if not hasattr(menu, "base_method")}
    return [n for n, menu in sure.items() if menu.FAMILIES is None or kind in menu.FAMILIES]


def layers_to_prune(ctx: Context, pattern: Pattern) -> list[int]:
    """Places of the masked layers that a pattern prunes; the others stay dense, which is logged.

    Raises ValueError where there are none: the network would be dense under a sparse name.
    """
    cocktail, left = ctx.cocktail, {}
    for index, (name, layer) in enumerate(cocktail.layers.items()):
        reason = eligible(layer.weight.shape, pattern)
        if isinstance(pattern, Channel) and index in cocktail.outputs:
            reason = "its channels are the outputs"
        if reason:
            left[index] = name, reason
    if len(left) == len(cocktail.layers):
        name, reason = left[0]
        raise ValueError(
            f"{ctx.config.method}: no masked layer of {ctx.config.model} can take {pattern} (such "
            f"as {name}: {reason}); choose other patterns, or mask more layers (mask_linear, "
            "mask_first)"
        )
    for name, reason in left.values():
        ctx.log("left_dense", pattern=str(pattern), layer=name, reason=reason)
    if left and not isinstance(pattern, Channel):
        shown = "; ".join(f"{name} ({reason})" for name, reason in left.values())
        ctx.say_once(f"{pattern.kind} networks leave dense what does not fit: {shown}")
    return [index for index in range(len(cocktail.layers)) if index not in left]


def report_ineligible(ctx: Context, patterns: Iterable[Pattern]) -> None:
    """Log which layers the patterns leave dense, before the first step.

    Raises ValueError for a pattern that no layer can take.
    """
    for pattern in patterns:
        layers_to_prune(ctx, pattern)
