"""Data sets that need no download: digits, patches of pictures, random images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import ShiftFlip
from .base import Data, Split
from .random import generator_for

__all__ = ["PICTURES", "digits", "digits_32", "patches", "synthetic"]


def digits() -> Data:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels.

    A stratified quarter is the test set; the last 5 % of the rest is the hold-out. Inputs are
    (n, 1, 8, 8) float32, standardised by the training part. Half of the images of an epoch are
    shifted by up to one pixel (dense resnet8, 10-fold on the training part, 2 seeds: 98.6 % against
    97.6 % when all are shifted; none: 97.7 % over five of the folds).
    """
    return _split("digits", *_digits(), ShiftFlip(1, share=0.5))


def digits_32() -> Data:
    """`digits` enlarged to 32x32 by bilinear interpolation, for networks made for CIFAR.

    Parts and their order are those of `digits`. Inputs are (n, 1, 32, 32) float32, standardised by
    the training part. Half of the images of an epoch are shifted by up to four pixels, which are
    one of the originals.
    """
    images, labels = _digits()
    large = F.interpolate(torch.from_numpy(images), size=(32, 32), mode="bilinear")
    return _split("digits-32", large.numpy(), labels, ShiftFlip(4, share=0.5))


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 1, 8, 8) of 0 to 16 in float64, and labels (n,)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return images.reshape(-1, 1, 8, 8), labels


# Photographs and textures that scikit-image ships in its wheel; one class each.
PICTURES = (
    *("astronaut", "brick", "camera", "cat", "cell", "clock", "coffee", "coins", "grass"),
    *("gravel", "hubble_deep_field", "immunohistochemistry", "moon", "page", "retina", "rocket"),
    *("stereo_motorcycle", "text"),
)
_TILE, _TILES = 32, 128


def patches() -> Data:
    """Which picture is it from: 32x32 grey tiles of 18 photographs and textures of scikit-image.

    Every sample is a tile of its own: none overlaps another, so training, hold-out, test and folds
    are disjoint regions. Up to 128 tiles of a picture are taken at random (60 to 128: small
    pictures have fewer). A stratified quarter is the test set; the last 5 % of the rest is the
    hold-out. Inputs are (n, 1, 32, 32) float32, standardised by the training part; training tiles
    are shifted by up to 4 pixels and mirrored.

    Raises ValueError without scikit-image.
    """
    try:
        from skimage import color, data
    except ImportError as error:
        raise ValueError(
            "data: patches needs scikit-image's pictures: pip install 'sparse-cocktail[patches]'"
        ) from error
    tiles, labels = [], []
    for label, name in enumerate(PICTURES):
        picture = getattr(data, name)()
        picture = picture[0] if isinstance(picture, tuple) else picture  # of the stereo pair
        grey = color.rgb2gray(picture) if picture.ndim == 3 else picture / 255.0
        rows, cols = (size // _TILE for size in grey.shape)
        cut = grey[: rows * _TILE, : cols * _TILE].reshape(rows, _TILE, cols, _TILE)
        cut = cut.swapaxes(1, 2).reshape(-1, 1, _TILE, _TILE)
        chosen = np.random.default_rng(label).permutation(len(cut))[:_TILES]
        tiles.append(cut[chosen])
        labels.append(np.full(len(chosen), label))
    return _split("patches", np.concatenate(tiles), np.concatenate(labels), ShiftFlip(4, flip=True))


def _split(name: str, images: np.ndarray, labels: np.ndarray, augment: ShiftFlip) -> Data:
    """A stratified quarter for testing, 5 % of the rest held out, all standardised."""
    from sklearn.model_selection import train_test_split

    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    x_train, x_test, y_train, y_test = (torch.from_numpy(part) for part in parts)
    mean, std = x_train.mean(), x_train.std()

    def split(x: Tensor, y: Tensor) -> Split:
        return Split(((x - mean) / std).float(), y.long())

    cut = len(y_train) - round(0.05 * len(y_train))
    return Data(
        name=name,
        classes=int(labels.max()) + 1,
        train=split(x_train[:cut], y_train[:cut]),
        holdout=split(x_train[cut:], y_train[cut:]),
        test=split(x_test, y_test),
        augment=replace(augment, fill=float(-mean / std)),
    )


def synthetic(shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10) -> Data:
    """Random images with random labels, for benchmarks: 512 to train, 64 hold-out, 64 test."""
    generator = generator_for(0)
    inputs = torch.randn(640, *shape, generator=generator)
    targets = torch.randint(classes, (640,), generator=generator)
    parts = [Split(inputs[a:b], targets[a:b]) for a, b in ((0, 512), (512, 576), (576, 640))]
    return Data("synthetic", classes, *parts)
