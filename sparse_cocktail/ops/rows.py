"""Ops of the `masks` family that write rows of a MaskBank in place.

A row is one flat int32 tensor: the bits of every weight of a list, one after the other. These ops
allocate no tensor and never wait for the device, so that a CUDA graph can capture them: counts are
int64 tensors on the device, and scratch memory comes from the caller, who makes it once. (On the
CPU a weight whose kernel axes do not merge, such as a transposed kernel, is copied each time.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..reference import beta_shares, bits_shape
from .checks import as_list, check_device, check_weights
from .dispatch import chosen, define, lazy_triton
from .masks import strided
from .unified import check_beta, check_ratio

__all__ = ["nm_row_", "topk_row_", "unified_rows_", "workspace"]

_cpp = torch.ops.sparse_cocktail_cpp


def row_views(row: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The bits per weight that a row holds; they share its memory."""
    shapes = [bits_shape(w.shape) for w in weights]
    parts = row.split([out * taps * words for out, taps, words in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _write(row: Tensor, bits: Sequence[Tensor]) -> None:
    if bits:
        row.copy_(torch.cat([b.reshape(-1) for b in bits]))


def _check_row(op: str, weights: Sequence[Tensor], row: Tensor | None, name: str) -> None:
    if row is None:
        return
    words = sum(out * taps * n for out, taps, n in (bits_shape(w.shape) for w in weights))
    if row.dtype != torch.int32 or tuple(row.shape) != (words,) or not row.is_contiguous():
        raise ValueError(
            f"{op}: {name} is {row.dtype} of shape {tuple(row.shape)} and strides {row.stride()}, "
            f"but these weights have rows of {words} contiguous int32 words; make one with "
            "MaskBank.add()"
        )
    if weights:
        check_device(op, row, weights[0], name)


def _check_counts(
    op: str, counts: Tensor, shape: tuple[int, ...], name: str, weights: Sequence[Tensor]
) -> None:
    if counts.dtype != torch.int64 or tuple(counts.shape) != shape:
        raise TypeError(
            f"{op}: {name} is {counts.dtype} of shape {tuple(counts.shape)}, but it must be int64 "
            f"of shape {shape}, on the device of the weights; make it once with torch.tensor"
        )
    if weights:
        check_device(op, counts, weights[0], name)


def _clamped(count: Tensor, limit: int) -> int:
    return min(max(int(count), 0), limit)


# ---- scratch -------------------------------------------------------------------------------------


def workspace(weights: Sequence[Tensor]) -> Tensor:
    """Scratch memory (uint8) for selections over these weights, at their present addresses.

    It suits the backend that is in force; make a new one when a weight moves.
    """
    weights = as_list("workspace", "weights", weights)
    check_weights("workspace", weights)
    if not weights:
        return torch.empty(0, dtype=torch.uint8)
    backend = chosen("topk_row_", weights[0].device)
    if backend == "cpp":
        size = _cpp.workspace_bytes([strided(w.detach()) for w in weights])
        return torch.empty(size, dtype=torch.uint8)
    if backend == "triton":
        return lazy_triton("triton_masks", "workspace")(weights)
    return torch.empty(0, dtype=torch.uint8, device=weights[0].device)


# ---- top-k ---------------------------------------------------------------------------------------


def _check_topk(weights, keep, within, row, scratch) -> None:
    op = "topk_row_"
    check_weights(op, weights)
    _check_counts(op, keep, (), "keep", weights)
    _check_row(op, weights, within, "within")
    _check_row(op, weights, row, "row")


def _topk_reference(weights, keep, within, row, scratch) -> None:
    within = None if within is None else row_views(within, weights)
    count = _clamped(keep, sum(w.numel() for w in weights))
    _write(row, reference.topk_masks(weights, [count], within))


topk_row_ = define(
    "topk_row_(Tensor[] weights, Tensor keep, Tensor? within, Tensor(a!) row, Tensor(b!) scratch) "
    "-> ()",
    triton=lazy_triton("triton_masks", "topk_row_"),
    reference=_topk_reference,
    cpp=lambda weights, *rest: _cpp.topk_row_([strided(w) for w in weights], *rest),
    fake=lambda *_: None,
    check=_check_topk,
)


# ---- N:M -----------------------------------------------------------------------------------------


def _check_nm(weights, n, m, row, scratch) -> None:
    check_weights("nm_row_", weights)
    check_ratio("nm_row_", (n, m))
    _check_row("nm_row_", weights, row, "row")
    for index, weight in enumerate(weights):
        if weight.shape[1] % m:
            raise ValueError(
                f"nm_row_: weights[{index}] has in={weight.shape[1]}, which is not a multiple of "
                f"m={m}; pad the layer or leave it dense"
            )


nm_row_ = define(
    "nm_row_(Tensor[] weights, int n, int m, Tensor(a!) row, Tensor(b!) scratch) -> ()",
    triton=lazy_triton("triton_masks", "nm_row_"),
    reference=lambda weights, n, m, row, scratch: _write(
        row, [reference.nm_mask(w, n, m) for w in weights]
    ),
    cpp=lambda weights, n, m, row, scratch: _cpp.nm_row_([strided(w) for w in weights], n, m, row),
    fake=lambda *_: None,
    check=_check_nm,
)


# ---- unified -------------------------------------------------------------------------------------


def _check_unified(weights, keep, nm, channel_keep, beta, within, nm_from, *written) -> None:
    op = "unified_rows_"
    check_weights(op, weights)
    _check_counts(op, keep, (), "keep", weights)
    _check_counts(op, channel_keep, (len(weights),), "channel_keep", weights)
    check_beta(op, beta)
    check_ratio(op, nm)
    rows = dict(
        zip(
            ("within", "nm_from", "unstructured", "nm_row", "channel"),
            (within, nm_from, *written[:3]),
            strict=True,
        )
    )
    for name, row in rows.items():
        _check_row(op, weights, row, name)
    if nm and nm_from is not None:
        raise ValueError(f"{op}: both nm={tuple(nm)} and nm_from are given; give one of them")
    if nm and rows["nm_row"] is None:
        raise ValueError(
            f"{op}: nm={tuple(nm)} is given without a row nm_row for its masks; add one"
        )
    names = list(rows)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            updated = (a, b) in (("within", "unstructured"), ("nm_from", "nm_row"))
            if rows[a] is not None and rows[a] is rows[b] and not updated:
                raise ValueError(
                    f"{op}: {a} and {b} are the same row; only within may be the unstructured row, "
                    "and nm_from the N:M row: add another"
                )


def _unified_reference(
    weights, keep, nm, channel_keep, beta, within, nm_from, unstructured, nm_row, channel, scratch
) -> None:
    masks = reference.unified_masks(
        weights,
        _clamped(keep, sum(w.numel() for w in weights)),
        tuple(nm) or None,
        [_clamped(c, w.shape[0]) for c, w in zip(channel_keep, weights, strict=True)],
        beta,
        None if within is None else row_views(within, weights),
        None if nm_from is None else row_views(nm_from, weights),
    )
    for row, bits in zip((unstructured, nm_row, channel), masks, strict=True):
        if row is not None:
            _write(row, bits)


def _unified_cpp(weights, keep, nm, channel_keep, beta, *rest) -> None:
    weights = [strided(w) for w in weights]
    _cpp.unified_rows_(weights, keep, nm, channel_keep.contiguous(), beta_shares(beta), *rest)


unified_rows_ = define(
    "unified_rows_(Tensor[] weights, Tensor keep, int[] nm, Tensor channel_keep, float beta, "
    "Tensor? within, Tensor? nm_from, Tensor(a!) unstructured, Tensor(b!)? nm_row, "
    "Tensor(c!) channel, Tensor(d!) scratch) -> ()",
    triton=lazy_triton("triton_masks", "unified_rows_"),
    reference=_unified_reference,
    cpp=_unified_cpp,
    fake=lambda *_: None,
    check=_check_unified,
)
