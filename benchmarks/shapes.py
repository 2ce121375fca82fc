"""Weights for benchmarks: layer shapes of real networks, random values of a fixed seed.

Trained weights are not downloaded: values are normal with a standard deviation of 1 / sqrt(fan-in)
per layer, which spreads the magnitudes of layers as training does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_cocktail import models, ops
from sparse_cocktail.patterns import Pattern
from sparse_cocktail.reference import weight_view
from sparse_cocktail.selection import magnitude_masks

__all__ = [
    "CASES",
    "LAYERS",
    "Case",
    "Held",
    "Inputs",
    "Layer",
    "LayerInputs",
    "Weights",
    "layers_of",
    "like_weight",
    "pieces",
]

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


# ---- layers with their inputs --------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution, and the shape of its input.

    Args:
        weight: (out, in) or (out, in, kh, kw); input: (rows, in) or (batch, in, height, width).
        count: how often the network has this layer.
    """

    name: str
    weight: tuple[int, ...]
    input: tuple[int, ...]
    bias: bool = False
    stride: int = 1
    padding: int = 0
    count: int = 1

    @property
    def output(self) -> tuple[int, ...]:
        sizes = [
            (size + 2 * self.padding - kernel) // self.stride + 1
            for size, kernel in zip(self.input[2:], self.weight[2:], strict=True)
        ]
        return (self.input[0], self.weight[0], *sizes)

    @property
    def flops(self) -> int:
        """Of a dense forward."""
        return 2 * math.prod(self.output) * math.prod(self.weight[1:])


def _resnet50_layers(batch: int, side: int = 224) -> list[Layer]:
    """The distinct convolutions of ResNet-50 but the first, which `convert` leaves dense."""
    seen: Counter[tuple] = Counter()

    def note(module, inputs, _) -> None:
        place = (tuple(module.weight.shape), tuple(inputs[0].shape))
        seen[(*place, module.stride[0], module.padding[0])] += 1

    with torch.device("meta"):
        model = models.build("resnet50")
        convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
        for module in convolutions[1:]:
            module.register_forward_hook(note)
        model(torch.empty(batch, 3, side, side))
    made = []
    for (weight, inputs, stride, padding), count in seen.items():
        out, channels, kernel, _ = weight
        name = f"{kernel}x{kernel} {channels} to {out} at {inputs[2]}, stride {stride}"
        made.append(Layer(name, weight, inputs, False, stride, padding, count))
    return made


# (name, out, in, how many). ViT-B/16 as above; Llama-7B: Touvron et al. 2023, Table 2: 32 blocks of
# width 4096, the MLP of 11008.
_VIT = (
    ("qkv", 3 * 768, 768, 12),
    ("proj", 768, 768, 12),
    ("fc1", 3072, 768, 12),
    ("fc2", 768, 3072, 12),
)
_LLAMA = (("q k v o", 4096, 4096, 128), ("gate up", 11008, 4096, 64), ("down", 4096, 11008, 32))
_VIT_TOKENS = 197 * 8  # of eight images


def _linear_layers(table: tuple, rows: Sequence[int], bias: bool) -> list[Layer]:
    return [
        Layer(f"{name} {inputs} to {out}, {n} rows", (out, inputs), (n, inputs), bias, count=count)
        for n in rows
        for name, out, inputs, count in table
    ]


def _small_layers() -> list[Layer]:
    """A linear layer and two convolutions of odd sizes, for a run of seconds."""
    return [
        Layer("linear 100 to 48, 33 rows", (48, 100), (33, 100), True),
        Layer("3x3 16 to 24 at 9, stride 2", (24, 16, 3, 3), (2, 16, 9, 9), True, 2, 1),
        Layer("1x1 40 to 24 at 7, stride 1", (24, 40, 1, 1), (2, 40, 7, 7), count=2),
    ]


LAYERS = ("resnet50", "resnet50-64", "vit-b16", "llama-7b", "small")


