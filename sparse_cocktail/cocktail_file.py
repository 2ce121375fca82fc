"""The cocktail file: one safetensors file with a JSON header.

    model.KEY          the dense network's state dict
    levels             uint8, two 4-bit prune levels a byte: how many nested masks keep a weight
    bits.SUBNET        int32, packed mask bits of all masked layers, one after the other
    statistics.SUBNET  running mean and variance of every BatchNorm, one after the other

Weights are in the order of the masked layers, each in its view (out, taps, in).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .files import read_tensors, write_tensors
from .reference import weight_view

__all__ = ["MAX_LEVELS", "pack_levels", "read_cocktail", "unpack_levels", "write_cocktail"]

FORMAT = 1
_ENTRY = "sparse_cocktail"  # of the safetensors metadata
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
    header = {"format": FORMAT, **header}
    write_tensors(path, tensors, {_ENTRY: json.dumps(header)})


def read_cocktail(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file.

    Raises FileNotFoundError; ValueError for a truncated, edited or foreign file or another format.
    """
    tensors, metadata = read_tensors(path, signed=_ENTRY)
    if _ENTRY not in metadata:
        raise ValueError(f"{path} is no cocktail file; it must be one that Cocktail.save wrote")
    header = json.loads(metadata[_ENTRY])
    if header["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {header['format']}, but this version reads format {FORMAT}; use "
            "the version of sparse-cocktail that wrote it"
        )
    return header, tensors
