"""`masked_conv2d` and its two gradients. Each is an op, and they are each other's gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from . import few_rows, layerwise
from .checks import check_tensor, pair
from .dispatch import chosen, define, eager, gradient
from .layerwise import is_channels_last, unpacked
from .masked import save_bits, saved_bits
from .masked_linear import autocast_input, check_layer, check_rows, fused, unchecked
from .routes import chosen_route, routed

__all__ = ["masked_conv2d"]


def _check_conv(x, weight, bits, bias, rows, geometry, dense_grad) -> None:
    groups = geometry[6]
    check_layer("masked_conv2d", x, weight, bits, bias)
    check_rows("masked_conv2d", rows, weight)
    if weight.dim() != 4 or x.dim() != 4 or x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"masked_conv2d: x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}, "
            f"groups={groups}; the weight must be (out, in / groups, kh, kw) and x "
            "(batch, in, height, width)"
        )


def _conv_fake(x, weight, bits, bias, rows, geometry, dense_grad):
    like = torch.empty_like(weight, dtype=x.dtype)
    return F.conv2d(x, like, None, *unpacked(geometry))


def _input_grad_fake(grad, x, weight, bits, rows, geometry):
    like = torch.empty_like(weight, dtype=grad.dtype)
    return reference.convolution_grad(0, grad, x, like, *unpacked(geometry))


_fused_conv = fused(
    "conv2d",
    lambda x, weight, bits, bias, rows, geometry, _: (x, weight, bits, bias, *unpacked(geometry)),
)
_fused_input_grad = fused(
    "conv2d_input_grad",
    lambda grad, x, weight, bits, rows, geometry: (
        grad,
        weight,
        bits,
        x.shape,
        *unpacked(geometry),
        grad.dtype,
    ),
)
_fused_weight_grad = fused(
    "conv2d_weight_grad",
    lambda grad, x, weight, bits, rows, geometry, dense_grad: (
        grad,
        x,
        weight,
        bits,
        *unpacked(geometry),
        dense_grad,
    ),
)


def _in_format(function: Callable | None) -> Callable | None:
    """The fused kernels give channels_last, PyTorch's convolutions only from such x or weights."""
    if function is None:
        return None

    def call(*args):
        tensors = [a for a in args if isinstance(a, Tensor) and a.dim() == 4]
        result = function(*args)
        return result if any(map(is_channels_last, tensors)) else result.contiguous()

    return call


define(
    "masked_conv2d(Tensor x, Tensor weight, Tensor bits, Tensor? bias, Tensor? rows, "
    "int[] geometry, bool dense_grad) -> Tensor",
    reference=lambda x, weight, bits, bias, rows, geometry, dense_grad: reference.masked_conv2d(
        x, weight, bits, bias, *unpacked(geometry)
    ),
    cpp=routed("conv2d", _in_format(few_rows.conv2d), layerwise.conv2d, "cpu"),
    triton=routed("conv2d", _in_format(_fused_conv), layerwise.conv2d),
    fake=_conv_fake,
    check=_check_conv,
)
define(
    "masked_conv2d_input_grad(Tensor grad, Tensor x, Tensor weight, Tensor bits, Tensor? rows, "
    "int[] geometry) -> Tensor",
    reference=lambda grad, x, weight, bits, rows, geometry: reference.masked_conv2d_input_grad(
        grad, x, weight, bits, *unpacked(geometry)
    ),
    cpp=routed(
        "conv2d_input_grad",
        _in_format(few_rows.conv2d_input_grad),
        layerwise.conv2d_input_grad,
        "cpu",
    ),
    triton=routed("conv2d_input_grad", _in_format(_fused_input_grad), layerwise.conv2d_input_grad),
    fake=_input_grad_fake,
    check=unchecked,
)
define(
    "masked_conv2d_weight_grad(Tensor grad, Tensor x, Tensor weight, Tensor bits, Tensor? rows, "
    "int[] geometry, bool dense_grad) -> Tensor",
    reference=lambda grad, x, weight, bits, rows, geometry, dense: (
        reference.masked_conv2d_weight_grad(
            grad, x, weight, bits, *unpacked(geometry), dense_grad=dense
        )
    ),
    cpp=routed(
        "conv2d_weight_grad", few_rows.conv2d_weight_grad, layerwise.conv2d_weight_grad, "cpu"
    ),
    triton=routed("conv2d_weight_grad", _fused_weight_grad, layerwise.conv2d_weight_grad),
    fake=lambda grad, x, weight, *rest: torch.empty_like(weight),
    check=unchecked,
)


# ---- gradients -----------------------------------------------------------------------------------


def _save_conv(ctx, inputs, output) -> None:
    x, weight, bits, bias, rows, ctx.geometry, ctx.dense_grad = inputs
    save_bits(ctx, bits, others=(x, weight))
    ctx.rows = rows
    ctx.bias_dtype = None if bias is None else bias.dtype


