"""Masked layers by way of W*m: the masked weight of one layer is made, and PyTorch multiplies.

It is made again for the backward pass, never kept. Where whole outputs are pruned, `rows` lists the
others, and only these are computed: int64 (live,), ascending, on the weight's device. Every
function here has the arguments of the op that it computes.
"""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import convolution_grad, convolution_grads
from .dispatch import chosen, inside
from .masked import maskable

__all__ = ["conv2d", "conv2d_grads", "conv2d_input_grad", "conv2d_weight_grad"]
__all__ += ["is_channels_last"]
__all__ += ["linear", "linear_input_grad", "linear_weight_grad", "unpacked"]


_cpp = torch.ops.sparse_cocktail_cpp
_masked_weight = inside("masked_weight")
_masked_weight_ = inside("masked_weight_")


# ---- rows ----------------------------------------------------------------------------------------


def is_channels_last(tensor: Tensor) -> bool:
    """By its strides, which tell even where both formats lie in memory alike."""
    if tensor.dim() != 4:
        return False
    _, c, h, w = tensor.shape
    return tensor.stride() == (c * h * w, 1, c * w, c) and tensor.stride()[1:] != (h * w, w, 1)


def _in_memory_order(tensor: Tensor, dim: int) -> tuple[Tensor, int]:
    """The tensor as it lies in memory, and where that dimension is then."""
    if not is_channels_last(tensor):
        return tensor, dim % tensor.dim()
    return tensor.permute(0, 2, 3, 1), (0, 3, 1, 2)[dim]


def _take(tensor: Tensor | None, rows: Tensor | None, dim: int = 0) -> Tensor | None:
    """These rows of a tensor, in its memory format; all of them without `rows`."""
    if rows is None or tensor is None:
        return tensor
    ordered, place = _in_memory_order(tensor, dim)
    taken = ordered.index_select(place, rows)
    return taken if ordered is tensor else taken.permute(0, 3, 1, 2)


def _spread(
    part: Tensor, rows: Tensor | None, dim: int, bias: Tensor | None, x: Tensor, weight: Tensor
) -> Tensor:
    """The output whose live rows are `part`; pruned outputs give their bias, or zero."""
    if rows is None:
        return part
    if is_channels_last(x) or is_channels_last(weight):  # a single row would not tell
        part = part.contiguous(memory_format=torch.channels_last)
    ordered, place = _in_memory_order(part, dim)
    shape = list(ordered.shape)
    shape[place] = len(weight)
    whole = part.new_empty(shape)
    if bias is None:
        whole.zero_()
    else:
        whole.copy_(bias.view([-1 if d == place else 1 for d in range(len(shape))]))
    whole.index_copy_(place, rows, ordered)
    return whole if ordered is part else whole.permute(0, 3, 1, 2)


_scratch = threading.local()  # `held`, its memory, and `views` of it by what they hold
_MOST_SCRATCH = 2**26  # bytes; larger masked weights get memory of their own


