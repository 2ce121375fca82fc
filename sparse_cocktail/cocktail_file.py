"""The cocktail file: one safetensors file with a JSON header and a digest over all of it.

    model.KEY          the dense network's state dict
    levels             uint8, two 4-bit prune levels a byte: how many nested masks keep a weight
    bits.SUBNET        int32, packed mask bits of all masked layers, one after the other
    statistics.SUBNET  running mean and variance of every BatchNorm, one after the other

Weights are in the order of the masked layers, each in its view (out, taps, in).
"""

from __future__ import annotations

import hashlib
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
    """Write header and tensors with format version and digest, atomically."""
    header = json.loads(json.dumps({"format": FORMAT, **header}))  # as it will be read back
    header["digest"] = _digest(header, tensors)
    write_tensors(path, tensors, {"sparse_cocktail": json.dumps(header)})


def read_cocktail(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file.

    Raises FileNotFoundError; ValueError for a truncated, edited or foreign file or another format.
    """
    tensors, metadata = read_tensors(path)
    if "sparse_cocktail" not in metadata:
        raise ValueError(f"{path} is no cocktail file; it must be one that Cocktail.save wrote")
    try:
        header = json.loads(metadata["sparse_cocktail"])
        version, digest = header["format"], header["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: the header is damaged ({error}); take a whole copy") from error
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version}, but this version reads format {FORMAT}; use the version "
            "of sparse-cocktail that wrote it"
        )
    if digest != _digest(header, tensors):
        raise ValueError(
            f"{path} was edited or damaged after it was saved (its digest does not match); take "
            "the original copy"
        )
    return header, tensors


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the header (without the digest) and every tensor."""
    known = {k: v for k, v in header.items() if k != "digest"}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
