"""Weights for benchmarks: layer shapes of real networks, random values of a fixed seed.

Trained weights are not downloaded: values are normal with a standard deviation of 1 / sqrt(fan-in)
per layer, which spreads the magnitudes of layers as training does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_cocktail import models
from sparse_cocktail.reference import weight_view

__all__ = ["CASES", "Case", "Inputs", "Weights", "pieces"]

CHUNK = 2**24  # elements that checks look at together: their temporaries stay below 1 GB
SPARE = 3  # value sets on a GPU, where the L2 cache is overwritten between samples anyway
MOST_SETS = 64  # on the CPU, as many as samples; small weights may still stay in the last level


@dataclass(frozen=True)
class Case:
    """One list of weights."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    channels_last: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


def _resnet50() -> tuple[tuple[int, ...], ...]:
    with torch.device("meta"):
        model = models.build("resnet50")
    return tuple(tuple(p.shape) for p in model.parameters() if p.dim() > 1)


def _vit_b16() -> tuple[tuple[int, ...], ...]:
    """Dosovitskiy et al. 2021, Table 1: 12 blocks of width 768, MLP 3072, patches of 16x16."""
    block = ((3 * 768, 768), (768, 768), (3072, 768), (768, 3072))
    return ((768, 3, 16, 16), *block * 12, (1000, 768))


def _cases() -> dict[str, Case]:
    small = ((16, 8, 3, 3), (32, 16, 3, 3), (64, 32, 1, 1), (48, 256), (256, 64))
    # one matrix of exactly this many weights; its rows are whole 32-bit words of mask
    square = {"1e4": (125, 80), "1e5": (625, 160), "1e6": (1250, 800), "1e7": (3125, 3200)}
    square |= {"1e8": (12500, 8000), "1e9": (50000, 20000)}
    resnet = _resnet50()
    made = [
        Case("small", small),
        Case("resnet50", resnet),
        Case("resnet50-contiguous", resnet, channels_last=False),
        Case("resnet50-bf16", resnet, dtype=torch.bfloat16),
        Case("vit-b16", _vit_b16()),
        *(Case(name, (shape,)) for name, shape in square.items()),
    ]
    return {case.name: case for case in made}


CASES = _cases()


class Weights:
    """Weights whose values lie one after the other in one flat tensor, each from a 64-byte line.

    The flat tensor is what a read pass over the same bytes reads.
    """

    def __init__(self, case: Case, flat: Tensor) -> None:
        self.case, self.flat, self.tensors = case, flat, []
        self.fixed = False  # whether its values change under one address
        self.memo: dict = {}  # of what belongs to these weights, such as an earlier mask
        sizes = [math.prod(shape) for shape in case.shapes]
        for part, shape in zip(flat.split(sizes), case.shapes, strict=True):
            if case.channels_last and len(shape) == 4:
                out, inputs, *taps = shape
                self.tensors.append(part.view(out, *taps, inputs).permute(0, 3, 1, 2))
            else:
                self.tensors.append(part.view(shape))

    @property
    def device(self) -> torch.device:
        return self.flat.device

    def divisible(self, m: int) -> list[int]:
        """Places of the weights whose `in` is a multiple of m."""
        return [i for i, w in enumerate(self.tensors) if w.shape[1] % m == 0]


class Inputs:
    """Sets of weights of one case, so that no sample finds its input in a cache.

    On the CPU every sample takes the next set, and together they are twice the last-level cache.
    On a GPU there is one set, `fixed` (a graph knows one address); before each sample its values
    are replaced by others. The first set has no ties that a mask could depend on.

    Args:
        cache: bytes of the last-level cache; memory: bytes that all sets may take.
        warm: one set after all, for figures of what the caches give.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        cache: int,
        memory: int,
        fixed: bool | None = None,
        warm: bool = False,
    ) -> None:
        self.case, self.device = case, device
        fixed = device.type == "cuda" if fixed is None else fixed
        fitting = max(2, min(-(-2 * cache // case.bytes), memory // case.bytes, MOST_SETS))
        count = 1 if warm else SPARE if fixed else fitting
        self._values = [self._flat(seed) for seed in range(count)]
        first = Weights(case, self._values[0])
        if case.dtype == torch.float32:
            break_ties(first.tensors)
        self.fixed = fixed
        if fixed:
            self.sets = [Weights(case, self._values[0].clone())]
            self.sets[0].fixed = True
        else:
            self.sets = [first, *(Weights(case, flat) for flat in self._values[1:])]
        self._turn = 0

    def _flat(self, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        flat = torch.empty(self.case.numel, device=self.device)
        flat.normal_(generator=generator)
        for w in Weights(self.case, flat).tensors:
            w.mul_(1 / math.sqrt(math.prod(w.shape[1:])))
        return flat.to(self.case.dtype)

    def first(self) -> int:
        """Place of the set with the values that results are checked on."""
        return self._take(0)

    def next(self) -> int:
        """Place of the set for the next sample."""
        self._turn = (self._turn + 1) % len(self._values)
        return self._take(self._turn)

    def _take(self, turn: int) -> int:
        if not self.fixed:
            return turn
        self.sets[0].flat.copy_(self._values[turn])
        return 0


def pieces(weight: Tensor) -> list[slice]:
    """Rows of a weight in portions that temporaries can be made of."""
    out = weight.shape[0]
    rows = max(1, CHUNK * out // max(weight.numel(), 1))
    return [slice(start, min(start + rows, out)) for start in range(0, out, rows)]


def break_ties(weights: Sequence[Tensor], group: int = 8) -> None:
    """Move values in place so that no two of an aligned group along `in` have one magnitude.

    Continuous values have no ties; float32 has a few among millions, and peers break them in
    other ways than the documented one. The moves are below 1e-5 of a value.
    """
    for weight in weights:
        if weight.shape[1] % group:
            continue
        for rows in pieces(weight):
            view = weight_view(weight[rows])
            places = torch.arange(group, device=weight.device, dtype=torch.float32)
            for _ in range(8):
                groups = view.unflatten(-1, (-1, group))
                ordered = groups.abs().sort(-1).values
                tied = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
                if not tied.any():
                    break
                groups[tied] *= 1 + places * 2.0**-20
