"""Data sets by name, or the user's own."""

from __future__ import annotations

import re
from pathlib import Path

from ..models import import_object
from .augment import ShiftFlip
from .base import Data, Split, fold
from .cifar import CIFAR, cifar
from .embedded import digits, digits_32, patches, synthetic
from .folders import FolderData, folders
from .mixing import mix
from .random import generator_for

__all__ = [
    "Data",
    "FolderData",
    "ShiftFlip",
    "Split",
    "cifar",
    "digits",
    "digits_32",
    "fold",
    "folders",
    "generator_for",
    "load",
    "mix",
    "names",
    "patches",
    "synthetic",
]


def names() -> list[str]:
    """Names that `load` knows."""
    return ["digits", "digits-32", "patches", *CIFAR, "imagenet", "synthetic"]


def load(
    name: str, folder: str | Path = "", workers: int = 0, randaugment: bool = False
) -> Data | FolderData:
    """Load a data set by name.

    Args:
        name: one of `names()`; `synthetic-3x224x224-1000` sets image shape and classes,
            `imagenet-64` crops of 64 pixels instead of 224; `package.module:function` calls the
            user's function, which returns a Data or FolderData. A suffix `@1/5` takes fold 1 of 5
            of the training part as the test set.
        folder: where the files of cifar10, cifar100 and imagenet lie.
        workers: processes that decode the pictures of imagenet (0: none extra).
        randaugment: RandAugment on the training pictures of imagenet.

    Raises ValueError for an unknown name, or RandAugment on what is no folder of pictures;
    FileNotFoundError for missing files.
    """
    base, _, part = name.partition("@")
    if randaugment and not re.match(r"imagenet(-|$)", base):
        raise ValueError(
            f"data: randaugment=True is for folders of pictures (imagenet), but data={base!r}; "
            "leave it out"
        )
    if ":" in base:
        data = import_object(base)()
        if not isinstance(data, (Data, FolderData)):
            raise TypeError(f"data: {base} returned a {type(data).__name__}, not a data.Data")
    elif base == "digits":
        data = digits()
    elif base == "digits-32":
        data = digits_32()
    elif base == "patches":
        data = patches()
    elif base in CIFAR:
        data = cifar(base, folder)
    elif found := re.fullmatch(r"imagenet(?:-(\d+))?", base):
        data = folders(folder, workers, int(found[1] or 224), base, randaugment)
    elif found := re.fullmatch(r"synthetic(?:-(\d+)x(\d+)x(\d+)-(\d+))?", base):
        numbers = [int(n) for n in found.groups() if n]
        data = synthetic(tuple(numbers[:3]), numbers[3]) if numbers else synthetic()
    else:
        raise ValueError(
            f"data: name={base!r} is unknown; use one of {', '.join(names())}, or "
            "package.module:function for your own"
        )
    if part:
        index, _, count = part.partition("/")
        if not (index.isdigit() and count.isdigit()):
            raise ValueError(f"data: fold {part!r} is not INDEX/COUNT, as in {base}@0/5")
        numbers = int(index), int(count)
        data = fold(data, *numbers) if isinstance(data, Data) else data.fold(*numbers)
    return data
