"""What methods do to weights and momentum besides the optimizer's step."""

from __future__ import annotations

import torch

from .. import ops
from .base import Context

__all__ = ["dense_gradients", "reset_momentum", "zero_pruned"]


def dense_gradients(ctx: Context) -> list[torch.Tensor] | None:
    """Copies of the masked layers' gradients, to grow weights by; None where one is not finite.

    So they are in steps that the scaler of fp16 leaves out. Call it in `before_step` of a step with
    `dense_grad`: optimizers may change gradients in place (SGD with Nesterov momentum does).
    """
    weights = [layer.weight for layer in ctx.cocktail.layers.values()]
    copies = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in weights]
    finite = torch.stack([copy.isfinite().all() for copy in copies]).all()
    return copies if finite else None


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
    """Make the optimizer forget all gradients of the past, and how many there were.

    AdamW divides its means by what they lack of the first steps, which it knows by their number.
    """
    for state in ctx.optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
