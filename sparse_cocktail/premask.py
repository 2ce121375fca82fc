"""Weights that layers compute with but do not make: masked ones in one call, or any others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from . import ops
from .batch_norm import saving_hooks
from .modules import masked_layers
from .ops.checks import as_list

__all__ = ["given_weights", "premasked"]


@contextmanager
def given_weights(layers: Iterable[nn.Module], weights: Iterable[Tensor]) -> Iterator[None]:
    """Inside, masked layers compute with these weights instead of their own, masked or not.

    Gradients flow to whatever the weights were made from. A layer with a mask in force still keeps
    the biases of its pruned outputs silent.

    Wrap the forward pass, and the backward with it where gradient checkpointing is in use: that
    computes the forward pass anew, and must find the same weights.

    Args:
        layers: masked layers.
        weights: one per layer, of its weight's shape.

    Raises:
        ValueError: for another number of weights or another shape.
    """
    layers, weights = list(layers), list(weights)
    shapes = [tuple(w.shape) for w in weights]
    if shapes != [tuple(layer.weight.shape) for layer in layers]:
        raise ValueError(
            f"given_weights: weights have shapes {shapes}, but the layers' are "
            f"{[tuple(layer.weight.shape) for layer in layers]}; give one weight per layer"
        )
    try:
        for layer, weight in zip(layers, weights, strict=True):
            vars(layer)["given"] = weight  # quicker than nn.Module's way of setting attributes
        yield
    finally:
        for layer in layers:
            vars(layer)["given"] = None


@contextmanager
def premasked(
    model: nn.Module | Iterable[nn.Module], dtype: torch.dtype | None = None, keep: bool = False
) -> Iterator[None]:
    """Inside, layers with a mask take their W*m from one `masked_weights` call.

    Wrap the forward pass; its backward may come later. While the block lasts, one copy of the
    masked weights is held in `dtype`: this trades memory for launches and calls, which pays for
    networks of small layers. A layer whose input has another dtype masks its own weight as always,
    and so does one that computes only a few live rows, or is under gradient checkpointing.

    Args:
        model: a model with masked layers, as `convert` makes it, or some of these layers.
        dtype: of the copies; by default autocast's where it is on, else that of the weights.
        keep: keep the copies for the backward, as `F.linear(x, w * m)` does. Otherwise it makes
            W*m of one layer at a time anew.
    """
    if isinstance(model, nn.Module):
        found = masked_layers(model).values()
    else:
        found = as_list("premasked", "model", model, "or pass a model with masked layers")
    layers = [m for m in found if m.masked and (keep or m.rows is None)]
    if dtype is None and layers:
        device = layers[0].weight.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
    copies = _Copies()
    groups: dict[tuple, list] = {}
    for layer in layers:
        groups.setdefault((layer.weight.dtype, layer.dense_grad), []).append(layer)
    for (_, dense_grad), some in groups.items():
        copies.make(some, dtype, dense_grad, keep)
    try:
        with nullcontext() if keep else saved_tensors_hooks(copies.pack, copies.unpack):
            hooks = saving_hooks(True)
            for layer in layers:
                vars(layer)["premasked_hooks"] = hooks
            yield
    finally:
        for layer in layers:
            vars(layer).update(premasked=None, premasked_hooks=None)
        copies.known.clear()


class _Copies:
    """Which saved tensors are masked weights: instead of these, the way to make them is kept."""

    def __init__(self) -> None:
        self.known: dict[int, tuple] = {}  # by address; the copies live as long as their entry

    def make(self, layers: list, dtype: torch.dtype | None, dense_grad: bool, keep: bool) -> None:
        weights, bits = [m.weight for m in layers], [m.mask_bits for m in layers]
        made = ops.masked_weights(weights, bits, dtype, dense_grad)
        for layer, copy, weight, words in zip(layers, made, weights, bits, strict=True):
            vars(layer)["premasked"] = copy  # quicker than nn.Module's way of setting attributes
            if copy.numel() and not keep:
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
