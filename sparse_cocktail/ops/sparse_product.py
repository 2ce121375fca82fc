"""Ops of the `sparse_product` family: packed unstructured weights times dense activations.

Packed, a weight (out, in, *kernel) is three plain tensors. Input channels are split into `blocks`
blocks of ceil(in / blocks) neighbours, and kept weights are sorted by block, output, place:

    values  float32 (nnz,)            the kept weights
    places  int16 (nnz,)              channel within its block * taps + tap, as unsigned numbers
    starts  int32 (blocks, out + 1)   starts[b, o] to starts[b, o + 1] are output o's in block b

An output is the sum over its kept weights only, and the bias: a NaN or an infinity in x reaches the
outputs that have a kept weight on it, and no others. Results do not depend on the number of threads
or the layout of x; on different instruction sets they differ by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..reference import bits_shape, unpack_mask
from .checks import check_bits, check_device, check_tensor, check_weight, detached, pair
from .dispatch import define
from .masks import shape_of

__all__ = ["sparse_conv2d", "sparse_linear", "sparse_pack"]

_cpp = torch.ops.sparse_cocktail_cpp

# Inputs (channels x taps) whose weights lie together: their panel of activations fits the L2 cache,
# and an output's kept weights outnumber the reads and writes of its sum.
BLOCK_INPUTS = 384
_MOST_PLACES = 2**16


# ---- packing -------------------------------------------------------------------------------------


def _blocks(inputs: int, taps: int) -> tuple[int, int]:
    """Number of blocks, and input channels in each (the last may have fewer)."""
    if inputs == 0:
        return 0, 0
    most = max(1, BLOCK_INPUTS // taps)
    channels = -(-inputs // -(-inputs // most))
    return -(-inputs // channels), channels


def _pack(weight: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out, inputs = weight.shape[:2]
    taps = math.prod(weight.shape[2:])
    blocks, channels = _blocks(inputs, taps)

    def blocked(tensor: Tensor) -> Tensor:  # (blocks, out, places), missing channels are zero
        flat = tensor.reshape(out, inputs * taps)
        padded = F.pad(flat, (0, (blocks * channels - inputs) * taps))
        return padded.view(out, blocks, -1).transpose(0, 1)

    if weight.numel() == 0:
        empty = weight.new_zeros((blocks, out + 1), dtype=torch.int32)
        return weight.new_empty(0), empty.new_empty(0, dtype=torch.int16), empty
    mask = blocked(unpack_mask(bits, weight.shape))
    places = mask.nonzero()[:, 2]
    ends = mask.sum(-1).view(-1).cumsum(0).view(blocks, out)
    firsts = F.pad(ends[:-1, -1], (1, 0))
    starts = torch.cat([firsts[:, None], ends], 1).to(torch.int32)
    return blocked(weight)[mask], places.to(torch.int16), starts


def _check_pack(weight: Tensor, bits: Tensor) -> None:
    check_weight("sparse_pack", weight)
    check_bits("sparse_pack", bits, bits_shape(weight.shape))
    check_device("sparse_pack", bits, weight, "bits")
    if weight.dtype != torch.float32:
        raise TypeError(
            f"sparse_pack: weight has dtype {weight.dtype}, but sparse products are in float32; "
            "pass weight.float()"
        )
    if math.prod(weight.shape[2:]) > _MOST_PLACES or weight.numel() >= 2**31:
        raise ValueError(
            f"sparse_pack: weight has shape {tuple(weight.shape)}, but kernels have at most "
            f"{_MOST_PLACES} taps and weights fewer than 2^31 elements; leave the layer dense"
        )


def _pack_fake(weight: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    taps = math.prod(weight.shape[2:])
    blocks, _ = _blocks(weight.shape[1], taps)
    return (
        weight.new_empty(kept),
        weight.new_empty(kept, dtype=torch.int16),
        weight.new_empty((blocks, weight.shape[0] + 1), dtype=torch.int32),
    )


_packed = define(
    "sparse_pack(Tensor weight, Tensor bits) -> (Tensor, Tensor, Tensor)",
    reference=_pack,
    cpp=_pack,  # a few passes of torch over the weight, once per mask
    fake=_pack_fake,
    check=_check_pack,
)


def sparse_pack(weight: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kept weights, packed for `sparse_linear` and `sparse_conv2d`.

    Packing reads the weight once and costs as much as a few products: do it when the mask is set.

    Args:
        weight: (out, in) or (out, in, kh, kw), float32.
        bits: int32 (out, taps, ceil(in / 32)).

    Returns:
        (values, places, starts), see above. They keep no gradient.
    """
    return _packed(detached(weight), bits)


