"""The fields of a recipe: those of the engine (`Config`) and those of the method (`Options`)."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .methods import METHODS
from .methods.base import option

__all__ = [
    "Config",
    "apply_preset",
    "for_method",
    "read_recipe",
    "recipe_names",
    "split_fields",
]


@dataclass
class Config:
    """Recipe fields of the engine."""

    data: str = option(
        "digits",
        "digits, digits-32 (enlarged), patches, cifar10, cifar100, imagenet (train/CLASS and "
        "val/CLASS; imagenet-64: crops of 64), synthetic or package.module:function; NAME@I/K: "
        "fold I of K",
    )
    data_dir: str = option("", "folder with the files of the data set")
    workers: int = option(0, "processes that load pictures (0: none extra)")
    model: str = option(
        "resnet8",
        "resnet8, resnet18, resnet32, resnet34, resnet50, vgg16, vit_b16 or "
        "package.module:function",
    )
    model_args: dict = option({}, "arguments of the network, as JSON")
    method: str = option("cocktail", "training method")
    epochs: int = option(4, "epochs of a stage")
    batch_size: int = option(64, "samples per optimizer step and process")
    lr: float = option(0.1, "initial learning rate")
    optimizer: str = option("sgd", "sgd or adamw")
    momentum: float = option(0.9, "momentum of SGD, first beta of AdamW")
    beta2: float = option(0.999, "second beta of AdamW")
    nesterov: bool = option(False, "Nesterov momentum")
    weight_decay: float = option(1e-4, "weight decay")
    decay_norm_bias: bool = option(True, "weight decay on normalisation layers and biases too")
    warmup: float = option(0, "linear warm-up: epochs (int) or share of a stage (float)")
    label_smoothing: float = option(0.0, "label smoothing of the loss")
    mixup: float = option(0.0, "Beta parameter of mixup (0: off)")
    cutmix: float = option(0.0, "Beta parameter of CutMix (0: off); a batch gets one of the two")
    randaugment: bool = option(False, "RandAugment on folders of pictures")
    clip_norm: float = option(0.0, "clip the gradient's norm (0: off)")
    accumulate: int = option(1, "split a batch into this many parts to save memory")
    precision: str = option("fp32", "fp32, bf16 or fp16 (autocast)")
    channels_last: bool = option(False, "channels_last weights and activations")
    compile: bool = option(False, "torch.compile the network")
    mask_linear: bool = option(False, "mask linear layers too, not only convolutions")
    mask_first: bool = option(False, "mask the first convolution too")
    mask_only: str = option("", "mask only layers whose name starts so (a regular expression)")
    mask_update: str = option("freeze", "pruned weights in a sparse step: freeze or shared")
    silence: bool = option(True, "a pruned channel's BatchNorm is off too, as its bias is")
    teacher_statistics: str = option(
        "frozen", "BatchNorm statistics in the teacher's forward: frozen or update"
    )
    recalibrate_samples: int = option(
        512, "training samples for a subnet's BatchNorm statistics (0: the model's own for all)"
    )
    init: str = option("", "safetensors file with weights to start from")
    seed: int = option(0, "seed of everything random")
    device: str = option("auto", "cpu, cuda, cuda:1, ... (auto: cuda where there is one)")
    threads: int = option(0, "CPU threads (0: torch's default)")
    checkpoint_every: int = option(500, "optimizer steps between checkpoints")
    log_every: int = option(20, "optimizer steps between log lines")
    tensorboard: bool = option(False, "write TensorBoard logs too (needs the extra log)")

    def __post_init__(self) -> None:
        choices = {
            "optimizer": ("sgd", "adamw"),
            "precision": ("fp32", "bf16", "fp16"),
            "mask_update": ("freeze", "shared"),
            "teacher_statistics": ("frozen", "update"),
            "method": tuple(METHODS),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"config: {name}={value!r} is not one of {', '.join(allowed)}")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"config: {name}={value} is not finite; give a number")
        for name in ("epochs", "batch_size", "accumulate", "checkpoint_every", "log_every"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"config: {name}={value} is below 1")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"config: label_smoothing={self.label_smoothing} is not in [0, 1]")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"config: seed={self.seed} is not in [0, 2^32)")
        if not self.lr > 0:
            raise ValueError(f"config: lr={self.lr} is not positive")
        switches = ("warmup", "clip_norm", "weight_decay", "momentum", "threads", "workers")
        for name in ("recalibrate_samples", "mixup", "cutmix", *switches):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"config: {name}={value} is negative; 0 switches it off")
        if self.optimizer == "adamw":
            for name in ("momentum", "beta2"):
                if not 0 <= (value := getattr(self, name)) < 1:
                    raise ValueError(f"config: {name}={value} is not in [0, 1), as AdamW needs")
            if self.nesterov:
                raise ValueError(
                    "config: nesterov=True belongs to optimizer=sgd, but optimizer='adamw'; leave "
                    "one of them out"
                )
        try:
            re.compile(self.mask_only)
        except re.error as error:
            raise ValueError(
                f"config: mask_only={self.mask_only!r} is no regular expression ({error}); write "
                "how the names begin, such as encoder"
            ) from error


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("sparse_cocktail") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.suffix == ".yaml")


def read_recipe(recipe: str | Path | None) -> dict[str, Any]:
    """Fields of a recipe by name, or of a YAML file.

    Its entries `paper` and `methods` are for `apply_preset` and `for_method`.
    """
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
    mappings = [fields, *(fields.get(n, {}) for n in ("paper", "methods"))] if fields else []
    if not isinstance(fields, dict) or not all(isinstance(m, dict) for m in mappings):
        raise ValueError(f"recipe {recipe}: the YAML is no mapping of fields to values")
    return fields


def for_method(fields: dict[str, Any], method: str | None = None) -> dict[str, Any]:
    """A recipe's fields for one method, by default its own.

    Fields of the recipe's own method that the other does not know are left out, and what the
    recipe's entry `methods` has for it comes in.
    """
    own = fields.get("method", "cocktail")
    method = method or own
    for name in (own, method):
        if name not in METHODS:
            raise ValueError(f"config: method={name!r} is not one of {', '.join(METHODS)}")
    extra = fields.get("methods", {}).get(method) or {}
    fields = {name: value for name, value in fields.items() if name != "methods"}
    if method != own:
        known = _names(Config) | _names(METHODS[method].Options)
        gone = _names(METHODS[own].Options) - known
        fields = {n: v for n, v in fields.items() if n not in gone and n != "paper"}
    return {**fields, "method": method, **extra}


def _names(kind: type) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)}


def apply_preset(fields: dict[str, Any], name: str, given: dict[str, Any]) -> None:
    """Set a recipe's fields to those of a procedure, "paper" or "parity", in place.

    Args:
        fields: of the recipe. Its own `paper` mapping (lengths that the procedure needs) comes
            first, then the method's preset.
        name: of the preset.
        given: fields that the user set; one that the preset sets too is a ValueError.
    """
    method = given.get("method", fields.get("method", "cocktail"))
    presets = METHODS[method].PRESETS if method in METHODS else {}
    if name not in presets:
        having = ", ".join(n for n, kind in METHODS.items() if name in kind.PRESETS)
        raise ValueError(
            f"train: preset {name!r} is one of "
            + (f"method {having}, not of {method}" if having else "no method: --paper, --parity")
        )
    if both := sorted(set(given) & set(presets[name])):
        field = both[0]
        raise ValueError(
            f"train: --{name} means {field}={presets[name][field]}, but {field}={given[field]} "
            "was given too; give one of them"
        )
    fields.update({**fields.pop("paper", {}), **presets[name]})


def split_fields(fields: dict[str, Any]) -> tuple[Config, Any]:
    """Check and convert recipe fields; returns the engine's config and the method's options.

    Raises ValueError for an unknown field (with the nearest known one) or a value of a wrong type.
    """
    fields = {name: value for name, value in fields.items() if name not in ("paper", "methods")}
    method = fields.get("method", "cocktail")
    if method not in METHODS:
        raise ValueError(f"config: method={method!r} is not one of {', '.join(METHODS)}")
    kinds = (Config, METHODS[method].Options)
    made = []
    for kind in kinds:
        types = typing.get_type_hints(kind)
        made.append({n: convert_field(n, v, types[n]) for n, v in fields.items() if n in types})
    for name in fields:
        if name not in made[0] and name not in made[1]:
            raise ValueError(_unknown(name, method))
    return Config(**made[0]), kinds[1](**made[1])


def _unknown(name: str, method: str) -> str:
    """What to say of a field that a method does not take."""
    own = [f.name for f in dataclasses.fields(METHODS[method].Options)]
    whose = [m for m, kind in METHODS.items() if name in _names(kind.Options)]
    if whose:
        hint = f"{name} is a field of {', '.join(whose)}, not of {method}"
    else:
        near = difflib.get_close_matches(name, [*_names(Config), *own], 1)
        if near:
            return f"config: field {name!r} is unknown; did you mean {near[0]}?"
        hint = f"field {name!r} is unknown; 'sparse-cocktail train --help' shows all"
    return f"config: {hint}; fields of {method}: {', '.join(own)}"


def _parsed(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"config: {name}={text!r} is no valid value ({error})") from error


def convert_field(name: str, value: Any, kind: type) -> Any:
    """A YAML value or a command-line string as the type of its field.

    A list of str is as good as a text with commas.
    """
    given = value
    if kind is str and isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
        return ",".join(value)
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
        if kind is str:  # YAML reads 2:4 as a number, in base 60
            example = "; quote texts in YAML, as in '2:4'"
        raise ValueError(
            f"config: {name}={given!r} is a {type(value).__name__}, but the field is a "
            f"{kind.__name__}{example}"
        )
    return value
