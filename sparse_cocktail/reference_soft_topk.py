"""The soft top-k mask of Spartan in plain PyTorch: definition, oracle of the tests, and fallback.

Values v and positive costs c of all tensors together, a budget k and a sharpness beta give

    m_i = sigmoid(beta (v_i / c_i - threshold) + shift)     with     sum_i c_i m_i = k

(Tai et al., 2022, "Spartan: Differentiable Sparsity via Regularized Transportation": the fixed
point of their two dual variables is the root of this one equation). Threshold and shift are one
unknown written as two numbers, so that neither loses digits when beta is large: the *root*.

Values beyond 2^100 count as 2^100, and so does NaN, which ranks on top as in every other mask.

Nothing here checks its input but the sum of the costs: `ops` does, once for all backends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = 2.0**100  # about 1.3e30, exact in every dtype but float16
SLACK = 1e-6  # of the budget: what rounding may put it above the sum of the costs
STEPS = 100  # a bracket 1e12 wide takes 13 to find and 70 to halve to 1e-9
REACH = 8.0  # of the first step into the open
FLAT = 1e-6  # below this sharpness the threshold would leave the range of numbers
CONVERGED = 1e-7  # Newton's last step: the root is off by less than its square


def mask_dtype(dtype: torch.dtype) -> torch.dtype:
    """Masks of 16-bit values are float32: in 16 bits they could not meet a budget."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


def _flat_costs(values: Sequence[Tensor], costs: Sequence[Tensor] | None) -> Tensor:
    """One cost per value, or a single one for all of them where none are given."""
    if costs is None:
        return values[0].new_ones(1, dtype=torch.float64)
    pairs = zip(values, costs, strict=True)
    return _flat([(c if c.shape == v.shape else c.reshape(())).expand_as(v) for v, c in pairs])


def check_total(costs: Tensor, total: Tensor, budget: float) -> None:
    """Refuse costs and budgets that need a look at the data (waits for the device)."""
    if not bool((costs > 0).all() & costs.isfinite().all()):
        raise ValueError(
            "soft_topk: costs have entries that are not positive and finite; leave values without "
            "a cost out of the selection"
        )
    if budget > float(total) * (1 + SLACK):
        raise ValueError(
            f"soft_topk: budget={budget:.9g} is above {float(total):.9g}, the sum of the costs; "
            "give a share of that sum"
        )


def find_root(
    ratios: Tensor, costs: Tensor, budget: float, beta: float, start: Tensor | None = None
) -> Tensor:
    """(threshold, shift), float64 (2,): safeguarded Newton in a fixed number of steps.

    Newton's method runs on logit(spent / total) - logit(budget / total), which is linear in the
    shift where the mask is flat and rises at most as fast as the shift everywhere. A step that
    leaves the bracket, or shrinks too slowly, is replaced by a bisection, or by ever longer steps
    while one end of the bracket is open. It starts at the median.

    Args:
        ratios: v / c, float64 (n,); n >= 1.
        costs: float64 (n,), or (1,) for all.
        budget: strictly between 0 and the sum of the costs.
    """
    total = costs.expand_as(ratios).sum()
    goal = math.log(budget) - (total - budget).clamp(min=1e-16 * total).log()
    threshold, shift = ratios.median(), goal
    if start is not None:
        usable = start.isfinite().all()
        threshold = torch.where(usable, start[0], threshold)
        shift = torch.where(usable, start[1], shift)
    high = last = before = torch.full_like(total, math.inf)
    low, reach = -high, torch.full_like(total, REACH)
    done = torch.zeros_like(total, dtype=torch.bool)
    for _ in range(STEPS):
        if beta > FLAT:  # a shift of 0 keeps its digits
            moved = threshold - shift / beta
            by = beta * (moved - threshold)
            threshold, shift, low, high = moved, shift + by, low + by, high + by
        x = beta * (ratios - threshold) + shift
        kept, left = x.sigmoid(), (-x).sigmoid()
        spent, unspent = (costs * kept).sum(), (costs * left).sum()
        slope = (costs * kept * left).sum()
        error = spent.log() - unspent.log() - goal
        low, high = torch.where(error < 0, shift, low), torch.where(error > 0, shift, high)
        newton = -error * (spent / total) * (unspent / slope)
        inside = (shift + newton > low) & (shift + newton < high)
        closed = low.isfinite() & high.isfinite()
        good = inside & (2 * newton.abs() <= before.abs()) & (closed | (newton.abs() <= reach))
        search = torch.where(error < 0, reach, -reach)
        step = torch.where(good, newton, torch.where(closed, (low + high) / 2 - shift, search))
        step = torch.where(done | (error == 0), 0, step)
        reach = torch.where(good | closed, reach, REACH * reach)
        last, before = step, last
        shift = shift + step
        done = done | (step.abs() < CONVERGED)
        # On the CPU the steps that change nothing are left out; elsewhere asking means waiting.
        if done.device.type == "cpu" and done:
            break
    final = threshold - shift / beta if beta > FLAT else torch.zeros_like(threshold)
    return torch.stack([final, shift + beta * (final - threshold)])


