"""Ops of the `masked` family: one dense weight, a packed mask, and no W*m kept for the backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference import bits_shape
from .dispatch import (
    check_bits,
    check_device,
    check_same_length,
    check_weight,
    check_weights,
    define,
    gradient,
    lazy_triton,
)
from .masks import packed, strided

__all__ = ["masked_conv2d", "masked_linear", "masked_weight", "masked_weights"]

_cpp = torch.ops.sparse_cocktail_cpp


# ---- masked weight -------------------------------------------------------------------------------


def _check_masked_weight(weight, bits, dtype=None) -> None:
    check_weight("masked_weight", weight)
    check_bits("masked_weight", bits, bits_shape(weight.shape))
    check_device("masked_weight", bits, weight, "bits")


def _masked_weights_cpp(weights, bits, dtype=None) -> list[Tensor]:
    if not weights:
        return []
    own = weights[0].dtype
    dtype = dtype or own
    if dtype != own and (own, dtype) not in _CASTS:
        return [w.to(dtype) for w in _masked_weights_cpp(weights, bits)]
    sources = [strided(w) for w in weights]
    results = [torch.empty_like(s, dtype=dtype) for s in sources]
    for index, (source, result) in enumerate(zip(sources, results, strict=True)):
        if source.stride() != result.stride():  # a slice with gaps
            sources[index] = torch.empty_like(source).copy_(source)
    _cpp.masked_weights_into(sources, packed(bits), results)
    return [
        result if strided(weight) is weight else torch.empty_like(weight, dtype=dtype).copy_(result)
        for weight, result in zip(weights, results, strict=True)
    ]


_CASTS = {(torch.float32, torch.bfloat16), (torch.float32, torch.float16)}  # made on the way


_weight = define(
    "masked_weight(Tensor weight, Tensor bits, ScalarType? dtype=None) -> Tensor",
    triton=lazy_triton("triton_masks", "masked_weight"),
    reference=reference.masked_weight,
    cpp=lambda weight, bits, dtype=None: _masked_weights_cpp([weight], [bits], dtype)[0],
    fake=lambda weight, bits, dtype=None: torch.empty_like(weight, dtype=dtype),
    check=_check_masked_weight,
)


def _save_weight(ctx, inputs, output) -> None:
    weight, bits, _ = inputs
    _save_bits(ctx, bits)
    ctx.dtype = weight.dtype


def _weight_backward(ctx, grad):
    (bits,) = _saved(ctx, "masked_weight")
    return _weight(grad, bits, ctx.dtype), None, None


def masked_weight(weight: Tensor, bits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """where(mask, weight, 0), cast to `dtype` when given; strides as the weight's.

    The gradient reaches the kept weights only.
    """
    return _weight(weight, bits, dtype)


def _check_masked_weights(weights, bits, dtype=None) -> None:
    check_weights("masked_weights", weights)
    check_same_length("masked_weights", weights, bits, "bits")
    for index, (weight, words) in enumerate(zip(weights, bits, strict=True)):
        check_bits("masked_weights", words, bits_shape(weight.shape), f"bits[{index}]")
        check_device("masked_weights", words, weight, f"bits[{index}]")


_weights = define(
    "masked_weights(Tensor[] weights, Tensor[] bits, ScalarType? dtype) -> Tensor[]",
    triton=lazy_triton("triton_masks", "masked_weights"),
    reference=lambda weights, bits, dtype=None: [
        reference.masked_weight(w, b, dtype) for w, b in zip(weights, bits, strict=True)
    ],
    cpp=_masked_weights_cpp,
    fake=lambda weights, bits, dtype=None: [torch.empty_like(w, dtype=dtype) for w in weights],
    check=_check_masked_weights,
)


def _save_weights(ctx, inputs, output) -> None:
    weights, bits, _ = inputs
    _save_bits(ctx, *bits)
    ctx.dtypes = [w.dtype for w in weights]


def _weights_backward(ctx, grads):
    bits = _saved(ctx, "masked_weights")
    grads = [_weight(*each) for each in zip(grads, bits, ctx.dtypes, strict=True)]
    return grads, [None] * len(bits), None


def masked_weights(
    weights: Sequence[Tensor], bits: Sequence[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """`masked_weight` of a whole list of weights in one call."""
    return _weights(list(weights), list(bits), dtype)


# ---- saved bits ----------------------------------------------------------------------------------
# Bits are a buffer that changes in place when the subnet is switched. Autograd notices that for
# saved tensors, but under gradient checkpointing the recomputed forward would silently read the new
# mask: the version that the first forward saw is kept as a number and compared.


def _save_bits(ctx, *bits: Tensor, others: tuple[Tensor | None, ...] = ()) -> None:
    ctx.save_for_backward(*bits, *others)
    ctx.count = len(bits)
    ctx.versions = [b._version for b in bits]


def _saved(ctx, op: str) -> tuple[Tensor, ...]:
    saved = ctx.saved_tensors
    if [bits._version for bits in saved[: ctx.count]] != ctx.versions:
        raise RuntimeError(
            f"{op}: bits were changed in place between forward and backward, so the gradient would "
            "belong to another subnet; end the backward of a pass before the next activate()"
        )
    return saved


gradient("masked_weight", _weight_backward, _save_weight)
gradient("masked_weights", _weights_backward, _save_weights)


# ---- linear --------------------------------------------------------------------------------------


def _autocast(x: Tensor) -> Tensor:
    """Under autocast x takes its dtype; weights stay as they are and are cast with the mask."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _check_layer(op: str, x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None) -> None:
    check_weight(op, weight)
    check_bits(op, bits, bits_shape(weight.shape))
    check_device(op, bits, weight, "bits")
    if not x.is_floating_point():
        raise TypeError(f"{op}: x has dtype {x.dtype}, but it must be floating point; convert it")
    if bias is not None and tuple(bias.shape) != tuple(weight.shape[:1]):
        raise ValueError(
            f"{op}: bias has shape {tuple(bias.shape)}, but the weight has {weight.shape[0]} "
            "outputs; give a bias of shape (out,)"
        )


