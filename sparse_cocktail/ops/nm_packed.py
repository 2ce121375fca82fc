"""Ops of the `nm` family on packed 2:4 weights, as sparse tensor cores read them.

`reference_nm.py` describes the packed form. It is the same for every card and made where it is
used: files hold compressed values and bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference_nm
from ..reference import bits_shape
from ..reference_nm import nm_unpack, packed_shapes
from .checks import check_bits, check_device, check_weight, detached
from .dispatch import define, extension_path, gradient
from .masked_linear import autocast_input
from .nm import (
    ACTIVATIONS,
    activation_grad,
    bias_grad,
    check_dtype,
    check_groups,
    check_inputs,
    check_linear,
    check_pattern,
    check_values,
)

__all__ = ["KERNELS", "nm_linear_packed", "nm_pack", "nm_pack_weight"]

KERNELS = ("auto", "gemm", "skinny", "reference")
SKINNY_ROWS = 16  # the most rows of x that the skinny kernel takes
PACKED_DTYPES = (torch.bfloat16, torch.float16)

_cpp = torch.ops.sparse_cocktail_cpp
_cuda = torch.ops.sparse_cocktail_cuda


def built(namespace, name: str):
    """A kernel of the extension, or None where it was built without."""
    return getattr(namespace, name) if extension_path and hasattr(namespace, name) else None


# ---- pack ----------------------------------------------------------------------------------------


def _packed_fake(like: Tensor, out: int, inputs: int, dtype) -> tuple[Tensor, Tensor]:
    packed, meta = packed_shapes(out, inputs)
    return like.new_empty(packed, dtype=dtype), like.new_empty(meta, dtype=torch.int32)


def _check_pack(values, bits, n, m) -> None:
    op = "nm_pack"
    check_pattern(op, n, m)
    if (n, m) not in ((2, 4), (1, 2)):
        raise ValueError(
            f"{op}: n={n}, m={m}, but sparse tensor cores take 2:4, and 1:2 as such; use "
            "ops.nm_linear for other patterns"
        )
    if values.dim() != 3 or values.shape[1] != 1:
        raise ValueError(
            f"{op}: values have shape {tuple(values.shape)}, but those of a weight (out, in) have "
            "(out, 1, in / 2); packed weights are 2-D: view a 1x1 convolution as one"
        )
    check_dtype(op, values.dtype, PACKED_DTYPES)
    shape = (values.shape[0], 2 * values.shape[2])
    check_inputs(op, "weight", shape[1], 4)
    check_values(op, values, bits, n, m, shape)


def _pack_reference(values, bits, n, m) -> tuple[Tensor, Tensor]:
    check_groups("nm_pack", bits, 2 * values.shape[2], n, m)
    return reference_nm.nm_pack(values, bits, n, m)


_pack_kernel = built(_cpp, "nm_pack")
_pack = define(
    "nm_pack(Tensor values, Tensor bits, int n, int m) -> (Tensor, Tensor)",
    reference=_pack_reference,
    cpp=_pack_kernel
    and (lambda values, bits, n, m: _cpp.nm_pack(values.contiguous(), bits.contiguous(), n, m)),
    fake=lambda values, bits, n, m: _packed_fake(
        values, values.shape[0], 2 * values.shape[2], values.dtype
    ),
    check=_check_pack,
)


def nm_pack(values: Tensor, bits: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Compressed 2:4 or 1:2 values in the form that sparse tensor cores read; without gradient.

    Args:
        values: (out, 1, in / 2), bfloat16 or float16, from `nm_compress`; in % 4 == 0.
        bits: int32 (out, 1, ceil(in / 32)).
        n, m: 2, 4 or 1, 2.

    Returns:
        packed: (4 ceil(out / 64), ceil(in / 64), 2, 32, 8) of the values' dtype.
        meta: int32 (4 ceil(out / 64), ceil(in / 64), 32).
    """
    return _pack(detached(values), bits, n, m)


def _check_pack_weight(weight, bits, dtype) -> None:
    op = "nm_pack_weight"
    check_weight(op, weight)
    if weight.dim() != 2:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, but packed weights are (out, in); view "
            "a 1x1 convolution as one"
        )
    check_inputs(op, "weight", weight.shape[1], 4)
    check_dtype(op, dtype or weight.dtype, PACKED_DTYPES)
    if bits is not None:
        check_bits(op, bits, bits_shape(weight.shape))
        check_device(op, bits, weight, "bits")


