"""Correctness gates: a result is timed only when it is exactly what the op is defined to give.

`equals` compares with the reference's result. The other checks prove a result exact without it, in
portions, for tensors on which the reference takes too long or too much memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_cocktail import reference
from sparse_cocktail.reference import bits_shape, weight_view

from shapes import pieces  # isort: skip - a neighbour, not a package

__all__ = [
    "Verdict",
    "as_bits",
    "equals",
    "exact_nm",
    "exact_topk",
    "exact_unified",
    "proven",
    "same_values",
]


@dataclass(frozen=True)
class Verdict:
    """What a gate found: `error` counts wrong mask elements, or is the largest difference."""

    error: float
    bound: float = 0.0
    says: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # false for NaN


def _unpacked(bits: Tensor, inputs: int) -> Tensor:
    return reference._unpack_view(bits, inputs)


def as_bits(mask: Tensor) -> Tensor:
    """Mask bits of a bool mask in its weight's shape; bits stay as they are."""
    if mask.dtype != torch.bool:
        return mask
    return torch.cat([reference.pack_mask(mask[rows]) for rows in pieces(mask)])


def equals(expected: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Verdict]:
    """A gate that wants these bits, from bits or from bool masks."""
    unpacked: dict[int, Tensor] = {}  # of those that a bool mask was compared with

    def gate(result: Sequence[Tensor]) -> Verdict:
        if len(result) != len(expected):
            return Verdict(float("inf"), says=f"{len(result)} masks instead of {len(expected)}")
        wrong = 0
        for place, (got, want) in enumerate(zip(result, expected, strict=True)):
            shape = bits_shape(got.shape) if got.dtype == torch.bool else tuple(got.shape)
            if shape != tuple(want.shape):
                return Verdict(float("inf"), says=f"mask {place} is one of another shape")
            if got.dtype != torch.bool:
                wrong += int(reference.mask_count(got ^ want)) if not got.equal(want) else 0
                continue
            if place not in unpacked:
                unpacked[place] = reference.unpack_mask(want, got.shape)
            wrong += int((got != unpacked[place]).sum())
        return _wrong(wrong)

    return gate


def proven(check: Callable[[Sequence[Tensor]], Verdict]) -> Callable[[Sequence[Tensor]], Verdict]:
    """A gate that runs an exact check until one result passes; others must equal that one.

    There is only one exact result, so that this says the same for less work.
    """
    known: list[Callable[[Sequence[Tensor]], Verdict]] = []

    def gate(result: Sequence[Tensor]) -> Verdict:
        if known:
            return known[0](result)
        verdict = check(result)
        if verdict.ok:
            known.append(equals([as_bits(r).clone() for r in result]))
        return verdict

    return gate


def same_values(expected: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Verdict]:
    """A gate that wants these values, element by element."""

    def gate(result: Sequence[Tensor]) -> Verdict:
        error = 0.0
        for got, want in zip(result, expected, strict=True):
            if got.dtype != want.dtype or got.shape != want.shape:
                return Verdict(float("inf"), says=f"{got.dtype} of shape {tuple(got.shape)}")
            for rows in pieces(want):
                difference = (got[rows].double() - want[rows].double()).abs().max()
                error = max(error, float(torch.nan_to_num(difference, nan=float("inf"))))
        return Verdict(error, says="" if error == 0 else "values differ")

    return gate


def _wrong(count: int) -> Verdict:
    return Verdict(count, says="" if count == 0 else f"{count} wrong mask elements")


def _portions(weights: Sequence[Tensor], bits: Sequence[Tensor], within):
    """(keys, kept, eligible) of all weights in the documented order."""
    for i, (weight, words) in enumerate(zip(weights, bits, strict=True)):
        for rows in pieces(weight):
            keys = reference.key(weight_view(weight[rows]))
            kept = _unpacked(words[rows], weight.shape[1])
            allowed = None if within is None else _unpacked(within[i][rows], weight.shape[1])
            yield keys.flatten(), kept.flatten(), None if allowed is None else allowed.flatten()


