"""What the masked products share: tile sizes, geometry of convolutions, and masks in registers.

All of them are matrix products D (M, N) = A (M, K) B (K, N) with fp32 accumulators:

    forward          D = y^T (out, rows)    A = W*m                    K = in (and taps)
    input gradient   D = gx^T (in, rows)    A = (W*m)^T                K = out (and taps)
    weight gradient  D = gW (out, in)       A = g^T, mask at the end   K = rows

The masked weight is always A, which tensor cores take from registers; on sm_90 they take B only
from shared memory. The gradient of the inputs, compiled both ways for sm_90 (bf16, 128 x 128 x 64),
has 12 stores and 33 loads of shared memory with the weight as A, and 36 and 56 as B.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# ---- tile sizes ----------------------------------------------------------------------------------


class Tile(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int


# (capability, op, bucket); op None stands for all that have no row of their own. Chosen by what the
# compiler reports (no spills, shared memory), not yet timed. 16-bit x: `wide`, `medium` or `narrow`
# by `_work`; `skinny` for up to 16 rows, which stream the weight: deep K, many loads in flight.
# fp32 x takes twice the bytes, hence half of K: `wide-tf32` or `small`; `ieee` runs without tensor
# cores. `small` also serves unaligned layers, whose addresses would spill in larger tiles.
# Capability 86 stands for all cards with 100 KB of shared memory per program.
TILES = {
    (90, None, "wide"): Tile(128, 256, 64, 8, 3),
    (90, None, "medium"): Tile(128, 128, 64, 8, 3),
    (90, None, "narrow"): Tile(64, 64, 64, 4, 4),
    (90, None, "skinny"): Tile(64, 16, 128, 4, 4),
    (90, None, "wide-tf32"): Tile(128, 128, 32, 8, 3),
    (90, None, "small"): Tile(64, 64, 32, 8, 3),
    (90, None, "ieee"): Tile(64, 64, 32, 8, 2),
    (80, None, "wide"): Tile(128, 128, 64, 8, 3),
    (80, None, "medium"): Tile(128, 64, 64, 4, 3),
    (80, None, "narrow"): Tile(64, 64, 64, 4, 4),
    (80, None, "skinny"): Tile(64, 16, 128, 4, 4),
    (80, None, "wide-tf32"): Tile(128, 128, 32, 8, 3),
    (80, None, "small"): Tile(64, 64, 32, 8, 3),
    (80, None, "ieee"): Tile(64, 64, 32, 8, 2),
    (86, None, "wide"): Tile(128, 128, 32, 8, 3),
    (86, None, "medium"): Tile(128, 64, 32, 4, 3),
    (86, None, "narrow"): Tile(64, 64, 32, 4, 4),
    (86, None, "skinny"): Tile(64, 16, 64, 4, 4),
    (86, None, "wide-tf32"): Tile(128, 64, 32, 8, 2),
    (86, None, "small"): Tile(64, 64, 32, 8, 3),
    (86, None, "ieee"): Tile(64, 64, 32, 8, 2),
}
# Interpreted: two words of bits in a tile, and more than one tile and step for small layers.
INTERPRETED_TILE = Tile(64, 32, 64, 4, 2)

GROUP = 8  # rows of tiles whose programs run together: they share A and B in the L2 cache
# Parts of K: at least 4 steps each, so that loads overlap, and 32 at most, which are added in turn.
PART_STEPS, PARTS = 4, 32
DIRECT = 1024  # products of a program of direct_* per tap: 8 per thread


def tile_of_table(card: int, op: str, bucket: str) -> Tile:
    return TILES.get((card, op, bucket)) or TILES[card, None, bucket]


def family(capability: tuple[int, int]) -> int:
    """The capability whose tiles a card uses."""
    if capability[0] in (9, 10):
        return 90
    return 80 if capability in ((8, 0), (8, 7)) else 86


def _buckets(bits: int, precision: str, rows: int | None, aligned: bool) -> tuple[str, ...]:
    """Buckets to choose from."""
    if bits == 32 and precision == "ieee":
        return ("ieee",)
    if not aligned:
        return ("small",)
    if bits == 32:
        return ("wide-tf32", "small")
    return ("skinny",) if rows is not None and rows <= 16 else ("wide", "medium", "narrow")


def _fitted(tile: Tile, sizes: tuple[int, int, int]) -> Tile:
    """The tile, cut to powers of two that hold the sizes; 16 is the least tensor cores take."""
    m, n, k = (
        min(most, max(16, triton.next_power_of_2(size)))
        for size, most in zip(sizes, tile[:3], strict=True)
    )
    return Tile(m, n, k, tile.warps if m * n >= 64 * 64 else min(tile.warps, 4), tile.stages)


def parts_for(tiles: int, steps: int, processors: int) -> int:
    """Parts of K that let a launch of few tiles keep every processor busy with two programs."""
    return max(1, min(2 * processors // max(tiles, 1), steps // PART_STEPS, PARTS))


def tiles_in(tile: Tile, sizes: tuple[int, int, int]) -> int:
    return triton.cdiv(sizes[0], tile.m) * triton.cdiv(sizes[1], tile.n)


class Product(NamedTuple):
    """One launch: `copies` products (groups, phases) of M x N, K per tap, over `taps`."""

    op: str
    sizes: tuple[int, int, int]
    copies: int = 1
    taps: int = 1
    split: bool = True  # K may be split into parts
    aligned: bool = True  # 16 divides the channels, and neighbours along `in` are neighbours


def _work(tile: Tile, parts: int, product: Product, processors: int) -> float:
    """Time of a launch, in arbitrary units: a step multiplies m n, and moves m + n lines."""
    waves = triton.cdiv(tiles_in(tile, product.sizes) * product.copies * parts, processors)
    return waves * (tile.m * tile.n + 64 * (tile.m + tile.n)) / parts


def tiling(
    product: Product,
    capability: tuple[int, int] | None,
    processors: int,
    bits: int,
    precision: str,
) -> tuple[Tile, int]:
    """Tile of a product, and the parts of its K.

    Args:
        capability: of the card; None where kernels are interpreted.
        bits: of the numbers that are multiplied, 16 or 32.
        precision: of fp32 numbers, "tf32" or "ieee".
    """
    rows = None if product.op.endswith("weight_grad") else product.sizes[1]
    if capability is None:
        candidates = [INTERPRETED_TILE]
    else:
        card, buckets = family(capability), _buckets(bits, precision, rows, product.aligned)
        candidates = [tile_of_table(card, product.op, bucket) for bucket in buckets]
    choices = []
    for tile in (_fitted(tile, product.sizes) for tile in candidates):
        tiles = tiles_in(tile, product.sizes) * product.copies
        steps = product.taps * triton.cdiv(product.sizes[2], tile.k)
        choices.append((tile, parts_for(tiles, steps, processors) if product.split else 1))
    return min(choices, key=lambda choice: _work(*choice, product, processors))


# ---- geometry of a convolution -------------------------------------------------------------------


class Conv(NamedTuple):
    """The integers that all kernels of a convolution begin with, in their order."""

    batch: int
    height: int
    width: int
    out_height: int
    out_width: int
    outputs: int  # of one group
    inputs: int
    groups: int
    kernel_h: int
    kernel_w: int
    step_h: int
    step_w: int
    pad_h: int
    pad_w: int
    dilate_h: int
    dilate_w: int

    @property
    def pixels(self) -> int:
        return self.batch * self.out_height * self.out_width

    @property
    def positions(self) -> int:
        return max(self.pixels, self.batch * self.height * self.width)

    @property
    def taps(self) -> int:
        return self.kernel_h * self.kernel_w

    @property
    def pointwise(self) -> bool:
        """Whether it is a linear layer of its pixels."""
        return self[7:14] == (1, 1, 1, 1, 1, 0, 0)

    @property
    def direct(self) -> bool:
        """Whether groups have so few channels that tensor cores would mostly multiply zeros."""
        return self.groups > 1 and self.outputs * self.inputs <= 16


def conv_of(x_shape, weight_shape, stride, padding, dilation, groups: int) -> Conv:
    """The integers of a convolution; ValueError where it has no output."""
    (batch, _, *size), (outputs, inputs, *kernel) = x_shape, weight_shape
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    room = [s + 2 * p - span for s, p, span in zip(size, padding, spans, strict=True)]
    if min(room) < 0 or min(*stride, *dilation) < 1 or min(padding) < 0:
        raise ValueError(
            f"masked_conv2d: stride={list(stride)}, padding={list(padding)}, "
            f"dilation={list(dilation)} with a kernel of {kernel} on a picture of {size}: stride "
            "and dilation must be positive, and the padded picture at least as large as the "
            "dilated kernel; pad more or give larger pictures"
        )
    if groups < 1 or outputs % groups:
        raise ValueError(
            f"masked_conv2d: groups={groups} does not divide the {outputs} outputs; give a divisor"
        )
    result = [r // s + 1 for r, s in zip(room, stride, strict=True)]
    per_group = outputs // groups, inputs, groups
    return Conv(batch, *size, *result, *per_group, *kernel, *stride, *padding, *dilation)


# ---- in the kernels ------------------------------------------------------------------------------


@triton.jit
def cast(value, TYPE: tl.constexpr):
    """Round to nearest even. The interpreter would truncate to bf16, and multiplies its bits as
    integers: there the rounded value stays fp32."""
    if INTERPRETED and TYPE == tl.bfloat16:
        value = value.to(tl.float32)
        raw = value.to(tl.int32, bitcast=True)
        rounded = (raw + 0x7FFF + ((raw >> 16) & 1)) & -0x10000
        nan = (raw & 0x7FFFFFFF) > 0x7F800000
        return tl.where(nan, value, rounded.to(tl.float32, bitcast=True))
    else:
        return value.to(TYPE)


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile number -> (i_m, i_n). GROUP rows of tiles are walked column by column, so that programs
    that run together share their parts of A and of B in the L2 cache."""
    band = tile // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP, GROUP)
    place = tile - band * GROUP * tiles_n
    return band * GROUP + place % height, place // height


@triton.jit
def steps_of(steps):
    """First and last + 1 of this program's steps along K: axis 1 of the grid shares them out."""
    share = tl.cdiv(steps, tl.num_programs(1))
    first = tl.program_id(1) * share
    return first, tl.minimum(first + share, steps)


@triton.jit
def kept(p_row, m_row, first, words, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """bool (ROWS, SIZE): bits first ... first + SIZE - 1 of rows of `words` words at p_row.

    Words are loaded as words, and spread over their elements in registers. `first` is a multiple
    of SIZE, which is 16 or a multiple of 32. m_row tells which rows there are.
    """
    if SIZE < 32:
        word = tl.load(p_row + first // 32, mask=m_row, other=0)
        return ((word[:, None] >> (first % 32 + tl.arange(0, SIZE))[None, :]) & 1) != 0
    else:
        o_word = first // 32 + tl.arange(0, SIZE // 32)
        m_word = m_row[:, None] & (o_word < words)[None, :]
        block = tl.load(p_row[:, None] + o_word[None, :], mask=m_word, other=0)
        bit = 1 << tl.arange(0, 32)  # outside of loops: one AND per element is left inside
        return tl.reshape((block[:, :, None] & bit[None, None, :]) != 0, (ROWS, SIZE))
