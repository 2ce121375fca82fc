"""What one selection knows before it reads the weights: a bracket around its threshold."""

from __future__ import annotations

import triton
import triton.language as tl

from .plan import SAMPLE_BINS as _SAMPLE_BINS
from .tiles import (
    ADDRESS,
    CAPACITY,
    ELEMENTS,
    FIELDS,
    FIRST_TILE,
    HEADER,
    IN,
    S_ELIGIBLE,
    S_HIGH,
    S_KEEP,
    S_LOW,
    S_MISS,
    S_SHIFT,
    SLOT_BITS,
    STRIDE_IN,
    STRIDE_OUT,
    STRIDE_TAP,
    TAPS,
    TILES,
    WORDS,
    WORDS_PER_ROW,
    key_of,
    nan_key,
    popcount,
    raw_pointer,
    row_of_words,
    row_words,
    tile_record,
)

SAMPLE_BINS = tl.constexpr(_SAMPLE_BINS)
LOCAL_BINS = tl.constexpr(2048)  # first digit of candidates: a histogram in shared memory, 8 KB
# A first digit leaves at most 16 bits for the second; a wide bracket then has up to 2^15 of them.
MAX_SHIFT = tl.constexpr(16)


@triton.jit
def add_digits(p_histogram, digit, on):
    """Count digits with atomics, the smallest and the largest digit of the block only once.

    Inputs with one or two frequent values (all equal, mostly zero) would else queue at an address.
    """
    top = tl.max(tl.where(on, digit, -1), axis=0)
    bottom = tl.min(tl.where(on, digit, 0x7FFFFFFF), axis=0)
    at_top = on & (digit == top)
    at_bottom = on & (digit == bottom) & (bottom < top)
    n_top = tl.sum(at_top.to(tl.int32), axis=0)
    n_bottom = tl.sum(at_bottom.to(tl.int32), axis=0)
    tl.atomic_add(p_histogram + top, n_top, mask=n_top > 0, sem="relaxed")
    tl.atomic_add(p_histogram + bottom, n_bottom, mask=n_bottom > 0, sem="relaxed")
    rest = on & (digit != top) & (digit != bottom)
    tl.atomic_add(p_histogram + digit, tl.full(digit.shape, 1, tl.int32), rest, sem="relaxed")


@triton.jit
def sample_bin(key, FORMAT: tl.constexpr):
    if FORMAT == 0:
        return key >> 16
    else:
        return key


# The plane of eligible words is in tiles, without padding bits, and survives a row that is
# overwritten while it is also `within`.
@triton.jit
def count_eligible(p_table, p_map, p_state, p_within, p_eligible, BLOCK: tl.constexpr):
    n_words = tl.zeros((BLOCK,), tl.int64)
    for tile in range(tl.program_id(0), tl.load(p_table + TILES), tl.num_programs(0)):
        p_record, first = tile_record(p_table, p_map, tile, BLOCK)
        o_row, m_row = row_words(p_record, first, BLOCK)
        words = tl.load(p_within + o_row, mask=m_row, other=0)
        _, _, o_place = row_of_words(p_record, first, BLOCK)
        left = tl.load(p_record + IN).to(tl.int32) - o_place * 32
        low_bits = (1 << tl.minimum(left, 31)) - 1
        words &= tl.where(left >= 32, -1, low_bits)
        tl.store(p_eligible + tile * BLOCK + tl.arange(0, BLOCK), words)
        n_words += popcount(words)
    tl.atomic_add(p_state + S_ELIGIBLE, tl.sum(n_words, axis=0), sem="relaxed")


