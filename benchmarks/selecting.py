"""Shared by ours and the peers: flat views, the mask of an earlier stage, counts without ties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sparse_cocktail import ops
from sparse_cocktail.reference import unpack_mask

from shapes import Case, Weights  # isort: skip - neighbours, not packages
from timing import Bound  # isort: skip

__all__ = ["bools", "flat", "keep_count", "magnitudes", "unflat", "with_mask", "within"]


def flat(weight: Tensor) -> Tensor:
    """All elements in memory order, without a copy."""
    return weight.as_strided((weight.numel(),), (1,))


def unflat(parts: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Masks in the weights' shapes and strides, as views of one flat mask in memory order."""
    pieces = parts.split([w.numel() for w in weights])
    return [
        piece.as_strided(w.shape, w.stride(), piece.storage_offset())
        for piece, w in zip(pieces, weights, strict=True)
    ]


def magnitudes(weights: Sequence[Tensor], eligible: Sequence[Tensor] | None) -> Tensor:
    """|w| of all weights in one flat tensor; -1 where a weight is not eligible."""
    scores = torch.cat([flat(w) for w in weights]).abs_()
    if eligible is not None:
        scores.masked_fill_(torch.cat([~flat(m) for m in eligible]), -1)
    return scores


def bools(bits: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Bool masks with the weights' strides: what a peer would hold."""
    return [
        torch.empty_like(w, dtype=torch.bool).copy_(unpack_mask(b, w.shape))
        for w, b in zip(weights, bits, strict=True)
    ]


class Within:
    """The mask of an earlier stage: the largest weights of a time when they had other values.

    `bits` and `masks` (bool) keep their addresses; `renew` follows new values of the weights.
    """

    def __init__(self, given: Weights, keep: int) -> None:
        self.given, self.keep = given, keep
        self.bits = self._select()
        self.masks = bools(self.bits, given.tensors)

    def _select(self) -> list[Tensor]:
        before = _changes(self.given.case, self.given.device)
        pairs = zip(self.given.tensors, before.tensors, strict=True)
        return ops.topk_masks([w * b for w, b in pairs], self.keep)

    def bound(self, call: Callable, follow: Callable[[], None] | None = None) -> Bound:
        """On a GPU the weights change under one address, and the mask with them, untimed."""
        if not self.given.fixed:
            return Bound(call)

        def reset() -> None:
            self.renew()
            if follow is not None:
                follow()

        return Bound(call, reset)

    def renew(self) -> None:
        for own, new in zip(self.bits, self._select(), strict=True):
            own.copy_(new)
        for own, new in zip(self.masks, bools(self.bits, self.given.tensors), strict=True):
            own.copy_(new)


@lru_cache(maxsize=1)
def _changes(case: Case, device: torch.device) -> Weights:
    """Factors from 0.5 to 1.5: what the weights were before, over what they are."""
    generator = torch.Generator(device).manual_seed(1)
    factors = torch.rand(case.numel, generator=generator, device=device).add_(0.5)
    return Weights(case, factors.to(case.dtype))


def within(given: Weights, keep: int) -> Within:
    """The earlier mask of a set of weights, made once: all implementations read the same one."""
    if keep not in given.memo:
        given.memo[keep] = Within(given, keep)
    return given.memo[keep]


def with_mask(call: Callable, eligible: int | None) -> Callable[[Weights], Bound]:
    """A bind for `call(tensors, masks)`; masks (bool) of `eligible` weights, or None."""

    def bind(given: Weights) -> Bound:
        if eligible is None:
            return Bound(lambda: call(given.tensors, None))
        earlier = within(given, eligible)
        return earlier.bound(lambda: call(given.tensors, earlier.masks))

    return bind


def keep_count(weights: Weights, share: float, eligible: int | None = None) -> int:
    """Number of weights close to a share of all, so that no tie lies at the threshold.

    bfloat16 has hundreds of ties there, and takes the share as it is.
    """
    keep = round(share * weights.case.numel)
    if weights.case.dtype != torch.float32:
        return keep
    masks = None if eligible is None else within(weights, eligible).masks
    scores = magnitudes(weights.tensors, masks)
    return int((scores >= torch.topk(scores, keep, sorted=False).values.min()).sum())