def _pack_weight_reference(weight, bits, dtype) -> tuple[Tensor, Tensor]:
    if bits is not None:
        check_groups("nm_pack_weight", bits, weight.shape[1], 2, 4)
    return reference_nm.nm_pack_weight(weight, bits, dtype)


def _pack_weight_with(kernel):
    """The op by a kernel of C++ or CUDA, which read contiguous tensors; float64 is converted."""
    if kernel is None:
        return None

    def call(weight, bits, dtype):
        if weight.dtype == torch.float64 and bits is None:  # ranked as it is
            return _pack_weight_reference(weight, bits, dtype)
        weight = weight.to(dtype) if weight.dtype == torch.float64 else weight
        bits = None if bits is None else bits.contiguous()
        return kernel(weight.contiguous(), bits, dtype or weight.dtype)

    return call


_pack_weight = define(
    "nm_pack_weight(Tensor weight, Tensor? bits, ScalarType? dtype) -> (Tensor, Tensor)",
    reference=_pack_weight_reference,
    cpp=_pack_weight_with(built(_cpp, "nm_pack_weight")),
    cuda=_pack_weight_with(built(_cuda, "nm_pack_weight")),
    fake=lambda weight, bits, dtype: _packed_fake(weight, *weight.shape, dtype or weight.dtype),
    check=_check_pack_weight,
)