def layers_of(network: str, gpu: bool, batch: int | None = None) -> list[Layer]:
    """Layers of a network of LAYERS; `batch`: images of a convolution (256 on a GPU, else 32).

    The CPU takes fewer rows of linear layers. `resnet50-64` has 8 images of 64x64: convolutions
    with few positions.
    """
    if network == "resnet50":
        return _resnet50_layers(batch or (256 if gpu else 32))
    if network == "resnet50-64":
        return _resnet50_layers(batch or 8, side=64)
    if network == "vit-b16":
        rows = (1, 16, _VIT_TOKENS, 2048, 4096) if gpu else (1, 4, 16, 64, _VIT_TOKENS)
        return _linear_layers(_VIT, rows, bias=True)
    if network == "llama-7b":
        rows = (1, 2, 4, 8, 16, _VIT_TOKENS, 2048, 4096) if gpu else (1, 4, 16, 64, 256)
        return _linear_layers(_LLAMA, rows, bias=False)
    return _small_layers()


def like_weight(mask: Tensor, weight: Tensor) -> Tensor:
    """A mask in the memory order of its weight, which is how peers read it fastest."""
    return torch.empty_like(weight, dtype=mask.dtype).copy_(mask)


class Held:
    """One set of a layer's tensors: x, weight, bias, the output's gradient, mask and bits.

    4-D tensors are channels_last. `leaves` are what gradients are taken of.
    """

    def __init__(
        self,
        layer: Layer,
        device: torch.device,
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        pattern: Pattern,
        seed: int,
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(shape: Sequence[int], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, device=device, generator=generator) * scale
            layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
            return values.to(dtype, memory_format=layout)

        def leaf(values: Tensor) -> torch.nn.Parameter:
            return torch.nn.Parameter(values)

        scale = 1 / math.sqrt(math.prod(layer.weight[1:]))
        self.layer = layer
        self.x = normal(layer.input, dtype).requires_grad_()
        self.weight = leaf(normal(layer.weight, weight_dtype, scale))
        self.bias = leaf(normal(layer.weight[:1], weight_dtype)) if layer.bias else None
        self.grad = normal(layer.output, dtype)
        self.bits = magnitude_masks([self.weight], pattern)[0]
        self.mask = like_weight(ops.unpack_mask(self.bits, self.weight.shape), self.weight)

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.weight, self.bias) if t is not None]


class LayerInputs:
    """What `Inputs` is for lists of weights, for one layer: several sets on the CPU.

    Together they are twice the last-level cache, as far as eight sets can be. On a GPU there is one
    set, whose x changes its sign from sample to sample.
    """

    def __init__(
        self,
        layer: Layer,
        device: torch.device,
        dtypes: tuple[torch.dtype, torch.dtype],
        pattern: Pattern,
        cache: int,
        name: str,
    ) -> None:
        sizes = math.prod(layer.weight), math.prod(layer.input)
        weight_bytes = sizes[0] * dtypes[1].itemsize
        self.case = Case(name, (layer.weight,), dtype=dtypes[1])
        self.device = device
        count = -(-2 * cache // (weight_bytes + sizes[1] * dtypes[0].itemsize))
        count = 1 if device.type == "cuda" else min(8, max(2, count))
        self.sets = [Held(layer, device, *dtypes, pattern, seed) for seed in range(count)]
        self._turn, self._flipped = 0, False

    def first(self) -> int:
        """Place of the set with the values that results are checked on."""
        self._flip(False)
        return 0

    def next(self) -> int:
        """Place of the set for the next sample."""
        self._turn = (self._turn + 1) % len(self.sets)
        if len(self.sets) == 1:
            self._flip(not self._flipped)
        return self._turn

    def _flip(self, wanted: bool) -> None:
        if wanted != self._flipped:
            self.sets[0].x.data.neg_()
            self._flipped = wanted
