"""Ops of the `masks` family: pack, combine and select mask bits. Formats: README, "Formats"."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..reference import bits_shape, block_count
from .dispatch import (
    check_bits,
    check_same_length,
    check_weight,
    check_weights,
    define,
)

__all__ = [
    "block_masks",
    "channel_masks",
    "channel_scores",
    "mask_and",
    "mask_andnot",
    "mask_count",
    "mask_or",
    "nm_mask",
    "pack_mask",
    "topk_masks",
    "unified_masks",
    "unpack_mask",
]

_cpp = torch.ops.sparse_cocktail_cpp


def _strided(weight: Tensor) -> Tensor:
    """The weight itself where C++ can walk it (its taps have one common stride), else a copy."""
    taps = [(n, s) for n, s in zip(weight.shape[2:], weight.stride()[2:], strict=True) if n != 1]
    merge = all(a[1] == b[0] * b[1] for a, b in zip(taps, taps[1:], strict=False))
    return weight if merge else weight.contiguous()


def _new_bits(weight: Tensor) -> Tensor:
    return weight.new_empty(bits_shape(weight.shape), dtype=torch.int32)


# ---- pack, unpack, count, combine ----------------------------------------------------------------


def _check_pack(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(
            f"pack_mask: mask has dtype {mask.dtype}, but a mask is torch.bool; use mask != 0"
        )
    if mask.dim() < 2:
        raise ValueError(
            f"pack_mask: mask has shape {tuple(mask.shape)}, but it needs its weight's shape "
            "(out, in, *taps)"
        )


_pack = define(
    "pack_mask(Tensor mask) -> Tensor",
    reference=reference.pack_mask,
    cpp=lambda mask: _cpp.pack_mask(mask.contiguous()),
    fake=_new_bits,
    check=_check_pack,
)


def _check_unpack(bits: Tensor, shape: Sequence[int]) -> None:
    if len(shape) < 2:
        raise ValueError(
            f"unpack_mask: shape={tuple(shape)} has fewer than the 2 dimensions (out, in) of a "
            "weight; give the shape of the weight"
        )
    check_bits("unpack_mask", bits, bits_shape(shape))


_unpack = define(
    "unpack_mask(Tensor bits, SymInt[] shape) -> Tensor",
    reference=reference.unpack_mask,
    cpp=lambda bits, shape: _cpp.unpack_mask(bits.contiguous(), shape),
    fake=lambda bits, shape: bits.new_empty(shape, dtype=torch.bool),
    check=_check_unpack,
)


def _check_count(bits: Tensor) -> None:
    if bits.dtype != torch.int32:
        raise TypeError(
            f"mask_count: bits have dtype {bits.dtype}, but mask bits are int32 words; make them "
            "with ops.pack_mask(mask)"
        )


_count = define(
    "mask_count(Tensor bits) -> Tensor",
    reference=reference.mask_count,
    cpp=lambda bits: _cpp.mask_count(bits.contiguous()),
    fake=lambda bits: bits.new_empty((), dtype=torch.int64),
    check=_check_count,
)


def _define_combination(name: str, combine) -> object:
    def check(a: Tensor, b: Tensor) -> None:
        check_bits(name, a, tuple(b.shape), "a")
        check_bits(name, b, tuple(a.shape), "b")

    # A bitwise operation of torch is one fused pass already: no backend of ours can beat it.
    return define(
        f"{name}(Tensor a, Tensor b) -> Tensor",
        reference=combine,
        cpp=combine,
        fake=lambda a, b: torch.empty_like(a),
        check=check,
    )


_and = _define_combination("mask_and", reference.mask_and)
_or = _define_combination("mask_or", reference.mask_or)
_andnot = _define_combination("mask_andnot", reference.mask_andnot)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask of shape (out, in, *taps) into int32 bits (out, taps, ceil(in / 32))."""
    return _pack(mask)


