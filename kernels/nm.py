"""N:M compress and decompress.

    compress, decompress            GROUP = 2, 4 or 8: whole groups in the registers of a thread
    compress_any, decompress_any    any GROUP up to 32: groups may straddle words, and are ranked
                                    by reading them again from the cache

Weights are seen as (rows, in) with rows = out * taps, compressed values as (rows, in / GROUP, KEEP)
and bits as (rows, ceil(in / 32)). In `weight` every stride is free; values and results are
contiguous. Weights and values pass as raw integers, so that a kept NaN keeps its payload; only a
cast goes through fp32. A FLAT weight, contiguous with in % 32 == 0, is one row: no division.

A group in registers is a tuple of blocks, one per position, so that compressing is a network of
selects: from the last position to the first, a kept element pushes those behind it one slot back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .simple import from_float32
from .tiles import key_of, popcount

# Elements of a program: 32 per thread of 128, so that 16-byte loads of one thread overlap.
BLOCK = 128  # words, of compress and decompress
GROUPS = 32  # whose bits are GROUP words: what compress_any packs together
ANY_SIZE = 1024  # elements of a program of compress_any and decompress_any


# ---- groups in registers -------------------------------------------------------------------------


@triton.jit
def split_groups(block, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """(ROWS, COLUMNS) -> GROUP blocks (ROWS, COLUMNS / GROUP), one for each place in a group.

    GROUP is a power of two. After k rounds block r holds the places r modulo 2^k.
    """
    blocks = (block,)
    for i_round in tl.static_range(5):
        if 1 << i_round < GROUP:
            low, high = (), ()
            for r in tl.static_range(1 << i_round):
                pairs = tl.reshape(blocks[r], (ROWS, COLUMNS >> (i_round + 1), 2))
                even, odd = tl.split(pairs)
                low, high = low + (even,), high + (odd,)
            blocks = low + high
    return blocks


@triton.jit
def join_groups(blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """The inverse: GROUP blocks (ROWS, COLUMNS / GROUP) -> (ROWS, COLUMNS)."""
    for i_round in tl.static_range(5):
        if GROUP >> i_round > 1:
            joined = ()
            for r in tl.static_range(GROUP >> (i_round + 1)):
                pairs = tl.join(blocks[r], blocks[r + (GROUP >> (i_round + 1))])
                joined = joined + (tl.reshape(pairs, (ROWS, COLUMNS // (GROUP >> (i_round + 1)))),)
            blocks = joined
    return blocks[0]


@triton.jit
def most(a, b, c):
    """Bit by bit, what two of three say: one instruction."""
    return (a & b) | (c & (a | b))


@triton.jit
def bits_of_keys(keys, KEEP: tl.constexpr, GROUP: tl.constexpr):
    """Bits of groups, GROUP <= 8, from their blocks of keys >= 0: rank by counting.

    One compare per pair, where tiles.py has two. Of 2:4, the signs of the differences are enough:
    those stay whom at most one of the other three beats. Otherwise the ranks of a group are counted
    in the 8 nibbles of a word, which begin at 8 - KEEP: the top bit tells who is out.
    """
    if GROUP == 2:
        return (keys[1] > keys[0]).to(tl.int32) + 1
    elif KEEP == 2 and GROUP == 4:
        d01, d02, d03 = keys[0] - keys[1], keys[0] - keys[2], keys[0] - keys[3]
        d12, d13, d23 = keys[1] - keys[2], keys[1] - keys[3], keys[2] - keys[3]
        bits = (most(d01, d02, d03) >= 0).to(tl.int32)
        bits |= (most(~d01, d12, d13) >= 0).to(tl.int32) << 1
        bits |= (most(~d02, ~d12, d23) >= 0).to(tl.int32) << 2
        bits |= (most(~d03, ~d13, ~d23) >= 0).to(tl.int32) << 3
        return bits
    else:
        ranks = tl.zeros(keys[0].shape, tl.uint32)
        for i in tl.static_range(GROUP):
            ranks += (8 - KEEP) << (4 * i)
            for j in tl.static_range(i + 1, GROUP):
                ranks += tl.where(keys[j] > keys[i], 1 << (4 * i), 1 << (4 * j))
        ones: tl.constexpr = 0x11111111 >> (32 - 4 * GROUP)
        bits = ((ranks >> 3) & ones) ^ ones
        bits = (bits | bits >> 3) & 0x03030303
        bits = (bits | bits >> 6) & 0x000F000F
        return ((bits | bits >> 12) & 0xFF).to(tl.int32)


@triton.jit
def compress_groups(blocks, bits, KEEP: tl.constexpr, GROUP: tl.constexpr):
    """GROUP blocks and the bits of their groups -> KEEP blocks: kept elements in order, then 0."""
    slots = ()
    for _ in tl.static_range(KEEP):
        slots = slots + (tl.zeros_like(blocks[0]),)
    for i in tl.static_range(GROUP - 1, -1, -1):
        on = (bits & (1 << i)) != 0
        pushed = (tl.where(on, blocks[i], slots[0]),)
        for j in tl.static_range(1, KEEP):
            pushed = pushed + (tl.where(on, slots[j - 1], slots[j]),)
        slots = pushed
    return slots


@triton.jit
def decompress_groups(slots, bits, KEEP: tl.constexpr, GROUP: tl.constexpr):
    """KEEP blocks and the bits of their groups -> GROUP blocks, 0 where a bit is 0.

    A kept element takes the first slot, and the others move up. What stands behind the last kept
    element is never read: no group has more than KEEP bits.
    """
    blocks = ()
    for i in tl.static_range(GROUP):
        on = (bits & (1 << i) - (1 << i >> 31 << 32)) != 0  # bit 31 is -2^31 as int32
        blocks = blocks + (tl.where(on, slots[0], tl.zeros_like(slots[0])),)
        moved = ()
        for j in tl.static_range(1, KEEP):
            moved = moved + (tl.where(on, slots[j], slots[j - 1]),)
        slots = moved + (slots[KEEP - 1],)
    return blocks


# ---- places in memory ----------------------------------------------------------------------------


@triton.jit
def place_of_words(words, words_per_row, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    """The program's first word, and for each of its words: row, place in that row, existence.

    A FLAT weight has its one row start anew with every program, so that offsets stay int32.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    o_tile = tl.arange(0, BLOCK)
    o_row, o_place = tl.zeros((BLOCK,), tl.int32), o_tile
    if not FLAT:
        o_word = first.to(tl.int32) + o_tile
        o_row = o_word // words_per_row
        o_place = o_word - o_row * words_per_row
    return first, o_row, o_place, o_tile < words - first


