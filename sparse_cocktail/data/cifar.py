"""CIFAR-10 and CIFAR-100 from their official binary version."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .augment import ShiftFlip
from .base import Data, Split

__all__ = ["CIFAR", "cifar"]

CIFAR = {
    # label bytes before the pixels, training files, test file, folder inside the archive
    "cifar10": (1, [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", 10),
    "cifar100": (2, ["train.bin"], "test.bin", 100),
}
_CIFAR_FOLDERS = ("", "cifar-10-batches-bin", "cifar-100-binary")
_PIXELS = 3 * 32 * 32


def cifar(name: str, folder: str | Path) -> Data:
    """CIFAR-10 or CIFAR-100 from the official binary version in a local folder.

    Records are label bytes and 3x32x32 uint8 pixels; CIFAR-100's second label byte (fine) is used.
    The last 5 % of the training part is the hold-out. Inputs are (n, 3, 32, 32) float32,
    standardised per channel by the training part; training images are shifted by up to 4 pixels
    and mirrored.

    Raises FileNotFoundError when a file is missing, ValueError when one is not whole records.
    """
    labels, train_files, test_file, classes = CIFAR[name]
    places = [Path(folder) / inner for inner in _CIFAR_FOLDERS]
    found = next((p for p in places if (p / test_file).is_file()), None)
    if not folder or found is None:
        there = f"{str(folder)!r} has no {test_file}: unpack the archive there"
        raise FileNotFoundError(
            f"data: {name} needs --data-dir with the files of its official binary version; "
            f"{there if folder else 'none was given'}"
        )
    inputs, targets = _cifar_records([found / file for file in train_files], labels, classes)
    test_inputs, test_targets = _cifar_records([found / test_file], labels, classes)
    mean, std = _moments(inputs)

    def split(x: Tensor, y: Tensor) -> Split:
        return Split(x.float().div_(255).sub_(mean[:, None, None]).div_(std[:, None, None]), y)

    cut = len(targets) - round(0.05 * len(targets))
    return Data(
        name=name,
        classes=classes,
        train=split(inputs[:cut], targets[:cut]),
        holdout=split(inputs[cut:], targets[cut:]),
        test=split(test_inputs, test_targets),
        augment=ShiftFlip(4, fill=tuple((-mean / std).tolist()), flip=True),
    )


def _cifar_records(files: list[Path], labels: int, classes: int) -> tuple[Tensor, Tensor]:
    """(n, 3, 32, 32) uint8 pixels and (n,) int64 labels of binary files."""
    parts = []
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"data: {file} is missing; unpack the whole archive")
        raw = torch.from_numpy(np.fromfile(file, dtype=np.uint8))
        if len(raw) == 0 or len(raw) % (labels + _PIXELS):
            raise ValueError(
                f"data: {file} has {len(raw)} bytes, which is not a multiple of a record's "
                f"{labels + _PIXELS}; it is damaged or not the binary version: unpack it again"
            )
        parts.append(raw.view(-1, labels + _PIXELS))
    records = torch.cat(parts)
    targets = records[:, labels - 1].long()
    if int(targets.max()) >= classes:
        raise ValueError(
            f"data: {files[0].parent} has label {int(targets.max())}, but there are {classes} "
            "classes; it is damaged or another data set's folder"
        )
    return records[:, labels:].reshape(-1, 3, 32, 32), targets


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of uint8 images scaled to [0, 1], exactly counted."""
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(c.reshape(-1), minlength=256) for c in images.unbind(1)])
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = (share * values).sum(1)
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.float(), std.clamp(min=1 / 255).float()
