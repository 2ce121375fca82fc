"""What all kernels share: tiles as keys, words of bits, N:M in registers, fixed-point values.

A key is an integer >= 0 that orders like |w|: the raw bits without their sign, all NaN one above
infinity. No kernel here does floating-point arithmetic on weights, so that flush-to-zero modes and
contraction cannot change a bit. -1 stands for "no element" (padding) or "not eligible".
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import plan


def _const(value):
    return tl.constexpr(value)


# The table of plan.py.
HEADER, FIELDS = _const(plan.HEADER), _const(plan.FIELDS)
TILES, ELEMENTS = _const(plan.TILES), _const(plan.ELEMENTS)
CAPACITY, CHANNELS = _const(plan.CAPACITY), _const(plan.CHANNELS)
SLOT_BITS, KEEP = _const(plan.SLOT_BITS), _const(plan.KEEP)
ADDRESS, OUT, TAPS, IN = (_const(f) for f in (plan.ADDRESS, plan.OUT, plan.TAPS, plan.IN))
STRIDE_OUT, STRIDE_TAP = _const(plan.STRIDE_OUT), _const(plan.STRIDE_TAP)
STRIDE_IN, WORDS_PER_ROW = _const(plan.STRIDE_IN), _const(plan.WORDS_PER_ROW)
WORDS, FIRST_TILE, FIRST_WORD = (_const(f) for f in (plan.WORDS, plan.FIRST_TILE, plan.FIRST_WORD))
FIRST_CHANNEL, FIRST_CHANNEL_BLOCK = _const(plan.FIRST_CHANNEL), _const(plan.FIRST_CHANNEL_BLOCK)
DENSE, LINEAR = _const(plan.DENSE), _const(plan.LINEAR)
BITS, RESULT, RESULT_OUT = _const(plan.BITS), _const(plan.RESULT), _const(plan.RESULT_OUT)
RESULT_TAP, RESULT_IN = _const(plan.RESULT_TAP), _const(plan.RESULT_IN)

# The counters of one selection (int64, zeroed at its start).
S_ELIGIBLE = _const(0)  # eligible elements
S_KEEP = _const(1)  # keep, clamped to them
S_LOW = _const(2)  # bracket: keys above HIGH are sure, keys in [LOW, HIGH] are candidates
S_HIGH = _const(3)
S_SHIFT = _const(4)  # candidates' first digit = (key - LOW) >> SHIFT
S_MISS = _const(5)  # the bracket failed, or is known to fail
S_ABOVE = _const(6)  # sure elements that the sweep found
S_CANDIDATES = _const(7)  # candidates it met, also those beyond the buffer
S_BASE = _const(8)  # after the first digit: smallest key of the chosen digit
S_NEED = _const(9)  # how many of that digit are still wanted
S_DONE = _const(10)  # 1 when FLOOR is known
S_FLOOR = _const(11)  # keys >= FLOOR are kept ...
S_TIES = _const(12)  # ... and this many keys == FLOOR - 1, lowest position first
S_CUT = _const(13)  # ties in tiles below CUT are kept, and CUT_TIES of them in tile CUT
S_CUT_TIES = _const(14)
S_READS = _const(15)  # passes over the weights, for tests and benchmarks

CHANNEL_SPLIT = _const(40)  # sums of channels are kept in two halves, 2^40 high + low
LOW_PART = _const(2**40 - 1)


@triton.jit
def nan_key(FORMAT: tl.constexpr):
    """The largest key: one above infinity."""
    if FORMAT == 0:
        return 0x7F800001
    elif FORMAT == 1:
        return 0x7F81
    else:
        return 0x7C01


@triton.jit
def key_of(raw, FORMAT: tl.constexpr):
    """Raw bits (int32, or int16 for 16-bit formats) as keys, int32."""
    if FORMAT == 0:
        magnitude = raw & 0x7FFFFFFF
    else:
        magnitude = raw.to(tl.int32) & 0x7FFF
    return tl.minimum(magnitude, nan_key(FORMAT))


@triton.jit
def raw_pointer(address, FORMAT: tl.constexpr):
    """An address (or a block of them) as pointer to the raw bits of weights."""
    if FORMAT == 0:
        return address.to(tl.pointer_type(tl.int32))
    else:
        return address.to(tl.pointer_type(tl.int16))


@triton.jit
def popcount(words):
    """Number of set bits. Written out: the interpreter has no device libraries."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def pack(on):
    """(BLOCK, 32) bool -> BLOCK words. Every bit occurs once, so the sum is their OR."""
    o_bit = tl.arange(0, 32)
    return tl.sum(on.to(tl.int32) << o_bit[None, :], axis=1)


