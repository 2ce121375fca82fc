"""The fields of a recipe: those of the engine (`Config`) and those of the method (`Options`)."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .methods import METHODS

__all__ = ["Config", "read_recipe", "recipe_names", "split_fields"]


def _help(default: Any, text: str) -> Any:
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Recipe fields of the engine."""

    data: str = _help(
        "digits",
        "digits, cifar10, cifar100, synthetic or package.module:function; NAME@I/K: fold I of K",
    )
    data_dir: str = _help("", "folder with the files of the data set")
    model: str = _help(
        "resnet8", "resnet8, resnet18, resnet34, resnet50, vgg16 or package.module:function"
    )
    model_args: dict = _help({}, "arguments of the network, as JSON")
    method: str = _help("cocktail", "training method")
    epochs: int = _help(12, "epochs of a stage")
    batch_size: int = _help(64, "samples per optimizer step and process")
    lr: float = _help(0.1, "initial learning rate")
    momentum: float = _help(0.9, "momentum of SGD")
    nesterov: bool = _help(False, "Nesterov momentum")
    weight_decay: float = _help(1e-4, "weight decay")
    decay_norm_bias: bool = _help(True, "weight decay on normalisation layers and biases too")
    warmup: float = _help(0, "linear warm-up: epochs (int) or share of a stage (float)")
    label_smoothing: float = _help(0.0, "label smoothing of the loss")
    clip_norm: float = _help(0.0, "clip the gradient's norm (0: off)")
    accumulate: int = _help(1, "split a batch into this many parts to save memory")
    precision: str = _help("fp32", "fp32, bf16 or fp16 (autocast)")
    channels_last: bool = _help(False, "channels_last weights and activations")
    compile: bool = _help(False, "torch.compile the network")
    mask_linear: bool = _help(False, "mask linear layers too, not only convolutions")
    mask_update: str = _help("freeze", "pruned weights in a sparse step: freeze or shared")
    recalibrate_samples: int = _help(512, "training samples for BatchNorm statistics")
    init: str = _help("", "safetensors file with weights to start from")
    seed: int = _help(0, "seed of everything random")
    device: str = _help("auto", "cpu, cuda, cuda:1, ... (auto: cuda where there is one)")
    threads: int = _help(0, "CPU threads (0: torch's default)")
    checkpoint_every: int = _help(500, "optimizer steps between checkpoints")
    log_every: int = _help(20, "optimizer steps between log lines")
    tensorboard: bool = _help(False, "write TensorBoard logs too (needs the extra log)")

    def __post_init__(self) -> None:
        choices = {
            "precision": ("fp32", "bf16", "fp16"),
            "mask_update": ("freeze", "shared"),
            "method": tuple(METHODS),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"config: {name}={value!r} is not one of {', '.join(allowed)}")
        for name in ("epochs", "batch_size", "accumulate", "checkpoint_every", "log_every"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"config: {name}={value} is below 1")
        for name in ("lr", "recalibrate_samples"):
            if (value := getattr(self, name)) <= 0:
                raise ValueError(f"config: {name}={value} is not positive")
        for name in ("warmup", "clip_norm", "weight_decay", "momentum", "threads"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"config: {name}={value} is negative; 0 switches it off")


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("sparse_cocktail") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.suffix == ".yaml")


def read_recipe(recipe: str | Path | None) -> dict[str, Any]:
    """Fields of a recipe by name, or of a YAML file."""
    if recipe is None:
        return {}
    if str(recipe) in recipe_names():
        text = (resources.files("sparse_cocktail") / "recipes" / f"{recipe}.yaml").read_text()
    elif Path(recipe).is_file():
        text = Path(recipe).read_text()
    else:
        raise ValueError(
            f"recipe {str(recipe)!r} is neither one of {', '.join(recipe_names())} nor a YAML file"
        )
    fields = _parsed("recipe", text) or {}
    if not isinstance(fields, dict):
        raise ValueError(f"recipe {recipe}: the YAML is no mapping of fields to values")
    return fields


def split_fields(fields: dict[str, Any]) -> tuple[Config, Any]:
    """Check and convert recipe fields; returns the engine's config and the method's options.

    Raises ValueError for an unknown field (with the nearest known one) or a value of a wrong type.
    """
    method = fields.get("method", "cocktail")
    if method not in METHODS:
        raise ValueError(f"config: method={method!r} is not one of {', '.join(METHODS)}")
    kinds = (Config, METHODS[method].Options)
    made = []
    for kind in kinds:
        types = typing.get_type_hints(kind)
        made.append({n: convert_field(n, v, types[n]) for n, v in fields.items() if n in types})
    known = [f.name for kind in kinds for f in dataclasses.fields(kind)]
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known fields: {', '.join(known)}"
            raise ValueError(f"config: field {name!r} is unknown{hint}")
    return Config(**made[0]), kinds[1](**made[1])


def _parsed(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"config: {name}={text!r} is no valid value ({error})") from error


def convert_field(name: str, value: Any, kind: type) -> Any:
    """A YAML value or a command-line string as the type of its field."""
    if isinstance(value, str) and kind is not str:
        value = _parsed(name, value)
    if kind is float and isinstance(value, str):
        with suppress(ValueError):
            value = float(value)  # YAML takes 1e-3 for a string
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and numeric:
        return value  # an int stays one: lengths count epochs as int, shares as float
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        example = """, written as JSON: '{"2:4": 1}'""" if kind is dict else ""
        raise ValueError(
            f"config: {name}={value!r} is a {type(value).__name__}, but the field is a "
            f"{kind.__name__}{example}"
        )
    return value
