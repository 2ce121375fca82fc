"""What methods do to weights and momentum besides the optimizer's step."""

from __future__ import annotations

import torch

from .. import ops
from .base import Context

__all__ = ["reset_momentum", "zero_pruned"]


@torch.no_grad()
def zero_pruned(ctx: Context, name: str) -> None:
    """Make the weights that a subnet prunes zero, and what the optimizer remembers of them."""
    masks = ctx.cocktail.masks(name)
    for layer, bits in zip(ctx.cocktail.layers.values(), masks, strict=True):
        state = ctx.optimizer.state.get(layer.weight, {})
        for tensor in (layer.weight, *state.values()):
            if isinstance(tensor, torch.Tensor) and tensor.shape == layer.weight.shape:
                tensor.copy_(ops.masked_weight(tensor.detach(), bits))


@torch.no_grad()
def reset_momentum(ctx: Context) -> None:
    """Make the optimizer forget all gradients of the past."""
    for state in ctx.optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and name != "step":
                value.zero_()
