"""How a list of weights is cut into tiles, and where its tables and scratch memory lie.

A tile is BLOCK words of one weight's mask, 32 * BLOCK elements; tiles never span two weights, and
the last tile of a weight may be partly empty. Tile numbers grow with the position of their
elements, so a *slot* (tile * BLOCK + word) * 32 + bit orders elements as the README's order does.
That lets every kernel find its weight with one look into `tile_map`, and break ties by slot.

    scratch   [ table | tile_map | channel_map | zeroed at each call | ties | eligible | cand ]
                `---- written once ---------'
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Header and records of the table, all int64. tiles.py reads them under the same names.
# Words, rows and channels of one weight fit int32; positions in a list of weights are int64.
HEADER = 8
TILES, ELEMENTS, CAPACITY, CHANNELS, SLOT_BITS, KEEP = range(6)
FIELDS = 20
(
    ADDRESS,
    OUT,
    TAPS,
    IN,
    STRIDE_OUT,
    STRIDE_TAP,
    STRIDE_IN,
    WORDS_PER_ROW,
    WORDS,
    FIRST_TILE,
    FIRST_WORD,
    FIRST_CHANNEL,
    FIRST_CHANNEL_BLOCK,
    DENSE,
    BITS,
    RESULT,
    RESULT_OUT,
    RESULT_TAP,
    RESULT_IN,
    LINEAR,
) = range(FIELDS)

STATE = 32  # int64 counters of one selection, named in tiles.py
SAMPLE_BINS = 1 << 15  # top 15 bits of a 31-bit key; a 16-bit format's whole key
FIRST_BINS = 1 << 15
SECOND_BINS = 1 << 16
COARSE = 256  # tiles whose ties are counted together
CHANNEL_BLOCK = 32  # channels that one program ranks

# A bracket holds 1 to 3 % of the elements for usual weights; the minimum serves short lists.
CAPACITY_SHARE, CAPACITY_MINIMUM = 16, 1 << 16


def tile_words(interpreted: bool) -> int:
    """Words per tile. 64, 2048 elements: 16 per thread of 128 keep a sweep in registers.

    To be measured: 32 takes 88 registers instead of 116 in the fp32 sweep and issues its loads
    together, but unified bf16 masks lose their 16-byte loads.

    The interpreter pays per operation, hardly per element.
    """
    return 128 if interpreted else 64


def _tap_stride(shape: Sequence[int], stride: Sequence[int]) -> int | None:
    """The common stride of a weight's taps, or None where kernels cannot walk the weight.

    That is so where the taps have no common stride, or a row spans some 2^31 elements: offsets
    within a row are int32.
    """
    if shape[1] * stride[1] >= 2**31 - 2**16:
        return None
    taps = [(n, s) for n, s in zip(shape[2:], stride[2:], strict=True) if n != 1]
    merge = all(a[1] == b[0] * b[1] for a, b in zip(taps, taps[1:], strict=False))
    return (taps[-1][1] if taps else 0) if merge else None


def mergeable(weight: Tensor) -> bool:
    """Whether the kernels can walk the weight as (out, taps, in) with three strides."""
    return _tap_stride(weight.shape, weight.stride()) is not None


def strided(weight: Tensor) -> Tensor:
    return weight if mergeable(weight) else weight.contiguous()


def view_strides(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, int, int]:
    """Strides of (out, tap, in)."""
    return stride[0], _tap_stride(shape, stride) or 0, stride[1]


@dataclass(frozen=True)
class Region:
    """A typed piece of the scratch memory."""

    start: int  # bytes
    size: int  # entries
    dtype: torch.dtype

    def of(self, scratch: Tensor) -> Tensor:
        return scratch[self.start : self.start + self.size * self.dtype.itemsize].view(self.dtype)


@dataclass(frozen=True)
class Plan:
    """Everything about a selection that depends only on shapes, strides and dtype."""

    format: int  # number of the weights' dtype, -1 for one that is only moved
    block: int
    tiles: int
    elements: int
    words: int
    channels: int
    channel_blocks: int
    fixed: Tensor  # table and maps without addresses, uint8 on the CPU
    aligned: tuple[bool, ...]  # weights that 16-byte loads can walk, given an aligned address
    regions: dict[str, Region]
    staged: tuple[tuple[int, int], ...]  # (weight, bytes) of copies of weights of odd strides
    zeroed: tuple[int, int]
    size: int  # bytes of the whole scratch memory


@functools.lru_cache(maxsize=64)
def _plan(shapes, strides, dtype, capacity) -> Plan:
    block, itemsize = tile_words(triton.knobs.runtime.interpret), dtype.itemsize
    records, aligned, owners, channel_owners, staged = [], [], [], [], []
    tiles = words = channels = elements = 0
    for index, (shape, stride) in enumerate(zip(shapes, strides, strict=True)):
        out, inputs, *kernel = shape
        taps = math.prod(kernel)
        if _tap_stride(shape, stride) is None:  # read from a contiguous copy in the scratch memory
            staged.append((index, out * inputs * taps * itemsize))
            stride = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
        so, st, si = view_strides(shape, stride)
        per_row = -(-inputs // 32)
        count = out * taps * per_row
        dense = inputs % 32 == 0 and si == 1 and (taps == 1 or st == inputs)
        aligned.append(dense and (out == 1 or so == taps * inputs))
        # memory order (out, in, tap), as contiguous convolutions have
        linear = taps > 1 and st == 1 and si == taps and so == taps * inputs
        record = [0] * FIELDS
        record[OUT], record[TAPS], record[IN] = out, taps, inputs
        record[STRIDE_OUT], record[STRIDE_TAP], record[STRIDE_IN] = so, st, si
        record[WORDS_PER_ROW], record[WORDS] = per_row, count
        record[FIRST_TILE], record[FIRST_WORD], record[FIRST_CHANNEL] = tiles, words, channels
        record[FIRST_CHANNEL_BLOCK], record[LINEAR] = len(channel_owners), linear
        if count >= 2**31:  # kernels count the words of one weight in int32
            raise ValueError(f"weights[{index}] has {count} words of bits, more than 2^31 - 1")
        records.append(record)
        new_tiles = -(-count // block)
        owners.append(torch.full((new_tiles,), index, dtype=torch.int32))
        channel_owners += [index] * -(-out // CHANNEL_BLOCK)
        tiles, words, channels = tiles + new_tiles, words + count, channels + out
        elements += out * taps * inputs
    if capacity is None:
        capacity = elements // CAPACITY_SHARE + CAPACITY_MINIMUM
    # a candidate is (key - LOW) << slot_bits | slot: any bracket fits below 2^32 slots
    slot_bits = max(32, (tiles * block * 32).bit_length())
    header = [tiles, elements, capacity, channels, slot_bits, 0, 0, 0]
    int32, int64 = torch.int32, torch.int64
    sizes = {
        "table": (HEADER + FIELDS * len(records), int64),
        "tile_map": (tiles, int32),
        "channel_map": (len(channel_owners), int32),
        "channel_keep": (len(records), int64),
        # zeroed at each call
        "state": (STATE, int64),
        "sample": (SAMPLE_BINS, int32),
        "first": (FIRST_BINS, int64),
        "second": (SECOND_BINS, int64),
        "tile_ties": (tiles, int32),
        "coarse_ties": (-(-tiles // COARSE), int64),
        "sums": (2 * 4 * channels, int64),
        "scores": (channels, int64),
        # zero between calls: only partial ties set bits, and clear them again
        "ties": (tiles * block, int32),
        "eligible": (tiles * block, int32),
        "candidates": (capacity, int64),
    }
    sizes |= {f"staged_{index}": (size, torch.uint8) for index, size in staged}
    regions, end = {}, 0
    for name, (size, kind) in sizes.items():
        regions[name] = Region(end, size, kind)
        end += -(-size * kind.itemsize // 256) * 256  # every piece starts on a 256-byte line
    fixed = torch.zeros(regions["state"].start, dtype=torch.uint8)
    table = torch.tensor(header + [f for r in records for f in r], dtype=int64)
    regions["table"].of(fixed).copy_(table)
    if owners:
        regions["tile_map"].of(fixed).copy_(torch.cat(owners))
    regions["channel_map"].of(fixed).copy_(torch.tensor(channel_owners, dtype=int32))
    return Plan(
        format=FORMATS.get(dtype, -1),
        block=block,
        tiles=tiles,
        elements=elements,
        words=words,
        channels=channels,
        channel_blocks=len(channel_owners),
        fixed=fixed,
        aligned=tuple(aligned),
        regions=regions,
        staged=tuple(staged),
        zeroed=(regions["state"].start, regions["ties"].start),
        size=end,
    )


def plan_of(weights: Sequence[Tensor], capacity: int | None = None) -> Plan:
    """The plan of a list of weights, cached by shapes, strides and dtype."""
    shapes = tuple(tuple(w.shape) for w in weights)
    strides = tuple(tuple(w.stride()) for w in weights)
    return _plan(shapes, strides, weights[0].dtype, capacity)


def plan_of_shapes(shapes: Sequence[Sequence[int]]) -> Plan:
    """The plan of contiguous weights of these shapes, without candidates."""
    shapes = tuple(tuple(shape) for shape in shapes)
    strides = tuple(tuple(math.prod(s[d + 1 :]) for d in range(len(s))) for s in shapes)
    return _plan(shapes, strides, torch.float32, 0)


def table_of(plan: Plan, weights: Sequence[Tensor], addresses=None, keep=0, channel_keep=None):
    """The fixed part of the plan with this call's addresses and counts, still on the CPU."""
    fixed = plan.fixed.clone()
    table = plan.regions["table"].of(fixed)
    table[KEEP] = keep
    if channel_keep is not None:
        counts = torch.tensor(channel_keep, dtype=torch.int64)
        plan.regions["channel_keep"].of(fixed).copy_(counts)
    records = table[HEADER:].view(-1, FIELDS)
    addresses = addresses or [w.data_ptr() for w in weights]
    if addresses:
        records[:, ADDRESS] = torch.tensor(addresses, dtype=torch.int64)
        dense = [ok and a % 16 == 0 for ok, a in zip(plan.aligned, addresses, strict=True)]
        records[:, DENSE] = torch.tensor(dense)
    return fixed


def to_device(fixed: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; from pinned memory, so that the host does not wait."""
    if device.type != "cuda":
        return fixed
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "sparse_cocktail: this op uploads a table of addresses, which a CUDA graph cannot "
            "capture; use the selections of MaskBank, which made it before"
        )
    return fixed.pin_memory().to(device, non_blocking=True)
