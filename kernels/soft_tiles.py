"""What the soft top-k's kernels share: the table of tensors, tiles of them, masks of a block.

A tile is BLOCK elements of one tensor in the order of memory, the last tile of a tensor partly
empty. A program takes tiles that follow each other, which few programs find in two tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .simple import to_float32
from .soft_root import LARGEST

# The table: a header, a record per tensor, and one that ends them. Real numbers by their bits.
HEADER, FIELDS = tl.constexpr(8), tl.constexpr(8)
BUDGET, BETA, TENSORS, TILES, ELEMENTS = (tl.constexpr(i) for i in range(5))
FIRST, START, COUNT = (tl.constexpr(i) for i in range(3))  # tile, and elements before; elements
VALUE, COST, RESULT, GRAD = (tl.constexpr(i) for i in range(3, 7))  # addresses

LOG2E = tl.constexpr(1.4426950408889634)


# ---- blocks of values ----------------------------------------------------------------------------


@triton.jit
def tensor_of(p_table, place, FIELD: tl.constexpr, LISTED: tl.constexpr):
    """Number of the tensor that holds a tile, or elements, by bisection of up to LISTED tensors."""
    tensors = tl.load(p_table + TENSORS)
    index = place * 0
    for i in tl.static_range(16):
        if LISTED >> i > 1:
            next = tl.minimum(index + (LISTED >> (i + 1)), tensors - 1)
            below = tl.load(p_table + HEADER + next * FIELDS + FIELD) <= place
            index = tl.where(below, next, index)
    return index


@triton.jit
def own_tiles(p_table, LISTED: tl.constexpr):
    """First and last tile of a program, and the tensor of the first."""
    i_program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    tiles = tl.load(p_table + TILES)
    first = i_program * tiles // programs
    return first, (i_program + 1) * tiles // programs, tensor_of(p_table, first, FIRST, LISTED)


@triton.jit
def stretch(p_table, index, tile, last):
    """A tensor's record; of its tiles the program's first and the end; its elements."""
    p_record = p_table + HEADER + index * FIELDS
    first = tl.load(p_record + FIRST)
    end = tl.minimum(last, tl.load(p_record + FIELDS + FIRST)) - first
    return p_record, tile - first, end, tl.load(p_record + COUNT)


@triton.jit
def offsets(BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """(BLOCK / GROUP, GROUP): a row is what a thread reads at once, and adds in fp32."""
    return tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def tile_at(i_tile, count, o, BLOCK: tl.constexpr):
    """First element of a tensor's tile, which of its offsets exist, and whether all do."""
    first = i_tile * BLOCK
    left = tl.minimum(count - first, BLOCK).to(tl.int32)
    return first, o < left, left == BLOCK


@triton.jit
def read(p, m, whole, KIND: tl.constexpr):
    """A block as float32 or float64; 1 where the tile is not whole and m is false."""
    if whole:  # a mask per element would split the loads
        raw = tl.load(p)
    else:
        raw = tl.load(p, mask=m, other=1)
    if KIND == 3:
        return raw
    else:
        return to_float32(raw, KIND)


@triton.jit
def write(p, block, m, whole):
    if whole:
        tl.store(p, block)
    else:
        tl.store(p, block, mask=m)


@triton.jit
def line_of(threshold, shift, steep, cost, KIND: tl.constexpr, EACH: tl.constexpr):
    """-log2(e) x = slant (v / c - near) + offset, and a factor for what `offset` loses in fp32.

    For one cost of all v, near is a number of their dtype: differences from it are exact.
    """
    near, slant = threshold * cost, steep * -LOG2E
    if not EACH:
        slant = slant / cost
    if KIND != 3 and not EACH:
        near = near.to(tl.float32).to(tl.float64)
    offset = slant * (near - threshold * cost) - shift * LOG2E
    factor = offset * 0 + 1
    if KIND != 3:
        rounded = offset.to(tl.float32)
        lost = tl.where(tl.abs(offset) < 1e6, offset - rounded.to(tl.float64), 0.0)
        slant, offset, factor = slant.to(tl.float32), rounded, tl.exp2(lost).to(tl.float32)
        if not EACH:
            near = near.to(tl.float32)
    return near, slant, offset, factor


@triton.jit
def odds(value, cost, near, slant, offset, factor, KIND: tl.constexpr, EACH: tl.constexpr):
    """(1 - m) / m, at most 2^126 (or 2^1000), so that its product with m is not NaN."""
    value = tl.where(value < LARGEST, tl.maximum(value, -LARGEST), LARGEST)  # NaN < x is false
    if EACH:  # a ratio rounded to fp32 would move by beta times as much
        value = value.to(tl.float64) - cost.to(tl.float64) * near
        value = value.to(cost.dtype) / cost
    else:
        value = value - near
    power = value * slant + offset
    most: tl.constexpr = 1000.0 if KIND == 3 else 126.0
    return tl.exp2(tl.where(power < most, power, most)) * factor


@triton.jit
def part_sums(p_parts, programs, i_sum, SLOTS: tl.constexpr):
    """Sum number `i_sum` of all programs, in their order."""
    o_part = tl.arange(0, SLOTS)
    parts = tl.load(p_parts + i_sum * SLOTS + o_part, mask=o_part < programs, other=0.0)
    return tl.sum(parts, axis=0)


# ---- the table -----------------------------------------------------------------------------------


# 32 numbers as arguments  -->  table. Slower than a copy, but a CUDA graph can capture it.
@triton.jit(do_not_specialize=[f"n{i}" for i in range(32)])
def put(
    p_table,
    n0: tl.int64, n1: tl.int64, n2: tl.int64, n3: tl.int64,
    n4: tl.int64, n5: tl.int64, n6: tl.int64, n7: tl.int64,
    n8: tl.int64, n9: tl.int64, n10: tl.int64, n11: tl.int64,
    n12: tl.int64, n13: tl.int64, n14: tl.int64, n15: tl.int64,
    n16: tl.int64, n17: tl.int64, n18: tl.int64, n19: tl.int64,
    n20: tl.int64, n21: tl.int64, n22: tl.int64, n23: tl.int64,
    n24: tl.int64, n25: tl.int64, n26: tl.int64, n27: tl.int64,
    n28: tl.int64, n29: tl.int64, n30: tl.int64, n31: tl.int64,
):  # fmt: skip
    numbers = (
        n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, n10, n11, n12, n13, n14, n15, n16, n17, n18, n19,
        n20, n21, n22, n23, n24, n25, n26, n27, n28, n29, n30, n31,
    )  # fmt: skip
    for i in tl.static_range(32):
        tl.store(p_table + i, numbers[i])
