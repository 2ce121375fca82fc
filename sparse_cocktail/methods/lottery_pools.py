"""Lottery Pools: a ticket averaged with its neighbours, greedily (Yin et al., AAAI 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from torch import Tensor

from .. import ops
from ..averaging import ALPHAS, greedy_pool
from ..selection import check_ranks_agree, magnitude_masks
from .base import Context, option
from .imp import IMP, IMPOptions, weights_file

__all__ = ["LotteryPools", "LotteryPoolsOptions", "neighbours"]

# Shares of the present average; of those that score the same, the one that changes it least.
SHARES = [alpha for alpha in reversed(ALPHAS) if alpha < 1.0]

Weights = dict[str, Tensor]


@dataclass
class LotteryPoolsOptions(IMPOptions):
    """Recipe fields of Lottery Pools."""

    neighbours: int = option(4, "tickets to try for each one's average, nearest first (0: all)")
    search_samples: int = option(
        256, "samples to recalibrate BatchNorm in the search (0: mix statistics)"
    )

    WITHOUT_REWINDING = False

    def check(self, method: str, epochs: int) -> None:
        super().check(method, epochs)
        for name in ("neighbours", "search_samples"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{method}: {name}={value} is not 0 or more")


def neighbours(ticket: int, tickets: int, count: int = 0) -> list[int]:
    """The other tickets from the nearest on, the denser of two first: t - 1, t + 1, t - 2, ...

    At most `count` of them, unless that is 0.
    """
    pairs = zip_longest(range(ticket - 1, -1, -1), range(ticket + 1, tickets))
    order = [other for pair in pairs for other in pair if other is not None]
    return order[: count or None]


def average_file(name: str) -> str:
    """Where the average of a ticket lies in the run's folder."""
    return f"pool/average-{name}.safetensors"


class LotteryPools(IMP):
    """IMP, and then every ticket, the dense network among them, averaged with others.

    An average is pruned by magnitude to what the ticket keeps, over all layers together, whenever
    something is mixed into it, and so has masks of its own. The search reads the hold-out set. Its
    forwards come on top of `cost`, which cannot know them: for every ticket and each of its
    neighbours eleven times the hold-out set and `search_samples`.
    """

    Options = LotteryPoolsOptions

    @dataclass
    class State:
        averages: dict = field(default_factory=dict)  # of every ticket, its choices

    def after_stage(self, ctx: Context) -> None:
        super().after_stage(ctx)
        if ctx.stage == ctx.options.stages:
            with ctx.timed("interpolate"):
                for ticket in range(len(self._names)):
                    ctx.progress("interpolate", ticket, len(self._names))
                    self._average(ctx, ticket)

    def _average(self, ctx: Context, ticket: int) -> None:
        """Find and save the average of one ticket; the menu's masks stay those of the tickets."""
        cocktail, name = ctx.cocktail, self._names[ticket]
        calibration = ctx.calibration(ctx.options.search_samples)
        own = [bits.clone() for bits in cocktail.masks(name)] if ticket else []
        cocktail.activate("dense")

        def pruned(state: Weights) -> Weights:
            weights = {f"{n}.weight": bits for n, bits in self._masks(ctx, name, state).items()}
            return state | {n: ops.masked_weight(state[n], bits) for n, bits in weights.items()}

        def score(state: Weights) -> float:
            self._take(ctx, name, state)
            return ctx.measure([name], "holdout", calibration)[name]

        others = neighbours(ticket, len(self._names), ctx.options.neighbours)
        pool = ((other, ctx.read_weights(weights_file(self._names[other]))) for other in others)
        start = ctx.read_weights(weights_file(name))
        state, choices = greedy_pool(start, pool, score, pruned, SHARES)
        self.state.averages[name] = [vars(choice) for choice in choices]
        for c in choices:
            ctx.log("average", subnet=name, ticket=c.stage, alpha=c.alpha, score=c.score)
        self._take(ctx, name, state)
        if ticket:
            check_ranks_agree(cocktail.bank.digest(cocktail.subnets[name].row))
            cocktail.set_masks(name, own)
        ctx.save_weights(average_file(name))

    def _masks(self, ctx: Context, name: str, state: Weights) -> dict[str, Tensor]:
        """Bits by layer: of all weights together, as many of the largest as the ticket keeps."""
        cocktail = ctx.cocktail
        weights = [state[f"{layer}.weight"] for layer in cocktail.layers]
        masks = magnitude_masks(weights, cocktail.subnets[name].pattern, cocktail.outputs)
        return dict(zip(cocktail.layers, masks, strict=True))

    def _take(self, ctx: Context, name: str, state: Weights) -> None:
        """Give the model these weights, and the subnet the masks that belong to them."""
        ctx.model.load_state_dict(state)
        if name != "dense":
            ctx.cocktail.set_masks(name, list(self._masks(ctx, name, state).values()))

    def weight_sets(self, ctx: Context) -> dict[str, list[str]]:
        return {average_file(name): [name] for name in self._names}

    def finish(self, ctx: Context) -> dict[str, dict[str, Any]]:
        own = {}
        for name in self._names:
            ctx.cocktail.activate("dense")
            ctx.model.load_state_dict(ctx.read_weights(weights_file(name)))
            own |= ctx.measure([name], "test")
        for name in self._names:
            self._take(ctx, name, ctx.read_weights(average_file(name)))
        scores = super().finish(ctx)
        return {name: {**score, "accuracy_own": own[name]} for name, score in scores.items()}
