"""A data set in memory, with a batch order and augmentation that depend on the seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .augment import ShiftFlip
from .random import generator_for

__all__ = ["Data", "Split", "fold"]


@dataclass(frozen=True)
class Split:
    """Inputs (n, ...) in floating point and targets (n, ...) of one part of a data set."""

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Tensor) or not isinstance(self.targets, Tensor):
            raise TypeError(
                f"Split: inputs is a {type(self.inputs).__name__} and targets a "
                f"{type(self.targets).__name__}; both are tensors"
            )
        if len(self.inputs) != len(self.targets):
            raise ValueError(
                f"Split: {len(self.inputs)} inputs have {len(self.targets)} targets; give one each"
            )
        if len(self.targets) == 0:
            raise ValueError("Split: there is no sample; every part of a data set needs some")
        if not self.inputs.is_floating_point():
            raise TypeError(
                f"Split: inputs have dtype {self.inputs.dtype}, but networks take floating point; "
                "scale and convert them, for example images.float() / 255"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str) -> Split:
        return Split(self.inputs.to(device), self.targets.to(device))

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples in order, the last batch possibly smaller."""
        yield from zip(self.inputs.split(size), self.targets.split(size), strict=True)


@dataclass(frozen=True)
class Data:
    """A data set in memory.

        Data("mine", 10, Split(x, y), Split(x_holdout, y_holdout), Split(x_test, y_test))

    `train` is what is learned from, `holdout` what choices are made on, `test` is read for the
    report only. `augment` has `draw(count, generator) -> tensors` with one row per training sample
    and `apply(inputs, *rows) -> inputs`; see `ShiftFlip`.
    """

    name: str
    classes: int
    train: Split
    holdout: Split
    test: Split
    augment: ShiftFlip | None = None

    def __post_init__(self) -> None:
        for part in ("train", "holdout", "test"):
            split = getattr(self, part)
            if not isinstance(split, Split):
                raise TypeError(
                    f"Data: {part} is a {type(split).__name__}, not a Split; give "
                    "Split(inputs, targets)"
                )
            labels = split.targets
            whole = not labels.is_floating_point() and labels.dim() == 1
            if whole and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
                raise ValueError(
                    f"Data: {part} has labels {int(labels.min())} to {int(labels.max())}, but "
                    f"classes={self.classes}; labels count from 0"
                )

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return tuple(self.train.inputs.shape[1:])

    def example(self, count: int) -> Tensor:
        """Some training inputs, to record shapes with."""
        return self.train.inputs[:count]

    def to(self, device: torch.device | str) -> Data:
        parts = {part: getattr(self, part).to(device) for part in ("train", "holdout", "test")}
        return replace(self, **parts)

    def steps_per_epoch(self, batch_size: int, world_size: int = 1) -> int:
        """Full batches per epoch and rank; the rest of an epoch is left out (BatchNorm)."""
        steps = len(self.train) // (batch_size * world_size)
        if steps < 1:
            raise ValueError(
                f"data: batch_size={batch_size} on {world_size} ranks is more than the "
                f"{len(self.train)} training samples of {self.name}; make it smaller"
            )
        return steps

    def epoch(
        self, seed: tuple[int, ...], batch_size: int, skip: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, which are a function of `seed` alone.

        Args:
            seed: (seed, stage, epoch).
            batch_size: samples per rank.
            skip: number of batches to leave out at the start (resume).
            rank, world: this process's share.
        """
        generator = generator_for(*seed)
        steps = self.steps_per_epoch(batch_size, world)
        order = torch.randperm(len(self.train), generator=generator)
        inputs, targets = self.train.inputs, self.train.targets
        drawn = () if self.augment is None else self.augment.draw(len(self.train), generator)
        for step in range(skip, steps):
            start = (step * world + rank) * batch_size
            chosen = order[start : start + batch_size]
            batch = inputs[chosen.to(inputs.device)]
            if self.augment is not None:
                batch = self.augment.apply(batch, *(numbers[chosen] for numbers in drawn))
            yield batch, targets[chosen.to(inputs.device)]

    def calibration(self, count: int, batch_size: int) -> list[Tensor]:
        """Fixed batches of `count` training inputs, not augmented, for BatchNorm statistics."""
        order = torch.randperm(len(self.train), generator=generator_for(0))[:count]
        chosen = self.train.inputs[order.to(self.train.inputs.device)]
        return list(chosen.tensor_split(-(-len(chosen) // batch_size)))  # of equal size, within one


def fold(data: Data, index: int, count: int) -> Data:
    """Cross-validation on the training part: its fold `index` of `count` becomes the test set.

    The real test set is not in the result, so recipe choices cannot see it.
    """
    if count < 2:
        raise ValueError(f"data.fold: count={count} is below 2; 5 or 10 folds are usual")
    if not 0 <= index < count:
        raise ValueError(f"data.fold: index={index} is not in [0, {count}), the number of folds")
    chosen = torch.arange(len(data.train)) % count == index
    part = Split(data.train.inputs[chosen], data.train.targets[chosen])
    rest = Split(data.train.inputs[~chosen], data.train.targets[~chosen])
    return replace(data, name=f"{data.name}-fold{index}of{count}", train=rest, test=part)
