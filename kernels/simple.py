"""Pack, unpack, count, N:M alone, and masked weights: one pass each, no scratch memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tiles import (
    ADDRESS,
    BITS,
    DENSE,
    IN,
    LINEAR,
    OUT,
    RESULT,
    RESULT_IN,
    RESULT_OUT,
    RESULT_TAP,
    TAPS,
    TILES,
    WORDS,
    WORDS_PER_ROW,
    element_offsets,
    load_keys,
    nm_words,
    pack,
    popcount,
    row_words,
    tile_record,
    unpack,
    weight_offsets,
)


# mask (out, in, *taps) bytes, any strides  -->  words (out, taps, words)
@triton.jit
def pack_bytes(p_table, p_map, p_words, BLOCK: tl.constexpr):
    p_record, first = tile_record(p_table, p_map, tl.program_id(0).to(tl.int64), BLOCK)
    p_mask = tl.load(p_record + ADDRESS).to(tl.pointer_type(tl.int8))
    o_start, o_element, m_in, _ = weight_offsets(p_record, first, BLOCK)
    b_mask = tl.load(p_mask + o_start + o_element, mask=m_in, other=0)
    o_row, m_row = row_words(p_record, first, BLOCK)
    tl.store(p_words + o_row, pack(b_mask != 0), mask=m_row)


# words (out, taps, words)  -->  mask (out, in, taps) bytes, contiguous
@triton.jit
def unpack_words(p_words, p_mask, elements, inputs, taps, SIZE: tl.constexpr):
    o_element = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    on = o_element < elements
    o_out = o_element // (inputs * taps)
    o_in = (o_element // taps) % inputs
    o_word = (o_out * taps + o_element % taps) * ((inputs + 31) // 32) + o_in // 32
    words = tl.load(p_words + o_word, mask=on, other=0)
    tl.store(p_mask + o_element, ((words >> (o_in % 32).to(tl.int32)) & 1).to(tl.int8), mask=on)


# words (any,)  -->  count (), which starts at 0
@triton.jit
def count_words(p_words, p_count, words, SIZE: tl.constexpr):
    counts = tl.zeros((SIZE,), tl.int64)
    step = tl.num_programs(0) * SIZE
    for start in range(tl.program_id(0) * SIZE, words, step):
        o_word = start + tl.arange(0, SIZE)
        counts += popcount(tl.load(p_words + o_word, mask=o_word < words, other=0))
    tl.atomic_add(p_count, tl.sum(counts, axis=0), sem="relaxed")


# weights (tiles)  --[N of every M]-->  words of `row`
# Floor, fp32: 4.125 bytes per weight.
@triton.jit
def nm_row(
    p_table, p_map, p_row, N: tl.constexpr, M: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    for tile in range(tl.program_id(0), tl.load(p_table + TILES), tl.num_programs(0)):
        p_record, first = tile_record(p_table, p_map, tile, BLOCK)
        keys = load_keys(p_record, first, FORMAT, BLOCK)
        o_row, m_row = row_words(p_record, first, BLOCK)
        words = nm_words(p_record, first, keys, N, M, FORMAT, BLOCK)
        tl.store(p_row + o_row, words, mask=m_row)


# ---- masked weights ------------------------------------------------------------------------------
# Kept weights pass as integers where the dtype stays: the payload of a NaN survives. A cast goes
# through fp32, as in PyTorch.

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
RAW = {0: tl.int32, 1: tl.int16, 2: tl.int16, 3: tl.int64}
NUMBERS = {0: tl.float32, 1: tl.int16, 2: tl.float16, 3: tl.float64}  # bf16: upper half of fp32


def kinds(source: torch.dtype, target: torch.dtype) -> tuple:
    """KIND, RESULT_KIND, SOURCE and TARGET of `masked_weights`."""
    kind, result = KINDS[source], KINDS[target]
    types = RAW if kind == result else NUMBERS
    return kind, result, types[kind], types[result]


@triton.jit
def to_float32(value, KIND: tl.constexpr):
    if KIND == 1:  # bf16 stays an integer: its float is the upper half of fp32
        return (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def from_float32(value, KIND: tl.constexpr):
    if KIND == 1:
        raw = value.to(tl.int32, bitcast=True)
        rounded = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16  # half to even
        quiet = ((raw >> 16) & 0x8000) | 0x7FC0  # a NaN may have all its payload in the lower half
        nan = (raw & 0x7FFFFFFF) > 0x7F800000
        return tl.where(nan, quiet, rounded).to(tl.int16)
    elif KIND == 2:
        return value.to(tl.float16)
    elif KIND == 3:
        return value.to(tl.float64)
    else:
        return value


@triton.jit
def store_masked(
    p_source, p_result, o_source, o_result, m_kept, m_all, KIND: tl.constexpr,
    RESULT_KIND: tl.constexpr,
):  # fmt: skip
    """Copy kept elements, write +0 elsewhere. All are read: a mask per element splits the loads."""
    value = tl.load(p_source + o_source, mask=m_all, other=0)
    value = tl.where(m_kept, value, tl.zeros_like(value))
    if KIND != RESULT_KIND:
        value = from_float32(to_float32(value, KIND), RESULT_KIND)
    tl.store(p_result + o_result, value, mask=m_all)


@triton.jit
def linear_masked(
    p_record, first, p_bits, p_source, p_result, KIND: tl.constexpr, RESULT_KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A stretch of memory in order (out, in, tap), as many elements as a tile has."""
    taps, inputs = tl.load(p_record + TAPS).to(tl.int32), tl.load(p_record + IN).to(tl.int32)
    o_element = first.to(tl.int64) * 32 + tl.arange(0, BLOCK * 32)
    m_all = o_element < tl.load(p_record + OUT) * (taps * inputs)
    # divide in int32 by the stretch's place in its first output row
    per_out = taps * inputs
    i_out = first.to(tl.int64) * 32 // per_out
    x = (first.to(tl.int64) * 32 - i_out * per_out).to(tl.int32) + tl.arange(0, BLOCK * 32)
    o_out = x // per_out
    x -= o_out * per_out
    o_in = x // taps
    o_row = (i_out + o_out) * taps + (x - o_in * taps)
    o_word = o_row * tl.load(p_record + WORDS_PER_ROW) + o_in // 32
    words = tl.load(p_bits + o_word, mask=m_all, other=0)
    m_kept = ((words >> (o_in % 32)) & 1) != 0
    store_masked(p_source, p_result, o_element, o_element, m_kept, m_all, KIND, RESULT_KIND)


