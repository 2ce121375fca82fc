"""`masked_linear` and its two gradients. Each is an op, and they are each other's gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference import bits_shape
from . import few_rows, layerwise
from .checks import check_bits, check_device, check_weight
from .dispatch import define, gradient, lazy_triton
from .masked import save_bits, saved_bits
from .routes import routed

__all__ = [
    "unchecked",
    "autocast_dtype",
    "autocast_input",
    "check_layer",
    "check_rows",
    "masked_linear",
]


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer computes with x: its own, or that of autocast."""
    kind = x.device.type
    if (
        kind != "meta"
        and torch.is_autocast_enabled(kind)
        and x.is_floating_point()
        and x.dtype != torch.float64
    ):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def autocast_input(x: Tensor) -> Tensor:
    """Under autocast x takes its dtype; weights stay as they are and are cast with the mask."""
    return x.to(autocast_dtype(x)) if isinstance(x, Tensor) else x  # which the op refuses


def check_layer(op: str, x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None) -> None:
    check_weight(op, weight)
    check_bits(op, bits, bits_shape(weight.shape))
    check_device(op, bits, weight, "bits")
    if not x.is_floating_point():
        raise TypeError(f"{op}: x has dtype {x.dtype}, but it must be floating point; convert it")
    check_device(op, x, weight, "x")
    if bias is not None and tuple(bias.shape) != tuple(weight.shape[:1]):
        raise ValueError(
            f"{op}: bias has shape {tuple(bias.shape)}, but the weight has {weight.shape[0]} "
            "outputs; give a bias of shape (out,)"
        )


def check_rows(op: str, rows: Tensor | None, weight: Tensor) -> None:
    if rows is None:
        return
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise ValueError(
            f"{op}: rows has dtype {rows.dtype} and shape {tuple(rows.shape)}, but it lists the "
            "outputs that keep a weight, as int64 (live,); make it with ops.live_rows(bits)"
        )
    check_device(op, rows, weight, "rows")


def unchecked(*args) -> None:
    """Gradients get what their layer got, which was checked."""


# ---- the ops -------------------------------------------------------------------------------------


def fused(name: str, arguments: Callable) -> Callable | None:
    """A function of the fused kernels. `arguments` picks its own from those of the op."""
    function = lazy_triton("triton_masked", name)
    return None if function is None else lambda *args: function(*arguments(*args))


def _check_linear(x, weight, bits, bias, rows, dense_grad) -> None:
    check_layer("masked_linear", x, weight, bits, bias)
    check_rows("masked_linear", rows, weight)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"masked_linear: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; the "
            "weight must be (out, in) and x must end in `in`"
        )


define(
    "masked_linear(Tensor x, Tensor weight, Tensor bits, Tensor? bias, Tensor? rows, "
    "bool dense_grad) -> Tensor",
    reference=lambda x, weight, bits, bias, rows, dense_grad: reference.masked_linear(
        x, weight, bits, bias
    ),
    cpp=routed("linear", few_rows.linear, layerwise.linear, "cpu"),
    triton=routed("linear", fused("linear", lambda *args: args[:4]), layerwise.linear),
    fake=lambda x, weight, bits, bias, rows, dense_grad: x.new_empty(
        (*x.shape[:-1], weight.shape[0])
    ),
    check=_check_linear,
)
define(
    "masked_linear_input_grad(Tensor grad, Tensor weight, Tensor bits, Tensor? rows) -> Tensor",
    reference=lambda grad, weight, bits, rows: reference.masked_linear_input_grad(
        grad, weight, bits
    ),
    cpp=routed("linear_input_grad", few_rows.linear_input_grad, layerwise.linear_input_grad, "cpu"),
    triton=routed(
        "linear_input_grad",
        fused("linear_input_grad", lambda grad, weight, bits, _: (grad, weight, bits, grad.dtype)),
        layerwise.linear_input_grad,
    ),
    fake=lambda grad, weight, bits, rows: grad.new_empty((*grad.shape[:-1], weight.shape[1])),
    check=unchecked,
)
define(
    "masked_linear_weight_grad(Tensor grad, Tensor x, Tensor weight, Tensor bits, Tensor? rows, "
    "bool dense_grad) -> Tensor",
    reference=lambda grad, x, weight, bits, rows, dense_grad: reference.masked_linear_weight_grad(
        grad, x, weight, bits, dense_grad
    ),
    cpp=routed(
        "linear_weight_grad", few_rows.linear_weight_grad, layerwise.linear_weight_grad, "cpu"
    ),
    triton=routed(
        "linear_weight_grad",
        fused("linear_weight_grad", lambda *args: (*args[:4], args[-1])),
        layerwise.linear_weight_grad,
    ),
    fake=lambda grad, x, weight, bits, rows, dense_grad: torch.empty_like(weight),
    check=unchecked,
)


