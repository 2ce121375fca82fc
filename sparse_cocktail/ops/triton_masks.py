"""The `masks` ops and `masked_weight` on Triton: what a call needs around its kernels.

This module is imported, with Triton, at the first call of such an op. Functional ops write one flat
row of bits and give every weight its own tensor of them at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from .. import reference
from ..kernels import channels, launch, plan, simple
from ..reference import bits_shape
from .dispatch import _implementations


def _check_device(op: str, device: torch.device) -> None:
    if device.type != "cuda" and not launch.interpreted():
        raise ValueError(
            f"{op}: backend 'triton' got tensors on {device}, but Triton runs on CUDA tensors; "
            "move them, use another backend, or set TRITON_INTERPRET=1 before the first call to "
            "interpret the kernels (slow, for tests)"
        )


def _keyed(weights: Sequence[Tensor]) -> bool:
    """Whether the kernels have keys for the dtype. fp64 would double every key for a format that
    only gradient checks use: the reference takes it."""
    return weights[0].dtype in plan.FORMATS


def _reference(op: str):
    return _implementations[op]["reference"]


def _walkable(weights: Sequence[Tensor]) -> list[Tensor]:
    return [plan.strided(w.detach()) for w in weights]


def _new_row(weights: Sequence[Tensor]) -> Tensor:
    words = sum(math.prod(bits_shape(w.shape)) for w in weights)
    return torch.empty(words, dtype=torch.int32, device=weights[0].device)


def _as_row(bits: Sequence[Tensor] | None) -> Tensor | None:
    return None if bits is None else torch.cat([b.reshape(-1) for b in bits])


def _own_tensors(row: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """A tensor of its own per weight, out of a row."""
    results = [row.new_empty(bits_shape(shape)) for shape in shapes]
    parts = row.split([r.numel() for r in results])
    filled = [(r, p.view(r.shape)) for r, p in zip(results, parts, strict=True) if r.numel()]
    if filled:
        torch._foreach_copy_([r for r, _ in filled], [p for _, p in filled])
    return results


# ---- pack, unpack, count -------------------------------------------------------------------------


def pack_mask(mask: Tensor) -> Tensor:
    _check_device("pack_mask", mask.device)
    mask = plan.strided(mask)
    bits = mask.new_empty(bits_shape(mask.shape), dtype=torch.int32)
    layout = plan.plan_of([mask])
    if layout.tiles:
        table, tile_map = _tables(layout, [mask])
        with launch.on_device(mask.device):
            simple.pack_bytes[(layout.tiles,)](table, tile_map, bits, BLOCK=layout.block)
    return bits


def _tables(
    layout: plan.Plan, weights: Sequence[Tensor], same: Sequence[bool] | None = None, **fields
) -> tuple[Tensor, Tensor]:
    """Table and tile map alone, on the device, for kernels without scratch memory."""
    fixed = plan.table_of(layout, weights)
    records = layout.regions["table"].of(fixed)[plan.HEADER :].view(-1, plan.FIELDS)
    if same is not None:  # only where the result has the weight's strides, one offset serves both
        records[:, [plan.DENSE, plan.LINEAR]] *= torch.tensor(same)[:, None]
    for name, values in fields.items():
        records[:, getattr(plan, name)] = torch.tensor(values, dtype=torch.int64)
    memory = plan.to_device(fixed, weights[0].device)
    return layout.regions["table"].of(memory), layout.regions["tile_map"].of(memory)


def unpack_mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    _check_device("unpack_mask", bits.device)
    out, inputs, *taps = shape
    mask = torch.empty(tuple(shape), dtype=torch.bool, device=bits.device)
    size = 1024
    if mask.numel():
        with launch.on_device(bits.device):
            simple.unpack_words[(-(-mask.numel() // size),)](
                bits.contiguous(), mask.view(torch.int8), mask.numel(), inputs, math.prod(taps),
                SIZE=size,
            )  # fmt: skip
    return mask


def mask_count(bits: Tensor) -> Tensor:
    _check_device("mask_count", bits.device)
    count = torch.zeros((), dtype=torch.int64, device=bits.device)
    size = 1024
    if bits.numel():
        grid = (launch.programs(bits.device, -(-bits.numel() // size)),)
        with launch.on_device(bits.device):
            simple.count_words[grid](bits.contiguous(), count, bits.numel(), SIZE=size)
    return count


# ---- selections ----------------------------------------------------------------------------------


def nm_mask(weight: Tensor, n: int, m: int) -> Tensor:
    _check_device("nm_mask", weight.device)
    if not _keyed([weight]):
        return reference.nm_mask(weight, n, m)
    weights = _walkable([weight])
    row = _new_row(weights)
    layout = plan.plan_of(weights)
    if layout.tiles:
        launch.nm_with(layout, *_tables(layout, weights), n, m, row)
    return row.view(bits_shape(weight.shape))


def topk_masks(
    weights: Sequence[Tensor],
    keep: Sequence[int],
    within: Sequence[Tensor] | None = None,
    trial: launch.Trial = launch.STRAIGHT,
    capacity: int | None = None,
) -> list[Tensor]:
    if not weights:
        return []
    _check_device("topk_masks", weights[0].device)
    if not _keyed(weights):
        return reference.topk_masks(weights, keep, within)
    if len(keep) == len(weights) > 1:
        parts = [None] * len(weights) if within is None else [[b] for b in within]
        each = zip(weights, keep, parts, strict=True)
        return [topk_masks([w], [k], p, trial, capacity)[0] for w, k, p in each]
    weights = _walkable(weights)
    row = _new_row(weights)
    layout = plan.plan_of(weights, capacity)
    memory = launch.new_scratch(layout, weights, keep[0])
    count = layout.regions["table"].of(memory)[plan.KEEP]
    launch.select_row(weights, count, _as_row(within), row, memory, None, trial, capacity)
    return _own_tensors(row, [w.shape for w in weights])


def _parts(beta: float) -> tuple[int, int]:
    share = Fraction(beta).limit_denominator(1000)
    return share.numerator, share.denominator - share.numerator


def channel_scores(
    weights: Sequence[Tensor], unstructured: Sequence[Tensor], nm: Sequence[Tensor], beta: float
) -> list[Tensor]:
    if not weights:
        return []
    _check_device("channel_scores", weights[0].device)
    if not _keyed(weights):
        return reference.channel_scores(weights, unstructured, nm, beta)
    weights = _walkable(weights)
    memory = launch.new_scratch(plan.plan_of(weights), weights)
    scores = launch.score_row(weights, _as_row(unstructured), _as_row(nm), _parts(beta), memory)
    return [part.clone() for part in scores.split([w.shape[0] for w in weights])]


def channel_masks(
    scores: Sequence[Tensor], keep: Sequence[int], taps: Sequence[int], inputs: Sequence[int]
) -> list[Tensor]:
    if not scores:
        return []
    device = scores[0].device
    _check_device("channel_masks", device)
    shapes = [(s.numel(), i, t) for s, t, i in zip(scores, taps, inputs, strict=True)]
    layout = plan.plan_of_shapes(shapes)
    fixed = plan.table_of(layout, [], channel_keep=keep)
    memory = plan.to_device(fixed, device)
    row = torch.empty(layout.words, dtype=torch.int32, device=device)
    scratch = launch.Scratch(layout, memory)
    with launch.on_device(device):
        launch.choose_channels(layout, scratch, torch.cat(list(scores)), scratch.channel_keep, row)
    return _own_tensors(row, shapes)


def block_masks(
    weights: Sequence[Tensor],
    keep: Sequence[int],
    block: Sequence[int],
    within: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Scores by a kernel; the few blocks are ranked by a stable sort of torch."""
    if not weights:
        return []
    _check_device("block_masks", weights[0].device)
    if not _keyed(weights) or not all(w.numel() for w in weights):
        return reference.block_masks(weights, keep, block, within)
    scores, tiles = [], []
    for index, weight in enumerate(_walkable(weights)):
        out, inputs, *kernel = weight.shape
        taps = math.prod(kernel)
        rows = out if block[0] == -1 else block[0]
        span, cols = (taps, inputs) if block[1] == -1 else (1, block[1])
        tiles.append((out // max(rows, 1), rows, taps // span, span, inputs // max(cols, 1), cols))
        score = _block_scores(weight, rows, span, cols)
        if within is not None:
            eligible = reference.weight_view(unpack_mask(within[index], weight.shape))
            eligible = eligible.reshape(tiles[-1]).any(5).any(3).any(1)
            score = torch.where(eligible.reshape(-1), score, -1)
        scores.append(score)
    masks = []
    for kept, weight, tile in zip(_best(scores, keep), weights, tiles, strict=True):
        blocks = kept.view(tile[0], 1, tile[2], 1, tile[4], 1)
        view = blocks.expand(tile).reshape(tile[0] * tile[1], tile[2] * tile[3], tile[4] * tile[5])
        masks.append(pack_mask(view.transpose(1, 2)).view(bits_shape(weight.shape)))
    return masks


def _block_scores(weight: Tensor, rows: int, span: int, cols: int) -> Tensor:
    layout = plan.plan_of([weight])
    per_block = rows * span * cols
    blocks = weight.numel() // per_block if per_block else 0
    scores = torch.empty(blocks, dtype=torch.int64, device=weight.device)
    if blocks:
        # 2048 elements at a time: few large blocks or many small ones
        size = min(2048, 1 << (per_block - 1).bit_length())
        table, _ = _tables(layout, [weight])
        with launch.on_device(weight.device):
            channels.block_scores[(-(-blocks // (2048 // size)),)](
                table, scores, blocks, rows, span, cols, FORMAT=layout.format,
                BLOCKS=2048 // size, SIZE=size, num_warps=launch.WARPS,
            )  # fmt: skip
    return scores


def _best(scores: list[Tensor], keep: Sequence[int]) -> list[Tensor]:
    """bool masks of the largest scores, over all together or per tensor; negative ones never."""
    if len(keep) == len(scores) > 1:
        return [_best([s], [k])[0] for s, k in zip(scores, keep, strict=True)]
    flat = torch.cat(scores)
    best = flat.argsort(descending=True, stable=True)[: keep[0]]
    kept = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, best, True) & (flat >= 0)
    return list(kept.split([s.numel() for s in scores]))


def unified_masks(
    weights: Sequence[Tensor],
    keep: int,
    nm: Sequence[int],
    channel_keep: Sequence[int],
    beta: float,
    within: Sequence[Tensor] | None = None,
    nm_bits: Sequence[Tensor] | None = None,
    trial: launch.Trial = launch.STRAIGHT,
    capacity: int | None = None,
) -> list[Tensor]:
    if not weights:
        return []
    _check_device("unified_masks", weights[0].device)
    if not _keyed(weights):
        lists = reference.unified_masks(
            weights, keep, tuple(nm) or None, channel_keep, beta, within, nm_bits
        )
        return [bits for masks in lists for bits in masks]
    weights = _walkable(weights)
    rows = [_new_row(weights) for _ in range(3)]
    layout = plan.plan_of(weights, capacity)
    memory = launch.new_scratch(layout, weights, keep, channel_keep)
    scratch = launch.Scratch(layout, memory)
    parts = launch.Unified(
        ratio=tuple(nm) or None,
        nm_from=_as_row(nm_bits),
        nm_row=rows[1],
        parts=_parts(beta),
        channel_keep=scratch.channel_keep,
        channel=rows[2],
    )
    launch.select_row(
        weights, scratch.table[plan.KEEP], _as_row(within), rows[0], memory, parts, trial, capacity
    )
    shapes = [w.shape for w in weights]
    return [bits for row in rows for bits in _own_tensors(row, shapes)]


# ---- masked weights ------------------------------------------------------------------------------


def masked_weight(weight: Tensor, bits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    _check_device("masked_weight", weight.device)
    dtype = dtype or weight.dtype
    if dtype not in simple.KINDS:  # such as float8: torch knows how to round to it
        return reference.masked_weight(weight, bits, dtype)
    result = torch.empty_like(weight, dtype=dtype)
    if weight.numel() == 0:
        return result
    source = plan.strided(weight)
    # where the weight has to be copied, its result takes the copy's strides first
    target = result if plan.mergeable(result) else torch.empty_like(source, dtype=dtype)
    _mask_one(source, bits, target)
    return result if target is result else result.copy_(target)


def masked_weight_(weight: Tensor, bits: Tensor) -> None:
    _check_device("masked_weight_", weight.device)
    if plan.mergeable(weight) and weight.numel():
        _mask_one(weight, bits, weight)
    else:
        weight.copy_(masked_weight(weight, bits))


def _mask_one(source: Tensor, bits: Tensor, target: Tensor) -> None:
    bits = bits.contiguous()
    _, taps, row_words = bits.shape
    block = plan.tile_words(launch.interpreted())
    strides = [s for t in (source, target) for s in plan.view_strides(t.shape, t.stride())]
    kinds = simple.kinds(source.dtype, target.dtype)
    with launch.on_device(source.device):
        simple.masked_weight[(-(-bits.numel() // block),)](
            bits, source, target, bits.numel(), row_words, source.shape[1], taps, *strides, *kinds,
            BLOCK=block,
        )  # fmt: skip


def masked_weights(
    weights: Sequence[Tensor],
    bits: Sequence[Tensor],
    dtype: torch.dtype | None = None,
    dense_grad: bool = False,
) -> list[Tensor]:
    if not weights:
        return []
    _check_device("masked_weights", weights[0].device)
    dtype = dtype or weights[0].dtype
    if dtype not in simple.KINDS:  # such as float8: torch knows how to round to it
        return [reference.masked_weight(w, b, dtype) for w, b in zip(weights, bits, strict=True)]
    results = [torch.empty_like(w, dtype=dtype) for w in weights]
    filled = [i for i, w in enumerate(weights) if w.numel()]
    if not filled:
        return results
    walkable = _walkable([weights[i] for i in filled])
    words = [bits[i].contiguous() for i in filled]
    # where the weight had to be copied, its result takes the copy's strides first
    targets = [
        results[i] if plan.mergeable(results[i]) else torch.empty_like(w, dtype=dtype)
        for i, w in zip(filled, walkable, strict=True)
    ]
    layout = plan.plan_of(walkable)
    strides = [plan.view_strides(t.shape, t.stride()) for t in targets]
    same = [t.stride() == w.stride() for t, w in zip(targets, walkable, strict=True)]
    table, tile_map = _tables(
        layout,
        walkable,
        same,
        BITS=[b.data_ptr() for b in words],
        RESULT=[t.data_ptr() for t in targets],
        RESULT_OUT=[s[0] for s in strides],
        RESULT_TAP=[s[1] for s in strides],
        RESULT_IN=[s[2] for s in strides],
    )
    with launch.on_device(weights[0].device):
        simple.masked_weights[(layout.tiles,)](
            table, tile_map, *simple.kinds(weights[0].dtype, dtype), BLOCK=layout.block
        )  # fmt: skip
    for index, target in zip(filled, targets, strict=True):
        if target is not results[index]:
            results[index].copy_(target)
    return results


# ---- rows ----------------------------------------------------------------------------------------


def workspace(weights: Sequence[Tensor]) -> Tensor:
    _check_device("workspace", weights[0].device)
    if not _keyed(weights):
        return torch.empty(0, dtype=torch.uint8, device=weights[0].device)
    weights = [w.detach() for w in weights]
    return launch.new_scratch(plan.plan_of(weights), weights)


def _rows_need(op: str, weights: Sequence[Tensor], scratch: Tensor) -> bool:
    """Check the scratch memory of an in-place op; False where the reference takes the dtype."""
    _check_device(op, weights[0].device)
    if not _keyed(weights):
        return False
    size = plan.plan_of(weights).size
    if scratch.numel() != size or scratch.device != weights[0].device:
        raise ValueError(
            f"{op}: scratch has {scratch.numel()} bytes on {scratch.device}, but these weights "
            f"need {size} on {weights[0].device}; make it with ops.workspace(weights) and the "
            "same backend"
        )
    return True


def topk_row_(
    weights: Sequence[Tensor], keep: Tensor, within: Tensor | None, row: Tensor, scratch: Tensor
) -> None:
    if not weights:
        return
    if not _rows_need("topk_row_", weights, scratch):
        return _reference("topk_row_")(weights, keep, within, row, scratch)
    launch.select_row(weights, keep, within, row, scratch)


def nm_row_(weights: Sequence[Tensor], n: int, m: int, row: Tensor, scratch: Tensor) -> None:
    if not weights:
        return
    if not _rows_need("nm_row_", weights, scratch):
        return _reference("nm_row_")(weights, n, m, row, scratch)
    layout = plan.plan_of(weights)
    launch.stage(layout, scratch, weights)
    pieces = launch.Scratch(layout, scratch)
    launch.nm_with(layout, pieces.table, pieces.tile_map, n, m, row)


def unified_rows_(
    weights: Sequence[Tensor],
    keep: Tensor,
    nm: Sequence[int],
    channel_keep: Tensor,
    beta: float,
    within: Tensor | None,
    nm_from: Tensor | None,
    unstructured: Tensor,
    nm_row: Tensor | None,
    channel: Tensor,
    scratch: Tensor,
) -> None:
    if not weights:
        return
    if not _rows_need("unified_rows_", weights, scratch):
        rows = unstructured, nm_row, channel, scratch
        return _reference("unified_rows_")(
            weights, keep, nm, channel_keep, beta, within, nm_from, *rows
        )
    ratio = tuple(nm) or None
    channel_keep = channel_keep.contiguous()
    unified = launch.Unified(ratio, nm_from, nm_row, _parts(beta), channel_keep, channel)
    launch.select_row(weights, keep, within, unstructured, scratch, unified)
