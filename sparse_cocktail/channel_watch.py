"""Which channels of a network are zero whatever its inputs are, and how far their zeros reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .modules import evaluating

__all__ = ["LAYERS", "Watch", "tensors_of"]

LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
# Functions by name. Of one tensor: zero stays zero, channels stay where they are.
_RECTIFIERS = {"relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "hardtanh", "hardswish"}
_SMOOTH = {"elu", "elu_", "selu", "celu", "gelu", "silu", "mish", "tanh", "neg"}
_POOLS = {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate"}
_COPIES = {"dropout", "dropout1d", "dropout2d", "feature_dropout", "contiguous", "clone", "detach"}
_CASTS = {"to", "float", "half", "bfloat16", "double"}
_KEEP_ZEROS = _RECTIFIERS | _SMOOTH | _POOLS | _COPIES | _CASTS | {f"_{name}" for name in _POOLS}
_REDUCE = {"mean", "sum", "amax"}
_FLATTEN = {"flatten", "view", "reshape"}
_ADD = {"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__"}
_MULTIPLY = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "div_", "__truediv__"}
_JOIN = {"cat", "concat", "concatenate"}
_QUESTIONS = {"__get__", "size", "dim", "numel", "stride", "__len__", "is_contiguous", "__hash__"}
_QUESTIONS |= {"is_floating_point", "is_complex", "get_device", "element_size", "ndimension"}


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Space:
    """Channels that stand at the same places in several tensors; `needed` (size,) may not go."""

    def __init__(self, needed: Tensor) -> None:
        self.needed = needed
        self.same: _Space | None = None  # that this one became part of

    def root(self) -> _Space:
        return self if self.same is None else self.same.root()

    def need(self, channels: Tensor | bool) -> None:
        root = self.root()
        root.needed = root.needed | channels

    def merge(self, other: _Space) -> None:
        mine, others = self.root(), other.root()
        if mine is not others:
            mine.need(others.needed)
            others.same = mine

    def kept(self) -> Tensor:
        """Places of the channels that stay: one at least, for a layer needs some."""
        places = self.root().needed.nonzero().flatten()
        return places if len(places) else places.new_zeros(1)


@dataclass(frozen=True)
class _Channels:
    """What a tensor's channels are: along `dim`, spaces one behind the other, every channel of a
    space as often as its repeats say (positions that were flattened into them)."""

    dim: int
    parts: tuple[tuple[_Space, int], ...]

    def merge(self, other: _Channels) -> bool:
        """Make two layouts one; False where they do not match."""
        sizes, others = ([(len(s.needed), r) for s, r in c.parts] for c in (self, other))
        if self.dim != other.dim or sizes != others:
            return False
        for (space, _), (another, _) in zip(self.parts, other.parts, strict=True):
            space.merge(another)
        return True

    def need(self, channels: Tensor | None = None) -> None:
        """Keep these of the channels (bool, along all parts), or all."""
        start = 0
        for space, repeat in self.parts:
            size = len(space.needed) * repeat
            some = True if channels is None else channels[start : start + size]
            space.need(some if some is True else some.view(-1, repeat).any(1))
            start += size

    def kept(self) -> Tensor:
        """Places of what stays along all parts."""
        found, start = [], 0
        for space, repeat in self.parts:
            places = space.kept()[:, None] * repeat
            found.append((places + torch.arange(repeat, device=places.device)).flatten() + start)
            start += len(space.needed) * repeat
        return torch.cat(found)


@dataclass
class _Use:
    """How a layer stands in the forward: channels of its inputs (None: not known) and outputs."""

    inputs: _Channels | None = None
    outputs: _Channels | None = None
    calls: int = 0
    outside: bool = False  # whether its weight or bias was used before, without the layer


class Watch(TorchFunctionMode):
    """One forward, in which every tensor's channels are followed from layer to layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        owners: dict[Tensor, list[nn.Module]] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                owners.setdefault(parameter, []).append(module)
        self.uses = {
            module: _Use()
            for module in model.modules()
            if type(module) in LAYERS
            and "weight" in module._parameters  # not computed in a hook
            and all(len(owners[p]) == 1 for p in module.parameters(recurse=False))
        }
        self.owners = {id(p): m for m in self.uses for p in m.parameters(recurse=False)}
        self.known: dict[int, tuple[Tensor, _Channels]] = {}  # by id, of tensors that are held
        self.inside = 0  # layers whose forward runs: their own functions are not looked at

    def cuts(self, arguments: tuple) -> dict[nn.Module, tuple[Tensor, Tensor | None]]:
        """Rows and columns that every layer keeps."""
        hooks = []
        for layer in self.uses:
            hooks.append(layer.register_forward_pre_hook(self._enter))
            hooks.append(layer.register_forward_hook(self._leave, with_kwargs=True))
        try:
            with evaluating(self.model), self:
                self._keep_all(self.model(*arguments))
        finally:
            for hook in hooks:
                hook.remove()
        return {
            layer: (use.outputs.kept(), None if use.inputs is None else use.inputs.kept())
            for layer, use in self.uses.items()
            if use.outputs is not None
        }

    def _of(self, tensor: Any) -> _Channels | None:
        return self.known.get(id(tensor), (None, None))[1]

    def _tag(self, tensor: Any, channels: _Channels) -> None:
        self.known[id(tensor)] = tensor, channels

    def _keep_all(self, tree: Any) -> None:
        for tensor in tensors_of(tree):
            if channels := self._of(tensor):
                channels.need()

    # ---- layers ----------------------------------------------------------------------------------

    def _enter(self, layer: nn.Module, _) -> None:
        self.inside += 1

    def _leave(self, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        x = args[0] if args else kwargs.get("input")
        given, use = self._of(x), self.uses[layer]
        use.calls += 1
        dim = output.dim() - 1 if isinstance(layer, nn.Linear) else output.dim() - 3
        if given is not None and given.dim != dim:
            given.need()
            given = None
        whole = isinstance(layer, nn.Conv2d) and layer.groups > 1
        if whole and layer.groups == layer.in_channels == layer.out_channels:  # depthwise
            self._pass_through(layer, use, given, output, layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            silent = layer.affine and layer.running_mean is not None
            shift = layer.weight.ne(0) | layer.bias.ne(0) if silent else None
            self._pass_through(layer, use, given, output, shift)
            if given is not None and not silent:
                given.need()
        else:
            self._produce(layer, use, given, output, dim, whole)
        if use.outside:
            self._keep(use.inputs)
            self._keep(use.outputs)
        self.inside -= 1  # what was asked of the weights above is no use of them

    def _pass_through(self, layer, use: _Use, given: _Channels | None, output, shift) -> None:
        """A layer whose channel i is made of channel i; `shift` is nonzero where it adds to it."""
        if given is None:
            self._keep(use.outputs)
            return
        if shift is not None:
            given.need(shift.ne(0))
        if use.outputs is None and use.calls == 1:
            use.outputs = given
        elif use.outputs is None or not use.outputs.merge(given):
            given.need()
            if use.outputs is not None:
                use.outputs.need()
        self._tag(output, given)

    def _produce(self, layer, use: _Use, given, output: Tensor, dim: int, whole: bool) -> None:
        if use.outputs is None:
            needed = layer.weight.flatten(1).ne(0).any(1)
            needed = needed if layer.bias is None else needed | layer.bias.ne(0)
            use.outputs = _Channels(dim, ((_Space(needed), 1),))
            use.inputs = given
        elif use.inputs is None or given is None or not use.inputs.merge(given):
            whole = True  # called for inputs that are not alike
        if whole or use.outputs.dim != dim:
            for channels in (given, use.inputs, use.outputs):
                self._keep(channels)
            use.inputs = None
        if use.outputs.dim == dim:
            self._tag(output, use.outputs)

    @staticmethod
    def _keep(channels: _Channels | None) -> None:
        if channels is not None:
            channels.need()

    # ---- functions between them ------------------------------------------------------------------

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = [self._of(t) for t in tensors_of((args, kwargs))] if not self.inside else []
        result, name = func(*args, **kwargs), getattr(func, "__name__", "")
        if self.inside or (name in _QUESTIONS and not tensors_of(result)):
            return result
        for tensor in tensors_of((args, kwargs)):
            if id(tensor) in self.owners:  # a weight that is used outside of its layer
                use = self.uses[self.owners[id(tensor)]]
                use.outside = True
                self._keep(use.inputs)
                self._keep(use.outputs)
        found = [channels for channels in before if channels is not None]
        if not found:
            return result
        channels = self._through(name, args, kwargs, found, result)
        if channels is None:
            for each in found:
                each.need()
        else:
            self._tag(result, channels)
        return result

    def _through(self, name: str, args, kwargs, found, result) -> _Channels | None:
        """The result's channels, where this function keeps zeros; else None."""
        inputs = tensors_of((args, kwargs))
        x, first = inputs[0], found[0]
        if not isinstance(result, Tensor):
            return None
        if name in _KEEP_ZEROS and len(inputs) == 1:
            same = result.dim() == x.dim() and result.shape[first.dim] == x.shape[first.dim]
            return first if same else None
        if name in _REDUCE and len(inputs) == 1:
            return _reduced(first, x, result, args, kwargs)
        if name in _FLATTEN and len(inputs) == 1:
            return _flattened(first, x, result, name, args)
        if name in _JOIN:
            return self._joined(inputs, result, args, kwargs)
        if name in _ADD | _MULTIPLY and len(inputs) == 2:
            return self._combined(name, inputs, result)
        if name in _MULTIPLY and len(args) == 2 and args[0] is x:
            return first if args[1] and math.isfinite(args[1]) else None
        return None

    def _joined(self, inputs: list[Tensor], result: Tensor, args, kwargs) -> _Channels | None:
        each = [self._of(tensor) for tensor in inputs]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if None in each or {c.dim for c in each} != {dim % result.dim()}:
            return None
        return _Channels(each[0].dim, tuple(part for c in each for part in c.parts))

    def _combined(self, name: str, inputs: list[Tensor], result: Tensor) -> _Channels | None:
        one, other = (self._of(tensor) for tensor in inputs)
        if one is not None and other is not None:
            # two of one shape; in a quotient the lower one's zeros would divide
            fits = inputs[0].shape == inputs[1].shape and "div" not in name
            return one if fits and one.merge(other) else None
        known, (x, factor) = one or other, inputs if one else inputs[::-1]
        behind = x.dim() - known.dim  # whether the factor is the same for all channels
        alike = factor.dim() < behind or factor.shape[-behind] == 1
        scales = name in _MULTIPLY and (one is not None or "div" not in name)
        return known if scales and alike and result.shape == x.shape else None


def _reduced(channels: _Channels, x: Tensor, result: Tensor, args, kwargs) -> _Channels | None:
    """Behind a sum, mean or maximum over other dimensions."""
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dims is None:
        return None
    dims = {d % x.dim() for d in (dims if isinstance(dims, Sequence) else [dims])}
    if channels.dim in dims:
        return None
    gone = 0 if result.dim() == x.dim() else sum(d < channels.dim for d in dims)
    return _Channels(channels.dim - gone, channels.parts)


def _flattened(channels: _Channels, x: Tensor, result: Tensor, name: str, args) -> _Channels | None:
    """Behind (n, c, *positions) to (n, c * positions)."""
    if name != "flatten" and (not args[1:] or tree_leaves(args[1:])[-1] != -1):
        return None  # a number of channels that stands in the code
    if channels.dim != 1 or result.shape != (len(x), x[0].numel()):
        return None
    positions = math.prod(x.shape[2:])
    return _Channels(1, tuple((space, repeat * positions) for space, repeat in channels.parts))
