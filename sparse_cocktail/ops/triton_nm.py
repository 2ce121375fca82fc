"""The `nm` ops on Triton: what a call needs around its kernels.

Nothing here waits for the device or uploads to it, and parts of a sum are added in a fixed order:
calls can be captured in CUDA graphs, and give the same bits each time. Dtypes without kernels
(fp64) go to the reference, or to dense PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .. import reference_nm
from ..kernels import launch, masked_tiles, nm, plan
from ..kernels import nm_linear as linear
from ..reference import bits_shape
from .triton_masked import _card, _precision, _target
from .triton_masks import _check_device

_RAW = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_IN_REGISTERS = (2, 4, 8)  # group sizes of kernels whose threads hold whole groups
_ACTIVATIONS = ("none", "relu", "gelu")


def _raw(tensor: Tensor) -> Tensor:
    return tensor.view(_RAW[tensor.dtype])


def _view(shape: Sequence[int]) -> tuple[int, int]:
    """(out * taps, in) of a weight of this shape."""
    out, inputs, *taps = shape
    return out * math.prod(taps), inputs


# ---- compress ------------------------------------------------------------------------------------


def nm_compress(
    weight: Tensor,
    n: int,
    m: int,
    bits: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(values (out, taps, in * n / m), bits): n of every m by magnitude, or those of given bits."""
    _check_device("nm_compress", weight.device)
    dtype = weight.dtype if dtype is None else dtype
    if weight.dtype not in _RAW or dtype not in _RAW:
        return reference_nm.nm_compress(weight, n, m, bits, dtype)
    weight = plan.strided(weight.detach())
    (rows, inputs), (out, taps, per_row) = _view(weight.shape), bits_shape(weight.shape)
    values = weight.new_empty((out, taps, inputs // m * n), dtype=dtype)
    words = weight.new_empty((out, taps, per_row), dtype=torch.int32)
    if words.numel() == 0:
        return values, words
    given = words if bits is None else bits.contiguous()
    chosen = {"KEEP": n, "GROUP": m, "GIVEN": bits is not None}
    chosen |= {"FORMAT": plan.FORMATS[weight.dtype], "RESULT": plan.FORMATS[dtype]}
    tensors = _raw(weight), given, _raw(values), words
    strides = plan.view_strides(weight.shape, weight.stride())
    with launch.on_device(weight.device):
        if m not in _IN_REGISTERS:
            width = triton.next_power_of_2(m)
            size = max(nm.GROUPS, nm.ANY_SIZE // width)
            nm.compress_any[(rows, triton.cdiv(inputs // m, size))](
                *tensors, per_row, inputs, taps, *strides, **chosen, WIDTH=width, SIZE=size
            )
            return values, words
        # one row where the weight lies in memory as its view does, and words have no padding
        flat = inputs % 32 == 0 and strides[2] == 1 and (taps == 1 or strides[1] == inputs)
        flat = flat and (out == 1 or strides[0] == taps * inputs)
        nm.compress[(triton.cdiv(words.numel(), nm.BLOCK),)](
            *tensors, words.numel(), per_row, inputs, taps, *strides, **chosen, FLAT=flat,
            BLOCK=nm.BLOCK,
        )  # fmt: skip
    return values, words


# ---- decompress ----------------------------------------------------------------------------------


def nm_decompress(values: Tensor, bits: Tensor, n: int, m: int, shape: Sequence[int]) -> Tensor:
    """The weight: contiguous, or channels last where it is one of a convolution."""
    _check_device("nm_decompress", values.device)
    out, inputs, *taps = shape
    result = values.new_empty((out, *taps, inputs))
    if values.dtype not in _RAW:
        return reference_nm.nm_decompress(values, bits, n, m, shape)
    if result.numel():
        _decompress(values.contiguous(), bits.contiguous(), n, m, result, _view(shape))
    return result.movedim(-1, 1)


def _decompress(values: Tensor, bits: Tensor, n: int, m: int, result: Tensor, view) -> None:
    (rows, inputs), per_row = view, bits.shape[2]
    tensors = _raw(values), bits, _raw(result)
    with launch.on_device(values.device):
        if m not in _IN_REGISTERS:
            nm.decompress_any[(rows, triton.cdiv(inputs, nm.ANY_SIZE))](
                *tensors, per_row, inputs, KEEP=n, GROUP=m, SIZE=nm.ANY_SIZE
            )
            return
        nm.decompress[(triton.cdiv(bits.numel(), nm.BLOCK),)](
            *tensors, bits.numel(), per_row, inputs, KEEP=n, GROUP=m, FLAT=inputs % 32 == 0,
            BLOCK=nm.BLOCK,
        )  # fmt: skip


# ---- linear --------------------------------------------------------------------------------------


def nm_linear(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    n: int,
    m: int,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(x W^T + bias), (..., out) in the dtype of x; the values count in that dtype.

    Up to FUSED_ROWS rows multiply the compressed weight. More rows, and patterns that no kernel
    spreads in registers, multiply the decompressed one by PyTorch's product.
    """
    _check_device("nm_linear", x.device)
    rows, outputs, inputs = math.prod(x.shape[:-1]), values.shape[0], x.shape[-1]
    if x.dtype not in _RAW or values.dtype not in _RAW:
        return reference_nm.nm_linear(x, values, bits, n, m, bias, activation)
    y = x.new_empty((*x.shape[:-1], outputs))
    if y.numel() == 0:
        return y
    x = x.reshape(rows, inputs)
    x = x if x.stride(1) == 1 else x.contiguous()
    bias, values, bits = (t if t is None else t.contiguous() for t in (bias, values, bits))
    product = _fused if linear.spreads(n, m) and rows <= linear.FUSED_ROWS else _decompressed
    product(x, values, bits, n, m, bias, activation, y.view(rows, outputs))
    return y


def _finish(parts: Tensor, bias: Tensor | None, activation: str, y: Tensor) -> None:
    """y from fp32 sums (parts, rows * out)."""
    linear.sum_parts[(triton.cdiv(y.numel(), linear.SUM_SIZE),)](
        parts, bias, y, parts.shape[0], y.numel(), y.shape[1], BIAS=bias is not None,
        ACTIVATION=_ACTIVATIONS.index(activation), SIZE=linear.SUM_SIZE,
    )  # fmt: skip


def _fused(x, values, bits, n: int, m: int, bias, activation: str, y: Tensor) -> None:
    (rows, inputs), outputs = x.shape, y.shape[1]
    sizes, precision = (outputs, rows, inputs), _precision("linear", x)
    aligned = inputs % 16 == 0 and x.stride(0) % 16 == 0 and values.shape[2] % 16 == 0
    card = _card(x.device)
    tile, parts = linear.tiling(sizes, *card, 8 * x.dtype.itemsize, precision, aligned)
    target, whole = _target(y, parts), parts == 1
    with launch.on_device(x.device):
        linear.nm_linear[(masked_tiles.tiles_in(tile, sizes), parts)](
            x, values, bits, bias, target, rows, outputs, inputs, values.shape[2], bits.shape[2],
            x.stride(0), y.numel(), BIAS=bias is not None and whole,
            ACTIVATION=_ACTIVATIONS.index(activation) if whole else 0,
            EVEN=inputs % tile.k == 0, PRECISION=precision, KEEP=n, GROUP=m,
            BAND=masked_tiles.GROUP, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if not whole:
            _finish(target, bias, activation, y)


def _decompressed(x, values, bits, n: int, m: int, bias, activation: str, y: Tensor) -> None:
    weight = nm_decompress(values.to(x.dtype), bits, n, m, (y.shape[1], x.shape[1]))
    if bias is None and activation != "gelu":  # relu and the rounding to 16 bits commute
        torch.mm(x, weight.t(), out=y)
        if activation == "relu":
            y.relu_()
        return
    if x.dtype == torch.float32:
        sums = x @ weight.t()
    elif x.is_cuda:
        sums = torch.mm(x, weight.t(), out_dtype=torch.float32)
    else:  # interpreted: PyTorch's product on the CPU has no other dtype for its result
        sums = x.float() @ weight.t().float()
    with launch.on_device(x.device):
        _finish(sums.view(1, -1), bias, activation, y)