@triton.jit
def strided_masked(
    p_record, first, words, p_source, p_result, KIND: tl.constexpr, RESULT_KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of any strides, to a result of any strides."""
    o_start, o_element, m_all, _ = weight_offsets(p_record, first, BLOCK)
    stride_out, stride_tap = tl.load(p_record + RESULT_OUT), tl.load(p_record + RESULT_TAP)
    t_start, t_element, _, _ = element_offsets(
        p_record, first, stride_out, stride_tap, tl.load(p_record + RESULT_IN), BLOCK
    )  # fmt: skip
    store_masked(
        p_source + o_start, p_result + t_start, o_element, t_element, unpack(words), m_all, KIND,
        RESULT_KIND,
    )  # fmt: skip


# weight (any strides), words  -->  result (its own strides)
# Three ways to walk: a tile that lies in memory as its bits do (16-byte loads and stores); memory
# order (out, in, tap), with a gather of each element's word from the cache; any strides.
@triton.jit
def masked_weights(
    p_table, p_map, KIND: tl.constexpr, RESULT_KIND: tl.constexpr, SOURCE: tl.constexpr,
    TARGET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p_record, first = tile_record(p_table, p_map, tl.program_id(0).to(tl.int64), BLOCK)
    p_bits = tl.load(p_record + BITS).to(tl.pointer_type(tl.int32))
    p_source = tl.load(p_record + ADDRESS).to(tl.pointer_type(SOURCE))
    p_result = tl.load(p_record + RESULT).to(tl.pointer_type(TARGET))
    o_word = first + tl.arange(0, BLOCK)
    m_word = o_word < tl.load(p_record + WORDS).to(tl.int32)
    words = tl.load(p_bits + o_word, mask=m_word, other=0)
    if tl.load(p_record + LINEAR) != 0:
        linear_masked(p_record, first, p_bits, p_source, p_result, KIND, RESULT_KIND, BLOCK)
    elif tl.load(p_record + DENSE) != 0:
        p_source = tl.multiple_of(p_source, 16) + first.to(tl.int64) * 32
        p_result = tl.multiple_of(p_result, 16) + first.to(tl.int64) * 32
        o_element = tl.arange(0, BLOCK)[:, None] * 32 + tl.arange(0, 32)[None, :]
        store_masked(
            p_source, p_result, o_element, o_element, unpack(words), m_word[:, None], KIND,
            RESULT_KIND,
        )  # fmt: skip
    else:
        strided_masked(p_record, first, words, p_source, p_result, KIND, RESULT_KIND, BLOCK)


# the same for one weight, described by numbers instead of a table: a graph can capture it
@triton.jit
def masked_weight(
    p_bits, p_source, p_result, words, words_per_row, inputs, taps, source_out, source_tap,
    source_in, result_out, result_tap, result_in, KIND: tl.constexpr, RESULT_KIND: tl.constexpr,
    SOURCE: tl.constexpr, TARGET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p_source = p_source.to(tl.pointer_type(SOURCE), bitcast=True)
    p_result = p_result.to(tl.pointer_type(TARGET), bitcast=True)
    o_word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_word = o_word < words
    on = unpack(tl.load(p_bits + o_word, mask=m_word, other=0))
    o_row = o_word // words_per_row
    i_in = ((o_word - o_row * words_per_row) * 32)[:, None] + tl.arange(0, 32)[None, :]
    o_out = o_row // taps
    o_tap = o_row - o_out * taps
    p_source += (o_out * source_out + o_tap * source_tap)[:, None]
    p_result += (o_out * result_out + o_tap * result_tap)[:, None]
    m_all = m_word[:, None] & (i_in < inputs)
    o_source, o_result = i_in * source_in, i_in * result_in
    store_masked(p_source, p_result, o_source, o_result, on, m_all, KIND, RESULT_KIND)
