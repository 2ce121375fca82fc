"""The ops of the `nm` family in plain PyTorch: definition, oracle of the tests, and fallback.

Compressed. `values` (out, taps, in * n / m) are the kept weights of each group of m in order of
position, followed by zeros where fewer than n are kept, and `bits` are the mask.

Packed (2:4 on sparse tensor cores). A weight (out, in) is padded to blocks of 16 rows x 64 columns,
4 ceil(out / 64) by ceil(in / 64) of them, and each block lies as the threads of a warp hold it for
two m16n8k32 instructions, which take 32 columns, 16 of them compressed, each:

    packed (rows / 16, columns / 64, 2, 32, 8)   [.., half of the columns, lane, 8 values]
    meta   (rows / 16, columns / 64, 32)         [.., lane], int32

Lane 4 g + t holds of each half the compressed columns 2 t, 2 t + 1 of rows g and g + 8, and then
columns 2 t + 8, 2 t + 9 of the same. Lane 4 g + 2 h + j of the metadata holds row g (low 16 bits)
and row g + 8 (high) of columns 32 h + 16 j to .. + 15: four nibbles i0 | i1 << 2, the first group
in the lowest, where i0 < i1 are the places of a group's two values. Where fewer than two are kept,
zeros take the lowest places that are free. The packed form is of this version; files never hold it.

Nothing here checks its input: `ops` does, once for all backends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import _unpack_view, nm_mask, weight_view

ROWS, COLUMNS = 64, 64  # a packed weight is padded to multiples of these


# ---- compressed ----------------------------------------------------------------------------------


def group_sizes(bits: Tensor, inputs: int, m: int) -> Tensor:
    """How many elements of each group of m the bits keep: (out, taps, in / m)."""
    return _groups(bits, inputs, m).sum(-1)


def _groups(bits: Tensor, inputs: int, m: int) -> Tensor:
    """bool (out, taps, in / m, m)."""
    return _unpack_view(bits, inputs).unflatten(-1, (inputs // m, m))


def _places(groups: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Of each group, the places of n elements, kept ones first, and which of these are kept."""
    places = groups.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)[..., :n]
    return places, groups.gather(-1, places)


# torch.gather and scatter change the bits of some NaN: values move as integers, without a gradient.
# With `exact` false they move as they are. An extra zero per group stands for what is not kept.
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def _taken(elements: Tensor, places: Tensor, kept: Tensor, exact: bool = True) -> Tensor:
    dtype = elements.dtype
    if exact:
        return _taken(elements.view(_INTEGERS[dtype.itemsize]), places, kept, False).view(dtype)
    return F.pad(elements, (0, 1)).gather(-1, places.masked_fill(~kept, elements.shape[-1]))


def _put(values: Tensor, places: Tensor, size: int, exact: bool = True) -> Tensor:
    dtype = values.dtype
    if exact:
        return _put(values.view(_INTEGERS[dtype.itemsize]), places, size, False).view(dtype)
    return values.new_zeros(*places.shape[:-1], size).scatter(-1, places, values)


