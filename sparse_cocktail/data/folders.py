"""Pictures in one folder per class, decoded while they are trained on (needs torchvision).

    FOLDER/train/CLASS/*.jpg
    FOLDER/val/CLASS/*.jpg

Pictures travel from the loader's processes as bytes and are scaled on the device: a quarter of the
memory and of the transfer that float32 would take.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .base import Data
from .random import generator_for

__all__ = ["FolderData", "Pictures", "folders"]

# Of the red, green and blue values of ImageNet's training part, scaled to [0, 1]; the customary
# numbers, which published weights expect.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# A training crop covers this share of the picture, at this ratio of width to height (Szegedy et
# al., "Going deeper with convolutions", section 6).
_AREA, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_TRIES = 10  # crops drawn before the central one is taken, as in torchvision
_RESIZE = 256 / 224  # shorter side of a test picture against the crop from its centre
# Seconds that a loader process outlives a SIGTERM: when a scheduler signals every process of a
# job, the training process still ends its step and writes a checkpoint.
_GRACE = 30


@dataclass(frozen=True)
class Pictures:
    """One part of a tree of pictures.

    Attributes:
        files: paths (as bytes) of all pictures of the tree. One numpy array, because forked
            processes share it; reading a list of strings would copy it into each of them.
        labels: (len(files),) int64, the class of each file.
        chosen: (n,) int64, the positions in `files` that belong to this part.
        size: height and width of what is handed out.
        workers: processes that decode (0: this one does).
        device: where batches are put.
        randaugment: RandAugment wherever pictures are augmented.
    """

    files: np.ndarray
    labels: Tensor
    chosen: Tensor
    size: int
    workers: int = 0
    device: torch.device | str = "cpu"
    randaugment: bool = False

    def __len__(self) -> int:
        return len(self.chosen)

    def to(self, device: torch.device | str) -> Pictures:
        return replace(self, device=torch.device(device))

    def part(self, positions: Tensor) -> Pictures:
        """Those of this part's pictures that `positions` (indices or a bool mask) picks."""
        return replace(self, chosen=self.chosen[positions])

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All pictures in order without augmentation, the last batch possibly smaller."""
        yield from self.read(self.chosen.split(size))

    def read(
        self, batches: Sequence[Tensor], seed: tuple[int, ...] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Decode batches of positions in `files`.

        Args:
            batches: (size,) int64 each.
            seed: of the augmentation (None: the central crop). What is drawn for a picture is a
                function of (*seed, position) alone, whoever decodes it and in whichever batch.

        Yields:
            Inputs (size, 3, self.size, self.size) float32, standardised, and targets (size,) int64.

        Raises ValueError for a file that cannot be decoded.
        """
        device = torch.device(self.device)
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (_MEAN, _STD))
        loader = DataLoader(
            _Decoder(self.files, self.labels, self.size, seed, self.randaugment),
            sampler=[batch.numpy() for batch in batches],
            batch_size=None,  # an item is a whole batch
            num_workers=min(self.workers, len(batches)),  # starting one takes about 20 ms
            worker_init_fn=_begin_worker,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the run's random numbers
        )
        for item in loader:
            if isinstance(item, str):
                raise ValueError(item)
            pixels, targets = (tensor.to(device, non_blocking=True) for tensor in item)
            yield pixels.float().div_(255).sub_(mean).div_(std), targets


