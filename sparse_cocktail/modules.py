"""Drop-in layers that compute with a packed mask.

A masked layer is its torch.nn parent as long as no mask is set: same constructor, same state-dict
keys, same code path. With a mask it keeps one dense weight and one bit per weight (what `packing`
keeps for inference lies beside it).
An output channel whose weights are all pruned is silent: its bias, and the BatchNorm that follows
it, are masked too, so that the masked network equals the physically slimmed one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .batch_norm import saving_hooks, share_hooks, stamp
from .ops.checks import check_bits, check_module, check_padding
from .packing import forget, packed_weight
from .patterns import Pattern, parse
from .reference import bits_shape
from .selection import eligible, magnitude_masks

__all__ = [
    "MaskedConv2d",
    "MaskedLinear",
    "evaluating",
    "filled",
    "masked_layers",
    "output_positions",
    "padded",
]


# Share of live outputs up to which a layer computes these alone. Above, moving them to their
# places costs what they save.
FEW_ROWS = 0.7
# Multiplications below which it computes them all. On a GPU nothing has been measured yet.
FEW_PRODUCTS = {"cpu": 2**24, "cuda": 2**32}


class _Masked(nn.Module):
    """What MaskedLinear and MaskedConv2d share: one mask buffer of fixed address, and its manners.

    `masked` says whether the mask is in force; `mask_bits` is allocated once and then overwritten
    in place, so compiled and captured graphs see every new mask without being made again.
    """

    weight: nn.Parameter
    mask_bits: Tensor
    live: Tensor

    def _init_mask(self) -> None:
        self.masked = False
        self.dense_grad = False
        self.premasked: Tensor | None = None  # W*m, inside `premasked`
        self.premasked_hooks = None  # for saved tensors, in force there
        self.given: Tensor | None = None  # the weight to compute with, inside `given_weights`
        weight = self.weight
        bits = torch.zeros(bits_shape(weight.shape), dtype=torch.int32, device=weight.device)
        self.register_buffer("mask_bits", bits, persistent=False)
        live = torch.ones(weight.shape[0], dtype=torch.bool, device=weight.device)
        self.register_buffer("live", live, persistent=False)
        self.rows: Tensor | None = None

    def set_mask(self, mask: Tensor | Pattern | str | None) -> None:
        """Set or clear the mask, in place.

        Args:
            mask: a bool tensor of the weight's shape, packed int32 bits, a pattern or its name
                (then the mask is made from the weight's magnitudes), or None for dense.

        Raises:
            ValueError, TypeError: for a wrong shape or dtype, or a pattern the layer cannot take.
        """
        if mask is None:
            self.masked, self.rows = False, None
            return
        if not isinstance(mask, Tensor):
            pattern = parse(mask)
            if reason := eligible(self.weight.shape, pattern):
                raise ValueError(
                    f"set_mask: this layer cannot take the pattern {pattern}: {reason}; pad the "
                    "layer or leave it dense"
                )
            mask = magnitude_masks([self.weight], pattern)[0]
        if mask.dtype == torch.bool:
            if mask.shape != self.weight.shape:
                raise ValueError(
                    f"set_mask: mask has shape {tuple(mask.shape)}, but the weight has "
                    f"{tuple(self.weight.shape)}; they must be equal"
                )
            mask = ops.pack_mask(mask)
        check_bits("set_mask", mask, bits_shape(self.weight.shape), "mask")
        check_padding("set_mask", mask, self.weight.shape[1])
        with torch.no_grad():
            if self.mask_bits.is_meta and not mask.is_meta:  # a layer that is filled by assignment
                self.mask_bits = torch.empty_like(mask)
                self.live = torch.empty(mask.shape[:1], dtype=torch.bool, device=mask.device)
            self.mask_bits.copy_(mask)
            self.live.copy_(self.mask_bits.flatten(1).ne(0).any(1))
            self.set_rows(None if mask.is_meta else ops.live_rows(self.mask_bits))
        self.masked = True

    _known: tuple[int, int] | None = None  # stamp of the mask that `rows` are of

    # Copies and moved layers look at their mask anew: its stamp may come to equal an old one.

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_known": None}

    def _apply(self, *args, **kwargs):
        self._known = None
        forget(self)
        return super()._apply(*args, **kwargs)

    def set_rows(self, rows: Tensor | None) -> None:
        """Say which outputs the present mask keeps: int64 (live,), from `ops.live_rows`.

        `set_mask` and `Cocktail.activate` do it. Where few are left, only they are computed.
        """
        bits = self.mask_bits
        few = rows is not None and len(rows) <= FEW_ROWS * len(bits)
        # past nn.Module's slow way of setting attributes: every activate() comes here
        vars(self).update(rows=rows.to(bits.device) if few else None, _known=stamp(bits))

    def _live_rows(self, x: Tensor) -> Tensor | None:
        """The rows to compute, or None for all: in graphs, which outlive a mask, always all."""
        if torch.compiler.is_compiling():  # first: a graph must not depend on what follows
            return None
        if self.rows is None:
            return None
        products = x.numel() * (self.weight.numel() // max(1, self.weight.shape[1]))
        if products < FEW_PRODUCTS.get(x.device.type, 0):
            return None
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        if self._known is None or self._known != stamp(self.mask_bits):
            self.set_rows(ops.live_rows(self.mask_bits))  # written by another hand, moved or copied
        return self.rows

    @property
    def mask(self) -> Tensor | None:
        """The bool mask, of the weight's shape, or None while dense."""
        return ops.unpack_mask(self.mask_bits, self.weight.shape) if self.masked else None

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        if not self.masked:
            return 1.0
        return int(ops.mask_count(self.mask_bits)) / max(self.weight.numel(), 1)

    def _live_bias(self, dtype: torch.dtype | None = None) -> Tensor | None:
        if self.bias is None:
            return None
        return (self.bias * self.live if self.masked else self.bias).to(dtype)

    def _made_weight(self, x: Tensor) -> Tensor | None:
        """The weight that another hand has made: a given one, or W*m where it suits x."""
        if self.given is not None:
            return self.given.to(ops.autocast_dtype(x))
        made = self.premasked
        if made is None or made.dtype != ops.autocast_dtype(x) or self._live_rows(x) is not None:
            return None
        # Gradient checkpointing: the layer is computed anew when W*m is gone, and in the same way.
        if not torch.compiler.is_compiling() and saving_hooks(True) != self.premasked_hooks:
            return None
        return made

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.masked:
            destination[prefix + "mask_bits"] = self.mask_bits.clone()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *rest) -> None:
        bits = state_dict.pop(prefix + "mask_bits", None)  # state_dict is this module's own copy
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if bits is not None:
            try:
                self.set_mask(bits if self.mask_bits.is_meta else bits.to(self.mask_bits.device))
            except (ValueError, TypeError) as error:
                rest[-1].append(f"{prefix}mask_bits: {error}")
        elif self.masked and strict:
            missing.append(prefix + "mask_bits")

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", density={self.density:.4f}" if self.masked else "")

    def _copy_of(self, layer: nn.Module) -> None:
        """Take over another layer's parameters, mode and hooks: the very same Parameter objects."""
        self.weight, self.bias = layer.weight, layer.bias
        device = layer.weight.device  # the constructor ran on "meta", where nothing is allocated
        self.mask_bits = torch.zeros_like(self.mask_bits, device=device)
        self.live = torch.ones_like(self.live, device=device)
        self.train(layer.training)
        share_hooks(self, layer)

    def _baked(self, plain: nn.Module) -> nn.Module:
        with torch.no_grad():
            weight, bias = self.weight, self.bias
            if self.masked:
                weight = ops.masked_weight(weight, self.mask_bits)
                bias = self._live_bias()
            plain.weight = nn.Parameter(weight.detach().clone())
            plain.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return plain.train(self.training)


