"""What a run trains: the network, converted and initialised as the recipe says; its optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .batch_norm import MaskedBatchNorm2d
from .config import Config
from .conversion import convert
from .files import read_tensors

__all__ = ["new_optimizer", "prepare_model"]


def prepare_model(
    model: nn.Module, config: Config, example: Tensor, device: torch.device
) -> nn.Module:
    """Move a model to its device, put masked layers in unless it has them, load initial weights.

    Args:
        model: plain or converted; changed in place.
        config: of the run.
        example: a batch of inputs, to record the order of the layers with.
        device: of the run.

    Raises:
        ValueError: when nothing could be masked, or the initial weights do not fit.
    """
    model.to(device)
    if not hasattr(model, "conversion"):
        skip = None if config.mask_linear else _linear_layers(model)
        convert(model, skip, example.to(device), config.channels_last)
    if not config.silence:
        for module in model.modules():
            if isinstance(module, MaskedBatchNorm2d):
                module.source = None
    if config.init:
        tensors, _ = read_tensors(config.init)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"config: init={config.init!r} does not fit: {error}") from error
    return model


def _linear_layers(model: nn.Module) -> Callable[[str, nn.Module], bool]:
    if not any(isinstance(m, nn.Conv2d) for m in list(model.modules())):
        raise ValueError(
            f"train: {type(model).__name__} has no convolution, and linear layers are left dense; "
            "set mask_linear=True (--mask-linear true)"
        )
    return lambda _, module: isinstance(module, nn.Linear)


def new_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """SGD over all parameters; vectors (biases, scales, shifts) may go without weight decay."""
    parameters = list(model.parameters())
    plain = [] if config.decay_norm_bias else [p for p in parameters if p.dim() < 2]
    skip = {id(p) for p in plain}
    rest = [p for p in parameters if id(p) not in skip]
    groups = [
        {"params": rest, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [g for g in groups if g["params"]],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
    )
