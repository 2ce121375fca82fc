"""Ops of the `nm` family on compressed weights: compress, decompress, linear.

Compressed, a weight is its mask bits and `values` (out, taps, in * n / m): the kept weights of each
group of m in order of position, followed by zeros where a group keeps fewer than n. `nm_packed.py`
has the form that sparse tensor cores read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference_nm
from ..reference import WORD, bits_shape
from ..reference_nm import values_shape
from .checks import DTYPES, check_bits, check_device, check_padding, check_weight
from .dispatch import define, gradient, lazy_triton
from .masked import save_bits, saved_bits
from .masked_linear import autocast_input
from .masks import check_inputs, check_pattern, shape_of, strided

__all__ = ["ACTIVATIONS", "nm_compress", "nm_decompress", "nm_linear"]

ACTIVATIONS = ("none", "relu", "gelu")

_cpp = torch.ops.sparse_cocktail_cpp


# ---- checks --------------------------------------------------------------------------------------


def check_dtype(op: str, dtype: torch.dtype | None, allowed=DTYPES) -> None:
    if dtype is not None and dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: dtype={dtype} is not one of {names}; pick one of them")


def check_groups(op: str, bits: Tensor, inputs: int, n: int, m: int) -> None:
    """Refuse bits that keep more than n of a group (waits for the device)."""
    if bits.is_meta:
        return
    check_padding(op, bits, inputs)
    sizes = reference_nm.group_sizes(bits, inputs, m)
    if sizes.numel() and int(sizes.max()) > n:
        raise ValueError(
            f"{op}: bits keep {int(sizes.max())} of a group of m={m}, but n={n} are the most; make "
            "them with ops.nm_mask, or give the n and m that they have"
        )


def check_values(op: str, values: Tensor, bits: Tensor, n: int, m: int, shape) -> None:
    if values.dtype not in DTYPES:
        raise TypeError(
            f"{op}: values have dtype {values.dtype}, but compressed weights are float32, "
            "bfloat16, float16 or float64; make them with ops.nm_compress"
        )
    wanted = values_shape(shape, n, m)
    if tuple(values.shape) != wanted:
        raise ValueError(
            f"{op}: values have shape {tuple(values.shape)}, but a weight of shape {tuple(shape)} "
            f"at {n}:{m} has (out, taps, in * n / m) = {wanted}; make them with ops.nm_compress"
        )
    check_bits(op, bits, bits_shape(shape))
    check_device(op, bits, values, "bits")


# ---- compress ------------------------------------------------------------------------------------


def _check_compress(weight, n, m, bits, dtype) -> None:
    op = "nm_compress"
    check_weight(op, weight)
    check_pattern(op, n, m)
    check_inputs(op, "weight", weight.shape[1], m)
    check_dtype(op, dtype)
    if bits is not None:
        check_bits(op, bits, bits_shape(weight.shape))
        check_device(op, bits, weight, "bits")


def _compress_reference(weight, n, m, bits, dtype) -> tuple[Tensor, Tensor]:
    if bits is not None:
        check_groups("nm_compress", bits, weight.shape[1], n, m)
    return reference_nm.nm_compress(weight, n, m, bits, dtype)


_CASTS = {(torch.float32, torch.bfloat16), (torch.float32, torch.float16)}  # made on the way


def _compress_cpp(weight, n, m, bits, dtype) -> tuple[Tensor, Tensor]:
    if weight.dtype == torch.float64:
        return _compress_reference(weight, n, m, bits, dtype)
    dtype = dtype or weight.dtype
    direct = dtype == weight.dtype or (weight.dtype, dtype) in _CASTS
    bits = None if bits is None else bits.contiguous()
    kept = dtype if direct else weight.dtype
    values, bits = _cpp.nm_compress(strided(weight), n, m, bits, kept)
    return values.to(dtype), bits


def _compress_fake(weight, n, m, bits, dtype) -> tuple[Tensor, Tensor]:
    values = weight.new_empty(values_shape(weight.shape, n, m), dtype=dtype or weight.dtype)
    return values, weight.new_empty(bits_shape(weight.shape), dtype=torch.int32)


define(
    "nm_compress(Tensor weight, int n, int m, Tensor? bits, ScalarType? dtype) -> (Tensor, Tensor)",
    reference=_compress_reference,
    cpp=_compress_cpp,
    triton=lazy_triton("triton_nm", "nm_compress"),
    fake=_compress_fake,
    check=_check_compress,
)


def _save_compress(ctx, inputs, output) -> None:
    weight, ctx.n, ctx.m = inputs[:3]
    ctx.dtype, ctx.shape = weight.dtype, list(weight.shape)
    save_bits(ctx, output[1])


def _compress_backward(ctx, grad, _):
    (bits,) = saved_bits(ctx, "nm_compress")
    dense = _decompress(grad.contiguous(), bits, ctx.n, ctx.m, ctx.shape)
    return dense.to(ctx.dtype), None, None, None, None


def plain(reference) -> Callable:
    """A reference as the transforms of torch.func take it: it moves values by operations that have
    a gradient."""
    return lambda *args: reference(*args, exact=False)


_compress = gradient(
    "nm_compress", _compress_backward, _save_compress, plain(reference_nm.nm_compress)
)


def nm_compress(
    weight: Tensor,
    n: int,
    m: int,
    bits: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep n of every m consecutive weights along `in`, and only these.

    Differentiable by the weight: gradients reach the kept weights.

    Args:
        weight: (out, in, *taps), float32, bfloat16, float16 or float64; in % m == 0.
        n, m: 1 <= n < m <= 32.
        bits: int32 (out, taps, ceil(in / 32)) of the weights to keep, at most n of each group;
            None: the n largest |w| of each group, ranked in the weight's own dtype.
        dtype: of the values (None: the weight's); rounded to nearest even.

    Returns:
        values: (out, taps, in * n / m), the kept weights of each group in order of position, then
            zeros where fewer than n are kept.
        bits: int32 (out, taps, ceil(in / 32)), a copy where they are given.
    """
    return _compress(weight, n, m, bits, dtype)