# ---- gradients -----------------------------------------------------------------------------------


def _save_linear(ctx, inputs, output) -> None:
    x, weight, bits, bias, rows, ctx.dense_grad = inputs
    save_bits(ctx, bits, others=(x, weight))
    ctx.rows = rows
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx, grad):
    bits, x, weight = saved_bits(ctx, "masked_linear")
    rows = ctx.rows
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _input_grad(grad, weight, bits, rows)
    if ctx.needs_input_grad[1]:
        grad_weight = _weight_grad(grad, x, weight, bits, rows, ctx.dense_grad)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, grad_weight, None, grad_bias, None, None


def _save_input_grad(ctx, inputs, output) -> None:
    grad, weight, bits, rows = inputs
    save_bits(ctx, bits, others=(grad, weight))
    ctx.rows = rows


def _input_grad_backward(ctx, second):
    bits, grad, weight = saved_bits(ctx, "masked_linear_input_grad")
    rows = ctx.rows
    by_grad = by_weight = None
    if ctx.needs_input_grad[0]:
        by_grad = _linear(second, weight, bits, None, rows, False)
    if ctx.needs_input_grad[1]:
        by_weight = _weight_grad(grad, second, weight, bits, rows, False)
    return by_grad, by_weight, None, None


def _save_weight_grad(ctx, inputs, output) -> None:
    grad, x, _, bits, rows, ctx.dense_grad = inputs
    save_bits(ctx, bits, others=(grad, x))
    ctx.rows = rows


def _weight_grad_backward(ctx, second):
    bits, grad, x = saved_bits(ctx, "masked_linear_weight_grad")
    rows = ctx.rows
    by_grad = by_x = None
    if ctx.dense_grad:
        dense = second.to(x.dtype)
        by_grad = F.linear(x, dense) if ctx.needs_input_grad[0] else None
        by_x = grad @ dense if ctx.needs_input_grad[1] else None
    else:
        if ctx.needs_input_grad[0]:
            by_grad = _linear(x, second, bits, None, rows, False)
        if ctx.needs_input_grad[1]:
            by_x = _input_grad(grad, second, bits, rows)
    return by_grad, by_x, None, None, None, None


def _plain_linear(x, weight, bits, bias, rows, dense_grad) -> Tensor:
    masked = reference.straight(weight, bits, x.dtype, dense_grad)
    return F.linear(x, masked, None if bias is None else bias.to(x.dtype))


_linear = gradient("masked_linear", _linear_backward, _save_linear, _plain_linear)
_input_grad = gradient("masked_linear_input_grad", _input_grad_backward, _save_input_grad)
_weight_grad = gradient("masked_linear_weight_grad", _weight_grad_backward, _save_weight_grad)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bits: Tensor,
    bias: Tensor | None = None,
    dense_grad: bool = False,
    rows: Tensor | None = None,
) -> Tensor:
    """F.linear(x, where(mask, weight, 0), bias) without keeping the masked weight.

    Args:
        x: (..., in). Computation is in its dtype; under autocast it is cast first.
        weight: (out, in), in any float dtype (an fp32 master weight stays as it is).
        bits: int32 (out, 1, ceil(in / 32)).
        bias: (out,).
        dense_grad: give the weight its dense gradient (straight-through) instead of the masked one.
        rows: int64 (live,), the outputs that keep a weight, from `live_rows`: where many are
            pruned whole, only these are computed. Rows left out must have no bit set.

    Returns:
        (..., out) in the dtype of x.
    """
    return _linear(autocast_input(x), weight, bits, bias, rows, dense_grad)
