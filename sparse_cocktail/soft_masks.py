"""Soft masks over weights, blocks or channels under budgets of costs: Spartan's mathematics.

Tai et al., 2022, "Spartan: Differentiable Sparsity via Regularized Transportation". A *unit* is
kept or pruned as a whole. Its value is the sum of its |w|; its cost is its size, or its size times
the positions that it is computed at. Units rank by value / cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import mul

import torch
from torch import Tensor

from . import ops
from .allocation import layer_counts
from .patterns import Block, Channel, Pattern, Unstructured
from .reference import block_count, ones
from .schedules import keep_count, linear

__all__ = ["Budget", "SoftMasks", "block_of", "spread", "unit_values"]

Units = dict[int, Tensor]  # one tensor per weight that is pruned, by its place in the list

ROUNDING = 1e-12  # of a budget on its way down: less than a unit, more than float64 loses
FEW = 2**14  # values that are sorted rather than bisected further
TINY = 1e-24  # a scale for layers whose weights are all zero


def block_of(pattern: Pattern) -> tuple[int, int]:
    """Rows and columns of a pattern's units, as `ops.block_masks` takes them."""
    if isinstance(pattern, Unstructured):
        return 1, 1
    if isinstance(pattern, Channel):
        return 1, -1
    if isinstance(pattern, Block):
        return pattern.rows, pattern.cols
    raise TypeError(f"block_of: {pattern} has no blocks; take Unstructured, Channel or Block")


def _tiles(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, ...]:
    """A weight's shape as (out / rows, rows, in / cols, cols, taps / span, span)."""
    out, inputs, *taps = shape
    count = math.prod(taps)
    rows = out if block[0] == -1 else block[0]
    cols, span = (inputs, count) if block[1] == -1 else (block[1], 1)
    return out // rows, rows, inputs // cols, cols, count // span, span