def unpack_mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask of shape (out, in, *taps), contiguous, that the bits hold."""
    return _unpack(bits, list(shape))


def mask_count(bits: Tensor) -> Tensor:
    """Number of kept elements, int64 of shape (), on the device of the bits."""
    return _count(bits)


def mask_and(a: Tensor, b: Tensor) -> Tensor:
    """Elements that both masks keep."""
    return _and(a, b)


def mask_or(a: Tensor, b: Tensor) -> Tensor:
    """Elements that either mask keeps."""
    return _or(a, b)


def mask_andnot(a: Tensor, b: Tensor) -> Tensor:
    """Elements that `a` keeps and `b` does not (padding bits stay 0, unlike with ~b)."""
    return _andnot(a, b)


# ---- N:M -----------------------------------------------------------------------------------------


def _check_nm(weight: Tensor, n: int, m: int) -> None:
    check_weight("nm_mask", weight)
    if not 1 <= n < m <= 32:
        raise ValueError(
            f"nm_mask: n={n}, m={m} breaks 1 <= n < m <= 32; for example n=2, m=4 keeps 2 of 4"
        )
    if weight.shape[1] % m:
        raise ValueError(
            f"nm_mask: weight has in={weight.shape[1]}, which is not a multiple of m={m}; pad the "
            "layer or leave it dense"
        )


_nm = define(
    "nm_mask(Tensor weight, int n, int m) -> Tensor",
    reference=reference.nm_mask,
    cpp=lambda weight, n, m: _cpp.nm_mask(_strided(weight), n, m),
    fake=lambda weight, n, m: _new_bits(weight),
    check=_check_nm,
)


def nm_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Bits that keep the n largest |w| of every m consecutive weights along `in`.

    Args:
        weight: (out, in, *taps), float32, bfloat16, float16 or float64; in % m == 0.
        n, m: 1 <= n < m <= 32.

    Returns:
        int32 bits (out, taps, ceil(in / 32)).
    """
    return _nm(weight, n, m)


# ---- top-k ---------------------------------------------------------------------------------------


def _check_keep(op: str, keep: Sequence[int], sizes: list[int], unit: str) -> None:
    limits = [sum(sizes)] if len(keep) == 1 else sizes
    if len(keep) != 1 and len(keep) != len(sizes):
        raise ValueError(
            f"{op}: keep has {len(keep)} entries for {len(sizes)} weights; give one int for all "
            "of them together, or one per weight"
        )
    for count, limit in zip(keep, limits, strict=True):
        if not 0 <= count <= limit:
            raise ValueError(
                f"{op}: keep={count} is not in [0, {limit}], the number of {unit}; give a count, "
                "for example round(density * total)"
            )


def _check_within(op: str, weights: list[Tensor], within: list[Tensor] | None) -> None:
    if within is None:
        return
    check_same_length(op, weights, within, "within")
    for index, (weight, bits) in enumerate(zip(weights, within, strict=True)):
        check_bits(op, bits, bits_shape(weight.shape), f"within[{index}]")


def _check_topk(weights: list[Tensor], keep: list[int], within: list[Tensor] | None) -> None:
    check_weights("topk_masks", weights)
    _check_keep("topk_masks", keep, [w.numel() for w in weights], "elements")
    _check_within("topk_masks", weights, within)


def _topk_cpp(weights, keep, within=None) -> list[Tensor]:
    within = None if within is None else [bits.contiguous() for bits in within]
    return _cpp.topk_masks([_strided(w) for w in weights], keep, within)


_topk = define(
    "topk_masks(Tensor[] weights, int[] keep, Tensor[]? within=None) -> Tensor[]",
    reference=reference.topk_masks,
    cpp=_topk_cpp,
    fake=lambda weights, keep, within=None: [_new_bits(w) for w in weights],
    check=lambda weights, keep, within=None: _check_topk(weights, keep, within),
)


def _as_list(keep: int | Sequence[int]) -> list[int]:
    return [keep] if isinstance(keep, int) else list(keep)


