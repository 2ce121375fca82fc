"""Linear layer of a compressed N:M weight: y = act(x W^T + b), W spread in registers.

    nm_linear   y^T (out, rows) = W (out, in) x^T (in, rows), W from values and words
    sum_parts   y from the sums of parts of K that several programs made

A step reads KEEP / GROUP of the weight's bytes and one bit per element. As in the masked products
the weight is operand A. x and y are row-major with contiguous rows, values (out, in / GROUP, KEEP)
and words (out, ceil(in / 32)) contiguous. Axis 0 of the grid numbers tiles, axis 1 parts of K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .masked_tiles import (
    INTERPRETED_TILE,
    Tile,
    cast,
    family,
    parts_for,
    steps_of,
    tile_of,
    tiles_in,
)
from .nm import decompress_groups, join_groups, split_groups

# ---- tile sizes ----------------------------------------------------------------------------------

# (capability, bucket), chosen by what the compiler reports (no spills, shared memory), not yet
# timed. 16-bit x: `skinny` for up to 16 rows, which stream the weight; `few` for up to 64; `many`;
# `odd` for layers of whose addresses nothing is known, which would spill in larger tiles. fp32 x:
# `tf32` or, without tensor cores, `ieee`. 86: all cards with 100 KB per program.
TILES = {
    (90, "skinny"): Tile(64, 16, 128, 4, 4),
    (90, "few"): Tile(64, 64, 64, 4, 4),
    (90, "many"): Tile(128, 128, 64, 8, 3),
    (90, "odd"): Tile(64, 64, 32, 8, 3),
    (90, "tf32"): Tile(64, 64, 32, 4, 3),
    (90, "ieee"): Tile(64, 64, 32, 8, 2),
    (80, "skinny"): Tile(64, 16, 128, 4, 4),
    (80, "few"): Tile(64, 64, 64, 4, 4),
    (80, "many"): Tile(128, 128, 64, 8, 3),
    (80, "odd"): Tile(64, 64, 32, 8, 3),
    (80, "tf32"): Tile(64, 64, 32, 4, 3),
    (80, "ieee"): Tile(64, 64, 32, 8, 2),
    (86, "skinny"): Tile(64, 16, 128, 4, 3),
    (86, "few"): Tile(64, 64, 64, 4, 3),
    (86, "many"): Tile(128, 128, 32, 8, 3),
    (86, "odd"): Tile(64, 64, 32, 8, 3),
    (86, "tf32"): Tile(64, 64, 32, 4, 3),
    (86, "ieee"): Tile(64, 64, 32, 8, 2),
}
SKINNY, FEW = 16, 64  # rows
# Most rows of the fused kernel. A step of `many` on sm_90 issues as many instructions to spread the
# weight as its product takes cycles, so that it reaches about half of a dense product's rate, while
# decompressing costs as much as the dense product of some 250 rows. Computed, not yet timed.
FUSED_ROWS = 256
MOST_SELECTS = 64  # KEEP * GROUP of the largest groups that are spread in registers
SUM_SIZE = 1024  # elements of a program of sum_parts


def spreads(n: int, m: int) -> bool:
    """Whether the kernel takes groups of m: powers of two, and few enough selects per group."""
    return n & (n - 1) == 0 and m & (m - 1) == 0 and n * m <= MOST_SELECTS


def bucket_of(rows: int, bits: int, precision: str, aligned: bool) -> str:
    if bits == 32:
        return precision
    if rows <= SKINNY:
        return "skinny"
    return "odd" if not aligned else "few" if rows <= FEW else "many"


def tiling(
    sizes: tuple[int, int, int],
    capability: tuple[int, int] | None,
    processors: int,
    bits: int,
    precision: str,
    aligned: bool,
) -> tuple[Tile, int]:
    """Tile of (out, rows, in), and the parts of its K.

    Args:
        capability: of the card; None where kernels are interpreted.
        bits: of an element of x, 16 or 32.
        precision: of fp32 numbers, "tf32" or "ieee".
        aligned: 16 divides the lengths of rows of x and of values.
    """
    tile = INTERPRETED_TILE
    if capability is not None:
        tile = TILES[family(capability), bucket_of(sizes[1], bits, precision, aligned)]
    # Few rows take a narrow tile; 16 is the least that tensor cores take.
    tile = tile._replace(n=min(tile.n, max(16, triton.next_power_of_2(sizes[1]))))
    steps = triton.cdiv(sizes[2], tile.k)
    return tile, parts_for(tiles_in(tile, sizes), steps, processors)


# ---- in the kernels ------------------------------------------------------------------------------


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    """fp32 after none (0), relu (1) or gelu (2); NaN passes through relu, as in PyTorch."""
    if ACTIVATION == 1:
        return tl.where(value < 0, 0.0, value)
    elif ACTIVATION == 2:
        return 0.5 * value * (1.0 + tl.math.erf(value * 0.7071067811865476))
    else:
        return value


@triton.jit
def weight_tile(
    p_values, p_bits, first, kept, words, TYPE: tl.constexpr, EVEN: tl.constexpr,
    KEEP: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """(ROWS, SIZE) of TYPE: elements first ... first + SIZE - 1 of rows of values and words.

    `first` is a multiple of SIZE, and SIZE of 32. Groups beyond the row have no bits.
    """
    KEPT: tl.constexpr = SIZE // GROUP * KEEP
    o_value = first // GROUP * KEEP + tl.arange(0, KEPT)
    m_value = (o_value < kept) | EVEN
    values = tl.load(p_values[:, None] + o_value[None, :], mask=m_value[None, :], other=0.0)
    o_word = first // 32 + tl.arange(0, SIZE // 32)
    m_word = (o_word < words) | EVEN
    word = tl.load(p_bits[:, None] + o_word[None, :], mask=m_word[None, :], other=0)
    o_group = tl.arange(0, 32 // GROUP) * GROUP
    bits = tl.reshape(word[:, :, None] >> o_group[None, None, :], (ROWS, SIZE // GROUP))
    slots = split_groups(cast(values, TYPE), ROWS, KEPT, KEEP)
    return join_groups(decompress_groups(slots, bits, KEEP, GROUP), ROWS, SIZE, GROUP)


# x (rows, in), values (out, in / GROUP, KEEP), words (out, in / 32)  -->  y (rows, out)
# `kept` and `words` are the lengths of rows of values and words: as arguments, they tell the
# compiler what divides them, and by that how wide a copy may be.
@triton.jit
def nm_linear(
    p_x, p_values, p_bits, p_bias, p_y, rows, outputs, inputs, kept, words, stride_x, part,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    KEEP: tl.constexpr, GROUP: tl.constexpr, BAND: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = p_x.dtype.element_ty
    tiles_m, tiles_n = tl.cdiv(outputs, BLOCK_M), tl.cdiv(rows, BLOCK_N)
    i_m, i_n = tile_of(tl.program_id(0), tiles_m, tiles_n, BAND)
    o_out = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_row = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the last output or row the first one is read, so that loads need no mask in M and N.
    m_out = o_out < outputs
    o_read = tl.where(m_out, o_out, 0).to(tl.int64)
    p_bits += o_read * words
    p_values += o_read * kept
    p_x += (tl.where(o_row < rows, o_row, 0).to(tl.int64) * stride_x)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first, last = steps_of(tl.cdiv(inputs, BLOCK_K))
    for step in range(first, last):
        o_in = step * BLOCK_K + tl.arange(0, BLOCK_K)
        b_weight = weight_tile(
            p_values, p_bits, step * BLOCK_K, kept, words, TYPE, EVEN, KEEP, GROUP, BLOCK_M,
            BLOCK_K,
        )  # fmt: skip
        b_x = tl.load(p_x + o_in[:, None], mask=((o_in < inputs) | EVEN)[:, None], other=0.0)
        acc = tl.dot(b_weight, cast(b_x, TYPE), acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(p_bias + o_read).to(tl.float32)[:, None]
    p_y += tl.program_id(1).to(tl.int64) * part
    p_y += (o_row.to(tl.int64) * outputs)[None, :] + o_out[:, None]
    m_y = m_out[:, None] & (o_row < rows)[None, :]
    tl.store(p_y, cast(activate(acc, ACTIVATION), p_y.dtype.element_ty), mask=m_y)


# parts (parts, rows, out) fp32  -->  y (rows, out)
# The parts are added one after the other, so that equal inputs give equal bits.
@triton.jit
def sum_parts(
    p_parts, p_bias, p_y, parts, part, outputs, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    o_element = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    on = o_element < part
    total = tl.zeros((SIZE,), tl.float32)
    p_parts += o_element
    for _ in range(parts):
        total += tl.load(p_parts, mask=on, other=0.0)
        p_parts += part
    if BIAS:
        total += tl.load(p_bias + o_element % outputs, mask=on, other=0.0).to(tl.float32)
    tl.store(p_y + o_element, cast(activate(total, ACTIVATION), p_y.dtype.element_ty), mask=on)
