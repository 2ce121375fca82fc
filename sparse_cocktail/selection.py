"""Masks of a whole network: which layers a pattern can take, and magnitude masks for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops
from .bank import MaskBank
from .global_selection import global_topk
from .patterns import NM, Block, Channel, Dense, Pattern, Unstructured
from .reference import block_count, ones
from .schedules import keep_count

__all__ = [
    "MasksDiffer",
    "check_ranks_agree",
    "eligible",
    "global_topk",
    "magnitude_masks",
    "unified_stage",
]


def eligible(shape: Sequence[int], pattern: Pattern) -> str | None:
    """None where a weight of this shape can take the pattern, else the reason why it cannot.

    A layer that cannot take a pattern stays dense in subnets of that pattern.
    """
    out, inputs = shape[:2]
    if isinstance(pattern, NM) and inputs % pattern.m:
        return f"in={inputs} is not a multiple of {pattern.m}"
    if isinstance(pattern, Block):
        for size, total, name in ((pattern.rows, out, "out"), (pattern.cols, inputs, "in")):
            if size != -1 and total % size:
                return f"{name}={total} is not a multiple of {size}"
    return None


def magnitude_masks(
    weights: Sequence[Tensor], pattern: Pattern, outputs: frozenset[int] = frozenset()
) -> list[Tensor]:
    """Bits of a pattern by magnitude, one tensor per weight; ineligible layers keep everything.

    Unstructured and Block rank globally over all weights; Channel keeps the same share of output
    channels in every layer, by their L1 norm; N:M ranks within its groups. `outputs` are indices of
    layers whose channels are the model's outputs: Channel leaves them alone.
    """
    weights = [w.detach() for w in weights]
    masks = [ones(w) for w in weights]
    chosen = [i for i, w in enumerate(weights) if eligible(w.shape, pattern) is None]
    if isinstance(pattern, Channel):
        chosen = [i for i in chosen if i not in outputs]
    if chosen and not isinstance(pattern, Dense):
        some = _eligible_masks([weights[i] for i in chosen], pattern)
        for i, bits in zip(chosen, some, strict=True):
            masks[i] = bits
    return masks


def _eligible_masks(weights: list[Tensor], pattern: Pattern) -> list[Tensor]:
    if isinstance(pattern, Unstructured):
        total = sum(w.numel() for w in weights)
        return ops.topk_masks(weights, keep_count(pattern.density, total))
    if isinstance(pattern, NM):
        return [ops.nm_mask(w, pattern.n, pattern.m) for w in weights]
    if isinstance(pattern, Channel):
        everything = [ones(w) for w in weights]
        scores = ops.channel_scores(weights, everything, everything, beta=1.0)
        keep = [keep_count(pattern.density, w.shape[0]) for w in weights]
        return ops.channel_masks(scores, keep, [w.shape for w in weights])
    if isinstance(pattern, Block):
        block = (pattern.rows, pattern.cols)
        total = sum(block_count(w.shape, block) for w in weights)
        return ops.block_masks(weights, keep_count(pattern.density, total), block)
    raise TypeError(f"magnitude_masks: pattern {pattern!r} has no magnitude masks")


def unified_stage(
    bank: MaskBank,
    keep: int,
    channel_keep: Sequence[int],
    new_nm: NM | None,
    beta: float,
    within: int | None = None,
    nm_from: int | None = None,
    channels_within: int | None = None,
    unified: bool = True,
) -> tuple[int, int, int | None]:
    """Add the rows of one Sparse Cocktail stage to the bank (paper, section 3.4).

    Args:
        bank: the bank whose weights are ranked.
        keep: weights that the unstructured mask keeps, over all layers together.
        channel_keep: output channels that the channel mask keeps, one number per layer.
        new_nm: an N:M ratio that is made fresh in this stage, or None to go on with `nm_from`.
        beta: share of the unstructured mask in the channel score.
        within: row of the previous unstructured mask (nested masks).
        nm_from: row of the N:M mask in force, or None before the first one.
        channels_within: row of the previous channel mask when channels are nested too.
        unified: score channels by what the other masks keep of them; else by their L1 norm (the
            paper's ablation "w/o UMG").

    Returns:
        Row numbers (unstructured, channel, N:M); N:M is `nm_from` unless `new_nm` made a new row.
    """
    u, c, n = bank.add(), bank.add(), None if new_nm is None else bank.add()
    nm = None if new_nm is None else (new_nm.n, new_nm.m)
    bank.unified_(
        (u, n, c), keep, nm, channel_keep, beta, within, nm_from if new_nm is None else None
    )
    n = nm_from if n is None else n
    if channels_within is not None or not unified:
        weights = [w.detach() for w in bank.weights]
        everything = [ones(w) for w in weights]
        by_u = bank.views(u) if unified else everything
        by_n = bank.views(n) if unified and n is not None else everything
        scores = ops.channel_scores(weights, by_u, by_n, beta)
        if channels_within is not None:
            alive = [bits.flatten(1).ne(0).any(1) for bits in bank.views(channels_within)]
            scores = [torch.where(a, s, -1) for a, s in zip(alive, scores, strict=True)]
        bank.set_(c, ops.channel_masks(scores, channel_keep, [w.shape for w in weights]))
    return u, c, n


class MasksDiffer(RuntimeError):
    """Processes of one run hold different masks."""


def check_ranks_agree(bank: MaskBank, rows: Iterable[int] | None = None) -> None:
    """Stop when processes of a distributed run hold different masks.

    Args:
        bank: of each process.
        rows: that are compared (default: all). One process alone compares nothing, and waits for
            no device.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    digest = "".join(bank.digest(row) for row in (range(len(bank)) if rows is None else rows))
    digests: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) > 1:
        raise MasksDiffer(
            f"masks differ between ranks after a mask step (digests {digests}); the weights have "
            "diverged: check that every rank starts from the same weights and seed"
        )
