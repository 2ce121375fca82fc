"""Scores of channels and blocks, and the choice of channels."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    ADDRESS,
    CHANNEL_SPLIT,
    CHANNELS,
    FIELDS,
    FIRST_CHANNEL,
    FIRST_CHANNEL_BLOCK,
    FIRST_WORD,
    HEADER,
    IN,
    LOW_PART,
    OUT,
    S_MISS,
    STRIDE_IN,
    STRIDE_OUT,
    STRIDE_TAP,
    TAPS,
    WORDS_PER_ROW,
    fixed_point,
    key_of,
    raw_pointer,
)

LARGEST = tl.constexpr(2**63 - 1)
HIGH_LIMIT = tl.constexpr(2**23)  # 2^63 in units of 2^40


@triton.jit
def saturate(low, high):
    """2^40 high + low, at most 2^63 - 1."""
    high += low >> CHANNEL_SPLIT
    low &= LOW_PART
    return tl.where(high < HIGH_LIMIT, (high << CHANNEL_SPLIT) | low, LARGEST)


@triton.jit
def scaled(value, FACTOR: tl.constexpr):
    if FACTOR == 0:
        return value * 0
    else:
        return tl.where(value <= LARGEST // FACTOR, value * FACTOR, LARGEST)


# sums [u low, u high, nm low, nm high][channel]  -->  scores (channels,) = PART_U u + PART_NM nm
@triton.jit
def combine_scores(
    p_table, p_state, p_sums, p_scores,
    PART_U: tl.constexpr, PART_NM: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    channels = tl.load(p_table + CHANNELS)
    if tl.load(p_state + S_MISS) != 0:  # then the sums of the final sweep count
        p_sums += 4 * channels
    o_channel = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    m_channel = o_channel < channels
    p_sum = p_sums + o_channel
    u_low = tl.load(p_sum, mask=m_channel, other=0)
    u_high = tl.load(p_sum + channels, mask=m_channel, other=0)
    nm_low = tl.load(p_sum + 2 * channels, mask=m_channel, other=0)
    nm_high = tl.load(p_sum + 3 * channels, mask=m_channel, other=0)
    total = scaled(saturate(u_low, u_high), PART_U)
    total += scaled(saturate(nm_low, nm_high), PART_NM)
    total = tl.where(total < 0, LARGEST, total)  # two's complement wrapped: too big
    tl.store(p_scores + o_channel, total, mask=m_channel)


# scores (out,) of one weight  --[rank < keep]-->  whole rows of bits
# One program ranks CHANNELS_OF channels against all of their weight by counting, out^2 compares in
# all: 30 M for ResNet-50, a few microseconds, and no histogram to clear.
@triton.jit
def keep_channels(
    p_table, p_channel_map, p_scores, p_keep, p_row,
    CHANNELS_OF: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    i_block = tl.program_id(0)
    i_weight = tl.load(p_channel_map + i_block)
    p_record = p_table + HEADER + i_weight * FIELDS
    out = tl.load(p_record + OUT)
    o_mine = (i_block - tl.load(p_record + FIRST_CHANNEL_BLOCK)) * CHANNELS_OF
    o_mine += tl.arange(0, CHANNELS_OF)
    m_mine = o_mine < out
    p_score = p_scores + tl.load(p_record + FIRST_CHANNEL)
    mine = tl.load(p_score + o_mine, mask=m_mine, other=-1)
    rank = tl.zeros((CHANNELS_OF,), tl.int32)
    for start in range(0, out, CHUNK):
        o_other = start + tl.arange(0, CHUNK)
        other = tl.load(p_score + o_other, mask=o_other < out, other=-LARGEST - 1)
        beats = other[None, :] > mine[:, None]
        ties = (other[None, :] == mine[:, None]) & (o_other[None, :] < o_mine[:, None])
        rank += tl.sum((beats | ties).to(tl.int32), axis=1)
    kept = (mine >= 0) & (rank < tl.load(p_keep + i_weight))
    per_row, inputs = tl.load(p_record + WORDS_PER_ROW), tl.load(p_record + IN)
    per_channel = tl.load(p_record + TAPS) * per_row
    p_mine = p_row + tl.load(p_record + FIRST_WORD) + (o_mine * per_channel)[:, None]
    for start in range(0, per_channel, CHUNK):
        o_word = start + tl.arange(0, CHUNK)
        left = inputs - (o_word % tl.maximum(per_row, 1)) * 32
        low_bits = (1 << tl.minimum(left, 31).to(tl.int32)) - 1
        words = tl.where(left >= 32, -1, low_bits)
        b_words = tl.where(kept[:, None], words[None, :], 0)
        m_words = m_mine[:, None] & (o_word < per_channel)[None, :]
        tl.store(p_mine + o_word[None, :], b_words, mask=m_words)


# Fixed-point sums of |w| over blocks of rows x span x cols elements, numbered (out, tap, in) with
# the last fastest. A program takes BLOCKS of them, SIZE elements of each at a time.
@triton.jit
def block_scores(
    p_table, p_scores, blocks, rows, span, cols,
    FORMAT: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    p_record = p_table + HEADER
    taps, inputs = tl.load(p_record + TAPS), tl.load(p_record + IN)
    p_weight = raw_pointer(tl.load(p_record + ADDRESS), FORMAT)
    o_block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    per_row, per_out = inputs // cols, (inputs // cols) * (taps // span)
    start_out = (o_block // per_out) * rows
    start_tap = ((o_block % per_out) // per_row) * span
    start_in = (o_block % per_row) * cols
    low, high = tl.zeros((BLOCKS,), tl.int64), tl.zeros((BLOCKS,), tl.int64)
    per_block = rows * span * cols
    for start in range(0, per_block, SIZE):
        o_inside = start + tl.arange(0, SIZE).to(tl.int64)
        o_out = start_out[:, None] + (o_inside // (span * cols))[None, :]
        o_tap = start_tap[:, None] + ((o_inside // cols) % span)[None, :]
        o_in = start_in[:, None] + (o_inside % cols)[None, :]
        on = (o_block < blocks)[:, None] & (o_inside < per_block)[None, :]
        o_element = o_out * tl.load(p_record + STRIDE_OUT) + o_tap * tl.load(p_record + STRIDE_TAP)
        o_element += o_in * tl.load(p_record + STRIDE_IN)
        key = key_of(tl.load(p_weight + o_element, mask=on, other=0), FORMAT)
        value = tl.where(on, fixed_point(key, FORMAT), 0)
        low += tl.sum(value & LOW_PART, axis=1)
        high += tl.sum(value >> CHANNEL_SPLIT, axis=1)
    tl.store(p_scores + o_block, saturate(low, high), mask=o_block < blocks)
