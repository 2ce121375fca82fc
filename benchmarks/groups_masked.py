"""The layers of `bench_masked.py`: what runs, which gate, which memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import grad as convolution

from sparse_cocktail import ops
from sparse_cocktail.modules import MaskedConv2d, MaskedLinear
from sparse_cocktail.ops.routes import MOST_ROWS

from gates import Verdict  # isort: skip - neighbours, not packages
from groups_masks import our_name  # isort: skip
from peers_masked import DENSE, Way, layer_peers, mixed, plain_layer, product  # isort: skip
from shapes import Held, LayerInputs  # isort: skip
from timing import Group, Impl  # isort: skip

__all__ = ["OURS", "Dense", "Rounding", "exactly", "layer_group", "peak_bytes", "places"]
__all__ += ["saved_bytes"]

OURS = ("ours/op", "ours/module")  # as dispatched; a network has the second
BOUND = 2.0  # times the error of plain torch
LOOKED_AT = {2: (64, 64, 64), 4: (2, 16, 16)}  # rows or images, outputs, inputs of a layer
Tensors = list[Tensor]


# ---- the gate ------------------------------------------------------------------------------------


class Dense(list):
    """Results of an implementation that has no mask."""


def exactly() -> AbstractContextManager:
    """Convolutions on a GPU without TF32: for what the others are compared with."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


class Rounding:
    """A gate: errors against `exact`, in units of those of plain torch, are at most BOUND.

    Both and the result are turned into the same pieces, of which the largest error of each counts.
    A quarter of a rounding is added: plain torch may be exact by luck.
    """

    def __init__(self, torchs: Tensors, exact: Tensors, dtype: torch.dtype, norm: float) -> None:
        self.exact = [e.double() for e in exact]
        self.norm, unit = norm, torch.finfo(dtype).eps / 4
        self.units = [
            self._size(t.double() - e) + unit * self._size(e)
            for t, e in zip(torchs, self.exact, strict=True)
        ]

    def _size(self, values: Tensor) -> float:
        return float(torch.linalg.vector_norm(values, self.norm)) if values.numel() else 0.0

    def __call__(self, found: Tensors) -> Verdict:
        errors = [
            self._size(f.double() - e) / max(unit, 1e-300)
            for f, e, unit in zip(found, self.exact, self.units, strict=True)
        ]
        worst = max(math.inf if math.isnan(error) else error for error in errors)
        says = "" if worst <= BOUND else f"error {worst:.3g} times that of plain torch"
        return Verdict(worst, BOUND, says)


def places(count: int, most: int, device: torch.device) -> Tensor:
    return torch.linspace(0, count - 1, min(count, most), device=device).long()


@dataclass
class LayerGate:
    """Gate of a layer on rows (or images), outputs and inputs spread over it.

    The result is [y] or [y, dx, dW, db]; pruned weights must have a gradient of exactly zero.
    """

    held: Held
    train: bool
    known: dict[bool, Rounding] = field(default_factory=dict)

    def __call__(self, result: Tensors) -> Verdict:
        masked = not isinstance(result, Dense)
        wanted = [self.held.grad, *(self.held.leaves if self.train else ())]  # y is as its gradient
        kinds = [[(t.shape, t.dtype) for t in tensors] for tensors in (result, wanted)]
        if kinds[0] != kinds[1]:
            return Verdict(math.inf, BOUND, "results of other shapes or dtypes")
        if masked and self.train and result[2].masked_fill(self.held.mask, 0).any():
            return Verdict(math.inf, BOUND, "a pruned weight has a gradient")
        if masked not in self.known:
            self.known[masked] = self._rounding(masked)
        return self.known[masked](self._sliced(result))

    def _weight(self, masked: bool) -> Tensor:
        weight = self.held.weight.detach()
        return torch.where(self.held.mask, weight, 0.0) if masked else weight

    def _axes(self) -> list[Tensor]:
        """Places of rows (or images), outputs and inputs."""
        layer, device = self.held.layer, self.held.x.device
        counts = (layer.input[0], *layer.weight[:2])
        return [
            places(c, s, device) for c, s in zip(counts, LOOKED_AT[len(layer.weight)], strict=True)
        ]

    def _sliced(self, result: Tensors) -> Tensors:
        rows, outs, ins = self._axes()
        y, *grads = result
        pieces = [y[rows][:, outs]]
        if grads:
            pieces += [grads[0][rows][:, ins], grads[1][outs][:, ins]]
            pieces += [grads[2][outs]] if len(grads) > 2 else []
        return [piece.detach() for piece in pieces]

    def _rounding(self, masked: bool) -> Rounding:
        held = self.held
        weight = self._weight(masked).to(held.x.dtype).requires_grad_()
        bias = None if held.bias is None else held.bias.detach().to(held.x.dtype).requires_grad_()
        y = product(held, held.x, weight, bias)
        result = [y]
        if self.train:
            leaves = [t for t in (held.x, weight, bias) if t is not None]
            result += torch.autograd.grad(y, leaves, held.grad)
            if masked:
                result[2] = result[2] * held.mask
        return Rounding(self._sliced(result), self._exact(masked), held.x.dtype, math.inf)

    def _exact(self, masked: bool) -> Tensors:
        """The same pieces in float64, each from what it depends on."""
        held, layer = self.held, self.held.layer
        rows, outs, ins = self._axes()
        x, grad, weight = held.x.detach(), held.grad, self._weight(masked)
        bias = None if held.bias is None else held.bias.detach()[outs].double()
        y = product(held, x[rows].double(), weight[outs].double(), bias)
        if not self.train:
            return [y]
        to_x = (weight[:, ins].double(), grad[rows].double())
        to_weight = (x[:, ins].double(), grad[:, outs].double())
        if len(layer.weight) == 2:
            dx, dw = to_x[1] @ to_x[0], to_weight[1].t() @ to_weight[0]
        else:
            how = (layer.stride, layer.padding)
            images = (len(rows), len(ins), *layer.input[2:])
            kernel = (len(outs), len(ins), *layer.weight[2:])
            dx = convolution.conv2d_input(images, *to_x, *how)
            dw = convolution.conv2d_weight(to_weight[0], kernel, to_weight[1], *how)
        if masked:
            dw = dw * held.mask[outs][:, ins]
        exact = [y, dx, dw]
        if held.bias is not None:
            exact.append(to_weight[1].transpose(0, 1).flatten(1).sum(1))
        return exact


