"""The small kernels that make a top-k exact around the sweep over the weights.

    count_eligible   copy `within` to scratch, count it             only with `within`
    sample           histogram of 65,536 keys
    bracket          LOW, HIGH around the wanted rank
    sweep            sweep.py: one read
    digits, choose   first and second digit of the threshold        over candidates, or, after a
    (twice)                                                         miss, over all keys: two reads
    fix_up           bits of the chosen candidates
    sweep FINAL      after a miss only: the third read, or the fourth
    cut, apply_ties  only where some, not all, of the keys at the threshold are kept

All decisions stay on the device; a kernel with nothing to do returns at once (about 2 us each in a
CUDA graph, 25 us in all).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bracket import LOCAL_BINS, add_digits
from .plan import COARSE as _COARSE
from .tiles import (
    CAPACITY,
    CHANNEL_SPLIT,
    CHANNELS,
    FIELDS,
    FIRST_CHANNEL,
    FIRST_TILE,
    FIRST_WORD,
    HEADER,
    LOW_PART,
    S_ABOVE,
    S_BASE,
    S_CANDIDATES,
    S_CUT,
    S_CUT_TIES,
    S_DONE,
    S_FLOOR,
    S_HIGH,
    S_KEEP,
    S_LOW,
    S_MISS,
    S_NEED,
    S_READS,
    S_SHIFT,
    S_TIES,
    SLOT_BITS,
    TAPS,
    TILES,
    WORDS_PER_ROW,
    channel_of_words,
    eligible_keys,
    fixed_point,
    load_keys,
    nan_key,
    pack,
    popcount,
    row_words,
    tile_record,
    unpack,
)

COARSE = tl.constexpr(_COARSE)


# ---- the threshold -------------------------------------------------------------------------------


@triton.jit
def outcome(p_table, p_state):
    """(miss, wanted among the candidates, candidates) after the sweep."""
    need = tl.load(p_state + S_KEEP) - tl.load(p_state + S_ABOVE)
    found = tl.load(p_state + S_CANDIDATES)
    miss = (tl.load(p_state + S_MISS) != 0) | (need < 0) | (need > found)
    miss |= found > tl.load(p_table + CAPACITY)
    return miss, need, found


@triton.jit
def miss_shift(FORMAT: tl.constexpr):
    """Bits below the first digit when all keys are counted; LOW is then 0."""
    if FORMAT == 0:
        return 16
    else:
        return 0


@triton.jit
def digits_of_all(
    p_table, p_map, p_eligible, p_histogram, base, tiles,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, WITHIN: tl.constexpr, LEVEL: tl.constexpr,
):  # fmt: skip
    SHIFT: tl.constexpr = 16 if FORMAT == 0 else 0  # as miss_shift
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        p_record, first = tile_record(p_table, p_map, tile, BLOCK)
        keys = load_keys(p_record, first, FORMAT, BLOCK)
        if WITHIN:
            keys = eligible_keys(keys, p_eligible, tile, BLOCK)
        keys = tl.reshape(keys, (BLOCK * 32,))
        if LEVEL == 0:
            add_digits(p_histogram, keys >> SHIFT, keys >= 0)
        else:
            in_digit = (keys >= 0) & ((keys >> SHIFT) == (base >> SHIFT))
            add_digits(p_histogram, keys & ((1 << SHIFT) - 1), in_digit)


# Histogram of the first digit (LEVEL 0) or, inside the chosen first digit, of the rest (LEVEL 1).
# Usual brackets hold half a million candidates in 2^19 keys: 2048 bins spread them for fp32; for
# bf16 that is 8 keys, which the histogram in shared memory counts 132 times side by side.
@triton.jit
def digits(
    p_table, p_map, p_state, p_eligible, p_candidates, p_histogram,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, WITHIN: tl.constexpr, LEVEL: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    miss, need, found = outcome(p_table, p_state)
    base = tl.load(p_state + S_BASE)
    active = (tl.load(p_state + S_DONE) == 0) & ((need > 0) | miss)
    tiles = tl.where(active & miss, tl.load(p_table + TILES), 0)
    if active & miss & (tl.program_id(0) == 0):
        tl.atomic_add(p_state + S_READS, 1, sem="relaxed")
    digits_of_all(
        p_table, p_map, p_eligible, p_histogram, base.to(tl.int32), tiles,
        FORMAT, BLOCK, WITHIN, LEVEL,
    )  # fmt: skip
    found = tl.where(active & (miss == 0), found, 0)
    low, shift = tl.load(p_state + S_LOW), tl.load(p_state + S_SHIFT)
    slot_bits = tl.load(p_table + SLOT_BITS)
    local = ((tl.load(p_state + S_HIGH) - low) >> shift) < LOCAL_BINS
    counts = tl.zeros((LOCAL_BINS,), tl.int32)
    for start in range(tl.program_id(0) * SIZE, found, tl.num_programs(0) * SIZE):
        o_candidate = start + tl.arange(0, SIZE)
        on = o_candidate < found
        candidate = tl.load(p_candidates + o_candidate, mask=on, other=0)
        relative = candidate >> slot_bits
        if LEVEL == 1:
            on &= (relative >> shift) == ((base - low) >> shift)
            add_digits(p_histogram, (relative - (base - low)).to(tl.int32), on)
        elif local:
            # masked entries count as digit 0 and are taken off again: not every version of
            # tl.histogram has a mask
            digit = tl.where(on, relative >> shift, 0).to(tl.int32)
            off = SIZE - tl.sum(on.to(tl.int32), axis=0)
            counts += tl.histogram(digit, LOCAL_BINS)
            counts -= tl.where(tl.arange(0, LOCAL_BINS) == 0, off, 0)
        else:
            add_digits(p_histogram, (relative >> shift).to(tl.int32), on)
    if LEVEL == 0:
        o_bin = tl.arange(0, LOCAL_BINS)
        tl.atomic_add(p_histogram + o_bin, counts, mask=counts != 0, sem="relaxed")


@triton.jit
def digit_of_rank(p_histogram, bins, need):
    """(digit, count above it, count at it) of the element of rank `need` >= 1 from the top."""
    CHUNK: tl.constexpr = 4096
    o_bin = tl.arange(0, CHUNK)
    seen = need * 0
    digit, above_digit, at_digit = need * 0, need * 0, need * 0
    start = (bins - 1) // CHUNK * CHUNK
    while start >= 0:
        counts = tl.load(p_histogram + start + o_bin)
        chunk = tl.sum(counts, axis=0)
        if seen + chunk >= need:
            above = seen + chunk - tl.cumsum(counts, axis=0)
            here = (above < need) & (above + counts >= need)
            digit = start + tl.sum(tl.where(here, o_bin, 0), axis=0)
            above_digit = tl.sum(tl.where(here, above, 0), axis=0)
            at_digit = tl.sum(tl.where(here, counts, 0), axis=0)
            start = start * 0 - 1
        else:
            seen += chunk
            start -= CHUNK
    return digit, above_digit, at_digit


# One program: the digit that holds the wanted rank. After the last digit, or when a digit is kept
# as a whole, FLOOR and TIES are the answer.
@triton.jit
def choose(p_table, p_state, p_histogram, FORMAT: tl.constexpr, LEVEL: tl.constexpr):
    miss, need, found = outcome(p_table, p_state)
    low, shift = tl.load(p_state + S_LOW), tl.load(p_state + S_SHIFT)
    span = tl.load(p_state + S_HIGH) - low
    if miss:
        low, shift = low * 0, shift * 0 + miss_shift(FORMAT)
        span = span * 0 + nan_key(FORMAT)
        need = tl.load(p_state + S_KEEP)
    bins = (span >> shift) + 1
    if LEVEL == 0:
        tl.store(p_state + S_MISS, miss.to(tl.int64))
        done = need == 0  # the sweep kept exactly as many as wanted
        if done:
            tl.store(p_state + S_FLOOR, low + span + 1)
            tl.store(p_state + S_DONE, 1)
    else:
        done = tl.load(p_state + S_DONE) != 0
        low, need = tl.load(p_state + S_BASE), tl.load(p_state + S_NEED)
        bins = tl.full((), 1, tl.int64) << shift
        shift = shift * 0
    if done == 0:
        digit, above, at = digit_of_rank(p_histogram, bins, need)
        need -= above
        base = low + (digit << shift)
        if at == need:  # everything from here up
            tl.store(p_state + S_FLOOR, base)
            tl.store(p_state + S_DONE, 1)
        elif shift == 0:  # one key, of which some are kept
            tl.store(p_state + S_FLOOR, base + 1)
            tl.store(p_state + S_TIES, need)
            tl.store(p_state + S_DONE, 1)
        tl.store(p_state + S_BASE, base)
        tl.store(p_state + S_NEED, need)


# ---- after the threshold -------------------------------------------------------------------------


@triton.jit
def add_value(p_low, p_high, place, keys, count, on, FORMAT: tl.constexpr):
    """Add `count` times the fixed point of `keys` to the channels at `place`."""
    value = fixed_point(keys, FORMAT)
    low = (value & LOW_PART) * count
    high = (value >> CHANNEL_SPLIT) * count + (low >> CHANNEL_SPLIT)
    low &= LOW_PART
    tl.atomic_add(p_low + place, low, mask=on & (low != 0), sem="relaxed")
    tl.atomic_add(p_high + place, high, mask=on & (high != 0), sem="relaxed")


# candidates (found,)  -- key >= FLOOR -->  bits of `row` (and scores)
#                      -- key == FLOOR - 1, some of them kept -->  plane `ties`, counts per tile
@triton.jit
def fix_up(
    p_table, p_map, p_state, p_candidates, p_ties, p_tile_ties, p_coarse, p_sums, p_row,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, SCORES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    hit = tl.load(p_state + S_MISS) == 0
    found = tl.where(hit, tl.load(p_state + S_CANDIDATES), 0)
    low, floor = tl.load(p_state + S_LOW), tl.load(p_state + S_FLOOR)
    tied = tl.where(tl.load(p_state + S_TIES) > 0, floor - 1, -1)  # a key is 0 or more
    channels = tl.load(p_table + CHANNELS)
    slot_bits = tl.load(p_table + SLOT_BITS)
    for start in range(tl.program_id(0) * SIZE, found, tl.num_programs(0) * SIZE):
        o_candidate = start + tl.arange(0, SIZE)
        on = o_candidate < found
        candidate = tl.load(p_candidates + o_candidate, mask=on, other=0)
        key = low + (candidate >> slot_bits)
        chosen = on & (key >= floor)
        tie = on & (key == tied)
        slot = candidate & ((tl.full((), 1, tl.int64) << slot_bits) - 1)
        bit = tl.full((SIZE,), 1, tl.int32) << (slot & 31).to(tl.int32)
        o_plane = slot >> 5
        tile = o_plane // BLOCK
        p_record = p_table + HEADER + tl.load(p_map + tile, mask=on, other=0) * FIELDS
        word = o_plane - tl.load(p_record + FIRST_TILE) * BLOCK
        tl.atomic_or(p_row + tl.load(p_record + FIRST_WORD) + word, bit, chosen, sem="relaxed")
        if SCORES:
            per_channel = tl.load(p_record + TAPS) * tl.load(p_record + WORDS_PER_ROW)
            place = tl.load(p_record + FIRST_CHANNEL) + word // per_channel
            add_value(p_sums, p_sums + channels, place, key.to(tl.int32), 1, chosen, FORMAT)
        tl.atomic_or(p_ties + o_plane, bit, tie, sem="relaxed")
        tl.atomic_add(p_tile_ties + tile, tl.full((SIZE,), 1, tl.int32), tie, sem="relaxed")
        one = tl.full((SIZE,), 1, tl.int64)
        tl.atomic_add(p_coarse + tile // COARSE, one, tie, sem="relaxed")


# One program: the tile in which the last kept tie lies, found over tiles counted by the 256.
@triton.jit
def cut(p_table, p_state, p_tile_ties, p_coarse):
    ties = tl.load(p_state + S_TIES)
    tiles = tl.load(p_table + TILES)
    groups = tl.where(ties > 0, (tiles + COARSE - 1) // COARSE, 0)
    o_group = tl.arange(0, 1024)
    group, before, seen = ties * 0, ties * 0, ties * 0
    for start in range(0, groups, 1024):
        counts = tl.load(p_coarse + start + o_group, mask=start + o_group < groups, other=0)
        earlier = seen + tl.cumsum(counts, axis=0) - counts
        here = (earlier < ties) & (earlier + counts >= ties)
        group += tl.sum(tl.where(here, start + o_group, 0), axis=0)
        before += tl.sum(tl.where(here, earlier, 0), axis=0)
        seen += tl.sum(counts, axis=0)
    if ties > 0:
        o_tile = group * COARSE + tl.arange(0, COARSE)
        counts = tl.load(p_tile_ties + o_tile, mask=o_tile < tiles, other=0).to(tl.int64)
        earlier = before + tl.cumsum(counts, axis=0) - counts
        here = (earlier < ties) & (earlier + counts >= ties)
        tl.store(p_state + S_CUT, tl.sum(tl.where(here, o_tile, 0), axis=0))
        tl.store(p_state + S_CUT_TIES, ties - tl.sum(tl.where(here, earlier, 0), axis=0))


# ties (tiles, BLOCK) --[tile < CUT: all; tile == CUT: the first CUT_TIES]--> bits of `row`.
# Clears the plane, which is zero between calls.
@triton.jit
def apply_ties(
    p_table, p_map, p_state, p_ties, p_tile_ties, p_sums, p_row,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    ties = tl.load(p_state + S_TIES)
    i_cut, cut_ties = tl.load(p_state + S_CUT), tl.load(p_state + S_CUT_TIES).to(tl.int32)
    channels = tl.load(p_table + CHANNELS)
    if tl.load(p_state + S_MISS) != 0:
        p_sums += 4 * channels
    key = (tl.load(p_state + S_FLOOR) - 1).to(tl.int32)
    o_word = tl.arange(0, BLOCK)
    tiles = tl.where(ties > 0, tl.load(p_table + TILES), 0)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        if tl.load(p_tile_ties + tile) > 0:
            words = tl.load(p_ties + tile * BLOCK + o_word)
            tl.debug_barrier()  # threads may hold the same word: all have read it now
            tl.store(p_ties + tile * BLOCK + o_word, tl.zeros((BLOCK,), tl.int32))
            if tile <= i_cut:
                if tile == i_cut:
                    on = unpack(words).to(tl.int32)
                    count = popcount(words)
                    rank = (tl.cumsum(count, axis=0) - count)[:, None] + tl.cumsum(on, axis=1)
                    words = pack((on != 0) & (rank <= cut_ties))
                p_record, first = tile_record(p_table, p_map, tile, BLOCK)
                o_row, m_row = row_words(p_record, first, BLOCK)
                b_row = tl.load(p_row + o_row, mask=m_row, other=0)
                tl.store(p_row + o_row, b_row | words, mask=m_row)
                if SCORES:
                    i_out, o_out = channel_of_words(p_record, first, BLOCK)
                    place = tl.load(p_record + FIRST_CHANNEL) + i_out + o_out
                    add_value(
                        p_sums, p_sums + channels, place, key, popcount(words), words != 0, FORMAT
                    )  # fmt: skip
