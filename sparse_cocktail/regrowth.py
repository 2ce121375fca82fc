"""Dynamic sparse training: the weakest weights of a layer make room for others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .reference import ones

__all__ = ["prune_and_regrow", "random_masks"]


def prune_and_regrow(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    drop: float,
    gradients: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """New masks with as many weights in every layer: drop the smallest |w|, grow others.

    Candidates for growth are all weights but those that stay, as in RigL (Evci et al., 2020,
    Algorithm 1): a weight that was just dropped comes back if it ranks, or is drawn, again. Ties
    go to the lower position.

    Args:
        weights: tensors (out, in, *taps) of one dtype and device.
        masks: their present int32 bits.
        drop: share of the kept weights of every layer that is dropped, to nearest (half up).
        gradients: dense gradients, like the weights: the largest |gradient| grow (RigL).
        generator: on the CPU; without gradients, weights grow at random (SET, Mocanu et al., 2018).

    Raises:
        ValueError: for a share out of [0, 1], or with both or neither of the last two arguments.
    """
    if not 0.0 <= drop <= 1.0:
        raise ValueError(f"prune_and_regrow: drop={drop} is not in [0, 1]; give a share")
    if (gradients is None) == (generator is None):
        raise ValueError(
            "prune_and_regrow: give either gradients (growth by magnitude) or a generator (growth "
            "at random)"
        )
    counts = [int(ops.mask_count(bits)) for bits in masks]
    grow = [math.floor(drop * count + 0.5) for count in counts]
    keep = [count - less for count, less in zip(counts, grow, strict=True)]
    kept = ops.topk_masks(weights, keep, within=masks)
    free = [ops.mask_andnot(ones(w), bits) for w, bits in zip(weights, kept, strict=True)]
    scores = _random_scores(weights, generator) if gradients is None else gradients
    grown = ops.topk_masks(scores, grow, within=free)
    return [ops.mask_or(a, b) for a, b in zip(kept, grown, strict=True)]


def random_masks(
    weights: Sequence[Tensor], keep: int | Sequence[int], generator: torch.Generator
) -> list[Tensor]:
    """Bits of `keep` weights at random, over all layers together or per layer (see `topk_masks`).

    Args:
        weights: their shapes and device count.
        keep: as `allocation.layer_counts` gives it.
        generator: on the CPU, so that masks are the same on every device.
    """
    return ops.topk_masks(_random_scores(weights, generator), keep)


def _random_scores(weights: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    return [torch.rand(w.shape, generator=generator).to(w.device) for w in weights]
