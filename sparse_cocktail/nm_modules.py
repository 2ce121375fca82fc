"""Layers for inference from compressed N:M weights.

An `NMLinear` or `NMConv2d` is what is kept of a weight: `values` and `bits`, as `ops.nm_compress`
makes them. That is what its state dict has, on every machine. The first forward on a device makes
what the fastest way there reads (`ops.nm_routes`): for sparse tensor cores the packed form takes
the place of the values; where dense is faster, the layer holds the dense weight, and its `repr`
says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .modules import MaskedConv2d, MaskedLinear, padded
from .ops import nm_routes
from .ops.nm import check_groups, check_inputs
from .patterns import NM, parse
from .reference import bits_shape
from .reference_nm import nm_unpack, values_shape

__all__ = ["NMConv2d", "NMLinear"]


def _nm(op: str, pattern: NM | str) -> NM:
    pattern = parse(pattern)
    if not isinstance(pattern, NM):
        raise ValueError(
            f"{op}: pattern={str(pattern)!r} is not N:M such as '2:4'; layers of other patterns "
            "stay masked, or become plain ones with to_dense"
        )
    return pattern


class _NM(nn.Module):
    """What both layers share: a compressed weight of fixed shape, and how it is multiplied."""

    values: Tensor | None
    bits: Tensor

    def _init_weight(self, shape: Sequence[int], pattern: NM | str, bias, device, dtype) -> None:
        name = type(self).__name__
        self.shape, self.pattern = tuple(shape), _nm(name, pattern)
        check_inputs(name, "weight", shape[1], self.pattern.m)
        values = values_shape(self.shape, self.pattern.n, self.pattern.m)
        self.register_buffer("values", torch.zeros(values, device=device, dtype=dtype))
        words = torch.zeros(bits_shape(self.shape), device=device, dtype=torch.int32)
        self.register_buffer("bits", words)
        added = torch.zeros(shape[0], device=device, dtype=dtype) if bias else None
        self.register_buffer("bias", added)
        for form in ("packed", "meta", "dense"):  # made by `pack`
            self.register_buffer(form, None, persistent=False)
        self.plan: nm_routes.Plan | None = None

    def _fill(self, weight: Tensor, bias: Tensor | None, bits: Tensor | None) -> None:
        """Take over a dense weight, with its mask or else its largest weights."""
        n, m = self.pattern.n, self.pattern.m
        with torch.no_grad():
            if bits is not None:
                check_groups(f"{type(self).__name__}.from_masked", bits, self.shape[1], n, m)
            self.values, self.bits = ops.nm_compress(weight.detach(), n, m, bits)
            self.bias = None if bias is None else bias.detach().clone()

    # ---- forms of the weight ---------------------------------------------------------------------

    def _compressed(self) -> Tensor:
        """The values, from whatever is held now."""
        if self.values is not None:
            return self.values
        weight = self.dense
        if weight is None:
            weight = nm_unpack(self.packed, self.meta, self.shape[:2]).view(self.shape)
        return ops.nm_compress(weight, self.pattern.n, self.pattern.m, self.bits)[0]

    @property
    def weight(self) -> Tensor:
        """The dense weight, zero where pruned; made anew unless the layer holds it."""
        if self.dense is not None:
            return self.dense
        n, m = self.pattern.n, self.pattern.m
        return ops.nm_decompress(self._compressed(), self.bits, n, m, self.shape)

    @torch.no_grad()
    def pack(self, rows: tuple[int, int] = nm_routes.ROWS) -> None:
        """Choose how to multiply on the present device, and make what that reads.

        The first forward does it. Call it before torch.compile and before capturing a CUDA graph,
        or to say which sizes there will be.

        Args:
            rows: the fewest and the most rows of x; images times positions of a convolution. More
                or fewer still work, by the nearest choice.
        """
        self._unpack()
        self.plan = self._choices(rows)
        self._hold(set(self.plan.routes))

    def _hold(self, routes: set[str]) -> None:
        """Make what these routes read, and drop the rest."""
        if routes & {"dense", "cusparselt"}:
            self.dense = self.weight
        if routes & {"gemm", "skinny"}:
            values, n, m = self._flat(self.values), self.pattern.n, self.pattern.m
            self.packed, self.meta = ops.nm_pack(values, self.bits, n, m)
        if "compressed" not in routes:
            self.values = None

    def _choices(self, rows: tuple[int, int]) -> nm_routes.Plan:
        out, inputs = self.shape[:2]
        return nm_routes.plan(self.values, self.pattern.n, self.pattern.m, out, inputs, rows)

    def _unpack(self) -> None:
        """Back to values and bits."""
        self.values = self._compressed()
        self.packed = self.meta = self.dense = self.plan = None

    def _apply(self, *args, **kwargs):
        self._unpack()
        return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "values"] = self._compressed()

    def _load_from_state_dict(self, *args) -> None:
        self._unpack()
        super()._load_from_state_dict(*args)

    def _flat(self, values: Tensor) -> Tensor:
        """Values of a 1x1 convolution as those of a linear layer."""
        return values.view(self.shape[0], 1, -1)

    # ---- products --------------------------------------------------------------------------------

    def _product(self, x: Tensor) -> Tensor:
        """x (..., in) times the weight as (out, in), plus the bias."""
        route = self.plan.route(math.prod(x.shape[:-1]))
        if route in ("gemm", "skinny"):
            packed = self.packed, self.meta, self.shape[0]
            return ops.nm_linear_packed(x, *packed, self.bias, kernel=route)
        if route == "compressed":
            pattern = self.pattern.n, self.pattern.m
            return ops.nm_linear(x, self._flat(self.values), self.bits, *pattern, self.bias)
        return F.linear(x, self.dense.view(self.shape[:2]), self.bias)

    def extra_repr(self) -> str:
        runs = "not packed yet" if self.plan is None else f"runs {self.plan}"
        shape = ", ".join(map(str, self.shape))
        return f"{shape}, {self.pattern}, bias={self.bias is not None}, {runs}"


class NMLinear(_NM):
    """A linear layer that multiplies from its compressed N:M weight; for inference.

    Args:
        in_features, out_features: in_features % m == 0.
        pattern: N:M, such as "2:4".
    """

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
        if self.plan is None:
            self.pack()
        return self._product(x)

    @classmethod
    def from_masked(cls, layer: MaskedLinear, pattern: NM | str) -> NMLinear:
        """The compressed layer of a masked one whose mask keeps at most n of every m weights."""
        return cls._from(layer, pattern, layer.mask_bits if layer.masked else None)

    @classmethod
    def from_dense(cls, layer: nn.Linear, pattern: NM | str) -> NMLinear:
        """The compressed layer of a plain one, pruned to its largest weights."""
        return cls._from(layer, pattern, None)

    @classmethod
    def _from(cls, layer: nn.Linear, pattern: NM | str, bits: Tensor | None) -> NMLinear:
        bias = layer.bias if bits is None else layer._live_bias()
        made = cls(layer.in_features, layer.out_features, pattern, bias is not None, "meta")
        made._fill(layer.weight, bias, bits)
        return made.train(layer.training)

    def to_dense(self) -> nn.Linear:
        """A plain nn.Linear with zeros where the weight was pruned."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        return _filled(plain, self)