@triton.jit
def place_of_values(
    p_values, first, o_row, o_place, inputs, KEEP: tl.constexpr, GROUP: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """Pointers (BLOCK, 1) to the values of each word, and how many of its groups exist."""
    PER_WORD: tl.constexpr = 32 // GROUP
    o_first = o_place * (PER_WORD * KEEP)
    if FLAT:
        p_values += first * (PER_WORD * KEEP)
        left = tl.full(o_place.shape, PER_WORD, tl.int32)
        return p_values + o_first[:, None], left[:, None]
    else:
        per_row = inputs // GROUP
        o_first = o_row.to(tl.int64) * (per_row * KEEP) + o_first
        left = (per_row - o_place * PER_WORD).to(tl.int32)
        return p_values + o_first[:, None], left[:, None]


@triton.jit
def convert(raw, FORMAT: tl.constexpr, RESULT: tl.constexpr):
    """Raw bits of one format as raw bits of another, rounded to nearest even."""
    if FORMAT == RESULT:
        return raw
    else:
        if FORMAT == 0:
            number = raw.to(tl.float32, bitcast=True)
        elif FORMAT == 1:
            number = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        else:
            number = raw.to(tl.float16, bitcast=True).to(tl.float32)
        if RESULT == 0:
            return number.to(tl.int32, bitcast=True)
        elif RESULT == 1:
            return from_float32(number, 1)
        else:
            return number.to(tl.float16).to(tl.int16, bitcast=True)


# ---- GROUP = 2, 4, 8 -----------------------------------------------------------------------------


@triton.jit
def columns(HALVES: tl.constexpr):
    """(1, 32): places in a word; or (1, 16): those in the lower halves of its groups of 8."""
    if HALVES:
        o_column = tl.arange(0, 16)
        return (o_column // 4 * 8 + o_column % 4)[None, :]
    else:
        return tl.arange(0, 32)[None, :]


# weight (rows, in), any strides, and given words  -->  values (rows, in / GROUP, KEEP), words
# Floor: bf16 2:4 3.125 bytes per weight, fp32 -> bf16 5.125.
@triton.jit
def compress(
    p_weight, p_given, p_values, p_bits, words, words_per_row, inputs, taps, stride_out,
    stride_tap, stride_in, KEEP: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
    RESULT: tl.constexpr, GIVEN: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    PER_WORD: tl.constexpr = 32 // GROUP
    HALVES: tl.constexpr = (FORMAT == 0) & (GROUP == 8)  # 16 bytes are half a group
    first, o_row, o_place, m_word = place_of_words(words, words_per_row, FLAT, BLOCK)
    o_in = o_place[:, None] * 32 + columns(HALVES)
    m_in = m_word[:, None]
    if FLAT:
        p_element = p_weight + first * 32 + o_in
    else:
        m_in = m_in & (o_in < inputs)
        o_out = o_row // taps
        o_start = o_out.to(tl.int64) * stride_out + (o_row - o_out * taps) * stride_tap
        p_element = p_weight + o_start[:, None] + o_in * stride_in
    raw = tl.load(p_element, mask=m_in, other=0)
    if HALVES:
        high = tl.load(p_element + 4 * stride_in, mask=m_in, other=0)
        blocks = split_groups(raw, BLOCK, 16, 4) + split_groups(high, BLOCK, 16, 4)
    else:
        blocks = split_groups(raw, BLOCK, 32, GROUP)
    p_value, left = place_of_values(p_values, first, o_row, o_place, inputs, KEEP, GROUP, FLAT)
    o_group, o_tile = tl.arange(0, PER_WORD)[None, :], tl.arange(0, BLOCK)
    if GIVEN:
        word = tl.load(p_given + first + o_tile, mask=m_word, other=0)
        bits = word[:, None] >> (o_group * GROUP)
    else:
        keys = ()
        for i in tl.static_range(GROUP):
            keys = keys + (key_of(blocks[i], FORMAT),)
        bits = tl.where(o_group < left, bits_of_keys(keys, KEEP, GROUP), 0)
        word = tl.sum(bits << (o_group * GROUP), axis=1)
    tl.store(p_bits + first + o_tile, word, mask=m_word)
    slots = compress_groups(blocks, bits, KEEP, GROUP)
    if KEEP & (KEEP - 1) == 0:
        values = convert(join_groups(slots, BLOCK, PER_WORD * KEEP, KEEP), FORMAT, RESULT)
        o_value = tl.arange(0, PER_WORD * KEEP)[None, :]
        tl.store(p_value + o_value, values, mask=m_word[:, None] & (o_value < left * KEEP))
    else:
        for j in tl.static_range(KEEP):
            m_group = m_word[:, None] & (o_group < left)
            tl.store(p_value + o_group * KEEP + j, convert(slots[j], FORMAT, RESULT), mask=m_group)


# values (rows, in / GROUP, KEEP), words  -->  result (rows, in)
@triton.jit
def decompress(
    p_values, p_bits, p_result, words, words_per_row, inputs, KEEP: tl.constexpr,
    GROUP: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    PER_WORD: tl.constexpr = 32 // GROUP
    first, o_row, o_place, m_word = place_of_words(words, words_per_row, FLAT, BLOCK)
    p_value, left = place_of_values(p_values, first, o_row, o_place, inputs, KEEP, GROUP, FLAT)
    o_group = tl.arange(0, PER_WORD)[None, :]
    if KEEP & (KEEP - 1) == 0:
        o_value = tl.arange(0, PER_WORD * KEEP)[None, :]
        m_value = m_word[:, None] & (o_value < left * KEEP)
        values = tl.load(p_value + o_value, mask=m_value, other=0)
        slots = split_groups(values, BLOCK, PER_WORD * KEEP, KEEP)
    else:
        slots = ()
        for j in tl.static_range(KEEP):
            m_group = m_word[:, None] & (o_group < left)
            slots = slots + (tl.load(p_value + o_group * KEEP + j, mask=m_group, other=0),)
    word = tl.load(p_bits + first + tl.arange(0, BLOCK), mask=m_word, other=0)
    bits = word[:, None] >> (o_group * GROUP)
    block = join_groups(decompress_groups(slots, bits, KEEP, GROUP), BLOCK, 32, GROUP)
    o_in = o_place[:, None] * 32 + tl.arange(0, 32)[None, :]
    if FLAT:
        tl.store(p_result + first * 32 + o_in, block, mask=m_word[:, None])
    else:
        m_in = m_word[:, None] & (o_in < inputs)
        tl.store(p_result + (o_row.to(tl.int64) * inputs)[:, None] + o_in, block, mask=m_in)


# ---- any GROUP -----------------------------------------------------------------------------------


@triton.jit
def bits_of_groups(p_row, o_group, m_group, words, GROUP: tl.constexpr):
    """Bits of groups of a row, from the one or two words that hold them."""
    o_bit = o_group * GROUP
    o_word = o_bit // 32
    low = tl.load(p_row + o_word, mask=m_group, other=0)
    high = tl.load(p_row + o_word + 1, mask=m_group & (o_word + 1 < words), other=0)
    both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return (both >> (o_bit % 32).to(tl.int64)).to(tl.int32) & (
        -1 if GROUP == 32 else (1 << GROUP) - 1
    )


# A program has SIZE groups of one row, 32 or a multiple, whose bits are whole words.
@triton.jit
def compress_any(
    p_weight, p_given, p_values, p_bits, words_per_row, inputs, taps, stride_out, stride_tap,
    stride_in, KEEP: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, FORMAT: tl.constexpr,
    RESULT: tl.constexpr, GIVEN: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    i_row, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    groups = inputs // GROUP
    o_group = i_chunk * SIZE + tl.arange(0, SIZE)
    m_group = o_group < groups
    o_place = tl.arange(0, WIDTH)[None, :]  # WIDTH is GROUP, up to a power of two
    m_in = m_group[:, None] & (o_place < GROUP)
    p_weight += i_row // taps * stride_out + i_row % taps * stride_tap
    p_first = p_weight + o_group * GROUP * stride_in
    raw = tl.load(p_first[:, None] + o_place * stride_in, mask=m_in, other=0)
    if GIVEN:
        bits = bits_of_groups(
            p_given + i_row * words_per_row, o_group, m_group, words_per_row, GROUP
        )
    else:
        keys = key_of(raw, FORMAT)
        rank = tl.zeros((SIZE, WIDTH), tl.int32)
        for j in range(GROUP):
            other = key_of(tl.load(p_first + j * stride_in, mask=m_group, other=0), FORMAT)[:, None]
            rank += ((other > keys) | ((other == keys) & (j < o_place))).to(tl.int32)
        bits = tl.sum((m_in & (rank < KEEP)).to(tl.int32) << o_place, axis=1)
    # Word k of 32 groups takes a piece of each group, shifted up or down to its place.
    chunks = tl.reshape(bits, (SIZE // 32, 32)).to(tl.uint32, bitcast=True)[:, None, :]
    o_word = tl.arange(0, WIDTH)[None, :, None]
    shift = tl.arange(0, 32)[None, None, :] * GROUP - o_word * 32
    up = tl.where((shift >= 0) & (shift < 32), chunks << tl.maximum(tl.minimum(shift, 31), 0), 0)
    down = tl.where((shift < 0) & (shift > -32), chunks >> tl.minimum(tl.maximum(-shift, 0), 31), 0)
    words = tl.sum((up | down).to(tl.int32, bitcast=True), axis=2)
    o_word = tl.arange(0, WIDTH)[None, :]
    o_all = (i_chunk * (SIZE // 32) + tl.arange(0, SIZE // 32)[:, None]) * GROUP + o_word
    m_word = (o_word < GROUP) & (o_all < words_per_row)
    tl.store(p_bits + i_row * words_per_row + o_all, words, mask=m_word)
    # Kept elements take the first slots, the others the slots behind them: zeros up to KEEP.
    on = ((bits[:, None] >> o_place) & 1) != 0
    before = popcount(bits[:, None] & ((1 << o_place) - 1))
    slot = tl.where(on, before, popcount(bits)[:, None] + o_place - before)
    value = convert(tl.where(on, raw, tl.zeros_like(raw)), FORMAT, RESULT)
    p_value = p_values + (i_row * groups + o_group)[:, None] * KEEP + slot
    tl.store(p_value, value, mask=m_in & (slot < KEEP))


# A program has SIZE elements of one row.
@triton.jit
def decompress_any(
    p_values, p_bits, p_result, words_per_row, inputs, KEEP: tl.constexpr, GROUP: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    o_in = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    m_in = o_in < inputs
    o_group = o_in // GROUP
    bits = bits_of_groups(p_bits + i_row * words_per_row, o_group, m_in, words_per_row, GROUP)
    o_place = o_in - o_group * GROUP
    on = ((bits >> o_place) & 1) != 0
    slot = popcount(bits & ((1 << o_place) - 1))
    p_value = p_values + i_row * (inputs // GROUP * KEEP) + o_group * KEEP + slot
    value = tl.load(p_value, mask=m_in & on, other=0)
    tl.store(p_result + i_row * inputs + o_in, value, mask=m_in)
