"""What a run trains: the network, converted and initialised as the recipe says; its optimizer."""

from __future__ import annotations

import re
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
        skip = _left_dense(model, config)
        convert(model, skip, example.to(device), config.channels_last, config.mask_first)
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


def _left_dense(model: nn.Module, config: Config) -> Callable[[str, nn.Module], bool]:
    """Which layers the fields `mask_linear` and `mask_only` leave dense."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    if layers and not any(re.match(config.mask_only, name) for name in layers):
        raise ValueError(
            f"config: mask_only={config.mask_only!r} matches the beginning of no layer's name; the "
            f"layers of {type(model).__name__} are {', '.join(layers)}"
        )

    def left_dense(name: str, module: nn.Module) -> bool:
        linear = isinstance(module, nn.Linear)
        return (linear and not config.mask_linear) or not re.match(config.mask_only, name)

    convolutions = [name for name, module in layers.items() if isinstance(module, nn.Conv2d)]
    rest = convolutions[not config.mask_first :]
    if not config.mask_linear and all(left_dense(name, layers[name]) for name in rest):
        raise ValueError(
            f"train: {type(model).__name__} has no convolution to mask (the first one stays dense "
            "unless mask_first=True), and linear layers are left dense; set mask_linear=True "
            "(--mask-linear true)"
        )
    return left_dense


def new_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """SGD or AdamW over all parameters; vectors (biases, scales) may go without weight decay."""
    parameters = list(model.parameters())
    plain = [] if config.decay_norm_bias else [p for p in parameters if p.dim() < 2]
    skip = {id(p) for p in plain}
    rest = [p for p in parameters if id(p) not in skip]
    groups = [
        {"params": rest, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, config.lr, betas=(config.momentum, config.beta2))
    return torch.optim.SGD(groups, config.lr, config.momentum, nesterov=config.nesterov)