# ---- decompress ----------------------------------------------------------------------------------


def _check_decompress(values, bits, n, m, shape) -> None:
    op = "nm_decompress"
    check_pattern(op, n, m)
    if len(shape) < 2:
        raise ValueError(
            f"{op}: shape={tuple(shape)} has fewer than the 2 dimensions (out, in) of a weight; "
            "give the shape of the weight"
        )
    check_inputs(op, "shape", shape[1], m)
    check_values(op, values, bits, n, m, shape)


def new_weight(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An empty weight whose view (out, taps, in) is memory order: contiguous or channels_last."""
    out, inputs, *taps = shape
    strides, step = [], inputs
    for size in reversed(taps):
        strides.append(step)
        step = step * size
    strides = [step, 1, *reversed(strides)]
    return torch.empty_strided(list(shape), strides, dtype=dtype or like.dtype, device=like.device)


def _decompress_reference(values, bits, n, m, shape) -> Tensor:
    check_groups("nm_decompress", bits, shape[1], n, m)
    found = reference_nm.nm_decompress(values, bits, n, m, shape)
    return new_weight(values, shape).copy_(found)


def _decompress_cpp(values, bits, n, m, shape) -> Tensor:
    if values.dtype == torch.float64:
        return _decompress_reference(values, bits, n, m, shape)
    weight = new_weight(values, shape)
    _cpp.nm_decompress_into(values.contiguous(), bits.contiguous(), n, m, weight)
    return weight


define(
    "nm_decompress(Tensor values, Tensor bits, int n, int m, SymInt[] shape) -> Tensor",
    reference=_decompress_reference,
    cpp=_decompress_cpp,
    triton=lazy_triton("triton_nm", "nm_decompress"),
    fake=lambda values, bits, n, m, shape: new_weight(values, shape),
    check=_check_decompress,
)


def _save_decompress(ctx, inputs, output) -> None:
    _, bits, ctx.n, ctx.m, _ = inputs
    save_bits(ctx, bits)


def _decompress_backward(ctx, grad):
    (bits,) = saved_bits(ctx, "nm_decompress")
    return _compress(grad, ctx.n, ctx.m, bits, None)[0], None, None, None, None


_decompress = gradient(
    "nm_decompress", _decompress_backward, _save_decompress, plain(reference_nm.nm_decompress)
)


def nm_decompress(values: Tensor, bits: Tensor, n: int, m: int, shape: Sequence[int]) -> Tensor:
    """The dense weight of compressed values, zero where the bits are not set.

    Differentiable by the values: gradients reach those that stand for a weight.

    Args:
        values: (out, taps, in * n / m), from `nm_compress`.
        bits: int32 (out, taps, ceil(in / 32)).
        n, m: the pattern of the values.
        shape: of the weight, (out, in, *taps).

    Returns:
        A weight of this shape and the values' dtype, zero where it was pruned. Its view (out, taps,
        in) is memory order: linear weights are contiguous, those of convolutions channels_last.
    """
    return _decompress(values, bits, n, m, shape_of("nm_decompress", shape))


# ---- linear --------------------------------------------------------------------------------------


def check_linear(op: str, x: Tensor, bias: Tensor | None, out: int, activation: str) -> None:
    """What x, bias and activation of all linears of this family must be."""
    if x.dim() < 1 or not x.is_floating_point():
        raise TypeError(
            f"{op}: x is {x.dtype} of shape {tuple(x.shape)}, but it must be floating point and "
            "end in `in`; convert or reshape it"
        )
    if bias is not None:
        if tuple(bias.shape) != (out,) or not bias.is_floating_point():
            raise ValueError(
                f"{op}: bias is {bias.dtype} of shape {tuple(bias.shape)}, but the weight has "
                f"{out} outputs; give a floating-point bias of shape ({out},)"
            )
        check_device(op, bias, x, "bias")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}"
        )


def _check_linear(x, values, bits, n, m, bias, activation) -> None:
    op = "nm_linear"
    check_pattern(op, n, m)
    if values.dim() != 3 or values.shape[1] != 1 or values.shape[2] % n:
        raise ValueError(
            f"{op}: values have shape {tuple(values.shape)}, but those of a weight (out, in) have "
            f"(out, 1, in * n / m), a multiple of n={n}; make them with ops.nm_compress"
        )
    out, inputs = values.shape[0], values.shape[2] // n * m
    check_values(op, values, bits, n, m, (out, inputs))
    check_linear(op, x, bias, out, activation)
    if x.shape[-1] != inputs:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}, but the compressed weight has in={inputs} at "
            f"{n}:{m}; x must end in `in`"
        )
    check_device(op, x, values, "x")
    if x.dtype not in DTYPES or (x.dtype == torch.float64) != (values.dtype == torch.float64):
        raise TypeError(
            f"{op}: x has dtype {x.dtype} and values {values.dtype}, but both must be float32, "
            "bfloat16 or float16, or both float64; convert one of them"
        )


def _linear_reference(x, values, bits, n, m, bias, activation) -> Tensor:
    check_groups("nm_linear", bits, x.shape[-1], n, m)
    return reference_nm.nm_linear(x, values, bits, n, m, bias, activation)


# The most rows of x that are faster multiplied from the compressed form than decompressed first,
# at each level (ops.cpu_level), by the dtype of x; with instructions for pairs of bf16, as many as
# of fp32. Measured on Zen 4 at 2048 x 2048 and 4096 x 4096, one thread.
FEW_ROWS = (
    {torch.float32: 1, torch.bfloat16: 0, torch.float16: 0},
    {torch.float32: 16, torch.bfloat16: 4, torch.float16: 64},
    {torch.float32: 64, torch.bfloat16: 16, torch.float16: 64},
)


def _linear_cpp(x, values, bits, n, m, bias, activation) -> Tensor:
    if x.dtype == torch.float64:
        return _linear_reference(x, values, bits, n, m, bias, activation)
    values, bits = values.contiguous(), bits.contiguous()
    rows, inputs, out = math.prod(x.shape[:-1]), x.shape[-1], values.shape[0]
    flat = x.reshape(rows, inputs)
    pairs = x.dtype == values.dtype == torch.bfloat16 and _cpp.nm_multiplies_bfloat16()
    few = FEW_ROWS[_cpp.cpu_level()]
    if rows <= few[torch.float32 if pairs else x.dtype]:
        padded = F.pad(flat if pairs else flat.float(), (0, -inputs % WORD)).contiguous()
        start = None if bias is None else bias.float().contiguous()
        y = _cpp.nm_linear(padded, values, bits, n, m, start)
        return reference_nm.activated(y, activation).to(x.dtype).view(*x.shape[:-1], out)
    dense = new_weight(values, (out, inputs))
    _cpp.nm_decompress_into(values, bits, n, m, dense)
    bias = None if bias is None else bias.to(x.dtype)
    y = F.linear(flat, dense.to(x.dtype), bias)
    return reference_nm.activated(y, activation).view(*x.shape[:-1], out)


define(
    "nm_linear(Tensor x, Tensor values, Tensor bits, int n, int m, Tensor? bias, str activation) "
    "-> Tensor",
    reference=_linear_reference,
    cpp=_linear_cpp,
    triton=lazy_triton("triton_nm", "nm_linear"),
    fake=lambda x, values, *_: x.new_empty((*x.shape[:-1], values.shape[0])),
    check=_check_linear,
)


def _save_linear(ctx, inputs, output) -> None:
    x, values, bits, ctx.n, ctx.m, bias, ctx.activation = inputs
    save_bits(ctx, bits, others=(x, values, bias))


def activation_grad(grad: Tensor, before, activation: str) -> Tensor:
    """The gradient before the activation; `before()` is the sum that it got."""
    if activation == "relu":
        return torch.where(before() > 0, grad, 0.0)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, before())
    return grad


def bias_grad(grad: Tensor, bias: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(bias.dtype)


def _linear_backward(ctx, grad):
    bits, x, values, bias = saved_bits(ctx, "nm_linear")
    n, m = ctx.n, ctx.m
    grad = activation_grad(
        grad, lambda: _linear(x, values, bits, n, m, bias, "none"), ctx.activation
    )
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        dense = _decompress(values, bits, n, m, [values.shape[0], x.shape[-1]])
        grad_x = grad @ dense.to(grad.dtype)
    if ctx.needs_input_grad[1]:
        rows = math.prod(grad.shape[:-1])
        product = grad.reshape(rows, grad.shape[-1]).t() @ x.reshape(rows, x.shape[-1])
        grad_values = _compress(product, n, m, bits, values.dtype)[0]
    if ctx.needs_input_grad[5]:
        grad_bias = bias_grad(grad, bias)
    return grad_x, grad_values, None, None, None, grad_bias, None


_linear = gradient("nm_linear", _linear_backward, _save_linear, plain(reference_nm.nm_linear))


def nm_linear(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    n: int,
    m: int,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(F.linear(x, weight, bias)) from the compressed weight.

    Few rows of x are multiplied by values that are spread in registers, so that the weight's
    compressed bytes are all that is read. Differentiable by x, values and bias.

    Args:
        x: (..., in), float32, bfloat16 or float16. Under autocast it is cast first.
        values, bits: from `nm_compress` of a weight (out, in); the values may have another dtype
            than x. (float64 works if both have it.)
        n, m: the pattern of the values.
        bias: (out,).
        activation: none, relu or gelu (the exact one).

    Returns:
        (..., out) in the dtype of x. Sums, bias and activation are in float32; but where the CPU
        decompresses first, for many rows of 16 bits, PyTorch rounds the sum before gelu.
    """
    return _linear(autocast_input(x), values, bits, n, m, bias, activation)