# One element out of each of 65,536 equal stretches of slots (all of them, if there are fewer), at a
# place drawn by a fixed hash: a plain stride could follow one column of every weight.
# 65,536 sectors of 32 bytes, 2 MB; about 4 us.
@triton.jit
def sample(
    p_table, p_map, p_eligible, p_histogram,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, WITHIN: tl.constexpr, SAMPLES: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    i_sample = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    slots = tl.load(p_table + TILES) * (BLOCK * 32)
    samples = tl.minimum(slots, SAMPLES)
    start = i_sample.to(tl.int64) * slots // samples
    end = (i_sample + 1).to(tl.int64) * slots // samples
    mixed = i_sample.to(tl.uint32) * 0x9E3779B1
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77
    slot = start + (mixed >> 8).to(tl.int64) % tl.maximum(end - start, 1)
    on = i_sample < samples
    slot = tl.where(on, slot, 0)
    tile = slot // (BLOCK * 32)
    place = (slot // 32) % BLOCK
    bit = slot % 32
    p_record = p_table + HEADER + tl.load(p_map + tile) * FIELDS
    word = (tile - tl.load(p_record + FIRST_TILE)) * BLOCK + place
    row = word // tl.load(p_record + WORDS_PER_ROW)
    o_in = (word - row * tl.load(p_record + WORDS_PER_ROW)) * 32 + bit
    taps = tl.load(p_record + TAPS)
    on &= (word < tl.load(p_record + WORDS)) & (o_in < tl.load(p_record + IN))
    if WITHIN:
        b_eligible = tl.load(p_eligible + tile * BLOCK + place)
        on &= ((b_eligible >> bit.to(tl.int32)) & 1) != 0
    o_element = (row // taps) * tl.load(p_record + STRIDE_OUT) + o_in * tl.load(
        p_record + STRIDE_IN
    )
    o_element += (row % taps) * tl.load(p_record + STRIDE_TAP)
    p_element = raw_pointer(tl.load(p_record + ADDRESS), FORMAT) + o_element
    key = key_of(tl.load(p_element, mask=on, other=0), FORMAT)
    add_digits(p_histogram, sample_bin(key, FORMAT), on)


# One program. Five standard deviations of the sample's rank on either side: a miss is rarer than
# one in a million. `drift` moves the wanted rank, for tests that need a wrong bracket.
@triton.jit
def bracket(
    p_table, p_state, p_keep, p_histogram,
    FORMAT: tl.constexpr, WITHIN: tl.constexpr, DRIFT: tl.constexpr, FORCE_MISS: tl.constexpr,
):  # fmt: skip
    eligible = tl.load(p_table + ELEMENTS)
    if WITHIN:
        eligible = tl.load(p_state + S_ELIGIBLE)
    keep = tl.minimum(tl.maximum(tl.load(p_keep), 0), eligible)
    CHUNK: tl.constexpr = 8192
    o_bin = tl.arange(0, CHUNK)
    samples = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, SAMPLE_BINS, CHUNK):
        samples += tl.load(p_histogram + start + o_bin)
    total = tl.sum(samples, axis=0)
    share = keep.to(tl.float64) / tl.maximum(eligible, 1).to(tl.float64)
    rank = share * total.to(tl.float64)
    margin = 5.0 * tl.sqrt(rank * (1.0 - share)) + 2.0
    rank = tl.minimum(tl.maximum(rank + DRIFT, 0.0), total.to(tl.float64))
    # HIGH ends the bin that holds the sample of rank `upper` from the top, LOW starts that of
    # `lower`; no sample has rank 0 or total + 1: then the bracket is open.
    upper = tl.maximum(rank - margin, 0.0).to(tl.int32)
    lower = tl.minimum(rank + margin, total.to(tl.float64)).to(tl.int32) + 1
    zero = total * 0
    high_bin, low_bin = zero + (SAMPLE_BINS - 1), zero
    seen, inside = zero, zero  # samples in higher bins, and in the bracket
    for i_chunk in range(0, SAMPLE_BINS // CHUNK):
        start = SAMPLE_BINS - (i_chunk + 1) * CHUNK
        counts = tl.load(p_histogram + start + o_bin)
        chunk = tl.sum(counts, axis=0)
        above = seen + chunk - tl.cumsum(counts, axis=0)
        at_upper = (above < upper) & (above + counts >= upper)
        at_lower = (above < lower) & (above + counts >= lower)
        high_bin += tl.sum(tl.where(at_upper, start + o_bin - (SAMPLE_BINS - 1), 0), axis=0)
        low_bin += tl.sum(tl.where(at_lower, start + o_bin, 0), axis=0)
        seen += chunk
    for start in range(0, SAMPLE_BINS, CHUNK):
        counts = tl.load(p_histogram + start + o_bin)
        in_bracket = (start + o_bin >= low_bin) & (start + o_bin <= high_bin)
        inside += tl.sum(tl.where(in_bracket, counts, 0), axis=0)
    low, high = low_bin.to(tl.int64), high_bin.to(tl.int64)
    if FORMAT == 0:
        low, high = low << 16, (high << 16) | 0xFFFF
    high = tl.minimum(high, nan_key(FORMAT))
    if keep == 0:  # nothing is sure, nothing is a candidate
        low, high = low * 0 + 0x7FFFFFFF, high * 0 + 0x7FFFFFFF
    elif keep == eligible:  # everything is sure
        low, high = low * 0, high * 0 - 1
    else:
        # A bracket that will overflow the buffer for certain costs no sweep. The sample is rough:
        # up to twice the capacity is tried.
        share_inside = inside.to(tl.float64) / tl.maximum(total, 1).to(tl.float64)
        expected = share_inside * eligible.to(tl.float64)
        # a candidate holds key - LOW above its slot in 64 bits, without a sign
        wide = ((high - low) >> (63 - tl.load(p_table + SLOT_BITS))) != 0
        if (expected > 2.0 * tl.load(p_table + CAPACITY).to(tl.float64)) | wide | FORCE_MISS:
            tl.store(p_state + S_MISS, 1)
    shift = zero
    while ((high - low) >> shift >= LOCAL_BINS) & (shift < MAX_SHIFT):
        shift += 1
    tl.store(p_state + S_KEEP, keep)
    tl.store(p_state + S_LOW, low)
    tl.store(p_state + S_HIGH, high)
    tl.store(p_state + S_SHIFT, shift.to(tl.int64))
