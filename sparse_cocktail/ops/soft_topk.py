"""The soft top-k mask of Spartan: differentiable, one sharpness, one budget of costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference_soft_topk as reference
from .checks import DTYPES, as_list, check_same_length
from .dispatch import define, gradient, lazy_triton

__all__ = ["soft_topk", "soft_topk_multi"]

_cpp = torch.ops.sparse_cocktail_cpp
MOST_BETA = 1e12  # values and the root would overflow float32 soon above


# ---- the op --------------------------------------------------------------------------------------


def _check_values(op: str, values: list[Tensor]) -> None:
    for index, value in enumerate(values):
        if value.dtype not in DTYPES:
            raise TypeError(
                f"{op}: values[{index}] has dtype {value.dtype}, which is not one of float32, "
                "bfloat16, float16, float64; convert it first"
            )
        for what in ("device", "dtype"):
            if getattr(value, what) != getattr(values[0], what):
                raise ValueError(
                    f"{op}: values[{index}] has {what} {getattr(value, what)}, but values[0] has "
                    f"{getattr(values[0], what)}; one call takes values of one {what}"
                )


def _check_costs(op: str, values: list[Tensor], costs: list[Tensor]) -> None:
    check_same_length(op, values, costs, "costs")
    for index, (value, cost) in enumerate(zip(values, costs, strict=True)):
        if cost.shape != value.shape and cost.numel() != 1:
            raise ValueError(
                f"{op}: costs[{index}] has shape {tuple(cost.shape)}, but its values have "
                f"{tuple(value.shape)}; give one cost per value, or one for the whole tensor"
            )
        if not cost.dtype.is_floating_point:
            raise TypeError(
                f"{op}: costs[{index}] has dtype {cost.dtype}, but costs are real numbers; use "
                "costs.float()"
            )
        if cost.device != value.device:
            raise ValueError(
                f"{op}: costs[{index}] is on {cost.device}, but its values are on {value.device}; "
                "move it"
            )


def _check(values, costs, budget, beta, start) -> None:
    op = "soft_topk"
    _check_values(op, values)
    if costs is not None:
        _check_costs(op, values, costs)
    total = sum(v.numel() for v in values)
    if not (0 <= budget < math.inf):
        raise ValueError(
            f"{op}: budget={budget} is not in [0, sum of the costs]; give a share of that sum, for "
            "example 0.1 * total"
        )
    if (costs is None or total == 0) and budget > total * (1 + reference.SLACK):
        raise ValueError(
            f"{op}: budget={budget} is above {total}, the number of values; give a share of it, "
            "for example 0.1 * total"
        )
    if not 0 <= beta <= MOST_BETA:
        raise ValueError(
            f"{op}: beta={beta} is not in [0, {MOST_BETA:g}]; Spartan's recipes end between 10 and "
            "320, and ops.topk_masks makes hard masks"
        )
    if start is not None and (
        tuple(start.shape) != (2,)
        or start.dtype != torch.float64
        or (values and start.device != values[0].device)
    ):
        raise ValueError(
            f"{op}: start has shape {tuple(start.shape)} and dtype {start.dtype} on "
            f"{start.device}, but a root is float64 (2,) on the device of the values; pass one "
            "that an earlier call returned"
        )


def _new_masks(values: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(v, dtype=reference.mask_dtype(v.dtype)) for v in values]


def _fake(values, costs, budget, beta, start) -> list[Tensor]:
    device = values[0].device if values else None
    return [*_new_masks(values), torch.empty(2, dtype=torch.float64, device=device)]


def _like(tensor: Tensor, mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor with a mask's dtype, or another, and its place in memory, which has no gaps."""
    dtype = dtype or mask.dtype
    if tensor.dtype == dtype and tensor.stride() == mask.stride():
        return tensor
    return torch.empty_like(mask, dtype=dtype).copy_(tensor)


def _costs_like(costs: list[Tensor] | None, masks: list[Tensor]) -> list[Tensor]:
    """Costs as C++ reads them: one per value as the values lie, or one number in float64."""
    if costs is None:
        return []
    return [
        _like(c, m) if c.shape == m.shape else c.to(torch.float64)
        for c, m in zip(costs, masks, strict=True)
    ]


def _soft_topk_cpp(values, costs, budget, beta, start) -> list[Tensor]:
    masks = _new_masks(values)
    root = torch.zeros(2, dtype=torch.float64)
    if sum(m.numel() for m in masks):
        like = [_like(v, m) for v, m in zip(values, masks, strict=True)]
        start = None if start is None else start.contiguous()
        _cpp.soft_topk_into(like, _costs_like(costs, masks), budget, beta, start, masks, root)
    return [*masks, root]


