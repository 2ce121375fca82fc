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
from collections.abc import Sequence

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


# Results are tensors of their own, not views: autograd refuses to change views of an op in place.


def linear(x, weight, bits, bias, rows, dense_grad) -> Tensor:
    if not _takes_linear(x, weight):
        return layerwise.linear(x, weight, bits, bias, rows, dense_grad)
    y = x.new_empty((*x.shape[:-1], len(weight)))
    _cpp.masked_linear_into(_matrix(x), weight, bits.contiguous(), _bias(bias), _matrix(y))
    return y


def linear_input_grad(grad, weight, bits, rows) -> Tensor:
    if not _takes_linear(grad, weight):
        return layerwise.linear_input_grad(grad, weight, bits, rows)
    grad_x = grad.new_empty((*grad.shape[:-1], weight.shape[1]))
    _cpp.masked_linear_input_grad_into(_matrix(grad), weight, bits.contiguous(), _matrix(grad_x))
    return grad_x


def linear_weight_grad(grad, x, weight, bits, rows, dense_grad) -> Tensor:
    if dense_grad or not _takes_linear(x, weight):
        return layerwise.linear_weight_grad(grad, x, weight, bits, rows, dense_grad)
    made = torch.empty_like(weight)
    _cpp.masked_linear_weight_grad_into(_matrix(grad), _matrix(x), weight, bits.contiguous(), made)
    return made


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
    (down, right), (top, left), (dilated, apart), _ = unpacked(geometry)
    _, _, rows, columns = _outputs(shape, weight.shape, geometry)
    windows = windows.view(batch, rows, columns, *weight.shape[2:], channels)
    image = windows.new_zeros(batch, height + 2 * top, width + 2 * left, channels)
    for i, j in itertools.product(*map(range, weight.shape[2:])):
        y, x = i * dilated, j * apart
        seen = image[:, y : y + down * rows : down, x : x + right * columns : right]
        seen += windows[:, :, :, i, j]
    inner = image[:, top : top + height, left : left + width].permute(0, 3, 1, 2)
    return torch.empty_like(inner, memory_format=torch.channels_last).copy_(inner)


def _by_place(image: Tensor) -> Tensor:
    """(positions, channels) of an image in channels_last, in the same memory."""
    return _matrix(image.permute(0, 2, 3, 1))


def _image(shape: Sequence[int], like: Tensor) -> Tensor:
    own = {"dtype": like.dtype, "device": like.device}
    return torch.empty(shape, **own, memory_format=torch.channels_last)


def conv2d(x, weight, bits, bias, rows, geometry, dense_grad) -> Tensor:
    if not takes(x, weight, geometry):
        return layerwise.conv2d(x, weight, bits, bias, rows, geometry, dense_grad)
    shape = _outputs(x.shape, weight.shape, geometry)
    y = _image(shape, x)
    windows = _windows(x, weight, geometry)
    _cpp.masked_linear_into(windows, *_as_matrix(weight, bits), _bias(bias), _by_place(y))
    return y


def conv2d_input_grad(grad, x, weight, bits, rows, geometry) -> Tensor:
    if not takes(x, weight, geometry):
        return layerwise.conv2d_input_grad(grad, x, weight, bits, rows, geometry)
    by_row, matrix = _by_place(grad), _as_matrix(weight, bits)
    if _is_pointwise(weight, geometry):
        grad_x = _image(x.shape, grad)
        _cpp.masked_linear_input_grad_into(by_row, *matrix, _by_place(grad_x))
        return grad_x
    windows = grad.new_empty(len(by_row), matrix[0].shape[1])
    _cpp.masked_linear_input_grad_into(by_row, *matrix, windows)
    return _add_windows(windows, x.shape, weight, geometry)


def conv2d_weight_grad(grad, x, weight, bits, rows, geometry, dense_grad) -> Tensor:
    if dense_grad or not takes(x, weight, geometry):
        return layerwise.conv2d_weight_grad(grad, x, weight, bits, rows, geometry, dense_grad)
    made, windows = torch.empty_like(weight), _windows(x, weight, geometry)
    matrix = _as_matrix(weight, bits)
    into = made.permute(0, 2, 3, 1).view(matrix[0].shape)
    _cpp.masked_linear_weight_grad_into(_by_place(grad), windows, *matrix, into)
    return made
