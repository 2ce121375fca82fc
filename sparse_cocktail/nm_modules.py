"""Layers for inference from compressed N:M weights.

An `NMLinear` or `NMConv2d` is what is kept of a weight: `values` and `bits`, as `ops.nm_compress`
makes them. That is what its state dict has, on every machine. How it multiplies is chosen for the
device (`ops.nm_routes`), and each way reads a form of its own: the compressed weight, that which is
packed for sparse tensor cores, or the dense one where that is faster. The first forward makes it
and keeps the values beside it; `pack` drops what is not read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

from . import ops
from .batch_norm import stamp
from .modules import MaskedConv2d, MaskedLinear, filled, padded
from .ops import nm_routes
from .ops.checks import check_module
from .ops.layerwise import is_channels_last
from .ops.nm import check_dtype, check_groups, check_inputs
from .patterns import NM, parse
from .reference import bits_shape
from .reference_nm import nm_unpack, values_shape

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["NMConv2d", "NMLinear"]


def _nm_pattern(op: str, pattern: NM | str) -> NM:
    """The N:M pattern of a name; ValueError for another one."""
    pattern = parse(pattern)
    if not isinstance(pattern, NM):
        raise ValueError(
            f"{op}: pattern={str(pattern)!r} is not N:M such as '2:4'; take SparseLinear or "
            "SparseConv2d for others, as to_compressed does"
        )
    return pattern


@dataclass(frozen=True)
class _Form:
    """A weight as the routes of a plan read it; never changed, so that threads may share it."""

    plan: nm_routes.Plan
    source: tuple  # which values and bits it was made from; empty: nothing else holds the weight
    dtype: torch.dtype
    values: Tensor | None = None
    packed: Tensor | None = None
    meta: Tensor | None = None
    dense: Tensor | None = None
    vendors: Tensor | None = None  # cuSPARSELt's


class _NM(nn.Module):
    """What both layers share: a compressed weight of fixed shape, and how it is multiplied."""

    values: Tensor | None  # None: `pack` has dropped them, and the form has the weight
    bits: Tensor

    def _init_weight(self, shape: Sequence[int], pattern: NM | str, bias, device, dtype) -> None:
        name = type(self).__name__
        self.shape, self.pattern = tuple(shape), _nm_pattern(name, pattern)
        check_inputs(name, "weight", shape[1], self.pattern.m)
        check_dtype(name, dtype)
        n, m = self.pattern.n, self.pattern.m
        values = torch.zeros(values_shape(self.shape, n, m), device=device, dtype=dtype)
        self.register_buffer("values", values)
        words = torch.zeros(bits_shape(self.shape), device=device, dtype=torch.int32)
        self.register_buffer("bits", words)
        added = torch.zeros(shape[0], device=device, dtype=dtype) if bias else None
        self.register_buffer("bias", added)
        self.channels_last = False  # how a dense convolution weight lies
        self._form: _Form | None = None
        self._told: tuple | None = None  # what `pack` was told: rows and mode

    @classmethod
    def from_masked(cls, layer: MaskedLinear | MaskedConv2d, pattern: NM | str) -> Self:
        """The compressed layer of a masked one whose mask keeps at most n of every m weights."""
        return cls._from(layer, pattern, masked=True)

    @classmethod
    def from_dense(cls, layer: nn.Linear | nn.Conv2d, pattern: NM | str) -> Self:
        """The compressed layer of a plain one, pruned to its largest weights."""
        return cls._from(layer, pattern, masked=False)

    @classmethod
    def _from(cls, layer: nn.Module, pattern: NM | str, masked: bool) -> Self:
        plain, name = cls._plain, cls.__name__
        check_module(name, "layer", layer, plain)
        if masked is not getattr(layer, "masked", False):
            has, other = ("no", "from_dense") if masked else ("a", "from_masked")
            raise ValueError(
                f"{name}.from_{'masked' if masked else 'dense'}: layer={type(layer).__name__} has "
                f"{has} mask; use {name}.{other}"
            )
        made = cls._empty(layer, pattern)
        made._fill(layer, layer.mask_bits if masked else None)
        return made

    def _fill(self, layer: nn.Module, bits: Tensor | None) -> None:
        """Take over a layer's weight, with its mask or else the largest weights."""
        n, m = self.pattern.n, self.pattern.m
        weight, bias = layer.weight.detach(), layer.bias
        with torch.inference_mode(False), torch.no_grad():  # so that later writes are seen
            if bits is not None:
                bias = layer._live_bias()
                check_groups(f"{type(self).__name__}.from_masked", bits, self.shape[1], n, m)
            self.values, self.bits = ops.nm_compress(weight, n, m, bits)
            self.bias = None if bias is None else bias.detach().clone()
        self.channels_last = is_channels_last(weight)
        self.train(layer.training)

    # ---- forms of the weight ---------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The dense weight, zero where pruned; made at every call."""
        n, m = self.pattern.n, self.pattern.m
        return self._laid(ops.nm_decompress(self._compressed(), self.bits, n, m, self.shape))

    @property
    def plan(self) -> nm_routes.Plan | None:
        """Which route which number of rows takes; None before the first forward or `pack`."""
        return None if self._form is None else self._form.plan

    def compressed(self) -> tuple[Tensor, Tensor]:
        """(values, bits) as `ops.nm_compress` gives them, also where `pack` dropped `values`."""
        return self._compressed(), self.bits

    def _compressed(self) -> Tensor:
        """The values, from whatever is held now."""
        values, form = self.values, self._form
        if values is not None:
            return values
        if form.values is not None:
            return form.values
        weight = form.dense
        if weight is None:
            weight = nm_unpack(form.packed, form.meta, self.shape[:2]).view(self.shape)
        return ops.nm_compress(weight, self.pattern.n, self.pattern.m, self.bits)[0]

    def pack(self, rows: tuple[int, int] = nm_routes.ROWS, mode: str = "eager") -> None:
        """Choose how to multiply on the present device, and hold only what that reads.

        It is done again after `.to` and `load_state_dict`. Call it before torch.compile and
        torch.export, before capturing a CUDA graph, and to say which sizes there will be.

        Args:
            rows: the fewest and the most rows of x; images times positions of a convolution. More
                or fewer still work, by the nearest choice.
            mode: "graph" for layers that run inside CUDA graphs, where the host's time is free.
        """
        if not isinstance(rows, (tuple, list)) or len(rows) != 2:
            raise ValueError(
                f"{type(self).__name__}.pack: rows={rows!r} is no pair (fewest, most); for "
                "example (1, 4096)"
            )
        told = tuple(rows), mode
        made = self._made(self._compressed(), told)
        self._form = replace(made, source=())  # which would hold the values
        self._told, self.values = told, None

    @torch.inference_mode(False)  # forms outlive the mode
    @torch.no_grad()
    def _made(self, values: Tensor, told: tuple) -> _Form:
        bits, (n, m) = self.bits, (self.pattern.n, self.pattern.m)
        source = values, stamp(values), bits, stamp(bits)
        if values.is_meta:
            return _Form(nm_routes.DENSE, source, values.dtype, dense=values.new_empty(self.shape))
        plan = self._choices(values, *told)
        routes, parts = set(plan.routes), {}
        if "compressed" in routes:
            parts["values"] = values
        if routes & {"gemm", "skinny"}:
            parts["packed"], parts["meta"] = ops.nm_pack(self._flat(values), bits, n, m)
        if routes & {"dense", "cusparselt"}:
            parts["dense"] = self._laid(ops.nm_decompress(values, bits, n, m, self.shape))
        if "cusparselt" in routes:
            flat = parts["dense"].view(self.shape[:2])
            parts["vendors"] = SparseSemiStructuredTensorCUSPARSELT.from_dense(flat)
        return _Form(plan, source, values.dtype, **parts)

    def _choices(self, values: Tensor, rows: tuple[int, int], mode: str) -> nm_routes.Plan:
        of_layer = self.pattern.n, self.pattern.m, *self.shape[:2]
        return nm_routes.plan(values, *of_layer, rows, mode)

    def _current(self) -> _Form:
        """The form of the present weight."""
        form, values = self._form, self.values
        if values is None:
            return form
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{type(self).__name__}: call pack() before torch.compile")
        if form is not None and form.source:
            made_from, its_stamp, bits, bits_stamp = form.source
            same = made_from is values and bits is self.bits
            if same and (its_stamp, bits_stamp) == (stamp(values), stamp(bits)):
                return form
        made = self._made(values, self._told or (nm_routes.ROWS, "eager"))
        if self._told is None:  # else these are lent values, as functional_call does
            self._form = made
        return made

    def _laid(self, weight: Tensor) -> Tensor:
        """A decompressed weight in the memory format of this layer's."""
        if self.channels_last or weight.dim() == 2:
            return weight
        return weight.clone(memory_format=torch.contiguous_format)  # also where it seems to be so

    def _flat(self, values: Tensor) -> Tensor:
        """Values of a 1x1 convolution as those of a linear layer."""
        out, inputs = self.shape[:2]
        return values.view(values_shape((out, inputs), self.pattern.n, self.pattern.m))

    # ---- state -----------------------------------------------------------------------------------

    def _unpacked(self) -> tuple | None:
        """Back to values and bits; what `pack` was told."""
        told = self._told
        self.values = self._compressed()
        self._form = self._told = None
        return told

    def _repacked(self, told: tuple | None) -> None:
        if told is not None:
            self.pack(*told)

    def _apply(self, *args, **kwargs):
        told = self._unpacked()
        result = super()._apply(*args, **kwargs)
        self._repacked(told)
        return result

    def __getstate__(self) -> dict:
        buffers = {**self._buffers, "values": self._compressed()}
        state = {**self.__dict__, "_buffers": buffers, "_form": None, "_told": None}
        return {**state, "_packed": self._told}

    def __setstate__(self, state: dict) -> None:
        told = state.pop("_packed", None)
        super().__setstate__(state)
        self._repacked(told)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "values"] = self._compressed()
        destination[prefix + "nm"] = torch.tensor([self.pattern.n, self.pattern.m])

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, *rest) -> None:
        told = self._unpacked()
        pattern, bits = state.pop(prefix + "nm", None), state.get(prefix + "bits")
        mine = self.pattern.n, self.pattern.m
        if pattern is not None and tuple(pattern.tolist()) != mine:
            n, m = pattern.tolist()
            rest[-1].append(f"{prefix}nm: the weight is {n}:{m}, but this layer is {self.pattern}")
        else:
            if pattern is None and bits is not None and strict:
                missing.append(prefix + "nm")
            super()._load_from_state_dict(state, prefix, metadata, strict, missing, *rest)
        self._repacked(told)

    # ---- products --------------------------------------------------------------------------------

    def _form_for(self, x: Tensor) -> _Form:
        form = self._current()
        if x.dtype != form.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"{type(self).__name__}: x has dtype {x.dtype}, but the layer has {form.dtype}; "
                "convert one of them"
            )
        return form

    def _product(self, x: Tensor, form: _Form) -> Tensor:
        """x (..., in) times the weight as (out, in), plus the bias."""
        out, inputs = self.shape[:2]
        if x.shape[-1] != inputs:
            raise ValueError(
                f"{type(self).__name__}: x has {x.shape[-1]} inputs, but the layer has {inputs}"
            )
        route = form.plan.route(math.prod(x.shape[:-1]))
        if route in ("gemm", "skinny"):
            return ops.nm_linear_packed(x, form.packed, form.meta, out, self.bias, kernel=route)
        if route == "compressed":
            pattern = self.pattern.n, self.pattern.m
            return ops.nm_linear(x, self._flat(form.values), self.bits, *pattern, self.bias)
        weight = form.vendors if route == "cusparselt" else form.dense.view(out, inputs)
        return F.linear(x, weight, self.bias)

    def _runs(self) -> str:
        runs = "not packed yet" if self._form is None else f"runs {self.plan}"
        return f"{self.pattern}, bias={self.bias is not None}, {runs}"


