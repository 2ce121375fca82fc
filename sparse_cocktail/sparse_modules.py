"""Layers for inference that hold what is kept of an unstructured weight, and nothing else.

A `SparseLinear` or `SparseConv2d` is `values` and `bits`: the kept weights in the order of the
weight view (out, taps, in), and one bit per weight. That is what its state dict has. In float32 on
a CPU they are packed and multiplied without the zeros, where the measured table says that it is
faster (`ops.routes`). Everywhere else the dense weight is made, once, and kept beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .batch_norm import stamp
from .modules import MaskedConv2d, MaskedLinear, filled, padded
from .ops import routes
from .ops.checks import check_bits, check_module, check_padding
from .ops.layerwise import is_channels_last
from .ops.sparse_product import differentiates
from .reference import bits_shape, weight_view

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SparseConv2d", "SparseLinear"]


class _Sparse(nn.Module):
    """What both layers share: kept weights of a fixed shape, and the forms that products read."""

    values: Tensor
    bits: Tensor
    bias: Tensor | None
    groups = 1

    def _init_weight(self, shape: Sequence[int], bias: bool, device, dtype) -> None:
        self.shape = torch.Size(shape)
        self.register_buffer("values", torch.zeros(0, device=device, dtype=dtype))
        words = torch.zeros(bits_shape(self.shape), device=device, dtype=torch.int32)
        self.register_buffer("bits", words)
        added = torch.zeros(shape[0], device=device, dtype=dtype) if bias else None
        self.register_buffer("bias", added)
        self.channels_last = False  # how a dense convolution weight lies
        self._forms: dict[str, tuple[tuple, tuple[Tensor, ...]]] = {}  # source and tensors by name

    @classmethod
    def from_masked(cls, layer: MaskedLinear | MaskedConv2d) -> Self:
        """The layer of what a masked one keeps."""
        check_module(cls.__name__, "layer", layer, cls._plain)
        if not getattr(layer, "masked", False):
            raise ValueError(
                f"{cls.__name__}.from_masked: layer={type(layer).__name__} has no mask; use "
                f"{cls.__name__}.from_dense"
            )
        return cls._from(layer, layer.mask_bits, layer._live_bias())

    @classmethod
    def from_dense(cls, layer: nn.Linear | nn.Conv2d) -> Self:
        """The layer of what is not zero in a plain one."""
        check_module(cls.__name__, "layer", layer, cls._plain)
        if getattr(layer, "masked", False):
            raise ValueError(
                f"{cls.__name__}.from_dense: layer={type(layer).__name__} has a mask; use "
                f"{cls.__name__}.from_masked"
            )
        bits = ops.pack_mask(layer.weight.detach() != 0)
        return cls._from(layer, bits, layer.bias)

    @classmethod
    @torch.inference_mode(False)  # whose tensors have no version to tell writes by
    @torch.no_grad()
    def _from(cls, layer: nn.Module, bits: Tensor, bias: Tensor | None) -> Self:
        made, weight = cls._empty(layer), layer.weight.detach()
        kept = ops.unpack_mask(bits, weight.shape)
        made.values = weight_view(weight)[weight_view(kept)]
        made.bits = bits.detach().clone()
        made.bias = None if bias is None else bias.detach().clone()
        made.channels_last = is_channels_last(weight)
        return made.train(layer.training)

    # ---- forms of the weight ---------------------------------------------------------------------

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return len(self.values) / max(1, self.shape.numel())

    @property
    def weight(self) -> Tensor:
        """The dense weight, zero where pruned; made at every call."""
        out, inputs, *kernel = self.shape
        if self.values.is_meta:
            return self.values.new_empty(self.shape)
        view = self.values.new_zeros(out, math.prod(kernel), inputs)
        view[weight_view(ops.unpack_mask(self.bits, self.shape))] = self.values
        weight = view.view(out, *kernel, inputs).movedim(-1, 1)
        if self.channels_last or weight.dim() == 2:
            return weight
        return weight.clone(memory_format=torch.contiguous_format)  # also where it seems to be so

    def _form(self, name: str) -> tuple[Tensor, ...]:
        """The packed weight, or the dense one, of the present values and bits."""
        if torch.compiler.is_compiling():
            if name in self._forms:
                return self._forms[name][1]
            return (self.weight,)  # of a graph that packs, elsewhere: with gradient or autocast
        source = self.values, stamp(self.values), self.bits, stamp(self.bits)
        held, tensors = self._forms.get(name, ((), ()))
        if held and held[0] is source[0] and held[2] is source[2] and held[1::2] == source[1::2]:
            return tensors
        with torch.inference_mode(False), torch.no_grad():  # forms outlive the mode
            weight = self.weight
            made = ops.sparse_pack(weight, self.bits) if name == "packed" else (weight,)
        self._forms = {**self._forms, name: (source, made)}
        return made

    def _packs(self, x: Tensor, op: str, rows: int) -> bool:
        """Whether x is multiplied by the packed weight."""
        if torch.compiler.is_compiling():
            if not self._forms:
                raise RuntimeError(
                    f"{type(self).__name__}: it chooses how to multiply in its first forward; run "
                    "the model once before torch.compile"
                )
            return "packed" in self._forms and self._packable(x)
        if x.dtype != self.values.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"{type(self).__name__}: x has dtype {x.dtype}, but the layer has "
                f"{self.values.dtype}; convert one of them"
            )
        return (
            type(x) is Tensor
            and not torch.jit.is_tracing()
            and self._packable(x)
            and routes.chosen_sparse(op, rows, self.shape, self.density)
        )

    def _packable(self, x: Tensor) -> bool:
        """Whether the sparse product takes x."""
        return (
            x.device.type == self.values.device.type == "cpu"
            and ops.autocast_dtype(x) == self.values.dtype == torch.float32
            and not differentiates(x)
            and self.groups == 1
        )

    # ---- state -----------------------------------------------------------------------------------

    def _apply(self, *args, **kwargs):
        self._forms = {}
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_forms": {}}

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, *rest) -> None:
        values, bits = state.get(prefix + "values"), state.get(prefix + "bits")
        if values is not None and bits is not None:
            try:
                kept = self._kept(bits, values)
            except (TypeError, ValueError) as error:
                rest[-1].append(f"{prefix}bits: {error}")
                return
            with torch.inference_mode(False):  # so that later writes are seen
                self.values = self.values.new_empty(kept)
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, *rest)
        for name in self._forms if bits is not None else ():  # compiled graphs read them as such
            self._form(name)

    def _kept(self, bits: Tensor, values: Tensor) -> int:
        """How many weights these bits keep, which must be those of this layer."""
        name = type(self).__name__
        check_bits(name, bits, bits_shape(self.shape))
        if bits.is_meta:
            return len(values)
        check_padding(name, bits, self.shape[1])
        kept = int(ops.mask_count(bits))
        if values.shape != (kept,):
            raise ValueError(
                f"{name}: values have shape {tuple(values.shape)}, but the bits keep {kept} "
                "weights; take both from one state dict"
            )
        return kept

    def _told(self) -> str:
        runs = ", ".join(self._forms) or "not run yet"
        return f"bias={self.bias is not None}, density={self.density:.4f}, {runs}"


class SparseLinear(_Sparse):
    """A linear layer that holds what is kept of its weight, for inference.

    Differentiable by its input. Its state dict has `values`, `bits` and `bias`.
    """

    _plain = nn.Linear

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._init_weight((out_features, in_features), bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"SparseLinear: x has {x.shape[-1]} inputs, but the layer has {self.in_features}"
            )
        if self._packs(x, "sparse_linear", math.prod(x.shape[:-1])):
            return ops.sparse_linear(x, *self._form("packed"), self.out_features, self.bias)
        return F.linear(x, *self._form("dense"), self.bias)

    @classmethod
    def _empty(cls, layer: nn.Linear) -> SparseLinear:
        return cls(layer.in_features, layer.out_features, layer.bias is not None, "meta")

    def to_dense(self) -> nn.Linear:
        """A plain nn.Linear with zeros where the weight was pruned."""
        bias = self.bias is not None
        return filled(nn.Linear(self.in_features, self.out_features, bias, "meta"), self)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self._told()}"


class SparseConv2d(_Sparse):
    """A convolution that holds what is kept of its weight, for inference.

    Differentiable by its input. Grouped convolutions run dense.

    Args:
        layer: the nn.Conv2d whose shape and geometry it takes over. The weight starts as zeros: see
            `from_masked` and `from_dense`.
    """

    _plain = nn.Conv2d

    def __init__(self, layer: nn.Conv2d, device=None, dtype=None) -> None:
        check_module("SparseConv2d", "layer", layer, nn.Conv2d)
        super().__init__()
        self.arguments = MaskedConv2d._arguments(layer)
        vars(self).update({k: v for k, v in self.arguments.items() if k not in ("bias", "device")})
        self._pads = tuple(layer._reversed_padding_repeated_twice)
        self._init_weight(layer.weight.shape, layer.bias is not None, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        how = self.arguments
        x, padding = padded(x, how["padding_mode"], self._pads)
        stride, dilation = how["stride"], how["dilation"]
        pixels = x.numel() // max(1, x.shape[-3])
        if self._packs(x, "sparse_conv2d", pixels // math.prod(stride)):
            packed = self._form("packed")
            return ops.sparse_conv2d(x, *packed, self.bias, self.shape, stride, padding, dilation)
        (weight,) = self._form("dense")
        return F.conv2d(x, weight, self.bias, stride, padding, dilation, self.groups)

    @classmethod
    def _empty(cls, layer: nn.Conv2d) -> SparseConv2d:
        return cls(layer, "meta")

    def to_dense(self) -> nn.Conv2d:
        """A plain nn.Conv2d with zeros where the weight was pruned."""
        return filled(nn.Conv2d(**self.arguments), self)

    def extra_repr(self) -> str:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
        sizes = ", ".join(f"{name}={self.arguments[name]}" for name in names)
        return f"{sizes}, {self._told()}"
