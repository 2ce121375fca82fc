"""The cocktail file: one safetensors file with a JSON header.

    model.KEY          the dense network's state dict
    levels             uint8, two 4-bit prune levels a byte: how many nested masks keep a weight
    bits.SUBNET        int32, packed mask bits of all masked layers, one after the other
    statistics.SUBNET  running mean and variance of every BatchNorm, one after the other
    affine.SUBNET      scale and shift of every BatchNorm, of a subnet that has its own

Weights are in the order of the masked layers, each in its view (out, taps, in).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import models, ops
from .batch_norm import MaskedBatchNorm2d
from .conversion import convert
from .files import read_tensors, write_tensors
from .modules import masked_layers
from .ops.checks import check_module
from .reference import weight_view

__all__ = [
    "MAX_LEVELS",
    "check_same",
    "fitted_model",
    "norm_facts",
    "pack_levels",
    "read_cocktail",
    "unpack_levels",
    "write_cocktail",
]

FORMAT = 1
_KIND = "cocktail"
MAX_LEVELS = 15  # what 4 bits hold


def pack_levels(masks: Sequence[Sequence[Tensor]], weights: Sequence[Tensor]) -> Tensor:
    """Per weight the number of nested masks (bits per weight tensor) that keep it, 4 bits each."""
    levels = torch.zeros(sum(w.numel() for w in weights), dtype=torch.uint8)
    for views in masks:
        kept = [
            weight_view(ops.unpack_mask(bits, w.shape)).reshape(-1)
            for bits, w in zip(views, weights, strict=True)
        ]
        levels += torch.cat(kept).to("cpu", torch.uint8)
    pairs = torch.cat([levels, levels.new_zeros(len(levels) % 2)]).view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def unpack_levels(packed: Tensor, weights: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """The bits of `count` nested masks, per weight tensor, from dense to sparse."""
    sizes = [w.numel() for w in weights]
    levels = torch.stack([packed & 15, packed >> 4], 1).view(-1)[: sum(sizes)]
    masks = []
    for rank in range(1, count + 1):
        bits = []
        for part, weight in zip(levels.split(sizes), weights, strict=True):
            view = (part >= rank).view(weight_view(weight).shape)
            mask = view.transpose(1, 2).reshape(weight.shape)
            bits.append(ops.pack_mask(mask))
        masks.append(bits)
    return masks


def write_cocktail(
    path: str | os.PathLike, header: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write header and tensors with the format version, atomically."""
    write_tensors(path, tensors, {"kind": _KIND, "format": FORMAT, **header})


def read_cocktail(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file.

    Raises FileNotFoundError; ValueError for a truncated, edited or foreign file or another format.
    """
    tensors, header = read_tensors(path)
    if header.get("kind") != _KIND:
        raise ValueError(f"{path} is no cocktail file; it must be one that Cocktail.save wrote")
    if header["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {header['format']}, but this version reads format {FORMAT}; use "
            "the version of sparse-cocktail that wrote it"
        )
    return header, tensors


# ---- file and model ------------------------------------------------------------------------------


def norm_facts(norm: nn.Module) -> list:
    """[channels, name of the convolution before it or None]."""
    return [norm.num_features, getattr(norm, "source", None)]


def fitted_model(path, header: dict[str, Any], model: nn.Module | None) -> nn.Module:
    """The model, built if need be, with the file's layers masked and its pairs of conv and norm.

    It is built from our own factories only: a file must not name code to run.
    """
    if model is None:
        factory = header["factory"]
        if not isinstance(factory, dict) or set(factory) != {"name", "args"}:
            raise ValueError(f"{path} names no model factory; pass model=your_model")
        try:
            model = models.build(**factory)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; or pass model=your_model") from error
    check_module("Cocktail.load", "model", model)
    if not masked_layers(model):
        masked = {name for name, _ in header["layers"]}
        convert(model, skip=lambda name, _: name not in masked, mask_first=True)
    modules = dict(model.named_modules())
    for name, (_, source) in header["norms"]:
        if isinstance(norm := modules.get(name), MaskedBatchNorm2d):
            norm.source = source
    return model


def check_same(path, what: str, stored: list, present: dict[str, nn.Module], size) -> None:
    """Refuse a model whose layers differ from the file's; `size(module)` is what is compared."""
    here = [[name, size(module)] for name, module in present.items()]
    if stored != here:
        difference = [(a, b) for a, b in zip(stored, here, strict=False) if a != b]
        raise ValueError(
            f"{path} holds {len(stored)} {what}, the model has {len(here)}, and they differ (first "
            f"difference, file against model: {difference[:1]}); pass the plain model of the file"
        )
