"""What masked layers are measured against: plain torch with a mask kept dense, and no mask at all.

A peer's `build(held)` gives a function without arguments that computes the layer's output; its
gradients are those of `held.leaves`. A network's peer is a model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from shapes import Held  # isort: skip - a neighbour, not a package

__all__ = ["DENSE", "PRUNE", "Way", "layer_peers", "plain_layer", "product", "pruned_network"]

DENSE, PRUNE = "torch/dense", "torch/prune"


@dataclass(frozen=True)
class Way:
    """One way to compute a layer; `around()` is in force during forward and backward."""

    name: str
    build: Callable[[Held], Callable[[], Tensor]]
    note: str = ""
    around: Callable[[], AbstractContextManager] = nullcontext


def product(held: Held, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear or F.conv2d of this layer."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, held.layer.stride, held.layer.padding)


def plain_layer(held: Held, linear: type[nn.Module], convolution: type[nn.Module]) -> nn.Module:
    """A module of either class around the very Parameters of the set."""
    layer, bias = held.layer, held.bias is not None
    if len(layer.weight) == 2:
        module = linear(layer.weight[1], layer.weight[0], bias, device="meta")
    else:
        out, inputs, *kernel = layer.weight
        how = {"stride": layer.stride, "padding": layer.padding, "bias": bias, "device": "meta"}
        module = convolution(inputs, out, kernel, **how)
    module.weight, module.bias = held.weight, held.bias
    return module


def mixed(held: Held) -> AbstractContextManager:
    """Autocast where x is narrower than the weight, as a model of fp32 weights is trained."""
    if held.x.dtype == held.weight.dtype:
        return nullcontext()
    return torch.autocast(held.x.device.type, held.x.dtype)


def _dense(held: Held) -> Callable[[], Tensor]:
    dtype, bias = held.x.dtype, held.bias

    def forward() -> Tensor:
        return product(
            held, held.x, held.weight.to(dtype), None if bias is None else bias.to(dtype)
        )

    return forward


def _times(mask_of: Callable[[Held], Tensor]) -> Callable[[Held], Callable[[], Tensor]]:
    def build(held: Held) -> Callable[[], Tensor]:
        dtype, bias, mask = held.x.dtype, held.bias, mask_of(held)

        def forward() -> Tensor:
            weight = (held.weight * mask).to(dtype)
            return product(held, held.x, weight, None if bias is None else bias.to(dtype))

        return forward

    return build


def _prune(held: Held) -> Callable[[], Tensor]:
    module = plain_layer(held, nn.Linear, nn.Conv2d)
    prune.custom_from_mask(module, "weight", held.mask)

    def forward() -> Tensor:
        with mixed(held):
            return module(held.x)

    return forward


def layer_peers() -> list[Way]:
    """Peers of a masked layer, and the layer without a mask."""
    return [
        Way(DENSE, _dense, "without a mask: the goal, no peer"),
        Way("torch/w*m bool", _times(lambda held: held.mask)),
        Way("torch/w*m float", _times(lambda held: held.mask.to(held.weight.dtype))),
        Way(PRUNE, _prune, "torch.nn.utils.prune, a hook before each forward"),
    ]


def pruned_network(
    model: nn.Module, masks: dict[str, Tensor], live: dict[str, Tensor]
) -> nn.Module:
    """A copy of a plain model under torch.nn.utils.prune.

    Args:
        masks: bool mask of a layer's weight by the layer's name.
        live: bool per channel by the name of a BatchNorm, whose pruned channels are silent.
    """
    model = copy.deepcopy(model)
    for name, mask in masks.items():
        prune.custom_from_mask(model.get_submodule(name), "weight", mask)
    for name, channels in live.items():
        for parameter in ("weight", "bias"):
            prune.custom_from_mask(model.get_submodule(name), parameter, channels)
    return model
