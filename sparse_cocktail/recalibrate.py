"""BatchNorm statistics of a network, estimated again from batches of its own activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .ops.checks import check_module, wrong_type

__all__ = ["frozen_statistics", "norm_layers", "recalibrate"]


def norm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The normalisation layers of a model that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, a forward in training mode normalises by its batch and updates no statistics."""
    layers = [m for m in norm_layers(model).values() if m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def _explain(batches: Iterable, batch: Any, error: Exception) -> None:
    """Say which usual mistake made a forward fail, if it was one."""
    if isinstance(batches, Tensor):
        raise wrong_type("recalibrate", "batches", batches, "a list; put it into [ ]") from error
    if isinstance(batch, (tuple, list)):
        wanted = "a tensor of inputs; leave targets out, [x for x, _ in batches]"
        raise wrong_type("recalibrate", "a batch", batch, wanted) from error


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Reset the running statistics and set them to the plain average over the batches.

    Only normalisation layers are in training mode meanwhile (dropout is off). With
    torch.distributed initialised, statistics are averaged over the ranks. Momentum and modes are as
    before afterwards; when anything fails, so are the statistics. A model without BatchNorm is left
    alone.

    Args:
        model: the network, with the mask of its subnet active.
        batches: inputs of the model, on its device.

    Raises:
        ValueError: when there is no batch.
    """
    check_module("recalibrate", "model", model)
    layers = list(norm_layers(model).values())
    if not layers:
        return
    modes = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    buffers = [b for layer in layers for b in layer.buffers(recurse=False)]
    before = [b.clone() for b in buffers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    try:
        count = 0
        for batch in batches:
            try:
                model(batch)
            except Exception as error:
                _explain(batches, batch, error)
                raise
            count += 1
        if count == 0:
            raise ValueError("recalibrate: batches is empty; give at least one batch of inputs")
    except BaseException:
        torch._foreach_copy_(buffers, before)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    if dist.is_initialized() and dist.get_world_size() > 1:
        for layer in layers:
            for statistic in (layer.running_mean, layer.running_var):
                dist.all_reduce(statistic)
                statistic /= dist.get_world_size()