def soft_topk_multi(
    values: Sequence[Tensor],
    costs: Sequence[Tensor] | None,
    budget: float,
    beta: float,
    start: Tensor | None = None,
) -> list[Tensor]:
    """The masks, and the root after them."""
    if sum(v.numel() for v in values) == 0:
        device = values[0].device if values else None
        empty = torch.zeros(2, dtype=torch.float64, device=device)
        return [*(torch.empty_like(v, dtype=mask_dtype(v.dtype)) for v in values), empty]
    flat = _flat(values).nan_to_num(LARGEST).clamp(-LARGEST, LARGEST)
    flat_costs = _flat_costs(values, costs)
    total = flat_costs.expand_as(flat).sum()
    if costs is not None and total.device.type == "cpu":
        check_total(flat_costs, total, budget)
    ratios = flat / flat_costs
    if budget == 0:
        root = total.new_tensor([0, -math.inf])
    else:
        found = find_root(ratios, flat_costs, budget, beta, start)
        root = torch.where(total > budget, found, total.new_tensor([0, math.inf]))
    mask = (beta * (ratios - root[0]) + root[1]).sigmoid()
    masks = []
    for value, part in zip(values, mask.split([v.numel() for v in values]), strict=True):
        new = torch.empty_like(value, dtype=mask_dtype(value.dtype))
        masks.append(new.copy_(part.view(value.shape)))
    return [*masks, root]


def soft_topk_grad(
    grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    costs: Sequence[Tensor] | None,
    beta: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of the values: those of the masks, less what the budget takes back.

    With q = m (1 - m):  beta q_i (g_i / c_i - sum_j g_j q_j / sum_j c_j q_j). Differentiable.
    """
    if not masks:
        return []
    exact = torch.float64
    costs = [m.new_ones(()) for m in masks] if costs is None else costs
    costs = [
        (c if c.shape == m.shape else c.reshape(())).detach().to(exact)
        for c, m in zip(costs, masks, strict=True)
    ]
    grads = [g.to(exact) for g in grads]
    slopes = [m.to(exact) * (1 - m.to(exact)) for m in masks]
    earned = torch.stack([(g * q).sum() for g, q in zip(grads, slopes, strict=True)]).sum()
    spent = torch.stack([(c * q).sum() for c, q in zip(costs, slopes, strict=True)]).sum()
    price = earned / spent.clamp(min=torch.finfo(exact).tiny)  # a hard mask has no slope at all
    results = []
    for g, q, c, m in zip(grads, slopes, costs, masks, strict=True):
        new = (beta * q * (g / c - price)).to(dtype)
        results.append(new if new.stride() == m.stride() else torch.empty_like(m).copy_(new))
    return results