def exact_topk(
    weights: Sequence[Tensor],
    result: Sequence[Tensor],
    keep: int,
    within: Sequence[Tensor] | None = None,
) -> Verdict:
    """The keep largest |w|: the count is exact, every kept key >= every pruned one, ties go low."""
    bits = [as_bits(r) for r in result]
    if [tuple(b.shape) for b in bits] != [bits_shape(w.shape) for w in weights]:
        return Verdict(float("inf"), says="masks of other shapes")
    count = eligible = outside = 0
    lowest, highest = torch.iinfo(torch.int64).max, -1  # key kept, key pruned
    for keys, kept, allowed in _portions(weights, bits, within):
        count += int(kept.sum())
        eligible += keys.numel() if allowed is None else int(allowed.sum())
        pruned = ~kept if allowed is None else ~kept & allowed
        outside += 0 if allowed is None else int((kept & ~allowed).sum())
        lowest = min(lowest, int(torch.where(kept, keys, torch.iinfo(keys.dtype).max).min()))
        highest = max(highest, int(torch.where(pruned, keys, -1).max()))
    wrong = outside + abs(count - min(keep, eligible))
    padding = sum(int(reference.mask_count(b)) for b in bits) - count
    wrong += padding
    if count and lowest < highest:
        for keys, kept, _ in _portions(weights, bits, within):
            wrong += int((kept & (keys < highest)).sum())
    elif count and lowest == highest:
        passed = False  # a tie was pruned: none may be kept from here on
        for keys, kept, allowed in _portions(weights, bits, within):
            tied = keys == highest if allowed is None else (keys == highest) & allowed
            chosen = kept[tied]
            late = chosen if passed else chosen & ((~chosen).cumsum(0) > 0)
            wrong += int(late.sum())
            passed = passed or bool((~chosen).any())
    return _wrong(wrong)


def _wrong_nm(weight: Tensor, bits: Tensor, n: int, m: int) -> int:
    """Elements whose mask is not that of their rank within the group of m."""
    wrong = 0
    for rows in pieces(weight):
        keys = reference.key(weight_view(weight[rows])).unflatten(-1, (-1, m))
        kept = _unpacked(bits[rows], weight.shape[1]).unflatten(-1, (-1, m))
        for i in range(m):
            rank = torch.zeros_like(keys[..., i])
            for j in range(m):
                if j != i:
                    other, own = keys[..., j], keys[..., i]
                    rank += (other >= own) if j < i else (other > own)
            wrong += int(((rank < n) != kept[..., i]).sum())
    return wrong


def exact_nm(weights: Sequence[Tensor], result: Sequence[Tensor], n: int, m: int) -> Verdict:
    """n of every m along `in`, by counting who is larger; other layers keep everything."""
    wrong = 0
    for weight, mask in zip(weights, result, strict=True):
        bits = as_bits(mask)
        if tuple(bits.shape) != bits_shape(weight.shape):
            return Verdict(float("inf"), says="masks of other shapes")
        if weight.shape[1] % m:
            wrong += int(reference.mask_count(bits ^ reference.ones(weight)))
            continue
        wrong += _wrong_nm(weight, bits, n, m)
        padding = int(reference.mask_count(bits)) - weight.numel() // m * n
        wrong += abs(padding)
    return _wrong(wrong)


def exact_unified(
    weights: Sequence[Tensor],
    result: Sequence[Tensor],
    keep: int,
    nm: tuple[int, int],
    channel_keep: Sequence[int],
    beta: float,
    within: Sequence[Tensor] | None = None,
) -> Verdict:
    """Both masks by the checks above, the channels from integer scores of those masks."""
    count = len(weights)
    if len(result) != 3 * count:
        return Verdict(float("inf"), says=f"{len(result)} masks instead of {3 * count}")
    bits = [as_bits(r) for r in result]
    unstructured, groups, channel = (bits[i * count : (i + 1) * count] for i in range(3))
    parts = [exact_topk(weights, unstructured, keep, within), exact_nm(weights, groups, *nm)]
    if all(part.ok for part in parts):
        scores = []
        for weight, mu, mn in zip(weights, unstructured, groups, strict=True):
            portions = [
                reference.channel_scores([weight[rows]], [mu[rows]], [mn[rows]], beta)[0]
                for rows in pieces(weight)
            ]
            scores.append(torch.cat(portions))
        wanted = reference.channel_masks(scores, channel_keep, [w.shape for w in weights])
        parts.append(equals(wanted)(channel))
    return _wrong(sum(part.error for part in parts))
