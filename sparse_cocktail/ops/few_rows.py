"""Masked layers of few rows on the CPU: the mask is applied to the weight as it is read.

W*m is never written, and the weight is read once or twice instead of five times. A convolution is
the same product of the windows that its outputs see, copied side by side. In float32, for weights
whose outputs lie one after the other with their masks; all else is computed by `layerwise`.

Every function has the arguments of the op that it computes. Results do not depend on the number of
threads or of rows.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layerwise
from .layerwise import unpacked
from .routes import MOST_ROWS

__all__ = ["linear", "linear_input_grad", "linear_weight_grad"]
__all__ += ["conv2d", "conv2d_input_grad", "conv2d_weight_grad", "takes"]

_cpp = torch.ops.sparse_cocktail_cpp


def _in_float32(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype == torch.float32


# ---- linear --------------------------------------------------------------------------------------


def _takes_linear(x: Tensor, weight: Tensor) -> bool:
    few = math.prod(x.shape[:-1]) <= MOST_ROWS
    return few and _in_float32(x, weight) and weight.is_contiguous()


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1]).contiguous()


def _bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def linear(x, weight, bits, bias, rows, dense_grad) -> Tensor:
    if not _takes_linear(x, weight):
        return layerwise.linear(x, weight, bits, bias, rows, dense_grad)
    y = _cpp.masked_linear(_matrix(x), weight, bits.contiguous(), _bias(bias))
    return y.view(*x.shape[:-1], len(weight))


def linear_input_grad(grad, weight, bits, rows) -> Tensor:
    if not _takes_linear(grad, weight):
        return layerwise.linear_input_grad(grad, weight, bits, rows)
    grad_x = _cpp.masked_linear_input_grad(_matrix(grad), weight, bits.contiguous())
    return grad_x.view(*grad.shape[:-1], weight.shape[1])


def linear_weight_grad(grad, x, weight, bits, rows, dense_grad) -> Tensor:
    if dense_grad or not _takes_linear(x, weight):
        return layerwise.linear_weight_grad(grad, x, weight, bits, rows, dense_grad)
    return _cpp.masked_linear_weight_grad(_matrix(grad), _matrix(x), weight, bits.contiguous())


# ---- convolution ---------------------------------------------------------------------------------


def takes(x: Tensor, weight: Tensor, geometry: list[int]) -> bool:
    """Whether a convolution of x is computed here. Masks of several taps must be whole words."""
    _, inputs, *kernel = weight.shape
    batch, _, height, width = _outputs(x.shape, weight.shape, geometry)
    return (
        _in_float32(x, weight)
        and geometry[6] == 1
        and 0 < batch * height * width <= MOST_ROWS
        and (inputs % 32 == 0 or math.prod(kernel) == 1)
        and weight.permute(0, 2, 3, 1).is_contiguous()
    )


def _outputs(x: torch.Size, weight: torch.Size, geometry: list[int]) -> tuple[int, ...]:
    """The shape of F.conv2d's output."""
    sizes = (
        (x[2 + d] + 2 * geometry[2 + d] - geometry[4 + d] * (weight[2 + d] - 1) - 1) // geometry[d]
        for d in (0, 1)
    )
    return x[0], weight[0], *(size + 1 for size in sizes)


def _as_matrix(weight: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """(out, taps * in), and its bits."""
    out = len(weight)
    return weight.permute(0, 2, 3, 1).reshape(out, -1), bits.contiguous().view(out, 1, -1)


def _is_pointwise(weight: Tensor, geometry: list[int]) -> bool:
    return tuple(weight.shape[2:]) == (1, 1) and geometry[:4] == [1, 1, 0, 0]


def _windows(x: Tensor, weight: Tensor, geometry: list[int]) -> Tensor:
    """What each output sees of x: (positions, taps * in)."""
    image = x.permute(0, 2, 3, 1)
    if _is_pointwise(weight, geometry):
        return _matrix(image)
    (down, right), (top, left), (dilated, apart), _ = unpacked(geometry)
    if top or left:
        image = F.pad(image, (0, 0, left, left, top, top))
    batch, _, height, width = _outputs(x.shape, weight.shape, geometry)
    of_batch, of_row, of_column, of_channel = image.stride()
    windows = image.as_strided(
        (batch, height, width, *weight.shape[2:], weight.shape[1]),
        (
            of_batch,
            of_row * down,
            of_column * right,
            of_row * dilated,
            of_column * apart,
            of_channel,
        ),
    )
    return windows.reshape(batch * height * width, -1).contiguous()


def _add_windows(windows: Tensor, shape: torch.Size, weight: Tensor, geometry: list[int]) -> Tensor:
    """The way back: every place of x gets the sum of the windows that saw it."""
    batch, channels, height, width = shape
    if _is_pointwise(weight, geometry):
        return windows.view(batch, height, width, channels).permute(0, 3, 1, 2)
    (down, right), (top, left), (dilated, apart), _ = unpacked(geometry)
    _, _, rows, columns = _outputs(shape, weight.shape, geometry)
    windows = windows.view(batch, rows, columns, *weight.shape[2:], channels)
    image = windows.new_zeros(batch, height + 2 * top, width + 2 * left, channels)
    for i, j in itertools.product(*map(range, weight.shape[2:])):
        y, x = i * dilated, j * apart
        seen = image[:, y : y + down * rows : down, x : x + right * columns : right]
        seen += windows[:, :, :, i, j]
    return image[:, top : top + height, left : left + width].contiguous().permute(0, 3, 1, 2)


def conv2d(x, weight, bits, bias, rows, geometry, dense_grad) -> Tensor:
    if not takes(x, weight, geometry):
        return layerwise.conv2d(x, weight, bits, bias, rows, geometry, dense_grad)
    batch, out, height, width = _outputs(x.shape, weight.shape, geometry)
    windows = _windows(x, weight, geometry)
    y = _cpp.masked_linear(windows, *_as_matrix(weight, bits), _bias(bias))
    return y.view(batch, height, width, out).permute(0, 3, 1, 2)


def conv2d_input_grad(grad, x, weight, bits, rows, geometry) -> Tensor:
    if not takes(x, weight, geometry):
        return layerwise.conv2d_input_grad(grad, x, weight, bits, rows, geometry)
    by_row = _matrix(grad.permute(0, 2, 3, 1))
    windows = _cpp.masked_linear_input_grad(by_row, *_as_matrix(weight, bits))
    return _add_windows(windows, x.shape, weight, geometry)


def conv2d_weight_grad(grad, x, weight, bits, rows, geometry, dense_grad) -> Tensor:
    if dense_grad or not takes(x, weight, geometry):
        return layerwise.conv2d_weight_grad(grad, x, weight, bits, rows, geometry, dense_grad)
    by_row = _matrix(grad.permute(0, 2, 3, 1))
    made = _cpp.masked_linear_weight_grad(
        by_row, _windows(x, weight, geometry), *_as_matrix(weight, bits)
    )
    return made.as_strided(weight.shape, weight.stride())