class MaskedLinear(_Masked, nn.Linear):
    """nn.Linear with an optional packed mask. See `_Masked.set_mask`, `mask`, `density`."""

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_mask()

    def forward(self, x: Tensor) -> Tensor:
        if not self.masked and self.given is None:
            return super().forward(x)
        if (made := self._made_weight(x)) is not None:
            return F.linear(x.to(made.dtype), made, self._live_bias(made.dtype))
        if (packed := packed_weight(self, x)) is not None:
            return ops.sparse_linear(x, *packed, self.out_features, self._live_bias())
        return ops.masked_linear(
            x,
            self.weight,
            self.mask_bits,
            self._live_bias(),
            self.dense_grad,
            self._live_rows(x),
        )

    @classmethod
    def from_dense(cls, layer: nn.Linear) -> MaskedLinear:
        """A masked layer that shares the parameters of `layer`."""
        check_module("MaskedLinear.from_dense", "layer", layer, nn.Linear)
        made = cls(layer.in_features, layer.out_features, layer.bias is not None, "meta")
        made._copy_of(layer)
        return made

    def to_dense(self) -> nn.Linear:
        """A plain nn.Linear with its own parameters, the mask baked in as zeros."""
        bias = self.bias is not None
        return self._baked(nn.Linear(self.in_features, self.out_features, bias, "meta"))