class NMLinear(_NM):
    """A linear layer that multiplies from its compressed N:M weight; for inference.

    Differentiable by its input. Its state dict has `values`, `bits`, `bias` and `nm`, the pattern.

    Args:
        in_features, out_features: in_features % m == 0.
        pattern: N:M, such as "2:4".
    """

    _plain = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pattern: NM | str,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._init_weight((out_features, in_features), pattern, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self._form_for(x))

    @classmethod
    def _empty(cls, layer: nn.Linear, pattern: NM | str) -> NMLinear:
        bias = layer.bias is not None
        return cls(layer.in_features, layer.out_features, pattern, bias, "meta")

    def to_dense(self) -> nn.Linear:
        """A plain nn.Linear with zeros where the weight was pruned."""
        bias = self.bias is not None
        return filled(nn.Linear(self.in_features, self.out_features, bias, "meta"), self)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self._runs()}"


class NMConv2d(_NM):
    """A convolution with a compressed N:M weight, for inference.

    With a 1x1 kernel, stride 1 and no padding or groups it is multiplied like an `NMLinear`, best
    with x in channels_last. Every other convolution runs dense, from the decompressed weight.

    Args:
        layer: the nn.Conv2d whose shape and geometry it takes over; its in_channels / groups is a
            multiple of m. The weight starts as zeros: see `from_masked` and `from_dense`.
        pattern: N:M, such as "2:4".
    """

    _plain = nn.Conv2d

    def __init__(self, layer: nn.Conv2d, pattern: NM | str, device=None, dtype=None) -> None:
        check_module("NMConv2d", "layer", layer, nn.Conv2d)
        super().__init__()
        self.arguments = MaskedConv2d._arguments(layer)
        vars(self).update({k: v for k, v in self.arguments.items() if k not in ("bias", "device")})
        self._pads = tuple(layer._reversed_padding_repeated_twice)
        bias = layer.bias is not None
        self._init_weight(layer.weight.shape, pattern, bias, device, dtype)
        plain = layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1
        self.pointwise = plain and not any(self._pads)

    def _choices(self, values: Tensor, rows: tuple[int, int], mode: str) -> nm_routes.Plan:
        return super()._choices(values, rows, mode) if self.pointwise else nm_routes.DENSE

    def forward(self, x: Tensor) -> Tensor:
        form, how = self._form_for(x), self.arguments
        if self.pointwise and x.dim() in (3, 4) and form.plan.routes != ("dense",):
            y = self._product(x.movedim(-3, -1), form).movedim(-1, -3)
            return y.contiguous() if x.is_contiguous() and not self.channels_last else y
        x, padding = padded(x, how["padding_mode"], self._pads)
        bias, stride = self.bias, how["stride"]
        return F.conv2d(x, form.dense, bias, stride, padding, how["dilation"], how["groups"])

    @classmethod
    def _empty(cls, layer: nn.Conv2d, pattern: NM | str) -> NMConv2d:
        return cls(layer, pattern, "meta")

    def to_dense(self) -> nn.Conv2d:
        """A plain nn.Conv2d with zeros where the weight was pruned."""
        return filled(nn.Conv2d(**self.arguments), self)

    def extra_repr(self) -> str:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
        sizes = ", ".join(f"{name}={self.arguments[name]}" for name in names)
        return f"{sizes}, {self._runs()}"
