"""Masked weights: where(mask, w, 0), of one weight or a list, and in place; masked copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..reference import bits_shape
from .checks import (
    as_list,
    check_bits,
    check_device,
    check_same_length,
    check_weight,
    check_weights,
)
from .dispatch import define, eager, gradient, inside, lazy_triton, undispatched
from .masks import packed, strided

__all__ = ["live_rows", "masked_copy_", "masked_weight", "masked_weight_", "masked_weights"]

_cpp = torch.ops.sparse_cocktail_cpp


# ---- masked weight -------------------------------------------------------------------------------


def check_target(op: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"{op}: dtype={dtype!r} is no floating-point torch.dtype; give one, such as "
            "torch.bfloat16, or leave it out"
        )


def _check_masked_weight(weight, bits, dtype=None) -> None:
    check_weight("masked_weight", weight)
    check_target("masked_weight", dtype)
    check_bits("masked_weight", bits, bits_shape(weight.shape))
    check_device("masked_weight", bits, weight, "bits")


def maskable(weight: Tensor, result: Tensor) -> bool:
    """Whether C++ can write the masked weight straight into a result."""
    dtypes = weight.dtype, result.dtype
    known = dtypes[0] == dtypes[1] or dtypes in _CASTS
    return known and strided(weight) is weight and result.stride() == weight.stride()


def _masked_weight_cpp(weight, bits, dtype=None) -> Tensor:
    result = torch.empty_like(weight, dtype=dtype)
    if maskable(weight, result):
        _cpp.masked_weights_into([weight], [bits.contiguous()], [result])
        return result
    return _masked_weights_cpp([weight], [bits], dtype)[0]


def _masked_weights_cpp(weights, bits, dtype=None, dense_grad=False) -> list[Tensor]:
    if not weights:
        return []
    own = weights[0].dtype
    dtype = dtype or own
    if dtype != own and (own, dtype) not in _CASTS:
        return [w.to(dtype) for w in _masked_weights_cpp(weights, bits)]
    results = [torch.empty_like(w, dtype=dtype) for w in weights]
    if all(map(maskable, weights, results)):
        _cpp.masked_weights_into(weights, packed(bits), results)
        return results
    sources = [strided(w) for w in weights]
    results = [torch.empty_like(s, dtype=dtype) for s in sources]
    for index, (source, result) in enumerate(zip(sources, results, strict=True)):
        if source.stride() != result.stride():  # a slice with gaps
            sources[index] = torch.empty_like(source).copy_(source)
    _cpp.masked_weights_into(sources, packed(bits), results)
    return [
        result if strided(weight) is weight else torch.empty_like(weight, dtype=dtype).copy_(result)
        for weight, result in zip(weights, results, strict=True)
    ]


_CASTS = {(torch.float32, torch.bfloat16), (torch.float32, torch.float16)}  # made on the way


define(
    "masked_weight(Tensor weight, Tensor bits, ScalarType? dtype=None) -> Tensor",
    triton=lazy_triton("triton_masks", "masked_weight"),
    reference=reference.masked_weight,
    cpp=_masked_weight_cpp,
    fake=lambda weight, bits, dtype=None: torch.empty_like(weight, dtype=dtype),
    check=_check_masked_weight,
)


def _save_weight(ctx, inputs, output) -> None:
    weight, bits, _ = inputs
    save_bits(ctx, bits)
    ctx.dtype = weight.dtype


def _weight_backward(ctx, grad):
    (bits,) = saved_bits(ctx, "masked_weight")
    return _weight(grad, bits, ctx.dtype), None, None


def masked_weight(weight: Tensor, bits: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """where(mask, weight, 0), cast to `dtype` when given; strides as the weight's.

    The gradient reaches the kept weights only.
    """
    return _weight(weight, bits, dtype)


def _check_in_place(weight, bits) -> None:
    check_weight("masked_weight_", weight)
    check_bits("masked_weight_", bits, bits_shape(weight.shape))
    check_device("masked_weight_", bits, weight, "bits")


def _in_place_reference(weight, bits) -> None:
    weight.copy_(reference.masked_weight(weight, bits))


def _in_place_cpp(weight, bits) -> None:
    source = strided(weight)
    if source is weight and torch.empty_like(weight).stride() == weight.stride():
        _cpp.masked_weights_into([weight], packed([bits]), [weight])
    else:  # a slice with gaps
        weight.copy_(_masked_weights_cpp([weight], [bits])[0])


_weight_in_place = define(
    "masked_weight_(Tensor(a!) weight, Tensor bits) -> ()",
    triton=lazy_triton("triton_masks", "masked_weight_"),
    reference=_in_place_reference,
    cpp=_in_place_cpp,
    fake=lambda weight, bits: None,
    check=_check_in_place,
)


def masked_weight_(weight: Tensor, bits: Tensor) -> Tensor:
    """`masked_weight` in place, for values that need no gradient; returns the weight."""
    _weight_in_place(weight, bits)
    return weight


def _check_masked_weights(weights, bits, dtype, dense_grad) -> None:
    check_weights("masked_weights", weights)
    check_target("masked_weights", dtype)
    check_same_length("masked_weights", weights, bits, "bits")
    for index, (weight, words) in enumerate(zip(weights, bits, strict=True)):
        check_bits("masked_weights", words, bits_shape(weight.shape), f"bits[{index}]")
        check_device("masked_weights", words, weight, f"bits[{index}]")


_weights = define(
    "masked_weights(Tensor[] weights, Tensor[] bits, ScalarType? dtype, bool dense_grad) "
    "-> Tensor[]",
    triton=lazy_triton("triton_masks", "masked_weights"),
    reference=lambda weights, bits, dtype, dense_grad: [
        reference.masked_weight(w, b, dtype) for w, b in zip(weights, bits, strict=True)
    ],
    cpp=_masked_weights_cpp,
    fake=lambda weights, bits, dtype, dense_grad: [
        torch.empty_like(w, dtype=dtype) for w in weights
    ],
    check=_check_masked_weights,
)


def _save_weights(ctx, inputs, output) -> None:
    weights, bits, _, ctx.dense_grad = inputs
    save_bits(ctx, *bits)
    ctx.dtype = weights[0].dtype if weights else None


def _weights_backward(ctx, grads):
    bits = saved_bits(ctx, "masked_weights")
    used = [i for i, grad in enumerate(grads) if grad is not None]
    if ctx.dense_grad:
        made = [grads[i].to(ctx.dtype) for i in used]
    else:
        some = [grads[i] for i in used]
        unseen = not torch.is_grad_enabled() and eager(some)
        mask = _unchecked_weights if unseen else masked_weights
        made = mask(some, [bits[i] for i in used], ctx.dtype, False)
    by_weight = dict(zip(used, made, strict=True))
    return [by_weight.get(i) for i in range(len(bits))], [None] * len(bits), None, None


class _EagerWeights(torch.autograd.Function):
    """The op's gradient in plain eager mode, without its way through PyTorch's dispatcher, which
    converts every tensor of a list three times."""

    @staticmethod
    def forward(ctx, bits, dtype, dense_grad, *weights):
        ctx.set_materialize_grads(False)
        _save_weights(ctx, (weights, bits, dtype, dense_grad), None)
        return tuple(_weights_kernel(weights, bits, dtype, dense_grad))

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *_weights_backward(ctx, grads)[0]


def masked_weights(
    weights: Sequence[Tensor],
    bits: Sequence[Tensor],
    dtype: torch.dtype | None = None,
    dense_grad: bool = False,
) -> list[Tensor]:
    """`masked_weight` of a whole list of weights in one call; with `dense_grad` their gradients
    are not masked (straight-through)."""
    weights = as_list("masked_weights", "weights", weights)
    bits = as_list("masked_weights", "bits", bits)
    if not eager((*weights, *bits)):
        return _weights(weights, bits, dtype, dense_grad)
    if torch.is_grad_enabled() and any(w.requires_grad for w in weights):
        return list(_EagerWeights.apply(bits, dtype, dense_grad, *weights))
    return _weights_kernel(weights, bits, dtype, dense_grad)


def _check_masked_copy(weights, sources, bits) -> None:
    check_weights("masked_copy_", weights)
    check_same_length("masked_copy_", weights, sources, "sources")
    check_same_length("masked_copy_", weights, bits, "bits")
    for index, (weight, source, words) in enumerate(zip(weights, sources, bits, strict=True)):
        name = f"sources[{index}]"
        if source.shape != weight.shape or source.dtype != weight.dtype:
            raise ValueError(
                f"masked_copy_: {name} has shape {tuple(source.shape)} and dtype {source.dtype}, "
                f"but weights[{index}] {tuple(weight.shape)} and {weight.dtype}; give one like it"
            )
        check_device("masked_copy_", source, weight, name)
        check_bits("masked_copy_", words, bits_shape(weight.shape), f"bits[{index}]")
        check_device("masked_copy_", words, weight, f"bits[{index}]")


def _masked_copy_reference(weights, sources, bits) -> None:
    for weight, source, words in zip(weights, sources, bits, strict=True):
        reference.masked_copy_(weight, source, words)


def _masked_copy_cpp(weights, sources, bits) -> None:
    triples = list(zip(weights, sources, packed(bits), strict=True))
    for weight, source, words in triples:
        if not maskable(weight, source):  # such as a slice with gaps
            reference.masked_copy_(weight, source, words)
    if alike := [triple for triple in triples if maskable(*triple[:2])]:
        _cpp.masked_copy_into(*map(list, zip(*alike, strict=True)))


_copy = define(
    "masked_copy_(Tensor(a!)[] weights, Tensor[] sources, Tensor[] bits) -> ()",
    reference=_masked_copy_reference,
    cpp=_masked_copy_cpp,
    fake=lambda weights, sources, bits: None,
    check=_check_masked_copy,
)


def masked_copy_(
    weights: Sequence[Tensor], sources: Sequence[Tensor], bits: Sequence[Tensor]
) -> None:
    """weights[i] = where(mask, sources[i], weights[i]) in place, for values that need no gradient.

    Args:
        weights: of one dtype.
        sources: like the weights.
        bits: int32 (out, taps, ceil(in / 32)), per weight.
    """
    names = ("weights", weights), ("sources", sources), ("bits", bits)
    _copy(*(as_list("masked_copy_", name, tensors) for name, tensors in names))


def live_rows(bits: Tensor) -> Tensor:
    """Outputs that keep a weight: int64 (live,), ascending. Waits for the device: how many there
    are is a shape.

    Args:
        bits: int32 (out, taps, words).
    """
    return bits.flatten(1).ne(0).any(1).nonzero().flatten()


# ---- saved bits ----------------------------------------------------------------------------------
# Bits are a buffer that changes in place when the subnet is switched. Autograd notices that for
# saved tensors, but under gradient checkpointing the recomputed forward would silently read the new
# mask: the version that the first forward saw is kept as a number and compared.


def save_bits(ctx, *bits: Tensor, others: tuple[Tensor | None, ...] = ()) -> None:
    ctx.save_for_backward(*bits, *others)
    ctx.count = len(bits)
    ctx.versions = [b._version for b in bits]


def saved_bits(ctx, op: str) -> tuple[Tensor, ...]:
    saved = ctx.saved_tensors
    if [bits._version for bits in saved[: ctx.count]] != ctx.versions:
        raise RuntimeError(
            f"{op}: bits were changed in place between forward and backward, so the gradient would "
            "belong to another subnet; end the backward of a pass before the next activate()"
        )
    return saved


def _plain_weight(weight, bits, dtype=None) -> Tensor:
    return reference.straight(weight, bits, dtype or weight.dtype, False)


_weights_kernel, _unchecked_weights = undispatched("masked_weights"), inside("masked_weights")
_weight = gradient("masked_weight", _weight_backward, _save_weight, _plain_weight)
gradient("masked_weights", _weights_backward, _save_weights)
