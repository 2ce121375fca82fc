"""Checkpoints: any tree of tensors and plain values in one safetensors file, never a pickle."""

from __future__ import annotations

import dataclasses
import os
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .files import read_tensors, write_tensors

__all__ = [
    "load_checkpoint",
    "random_states",
    "restore_dataclass",
    "restore_random_states",
    "save_checkpoint",
]

FORMAT = 3
_KIND = "checkpoint"


def save_checkpoint(path: str | os.PathLike, tree: dict[str, Any]) -> None:
    """Write a tree of dicts, lists, dataclasses, tensors, numbers, strings and None, atomically."""
    tensors: dict[str, Tensor] = {}
    plain = _flatten(tree, "", tensors)
    write_tensors(path, tensors, {"kind": _KIND, "format": FORMAT, "tree": plain})


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a tree back. Dataclasses come back as dicts (see `restore_dataclass`).

    Raises FileNotFoundError, or ValueError for a damaged file, another kind or another format.
    """
    tensors, header = read_tensors(path)
    if header.get("kind") != _KIND:
        raise ValueError(
            f"{path} is no checkpoint of a training run; give RUN/checkpoint.safetensors"
        )
    if header["format"] != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {header['format']}, but this version reads {FORMAT}; "
            "resume with the version that wrote it"
        )
    return _unflatten(header["tree"], tensors)


def restore_dataclass(target: Any, values: dict[str, Any]) -> None:
    """Set the fields of a dataclass instance, nested dataclasses included, from a loaded dict."""
    for field in dataclasses.fields(target):
        current = getattr(target, field.name)
        if dataclasses.is_dataclass(current):
            restore_dataclass(current, values[field.name])
        else:
            setattr(target, field.name, values[field.name])


def random_states(device: torch.device) -> dict[str, Any]:
    """States of the generators that a run may draw from: of Python, numpy, torch and the GPU."""
    numpy = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Set the generators to `random_states`; those of a GPU where it is one again."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["device"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Plain JSON in which every tensor, and every dict with other keys than strings, is tagged."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)}{path}"  # the number keeps keys such as "a/b" and "a", "b" apart
        tensors[name] = value
        return {"tensor": name}
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        items = [[k, _flatten(v, f"{path}/{k}", tensors)] for k, v in value.items()]
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        return [_flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"checkpoint: {path} is a {type(value).__name__}; a method's state holds dataclasses, "
        "dicts, lists, tensors, numbers, strings and None"
    )


def _unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unflatten(v, tensors) for v in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {k: _unflatten(v, tensors) for k, v in value["dict"]}
    return value
