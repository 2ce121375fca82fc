"""The pass over the weights.

It runs once with a bracket [LOW, HIGH] from the sample: keys above are sure to be kept, keys inside
become candidates. When the bracket failed, it runs again with the exact threshold: then there are
no candidates, only ties. N:M bits and channel scores come from the same registers.

ResNet-50, fp32, 25.5 M weights: 102 MB of weights, 3.2 MB of bits per row and about 4 MB of
candidates; 27 us at the 4.0 TB/s that an H200 copies, if about 35 instructions per weight hide
behind the loads (budget at that speed: 30 to 35). With N:M and scores about twice the instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .plan import COARSE as _COARSE
from .tiles import (
    CAPACITY,
    CHANNEL_SPLIT,
    CHANNELS,
    FIRST_CHANNEL,
    LOW_PART,
    S_ABOVE,
    S_CANDIDATES,
    S_DONE,
    S_FLOOR,
    S_HIGH,
    S_LOW,
    S_MISS,
    S_READS,
    S_TIES,
    SLOT_BITS,
    TILES,
    channel_of_words,
    eligible_keys,
    fixed_point,
    large_key,
    load_keys,
    nm_words,
    pack,
    popcount,
    row_words,
    tile_record,
    unpack,
)

COARSE = tl.constexpr(_COARSE)

# Where the N:M bits of a unified selection come from.
NM_NONE = tl.constexpr(0)  # there are none, nor scores
NM_FRESH = tl.constexpr(1)  # from the keys
NM_GIVEN = tl.constexpr(2)  # from a row
NM_ONES = tl.constexpr(3)


@triton.jit
def add_to_channels(p_low, p_high, i_out, o_out, low, high):
    """Add fixed-point sums per word to their channels: high counts units of 2^40.

    A tile inside one channel is summed first: 144 words of a 512x3x3 channel would else queue at
    one address.
    """
    if tl.max(o_out, axis=0) == 0:
        sum_low, sum_high = tl.sum(low, axis=0), tl.sum(high, axis=0)
        tl.atomic_add(p_low + i_out, sum_low, mask=sum_low != 0, sem="relaxed")
        tl.atomic_add(p_high + i_out, sum_high, mask=sum_high != 0, sem="relaxed")
    else:
        tl.atomic_add(p_low + i_out + o_out, low, mask=low != 0, sem="relaxed")
        tl.atomic_add(p_high + i_out + o_out, high, mask=high != 0, sem="relaxed")


@triton.jit
def split_sum(value, on, large):
    """Sums over a word's elements as (low, high) with high in units of 2^40."""
    chosen = tl.where(on, value, 0)
    if large:  # 32 of these may overflow: each half alone does not
        low = tl.sum(chosen & LOW_PART, axis=1)
        high = tl.sum(chosen >> CHANNEL_SPLIT, axis=1)
    else:
        low = tl.sum(chosen, axis=1)
        high = tl.zeros_like(low)
    return low & LOW_PART, high + (low >> CHANNEL_SPLIT)


@triton.jit
def add_scores(
    p_table, p_record, first, p_sums, keys, on, on_nm, FORMAT: tl.constexpr, BLOCK: tl.constexpr
):
    """Add a tile's fixed-point values to the sums [u low, u high, nm low, nm high][channel]."""
    channels = tl.load(p_table + CHANNELS)
    i_out, o_out = channel_of_words(p_record, first, BLOCK)
    p_sum = p_sums + tl.load(p_record + FIRST_CHANNEL)
    value = fixed_point(tl.maximum(keys, 0), FORMAT)
    large = tl.max(tl.max(keys, axis=1), axis=0) >= large_key(FORMAT)
    low, high = split_sum(value, on, large)
    add_to_channels(p_sum, p_sum + channels, i_out, o_out, low, high)
    low, high = split_sum(value, on_nm & (keys >= 0), large)
    p_sum += 2 * channels
    add_to_channels(p_sum, p_sum + channels, i_out, o_out, low, high)


@triton.jit
def store_candidates(
    p_candidates, p_state, p_table, tile, keys, inside, low, BLOCK: tl.constexpr
):  # fmt: skip
    """Append the tile's candidates, (key - low) << SLOT_BITS | slot, in any order between tiles."""
    ones = inside.to(tl.int32)
    per_word = tl.sum(ones, axis=1)
    total = tl.sum(per_word, axis=0)
    if total > 0:
        capacity = tl.load(p_table + CAPACITY)
        start = tl.atomic_add(p_state + S_CANDIDATES, total.to(tl.int64), sem="relaxed")
        before = tl.cumsum(per_word, axis=0) - per_word
        o_place = start + (before[:, None] + tl.cumsum(ones, axis=1) - ones)
        o_slot = tl.arange(0, BLOCK)[:, None] * 32 + tl.arange(0, 32)[None, :]
        relative = (keys - low).to(tl.int64)
        candidate = (relative << tl.load(p_table + SLOT_BITS)) | (tile * BLOCK * 32 + o_slot)
        tl.store(p_candidates + o_place, candidate, mask=inside & (o_place < capacity))