def unit_values(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Sums of |w| over the units of a weight (out, in, *taps); differentiable.

    Shape (out / rows, in / cols, taps), or (out / rows, 1, 1) where cols is -1; single weights keep
    the weight's own. So units are laid out as a weight is, and ops take them for one.
    """
    values = weight.abs()
    return values if block == (1, 1) else values.reshape(_tiles(weight.shape, block)).sum((1, 3, 5))


def spread(units: Tensor, shape: Sequence[int], block: tuple[int, int]) -> Tensor:
    """A tensor of this shape in which every weight has the entry of its unit."""
    if block == (1, 1):
        return units
    return units[:, None, :, None, :, None].expand(_tiles(shape, block)).reshape(tuple(shape))


@dataclass
class Budget:
    """Weights whose units compete for one budget.

    Attributes:
        members: which weights of the list.
        costs: of one unit of each; whole numbers, so that their sums are exact.
        total: of all units.
        final: what the kept units may cost at the end.
        unit: weights per unit, on average.
        scale: costs per weight, on average. Divided by it, costs leave |w| on its own scale.
    """

    members: list[int]
    costs: list[int]
    total: int
    final: float
    unit: float
    scale: float
    _prices: list[Tensor] = field(default_factory=list, init=False, repr=False)

    @property
    def even(self) -> bool:
        """Whether all units cost the same."""
        return len(set(self.costs)) == 1

    def prices(self, device: torch.device) -> list[Tensor]:
        """The costs on the scale of |w|, float64 (1,) each, made once: many small tensors."""
        if not self._prices or self._prices[0].device != device:
            costs = torch.tensor(self.costs, dtype=torch.float64) / self.scale
            self._prices = list(costs.to(device).split(1))
        return self._prices

    def at(self, progress: float) -> float:
        """The budget while it falls from all to the final one."""
        return linear(self.total, self.final, progress)

    def units(self, progress: float) -> int | None:
        """How many units the budget pays for, the last one perhaps in part; None: it depends."""
        if not self.even:
            return None
        return -(-self._whole(progress) // self.costs[0])

    def _whole(self, progress: float) -> int:
        return math.ceil(self.at(progress) * (1 - ROUNDING))

    def affordable(self, values: Sequence[Tensor], progress: float) -> list[Tensor]:
        """Bits of the units of largest value / cost, until their costs first reach the budget.

        Of equal ones the first stay. Where units of several tensors differ in their costs, each
        step of a bisection waits for the device.
        """
        count = self.units(progress)
        if count is not None:
            return ops.topk_masks(values, count)
        ratios = [v / cost for v, cost in zip(values, self.costs, strict=True)]
        return [ops.pack_mask(m) for m in _until_paid(ratios, self.costs, self._whole(progress))]


def _until_paid(ratios: list[Tensor], costs: list[int], amount: int) -> list[Tensor]:
    """Bool masks of the largest ratios, until their costs first reach the amount.

    Ratios are 0 or more; costs are one number per tensor, so counts say what a threshold spends.
    Bisection leaves few to sort (11 million weights of ResNet-18, one thread: 7 s to sort all).
    """

    def spent(threshold: float) -> tuple[int, int]:
        counts = torch.stack([(r >= threshold).count_nonzero() for r in ratios]).tolist()
        return sum(map(mul, counts, costs)), sum(counts)

    low, high = 0.0, 2.0 * max(float(r.max()) for r in ratios) + TINY
    (_, many), (sure, few) = spent(low), spent(high)
    while many - few > FEW and low < (middle := (low + high) / 2) < high:
        money, count = spent(middle)
        if money < amount:
            high, sure, few = middle, money, count
        else:
            low, many = middle, count
    kept = [r >= high for r in ratios]
    between = [(r >= low) & ~k for r, k in zip(ratios, kept, strict=True)]
    some = [r[b] for r, b in zip(ratios, between, strict=True)]
    prices = [r.new_full(r.shape, c, dtype=torch.int64) for r, c in zip(some, costs, strict=True)]
    order = torch.cat(some).argsort(descending=True, stable=True)
    paid = torch.cat(prices)[order]
    chosen = torch.empty_like(paid, dtype=torch.bool)
    chosen[order] = sure + paid.cumsum(0) - paid < amount
    for k, b, part in zip(kept, between, chosen.split([len(r) for r in some]), strict=True):
        k[b] = part
    return kept


class SoftMasks:
    """The masks of one pattern over a list of weights, soft and hard.

    Progress runs from 0 to 1: budgets fall along a line from everything to their final size, and
    the sharpness rises along a line from 1 to `sharpness` * sqrt(weights per unit).

    Args:
        shapes: of the weights (out, in, *taps) to prune by their place in the list; the block
            divides them. The other weights pass as they are.
        block: rows and columns of a unit; -1 is the whole dimension, and for columns every tap too.
        density: share of the costs that stays.
        allocation: "global": all weights share one budget; "uniform", "erk": each has its own (see
            `layer_counts`).
        costs: of one weight of each layer, whole numbers; by default 1.
        normalise: divide values by the root mean square of their layer's weights.
        sharpness: at the end, for single weights.
    """

    def __init__(
        self,
        shapes: dict[int, Sequence[int]],
        block: tuple[int, int],
        density: float,
        allocation: str = "global",
        costs: dict[int, int] | None = None,
        normalise: bool = False,
        sharpness: float = 10.0,
    ) -> None:
        self.shapes, self.block, self.normalise = shapes, block, normalise
        self.sharpness = sharpness
        sizes = {i: math.prod(shape) for i, shape in shapes.items()}
        counts = {i: block_count(shape, block) for i, shape in shapes.items()}
        each = {i: n // counts[i] * (costs[i] if costs else 1) for i, n in sizes.items()}

        def budget(members: list[int], share: float) -> Budget:
            units, weights = (sum(numbers[i] for i in members) for numbers in (counts, sizes))
            total, own = sum(counts[i] * each[i] for i in members), [each[i] for i in members]
            final = share * total if len(set(own)) > 1 else keep_count(share, units) * own[0]
            return Budget(members, own, total, final, weights / units, total / weights)

        kept = layer_counts(list(shapes.values()), density, allocation)
        if isinstance(kept, int):
            self.budgets = [budget(list(shapes), density)]
        else:
            shares = zip(shapes, kept, strict=True)
            self.budgets = [budget([i], count / sizes[i]) for i, count in shares]

    def beta(self, budget: Budget, progress: float) -> float:
        """The sharpness in force; block values vary less, by the root of their size."""
        return linear(1.0, self.sharpness * math.sqrt(budget.unit), progress)

    def values(self, weights: Sequence[Tensor]) -> Units:
        """The values of all units; differentiable."""
        values = {i: unit_values(weights[i], self.block) for i in self.shapes}
        if not self.normalise:
            return values
        return {i: v / (weights[i].square().mean() + TINY).sqrt() for i, v in values.items()}

    def soft(
        self, values: Units, fall: float, rise: float, roots: Sequence[Tensor] = ()
    ) -> tuple[Units, list[Tensor]]:
        """Soft masks of units, and the roots to start from the next time, one per budget.

        Args:
            values: of `values`.
            fall, rise: progress of the budgets and of the sharpness.
            roots: of an earlier call; none for a cold start.
        """
        masks, found = {}, []
        for index, budget in enumerate(self.budgets):
            some = [values[i] for i in budget.members]
            device, scale, beta = some[0].device, budget.scale, self.beta(budget, rise)
            costs = None if budget.even else budget.prices(device)
            if budget.even:  # costs of 1 instead, which ops need not read, and another sharpness
                scale, beta = budget.costs[0], beta * scale / budget.costs[0]
            start, amount = roots[index].to(device) if roots else None, budget.at(fall) / scale
            made, root = ops.soft_topk_multi(some, costs, amount, beta, start, return_root=True)
            masks.update(zip(budget.members, made, strict=True))
            found.append(root.detach())
        return masks, found

    @torch.no_grad()
    def hard(self, values: Units, fall: float) -> Units:
        """Bits of the units that stay, laid out as the values are."""
        bits = {}
        for budget in self.budgets:
            some = [values[i].detach() for i in budget.members]
            bits.update(zip(budget.members, budget.affordable(some, fall), strict=True))
        return bits

    def weights(
        self,
        weights: Sequence[Tensor],
        fall: float,
        rise: float,
        roots: Sequence[Tensor] = (),
        bits: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The weights to compute with: w * soft mask, zero where the hard mask prunes.

        The gradient passes the zeros straight through, and is that of w * soft mask otherwise, the
        mask's own part included. Returns the weights, the hard mask's bits, and the roots; `bits`
        and `roots` of an earlier call on the same weights save most of the work.
        """
        values = self.values(weights)
        masks, roots = self.soft(values, fall, rise, roots)
        bits = self.bits(self.hard(values, fall), weights) if bits is None else bits
        made, some = self.products(weights, masks), list(self.shapes)
        zeroed = ops.masked_weights([made[i] for i in some], [bits[i] for i in some], None, True)
        for i, weight in zip(some, zeroed, strict=True):
            made[i] = weight
        return made, bits, roots

    @torch.no_grad()
    def freeze(
        self, weights: Sequence[Tensor], roots: Sequence[Tensor] = ()
    ) -> tuple[Units, list[Tensor]]:
        """At the end of both lines: soft masks of units, zero where pruned, and bits of weights."""
        values = self.values(weights)
        masks, _ = self.soft(values, 1.0, 1.0, roots)
        hard = self.hard(values, 1.0)
        kept = {i: ops.masked_weight(masks[i], bits) for i, bits in hard.items()}
        return kept, self.bits(hard, weights)

    def products(self, weights: Sequence[Tensor], masks: Units) -> list[Tensor]:
        """Weights times the entries of their units."""
        made = list(weights)
        for i, mask in masks.items():
            made[i] = weights[i] * spread(mask, self.shapes[i], self.block)
        return made

    def bits(self, hard: Units, weights: Sequence[Tensor]) -> list[Tensor]:
        """Bits of all weights from those of the units; what is not pruned keeps everything."""
        if self.block == (1, 1):
            return [hard[i] if i in hard else ones(w) for i, w in enumerate(weights)]
        made = [ones(w) if i not in hard else None for i, w in enumerate(weights)]
        for i, shape in self.shapes.items():
            rows, _, cols, _, taps, _ = _tiles(shape, self.block)
            kept = ops.unpack_mask(hard[i], (rows, cols, taps))
            made[i] = ops.pack_mask(spread(kept, shape, self.block))
        return made
