"""The gradient of the soft top-k, through its root: a read of masks and gradients for two sums, and
one more that writes. Floor for n fp32 values: 20 n bytes.

With q = m (1 - m) the values get beta q (g / c - price), price = sum of g q / sum of c q.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .simple import from_float32
from .soft_tiles import (
    BETA,
    COST,
    GRAD,
    RESULT,
    VALUE,
    offsets,
    own_tiles,
    part_sums,
    read,
    stretch,
    tile_at,
    write,
)


# grads, masks (tiles)  -->  parts of the sums of g q and c q, with q = m (1 - m)
@triton.jit
def shares(
    p_table, p_single, p_parts, KIND: tl.constexpr, NUMBER: tl.constexpr, EACH: tl.constexpr,
    GROUP: tl.constexpr, LISTED: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o = offsets(BLOCK, GROUP)
    earned = tl.zeros((BLOCK // GROUP,), tl.float64)
    spent = earned
    cost = tl.full((), 1.0, tl.float64)
    tile, last, index = own_tiles(p_table, LISTED)
    while tile < last:
        p_record, begin, end, count = stretch(p_table, index, tile, last)
        p_mask = tl.multiple_of(tl.load(p_record + VALUE).to(tl.pointer_type(NUMBER)), 16)
        p_grad = tl.multiple_of(tl.load(p_record + GRAD).to(tl.pointer_type(NUMBER)), 16)
        p_cost = tl.multiple_of(tl.load(p_record + COST).to(tl.pointer_type(NUMBER)), 16)
        if not EACH:
            cost = tl.load(p_single + index)
        for i_tile in range(begin, end):
            first, m, whole = tile_at(i_tile, count, o, BLOCK)
            mask = read(p_mask + first + o, m, whole, KIND)
            grad = read(p_grad + first + o, m, whole, KIND)
            each = read(p_cost + first + o, m, whole, KIND) if EACH else mask
            q = mask * (1.0 - mask)
            earned += tl.sum(grad * q, axis=1).to(tl.float64)
            if EACH:
                q = q * each
            spent += tl.sum(q, axis=1).to(tl.float64) * cost
        tile += end - begin
        index += 1
    tl.store(p_parts + tl.program_id(0), tl.sum(earned, axis=0))
    tl.store(p_parts + SLOTS + tl.program_id(0), tl.sum(spent, axis=0))


# grads, masks (tiles)  -->  gradients of the values: beta q (g / c - price)
@triton.jit
def grads(
    p_table, p_single, p_parts, programs, KIND: tl.constexpr, NUMBER: tl.constexpr,
    RESULT_KIND: tl.constexpr, TARGETS: tl.constexpr, EACH: tl.constexpr, GROUP: tl.constexpr,
    LISTED: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    beta = tl.load(p_table + BETA).to(tl.float64, bitcast=True)
    spent = tl.maximum(part_sums(p_parts, programs, 1, SLOTS), 2.0**-1000)  # a hard mask has no q
    price = part_sums(p_parts, programs, 0, SLOTS) / spent
    o = offsets(BLOCK, GROUP)
    cost = tl.full((), 1.0, tl.float64)
    tile, last, index = own_tiles(p_table, LISTED)
    while tile < last:
        p_record, begin, end, count = stretch(p_table, index, tile, last)
        p_mask = tl.multiple_of(tl.load(p_record + VALUE).to(tl.pointer_type(NUMBER)), 16)
        p_grad = tl.multiple_of(tl.load(p_record + GRAD).to(tl.pointer_type(NUMBER)), 16)
        p_cost = tl.multiple_of(tl.load(p_record + COST).to(tl.pointer_type(NUMBER)), 16)
        p_result = tl.multiple_of(tl.load(p_record + RESULT).to(tl.pointer_type(TARGETS)), 16)
        if not EACH:
            cost = tl.load(p_single + index)
        scale, less = (beta / cost).to(NUMBER), (price * cost).to(NUMBER)
        for i_tile in range(begin, end):
            first, m, whole = tile_at(i_tile, count, o, BLOCK)
            mask = read(p_mask + first + o, m, whole, KIND)
            grad = read(p_grad + first + o, m, whole, KIND)
            each = read(p_cost + first + o, m, whole, KIND) if EACH else mask
            if EACH:
                grad = grad / each
            result = mask * (1.0 - mask) * scale * (grad - less)
            if KIND != 3 or RESULT_KIND != 3:
                result = from_float32(result.to(tl.float32), RESULT_KIND)
            write(p_result + first + o, result, m, whole)
        tile += end - begin
        index += 1