def _check_linear(x, weight, bits, bias, dense_grad) -> None:
    _check_layer("masked_linear", x, weight, bits, bias)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"masked_linear: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; the "
            "weight must be (out, in) and x must end in `in`"
        )


def _linear_with_op(x, weight, bits, bias, dense_grad) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, _weight(weight, bits, x.dtype), bias)


_linear = define(
    "masked_linear(Tensor x, Tensor weight, Tensor bits, Tensor? bias, bool dense_grad) -> Tensor",
    reference=lambda x, weight, bits, bias, dense_grad: reference.masked_linear(
        x, weight, bits, bias
    ),
    cpp=_linear_with_op,
    fake=lambda x, weight, bits, bias, dense_grad: x.new_empty((*x.shape[:-1], weight.shape[0])),
    check=_check_linear,
)


def _save_layer(ctx, inputs, output) -> None:
    x, weight, bits, bias, *ctx.geometry, ctx.dense_grad = inputs
    _save_bits(ctx, bits, others=(x, weight))
    ctx.bias_dtype = None if bias is None else bias.dtype


def _weight_gradient(ctx, grad: Tensor, weight: Tensor, bits: Tensor) -> Tensor:
    """The gradient in the weight's dtype and strides, masked unless it is wanted dense."""
    grad = grad.to(weight.dtype) if ctx.dense_grad else _weight(grad, bits, weight.dtype)
    if grad.stride() == weight.stride():
        return grad
    return torch.empty_like(weight).copy_(grad)