def nm_pack_weight(
    weight: Tensor, bits: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Prune a weight to 2:4 and pack it, in one read; without gradient.

    Args:
        weight: (out, in), float32, bfloat16, float16 or float64; in % 4 == 0.
        bits: int32 (out, 1, ceil(in / 32)) of the weights to keep, at most 2 of every 4; None: the
            2 largest |w|, ranked in the weight's own dtype.
        dtype: bfloat16 or float16 (None: the weight's); rounded to nearest even.

    Returns:
        (packed, meta), as from `nm_pack`.
    """
    return _pack_weight(detached(weight), bits, dtype)


# ---- linear --------------------------------------------------------------------------------------


def _check_linear(x, packed, meta, out_features, bias, activation, kernel) -> None:
    op = "nm_linear_packed"
    check_linear(op, x, bias, out_features, activation)
    shapes = packed_shapes(out_features, x.shape[-1])
    if (tuple(packed.shape), tuple(meta.shape)) != shapes or meta.dtype != torch.int32:
        raise ValueError(
            f"{op}: packed has shape {tuple(packed.shape)} and meta is {meta.dtype} of shape "
            f"{tuple(meta.shape)}, but out_features={out_features} and x of shape "
            f"{tuple(x.shape)} need {shapes[0]} and int32 {shapes[1]}; make them with "
            "ops.nm_pack_weight from the weight of this layer"
        )
    if packed.dtype not in PACKED_DTYPES or x.dtype != packed.dtype:
        raise TypeError(
            f"{op}: x has dtype {x.dtype} and packed {packed.dtype}, but both must be bfloat16 or "
            "both float16; convert x or pack in its dtype"
        )
    check_device(op, packed, x, "packed")
    check_device(op, meta, x, "meta")
    if kernel not in KERNELS:
        raise ValueError(f"{op}: kernel={kernel!r} is unknown; use one of {', '.join(KERNELS)}")


def _linear_reference(x, packed, meta, out_features, bias, activation, kernel) -> Tensor:
    if kernel in ("gemm", "skinny"):
        raise ValueError(
            f"nm_linear_packed: kernel={kernel!r} needs CUDA tensors, but x is on {x.device}; use "
            "kernel='auto', or ops.nm_linear, which is fast on the CPU"
        )
    return reference_nm.nm_linear_packed(x, packed, meta, out_features, bias, activation)


def kernel_for(kernel: str, rows: int, major: int) -> str:
    """The CUDA kernel that computes a product: nm_skinny, nm_gemm_sm80 or nm_gemm_sm90.

    Args:
        kernel: auto, gemm or skinny.
        rows: of x.
        major: compute capability of the card.
    """
    if kernel == "skinny" or (kernel == "auto" and rows <= SKINNY_ROWS):
        return "nm_skinny"
    return "nm_gemm_sm90" if major == 9 else "nm_gemm_sm80"


def _linear_cuda(x, packed, meta, out_features, bias, activation, kernel) -> Tensor:
    op = "nm_linear_packed"
    if kernel == "reference":
        return _linear_reference(x, packed, meta, out_features, bias, activation, kernel)
    rows, inputs = math.prod(x.shape[:-1]), x.shape[-1]
    if kernel == "skinny" and rows > SKINNY_ROWS:
        raise ValueError(
            f"{op}: kernel='skinny' takes up to {SKINNY_ROWS} rows, but x of shape "
            f"{tuple(x.shape)} has {rows}; use kernel='auto'"
        )
    if inputs % 8:
        raise ValueError(
            f"{op}: x has in={inputs}, but the kernels read rows of 16 bytes, in % 8 == 0; pad the "
            "layer, or pass kernel='reference'"
        )
    major, minor = torch.cuda.get_device_capability(x.device)
    if major < 8:
        raise RuntimeError(
            f"{op}: this card has compute capability {major}.{minor}, but sparse tensor cores need "
            "8.0 or later; use ops.nm_linear, or pass kernel='reference'"
        )
    name = kernel_for(kernel, rows, major)
    if built(_cuda, name) is None:
        raise RuntimeError(
            f"{op}: the CUDA kernel {name} is not built here; run 'pip install "
            "--no-build-isolation -e .' in the checkout, with nvcc and a torch with CUDA, or pass "
            "kernel='reference'"
        )
    if rows == 0 or out_features == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    flat = x.reshape(rows, inputs).contiguous()
    if bias is not None:
        bias = (bias if bias.dtype == x.dtype else bias.float()).contiguous()
    code = ACTIVATIONS.index(activation)
    run = getattr(_cuda, name)
    y = run(flat, packed.contiguous(), meta.contiguous(), out_features, bias, code, 0)
    return y.view(*x.shape[:-1], out_features)


define(
    "nm_linear_packed(Tensor x, Tensor packed, Tensor meta, SymInt out_features, Tensor? bias, "
    "str activation, str kernel) -> Tensor",
    reference=_linear_reference,
    cuda=_linear_cuda,
    fake=lambda x, packed, meta, out_features, *_: x.new_empty((*x.shape[:-1], out_features)),
    check=_check_linear,
)


def _save_linear(ctx, inputs, output) -> None:
    x, packed, meta, ctx.out_features, bias, ctx.activation, ctx.kernel = inputs
    ctx.save_for_backward(x, packed, meta, bias)


def _linear_backward(ctx, grad):
    x, packed, meta, bias = ctx.saved_tensors

    def before():
        return _linear(x, packed, meta, ctx.out_features, bias, "none", ctx.kernel)

    grad = activation_grad(grad, before, ctx.activation)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ nm_unpack(packed, meta, (ctx.out_features, x.shape[-1]))
    if ctx.needs_input_grad[4]:
        grad_bias = bias_grad(grad, bias)
    return grad_x, None, None, None, grad_bias, None, None


def _plain_linear(x, packed, meta, out_features, bias, activation, kernel) -> Tensor:
    return reference_nm.nm_linear_packed(x, packed, meta, out_features, bias, activation)


_linear = gradient("nm_linear_packed", _linear_backward, _save_linear, _plain_linear)


def nm_linear_packed(
    x: Tensor,
    packed: Tensor,
    meta: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    kernel: str = "auto",
) -> Tensor:
    """activation(F.linear(x, weight, bias)) from a packed 2:4 weight, on sparse tensor cores.

    Differentiable by x and bias, not by the packed weight. On the CPU this is the reference;
    `nm_linear` is the fast one there.

    Args:
        x: (..., in) in the dtype of `packed`; under autocast it is cast first. CUDA kernels need
            in % 8 == 0 and compute capability 8.0 or later.
        packed, meta: from `nm_pack` or `nm_pack_weight` of a weight (out_features, in).
        bias: (out_features,).
        activation: none, relu or gelu (the exact one).
        kernel: auto (skinny up to 16 rows, else gemm), gemm, skinny, or reference.

    Returns:
        (..., out_features) in the dtype of x. Sums, bias and activation are in float32.
    """
    return _linear(autocast_input(x), packed, meta, out_features, bias, activation, kernel)
