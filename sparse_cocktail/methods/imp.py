"""Iterative magnitude pruning with rewinding: lottery tickets (Frankle and Carbin; Frankle et al.).

Papers: ICLR 2019 (tickets), ICML 2020 (rewinding to an early epoch instead of the first weights).
Only the latter is offered: `rewind` counts epochs from 1 on, and 0 trains on without rewinding.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import ops
from ..patterns import Dense, Pattern, Unstructured
from ..schedules import geometric_density, keep_count
from ..selection import check_ranks_agree
from .base import Context, Method, Pass, Stage, check_range, option
from .menu import ScheduleOptions
from .updates import zero_pruned

__all__ = ["IMP", "IMPOptions", "weights_file"]

REWIND = "rewind.safetensors"


@dataclass
class IMPOptions(ScheduleOptions):
    """Recipe fields of IMP."""

    stages: int = option(10, "pruning rounds after the dense one")
    prune_unstructured: float = option(0.2, "share of the remaining weights removed per stage")
    rewind: int = option(
        1, "completed epochs of stage 0 that stages rewind to (0: train on without rewinding)"
    )

    # Whether the method is defined without rewinding, too.
    WITHOUT_REWINDING = True

    def check(self, method: str, epochs: int) -> None:
        """Raise ValueError for fields that make no run of `epochs` of this method."""
        if self.stages < 1:
            raise ValueError(f"{method}: stages={self.stages} is below 1; 10 is Sparse Cocktail's")
        check_range(method, self, "(0, 1)", ["prune_unstructured"], "0.2 is usual")
        least = 0 if self.WITHOUT_REWINDING else 1
        if not least <= self.rewind <= epochs:
            raise ValueError(
                f"{method}: rewind={self.rewind} is not in [{least}, epochs={epochs}]; it counts "
                "completed epochs of the dense stage"
            )


def weights_file(name: str | Pattern) -> str:
    """Where the trained weights of a subnet lie in the run's folder."""
    return f"pool/{name}.safetensors"


class IMP(Method):
    """Train, prune a share of what is left by magnitude, rewind, and again; a ticket per round.

    Every network keeps the weights that its own stage trained. A subclass may train further ones:
    it says which in `networks` and chooses their masks in `masks`.
    """

    Options = IMPOptions

    @classmethod
    def networks(cls, options: IMPOptions) -> list[Pattern]:
        """What the stages train, in order; ticket k keeps the share (1 - prune_unstructured)^k."""
        rounds = range(1, options.stages + 1)
        shares = [geometric_density(options.prune_unstructured, k) for k in rounds]
        return [Dense(), *(Unstructured(1.0 - share) for share in shares)]

    def plan(self, ctx: Context) -> list[Stage]:
        o, epochs = ctx.options, ctx.config.epochs
        o.check(ctx.config.method, epochs)
        self._names = [str(pattern) for pattern in self.networks(o)]
        if len(set(self._names)) < len(self._names):
            raise ValueError(
                f"{ctx.config.method}: stages={o.stages} gives two subnets the same name (four "
                "decimals); use fewer stages or smaller shares"
            )
        rate = o.learning_rate(ctx.config.lr, epochs * ctx.steps_per_epoch)
        dense, *pruned = self._names
        start = REWIND if o.rewind else None
        return [Stage(dense, epochs, rate), *(Stage(n, epochs, rate, start) for n in pruned)]

    @classmethod
    def cost(cls, options: IMPOptions, epochs: int) -> float:
        return float(len(cls.networks(options)) * epochs)

    def before_stage(self, ctx: Context) -> None:
        if ctx.stage == 0:
            return
        with ctx.timed("mask"):
            pattern, bank = self.networks(ctx.options)[ctx.stage], ctx.cocktail.bank
            row = ctx.cocktail.add(pattern, self.masks(ctx, pattern), ctx.stage).row
            check_ranks_agree(bank, [row])

    def masks(self, ctx: Context, pattern: Pattern) -> list[Tensor]:
        """The masks of the stage to come, from the weights that the one before has trained."""
        bank, before = ctx.cocktail.bank, self._names[ctx.stage - 1]
        within = ctx.cocktail.masks(before) if ctx.stage > 1 else None
        weights = [w.detach() for w in bank.weights]
        return ops.topk_masks(weights, keep_count(pattern.density, bank.numel), within)

    def step(self, ctx: Context) -> list[Pass]:
        return [Pass(self._names[ctx.stage])]

    def after_epoch(self, ctx: Context) -> None:
        if ctx.stage == 0 and ctx.epoch + 1 == ctx.options.rewind:
            ctx.save_weights(REWIND)

    def after_stage(self, ctx: Context) -> None:
        if ctx.stage > 0:
            zero_pruned(ctx, self._names[ctx.stage])  # a ticket's file holds nothing else
        ctx.save_weights(weights_file(self._names[ctx.stage]))

    def report(self, ctx: Context) -> list[str]:
        return [self._names[ctx.stage]]

    def weight_sets(self, ctx: Context) -> dict[str, list[str]]:
        return {weights_file(name): [name] for name in self._names}
