"""Ops of the `masks` family: pack, combine and select mask bits. Formats: README, "Formats"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import reference
from ..reference import bits_shape, block_count
from .checks import (
    as_list,
    check_bits,
    check_device,
    check_same_length,
    check_weight,
    check_weights,
    whole,
)
from .dispatch import define, lazy_triton

__all__ = [
    "block_masks",
    "mask_and",
    "mask_andnot",
    "mask_count",
    "mask_or",
    "nm_mask",
    "pack_mask",
    "topk_masks",
    "unpack_mask",
]

_cpp = torch.ops.sparse_cocktail_cpp


def strided(weight: Tensor) -> Tensor:
    """The weight itself where C++ can walk it (its taps have one common stride), else a copy."""
    if weight.dim() < 4 or weight.is_contiguous():
        return weight
    if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    taps = [(n, s) for n, s in zip(weight.shape[2:], weight.stride()[2:], strict=True) if n != 1]
    merge = all(a[1] == b[0] * b[1] for a, b in zip(taps, taps[1:], strict=False))
    return weight if merge else weight.contiguous()


def packed(masks: Sequence[Tensor] | None) -> list[Tensor] | None:
    """Bits as C++ reads them: contiguous."""
    return None if masks is None else [bits.contiguous() for bits in masks]


def shape_of(op: str, shape: Sequence[int]) -> list[int]:
    return as_list(op, "shape", shape, "give the shape of the weight, weight.shape")


def new_bits(weight: Tensor) -> Tensor:
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
    triton=lazy_triton("triton_masks", "pack_mask"),
    reference=reference.pack_mask,
    cpp=lambda mask: _cpp.pack_mask(mask.contiguous()),
    fake=new_bits,
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
    triton=lazy_triton("triton_masks", "unpack_mask"),
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
    triton=lazy_triton("triton_masks", "mask_count"),
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
    return _unpack(bits, shape_of("unpack_mask", shape))


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


def check_pattern(op: str, n: int, m: int) -> None:
    if not (hasattr(n, "__index__") and hasattr(m, "__index__")):
        raise TypeError(
            f"{op}: n={n!r}, m={m!r} are not both integers; for example n=2, m=4 keeps 2 of 4"
        )
    if not 1 <= n < m <= 32:
        raise ValueError(
            f"{op}: n={n}, m={m} breaks 1 <= n < m <= 32; for example n=2, m=4 keeps 2 of 4"
        )


def check_inputs(op: str, name: str, inputs: int, m: int) -> None:
    if inputs % m:
        raise ValueError(
            f"{op}: {name} has in={inputs}, which is not a multiple of m={m}; pad the layer or "
            "leave it dense"
        )


def _check_nm(weight: Tensor, n: int, m: int) -> None:
    check_weight("nm_mask", weight)
    check_pattern("nm_mask", n, m)
    check_inputs("nm_mask", "weight", weight.shape[1], m)


_nm = define(
    "nm_mask(Tensor weight, int n, int m) -> Tensor",
    triton=lazy_triton("triton_masks", "nm_mask"),
    reference=reference.nm_mask,
    cpp=lambda weight, n, m: _cpp.nm_mask(strided(weight), n, m),
    fake=lambda weight, n, m: new_bits(weight),
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


def check_keep(op: str, keep: Sequence[int], sizes: list[int], unit: str) -> None:
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


def check_within(op: str, weights: list[Tensor], within: list[Tensor] | None) -> None:
    if within is None:
        return
    check_same_length(op, weights, within, "within")
    for i, (weight, bits) in enumerate(zip(weights, within, strict=True)):
        check_bits(op, bits, bits_shape(weight.shape), f"within[{i}]")
        check_device(op, bits, weight, f"within[{i}]")


def _check_topk(weights: list[Tensor], keep: list[int], within: list[Tensor] | None) -> None:
    check_weights("topk_masks", weights)
    check_keep("topk_masks", keep, [w.numel() for w in weights], "elements")
    check_within("topk_masks", weights, within)


def _topk_cpp(weights, keep, within=None) -> list[Tensor]:
    return _cpp.topk_masks([strided(w) for w in weights], keep, packed(within))


_topk = define(
    "topk_masks(Tensor[] weights, int[] keep, Tensor[]? within=None) -> Tensor[]",
    triton=lazy_triton("triton_masks", "topk_masks"),
    reference=reference.topk_masks,
    cpp=_topk_cpp,
    fake=lambda weights, keep, within=None: [new_bits(w) for w in weights],
    check=lambda weights, keep, within=None: _check_topk(weights, keep, within),
)


def _counts(op: str, keep: int | Sequence[int]) -> list[int]:
    if isinstance(keep, Iterable) and not isinstance(keep, (Tensor, str)):
        return [whole(op, f"keep[{i}]", count) for i, count in enumerate(keep)]
    return [whole(op, "keep", keep)]


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
    op = "topk_masks"
    within = None if within is None else as_list(op, "within", within)
    return _topk(as_list(op, "weights", weights), _counts(op, keep), within)


# ---- blocks --------------------------------------------------------------------------------------


def _check_block(weights, keep, block, within=None) -> None:
    check_weights("block_masks", weights)
    if len(block) != 2 or any(size < 1 and size != -1 for size in block):
        raise ValueError(
            f"block_masks: block={tuple(block)} is not (rows, cols) of positive sizes or -1 for a "
            "whole dimension"
        )
    for i, weight in enumerate(weights):
        for size, total, name in zip(block, weight.shape, ("out", "in"), strict=False):
            if size != -1 and total % size:
                raise ValueError(
                    f"block_masks: weights[{i}] has {name}={total}, which is not a multiple of "
                    f"the block's {size}; pad the layer or leave it dense"
                )
    check_keep("block_masks", keep, [block_count(w.shape, block) for w in weights], "blocks")
    check_within("block_masks", weights, within)


_block = define(
    "block_masks(Tensor[] weights, int[] keep, int[] block, Tensor[]? within=None) -> Tensor[]",
    triton=lazy_triton("triton_masks", "block_masks"),
    reference=reference.block_masks,
    cpp=lambda weights, keep, block, within=None: _cpp.block_masks(
        [strided(w) for w in weights], keep, block, packed(within)
    ),
    fake=lambda weights, keep, block, within=None: [new_bits(w) for w in weights],
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
    op = "block_masks"
    within = None if within is None else as_list(op, "within", within)
    block = as_list(op, "block", block, "give (rows, cols), for example (16, 16)")
    return _block(as_list(op, "weights", weights), _counts(op, keep), block, within)