def _conv_backward(ctx, grad):
    bits, x, weight = saved_bits(ctx, "masked_conv2d")
    rows = ctx.rows
    grad_x = grad_weight = grad_bias = None
    if all(ctx.needs_input_grad[:2]) and _together(ctx, grad, x, weight):
        of_layer = grad, x, weight, bits, rows, ctx.geometry, ctx.dense_grad
        grad_x, grad_weight = layerwise.conv2d_grads(*of_layer)
    else:
        if ctx.needs_input_grad[0]:
            grad_x = _input_grad(grad, x, weight, bits, rows, ctx.geometry)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_grad(grad, x, weight, bits, rows, ctx.geometry, ctx.dense_grad)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.sum((0, 2, 3)).to(ctx.bias_dtype)
    return grad_x, grad_weight, None, grad_bias, None, None, None


def _together(ctx, *tensors: Tensor) -> bool:
    """Whether both gradients come from one call: it costs half, but is no op and has no gradient of
    its own."""
    rows = ctx.rows is None or not ctx.dense_grad  # the dense gradient needs all rows
    return (
        rows
        and not torch.is_grad_enabled()
        and eager(tensors)
        and chosen("masked_conv2d_weight_grad", tensors[0].device) == "cpp"
        and not (ctx.rows is None and _few_rows(ctx, *tensors))
    )


def _few_rows(ctx, grad: Tensor, x: Tensor, weight: Tensor) -> bool:
    positions = grad.numel() // max(1, grad.shape[1])
    route = chosen_route("conv2d_weight_grad", grad, weight, positions, "cpu")
    return route == "fused" and few_rows.takes(x, weight, ctx.geometry)


def _save_input_grad(ctx, inputs, output) -> None:
    grad, _, weight, bits, rows, ctx.geometry = inputs
    save_bits(ctx, bits, others=(grad, weight))
    ctx.rows = rows


def _input_grad_backward(ctx, second):
    bits, grad, weight = saved_bits(ctx, "masked_conv2d_input_grad")
    rows = ctx.rows
    by_grad = by_weight = None
    if ctx.needs_input_grad[0]:
        by_grad = _conv(second, weight, bits, None, rows, ctx.geometry, False)
    if ctx.needs_input_grad[2]:
        by_weight = _weight_grad(grad, second, weight, bits, rows, ctx.geometry, False)
    return by_grad, None, by_weight, None, None, None


def _save_weight_grad(ctx, inputs, output) -> None:
    grad, x, _, bits, rows, ctx.geometry, ctx.dense_grad = inputs
    save_bits(ctx, bits, others=(grad, x))
    ctx.rows = rows


def _weight_grad_backward(ctx, second):
    bits, grad, x = saved_bits(ctx, "masked_conv2d_weight_grad")
    rows = ctx.rows
    by_grad = by_x = None
    if ctx.dense_grad:
        dense = second.to(x.dtype)
        by_grad = (
            F.conv2d(x, dense, None, *unpacked(ctx.geometry)) if ctx.needs_input_grad[0] else None
        )
        if ctx.needs_input_grad[1]:
            by_x = reference.convolution_grad(0, grad, x, dense, *unpacked(ctx.geometry))
    else:
        if ctx.needs_input_grad[0]:
            by_grad = _conv(x, second, bits, None, rows, ctx.geometry, False)
        if ctx.needs_input_grad[1]:
            by_x = _input_grad(grad, x, second, bits, rows, ctx.geometry)
    return by_grad, by_x, None, None, None, None, None


def _plain_conv(x, weight, bits, bias, rows, geometry, dense_grad) -> Tensor:
    masked = reference.straight(weight, bits, x.dtype, dense_grad)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, masked, bias, *unpacked(geometry))


_conv = gradient("masked_conv2d", _conv_backward, _save_conv, _plain_conv)
_input_grad = gradient("masked_conv2d_input_grad", _input_grad_backward, _save_input_grad)
_weight_grad = gradient("masked_conv2d_weight_grad", _weight_grad_backward, _save_weight_grad)


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bits: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    dense_grad: bool = False,
    rows: Tensor | None = None,
) -> Tensor:
    """F.conv2d(x, where(mask, weight, 0), bias, ...) without keeping the masked weight.

    Args:
        x: (batch, in, height, width) or (in, height, width). Computation is in its dtype; under
            autocast it is cast first.
        weight: (out, in / groups, kh, kw), in any float dtype.
        bits: int32 (out, kh * kw, ceil((in / groups) / 32)).
        bias: (out,).
        stride, padding, dilation: an int or a pair.
        dense_grad: give the weight its dense gradient (straight-through) instead of the masked one.
        rows: int64 (live,), the outputs that keep a weight, from `live_rows`: where many are
            pruned whole, only these are computed (with groups, all are). Rows left out must have
            no bit set.

    Returns:
        (batch, out, height', width') in the dtype of x, with the strides that F.conv2d gives.
    """
    check_tensor("masked_conv2d", "x", x)
    batched = x if x.dim() != 3 else x.unsqueeze(0)
    result = _conv(
        autocast_input(batched),
        weight,
        bits,
        bias,
        rows,
        [
            *pair("masked_conv2d", "stride", stride),
            *pair("masked_conv2d", "padding", padding),
            *pair("masked_conv2d", "dilation", dilation),
            groups,
        ],
        dense_grad,
    )
    return result if x.dim() != 3 else result.squeeze(0)