@triton.jit
def unpack(words):
    """BLOCK words -> (BLOCK, 32) bool."""
    o_bit = tl.arange(0, 32)
    return ((words[:, None] >> o_bit[None, :]) & 1) != 0


# ---- the weight of a tile ------------------------------------------------------------------------


@triton.jit
def tile_record(p_table, p_map, tile, BLOCK: tl.constexpr):
    """Record of the tile's weight, and the tile's first word within that weight, int32."""
    i_weight = tl.load(p_map + tile)
    p_record = p_table + HEADER + i_weight * FIELDS
    return p_record, ((tile - tl.load(p_record + FIRST_TILE)) * BLOCK).to(tl.int32)


@triton.jit
def divide_near(x, divisor, BLOCK: tl.constexpr):
    """x // divisor for 0 <= x < divisor + BLOCK, in a few instructions.

    Words of a tile are divided in every thread that holds one of their elements, so that a true
    division would cost more than everything else. The quotient is 0 or 1 unless the divisor is
    below BLOCK; then x < 256, and half a unit of room makes the float quotient exact.
    """
    quotient = ((x.to(tl.float32) + 0.5) * (1.0 / divisor.to(tl.float32))).to(tl.int32)
    return tl.where(divisor >= BLOCK, (x >= divisor).to(tl.int32), quotient)


@triton.jit
def row_of_words(p_record, first, BLOCK: tl.constexpr):
    """First row (out * taps + tap) of the tile; per word: rows below it, place in its row."""
    per_row = tl.load(p_record + WORDS_PER_ROW).to(tl.int32)
    i_row = first // per_row
    x = first - i_row * per_row + tl.arange(0, BLOCK)
    o_row = divide_near(x, per_row, BLOCK)
    return i_row, o_row, x - o_row * per_row


@triton.jit
def channel_of_words(p_record, first, BLOCK: tl.constexpr):
    """First channel of the tile, and per word the channels below it."""
    per_channel = tl.load(p_record + TAPS).to(tl.int32) * tl.load(p_record + WORDS_PER_ROW).to(
        tl.int32
    )
    i_out = first // per_channel
    o_out = divide_near(first - i_out * per_channel + tl.arange(0, BLOCK), per_channel, BLOCK)
    return i_out, o_out


@triton.jit
def element_offsets(
    p_record, first, stride_out, stride_tap, stride_in, BLOCK: tl.constexpr
):  # fmt: skip
    """Where a tile's elements lie: starts (BLOCK, 1) int64, offsets (BLOCK, 32) int32, which exist.

    Last comes the `in` coordinate. A row spans less than 2^31 elements: plan.py sees to it.
    """
    i_row, o_row, o_place = row_of_words(p_record, first, BLOCK)
    taps = tl.load(p_record + TAPS).to(tl.int32)
    i_out = i_row // taps
    x = i_row - i_out * taps + o_row
    o_out = divide_near(x, taps, BLOCK)
    o_start = (i_out + o_out).to(tl.int64) * stride_out + (x - o_out * taps) * stride_tap
    o_in = (o_place * 32)[:, None] + tl.arange(0, 32)[None, :]
    m_word = first + tl.arange(0, BLOCK) < tl.load(p_record + WORDS).to(tl.int32)
    m_in = m_word[:, None] & (o_in < tl.load(p_record + IN).to(tl.int32))
    return o_start[:, None], o_in * stride_in.to(tl.int32), m_in, o_in


