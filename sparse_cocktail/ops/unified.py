"""Ops of the `masks` family that choose channels, and unified mask generation of a whole stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import reference
from ..reference import beta_shares, bits_shape
from .checks import as_list, check_bits, check_device, check_same_length, check_weights, whole
from .dispatch import define, lazy_triton
from .masks import check_keep, check_within, new_bits, packed, strided

__all__ = ["channel_masks", "channel_scores", "unified_masks"]

_cpp = torch.ops.sparse_cocktail_cpp


def check_beta(op: str, beta: float) -> None:
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"{op}: beta={beta} is not in [0, 1]; the paper uses 0.8")


def check_ratio(op: str, nm: Sequence[int]) -> None:
    """`nm` is (n, m), or empty for no fresh N:M masks."""
    if nm and (len(nm) != 2 or not 1 <= nm[0] < nm[1] <= 32):
        raise ValueError(
            f"{op}: nm={tuple(nm)} breaks 1 <= n < m <= 32; for example (2, 4) keeps 2 of 4"
        )


def as_ratio(op: str, nm: Sequence[int] | None) -> list[int]:
    """`nm` as ops take it: n and m, or nothing."""
    if nm is not None and not isinstance(nm, (tuple, list)):
        raise TypeError(f"{op}: nm={nm!r} is no pair of ints; for example (2, 4) keeps 2 of 4")
    return list(nm or ())


def as_counts(op: str, name: str, counts: Sequence[int]) -> list[int]:
    """A list of counts; a tensor or an array of them is one too."""
    if not isinstance(counts, Iterable):
        raise TypeError(f"{op}: {name}={counts!r} is no list of counts; give one count per weight")
    return [whole(op, f"{name}[{i}]", count) for i, count in enumerate(counts)]


def _check_scores(weights, unstructured, nm, beta) -> None:
    check_weights("channel_scores", weights)
    check_beta("channel_scores", beta)
    for masks, name in ((unstructured, "unstructured"), (nm, "nm")):
        check_same_length("channel_scores", weights, masks, name)
        for i, (weight, bits) in enumerate(zip(weights, masks, strict=True)):
            check_bits("channel_scores", bits, bits_shape(weight.shape), f"{name}[{i}]")
            check_device("channel_scores", bits, weight, f"{name}[{i}]")


_scores = define(
    "channel_scores(Tensor[] weights, Tensor[] unstructured, Tensor[] nm, float beta) -> Tensor[]",
    triton=lazy_triton("triton_masks", "channel_scores"),
    reference=reference.channel_scores,
    cpp=lambda weights, unstructured, nm, beta: _cpp.channel_scores(
        [strided(w) for w in weights], packed(unstructured), packed(nm), *beta_shares(beta)
    ),
    fake=lambda weights, unstructured, nm, beta: [
        w.new_empty(w.shape[:1], dtype=torch.int64) for w in weights
    ],
    check=_check_scores,
)


def channel_scores(
    weights: Sequence[Tensor],
    unstructured: Sequence[Tensor],
    nm: Sequence[Tensor],
    beta: float = 0.8,
) -> list[Tensor]:
    """Importance of every output channel: beta * |mu * w|_1 + (1 - beta) * |mn * w|_1.

    Sums are in fixed point (round(|w| * 2^38) in int64, saturating) and beta is a ratio of integers
    (0.8 -> 4 : 1), so every backend gives the same int64 scores, shape (out,).
    Source: Sparse Cocktail, section 3.4.
    """
    named = {"weights": weights, "unstructured": unstructured, "nm": nm}
    return _scores(*(as_list("channel_scores", n, v) for n, v in named.items()), beta)


def _check_channel_masks(scores, keep, taps, inputs) -> None:
    for name, other in (("keep", keep), ("shapes", taps), ("shapes", inputs)):
        if len(other) != len(scores):
            raise ValueError(
                f"channel_masks: {name} has {len(other)} entries for {len(scores)} score tensors; "
                "give one each"
            )
    for i, (score, count) in enumerate(zip(scores, keep, strict=True)):
        if score.dtype != torch.int64 or score.dim() != 1:
            raise TypeError(
                f"channel_masks: scores[{i}] is {score.dtype} of shape {tuple(score.shape)}, "
                "but scores are int64 of shape (out,); make them with ops.channel_scores"
            )
        if not 0 <= count <= score.numel():
            raise ValueError(
                f"channel_masks: keep[{i}]={count} is not in [0, {score.numel()}], the number "
                "of output channels; give a count, for example round(density * out)"
            )


_channels = define(
    "channel_masks(Tensor[] scores, int[] keep, SymInt[] taps, SymInt[] inputs) -> Tensor[]",
    triton=lazy_triton("triton_masks", "channel_masks"),
    reference=lambda scores, keep, taps, inputs: reference.channel_masks(
        scores, keep, [(s.numel(), i, t) for s, t, i in zip(scores, taps, inputs, strict=True)]
    ),
    cpp=lambda scores, keep, taps, inputs: _cpp.channel_masks(
        [s.contiguous() for s in scores], keep, taps, inputs
    ),
    fake=lambda scores, keep, taps, inputs: [
        s.new_empty(bits_shape((s.shape[0], i, t)), dtype=torch.int32)
        for s, t, i in zip(scores, taps, inputs, strict=True)
    ],
    check=_check_channel_masks,
)


def channel_masks(
    scores: Sequence[Tensor], keep: Sequence[int], shapes: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Bits that keep whole output channels: the keep[i] best of layer i; ties to the lower channel.

    Args:
        scores: int64 (out,) per layer, as from `channel_scores`. Negative scores are never kept.
        keep: number of channels per layer.
        shapes: shape (out, in, *taps) of each weight.
    """
    op = "channel_masks"
    scores, shapes = as_list(op, "scores", scores), as_list(op, "shapes", shapes)
    for i, (score, shape) in enumerate(zip(scores, shapes, strict=False)):
        if len(shape) < 2 or shape[0] != score.numel() or min(shape) < 0:
            raise ValueError(
                f"channel_masks: shapes[{i}]={tuple(shape)} is no shape (out, in, *taps) with the "
                f"{score.numel()} channels of scores[{i}]; give the shape of its weight"
            )
    taps = [math.prod(shape[2:]) for shape in shapes]
    return _channels(scores, as_counts(op, "keep", keep), taps, [shape[1] for shape in shapes])