_multi = define(
    "soft_topk_multi(Tensor[] values, Tensor[]? costs, float budget, float beta, "
    "Tensor? start) -> Tensor[]",
    reference=reference.soft_topk_multi,
    triton=lazy_triton("triton_soft_topk", "soft_topk_multi"),
    cpp=_soft_topk_cpp,
    fake=_fake,
    check=_check,
)


# ---- its gradient --------------------------------------------------------------------------------


def _check_grad(grads, masks, costs, beta, dtype) -> None:
    check_same_length("soft_topk_grad", masks, grads, "grads")


def _grad_cpp(grads, masks, costs, beta, dtype) -> list[Tensor]:
    results = [torch.empty_like(m) for m in masks]
    if sum(m.numel() for m in masks):
        masks = [_like(m, r) for m, r in zip(masks, results, strict=True)]
        like = [_like(g, m) for g, m in zip(grads, masks, strict=True)]
        _cpp.soft_topk_grad_into(like, masks, _costs_like(costs, masks), beta, results)
    return [r.to(dtype) for r in results]


_grad = define(
    "soft_topk_grad(Tensor[] grads, Tensor[] masks, Tensor[]? costs, float beta, "
    "ScalarType dtype) -> Tensor[]",
    reference=reference.soft_topk_grad,
    triton=lazy_triton("triton_soft_topk", "soft_topk_grad"),
    cpp=_grad_cpp,
    fake=lambda grads, masks, costs, beta, dtype: [torch.empty_like(m, dtype=dtype) for m in masks],
    check=_check_grad,
)


def _save(ctx, inputs, output) -> None:
    values, costs, _, ctx.beta, _ = inputs
    ctx.count, ctx.given = len(values), costs is not None
    ctx.dtype = values[0].dtype if values else None
    ctx.save_for_backward(*output[:-1], *(costs or ()))


def _backward(ctx, grads):
    masks, costs = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    if ctx.count == 0:
        return [], [] if ctx.given else None, None, None, None
    pairs = zip(grads[:-1], masks, strict=True)
    grads = [torch.zeros_like(m) if g is None else g for g, m in pairs]
    # A gradient that is differentiated again is the same formula in PyTorch.
    compute = reference.soft_topk_grad if torch.is_grad_enabled() else _grad
    made = compute(grads, list(masks), list(costs) if ctx.given else None, ctx.beta, ctx.dtype)
    return made, [None] * ctx.count if ctx.given else None, None, None, None


gradient("soft_topk_multi", _backward, _save)


def soft_topk_multi(
    values: Sequence[Tensor],
    costs: Sequence[Tensor] | None,
    budget: float,
    beta: float,
    start: Tensor | None = None,
    return_root: bool = False,
) -> list[Tensor] | tuple[list[Tensor], Tensor]:
    """Soft masks of several tensors under one budget: sigmoid(beta (v / c - threshold) + shift).

    Threshold and shift are such that the costs times the masks add up to the budget, to 1e-6 of
    it. As beta grows, the masks harden to the values of largest v / c that the budget pays for;
    beta = 0 gives the same share to all. NaN and infinity count as the largest value, 2^100.

    The gradient is the derivative through that root, and can be differentiated again; costs, budget
    and beta get none. (Tai et al., 2022, "Spartan", whose iteration converges to this root.)

    torch.compile makes constants of an op's floats: each new budget or beta compiles the calling
    function again, up to its limit of recompilations. Leave calls whose beta moves every step
    outside, or move it in a few stages.

    Args:
        values: tensors of one dtype and device, of any shape; magnitudes or sums of blocks.
        costs: one tensor per tensor of values, of its shape or with one element for all of it,
            positive; None: 1 each.
        budget: in [0, sum of the costs].
        beta: sharpness, in [0, 1e12].
        start: a root that an earlier call returned for similar values, for a quicker search. The
            masks are the same but for rounding.
        return_root: return (masks, root) with root float64 (2,) = (threshold, shift). The shift is
            about 0 unless beta is (nearly) 0 or the mask is all 0 or 1.

    Returns:
        One mask per tensor in [0, 1] with its shape, in float32 for 16-bit values and in their own
        dtype otherwise.

    Raises:
        ValueError: a budget, beta, cost or shape out of range. A sum of costs below the budget, and
            costs that are not positive, are only noticed on the CPU: elsewhere the masks are 1.
        TypeError: an integer dtype.
    """
    costs = None if costs is None else as_list("soft_topk", "costs", costs)
    values = as_list("soft_topk", "values", values)
    *masks, root = _multi(values, costs, float(budget), float(beta), start)
    return (masks, root) if return_root else masks


def soft_topk(
    values: Tensor,
    costs: Tensor | None,
    budget: float,
    beta: float,
    start: Tensor | None = None,
    return_root: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The soft mask of one tensor: `soft_topk_multi` of a list of one."""
    costs = None if costs is None else [costs]
    masks, root = soft_topk_multi([values], costs, budget, beta, start, return_root=True)
    return (masks[0], root) if return_root else masks[0]