def _live_weight(weight: Tensor, bits: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W*m of the live rows, until the next call: on the CPU in memory that stays, because the pages
    of new memory would cost more than the masking."""
    weight, bits = _take(weight, rows), _take(bits, rows)
    if weight.device.type != "cpu" or chosen("masked_weight", weight.device) != "cpp":
        return _masked_weight(weight, bits, dtype)
    masked = _scratch_for(weight, dtype)
    if masked is None:
        return _masked_weight(weight, bits, dtype)
    _cpp.masked_weights_into([weight], [bits.contiguous()], [masked])
    return masked


def _scratch_for(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Scratch in the shape and strides of a weight; None where there is none for it."""
    views = _scratch.__dict__.setdefault("views", {})
    key = weight.shape, weight.stride(), weight.dtype, dtype
    if key in views:
        return views[key]
    size = weight.numel() * dtype.itemsize
    like = torch.empty_like(weight, dtype=dtype, device="meta")
    if size > _MOST_SCRATCH or not maskable(weight, like):
        return None
    held = getattr(_scratch, "held", None)
    with torch.inference_mode(False):  # it outlives the mode
        if held is None or held.numel() < size:
            views.clear()
            held = _scratch.held = torch.empty(size, dtype=torch.uint8)
        views[key] = held[:size].view(dtype).as_strided(like.shape, like.stride())
    return views[key]


def _weight_grad(
    part: Tensor, weight: Tensor, bits: Tensor, rows: Tensor | None, dense_grad: bool
) -> Tensor:
    """From the gradient of the live rows that of the weight, in its dtype and strides."""
    part = part.to(weight.dtype)
    if not dense_grad:
        _masked_weight_(part, _take(bits, rows))
    if rows is not None:
        return torch.zeros_like(weight).index_copy_(0, rows, part)
    places = zip(part.shape, part.stride(), weight.stride(), strict=True)
    if all(mine == theirs for size, mine, theirs in places if size != 1):
        return part.as_strided(part.shape, weight.stride())  # of 1x1 kernels some strides are free
    return torch.empty_like(weight).copy_(part)


# ---- linear --------------------------------------------------------------------------------------


def linear(x, weight, bits, bias, rows, dense_grad) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    part = F.linear(x, _live_weight(weight, bits, rows, x.dtype), _take(bias, rows))
    return _spread(part, rows, -1, bias, x, weight)


def linear_input_grad(grad, weight, bits, rows) -> Tensor:
    return _take(grad, rows, -1) @ _live_weight(weight, bits, rows, grad.dtype)


def linear_weight_grad(grad, x, weight, bits, rows, dense_grad) -> Tensor:
    rows = None if dense_grad else rows
    grad = _take(grad.reshape(-1, grad.shape[-1]), rows, 1)
    part = grad.t() @ x.reshape(-1, x.shape[-1])
    return _weight_grad(part, weight, bits, rows, dense_grad)


# ---- convolution ---------------------------------------------------------------------------------


def unpacked(geometry: list[int]) -> tuple[list[int], list[int], list[int], int]:
    """stride, padding, dilation and groups of a convolution. Ops take them as one list of 7 ints:
    every argument costs microseconds on its way through PyTorch's dispatcher."""
    return geometry[0:2], geometry[2:4], geometry[4:6], geometry[6]


def _usable(rows: Tensor | None, geometry: list[int]) -> Tensor | None:
    """Groups own their outputs, and PyTorch has no convolution without outputs."""
    return rows if rows is not None and geometry[6] == 1 and len(rows) else None


def conv2d(x, weight, bits, bias, rows, geometry, dense_grad) -> Tensor:
    rows = _usable(rows, geometry)
    bias = None if bias is None else bias.to(x.dtype)
    live = _live_weight(weight, bits, rows, x.dtype)
    part = F.conv2d(x, live, _take(bias, rows), *unpacked(geometry))
    return _spread(part, rows, 1, bias, x, weight)


def conv2d_input_grad(grad, x, weight, bits, rows, geometry) -> Tensor:
    rows = _usable(rows, geometry)
    live = _live_weight(weight, bits, rows, grad.dtype)
    return convolution_grad(0, _take(grad, rows, 1), x, live, *unpacked(geometry))


def conv2d_grads(grad, x, weight, bits, rows, geometry, dense_grad) -> tuple[Tensor, Tensor]:
    """Both gradients at once: half of the calls."""
    rows = _usable(rows, geometry)
    grad, live = _take(grad, rows, 1), _live_weight(weight, bits, rows, grad.dtype)
    grad_x, part = convolution_grads((True, True), grad, x, live, *unpacked(geometry))
    return grad_x, _weight_grad(part, weight, bits, rows, dense_grad)


def conv2d_weight_grad(grad, x, weight, bits, rows, geometry, dense_grad) -> Tensor:
    rows = None if dense_grad else _usable(rows, geometry)
    # the values of the weight do not matter here, but its shape and memory format do
    like = torch.empty_like(_take(weight.detach(), rows), dtype=x.dtype)
    part = convolution_grad(1, _take(grad, rows, 1), x, like, *unpacked(geometry))
    return _weight_grad(part, weight, bits, rows, dense_grad)