@dataclass(frozen=True)
class FolderData:
    """A data set of picture files, with the interface of `Data`.

    The order of an epoch is a function of its seed, and a picture's augmentation of the seed and
    its place in the tree: neither depends on the number of processes, nor on where a run resumed.
    """

    name: str
    classes: int
    train: Pictures
    holdout: Pictures
    test: Pictures

    steps_per_epoch = Data.steps_per_epoch  # it asks for no more than the length and the name

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (3, self.train.size, self.train.size)

    def example(self, count: int) -> Tensor:
        """Some training inputs, to record shapes with."""
        return next(replace(self.train, workers=0).batches(count))[0]

    def to(self, device: torch.device | str) -> FolderData:
        parts = {part: getattr(self, part).to(device) for part in ("train", "holdout", "test")}
        return replace(self, **parts)

    def epoch(
        self, seed: tuple[int, ...], batch_size: int, skip: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch; arguments as in `Data.epoch`. Skipped ones are not decoded."""
        steps = self.steps_per_epoch(batch_size, world)
        order = self.train.chosen[torch.randperm(len(self.train), generator=generator_for(*seed))]
        starts = [(step * world + rank) * batch_size for step in range(skip, steps)]
        yield from self.train.read([order[s : s + batch_size] for s in starts], seed)

    def calibration(self, count: int, batch_size: int) -> list[Tensor]:
        """Fixed batches of `count` training inputs, not augmented, for BatchNorm statistics."""
        order = torch.randperm(len(self.train), generator=generator_for(0))[:count]
        parts = -(-len(order) // batch_size)  # of equal size, within one
        return [x for x, _ in self.train.read(self.train.chosen[order].tensor_split(parts))]

    def fold(self, index: int, count: int) -> FolderData:
        """Fold `index` of `count` of the training part becomes the test set, as `data.fold`."""
        if not 0 <= index < count or count < 2:
            raise ValueError(
                f"data.fold: index={index} of count={count} is no fold; give 2 or more folds, and "
                "an index from 0 to count - 1"
            )
        held = torch.arange(len(self.train)) % count == index
        return replace(
            self,
            name=f"{self.name}-fold{index}of{count}",
            train=self.train.part(~held),
            test=self.train.part(held),
        )


def folders(
    root: str | Path,
    workers: int = 0,
    size: int = 224,
    name: str = "imagenet",
    randaugment: bool = False,
) -> FolderData:
    """Pictures in one folder per class, laid out as ImageNet usually is.

    Training pictures are cropped at random (8 to 100 % of the area, ratio 3:4 to 4:3), resized to
    `size`, mirrored half of the time, and go through RandAugment (Cubuk et al., 2020; two
    operations of magnitude 9) where asked for. Others are resized to `size` * 256 / 224 on the
    shorter side and cropped in the centre. All are standardised by ImageNet's mean and deviation.
    The hold-out is the last 5 % of a fixed shuffle of the training part, in which classes lie in a
    row.

    Args:
        root: folder with `train` and `val` (or `test`), each with one folder per class.
        workers: processes that decode (0: none extra). They change no bit of a batch.
        size: height and width of inputs.
        name: name of the data set, for reports.
        randaugment: whether training pictures go through RandAugment.

    Raises:
        FileNotFoundError: when a part is missing or has no class folders.
        ValueError: for bad numbers, a class without pictures, parts of different classes, or when
            torchvision cannot be used; while reading, for a damaged picture.
    """
    for argument, value, least in (("workers", workers, 0), ("size", size, 1)):
        if value < least:
            raise ValueError(f"data: {argument}={value} is below {least}")
    train_root, test_root = _parts(root, name)
    image_folder, _ = _torchvision()
    classes, files, labels = _scan(image_folder, train_root)
    test_classes, test_files, test_labels = _scan(image_folder, test_root)
    if classes != test_classes:
        pairs = (classes, test_classes), (test_classes, classes)
        only_train, only_test = (_some(sorted(set(a) - set(b))) for a, b in pairs)
        raise ValueError(
            f"data: {test_root} has other classes than {train_root} ({only_train} only in "
            f"{train_root.name}, {only_test} only in {test_root.name}); give both the same folders"
        )
    count = len(files)
    cut = count - max(1, round(0.05 * count))
    if cut < 1:
        raise ValueError(f"data: {train_root} has {count} picture; training needs 2 or more")
    order = torch.randperm(count, generator=generator_for(0))

    def part(positions: Tensor) -> Pictures:
        return Pictures(
            files, labels, positions.sort().values, size, workers, randaugment=randaugment
        )

    whole_test = torch.arange(len(test_files))
    return FolderData(
        name=name,
        classes=len(classes),
        train=part(order[:cut]),
        holdout=part(order[cut:]),
        test=Pictures(test_files, test_labels, whole_test, size, workers),
    )


# ---- the tree ------------------------------------------------------------------------------------


def _parts(root: str | Path, name: str) -> tuple[Path, Path]:
    """The training and the test folder."""
    train = Path(root) / "train"
    test = next((p for part in ("val", "test") if (p := Path(root) / part).is_dir()), None)
    if not str(root) or not train.is_dir() or test is None:
        found = "none was given"
        if str(root):
            found = f"{str(root)!r} does not exist"
            if Path(root).is_dir():
                found = f"{str(root)!r} has {_some(sorted(os.listdir(root)))}"
        raise FileNotFoundError(
            f"data: {name} needs --data-dir with the folders train and val (or test), each with "
            f"one folder of pictures per class; {found}"
        )
    return train, test


def _scan(image_folder: type, root: Path) -> tuple[list[str], np.ndarray, Tensor]:
    """Class names, paths as bytes, and labels of a tree, in the order of the names."""
    try:
        tree = image_folder(root, allow_empty=True)  # empty classes are refused below, all at once
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data: {root} has no class folders; sort its pictures into one folder per class"
        ) from error
    labels = torch.tensor(tree.targets, dtype=torch.int64)
    counts = torch.bincount(labels, minlength=len(tree.classes)).tolist()
    if empty := [c for c, n in zip(tree.classes, counts, strict=True) if n == 0]:
        raise ValueError(
            f"data: {root} has no picture in class {_some(empty)}; add JPEG, PNG, ... files or "
            "remove the folder"
        )
    return tree.classes, np.array([os.fsencode(file) for file, _ in tree.samples]), labels


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3])) or "nothing"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _torchvision() -> tuple[type, Any]:
    """torchvision's ImageFolder and its module of transforms."""
    try:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2
    except ModuleNotFoundError as error:
        raise ValueError(
            f"data: folders of pictures need the extra [vision], and {error.name} is missing: "
            "pip install 'sparse-cocktail[vision]'"
        ) from error
    except (ImportError, RuntimeError) as error:  # RuntimeError: its operators are not there
        raise ValueError(
            f"data: torchvision {metadata.version('torchvision')} is installed, but cannot be "
            f"imported beside torch {torch.__version__} ({error}); install the torchvision that "
            "was built for this torch: pip install --force-reinstall 'sparse-cocktail[vision]'"
        ) from error
    return ImageFolder, v2


# ---- decoding ------------------------------------------------------------------------------------


class _Decoder(Dataset):
    """Item: the pictures of an array of positions, or the text of what went wrong.

    A text, because an exception would come out of a process with its whole traceback as message.
    """

    def __init__(
        self,
        files: np.ndarray,
        labels: Tensor,
        size: int,
        seed: tuple[int, ...] | None,
        randaugment: bool,
    ) -> None:
        self.files, self.labels, self.size, self.seed = files, labels, size, seed
        self.randaugment = randaugment

    def __getitem__(self, positions: np.ndarray) -> tuple[Tensor, Tensor] | str:
        functional = _torchvision()[1].functional
        pixels = torch.empty(len(positions), 3, self.size, self.size, dtype=torch.uint8)
        for row, position in enumerate(positions.tolist()):
            file = os.fsdecode(self.files[position])
            try:
                picture = _decode(file)
            except Exception as error:  # PIL raises whatever a damaged file leads it to
                return (
                    f"data: {file} cannot be read as a picture ({type(error).__name__}: {error}); "
                    "replace or remove it"
                )
            if self.seed is None:
                resized = functional.resize(picture, [round(self.size * _RESIZE)])
                picture = functional.center_crop(resized, [self.size, self.size])
            else:
                generator = generator_for(*self.seed, position)
                crop, flip = _draw(*picture.size, generator)
                picture = functional.resized_crop(picture, *crop, [self.size, self.size])
                picture = functional.horizontal_flip(picture) if flip else picture
                picture = _randaugment(picture, generator) if self.randaugment else picture
            pixels[row] = functional.pil_to_tensor(picture)
        return pixels, self.labels[torch.from_numpy(positions)]


def _decode(file: str):
    """A picture in RGB; grey ones are repeated, transparency is dropped, CMYK is converted."""
    from PIL import Image

    with Image.open(file) as picture:
        return picture.convert("RGB")


def _draw(
    width: int, height: int, generator: torch.Generator
) -> tuple[tuple[int, int, int, int], bool]:
    """A training crop (top, left, height, width) of a picture, and whether to mirror it."""
    numbers = torch.rand(_TRIES + 1, 4, generator=generator, dtype=torch.float64).tolist()
    flip = numbers.pop()[0] < 0.5
    for area, ratio, down, right in numbers:
        area = width * height * (_AREA[0] + (_AREA[1] - _AREA[0]) * area)
        ratio = _RATIO[0] * (_RATIO[1] / _RATIO[0]) ** ratio  # uniform in its logarithm
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return (int(down * (height - h + 1)), int(right * (width - w + 1)), h, w), flip
    w = min(width, round(height * _RATIO[1]))  # nothing fits a long strip: its middle
    h = min(height, round(width / _RATIO[0]))
    return ((height - h) // 2, (width - w) // 2, h, w), flip


def _randaugment(picture: Any, generator: torch.Generator) -> Any:
    """Two random operations of magnitude 9, as in torchvision's own training of classifiers."""
    v2 = _torchvision()[1]
    transform = v2.RandAugment(2, 9, interpolation=v2.InterpolationMode.BILINEAR)
    # torchvision draws from torch's global generator: it takes this one's numbers meanwhile
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        return transform(picture)


def _begin_worker(_: int) -> None:
    """Leave signals to the training process, which ends its step before it stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))
