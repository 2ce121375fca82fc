"""Mixtures of the samples of a batch: mixup and CutMix."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["mix"]


def mix(
    inputs: Tensor,
    targets: Tensor,
    classes: int,
    mixup: float,
    cutmix: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Mix every sample of a batch with its neighbour, and their labels in the same shares.

    mixup (Zhang et al., 2018) averages the two inputs; CutMix (Yun et al., 2019) puts a box of the
    neighbour into the picture. One share is drawn per batch from Beta(a, a), where a is `mixup` or
    `cutmix`; where both are on, a coin decides which. The arguments stay as they are.

    Args:
        inputs: (n, ...) in floating point; (n, channels, height, width) for CutMix.
        targets: (n,) class labels of an integer type.
        classes: number of classes.
        mixup, cutmix: Beta parameters, 0 = off; one of them is on.
        generator: on the CPU; decides everything random.

    Returns:
        Inputs like the given ones and float32 class probabilities (n, classes).

    Raises:
        TypeError: when targets are no class labels.
        ValueError: when CutMix gets no pictures.
    """
    whole = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if targets.dim() != 1 or not whole:
        raise TypeError(
            f"mix: targets are {targets.dtype} of shape {tuple(targets.shape)}, but mixup and "
            "cutmix need class labels (n,) of an integer type; set mixup=0 and cutmix=0"
        )
    if cutmix and inputs.dim() != 4:
        raise ValueError(
            f"mix: inputs have shape {tuple(inputs.shape)}, but cutmix={cutmix} needs pictures "
            "(n, channels, height, width); set cutmix=0"
        )
    # torch's Beta distribution takes no generator, Python's does
    draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
    cut = cutmix > 0 and (mixup == 0 or draw.random() < 0.5)
    alpha = cutmix if cut else mixup
    share = draw.betavariate(alpha, alpha)  # of the sample itself
    if cut:
        height, width = inputs.shape[2:]
        box = _side(height, share, draw), _side(width, share, draw)
        mixed = inputs.clone()
        mixed[..., box[0], box[1]] = inputs[..., box[0], box[1]].roll(1, 0)
        inside = (box[0].stop - box[0].start) * (box[1].stop - box[1].start)
        share = 1 - inside / (height * width)  # as much as the edges left of the box
    else:
        mixed = torch.lerp(inputs.roll(1, 0), inputs, share)
    own = F.one_hot(targets.long(), classes).float()
    return mixed, torch.lerp(own.roll(1, 0), own, share)


def _side(size: int, share: float, draw: random.Random) -> slice:
    """One side of the box: sqrt(1 - share) of `size` around a uniform centre, cut at the edges."""
    half, centre = 0.5 * size * (1 - share) ** 0.5, draw.uniform(0, size)
    return slice(max(0, round(centre - half)), min(size, round(centre + half)))
