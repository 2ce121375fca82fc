"""Masks of AST: a density ramp by magnitude, then regrowth by gradient."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import ops
from ..patterns import Pattern, Unstructured
from ..regrowth import prune_and_regrow
from ..schedules import cubic, keep_count
from ..selection import eligible

__all__ = ["next_masks"]


def next_masks(
    weights: Sequence[Tensor],
    pattern: Pattern,
    present: Sequence[Tensor],
    ramp: float | None,
    gradients: Sequence[Tensor] | None = None,
    drop: float = 0.0,
) -> list[Tensor]:
    """Bits of a subnet after an update.

    Of an N:M subnet, the ramp and the regrowth concern groups of m weights: a growing share of
    them, over all layers those that lose the least magnitude by it, keeps n of its weights, and the
    others are free: they keep all. Regrowth frees the groups with the largest gradients of pruned
    weights instead of others.

    Args:
        weights: (out, in, *taps) each, the shared ones.
        pattern: `Unstructured` or `NM`; layers that cannot take it stay as they are.
        present: the masks before.
        ramp: progress of the density ramp, in [0, 1]; None behind it, where an unstructured mask
            is not made by magnitude any more.
        gradients: dense ones, to regrow by; None: do not.
        drop: share of a layer's kept weights, or free groups, that give way.
    """
    if isinstance(pattern, Unstructured):
        if ramp is not None:
            density = cubic(1.0, pattern.density, ramp)
            present = ops.topk_masks(weights, keep_count(density, sum(w.numel() for w in weights)))
        if gradients is None:
            return list(present)
        return prune_and_regrow(weights, present, drop, gradients)
    masks = list(present)
    chosen = [i for i, w in enumerate(weights) if eligible(w.shape, pattern) is None]
    if not chosen:
        return masks
    exact = {i: ops.nm_mask(weights[i], pattern.n, pattern.m) for i in chosen}
    losses = [_of_pruned(weights[i], exact[i], pattern.m) for i in chosen]
    groups = sum(loss.numel() for loss in losses)
    free = ops.topk_masks(losses, round(groups * cubic(1.0, 0.0, 1.0 if ramp is None else ramp)))
    if gradients is not None:
        signals = [_of_pruned(gradients[i], exact[i], pattern.m) for i in chosen]
        free = prune_and_regrow(losses, free, drop, signals)
    for i, loss, bits in zip(chosen, losses, free, strict=True):
        whole = ops.unpack_mask(bits, loss.shape).repeat_interleave(pattern.m, 1)
        masks[i] = ops.mask_or(exact[i], ops.pack_mask(whole))
    return masks


def _of_pruned(tensor: Tensor, bits: Tensor, m: int) -> Tensor:
    """Sum of |value| over what the bits prune of every group of m: (out, in / m, *taps)."""
    pruned = tensor - ops.masked_weight(tensor, bits)
    return pruned.abs().unflatten(1, (-1, m)).sum(2)
