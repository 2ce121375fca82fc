"""Lottery Pools: a ticket averaged with its neighbours, greedily (Yin et al., AAAI 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from torch import Tensor

from .. import ops
from ..averaging import ALPHAS, greedy_pool
from ..files import read_tensors
from ..selection import check_ranks_agree, magnitude_masks
from .base import Context, check_range, option
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
        check_range(method, self, "[0, inf)", ["neighbours"], "0 tries all tickets")
        check_range(method, self, "[0, inf)", ["search_samples"], "0 mixes statistics")


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
    neighbours eleven times the hold-out set and `search_samples`. An average that is found stays
    found: a run that is stopped in the search goes on behind it.
    """

    Options = LotteryPoolsOptions

    @dataclass
    class State:
        averages: dict = field(default_factory=dict)  # of every ticket, its choices

    def after_stage(self, ctx: Context) -> None:
        super().after_stage(ctx)
        if ctx.stage == ctx.options.stages:
            with ctx.timed("interpolate"):
                for ticket, name in enumerate(self._names):
                    ctx.progress("interpolate", ticket, len(self._names))
                    file = ctx.folder / average_file(name)
                    if file.exists():  # by this run, before it was stopped in the search
                        _, found = read_tensors(file)
                    else:
                        found = self._average(ctx, ticket)
                    self.state.averages[name] = found["choices"]
                    ctx.count("forward", found["forwards"])

    def _average(self, ctx: Context, ticket: int) -> dict[str, Any]:
        """Find and save the average of one ticket; the menu's masks stay those of the tickets.

        Returns what is in the file's header: the choices, and how many samples went forward.
        """
        cocktail, name = ctx.cocktail, self._names[ticket]
        calibration = ctx.calibration(ctx.options.search_samples)
        own = [bits.clone() for bits in cocktail.masks(name)] if ticket else []
        counted, ctx.samples = ctx.samples, {}
        cocktail.activate("dense")
        present: list[Tensor] = []  # bits of what was pruned last, which `greedy_pool` then scores

        def pruned(state: Weights) -> Weights:
            present[:] = self._masks(ctx, name, state)
            pairs = zip((f"{layer}.weight" for layer in cocktail.layers), present, strict=True)
            return state | {n: ops.masked_weight(state[n], bits) for n, bits in pairs}

        def score(state: Weights) -> float:
            self._take(ctx, name, state, present)
            return ctx.measure([name], "holdout", calibration)[name]

        others = neighbours(ticket, len(self._names), ctx.options.neighbours)
        pool = ((other, ctx.read_weights(weights_file(self._names[other]))) for other in others)
        start = pruned(ctx.read_weights(weights_file(name)))
        state, choices = greedy_pool(start, pool, score, pruned, SHARES)
        for c in choices:
            ctx.log("average", subnet=name, ticket=c.stage, alpha=c.alpha, score=c.score)
        self._take(ctx, name, state, self._masks(ctx, name, state))
        if ticket:
            check_ranks_agree(cocktail.bank, [cocktail.subnets[name].row])
            cocktail.set_masks(name, own)
        ctx.samples, spent = counted, ctx.samples
        found = {"choices": list(map(vars, choices)), "forwards": sum(spent.values())}
        ctx.save_weights(average_file(name), found)
        return found

    def _masks(self, ctx: Context, name: str, state: Weights) -> list[Tensor]:
        """Bits per layer: of all weights together, as many of the largest as the ticket keeps."""
        # the ticket's own pattern: in a resumed run the menu's has the four decimals of its name
        pattern = self.networks(ctx.options)[self._names.index(name)]
        weights = [state[f"{layer}.weight"] for layer in ctx.cocktail.layers]
        return magnitude_masks(weights, pattern, ctx.cocktail.outputs)

    def _take(self, ctx: Context, name: str, state: Weights, masks: list[Tensor]) -> None:
        """Give the model these weights, and the subnet the masks that belong to them."""
        ctx.model.load_state_dict(state)
        if name != "dense":
            ctx.cocktail.set_masks(name, masks)

    def weight_sets(self, ctx: Context) -> dict[str, list[str]]:
        return {average_file(name): [name] for name in self._names}

    def finish(self, ctx: Context) -> dict[str, dict[str, Any]]:
        own = {}
        for name in self._names:
            ctx.cocktail.activate("dense")
            ctx.model.load_state_dict(ctx.read_weights(weights_file(name)))
            own |= ctx.measure([name], "test")
        for name in self._names:
            average = ctx.read_weights(average_file(name))
            self._take(ctx, name, average, self._masks(ctx, name, average))
        scores = super().finish(ctx)
        return {name: {**score, "accuracy_own": own[name]} for name, score in scores.items()}