def topk_masks(
    weights: Sequence[Tensor],
    keep: int | Sequence[int],
    within: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Bits that keep exactly the `keep` largest |value|, over all tensors together or per tensor.

    Scores, gradients and random numbers can be ranked as well as weights.

    Args:
        weights: tensors (out, in, *taps) of one dtype and device.
        keep: an int for all tensors together, or a list with one count per tensor.
        within: bits of the eligible elements; where fewer are eligible, all of them are kept.

    Returns:
        One int32 tensor of bits per weight.
    """
    return _topk(list(weights), _as_list(keep), None if within is None else list(within))


# ---- blocks --------------------------------------------------------------------------------------


def _check_block(weights, keep, block, within=None) -> None:
    check_weights("block_masks", weights)
    if len(block) != 2 or any(size < 1 and size != -1 for size in block):
        raise ValueError(
            f"block_masks: block={tuple(block)} is not (rows, cols) of positive sizes or -1 for a "
            "whole dimension"
        )
    for index, weight in enumerate(weights):
        for size, total, name in zip(block, weight.shape, ("out", "in"), strict=False):
            if size != -1 and total % size:
                raise ValueError(
                    f"block_masks: weights[{index}] has {name}={total}, which is not a multiple of "
                    f"the block's {size}; pad the layer or leave it dense"
                )
    _check_keep("block_masks", keep, [block_count(w.shape, block) for w in weights], "blocks")
    _check_within("block_masks", weights, within)


_block = define(
    "block_masks(Tensor[] weights, int[] keep, int[] block, Tensor[]? within=None) -> Tensor[]",
    reference=reference.block_masks,
    fake=lambda weights, keep, block, within=None: [_new_bits(w) for w in weights],
    check=_check_block,
)


def block_masks(
    weights: Sequence[Tensor],
    keep: int | Sequence[int],
    block: tuple[int, int],
    within: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Bits that keep the `keep` blocks with the largest sum of |value|.

    A block is rows x cols elements of the (out, in) plane at one kernel tap; -1 takes a whole
    dimension, and cols = -1 takes every tap too, so that (1, -1) is one output row. Sums are in
    fixed point (round(|w| * 2^38) in int64, saturating), so they do not depend on the order.

    Args:
        weights: tensors (out, in, *taps) of one dtype and device, divisible by the block.
        keep: number of blocks over all tensors together, or a list with one count per tensor.
        block: (rows, cols).
        within: bits; a block is eligible where any of its elements is set.

    Returns:
        One int32 tensor of bits per weight.
    """
    within = None if within is None else list(within)
    return _block(list(weights), _as_list(keep), list(block), within)


# ---- channels and unified mask generation --------------------------------------------------------


def _check_beta(op: str, beta: float) -> None:
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"{op}: beta={beta} is not in [0, 1]; the paper uses 0.8")


def _check_scores(weights, unstructured, nm, beta) -> None:
    check_weights("channel_scores", weights)
    _check_beta("channel_scores", beta)
    for masks, name in ((unstructured, "unstructured"), (nm, "nm")):
        check_same_length("channel_scores", weights, masks, name)
        for index, (weight, bits) in enumerate(zip(weights, masks, strict=True)):
            check_bits("channel_scores", bits, bits_shape(weight.shape), f"{name}[{index}]")


