"""Masked linear and conv2d on Triton: what a call needs around its kernels.

Plain functions for forward, input gradient and weight gradient. Nothing here waits for the device
or uploads to it, and parts of a sum are added in a fixed order: calls can be captured in CUDA
graphs, and give the same bits each time. Where `supports` says no (fp64, mixed 16-bit formats), the
reference takes over. Depthwise layers and other groups of few channels run without tensor cores.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..kernels import launch, masked_conv, masked_linear, masked_tiles, plan
from ..kernels.masked_tiles import (
    Conv,
    Product,
    Tile,
    conv_of,
    parts_for,
    tiles_in,
    tiling,
)
from .triton_masks import _check_device

OPS = (
    "linear",
    "linear_input_grad",
    "linear_weight_grad",
    "conv2d",
    "conv2d_input_grad",
    "conv2d_weight_grad",
)
_HALF = (torch.bfloat16, torch.float16)


def supports(op: str, x_dtype: torch.dtype, weight_dtype: torch.dtype) -> bool:
    """Whether the kernels take these dtypes: fp32, bf16, fp16, and fp32 weights under 16-bit x."""
    if op not in OPS:
        raise ValueError(f"supports: op={op!r} is unknown; use one of {', '.join(OPS)}")
    same = x_dtype == weight_dtype and x_dtype in (*_HALF, torch.float32)
    return same or (x_dtype in _HALF and weight_dtype == torch.float32)


def _takes(op: str, x: Tensor, weight: Tensor, positions: int) -> bool:
    """`supports`, and rows or pixels that kernels can count in int32."""
    _check_device(f"masked_{op.partition('_')[0]}", x.device)
    return supports(op, x.dtype, weight.dtype) and positions < 2**31 - 2**16


# ---- tiles ---------------------------------------------------------------------------------------


@functools.lru_cache
def _card(device: torch.device) -> tuple[tuple[int, int] | None, int]:
    """Capability and number of processors; a few where kernels are interpreted."""
    if device.type != "cuda":
        return None, 4
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor), found.multi_processor_count


def _precision(op: str, x: Tensor) -> str:
    """How fp32 is multiplied: as torch would, by its flags for matmul and for cudnn."""
    if x.dtype in _HALF:
        return "tf32"  # ignored; one value, so that kernels are compiled once
    flags = torch.backends.cuda.matmul if op.startswith("linear") else torch.backends.cudnn.conv
    return "tf32" if x.is_cuda and flags.fp32_precision == "tf32" else "ieee"


def _aligned(weight: Tensor, *channels: int) -> bool:
    return weight.stride(1) == 1 and all(count % 16 == 0 for count in channels)


def _tiled(product: Product, x: Tensor) -> tuple[Tile, int, dict]:
    """Tile, parts of K, and what the kernel is compiled for."""
    precision = _precision(product.op, x)
    tile, parts = tiling(product, *_card(x.device), 8 * x.dtype.itemsize, precision)
    return tile, parts, {
        "PRECISION": precision,
        "GROUP": masked_tiles.GROUP,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }  # fmt: skip


def _target(result: Tensor, parts: int) -> Tensor:
    """What a kernel writes: the result, or fp32 parts of it."""
    if parts == 1:
        return result
    return result.new_empty((parts, result.numel()), dtype=torch.float32)


def _sum_parts(target, bits, bias, result, taps: int, columns: int, strides, masked=False) -> None:
    """Add up the parts of a result (rows, taps, columns) with these strides, if there are any."""
    if target is result:
        return
    parts, part = target.shape
    size = 1024
    masked_linear.sum_parts[(-(-part // size),)](
        target, bits, bias, result, parts, part, taps, columns, *strides, BIAS=bias is not None,
        MASKED=masked, SIZE=size,
    )  # fmt: skip


# ---- linear --------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """x as (rows, columns), with columns side by side."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _forward(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None, y: Tensor) -> None:
    (rows, inputs), outputs = x.shape, weight.shape[0]
    if y.numel() == 0:
        return
    weight = plan.strided(weight)
    sizes = outputs, rows, inputs
    product = Product("linear", sizes, aligned=_aligned(weight, inputs, outputs))
    tile, parts, chosen = _tiled(product, x)
    target = _target(y, parts)
    with launch.on_device(x.device):
        masked_linear.linear_forward[(tiles_in(tile, sizes), parts)](
            x, weight, bits, bias, target, rows, outputs, inputs, x.stride(0), *weight.stride(),
            y.numel(), BIAS=bias is not None and parts == 1, EVEN=inputs % tile.k == 0, **chosen,
        )  # fmt: skip
        _sum_parts(target, bits, bias, y, 1, outputs, (outputs, 0, 1))