# tile      keys (BLOCK, 32)  --[> HIGH]-->  words of `row`      exact after fix-up in select.py
#                             --[inside]-->  candidates          or, in the FINAL pass, `ties`
#                             --[N:M]----->  words of `nm_row`   and with both: sums per channel
@triton.jit
def sweep(
    p_table, p_map, p_state, p_eligible, p_candidates, p_ties, p_tile_ties, p_coarse, p_sums,
    p_row, p_nm_from, p_nm_row,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, WITHIN: tl.constexpr, FINAL: tl.constexpr,
    NM: tl.constexpr, N: tl.constexpr, M: tl.constexpr, WRITE_NM: tl.constexpr,
):  # fmt: skip
    miss = tl.load(p_state + S_MISS) != 0
    ties = tl.load(p_state + S_TIES)
    if FINAL:
        active = miss & (tl.load(p_state + S_DONE) != 0)
        high = (tl.load(p_state + S_FLOOR) - 1).to(tl.int32)
        low = high  # keys == FLOOR - 1 tie
        p_sums += 4 * tl.load(p_table + CHANNELS)  # the first attempt left sums in the other half
    else:
        active = miss == 0
        high = tl.load(p_state + S_HIGH).to(tl.int32)
        low = tl.load(p_state + S_LOW).to(tl.int32)
    tiles = tl.where(active, tl.load(p_table + TILES), 0)
    if active & (tl.program_id(0) == 0):
        tl.atomic_add(p_state + S_READS, 1, sem="relaxed")
    n_above = tl.zeros((BLOCK,), tl.int64)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        p_record, first = tile_record(p_table, p_map, tile, BLOCK)
        every_key = load_keys(p_record, first, FORMAT, BLOCK)
        keys = every_key
        if WITHIN:
            keys = eligible_keys(every_key, p_eligible, tile, BLOCK)
        sure = keys > high
        inside = (keys >= low) & (keys <= high)
        o_row, m_row = row_words(p_record, first, BLOCK)
        words = pack(sure)
        tl.store(p_row + o_row, words, mask=m_row)
        if FINAL:
            if ties > 0:
                b_ties = pack(inside)
                count = tl.sum(popcount(b_ties), axis=0)
                if count > 0:
                    tl.store(p_ties + tile * BLOCK + tl.arange(0, BLOCK), b_ties)
                    tl.store(p_tile_ties + tile, count)
                    tl.atomic_add(p_coarse + tile // COARSE, count.to(tl.int64), sem="relaxed")
        else:
            n_above += popcount(words)
            store_candidates(p_candidates, p_state, p_table, tile, keys, inside, low, BLOCK)
        if NM != NM_NONE:
            if NM == NM_FRESH:
                b_nm = nm_words(p_record, first, every_key, N, M, FORMAT, BLOCK)
            elif NM == NM_GIVEN:
                b_nm = tl.load(p_nm_from + o_row, mask=m_row, other=0)
            else:
                b_nm = pack(every_key >= 0)
            if WRITE_NM:
                tl.store(p_nm_row + o_row, b_nm, mask=m_row)
            add_scores(
                p_table, p_record, first, p_sums, every_key, sure, unpack(b_nm), FORMAT, BLOCK
            )
    if FINAL == 0:
        tl.atomic_add(p_state + S_ABOVE, tl.sum(n_above, axis=0), sem="relaxed")


# Scores of given masks: the sums that `sweep` makes on its way, for the op channel_scores.
@triton.jit
def sum_channels(
    p_table, p_map, p_row, p_nm_row, p_sums, FORMAT: tl.constexpr, BLOCK: tl.constexpr
):
    for tile in range(tl.program_id(0), tl.load(p_table + TILES), tl.num_programs(0)):
        p_record, first = tile_record(p_table, p_map, tile, BLOCK)
        keys = load_keys(p_record, first, FORMAT, BLOCK)
        o_row, m_row = row_words(p_record, first, BLOCK)
        on = unpack(tl.load(p_row + o_row, mask=m_row, other=0)) & (keys >= 0)
        on_nm = unpack(tl.load(p_nm_row + o_row, mask=m_row, other=0))
        add_scores(p_table, p_record, first, p_sums, keys, on, on_nm, FORMAT, BLOCK)
