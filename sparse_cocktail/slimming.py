"""Cut out the channels that a network computes as zeros: a smaller network, the same outputs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from .channel_watch import LAYERS, Watch, tensors_of
from .ops.checks import check_module, wrong_type
from .pruning import to_dense

__all__ = ["load_slim", "to_slim"]


def to_slim(model: nn.Module, example_input: Tensor | tuple) -> nn.Module:
    """A smaller copy of a model for inference: channels that are zero for every input are cut out.

    One forward of `example_input` is watched. A channel goes where the weights that make it (rows
    of a convolution or linear layer with their bias, scale and shift of the BatchNorm behind) are
    zero, as a channel subnet's are, and everything that its zeros reach can do without them.
    Tensors that are added up keep the channels that any of them needs. A channel stays where it
    reaches the outputs, a grouped convolution that is not depthwise, or an operation that is not
    known to keep zeros, such as LayerNorm or attention.

    Args:
        model: plain or with masked layers, whose masks are baked in; one whose forward computes
            with the shapes it finds, not with fixed numbers of channels.
        example_input: a tensor (or tuple of arguments) for a forward in eval mode.

    Returns:
        The copy, in eval mode and plain torch.nn layers.

    Raises:
        ValueError: where the smaller network cannot run or computes something else.
    """
    check_module("to_slim", "model", model)
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    model = to_dense(model).eval()
    with torch.no_grad():
        expected = model(*arguments)
        for layer, (rows, columns) in Watch(model).cuts(arguments).items():
            _cut(layer, rows, columns)
        _check_same(model, arguments, expected)
    with suppress(AttributeError):
        del model.factory  # makes the whole network
    return model


def load_slim(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Load a slim network's state dict into a whole one, in place, whose layers become as small.

    Args:
        model: plain torch.nn, of the architecture that the slim network was cut from.
        state: the state dict of `to_slim`'s result.

    Returns:
        The same model.

    Raises:
        ValueError: where the state dict is of another architecture.
    """
    check_module("load_slim", "model", model)
    if not isinstance(state, Mapping):
        raise wrong_type("load_slim", "state", state, "a state dict, as slim.state_dict() gives it")
    for name, layer in model.named_modules():
        prefix = f"{name}." if name else ""
        given = state.get(f"{prefix}weight")
        present = getattr(layer, "weight", None)
        if type(layer) not in LAYERS or given is None or given.shape == present.shape:
            continue
        if given.dim() != present.dim() or any(
            new > old for new, old in zip(given.shape, present.shape, strict=True)
        ):
            raise ValueError(
                f"load_slim: {prefix}weight has shape {tuple(given.shape)}, which cannot be cut "
                f"from {tuple(present.shape)}; build the model that the slim network was made from"
            )
        columns = None
        if given.dim() > 1 and getattr(layer, "groups", 1) == 1:
            columns = torch.arange(given.shape[1], device=present.device)
        _cut(layer, torch.arange(len(given), device=present.device), columns)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"load_slim: the state dict does not fit {type(model).__name__}: {error}; build the "
            "model that the slim network was made from"
        ) from error
    return model


def _cut(layer: nn.Module, rows: Tensor, columns: Tensor | None) -> None:
    """Keep these output channels (and inputs) of a layer."""
    groups = getattr(layer, "groups", 1)
    if groups > 1 and not groups == layer.in_channels == layer.out_channels:
        return  # which keeps them all
    for name in ("weight", "bias"):
        old = getattr(layer, name)
        if old is None:
            continue
        kept = old.detach()[rows]
        if name == "weight" and columns is not None:
            kept = kept[:, columns]
        if old.dim() == 4 and not old.is_contiguous():
            kept = kept.contiguous(memory_format=torch.channels_last)
        setattr(layer, name, nn.Parameter(kept, old.requires_grad))
    if isinstance(layer, nn.BatchNorm2d):
        for name in ("running_mean", "running_var"):
            if (buffer := getattr(layer, name)) is not None:
                setattr(layer, name, buffer[rows])
        layer.num_features = len(rows)
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    else:
        layer.groups = len(rows) if groups > 1 else 1
        layer.out_channels = len(rows)
        layer.in_channels = layer.weight.shape[1] * layer.groups


def _check_same(model: nn.Module, arguments: tuple, expected: Any) -> None:
    try:
        found = model(*arguments)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"to_slim: {type(model).__name__} does not run without its zero channels ({error}); its"
            " forward counts on their number: compute it from shapes, or keep the whole network"
        ) from error
    for old, new in zip(tensors_of(expected), tensors_of(found), strict=True):
        if not old.is_floating_point() or not old.numel():
            continue
        bound = torch.finfo(old.dtype).eps ** 0.5 * float(old.nan_to_num().abs().max())
        if old.shape != new.shape or not torch.allclose(new, old, 0.0, bound, equal_nan=True):
            raise ValueError(
                f"to_slim: {type(model).__name__} computes something else without its zero "
                "channels; keep the whole network, with export(name) or to_dense"
            )