def _input_grad(grad: Tensor, weight: Tensor, bits: Tensor, result: Tensor) -> None:
    (rows, outputs), inputs = grad.shape, weight.shape[1]
    if result.numel() == 0:
        return
    weight = plan.strided(weight)
    sizes = inputs, rows, outputs
    product = Product("linear_input_grad", sizes, aligned=_aligned(weight, inputs, outputs))
    tile, parts, chosen = _tiled(product, grad)
    target = _target(result, parts)
    with launch.on_device(grad.device):
        masked_linear.linear_input_grad[(tiles_in(tile, sizes), parts)](
            grad, weight, bits, target, rows, outputs, inputs, grad.stride(0), *weight.stride(),
            result.numel(), EVEN=outputs % tile.k == 0, **chosen,
        )  # fmt: skip
        _sum_parts(target, bits, None, result, 1, inputs, (inputs, 0, 1))


def _weight_grad(grad: Tensor, x: Tensor, bits: Tensor, result: Tensor, masked: bool) -> None:
    (rows, outputs), inputs = grad.shape, x.shape[1]
    if result.numel() == 0:
        return
    sizes = outputs, inputs, rows
    product = Product("linear_weight_grad", sizes, aligned=_aligned(result, inputs, outputs))
    tile, parts, chosen = _tiled(product, x)
    target = _target(result, parts)
    strides = result.stride() if parts == 1 else (inputs, 1)
    with launch.on_device(x.device):
        masked_linear.linear_weight_grad[(tiles_in(tile, sizes), parts)](
            grad, x, bits, target, rows, outputs, inputs, grad.stride(0), x.stride(0), *strides,
            result.numel(), MASKED=masked and parts == 1, **chosen,
        )  # fmt: skip
        stride_out, stride_in = result.stride()
        _sum_parts(target, bits, None, result, 1, inputs, (stride_out, 0, stride_in), masked)


def linear(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) to (..., out), in the dtype of x."""
    rows = math.prod(x.shape[:-1])
    if not _takes("linear", x, weight, rows):
        return reference.masked_linear(x, weight, bits, bias)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    bias = None if bias is None else bias.contiguous()
    _forward(_rows(x), weight, bits.contiguous(), bias, y.view(rows, weight.shape[0]))
    return y


def linear_input_grad(grad: Tensor, weight: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """grad (..., out) to (..., in) in `dtype`."""
    rows = math.prod(grad.shape[:-1])
    if not _takes("linear_input_grad", grad, weight, rows):
        return (grad @ reference.masked_weight(weight, bits, grad.dtype)).to(dtype)
    result = grad.new_empty((*grad.shape[:-1], weight.shape[1]), dtype=dtype)
    _input_grad(_rows(grad), weight, bits.contiguous(), result.view(rows, weight.shape[1]))
    return result


def linear_weight_grad(
    grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, dense_grad: bool = False
) -> Tensor:
    """grad (..., out), x (..., in) to (out, in), in the weight's dtype and strides."""
    result, target = _empty_gradient(weight)
    grad, x = _rows(grad.to(x.dtype)), _rows(x)
    if not _takes("linear_weight_grad", x, weight, x.shape[0]):
        dense = grad.t() @ x
        return result.copy_(dense if dense_grad else reference.masked_weight(dense, bits))
    _weight_grad(grad, x, bits.contiguous(), target, not dense_grad)
    return result if target is result else result.copy_(target)