# ---- memory --------------------------------------------------------------------------------------


def saved_bytes(forward: Callable[[], Tensor], parameters: Tensors) -> int:
    """Bytes that a forward keeps for its backward, each storage once, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()  # held, so that no storage of the graph is used again
    total = sum(kept.values())
    del y
    return total


def peak_bytes(step: Callable[[], object]) -> int:
    """Bytes that a step needs at its peak on a GPU, over what was there before."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# ---- layers --------------------------------------------------------------------------------------


def _op(held: Held) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        if held.weight.dim() == 2:
            return ops.masked_linear(held.x, held.weight, held.bits, held.bias)
        how = (held.layer.stride, held.layer.padding)
        return ops.masked_conv2d(held.x, held.weight, held.bits, held.bias, *how)

    return forward


def _module(held: Held) -> Callable[[], Tensor]:
    module = plain_layer(held, MaskedLinear, MaskedConv2d)
    module.set_mask(held.bits)

    def forward() -> Tensor:
        with mixed(held):
            return module(held.x)

    return forward


def _our_ways(device: torch.device, held: Held) -> list[Way]:
    note = f"the weight by {our_name('masked_weight', device) or 'plain torch'}"
    few = held.grad.numel() // len(held.weight) <= MOST_ROWS
    fp32 = held.x.dtype == held.weight.dtype == torch.float32
    forced = [
        Way(f"ours/route {name}", _op, around=lambda name=name: ops.route(name))
        for name in ops.ROUTES
        if device.type == "cuda" or (few and fp32)  # else the CPU has one
    ]
    return [Way("ours/op", _op, note), Way("ours/module", _module), *forced]


def _call(way: Way, held: Held, train: bool) -> Callable[[], Tensors]:
    forward = way.build(held)

    def infer() -> Tensors:
        with way.around(), torch.no_grad():
            return [forward()]

    def step() -> Tensors:
        with way.around():
            y = forward()
            return [y.detach(), *torch.autograd.grad(y, held.leaves, held.grad)]

    return step if train else infer


def _layer_memory(way: Way, inputs: LayerInputs) -> Callable[[], int]:
    held = inputs.sets[0]

    def measure() -> int:
        if held.x.is_cuda:
            return peak_bytes(_call(way, held, train=True))
        parameters = [p for p in (held.weight, held.bias) if p is not None]
        with way.around():
            return saved_bytes(way.build(held), parameters)

    return measure


def layer_group(
    inputs: LayerInputs, train: bool, setting: str
) -> tuple[Group, dict[str, Callable[[], int]]]:
    """A layer's group, and by implementation what measures the memory of a training step."""
    held, device = inputs.sets[0], inputs.device
    op = "masked_linear" if len(held.layer.weight) == 2 else "masked_conv2d"
    ways = [*_our_ways(device, held), *layer_peers()]

    def impl(way: Way) -> Impl:
        kind = Dense if way.name == DENSE else list
        return Impl(way.name, lambda held: _call(way, held, train), kind, note=way.note)

    impls = [impl(way) for way in ways]
    tensors = (held.x, held.weight, held.grad)
    fewest = sum(t.numel() * t.element_size() for t in tensors) * (2 if train else 1)
    flops = held.layer.flops * (3 if train else 1)
    gate = LayerGate(held, train)
    group = Group(op, setting, impls, gate, fewest, flops, weights=held.weight.numel())
    return group, {way.name: _layer_memory(way, inputs) for way in ways} if train else {}
