"""The groups of `bench_sparse.py`: layers with packed weights at several sparsities, and dense."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import mkldnn

from sparse_cocktail.ops.sparse_product import sparse_conv2d, sparse_linear, sparse_pack
from sparse_cocktail.patterns import parse
from sparse_cocktail.reference import unpack_mask
from sparse_cocktail.selection import magnitude_masks

from gates import Verdict  # isort: skip - neighbours, not packages
from groups_masked import BOUND, Rounding  # isort: skip
from shapes import Case, Layer, layers_of  # isort: skip
from timing import Group, Impl  # isort: skip

__all__ = ["LAYOUTS", "ONEDNN", "SparseInputs", "layers", "positions", "sparse_group"]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ONEDNN = "oneDNN"  # the layout of tensors of torch.utils.mkldnn
LINEAR = ((768, 3072), (3072, 768), (2048, 1000), (4096, 11008))  # (in, out)
BATCHES, ROWS = (1, 8), (1, 8, 64, 197)  # of convolutions, of linear layers
LOOKED_AT = {2: (64, 256), 4: (1, 64)}  # rows or images, and outputs that the gate compares
MOST_SETS = 4


def layers(quick: bool, batch: int | None) -> list[tuple[str, Layer]]:
    """(network, layer): the convolutions of ResNet-50 but the first, and linear layers.

    `batch`: images of convolutions and rows of linear layers (default: BATCHES and ROWS).
    """
    if quick:
        return [("small", layer) for layer in layers_of("small", gpu=False)]
    found = [
        ("resnet50", layer)
        for images in ((batch,) if batch else BATCHES)
        for layer in layers_of("resnet50", gpu=False, batch=images)
    ]
    for inputs, out in LINEAR:  # neighbours share their weights
        for rows in (batch,) if batch else ROWS:
            name = f"{inputs} to {out}, {rows} row{'s' * (rows > 1)}"
            found.append(("linear", Layer(name, (out, inputs), (rows, inputs), bias=True)))
    return found


def positions(layer: Layer) -> int:
    """Rows of the product: of x, or pixels of all output images."""
    return math.prod(layer.output) // layer.weight[0]


class _Weights:
    """One set of a layer's weights: dense, and packed by sparsity."""

    def __init__(self, layer: Layer, sparsities: Sequence[float], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        scale = 1 / math.sqrt(math.prod(layer.weight[1:]))
        self.weight = torch.randn(layer.weight, generator=generator) * scale
        self.bias = torch.randn(layer.weight[0], generator=generator) if layer.bias else None
        self.bits = {
            s: magnitude_masks([self.weight], parse(f"unstructured-{s}"))[0] for s in sparsities
        }
        self.packed = {s: sparse_pack(self.weight, bits) for s, bits in self.bits.items()}
        self.laid = {name: self.weight for name in LAYOUTS}
        if self.weight.dim() == 4:
            self.laid["channels_last"] = self.weight.to(memory_format=torch.channels_last)


class _Held:
    """A set of weights with an input, in both layouts where there are two."""

    def __init__(self, layer: Layer, weights: _Weights, seed: int) -> None:
        self.layer, self.weights = layer, weights
        x = torch.randn(layer.input, generator=torch.Generator().manual_seed(100 + seed))
        self.x = {name: x for name in LAYOUTS}
        if x.dim() == 4:
            self.x["channels_last"] = x.to(memory_format=torch.channels_last)


class SparseInputs:
    """Inputs of `measure` for one layer: two to four sets, as far as twice `cache` bytes goes.

    Args:
        before: inputs whose weights are taken over where the layer's are of the same shape.
    """

    def __init__(
        self,
        layer: Layer,
        sparsities: Sequence[float],
        cache: int,
        name: str,
        before: SparseInputs | None = None,
    ) -> None:
        self.case, self.device = Case(name, (layer.weight,)), torch.device("cpu")
        count = -(-2 * cache // (4 * (math.prod(layer.weight) + math.prod(layer.input))))
        count = min(MOST_SETS, max(2, count))
        known = []
        if before is not None and before.case.shapes == self.case.shapes:
            known = [held.weights for held in before.sets]
        known += [_Weights(layer, sparsities, seed) for seed in range(len(known), count)]
        self.sets = [_Held(layer, known[seed], seed) for seed in range(count)]
        self._turn = 0

    def first(self) -> int:
        """Place of the set with the values that results are checked on."""
        return 0

    def next(self) -> int:
        """Place of the set for the next sample."""
        self._turn = (self._turn + 1) % len(self.sets)
        return self._turn


# ---- what runs -----------------------------------------------------------------------------------


def _sparse(held: _Held, sparsity: float, layout: str) -> Callable[[], Tensor]:
    layer, bias = held.layer, held.weights.bias
    x, packed = held.x[layout], held.weights.packed[sparsity]
    if x.dim() == 2:
        return lambda: sparse_linear(x, *packed, layer.weight[0], bias)
    return lambda: sparse_conv2d(x, *packed, bias, layer.weight, layer.stride, layer.padding)


def _dense(held: _Held, layout: str) -> Callable[[], Tensor]:
    x, weight = held.x[layout], held.weights.laid[layout]
    return lambda: _product(held, x, weight, held.weights.bias)


def _onednn(held: _Held, weight: Tensor) -> Callable[[], Tensor]:
    """The dense layer as torch.utils.mkldnn converts it, which it can be for inference only."""
    layer, bias = held.layer, held.weights.bias is not None
    if len(layer.weight) == 2:
        module = nn.Linear(layer.weight[1], layer.weight[0], bias, device="meta")
    else:
        out, inputs, *kernel = layer.weight
        how = {"stride": layer.stride, "padding": layer.padding, "bias": bias}
        module = nn.Conv2d(inputs, out, kernel, **how, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.bias = nn.Parameter(held.weights.bias, requires_grad=False) if bias else None
    converted, x = mkldnn.to_mkldnn(module.eval()), held.x["contiguous"].to_mkldnn()
    return lambda: converted(x)


def _product(held: _Held, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dim() == 2:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, held.layer.stride, held.layer.padding)


# ---- the gate ------------------------------------------------------------------------------------


class _Gate:
    """Gate of a layer on rows (or images) and outputs spread over it.

    Errors are in units of those of PyTorch with the same weights in the same layout, whole as the
    layer is: PyTorch has other algorithms for its parts.
    """

    def __init__(self, held: _Held) -> None:
        self.held, self.known = held, {}
        layer = held.layer
        self.rows, self.outs = (
            torch.linspace(0, count - 1, min(count, most)).long()
            for count, most in zip(layer.output[:2], LOOKED_AT[len(layer.weight)], strict=True)
        )

    def __call__(self, result: list) -> Verdict:
        """Verdict on [sparsity or None, layout, output]."""
        *kind, y = result
        y = y.to_dense() if y.is_mkldnn else y
        if tuple(y.shape) != self.held.layer.output or y.dtype != torch.float32:
            return Verdict(math.inf, BOUND, "a result of another shape or dtype")
        if tuple(kind) not in self.known:
            self.known[tuple(kind)] = self._rounding(*kind)
        return self.known[tuple(kind)]([self._part(y)])

    def _part(self, y: Tensor) -> Tensor:
        return y[self.rows][:, self.outs]

    def _rounding(self, sparsity: float | None, layout: str) -> Rounding:
        held, weight, bias = self.held, self.held.weights.weight, self.held.weights.bias
        if sparsity is not None:
            mask = unpack_mask(held.weights.bits[sparsity], weight.shape)
            weight = torch.where(mask, weight, 0.0)
        if layout == ONEDNN:
            whole = _onednn(held, weight)().to_dense()
        else:
            conv = weight.dim() == 4
            laid = weight.contiguous(memory_format=LAYOUTS[layout]) if conv else weight
            whole = _product(held, held.x[layout], laid, bias)
        bias = None if bias is None else bias[self.outs].double()
        x = held.x["contiguous"][self.rows].double()
        exact = _product(held, x, weight[self.outs].double(), bias)
        return Rounding([self._part(whole)], [exact], torch.float32, math.inf)


def sparse_group(inputs: SparseInputs, sparsities: Sequence[float]) -> tuple[Group, dict]:
    """A layer's group, and by implementation the facts of it that rows carry besides."""
    held = inputs.sets[0]
    layer, conv = held.layer, len(held.layer.input) == 4
    outputs = positions(layer) * layer.weight[0]
    moved = 4 * (math.prod(layer.input) + outputs)
    impls, facts = [], {}

    def add(name: str, layout: str, sparsity: float | None, bind: Callable, weight: int) -> None:
        result = lambda y: [sparsity, layout, y]  # noqa: E731
        impls.append(Impl(name, bind, result))
        density = 1.0 if sparsity is None else held.weights.packed[sparsity][0].numel() / numel
        size = {"bytes": moved + round(weight * numel * density)}
        flops = round(2 * outputs * math.prod(layer.weight[1:]) * density)
        facts[name] = {"sparsity": sparsity, "layout": layout, **size, "flops": flops}

    numel = math.prod(layer.weight)
    for layout in LAYOUTS if conv else ("contiguous",):
        suffix = f", {layout}" if conv else ""
        for sparsity in sparsities:
            bind = lambda held, s=sparsity, at=layout: _sparse(held, s, at)  # noqa: E731
            add(f"ours/{sparsity}{suffix}", layout, sparsity, bind, 6)
        bind = lambda held, at=layout: _dense(held, at)  # noqa: E731
        add(f"torch/dense{suffix}", layout, None, bind, 4)
    converted = lambda held: _onednn(held, held.weights.weight)  # noqa: E731
    add("torch/dense, oneDNN tensors", ONEDNN, None, converted, 4)
    op = "sparse_conv2d" if conv else "sparse_linear"
    group = Group(op, "", impls, _Gate(held), moved, weights=numel)
    return group, facts