def _empty_gradient(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient, and the tensor that kernels write: contiguous where they cannot walk it."""
    result = torch.empty_like(weight)
    return result, result if plan.mergeable(result) else result.new_empty(result.shape)


# ---- convolution ---------------------------------------------------------------------------------


def _pixels(x: Tensor) -> Tensor:
    """x as (batch, height, width, channels) in memory order; no copy of channels_last x."""
    return x.permute(0, 2, 3, 1).contiguous()


def _direct_blocks(channels: int, positions: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Blocks of positions and of channels of a direct kernel, and their sizes."""
    block = min(64, max(16, 1 << (channels - 1).bit_length()))
    blocks = {"BLOCK_M": block, "BLOCK_N": masked_tiles.DIRECT // block}
    return (-(-positions // blocks["BLOCK_N"]), -(-channels // block)), blocks


def conv2d(
    x: Tensor,
    weight: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """x (batch, in, height, width) to (batch, out, height', width') in x's dtype, channels_last."""
    conv = conv_of(x.shape, weight.shape, stride, padding, dilation, groups)
    if not _takes("conv2d", x, weight, conv.positions):
        return reference.masked_conv2d(x, weight, bits, bias, stride, padding, dilation, groups)
    x, bits, channels = _pixels(x), bits.contiguous(), weight.shape[0]
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((conv.batch, conv.out_height, conv.out_width, channels))
    if conv.pointwise:
        _forward(x.flatten(0, 2), weight[:, :, 0, 0], bits, bias, y.flatten(0, 2))
    elif y.numel():
        _conv_forward(conv, x, plan.strided(weight), bits, bias, y)
    return y.permute(0, 3, 1, 2)


def _conv_forward(conv: Conv, x: Tensor, weight: Tensor, bits: Tensor, bias, y: Tensor) -> None:
    strides, channels = plan.view_strides(weight.shape, weight.stride()), weight.shape[0]
    with launch.on_device(x.device):
        if conv.direct:
            grid, blocks = _direct_blocks(channels, conv.pixels)
            masked_conv.direct_forward[grid](
                x, weight, bits, bias, y, *conv, *strides, BIAS=bias is not None, **blocks
            )
            return
        sizes = conv.outputs, conv.pixels, conv.inputs
        aligned = _aligned(weight, conv.inputs, conv.outputs)
        product = Product("conv2d", sizes, conv.groups, conv.taps, aligned=aligned)
        tile, parts, chosen = _tiled(product, x)
        target = _target(y, parts)
        masked_conv.conv_forward[(tiles_in(tile, sizes), parts, conv.groups)](
            x, weight, bits, bias, target, *conv, *strides, y.numel(),
            BIAS=bias is not None and parts == 1, EVEN=conv.inputs % tile.k == 0, **chosen,
        )  # fmt: skip
        _sum_parts(target, bits, bias, y, 1, channels, (channels, 0, 1))


def conv2d_input_grad(
    grad: Tensor,
    weight: Tensor,
    bits: Tensor,
    input_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    """grad (batch, out, height', width') to `input_shape` in `dtype`, channels_last."""
    conv = conv_of(input_shape, weight.shape, stride, padding, dilation, groups)
    if not _takes("conv2d_input_grad", grad, weight, conv.positions):
        x, masked = grad.new_empty(input_shape), reference.masked_weight(weight, bits, grad.dtype)
        return _backward(grad, x, masked, stride, padding, dilation, groups, 0).to(dtype)
    grad, bits = _pixels(grad), bits.contiguous()
    result = grad.new_empty((conv.batch, conv.height, conv.width, input_shape[1]), dtype=dtype)
    if conv.pointwise:
        _input_grad(grad.flatten(0, 2), weight[:, :, 0, 0], bits, result.flatten(0, 2))
    elif result.numel():
        _conv_input_grad(conv, grad, plan.strided(weight), bits, result)
    return result.permute(0, 3, 1, 2)


def _conv_input_grad(conv: Conv, grad: Tensor, weight: Tensor, bits: Tensor, result) -> None:
    strides, channels = plan.view_strides(weight.shape, weight.stride()), result.shape[3]
    steps, dilates = (conv.step_h, conv.step_w), (conv.dilate_h, conv.dilate_w)
    with launch.on_device(grad.device):
        if conv.direct:
            grid, blocks = _direct_blocks(channels, conv.batch * conv.height * conv.width)
            masked_conv.direct_input_grad[grid](
                grad, weight, bits, result, *conv, *strides, **blocks
            )
            return
        # see taps_of in masked_conv.py
        period = [s // math.gcd(s, d) for s, d in zip(steps, dilates, strict=True)]
        jump = [p * d // s for p, d, s in zip(period, dilates, steps, strict=True)]
        phases = conv.step_h * conv.step_w
        pixels = conv.batch * -(-conv.height // conv.step_h) * -(-conv.width // conv.step_w)
        sizes = conv.inputs, pixels, conv.outputs
        aligned = _aligned(weight, conv.inputs, conv.outputs)
        copies = conv.groups * phases
        product = Product("conv2d_input_grad", sizes, copies, split=False, aligned=aligned)
        tile, _, chosen = _tiled(product, grad)
        masked_conv.conv_input_grad[(tiles_in(tile, sizes), phases, conv.groups)](
            grad, weight, bits, result, *conv, *period, *jump, *strides,
            EVEN=conv.outputs % tile.k == 0, **chosen,
        )  # fmt: skip


def conv2d_weight_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bits: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dense_grad: bool = False,
) -> Tensor:
    """grad (batch, out, height', width') and x to the weight's shape, dtype and strides."""
    conv = conv_of(x.shape, weight.shape, stride, padding, dilation, groups)
    (result, target), grad = _empty_gradient(weight), grad.to(x.dtype)
    if not _takes("conv2d_weight_grad", x, weight, conv.positions):
        like = weight.to(x.dtype)
        dense = _backward(grad, x, like, stride, padding, dilation, groups, 1)
        return result.copy_(dense if dense_grad else reference.masked_weight(dense, bits))
    grad, x, bits = _pixels(grad), _pixels(x), bits.contiguous()
    if conv.pointwise:
        rows = grad.flatten(0, 2), x.flatten(0, 2)
        _weight_grad(*rows, bits, target[:, :, 0, 0], not dense_grad)
    elif result.numel():
        _conv_weight_grad(conv, grad, x, bits, target, not dense_grad)
    return result if target is result else result.copy_(target)


def _conv_weight_grad(conv: Conv, grad, x, bits, result: Tensor, masked: bool) -> None:
    channels, inputs = result.shape[:2]
    if conv.direct:
        (steps, blocks), chosen = _direct_blocks(channels, conv.pixels)
        columns = conv.taps * inputs
        # one program does little: several of them per processor
        parts = parts_for(blocks * columns, steps, 4 * _card(x.device)[1])
        kernel, grid = masked_conv.direct_weight_grad, (blocks, parts, columns)
    else:
        sizes, copies = (conv.outputs, inputs, conv.pixels), conv.groups * conv.taps
        aligned = _aligned(result, inputs, conv.outputs)
        product = Product("conv2d_weight_grad", sizes, copies, aligned=aligned)
        tile, parts, chosen = _tiled(product, x)
        grid = tiles_in(tile, sizes) * conv.taps, parts, conv.groups
        kernel = masked_conv.conv_weight_grad
    target, strides = _target(result, parts), plan.view_strides(result.shape, result.stride())
    own = strides if parts == 1 else (conv.taps * inputs, inputs, 1)
    with launch.on_device(x.device):
        kernel[grid](
            grad, x, bits, target, *conv, *own, result.numel(), MASKED=masked and parts == 1,
            **chosen,
        )  # fmt: skip
        _sum_parts(target, bits, None, result, conv.taps, inputs, strides, masked)


def _backward(grad, x, weight, stride, padding, dilation, groups: int, wanted: int) -> Tensor:
    """PyTorch's gradient of x (wanted 0) or of the weight (1)."""
    mask = [wanted == 0, wanted == 1, False]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
    )[wanted]