def _unified_reference(weights, keep, nm, channel_keep, beta, within=None, nm_bits=None):
    nm = tuple(nm) or None
    lists = reference.unified_masks(weights, keep, nm, channel_keep, beta, within, nm_bits)
    return [bits for masks in lists for bits in masks]


def _unified_cpp(weights, keep, nm, channel_keep, beta, within=None, nm_bits=None):
    weights = [strided(w) for w in weights]
    shares = beta_shares(beta)
    return _cpp.unified_masks(
        weights, keep, nm, channel_keep, shares, packed(within), packed(nm_bits)
    )


def _check_unified(weights, keep, nm, channel_keep, beta, within=None, nm_bits=None) -> None:
    op = "unified_masks"
    check_weights(op, weights)
    check_keep(op, [keep], [w.numel() for w in weights], "elements")
    check_beta(op, beta)
    check_within(op, weights, within)
    check_same_length(op, weights, channel_keep, "channel_keep")
    for i, (weight, count) in enumerate(zip(weights, channel_keep, strict=True)):
        if not 0 <= count <= weight.shape[0]:
            raise ValueError(
                f"{op}: channel_keep[{i}]={count} is not in [0, {weight.shape[0]}], the number "
                "of output channels; give a count"
            )
    check_ratio(op, nm)
    if nm and nm_bits is not None:
        raise ValueError(f"{op}: both nm={tuple(nm)} and nm_bits are given; give one of them")
    if nm_bits is not None:
        check_same_length(op, weights, nm_bits, "nm_bits")
        for i, (weight, bits) in enumerate(zip(weights, nm_bits, strict=True)):
            check_bits(op, bits, bits_shape(weight.shape), f"nm_bits[{i}]")
            check_device(op, bits, weight, f"nm_bits[{i}]")


_unified = define(
    "unified_masks(Tensor[] weights, int keep, int[] nm, int[] channel_keep, float beta, "
    "Tensor[]? within=None, Tensor[]? nm_bits=None) -> Tensor[]",
    triton=lazy_triton("triton_masks", "unified_masks"),
    reference=_unified_reference,
    cpp=_unified_cpp,
    fake=lambda weights, *_: [new_bits(w) for _ in range(3) for w in weights],
    check=_check_unified,
)


def unified_masks(
    weights: Sequence[Tensor],
    keep: int,
    nm: tuple[int, int] | None,
    channel_keep: Sequence[int],
    beta: float = 0.8,
    within: Sequence[Tensor] | None = None,
    nm_bits: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Unstructured, N:M and channel masks of one stage (Sparse Cocktail, section 3.4).

    Args:
        weights: tensors (out, in, *taps) of one dtype and device.
        keep: number of single weights the unstructured mask keeps over all tensors together.
        nm: (n, m) for fresh N:M masks, where in % m == 0 (other layers keep everything); or None:
            then `nm_bits` are taken, or everything is kept.
        channel_keep: number of output channels to keep per layer, chosen by `channel_scores`.
        beta: share of the unstructured mask in the channel score.
        within: bits of the weights that are eligible for the unstructured mask (nesting).

    Returns:
        (unstructured, nm, channel), each one int32 tensor of bits per weight.
    """
    op = "unified_masks"
    weights = as_list(op, "weights", weights)
    flat = _unified(
        weights,
        whole(op, "keep", keep),
        as_ratio(op, nm),
        as_counts(op, "channel_keep", channel_keep),
        beta,
        None if within is None else as_list(op, "within", within),
        None if nm_bits is None else as_list(op, "nm_bits", nm_bits),
    )
    count = len(weights)
    return flat[:count], flat[count : 2 * count], flat[2 * count :]
