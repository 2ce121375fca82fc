"""The masked weights of all layers in one call, where launching them one by one is what costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from . import ops
from .modules import masked_layers

__all__ = ["premasked"]


@contextmanager
def premasked(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside, layers with a mask take their W*m from one `masked_weights` call.

    Wrap the forward pass; its backward may come later and makes W*m of one layer at a time anew.
    While the block lasts, one copy of the masked weights is held in `dtype`: this trades memory for
    launches, which pays where a network of small layers runs eagerly on a GPU. A layer whose input
    has another dtype masks its own weight as always, and so do layers with few live rows.

    Args:
        model: a model with masked layers, as `convert` makes it.
        dtype: of the copies; by default autocast's where it is on, else that of the weights.
    """
    layers = [m for m in masked_layers(model).values() if m.masked and m.rows is None]
    if dtype is None and layers:
        device = layers[0].weight.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
    copies = _Copies()
    for dense_grad in (False, True):
        some = [layer for layer in layers if layer.dense_grad is dense_grad]
        for weight_dtype in {layer.weight.dtype for layer in some}:
            copies.add([m for m in some if m.weight.dtype == weight_dtype], dtype, dense_grad)
    try:
        with saved_tensors_hooks(copies.pack, copies.unpack):
            yield
    finally:
        for layer in layers:
            layer.premasked = None
        copies.known.clear()


class _Copies:
    """Which saved tensors are masked weights: instead of these, the way to make them is kept."""

    def __init__(self) -> None:
        self.known: dict[int, tuple] = {}  # by address; the copies live as long as their entry

    def add(self, layers: list, dtype: torch.dtype | None, dense_grad: bool) -> None:
        weights, bits = [m.weight for m in layers], [m.mask_bits for m in layers]
        made = ops.masked_weights(weights, bits, dtype, dense_grad)
        for layer, copy, weight, words in zip(layers, made, weights, bits, strict=True):
            layer.premasked = copy
            if copy.numel():
                address = copy.untyped_storage().data_ptr()
                held = weight.detach(), words
                self.known[address] = copy, held, [t._version for t in held]

    def pack(self, tensor: Tensor):
        entry = self.known.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        if entry is None:
            return tensor
        copy, *recipe = entry
        return copy.dtype, recipe, (tensor.shape, tensor.stride(), tensor.storage_offset())

    @staticmethod
    def unpack(packed):
        if isinstance(packed, Tensor):
            return packed
        dtype, (held, versions), place = packed
        for tensor, version, name in zip(held, versions, ("a weight", "bits"), strict=True):
            if tensor._version != version:
                raise RuntimeError(
                    f"premasked: {name} changed in place between forward and backward, so the "
                    "gradient would belong to another network; end the backward of a pass before "
                    "the optimizer's step and the next activate()"
                )
        return ops.masked_weight(*held, dtype).as_strided(*place)
