"""Inference of masked layers with packed weights, where the measured table says that it is faster.

Packing costs as much as a few products, so a layer is packed at its second such call with the same
weights and mask. What was packed lies beside the layer, not in it: copies, pickles and state dicts
know nothing of it. It takes 6 bytes per kept weight.

It is dropped when the layer trains, and when weights or mask have changed: by their version, and,
as fused optimizers and writes through `.data` leave that alone, by a sample of their values.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import ops
from .ops import routes
from .ops.sparse_product import differentiates

__all__ = ["forget", "packed_weight"]


# Rows below which a linear layer stays dense: one row gains little, and with one thread it loses.
LEAST_ROWS = 4
SAMPLE = 512


@dataclass
class _Pack:
    key: tuple  # which weights and mask
    density: float
    tensors: tuple[Tensor, Tensor, Tensor] | None = None
    sample: list[Tensor] | None = None  # of the values that were packed


_packs: WeakKeyDictionary[nn.Module, _Pack] = WeakKeyDictionary()


def packed_weight(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The packed weight of a masked layer, or None where it computes with W*m.

    It is for inference in fp32 on a CPU: in eval mode, without gradient or autocast, with groups=1.
    """
    weight, bits = layer.weight, layer.mask_bits
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if layer.training or not _plain(layer, x):
        forget(layer)
        return None
    if differentiates(x, *layer.parameters(recurse=False)):
        forget(layer)
        return None
    key = (weight.data_ptr(), weight._version, bits.data_ptr(), bits._version)
    pack = _packs.get(layer)
    if pack is None or pack.key != key:
        _packs[layer] = _Pack(key, layer.density)
        return None
    is_conv = weight.dim() == 4
    rows = x.numel() // max(1, x.shape[-3] if is_conv else x.shape[-1])
    if is_conv:
        rows //= layer.stride[0] * layer.stride[1]
    elif rows < LEAST_ROWS:
        return None
    op = "sparse_conv2d" if is_conv else "sparse_linear"
    if not routes.chosen_sparse(op, rows, weight, pack.density):
        return None
    samples = [_sample(weight), _sample(bits)]
    if pack.tensors is None:
        pack.tensors = ops.sparse_pack(weight, bits)
        pack.sample = [sample.clone() for sample in samples]
    elif not all(map(torch.equal, samples, pack.sample)):
        _packs[layer] = _Pack(key, layer.density)
        return None
    return pack.tensors


def _sample(tensor: Tensor) -> Tensor:
    """Some values at even distances in memory, as a view."""
    count = min(tensor.numel(), SAMPLE)
    step = tensor.numel() // max(1, count)
    return tensor.detach().as_strided((count,), (step,), tensor.storage_offset())


def forget(layer: nn.Module) -> None:
    """Drop what was packed of a layer."""
    _packs.pop(layer, None)


def _plain(layer: nn.Module, x: Tensor) -> bool:
    weight, bits = layer.weight, layer.mask_bits
    return (
        x.device.type == weight.device.type == "cpu"
        and ops.autocast_dtype(x) == weight.dtype == torch.float32
        and type(x) is Tensor
        and not weight.is_inference()
        and not bits.is_inference()
        and getattr(layer, "groups", 1) == 1
        and x.dim() >= 3 * (weight.dim() == 4)
    )