def _linear_backward(ctx, grad):
    bits, x, weight = _saved(ctx, "masked_linear")
    grad_x = grad_weight = grad_bias = None
    rows = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[0]:
        grad_x = grad @ _weight(weight, bits, x.dtype)
    if ctx.needs_input_grad[1]:
        grad_weight = _weight_gradient(ctx, rows.t() @ x.reshape(-1, x.shape[-1]), weight, bits)
    if ctx.needs_input_grad[3]:
        grad_bias = rows.sum(0).to(ctx.bias_dtype)
    return grad_x, grad_weight, None, grad_bias, None


gradient("masked_linear", _linear_backward, _save_layer)


def masked_linear(
    x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None = None, dense_grad: bool = False
) -> Tensor:
    """F.linear(x, where(mask, weight, 0), bias) without keeping the masked weight.

    Args:
        x: (..., in). Computation is in its dtype; under autocast it is cast first.
        weight: (out, in), in any float dtype (an fp32 master weight stays as it is).
        bits: int32 (out, 1, ceil(in / 32)).
        bias: (out,).
        dense_grad: give the weight its dense gradient (straight-through) instead of the masked one.

    Returns:
        (..., out) in the dtype of x.
    """
    return _linear(_autocast(x), weight, bits, bias, dense_grad)


# ---- convolution ---------------------------------------------------------------------------------


def _check_conv(x, weight, bits, bias, stride, padding, dilation, groups, dense_grad) -> None:
    _check_layer("masked_conv2d", x, weight, bits, bias)
    if weight.dim() != 4 or x.dim() != 4 or x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"masked_conv2d: x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}, "
            f"groups={groups}; the weight must be (out, in / groups, kh, kw) and x "
            "(batch, in, height, width)"
        )


def _conv_with_op(x, weight, bits, bias, stride, padding, dilation, groups, dense_grad):
    bias = None if bias is None else bias.to(x.dtype)
    masked = _weight(weight, bits, x.dtype)
    return F.conv2d(x, masked, bias, stride, padding, dilation, groups)


def _conv_fake(x, weight, bits, bias, stride, padding, dilation, groups, dense_grad):
    like = torch.empty_like(weight, dtype=x.dtype)
    return F.conv2d(x, like, None, stride, padding, dilation, groups)


_conv = define(
    "masked_conv2d(Tensor x, Tensor weight, Tensor bits, Tensor? bias, SymInt[] stride, "
    "SymInt[] padding, SymInt[] dilation, int groups, bool dense_grad) -> Tensor",
    reference=lambda *args: reference.masked_conv2d(*args[:-1]),
    cpp=_conv_with_op,
    fake=_conv_fake,
    check=_check_conv,
)


def _conv_backward(ctx, grad):
    bits, x, weight = _saved(ctx, "masked_conv2d")
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    stride, padding, dilation, groups = ctx.geometry
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        x,
        _weight(weight, bits, x.dtype),
        [weight.shape[0]],
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        wanted,
    )
    if wanted[1]:
        grad_weight = _weight_gradient(ctx, grad_weight, weight, bits)
    if wanted[2]:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_x, grad_weight, None, grad_bias, None, None, None, None, None


gradient("masked_conv2d", _conv_backward, _save_layer)


def _pair(name: str, value: int | Sequence[int]) -> list[int]:
    pair = [value, value] if isinstance(value, int) else value
    if isinstance(pair, str) or len(pair) != 2:
        raise ValueError(
            f"masked_conv2d: {name}={value!r} is neither an int nor a pair; MaskedConv2d "
            "also takes padding='same' and other padding modes"
        )
    return list(pair)


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

    Returns:
        (batch, out, height', width') in the dtype of x, with the strides that F.conv2d gives.
    """
    batched = x if x.dim() != 3 else x.unsqueeze(0)
    result = _conv(
        _autocast(batched),
        weight,
        bits,
        bias,
        _pair("stride", stride),
        _pair("padding", padding),
        _pair("dilation", dilation),
        groups,
        dense_grad,
    )
    return result if x.dim() != 3 else result.squeeze(0)