_scores = define(
    "channel_scores(Tensor[] weights, Tensor[] unstructured, Tensor[] nm, float beta) -> Tensor[]",
    reference=reference.channel_scores,
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
    return _scores(list(weights), list(unstructured), list(nm), beta)


def _check_channel_masks(scores, keep, taps, inputs) -> None:
    for name, other in (("keep", keep), ("shapes", taps), ("shapes", inputs)):
        if len(other) != len(scores):
            raise ValueError(
                f"channel_masks: {name} has {len(other)} entries for {len(scores)} score tensors; "
                "give one each"
            )
    for index, (score, count) in enumerate(zip(scores, keep, strict=True)):
        if score.dtype != torch.int64 or score.dim() != 1:
            raise TypeError(
                f"channel_masks: scores[{index}] is {score.dtype} of shape {tuple(score.shape)}, "
                "but scores are int64 of shape (out,); make them with ops.channel_scores"
            )
        if not 0 <= count <= score.numel():
            raise ValueError(
                f"channel_masks: keep[{index}]={count} is not in [0, {score.numel()}], the number "
                "of output channels; give a count, for example round(density * out)"
            )


_channels = define(
    "channel_masks(Tensor[] scores, int[] keep, SymInt[] taps, SymInt[] inputs) -> Tensor[]",
    reference=lambda scores, keep, taps, inputs: reference.channel_masks(
        scores, keep, [(s.numel(), i, t) for s, t, i in zip(scores, taps, inputs, strict=True)]
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
    for index, (score, shape) in enumerate(zip(scores, shapes, strict=False)):
        if len(shape) < 2 or shape[0] != score.shape[0]:
            raise ValueError(
                f"channel_masks: shapes[{index}]={tuple(shape)} does not start with the "
                f"{score.shape[0]} channels of scores[{index}]; give the shape of its weight"
            )
    taps = [math.prod(shape[2:]) for shape in shapes]
    return _channels(list(scores), list(keep), taps, [shape[1] for shape in shapes])


def _unified_reference(weights, keep, nm, channel_keep, beta, within=None, nm_bits=None):
    nm = tuple(nm) if nm else None
    lists = reference.unified_masks(weights, keep, nm, channel_keep, beta, within, nm_bits)
    return [bits for masks in lists for bits in masks]


def _unified_composed(weights, keep, nm, channel_keep, beta, within=None, nm_bits=None):
    """The same from the ops above, each in its best backend."""
    unstructured = topk_masks(weights, keep, within)
    if nm:
        nm_bits = [
            nm_mask(w, *nm) if w.shape[1] % nm[1] == 0 else reference.ones(w) for w in weights
        ]
    elif nm_bits is None:
        nm_bits = [reference.ones(w) for w in weights]
    else:
        nm_bits = [bits.clone() for bits in nm_bits]
    scores = reference.channel_scores(weights, unstructured, nm_bits, beta)
    channel = reference.channel_masks(scores, channel_keep, [w.shape for w in weights])
    return [*unstructured, *nm_bits, *channel]


def _check_unified(weights, keep, nm, channel_keep, beta, within=None, nm_bits=None) -> None:
    op = "unified_masks"
    check_weights(op, weights)
    _check_keep(op, [keep], [w.numel() for w in weights], "elements")
    _check_beta(op, beta)
    _check_within(op, weights, within)
    check_same_length(op, weights, channel_keep, "channel_keep")
    for index, (weight, count) in enumerate(zip(weights, channel_keep, strict=True)):
        if not 0 <= count <= weight.shape[0]:
            raise ValueError(
                f"{op}: channel_keep[{index}]={count} is not in [0, {weight.shape[0]}], the number "
                "of output channels; give a count"
            )
    if nm and (len(nm) != 2 or not 1 <= nm[0] < nm[1] <= 32):
        raise ValueError(
            f"{op}: nm={tuple(nm)} breaks 1 <= n < m <= 32; for example (2, 4) keeps 2 of 4"
        )
    if nm and nm_bits is not None:
        raise ValueError(f"{op}: both nm={tuple(nm)} and nm_bits are given; give one of them")
    if nm_bits is not None:
        check_same_length(op, weights, nm_bits, "nm_bits")
        for index, (weight, bits) in enumerate(zip(weights, nm_bits, strict=True)):
            check_bits(op, bits, bits_shape(weight.shape), f"nm_bits[{index}]")


_unified = define(
    "unified_masks(Tensor[] weights, int keep, int[] nm, int[] channel_keep, float beta, "
    "Tensor[]? within=None, Tensor[]? nm_bits=None) -> Tensor[]",
    reference=_unified_reference,
    cpp=_unified_composed,
    fake=lambda weights, *_: [_new_bits(w) for _ in range(3) for w in weights],
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
    weights = list(weights)
    flat = _unified(
        weights,
        keep,
        list(nm or ()),
        list(channel_keep),
        beta,
        None if within is None else list(within),
        None if nm_bits is None else list(nm_bits),
    )
    count = len(weights)
    return flat[:count], flat[count : 2 * count], flat[2 * count :]