def nm_compress(
    weight: Tensor,
    n: int,
    m: int,
    bits: Tensor | None = None,
    dtype: torch.dtype | None = None,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    bits = nm_mask(weight, n, m) if bits is None else bits.clone()
    inputs = weight.shape[1]
    elements = weight_view(weight).unflatten(-1, (inputs // m, m))
    values = _taken(elements, *_places(_groups(bits, inputs, m), n), exact)
    return values.flatten(-2).to(dtype or weight.dtype), bits


def nm_decompress(
    values: Tensor, bits: Tensor, n: int, m: int, shape: Sequence[int], exact: bool = True
) -> Tensor:
    out, inputs, *taps = shape
    places, kept = _places(_groups(bits, inputs, m), n)
    found = values.unflatten(-1, (inputs // m, n))
    elements = _put(found, places.masked_fill(~kept, m), m + 1, exact)[..., :m]
    return elements.reshape(out, *taps, inputs).movedim(-1, 1)


def activated(y: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return F.relu(y)
    return F.gelu(y) if activation == "gelu" else y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Sum, bias and activation in float32 (float64 for such x), then one rounding."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return activated(y, activation).to(x.dtype)


def nm_linear(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    n: int,
    m: int,
    bias: Tensor | None = None,
    activation: str = "none",
    exact: bool = True,
) -> Tensor:
    weight = nm_decompress(values, bits, n, m, (values.shape[0], x.shape[-1]), exact)
    return linear(x, weight, bias, activation)


# ---- packed --------------------------------------------------------------------------------------


def _pack(weight: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    out, inputs = weight.shape
    padding = (0, -inputs % COLUMNS, 0, -out % ROWS)
    mask = F.pad(_unpack_view(bits, inputs)[:, 0], padding)
    dense = F.pad(weight, padding)
    rows, columns = dense.shape
    groups = mask.view(rows, columns // 4, 4)
    places = _places(groups, 2)[0].sort(dim=-1)[0]
    found = _taken(dense.view(groups.shape), places, groups.gather(-1, places))

    # row = 16 block + 8 high + g, compressed column = 32 block + 16 half + 8 right + 2 t + element
    view = found.view(rows // 16, 2, 8, columns // 64, 2, 2, 4, 2)
    packed = view.permute(0, 3, 4, 2, 6, 5, 1, 7).reshape(rows // 16, columns // 64, 2, 32, 8)

    nibbles = (places[..., 0] | places[..., 1] << 2).view(rows // 16, 2, 8, columns // 64, 4, 4)
    words = (nibbles << torch.arange(0, 16, 4, device=nibbles.device)).sum(-1)
    words = words[:, 0] | words[:, 1] << 16  # (row block, g, column block, 2 half + j)
    meta = words.permute(0, 2, 1, 3).reshape(rows // 16, columns // 64, 32)
    return packed, meta.to(torch.int32)  # int64 -> int32 keeps the low 32 bits


def nm_pack(values: Tensor, bits: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    shape = (values.shape[0], values.shape[-1] // n * m)
    return _pack(nm_decompress(values, bits, n, m, shape), bits)


def nm_pack_weight(
    weight: Tensor, bits: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    bits = nm_mask(weight, 2, 4) if bits is None else bits
    return _pack(weight.to(dtype or weight.dtype), bits)


def nm_unpack(packed: Tensor, meta: Tensor, shape: Sequence[int]) -> Tensor:
    """The dense weight (out, in) of a packed one."""
    out, inputs = shape
    blocks, across = packed.shape[:2]
    rows, columns = 16 * blocks, COLUMNS * across
    view = packed.view(blocks, across, 2, 8, 4, 2, 2, 2)
    found = view.permute(0, 6, 3, 1, 2, 5, 4, 7).reshape(rows, columns // 4, 2)
    words = meta.view(blocks, across, 8, 4).permute(0, 2, 1, 3)  # as in _pack
    words = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], 1).to(torch.int64)
    nibbles = words.unsqueeze(-1) >> torch.arange(0, 16, 4, device=meta.device) & 15
    nibbles = nibbles.reshape(rows, columns // 4)
    places = torch.stack([nibbles & 3, nibbles >> 2], -1)
    return _put(found, places, 4).view(rows, columns)[:out, :inputs]


def nm_linear_packed(
    x: Tensor,
    packed: Tensor,
    meta: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    return linear(x, nm_unpack(packed, meta, (out_features, x.shape[-1])), bias, activation)


def packed_shapes(out: int, inputs: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `packed` and `meta` of a weight (out, in)."""
    blocks = (ROWS // 16 * ((out + ROWS - 1) // ROWS), (inputs + COLUMNS - 1) // COLUMNS)
    return (*blocks, 2, 32, 8), (*blocks, 32)


def values_shape(shape: Sequence[int], n: int, m: int) -> tuple[int, int, int]:
    """Shape of the compressed values of a weight of this shape."""
    out, inputs, *taps = shape
    return out, math.prod(taps), inputs // m * n
