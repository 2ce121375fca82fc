"""MutualNet: one network at many widths and input resolutions (Yang et al., ECCV 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..patterns import Channel
from ..schedules import keep_count
from ..selection import check_ranks_agree
from .base import Context, Method, Pass, Stage, check_range, option
from .menu import MenuOptions

__all__ = ["MutualNet", "MutualNetOptions", "prefix_masks", "sizes"]


@dataclass
class MutualNetOptions(MenuOptions):
    """Recipe fields of MutualNet."""

    FAMILIES = (Channel,)

    ladder: str = option("channel", "ratios of one pattern, which is channel here")
    random_widths: int = option(2, "widths per step, drawn besides the full and the narrowest one")
    grid: int = option(
        0, "further widths, evenly between the narrowest and the full one, for training only"
    )
    resolutions: str = option(
        "",
        "sides of the inputs that narrower networks see, in pixels or as shares: 224,192,160,128 "
        "or 1,0.75,0.5 (empty: the inputs as they are)",
    )

    def widths(self) -> list[Channel]:
        """What is trained besides the full network: the menu, then the grid."""
        counts = ("random_widths", "grid")
        check_range("mutualnet", self, "[0, inf)", counts, "0 leaves these out")
        widths = {str(pattern): pattern for pattern in self.menu()}
        most = max(pattern.sparsity for pattern in widths.values())
        for k in range(1, self.grid + 1):
            pattern = Channel(most * k / (self.grid + 1))
            widths.setdefault(str(pattern), pattern)
        return list(widths.values())


class MutualNet(Method):
    """A step sums the gradients of the full network on the loss, and of the narrowest one and some
    others on the full one's output, each at a resolution of its own.

    A narrower network has the first channels of every layer, and all inputs of a layer: those that
    come from pruned channels are zero behind BatchNorm. All share BatchNorm in training, and get
    statistics of their own at the end.
    """

    Options = MutualNetOptions

    def plan(self, ctx: Context) -> list[Stage]:
        widths = sorted(ctx.options.widths(), key=lambda pattern: -pattern.sparsity)
        self._names = [str(pattern) for pattern in widths]  # the narrowest first
        self._sizes: list[tuple[int, ...] | None] = [None]
        if ctx.options.resolutions.strip():
            self._sizes = sizes(ctx.options.resolutions, ctx.data.example(1).shape[2:])
        epochs = ctx.config.epochs
        lr = ctx.options.learning_rate(ctx.config.lr, epochs * ctx.steps_per_epoch)
        return [Stage("train", epochs, lr)]

    @classmethod
    def cost(cls, options: MutualNetOptions, epochs: int) -> float:
        """A pass at a lower resolution counts like any other."""
        return epochs * float(2 + min(options.random_widths, len(options.widths()) - 1))

    def before_stage(self, ctx: Context) -> None:
        cocktail, listed = ctx.cocktail, {str(pattern) for pattern in ctx.options.menu()}
        with ctx.timed("mask"):
            for pattern in ctx.options.widths():
                masks = prefix_masks(cocktail.bank.weights, pattern, cocktail.outputs)
                cocktail.add(pattern, masks, ctx.stage if str(pattern) in listed else None)
            check_ranks_agree(cocktail.bank)

    def step(self, ctx: Context) -> list[Pass]:
        def mimic(output: Tensor, _, teacher: Tensor) -> Tensor:
            # its gradient is KL's, which lacks a constant: the entropy of the teacher's output
            return ctx.task.distill(output, teacher)

        generator = ctx.generator()
        narrowest, *others = self._names
        order = torch.randperm(len(others), generator=generator).tolist()
        drawn = [narrowest, *(others[i] for i in order[: ctx.options.random_widths])]
        which = torch.randint(len(self._sizes), (len(drawn),), generator=generator).tolist()
        return [
            Pass("dense"),
            *(
                Pass(name, teacher=0, loss=mimic, transform=resized(self._sizes[i]))
                for name, i in zip(drawn, which, strict=True)
            ),
        ]

    def after_stage(self, ctx: Context) -> None:
        listed = {str(pattern) for pattern in ctx.options.menu()}
        for name in self._names:
            if name not in listed:
                ctx.cocktail.remove(name)


def prefix_masks(
    weights: Sequence[Tensor], pattern: Channel, outputs: frozenset[int] = frozenset()
) -> list[Tensor]:
    """Bits that keep the first output channels of every weight, `keep_count` of the density.

    Args:
        weights: (out, in, *taps) each.
        pattern: says the density.
        outputs: indices of weights that keep all channels.
    """
    masks = []
    for i, weight in enumerate(weights):
        mask = torch.ones_like(weight, dtype=torch.bool)
        if i not in outputs:
            mask[keep_count(pattern.density, len(weight)) :] = False
        masks.append(ops.pack_mask(mask))
    return masks


def sizes(resolutions: str, full: Sequence[int]) -> list[tuple[int, ...] | None]:
    """Sizes (height, width) that a list of resolutions means; None stands for the full one.

    Args:
        resolutions: numbers with commas: pixels of the shorter side, or shares where at most 1.
        full: height and width of the inputs.

    Raises:
        ValueError: for inputs that are no pictures, and what is no size from 1 pixel to theirs.
    """
    if len(full) != 2:
        raise ValueError(
            f"mutualnet: resolutions={resolutions!r}, but inputs have {len(full)} dimensions "
            "besides batch and channels; leave it empty where they are no pictures"
        )
    found: list[tuple[int, ...] | None] = []
    for text in resolutions.split(","):
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        share = number if number <= 1 else number / min(full)
        if not 0 < share <= 1:
            raise ValueError(
                f"mutualnet: resolutions={resolutions!r} has {text.strip()!r}, which is neither a "
                f"share in (0, 1] nor a side of at most {min(full)} pixels"
            )
        size = tuple(max(1, round(side * share)) for side in full)
        found.append(None if size == tuple(full) else size)
    return found


def resized(size: tuple[int, ...] | None):
    """What brings a batch of pictures to this size; None where it has it already."""
    if size is None:
        return None
    # antialiased, as pictures are that a smaller input is prepared from
    return partial(F.interpolate, size=size, mode="bilinear", antialias=True)