def _unpack(values: Tensor, places: Tensor, starts: Tensor, shape: Sequence[int]) -> Tensor:
    """The dense weight, zero where it was pruned."""
    out, inputs = shape[:2]
    taps = math.prod(shape[2:])
    blocks, channels = _blocks(inputs, taps)
    counts = starts.diff(dim=1).reshape(-1)
    rows = torch.arange(blocks * out, device=values.device).repeat_interleave(counts)
    dense = values.new_zeros(blocks * out, channels * taps)
    dense[rows, places.long() % _MOST_PLACES] = values
    dense = dense.view(blocks, out, channels * taps).transpose(0, 1)
    dense = dense.reshape(out, blocks * channels * taps)
    return dense[:, : inputs * taps].reshape(tuple(shape))


# ---- products ------------------------------------------------------------------------------------


def _check_product(op: str, x: Tensor, packed: tuple, bias: Tensor | None, shape) -> None:
    values, places, starts = packed
    device = values.device
    for name, tensor, dtype in (
        ("x", x, torch.float32),
        ("values", values, torch.float32),
        ("places", places, torch.int16),
        ("starts", starts, torch.int32),
        ("bias", bias, torch.float32),
    ):
        if tensor is None:
            continue
        if tensor.dtype is not dtype:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, but it must be {dtype}")
        if tensor.device != device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, but values are on {device}; move it"
            )
    wanted = (_blocks(shape[1], math.prod(shape[2:]))[0], shape[0] + 1)
    if starts.shape != wanted or values.dim() != 1 or values.shape != places.shape:
        raise ValueError(
            f"{op}: values, places and starts have shapes {tuple(values.shape)}, "
            f"{tuple(places.shape)} and {tuple(starts.shape)}, but a weight of shape "
            f"{tuple(shape)} has (nnz,), (nnz,) and {wanted}; make them with ops.sparse_pack"
        )
    if bias is not None and bias.shape != (shape[0],):
        raise ValueError(
            f"{op}: bias has shape {tuple(bias.shape)}, but the weight has {shape[0]} outputs; "
            "give a bias of shape (out,)"
        )


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether a derivative by one of the tensors is asked for, backward or forward."""
    given = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return True
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in given)


def _refuse_gradient(op: str, *tensors: Tensor | None) -> None:
    if differentiates(*tensors):
        raise RuntimeError(
            f"{op}: an argument requires a gradient, but this op is for inference only; call it "
            "under torch.no_grad(), or use the masked op of the same name"
        )


def _into(x, values, places, starts, bias, out, channels_last, *geometry) -> None:
    if x.shape[1] == 0:  # no block of inputs: nothing is packed
        out.copy_(torch.zeros(()) if bias is None else bias[:, None, None])
    elif out.numel():
        bias = None if bias is None else bias.contiguous()
        _cpp.sparse_conv2d_into(x, values, places, starts, bias, out, channels_last, *geometry)


def _linear_cpp(x, values, places, starts, out_features, bias=None) -> Tensor:
    # Rows are the pixels of one image in channels_last.
    out = x.new_empty((*x.shape[:-1], out_features))
    rows = math.prod(x.shape[:-1])
    pixels = x.contiguous().view(1, 1, rows, x.shape[-1]).permute(0, 3, 1, 2)
    image = out.view(1, 1, rows, out_features).permute(0, 3, 1, 2)
    ones, zeros = [1, 1], [0, 0]
    _into(pixels, values, places, starts, bias, image, True, ones, ones, zeros, ones)
    return out


def _linear_reference(x, values, places, starts, out_features, bias=None) -> Tensor:
    return F.linear(x, _unpack(values, places, starts, (out_features, x.shape[-1])), bias)


def _check_linear(x, values, places, starts, out_features, bias=None) -> None:
    if x.dim() < 1:
        raise ValueError("sparse_linear: x has no dimension, but it must end in `in`; reshape it")
    shape = (out_features, x.shape[-1])
    _check_product("sparse_linear", x, (values, places, starts), bias, shape)


_linear = define(
    "sparse_linear(Tensor x, Tensor values, Tensor places, Tensor starts, SymInt out_features, "
    "Tensor? bias=None) -> Tensor",
    reference=_linear_reference,
    cpp=_linear_cpp,
    fake=lambda x, values, places, starts, out_features, bias=None: x.new_empty(
        (*x.shape[:-1], out_features)
    ),
    check=_check_linear,
)


def sparse_linear(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    starts: Tensor,
    out_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    """F.linear(x, where(mask, weight, 0), bias) from packed weights, in float32, without gradient.

    Args:
        x: (..., in).
        values, places, starts: from `sparse_pack` of a weight (out_features, in).
        bias: (out_features,).

    Returns:
        (..., out_features).
    """
    _refuse_gradient("sparse_linear", x, values, bias)
    return _linear(x, values, places, starts, out_features, bias)


def _out_sizes(x: Tensor, weight_shape, stride, padding, dilation) -> list[int]:
    return [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight_shape[2 + i] - 1) - 1) // stride[i]
        + 1
        for i in (0, 1)
    ]


def _empty_out(x: Tensor, weight_shape, stride, padding, dilation) -> Tensor:
    layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    shape = (x.shape[0], weight_shape[0], *_out_sizes(x, weight_shape, stride, padding, dilation))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _conv_cpp(x, values, places, starts, bias, weight_shape, stride, padding, dilation) -> Tensor:
    last = _is_channels_last(x)
    out = _empty_out(x, weight_shape, stride, padding, dilation)
    x = x if last else x.contiguous()
    geometry = weight_shape[2:], stride, padding, dilation
    _into(x, values, places, starts, bias, out, last, *geometry)
    return out


def _conv_reference(
    x, values, places, starts, bias, weight_shape, stride, padding, dilation
) -> Tensor:
    weight = _unpack(values, places, starts, weight_shape)
    return F.conv2d(x, weight, bias, stride, padding, dilation)


def _check_conv(x, values, places, starts, bias, weight_shape, stride, padding, dilation) -> None:
    if x.dim() != 4 or len(weight_shape) != 4 or x.shape[1] != weight_shape[1]:
        raise ValueError(
            f"sparse_conv2d: x has shape {tuple(x.shape)} and weight_shape is "
            f"{tuple(weight_shape)}; they must be (batch, in, height, width) and (out, in, kh, "
            "kw), groups=1: use masked_conv2d for grouped convolutions"
        )
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0 or min(weight_shape[2:]) < 1:
        raise ValueError(
            f"sparse_conv2d: kernel={tuple(weight_shape[2:])}, stride={tuple(stride)}, "
            f"padding={tuple(padding)}, dilation={tuple(dilation)}; padding must be at least 0 "
            "and the others at least 1"
        )
    if min(_out_sizes(x, weight_shape, stride, padding, dilation)) < 1:
        raise ValueError(
            f"sparse_conv2d: x has shape {tuple(x.shape)}, which with padding={tuple(padding)} is "
            f"smaller than the kernel {tuple(weight_shape[2:])} with dilation={tuple(dilation)}; "
            "pad x"
        )
    _check_product("sparse_conv2d", x, (values, places, starts), bias, weight_shape)


_conv = define(
    "sparse_conv2d(Tensor x, Tensor values, Tensor places, Tensor starts, Tensor? bias, "
    "SymInt[] weight_shape, SymInt[] stride, SymInt[] padding, SymInt[] dilation) -> Tensor",
    reference=_conv_reference,
    cpp=_conv_cpp,
    fake=lambda x, values, places, starts, bias, *geometry: _empty_out(x, *geometry),
    check=_check_conv,
)


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """F.conv2d(x, where(mask, weight, 0), bias, ...) from packed weights, without gradient.

    Args:
        x: (batch, in, height, width) or (in, height, width), float32.
        values, places, starts: from `sparse_pack` of a weight of shape `weight_shape`.
        bias: (out,).
        weight_shape: (out, in, kh, kw); grouped convolutions raise ValueError.
        stride, padding, dilation: an int or a pair.

    Returns:
        (batch, out, height', width'), channels_last where x is. Contiguous is the faster one.
    """
    _refuse_gradient("sparse_conv2d", x, values, bias)
    check_tensor("sparse_conv2d", "x", x)
    batched = x if x.dim() != 3 else x.unsqueeze(0)
    result = _conv(
        batched,
        values,
        places,
        starts,
        bias,
        shape_of("sparse_conv2d", weight_shape),
        pair("sparse_conv2d", "stride", stride),
        pair("sparse_conv2d", "padding", padding),
        pair("sparse_conv2d", "dilation", dilation),
    )
    return result if x.dim() != 3 else result.squeeze(0)
