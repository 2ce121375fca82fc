"""Every op in plain PyTorch: the definition, the oracle of the tests, and the fallback.

Weight view. A weight of shape (out, in, *taps) is seen as (out, taps, in); a linear weight has one
tap. Mask bits are int32 of shape (out, taps, ceil(in / 32)): bit j of word w is element
in = 32 w + j, and padding bits are 0.

Order. Larger |w| wins, ties go to the lower position (tensor in the list, out, tap, in), -0.0
equals 0.0, and NaN ranks above infinity with all NaN alike. Exactly k are kept, always.

Nothing here checks its input: `ops` does, once for all backends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 32
_KEY_OF = {torch.float64: (torch.float64, torch.int64)}  # others: exact in fp32, keys in int32


def weight_view(weight: Tensor) -> Tensor:
    """(out, in, *taps) seen as (out, taps, in), without a copy where strides allow."""
    return weight.unsqueeze(1) if weight.dim() == 2 else weight.flatten(2).transpose(1, 2)


def bits_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Shape of the mask bits of a weight of this shape."""
    out, inputs, *taps = shape
    return out, math.prod(taps), -(-inputs // WORD)


def key(value: Tensor) -> Tensor:
    """Integers >= 0 that order like |value|, with NaN on top."""
    real, integer = _KEY_OF.get(value.dtype, (torch.float32, torch.int32))
    keys = value.to(real).abs().view(integer)
    return torch.where(value.isnan(), torch.iinfo(integer).max, keys)


# ---- masks: pack, unpack, count, combine ---------------------------------------------------------


def _pack_view(view: Tensor) -> Tensor:
    """bool (out, taps, in) -> int32 words."""
    padded = F.pad(view, (0, -view.shape[-1] % WORD))
    words = padded.unflatten(-1, (-1, WORD)).to(torch.int64)
    powers = torch.ones(WORD, dtype=torch.int64, device=view.device)
    powers = powers << torch.arange(WORD, device=view.device)
    return (words * powers).sum(-1).to(torch.int32)  # int64 -> int32 keeps the low 32 bits


def _unpack_view(bits: Tensor, inputs: int) -> Tensor:
    """int32 words -> bool (out, taps, in)."""
    shifts = torch.arange(WORD, dtype=torch.int32, device=bits.device)
    return (((bits.unsqueeze(-1) >> shifts) & 1) != 0).flatten(-2)[..., :inputs]


def pack_mask(mask: Tensor) -> Tensor:
    return _pack_view(weight_view(mask))


def unpack_mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    view = _unpack_view(bits, shape[1])
    return view.transpose(1, 2).reshape(shape).contiguous()


def mask_count(bits: Tensor) -> Tensor:
    return _unpack_view(bits, bits.shape[-1] * WORD).sum()


def mask_and(a: Tensor, b: Tensor) -> Tensor:
    return a & b


def mask_or(a: Tensor, b: Tensor) -> Tensor:
    return a | b


def mask_andnot(a: Tensor, b: Tensor) -> Tensor:
    return a & ~b


# ---- masks: select -------------------------------------------------------------------------------


def _keep_largest(keys: Tensor, keep: int) -> Tensor:
    """bool mask of the `keep` largest of a flat list of keys; ineligible entries are negative."""
    keep = min(keep, int((keys >= 0).sum()))
    mask = torch.zeros_like(keys, dtype=torch.bool)
    mask[keys.argsort(descending=True, stable=True)[:keep]] = True
    return mask


def _keep_largest_of_lists(keys: list[Tensor], keep: Sequence[int]) -> list[Tensor]:
    """One count over all lists together, or one count per list."""
    if len(keep) == len(keys):
        return [
            _keep_largest(k.reshape(-1), n).view(k.shape) for k, n in zip(keys, keep, strict=True)
        ]
    if not keys:
        return []
    flat = _keep_largest(torch.cat([k.reshape(-1) for k in keys]), keep[0])
    parts = flat.split([k.numel() for k in keys])
    return [part.view(k.shape) for part, k in zip(parts, keys, strict=True)]


def nm_mask(weight: Tensor, n: int, m: int) -> Tensor:
    keys = key(weight_view(weight))
    groups = keys.unflatten(-1, (keys.shape[-1] // m, m))
    order = groups.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return _pack_view(mask.flatten(-2))


def topk_masks(
    weights: Sequence[Tensor], keep: Sequence[int], within: Sequence[Tensor] | None = None
) -> list[Tensor]:
    keys = [key(weight_view(w)) for w in weights]
    if within is not None:
        eligible = [_unpack_view(b, w.shape[1]) for b, w in zip(within, weights, strict=True)]
        keys = [torch.where(e, k, -1) for e, k in zip(eligible, keys, strict=True)]
    return [_pack_view(mask) for mask in _keep_largest_of_lists(keys, keep)]


# Scores of channels and blocks are sums of |w| in fixed point, so that they are the same in any
# order of summation: int64 sums of round(|w| * 2^38), saturating (NaN and infinity at once).
_FIXED_POINT = 2.0**38
_LARGEST = torch.iinfo(torch.int64).max


def _fixed(value: Tensor) -> Tensor:
    scaled = (value.to(torch.float64).abs() * _FIXED_POINT).round()
    fits = scaled < 2.0**63  # false for NaN too
    return torch.where(fits, torch.where(fits, scaled, 0.0).to(torch.int64), _LARGEST)


def _saturating_sum(value: Tensor, dims: Sequence[int]) -> Tensor:
    """Sum of non-negative int64 in two halves of 32 bits, so that no partial sum overflows."""
    high, low = (value >> 32).sum(dims), (value & 0xFFFFFFFF).sum(dims)
    high = high + (low >> 32)
    total = (high.clamp(max=2**31 - 1) << 32) | (low & 0xFFFFFFFF)
    return torch.where(high < 2**31, total, _LARGEST)


def _saturating_scale(value: Tensor, factor: int) -> Tensor:
    if factor == 0:
        return torch.zeros_like(value)
    return torch.where(value <= _LARGEST // factor, value * factor, _LARGEST)


def beta_shares(beta: float) -> tuple[int, int]:
    """Integer weights of the two sums of a channel score: beta = 0.8 gives 4 : 1."""
    share = Fraction(beta).limit_denominator(1000)
    return share.numerator, share.denominator - share.numerator


def channel_scores(
    weights: Sequence[Tensor], unstructured: Sequence[Tensor], nm: Sequence[Tensor], beta: float
) -> list[Tensor]:
    scores = []
    for weight, *masks in zip(weights, unstructured, nm, strict=True):
        fixed = _fixed(weight_view(weight))
        sums = [
            _saturating_scale(
                _saturating_sum(torch.where(_unpack_view(bits, weight.shape[1]), fixed, 0), (1, 2)),
                part,
            )
            for bits, part in zip(masks, beta_shares(beta), strict=True)
        ]
        total = sums[0] + sums[1]
        scores.append(torch.where(total < 0, _LARGEST, total))  # two's complement wrapped: too big
    return scores


def channel_masks(
    scores: Sequence[Tensor], keep: Sequence[int], shapes: Sequence[Sequence[int]]
) -> list[Tensor]:
    masks = []
    for score, count, shape in zip(scores, keep, shapes, strict=True):
        rows = _keep_largest(score, count)
        out, inputs, *taps = shape
        view = rows[:, None, None].expand(out, math.prod(taps), inputs)
        masks.append(_pack_view(view))
    return masks


def block_count(shape: Sequence[int], block: Sequence[int]) -> int:
    """Number of blocks in a weight of this shape."""
    out, inputs, *taps = shape
    if math.prod(shape) == 0:
        return 0
    rows = 1 if block[0] == -1 else out // block[0]
    return rows if block[1] == -1 else rows * math.prod(taps) * (inputs // block[1])


def block_masks(
    weights: Sequence[Tensor],
    keep: Sequence[int],
    block: Sequence[int],
    within: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    scores, views = [], []
    for index, weight in enumerate(weights):
        view = weight_view(weight)
        out, taps, inputs = view.shape
        if view.numel() == 0:  # no blocks
            scores.append(torch.empty((0, 0, 0), dtype=torch.int64, device=view.device))
            views.append((view.shape, None))
            continue
        rows = out if block[0] == -1 else block[0]
        span, cols = (taps, inputs) if block[1] == -1 else (1, block[1])
        tiles = (out // rows, rows, taps // span, span, inputs // cols, cols)
        score = _saturating_sum(_fixed(view).view(tiles), (1, 3, 5))
        if within is not None:  # a block is eligible where any of its elements is
            eligible = _unpack_view(within[index], inputs).reshape(tiles).any(5).any(3).any(1)
            score = torch.where(eligible, score, -1)
        scores.append(score)
        views.append((view.shape, tiles))
    masks = []
    for mask, (shape, tiles) in zip(_keep_largest_of_lists(scores, keep), views, strict=True):
        full = mask.new_empty(shape)
        if tiles is not None:
            full = mask[:, None, :, None, :, None].expand(tiles).reshape(shape)
        masks.append(_pack_view(full))
    return masks


def unified_masks(
    weights: Sequence[Tensor],
    keep: int,
    nm: tuple[int, int] | None,
    channel_keep: Sequence[int],
    beta: float,
    within: Sequence[Tensor] | None,
    nm_bits: Sequence[Tensor] | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    unstructured = topk_masks(weights, [keep], within)
    if nm is not None:
        nm_bits = [nm_mask(w, *nm) if w.shape[1] % nm[1] == 0 else ones(w) for w in weights]
    elif nm_bits is None:
        nm_bits = [ones(w) for w in weights]
    else:
        nm_bits = [bits.clone() for bits in nm_bits]
    scores = channel_scores(weights, unstructured, nm_bits, beta)
    channel = channel_masks(scores, channel_keep, [w.shape for w in weights])
    return unstructured, nm_bits, channel


def ones(weight: Tensor) -> Tensor:
    """Bits that keep every element of a weight (its padding bits are 0)."""
    return _pack_view(torch.ones_like(weight_view(weight), dtype=torch.bool))


# ---- masked weight, linear, convolution ----------------------------------------------------------


def masked_weight(weight: Tensor, bits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    # where, not a product: NaN and infinity in pruned places vanish too
    masked = torch.where(unpack_mask(bits, weight.shape), weight, 0.0)
    result = torch.empty_like(weight, dtype=dtype or weight.dtype)  # keeps the weight's strides
    return result.copy_(masked)


def masked_copy_(weight: Tensor, source: Tensor, bits: Tensor) -> None:
    weight.copy_(torch.where(unpack_mask(bits, weight.shape), source, weight))


def straight(weight: Tensor, bits: Tensor, dtype: torch.dtype, dense_grad: bool) -> Tensor:
    """The masked weight in operations that PyTorch can transform; with `dense_grad` it has the
    gradient of the weight."""
    mask = unpack_mask(bits, weight.shape)
    masked = torch.where(mask, weight, 0.0)
    if dense_grad:
        masked = masked + torch.where(mask, 0.0, weight - weight.detach())
    return masked.to(dtype)


def masked_linear(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, masked_weight(weight, bits, x.dtype), bias)


def masked_linear_input_grad(grad: Tensor, weight: Tensor, bits: Tensor) -> Tensor:
    return grad @ masked_weight(weight, bits, grad.dtype)


def masked_linear_weight_grad(
    grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, dense_grad: bool
) -> Tensor:
    product = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
    return weight_grad(product, weight, bits, dense_grad)


def weight_grad(product: Tensor, weight: Tensor, bits: Tensor, dense_grad: bool) -> Tensor:
    """A product as the gradient of a weight: masked or not, in the weight's dtype and strides."""
    grad = product if dense_grad else masked_weight(product, bits)
    return torch.empty_like(weight).copy_(grad)


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bits: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    masked = masked_weight(weight, bits, x.dtype)
    return F.conv2d(x, masked, bias, stride, padding, dilation, groups)


def convolution_grads(
    wanted: tuple[bool, bool],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of F.conv2d by x and by the weight, the wanted ones. Of a tensor whose gradient
    alone is wanted only shape and memory format are read."""
    return torch.ops.aten.convolution_backward.default(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [*wanted, False]
    )[:2]


def convolution_grad(wanted: int, *args) -> Tensor:
    """One gradient of F.conv2d: that by x (`wanted` = 0) or by the weight (1)."""
    return convolution_grads((wanted == 0, wanted == 1), *args)[wanted]


def masked_conv2d_input_grad(
    grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, *geometry
) -> Tensor:
    return convolution_grad(0, grad, x, masked_weight(weight, bits, grad.dtype), *geometry)


def masked_conv2d_weight_grad(
    grad: Tensor, x: Tensor, weight: Tensor, bits: Tensor, *geometry, dense_grad: bool
) -> Tensor:
    product = convolution_grad(1, grad, x, weight.to(x.dtype), *geometry)
    return weight_grad(product, weight, bits, dense_grad)
