"""The search for the root of the soft top-k's budget: one step of it, in float64 scalars.

The unknown is one shift of beta v / c, written as (threshold, shift): neither loses digits when
beta is large. Newton's method runs inside a bracket. Where it is lost, because the mask is hard and
no value lies within its reach, the bracket is narrowed by trial points, many at once in a sweep.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(2.0**100)  # infinity and NaN count as this much
FLAT = tl.constexpr(1e-6)  # below this sharpness thresholds would leave the range
NARROW = tl.constexpr(4.0)  # brackets that Newton's method can be left alone in
INFINITE = tl.constexpr(float("inf"))


@triton.jit
def moved(threshold, shift, low, high, steep):
    """The same point and bracket with the shift moved into the threshold, where there is one."""
    sharp = tl.abs(steep) > FLAT
    to = threshold - shift / tl.where(sharp, steep, 1.0)
    to = tl.where(sharp, tl.minimum(tl.maximum(to, -LARGEST), LARGEST), threshold)
    by = steep * (to - threshold)
    return to, shift + by, low + by, high + by


@triton.jit
def logit_error(mass, target, total):
    """(logit(mass / total) - logit(target / total), mass / total)."""
    share = tl.minimum(tl.maximum(mass / total, 1e-300), 1.0 - 1e-9)
    return tl.log(share) - tl.log(1.0 - share) - tl.log(target) + tl.log(total - target), share


@triton.jit
def newton(
    threshold, shift, low, high, last, before, reach, mass, slope, bend, target, total, mean,
    steep, close, converged,
):  # fmt: skip
    """The next point after one with these sums: Newton's step with the curvature (Halley's).

    It runs on the logit, which is linear in the shift where the mask is flat. The sums are smooth
    on the scale of 1 in the shift, so that small steps cube the error.

    Returns:
        (threshold, shift, low, high, last, before, lost, done)
    """
    error, share = logit_error(mass, target, total)
    low, high = tl.where(mass > target, low, shift), tl.where(mass > target, shift, high)
    scale = 1.0 / (total * share * (1.0 - share))
    rise = tl.maximum(slope * scale, 1e-300)
    curl = bend * scale - (1.0 - 2.0 * share) * rise * rise
    step = -error / rise
    curve = 1.0 + step * curl / (2.0 * rise)
    step = tl.where(curve > 0.5, step / tl.where(curve > 0.5, curve, 1.0), step)
    trusted = (shift + step > low) & (shift + step < high) & (2.0 * tl.abs(step) <= before)
    trusted = trusted & ((high - low < INFINITE) | (tl.abs(step) <= reach))
    # No element of a mask is further from its true value than all of them together.
    met = close * tl.where(trusted, tl.minimum(mean, target), target)
    hit = tl.abs(mass - target) <= met
    narrow = high - low <= NARROW
    lost = (trusted | narrow | hit) == 0
    step = tl.where(trusted, step, (low + high) / 2 - shift)
    step = tl.where(hit | lost, 0.0, step)
    done = hit | (trusted & (tl.abs(step) <= converged)) | (high - low < 1e-9)
    shift += step
    moves = tl.abs(shift) > 1.0  # a small shift keeps its digits
    to, new_shift, new_low, new_high = moved(threshold, shift, low, high, steep)
    threshold, shift = tl.where(moves, to, threshold), tl.where(moves, new_shift, shift)
    low, high = tl.where(moves, new_low, low), tl.where(moves, new_high, high)
    lost, done = lost.to(tl.float64), done.to(tl.float64)
    return threshold, shift, low, high, tl.abs(step), last, lost, done


@triton.jit
def key_of(x):
    """float64 as integers of the same order: half of a key halves the exponent first."""
    key = x.to(tl.int64, bitcast=True)
    return tl.where(key < 0, -(key & 0x7FFFFFFFFFFFFFFF), key)


@triton.jit
def number_of(key):
    size = tl.abs(key).to(tl.float64, bitcast=True)
    return tl.where(key < 0, -size, size)


@triton.jit
def trial(i_point, threshold, low, high, reach, steep, POINTS: tl.constexpr):
    """Shift of point `i_point` of POINTS in a bracket: at even distances by keys of thresholds, or
    by shifts where there are none in between; ever further out where the bracket is open."""
    far = reach * tl.exp2(3.0 * i_point.to(tl.float64))
    closed = high - low < INFINITE
    outer = tl.where(low > -INFINITE, low + far, high - far)
    left, right = tl.where(closed, low, 0.0), tl.where(closed, high, 1.0)
    sharp = tl.abs(steep) > FLAT
    by = tl.where(sharp, steep, 1.0)
    from_key, to_key = key_of(threshold - left / by), key_of(threshold - right / by)
    gap = to_key // (POINTS + 1) - from_key // (POINTS + 1)
    at = steep * (threshold - number_of(from_key + gap * (i_point + 1).to(tl.int64)))
    even = left + (right - left) * ((i_point + 1).to(tl.float64) / (POINTS + 1))
    at = tl.where(sharp, at, left)
    inner = tl.where((at > left) & (at < right), at, even)
    return tl.where(closed, inner, outer)


@triton.jit
def narrowed(threshold, low, high, reach, steep, POINTS: tl.constexpr):
    """After trials: the middle of the bracket as the next point, for Newton's method if narrow.

    Returns:
        (threshold, shift, low, high, reach, lost)
    """
    closed = high - low < INFINITE
    shift = tl.where(closed, (low + high) / 2, tl.where(low > -INFINITE, low, high))
    reach = tl.where(closed, reach, reach * 8.0**POINTS)
    lost = tl.where(high - low <= NARROW, 0.0, 1.0).to(tl.float64)
    threshold, shift, low, high = moved(threshold, shift, low, high, steep)
    return threshold, shift, low, high, reach, lost