class NMConv2d(_NM):
    """A convolution with a compressed N:M weight, for inference.

    With a 1x1 kernel, stride 1 and no padding or groups it is multiplied like an `NMLinear`, best
    with x in channels_last. Every other convolution runs dense, from the decompressed weight.

    Args:
        layer: the nn.Conv2d whose shape and geometry it takes over; its in_channels / groups is a
            multiple of m. The weight starts as zeros: see `from_masked` and `from_dense`.
        pattern: N:M, such as "2:4".
    """

    def __init__(self, layer: nn.Conv2d, pattern: NM | str, device=None, dtype=None) -> None:
        super().__init__()
        self.arguments = MaskedConv2d._arguments(layer)
        self._pads = tuple(layer._reversed_padding_repeated_twice)
        bias = layer.bias is not None
        self._init_weight(layer.weight.shape, pattern, bias, device, dtype)
        plain = layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1
        self.pointwise = plain and not any(self._pads)

    def _choices(self, rows: tuple[int, int]) -> nm_routes.Plan:
        return super()._choices(rows) if self.pointwise else nm_routes.DENSE

    def forward(self, x: Tensor) -> Tensor:
        if self.plan is None:
            self.pack()
        if self.pointwise:
            return self._product(x.movedim(-3, -1)).movedim(-1, -3)
        how = self.arguments
        x, padding = padded(x, how["padding_mode"], self._pads)
        weight, bias = self.dense, self.bias
        return F.conv2d(x, weight, bias, how["stride"], padding, how["dilation"], how["groups"])

    @classmethod
    def from_masked(cls, layer: MaskedConv2d, pattern: NM | str) -> NMConv2d:
        """The compressed layer of a masked one whose mask keeps at most n of every m weights."""
        return cls._from(layer, pattern, layer.mask_bits if layer.masked else None)

    @classmethod
    def from_dense(cls, layer: nn.Conv2d, pattern: NM | str) -> NMConv2d:
        """The compressed layer of a plain one, pruned to its largest weights."""
        return cls._from(layer, pattern, None)

    @classmethod
    def _from(cls, layer: nn.Conv2d, pattern: NM | str, bits: Tensor | None) -> NMConv2d:
        made = cls(layer, pattern, "meta")
        made._fill(layer.weight, layer.bias if bits is None else layer._live_bias(), bits)
        return made.train(layer.training)

    def to_dense(self) -> nn.Conv2d:
        """A plain nn.Conv2d with zeros where the weight was pruned."""
        return _filled(nn.Conv2d(**self.arguments), self)


def _filled(plain: nn.Module, layer: _NM) -> nn.Module:
    plain.weight = nn.Parameter(layer.weight.clone())
    plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.clone())
    return plain.train(layer.training)
