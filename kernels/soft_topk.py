"""The soft top-k: masks sigmoid(beta (v / c - threshold) + shift) that cost a budget.

    start   one program: a first root from a sample of the values
    sweep   a read of all values: sums of the mask and of its derivatives at one point of the
            search, or at many points where Newton's method is lost
    masks   one read, one write

Every program of a sweep adds up the parts of the sums of the sweep before, in their order, and
makes the same step from them: a step is one launch, without atomics, fences or a wait of the host.
A sweep that the search does not need returns at once, so that the number of launches is fixed and a
graph can capture it.

Floor for n fp32 values: 4 n bytes per sweep, 8 n for the masks. A sample of 8192 leaves 2 or 3
sweeps: 25e6 values should take (3 * 100 + 200) MB / 4 TB/s = 125 us on an H200, and 20 idle
launches 2 us each. To be measured. Costs per value double the reads, and one more reads them alone.

Rounding: masks are written by the arithmetic that the sweeps sum, so that the budget holds however
exp2 rounds. 4 or 8 neighbours are added in fp32, off by 1e-7 at most, all else in fp64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .soft_root import FLAT, INFINITE, LARGEST, logit_error, moved, narrowed, newton, trial
from .soft_tiles import (
    BETA,
    BUDGET,
    COST,
    COUNT,
    ELEMENTS,
    FIELDS,
    HEADER,
    LOG2E,
    RESULT,
    START,
    TENSORS,
    VALUE,
    line_of,
    odds,
    offsets,
    own_tiles,
    part_sums,
    read,
    stretch,
    tensor_of,
    tile_at,
    write,
)

POINTS = 15  # of a sweep of many points: 4 bits of the threshold
BLOCK = 2048  # elements of a tile: 8 per thread
WARPS = 8
SAMPLES, SAMPLE = 8192, 512  # in all, and by one program

# The state of a search, float64. Where the budget is above half of the costs, what is left is
# solved for, with other signs of beta and the shift: the smaller share has more digits.
STATE = tl.constexpr(16)
THRESHOLD, SHIFT, LOW, HIGH = (tl.constexpr(i) for i in range(4))  # a point and its bracket
LAST, BEFORE = tl.constexpr(4), tl.constexpr(5)  # sizes of the last two steps
REACH = tl.constexpr(6)  # of the first step where the bracket is open
LOST, DONE = tl.constexpr(7), tl.constexpr(8)  # flags
TARGET, TOTAL = tl.constexpr(9), tl.constexpr(10)  # of the costs
STEEP, SIGN = tl.constexpr(11), tl.constexpr(12)  # SIGN * beta

SUMS = tl.constexpr(3)  # of a point: the mask, its slope by the shift, and its curvature

# ---- the search ----------------------------------------------------------------------------------


# costs (tiles)  -->  parts of their sum
@triton.jit
def sum_costs(
    p_table, p_single, p_parts, COSTS: tl.constexpr, GROUP: tl.constexpr, LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tile, last, index = own_tiles(p_table, LISTED)
    o = offsets(BLOCK, GROUP)
    total = tl.zeros((BLOCK // GROUP,), tl.float64)
    while tile < last:
        p_record, begin, end, count = stretch(p_table, index, tile, last)
        p_cost = tl.multiple_of(tl.load(p_record + COST).to(tl.pointer_type(COSTS)), 16)
        for i_tile in range(begin, end):
            first, m, whole = tile_at(i_tile, count, o, BLOCK)
            each = read(p_cost + first + o, m, whole, 3).to(tl.float64)
            total += tl.sum(tl.where(m, each, 0.0), axis=1)
        tile += end - begin
        index += 1
    tl.store(p_parts + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def sampled_sums(ratio, cost, threshold, shift, steep):
    power = (((ratio.to(tl.float64) - threshold) * steep + shift) * -LOG2E).to(tl.float32)
    odd = tl.exp2(tl.where(power < 126.0, power, 126.0))
    kept = 1.0 / (1.0 + odd)
    left = odd * kept
    spent = kept * cost  # 0 where there is no sample
    q = spent * left
    mass, slope = tl.sum(spent, axis=0), tl.sum(q, axis=0)
    bend = tl.sum(q * (left - kept), axis=0)
    return mass.to(tl.float64), slope.to(tl.float64), bend.to(tl.float64)


# One value out of each of SAMPLES stretches of the elements, at a place drawn by a hash (a stride
# could follow one column); or all of them  -->  v / c, c.  32 bytes are read for each.
@triton.jit
def sample(
    p_table, p_single, p_ratios, p_sampled, KIND: tl.constexpr, SOURCE: tl.constexpr,
    COSTS: tl.constexpr, EACH: tl.constexpr, LISTED: tl.constexpr, SAMPLES: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    elements = tl.load(p_table + ELEMENTS)
    samples = tl.minimum(elements, SAMPLES)
    i_sample = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    on = i_sample < samples
    begin = i_sample.to(tl.int64) * elements // samples
    end = (i_sample + 1).to(tl.int64) * elements // samples
    mixed = i_sample.to(tl.uint32) * 0x9E3779B1
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77
    place = begin + (mixed >> 8).to(tl.int64) % tl.maximum(end - begin, 1)
    place = tl.where(on, place, 0)
    index = tensor_of(p_table, place, START, LISTED)
    p_record = p_table + HEADER + index * FIELDS
    place -= tl.load(p_record + START)
    p_value = tl.load(p_record + VALUE).to(tl.pointer_type(SOURCE))
    value = read(p_value + place, on, False, KIND).to(tl.float64)
    value = tl.where(value < LARGEST, tl.maximum(value, -LARGEST), LARGEST)
    if EACH:
        p_cost = tl.load(p_record + COST).to(tl.pointer_type(COSTS))
        cost = tl.load(p_cost + place, mask=on, other=1).to(tl.float64)
    else:
        cost = tl.load(p_single + index)
    tl.store(p_ratios + i_sample, tl.where(on, value / cost, 0.0).to(tl.float32))
    tl.store(p_sampled + i_sample, tl.where(on, cost, 0.0).to(tl.float32))


@triton.jit
def at_sample(ratio, cost, threshold, shift, low, high, steep):
    """The sampled value in the bracket that is nearest to a point, or the point itself.

    Many equal values need a threshold that equals them: no other leaves the shift its digits.
    """
    exact, sharp = ratio.to(tl.float64), tl.abs(steep) > FLAT
    by = (threshold - exact) * steep
    away = tl.abs(exact - (threshold - shift / tl.where(sharp, steep, 1.0)))
    away = tl.where((cost > 0) & (by > low) & (by < high), away, INFINITE)
    nearest = tl.min(away, axis=0)
    value = tl.max(tl.where(away == nearest, exact, -LARGEST), axis=0)
    found = (nearest < INFINITE) & sharp
    by = steep * tl.where(found, value - threshold, 0.0)
    threshold = tl.where(found, value, threshold)
    return threshold, tl.where(found, 0.0, shift), low + by, high + by


# The first state, by one program: Newton's method on a sample in registers. 0.5 us a step, 5 steps
# where the mask is soft; up to 200 in the hardest case.
@triton.jit
def start(
    p_table, p_single, p_parts, p_ratios, p_sampled, p_given, p_state, programs,
    EACH: tl.constexpr, GIVEN: tl.constexpr, LISTED: tl.constexpr, SLOTS: tl.constexpr,
    SAMPLES: tl.constexpr,
):  # fmt: skip
    budget = tl.load(p_table + BUDGET).to(tl.float64, bitcast=True)
    beta = tl.load(p_table + BETA).to(tl.float64, bitcast=True)
    if EACH:
        o_part = tl.arange(0, SLOTS)
        total = tl.sum(tl.load(p_parts + o_part, mask=o_part < programs, other=0.0), axis=0)
    else:
        o = tl.arange(0, LISTED)
        on = o < tl.load(p_table + TENSORS)
        counts = tl.load(p_table + HEADER + o * FIELDS + COUNT, mask=on, other=0)
        costs = tl.load(p_single + o, mask=on, other=0.0)
        total = tl.sum(counts.to(tl.float64) * costs, axis=0)
    sign = tl.where(budget > total / 2, -1.0, 1.0).to(tl.float64)
    target = tl.where(budget > total / 2, total - budget, budget)
    done = tl.where((budget > 0) & (total > budget), 0.0, 1.0).to(tl.float64)
    target = tl.where(done != 0, total / 2, tl.maximum(target, 1e-16 * total))
    steep = sign * beta
    i_sample = tl.arange(0, SAMPLES)
    ratio, cost = tl.load(p_ratios + i_sample), tl.load(p_sampled + i_sample)
    samples = tl.minimum(tl.load(p_table + ELEMENTS), SAMPLES).to(tl.float64)
    sampled = tl.sum(cost, axis=0).to(tl.float64)
    wanted = target / total * sampled
    reach, lost = steep * 0 + INFINITE, steep * 0
    last, before, step = reach, reach, 0
    mean = tl.sum(ratio, axis=0).to(tl.float64) / samples
    threshold, shift, low, high = at_sample(ratio, cost, mean, lost, -reach, reach, steep)
    apart = tl.where(cost > 0, ratio - threshold.to(tl.float32), 0.0)
    spread = tl.sum(tl.abs(apart), axis=0).to(tl.float64) / samples
    shift = tl.where(beta * spread < 30.0, tl.log(target) - tl.log(total - target), 0.0)
    most = steep * tl.max(apart, axis=0).to(tl.float64)
    least = steep * tl.min(apart, axis=0).to(tl.float64)
    low = -1.00001 * tl.maximum(most, least) - 50.0
    high = 50.0 - 1.00001 * tl.minimum(most, least)
    found = done
    while (found == 0) & (step < 200):
        if lost != 0:
            shift = trial(tl.full((), 0, tl.int32), threshold, low, high, reach, steep, 1)
            threshold, shift, low, high = at_sample(ratio, cost, threshold, shift, low, high, steep)
            last, before = steep * 0 + INFINITE, steep * 0 + INFINITE
        mass, slope, bend = sampled_sums(ratio, cost, threshold, shift, steep)
        threshold, shift, low, high, last, before, lost, found = newton(
            threshold, shift, low, high, last, before, reach, mass, slope, bend, wanted, sampled,
            sampled / samples, steep, 1e-3, 1e-2,
        )  # fmt: skip
        step += 1
    noise = tl.sqrt(total / (target * samples))  # of the logit of the sample's mask
    if GIVEN:  # near enough, it is better than a sample
        at, by = tl.load(p_given), sign * tl.load(p_given + 1)
        mass, _, _ = sampled_sums(ratio, cost, at, by, steep)
        error, _ = logit_error(mass, wanted, sampled)
        usable = (tl.abs(at) < INFINITE) & (tl.abs(by) < INFINITE)
        usable = usable & (tl.abs(error) < 4 * noise + 0.05)
        threshold, shift = tl.where(usable, at, threshold), tl.where(usable, by, shift)
    tl.store(p_state + THRESHOLD, threshold)
    tl.store(p_state + SHIFT, tl.where(done != 0, -INFINITE, shift))
    tl.store(p_state + LOW, -INFINITE)
    tl.store(p_state + HIGH, INFINITE)
    tl.store(p_state + LAST, INFINITE)
    tl.store(p_state + BEFORE, INFINITE)
    tl.store(p_state + REACH, tl.maximum(2 * beta * spread * noise, 4.0))
    tl.store(p_state + LOST, 0.0)
    tl.store(p_state + DONE, done)
    tl.store(p_state + TARGET, target)
    tl.store(p_state + TOTAL, total)
    tl.store(p_state + STEEP, steep)
    tl.store(p_state + SIGN, sign)


@triton.jit
def settled(
    p_table, p_state, p_parts, programs, POINTS: tl.constexpr, SLOTS: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """The search after the sweep of POINTS points (0: none yet) that the state was made for.

    Returns:
        (threshold, shift, low, high, last, before, reach, lost, done)
    """
    threshold, shift = tl.load(p_state + THRESHOLD), tl.load(p_state + SHIFT)
    low, high, reach = tl.load(p_state + LOW), tl.load(p_state + HIGH), tl.load(p_state + REACH)
    last, before = tl.load(p_state + LAST), tl.load(p_state + BEFORE)
    lost, done = tl.load(p_state + LOST), tl.load(p_state + DONE)
    target, total, steep = (
        tl.load(p_state + TARGET), tl.load(p_state + TOTAL), tl.load(p_state + STEEP),
    )  # fmt: skip
    close: tl.constexpr = 1e-13 if KIND == 3 else 1e-7
    if POINTS == 1:
        if (done == 0) & (lost == 0):
            mass = part_sums(p_parts, programs, 0, SLOTS)
            slope = part_sums(p_parts, programs, 1, SLOTS)
            bend = part_sums(p_parts, programs, 2, SLOTS)
            mean = total / tl.load(p_table + ELEMENTS).to(tl.float64)
            threshold, shift, low, high, last, before, lost, done = newton(
                threshold, shift, low, high, last, before, reach, mass, slope, bend, target, total,
                mean, steep, close, 1e-5 if KIND == 3 else 5e-4,
            )  # fmt: skip
    elif POINTS > 1:
        if (done == 0) & (lost != 0):
            o_point, o_part = tl.arange(0, POINTS + 1), tl.arange(0, SLOTS)
            on = (o_point < POINTS)[:, None] & (o_part < programs)[None, :]
            parts = p_parts + o_point[:, None] * (SUMS * SLOTS) + o_part[None, :]
            mass = tl.sum(tl.load(parts, mask=on, other=0.0), axis=1)
            point = trial(o_point, threshold, low, high, reach, steep, POINTS)
            below = (o_point < POINTS) & (mass < target)
            above = (o_point < POINTS) & (mass > target)
            hit = (o_point < POINTS) & (tl.abs(mass - target) <= close * target)
            best = tl.max(tl.where(hit, point, -INFINITE), axis=0)
            low = tl.maximum(low, tl.max(tl.where(below, point, -INFINITE), axis=0))
            high = tl.minimum(high, tl.min(tl.where(above, point, INFINITE), axis=0))
            if best > -INFINITE:
                done = done * 0 + 1
                threshold, shift, low, high = moved(threshold, best, low, high, steep)
            else:
                threshold, shift, low, high, reach, lost = narrowed(
                    threshold, low, high, reach, steep, POINTS
                )
                last, before = reach * 0 + INFINITE, reach * 0 + INFINITE
    return threshold, shift, low, high, last, before, reach, lost, done


# values (tiles)  -->  parts of the sums at a point, or at each of POINTS points
@triton.jit
def sweep(
    p_table, p_single, p_state, p_parts, p_next, p_next_parts, programs, KIND: tl.constexpr,
    SOURCE: tl.constexpr, COSTS: tl.constexpr, EACH: tl.constexpr, GROUP: tl.constexpr,
    LISTED: tl.constexpr, SLOTS: tl.constexpr, OLD_POINTS: tl.constexpr, POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_program, i_point = tl.program_id(0), tl.program_id(1)
    threshold, shift, low, high, last_step, before, reach, lost, done = settled(
        p_table, p_state, p_parts, programs, OLD_POINTS, SLOTS, KIND
    )
    steep = tl.load(p_state + STEEP)
    if i_program + i_point == 0:
        o_state = tl.arange(0, STATE)
        tl.store(p_next + o_state, tl.load(p_state + o_state), mask=o_state > DONE)
        tl.store(p_next + THRESHOLD, threshold)
        tl.store(p_next + SHIFT, shift)
        tl.store(p_next + LOW, low)
        tl.store(p_next + HIGH, high)
        tl.store(p_next + LAST, last_step)
        tl.store(p_next + BEFORE, before)
        tl.store(p_next + REACH, reach)
        tl.store(p_next + LOST, lost)
        tl.store(p_next + DONE, done)
    if (done == 0) & ((lost != 0) == (POINTS > 1)):
        if POINTS > 1:
            shift = trial(i_point, threshold, low, high, reach, steep, POINTS)
            threshold, shift, low, high = moved(threshold, shift, low, high, steep)
        mass = tl.zeros((BLOCK // GROUP,), tl.float64)
        slope = tl.zeros((BLOCK // GROUP,), tl.float64 if KIND == 3 else tl.float32)
        bend = slope
        COST_KIND: tl.constexpr = 3 if KIND == 3 else 0
        o = offsets(BLOCK, GROUP)
        cost = steep * 0 + 1
        tile, last, index = own_tiles(p_table, LISTED)
        while tile < last:
            p_record, begin, end, count = stretch(p_table, index, tile, last)
            p_value = tl.multiple_of(tl.load(p_record + VALUE).to(tl.pointer_type(SOURCE)), 16)
            p_cost = tl.multiple_of(tl.load(p_record + COST).to(tl.pointer_type(COSTS)), 16)
            if not EACH:
                cost = tl.load(p_single + index)
            weight = cost.to(slope.dtype)
            near, slant, offset, factor = line_of(threshold, shift, steep, cost, KIND, EACH)
            for i_tile in range(begin, end):
                first, m, whole = tile_at(i_tile, count, o, BLOCK)
                value = read(p_value + first + o, m, whole, KIND)
                each = read(p_cost + first + o, m, whole, COST_KIND) if EACH else value
                odd = odds(value, each, near, slant, offset, factor, KIND, EACH)
                kept = 1.0 / (1.0 + odd)
                spent = tl.where(m, kept * each if EACH else kept, 0.0)
                mass += tl.sum(spent, axis=1).to(tl.float64) * cost
                if POINTS == 1:
                    left = odd * kept
                    q = spent * left
                    slope += tl.sum(q, axis=1) * weight
                    bend += tl.sum(q * (left - kept), axis=1) * weight
            tile += end - begin
            index += 1
        p_sum = p_next_parts + i_point * (SUMS * SLOTS) + i_program
        tl.store(p_sum, tl.sum(mass, axis=0))
        if POINTS == 1:
            tl.store(p_sum + SLOTS, tl.sum(slope.to(tl.float64), axis=0))
            tl.store(p_sum + 2 * SLOTS, tl.sum(bend.to(tl.float64), axis=0))


# values (tiles)  -->  masks, root
@triton.jit
def masks(
    p_table, p_single, p_state, p_parts, p_root, programs, KIND: tl.constexpr,
    SOURCE: tl.constexpr, COSTS: tl.constexpr, EACH: tl.constexpr, GROUP: tl.constexpr,
    LISTED: tl.constexpr, SLOTS: tl.constexpr, OLD_POINTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    threshold, shift, low, high, _, _, _, _, _ = settled(
        p_table, p_state, p_parts, programs, OLD_POINTS, SLOTS, KIND
    )
    steep, sign = tl.load(p_state + STEEP), tl.load(p_state + SIGN)
    hard = tl.abs(shift) == INFINITE
    at = tl.where(hard, 0.0, shift)
    if tl.program_id(0) == 0:  # the root with all of the shift in the threshold, if there is one
        to, by, low, high = moved(threshold, at, low, high, steep)
        flat = hard | (tl.abs(steep) <= FLAT)
        by = tl.where(hard, shift, tl.where(flat, shift - steep * threshold, by))
        tl.store(p_root, tl.where(flat, 0.0, to))
        tl.store(p_root + 1, sign * by)
    most: tl.constexpr = 1e300 if KIND == 3 else 8e37
    COST_KIND: tl.constexpr = 3 if KIND == 3 else 0
    o = offsets(BLOCK, GROUP)
    cost = steep * 0 + 1
    tile, last, index = own_tiles(p_table, LISTED)
    while tile < last:
        p_record, begin, end, count = stretch(p_table, index, tile, last)
        p_value = tl.multiple_of(tl.load(p_record + VALUE).to(tl.pointer_type(SOURCE)), 16)
        p_cost = tl.multiple_of(tl.load(p_record + COST).to(tl.pointer_type(COSTS)), 16)
        p_mask = tl.multiple_of(tl.load(p_record + RESULT).to(tl.pointer_type(COSTS)), 16)
        if not EACH:
            cost = tl.load(p_single + index)
        near, slant, offset, factor = line_of(
            threshold, sign * at, sign * steep, cost, KIND, EACH
        )  # fmt: skip
        for i_tile in range(begin, end):
            first, m, whole = tile_at(i_tile, count, o, BLOCK)
            value = read(p_value + first + o, m, whole, KIND)
            each = read(p_cost + first + o, m, whole, COST_KIND) if EACH else value
            odd = odds(value, each, near, slant, offset, factor, KIND, EACH)
            mask = tl.where(odd < most, 1.0 / (1.0 + odd), 0.0)
            mask = tl.where(hard, (sign * shift > 0).to(mask.dtype), mask)
            write(p_mask + first + o, mask, m, whole)
        tile += end - begin
        index += 1