@triton.jit
def weight_offsets(p_record, first, BLOCK: tl.constexpr):
    """`element_offsets` with the strides of the weight."""
    stride_out, stride_tap = tl.load(p_record + STRIDE_OUT), tl.load(p_record + STRIDE_TAP)
    return element_offsets(
        p_record, first, stride_out, stride_tap, tl.load(p_record + STRIDE_IN), BLOCK
    )  # fmt: skip


@triton.jit
def load_keys(p_record, first, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    """Keys (BLOCK, 32) of the tile that starts at word `first` of a weight; -1 on padding.

    Rows whose bits have no padding lie in memory as the tile does: one pointer and constant
    offsets give 16-byte loads. Any other layout pays for divisions, and loads one by one.
    """
    address = tl.load(p_record + ADDRESS)
    # cast here, not in a function: the alignment would stick to the call and be lost
    if FORMAT == 0:
        p_weight = address.to(tl.pointer_type(tl.int32))
    else:
        p_weight = address.to(tl.pointer_type(tl.int16))
    if tl.load(p_record + DENSE) != 0:
        p_tile = tl.multiple_of(p_weight, 16) + first.to(tl.int64) * 32
        o_word, o_bit = tl.arange(0, BLOCK), tl.arange(0, 32)
        m_word = first + o_word < tl.load(p_record + WORDS).to(tl.int32)
        raw = tl.load(p_tile + (o_word[:, None] * 32 + o_bit[None, :]), m_word[:, None], other=0)
        keys = tl.where(m_word[:, None], key_of(raw, FORMAT), -1)
    else:
        o_start, o_element, m_in, _ = weight_offsets(p_record, first, BLOCK)
        raw = tl.load(p_weight + o_start + o_element, mask=m_in, other=0)
        keys = tl.where(m_in, key_of(raw, FORMAT), -1)
    return keys


@triton.jit
def row_words(p_record, first, BLOCK: tl.constexpr):
    """Offsets of the tile's words in a flat row of bits, and which of them exist."""
    o_word = tl.arange(0, BLOCK)
    m_word = first + o_word < tl.load(p_record + WORDS).to(tl.int32)
    return (tl.load(p_record + FIRST_WORD) + first) + o_word, m_word


@triton.jit
def eligible_keys(keys, p_eligible, tile, BLOCK: tl.constexpr):
    """Keys with -1 where the tile's bits in the plane of eligible elements are 0."""
    b_eligible = tl.load(p_eligible + tile * BLOCK + tl.arange(0, BLOCK))
    return tl.where(unpack(b_eligible), keys, -1)


# ---- N:M -----------------------------------------------------------------------------------------


@triton.jit
def nm_word(xs, N: tl.constexpr, M: tl.constexpr):
    """Bits of groups whose elements are the M blocks xs[0] ... xs[M - 1].

    Rank by counting: an element stays when fewer than N others beat it. M (M - 1) compares in
    registers, without a branch: 12 for 2:4, 56 for 4:8.
    """
    bits = tl.zeros_like(xs[0])
    for i in tl.static_range(M):
        rank = tl.zeros_like(xs[0])
        for j in tl.static_range(M):
            if j < i:
                rank += (xs[j] >= xs[i]).to(tl.int32)
            elif j > i:
                rank += (xs[j] > xs[i]).to(tl.int32)
        kept = (rank < N) & (xs[i] >= 0)
        bits |= kept.to(tl.int32) << i
    return bits


@triton.jit
def nm_of_keys(keys, N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
    """N:M words of a tile for M = 2, 4, 8, which divide a word: groups are split in registers."""
    if M == 2:
        x0, x1 = tl.split(tl.reshape(keys, (BLOCK, 16, 2)))
        bits = nm_word((x0, x1), N, M)
    elif M == 4:
        even, odd = tl.split(tl.reshape(keys, (BLOCK, 8, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        bits = nm_word((x0, x1, x2, x3), N, M)
    else:
        even, odd = tl.split(tl.reshape(keys, (BLOCK, 4, 2, 2, 2)))
        even0, even1 = tl.split(even)  # elements 0 4, and 2 6
        odd0, odd1 = tl.split(odd)  # elements 1 5, and 3 7
        x0, x4 = tl.split(even0)
        x2, x6 = tl.split(even1)
        x1, x5 = tl.split(odd0)
        x3, x7 = tl.split(odd1)
        bits = nm_word((x0, x1, x2, x3, x4, x5, x6, x7), N, M)
    o_group = tl.arange(0, 32 // M)
    return tl.sum(bits << (o_group * M)[None, :], axis=1)


@triton.jit
def nm_by_reading(
    p_record, first, keys, N: tl.constexpr, M: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """N:M words of a tile for any M: every element reads its whole group again, from the cache."""
    p_weight = raw_pointer(tl.load(p_record + ADDRESS), FORMAT)
    o_start, _, m_in, o_in = weight_offsets(p_record, first, BLOCK)
    stride = tl.load(p_record + STRIDE_IN).to(tl.int32)
    o_group = o_in - o_in % M
    rank = tl.zeros_like(keys)
    for j in range(M):
        raw = tl.load(p_weight + o_start + (o_group + j) * stride, mask=m_in, other=0)
        other = key_of(raw, FORMAT)
        beats = (other > keys) | ((other == keys) & (o_group + j < o_in))
        rank += beats.to(tl.int32)
    return pack(m_in & (rank < N))


@triton.jit
def nm_words(
    p_record, first, keys, N: tl.constexpr, M: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """N:M words of a tile; all ones where in % M != 0. `keys` are those of all elements."""
    if tl.load(p_record + IN).to(tl.int32) % M == 0:
        if M == 2 or M == 4 or M == 8:
            words = nm_of_keys(keys, N, M, BLOCK)
        else:
            words = nm_by_reading(p_record, first, keys, N, M, FORMAT, BLOCK)
    else:
        words = pack(keys >= 0)
    return words


# ---- fixed point ---------------------------------------------------------------------------------


@triton.jit
def fixed_point(keys, FORMAT: tl.constexpr):
    """round(|w| * 2^38), half to even, saturating int64, from keys >= 0, with integers only."""
    if FORMAT == 2:
        # |w| = m 2^(e - 25), with m of 11 bits: a shift by e + 13, exact, never saturating
        exponent = keys >> 10
        mantissa = (keys & 0x3FF) + tl.where(exponent > 0, 0x400, 0)
        value = mantissa.to(tl.int64) << (tl.maximum(exponent, 1) + 13).to(tl.int64)
        return tl.where(keys >= 0x7C00, 0x7FFFFFFFFFFFFFFF, value)
    else:
        wide = keys
        if FORMAT == 1:
            wide = keys << 16
        # |w| = m 2^(e - 150), so the value is m 2^(e - 112); subnormal floats round to 0
        exponent = wide >> 23
        mantissa = (wide & 0x7FFFFF) + 0x800000
        right = tl.minimum(tl.maximum(112 - exponent, 0), 31)
        left = tl.minimum(tl.maximum(exponent - 112, 0), 39)
        half = tl.where(right > 0, (1 << tl.maximum(right - 1, 0)) - 1, 0)
        odd = tl.where(right > 0, (mantissa >> right) & 1, 0)
        rounded = (mantissa + half + odd) >> right
        value = rounded.to(tl.int64) << left.to(tl.int64)
        return tl.where(exponent > 151, 0x7FFFFFFFFFFFFFFF, value)


@triton.jit
def large_key(FORMAT: tl.constexpr):
    """Keys below this have fixed points below 2^57: 32 of them fit one int64."""
    if FORMAT == 0:
        return (127 + 19) << 23
    elif FORMAT == 1:
        return (127 + 19) << 7
    else:
        return 0x7C00
