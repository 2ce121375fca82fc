"""Refilling: channel-wise tickets out of unstructured ones (Chen et al., ICML 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..patterns import Channel, Pattern, Unstructured
from ..schedules import geometric_density, keep_count
from .base import Context, check_choices, check_range, option
from .imp import IMP, IMPOptions, weights_file

__all__ = ["Refilling", "RefillingOptions"]

_CHOICES = {
    "criterion": ("magnitude", "remain"),
    "channel_allocation": ("follow_unstructured", "uniform"),
}


@dataclass
class RefillingOptions(IMPOptions):
    """Recipe fields of Refilling."""

    criterion: str = option(
        "magnitude",
        "what a ticket leaves of the channels to keep: magnitude (L1 norm) or remain (how many "
        "weights)",
    )
    channel_allocation: str = option(
        "follow_unstructured",
        "share of channels kept: follow_unstructured (the ticket's density in that layer) or "
        "uniform (prune_channel's in every layer)",
    )
    prune_channel: float = option(0.1, "share of the remaining channels removed per stage")

    WITHOUT_REWINDING = False

    def check(self, method: str, epochs: int) -> None:
        super().check(method, epochs)
        check_range(method, self, "(0, 1)", ["prune_channel"], "0.1 is usual")
        check_choices(method, self, _CHOICES)


class Refilling(IMP):
    """IMP, and then for every ticket a network of whole channels, trained from the rewound weights.

    In each layer the channels stay in which the trained ticket has most left; their pruned weights
    come back with the values that are rewound to. Their number is rounded to nearest, and at least
    1, where the paper rounds down. A channel network has its ticket's nominal sparsity in its name,
    which its own is but for that rounding; with a uniform allocation it is that of the channel
    ladder.
    """

    Options = RefillingOptions

    @classmethod
    def networks(cls, options: RefillingOptions) -> list[Pattern]:
        dense, *tickets = super().networks(options)
        uniform, rounds = options.channel_allocation == "uniform", range(1, options.stages + 1)
        ladder = [1.0 - geometric_density(options.prune_channel, k) for k in rounds]
        shares = ladder if uniform else [ticket.sparsity for ticket in tickets]
        return [dense, *tickets, *map(Channel, shares)]

    def masks(self, ctx: Context, pattern: Pattern) -> list[Tensor]:
        if isinstance(pattern, Unstructured):
            return super().masks(ctx, pattern)
        o, cocktail = ctx.options, ctx.cocktail
        ticket = self._names[ctx.stage - o.stages]
        bits, trained = cocktail.masks(ticket), ctx.read_weights(weights_file(ticket))
        weights = [trained[f"{name}.weight"] for name in cocktail.layers]
        if o.criterion == "remain":
            weights = [torch.ones_like(w) for w in weights]
        keep = []
        for index, (weight, kept) in enumerate(zip(weights, bits, strict=True)):
            density = int(ops.mask_count(kept)) / weight.numel()
            if o.channel_allocation == "uniform":
                density = pattern.density
            width = len(weight)
            keep.append(width if index in cocktail.outputs else keep_count(density, width))
        scores = ops.channel_scores(weights, bits, bits, beta=1.0)
        return ops.channel_masks(scores, keep, [w.shape for w in weights])