class MaskedConv2d(_Masked, nn.Conv2d):
    """nn.Conv2d with an optional packed mask. See `_Masked.set_mask`, `mask`, `density`."""

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._init_mask()

    def forward(self, x: Tensor) -> Tensor:
        if not self.masked and self.given is None:
            return super().forward(x)
        if (made := self._made_weight(x)) is not None:
            return self._conv_forward(x.to(made.dtype), made, self._live_bias(made.dtype))
        x, padding = padded(x, self.padding_mode, self._reversed_padding_repeated_twice)
        if (packed := packed_weight(self, x)) is not None:
            geometry = self.weight.shape, self.stride, padding, self.dilation
            return ops.sparse_conv2d(x, *packed, self._live_bias(), *geometry)
        return ops.masked_conv2d(
            x,
            self.weight,
            self.mask_bits,
            self._live_bias(),
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.dense_grad,
            self._live_rows(x),
        )

    @staticmethod
    def _arguments(layer: nn.Conv2d) -> dict:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
        arguments = {n: getattr(layer, n) for n in (*names, "groups", "padding_mode")}
        return {**arguments, "bias": layer.bias is not None, "device": "meta"}

    @classmethod
    def from_dense(cls, layer: nn.Conv2d) -> MaskedConv2d:
        """A masked layer that shares the parameters of `layer`."""
        check_module("MaskedConv2d.from_dense", "layer", layer, nn.Conv2d)
        made = cls(**cls._arguments(layer))
        made._copy_of(layer)
        return made

    def to_dense(self) -> nn.Conv2d:
        """A plain nn.Conv2d with its own parameters, the mask baked in as zeros."""
        return self._baked(nn.Conv2d(**self._arguments(self)))


def filled(plain: nn.Module, layer: nn.Module) -> nn.Module:
    """A plain layer with copies of what another one computes with, in the other's mode."""
    plain.weight = nn.Parameter(layer.weight)
    plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.clone())
    return plain.train(layer.training)


def padded(x: Tensor, mode: str, pads: Sequence[int]) -> tuple[Tensor, tuple[int, int]]:
    """x, and the padding that is left to the convolution: symmetric zeros are, others done here.

    Args:
        mode: as `padding_mode` of nn.Conv2d.
        pads: left, right, top, bottom.
    """
    left, right, top, bottom = pads
    if mode != "zeros":
        return F.pad(x, (left, right, top, bottom), mode=mode), (0, 0)
    if left == right and top == bottom:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom)), (0, 0)


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear | MaskedConv2d]:
    """The masked layers of a model by name, in registration order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (MaskedLinear, MaskedConv2d))}


def output_positions(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Output positions per sample of every convolution and linear layer, from one forward."""
    positions: dict[str, int] = {}

    def count(module, _, output) -> None:
        positions[names[module]] = output[0].numel() // module.weight.shape[0]

    names = {m: n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    handles = [module.register_forward_hook(count) for module in names]
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return positions


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; every module's own mode comes back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
