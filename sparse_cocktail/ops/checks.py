"""Checks of arguments that the families share: errors that name op, argument, value and remedy."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COUNT = "give a count, for example round(density * total)"
_KINDS = {  # types of a schema: what they take, and what it is called
    "Tensor": (Tensor, "a torch.Tensor; convert it"),
    "int": (SupportsIndex, "an int; give a whole number"),
    "float": (SupportsFloat, "a number; give a float"),
    "str": (str, "a str; give a name"),
    "ScalarType": (torch.dtype, "a torch.dtype, such as torch.float16"),
}


def check_types(op: str, arguments: Sequence[Any]) -> None:
    """Say which argument of an op has a wrong type: for calls that failed, in whatever way."""
    schema = getattr(torch.ops.sparse_cocktail, op).default._schema
    for argument, value in zip(schema.arguments, arguments, strict=False):
        _check_type(op, argument.name, str(argument.real_type), value)


def _check_type(op: str, name: str, kind: str, value: Any) -> None:
    if kind.startswith("Optional["):
        if value is not None:
            _check_type(op, name, kind[9:-1], value)
    elif kind.startswith("List["):
        for i, entry in enumerate(as_list(op, name, value)):
            _check_type(op, f"{name}[{i}]", kind[5:-1], entry)
    elif kind in _KINDS and not isinstance(value, _KINDS[kind][0]):
        raise wrong_type(op, name, value, _KINDS[kind][1]) from None


def wrong_type(op: str, name: str, value: Any, wanted: str) -> TypeError:
    """The error of an argument that must be what is `wanted`, which ends in a remedy."""
    plain = value is None or isinstance(value, (bool, int, float, str))
    shown = f"{name}={value!r}" if plain else name
    return TypeError(f"{op}: {shown} is a {type(value).__name__}, but it must be {wanted}")


def check_tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise wrong_type(op, name, value, _KINDS["Tensor"][1])


def check_module(op: str, name: str, value: Any, kind: type = torch.nn.Module) -> None:
    if not isinstance(value, kind):
        wanted = f"an nn.{kind.__name__}"
        if kind is torch.nn.Module:
            wanted += "; pass the model itself, such as cocktail.model"
        raise wrong_type(op, name, value, wanted)


def as_list(op: str, name: str, values: Iterable, remedy: str = "put it into [ ]") -> list:
    """The list of a list argument. A single tensor is refused: it would fall into its rows."""
    if isinstance(values, (list, tuple)):
        return list(values)
    if isinstance(values, (Tensor, str)) or not isinstance(values, Iterable):
        raise wrong_type(op, name, values, f"a list; {remedy}")
    return list(values)


def pair(op: str, name: str, value: int | Sequence[int]) -> Sequence[int]:
    """Two ints, of an argument that is an int or a pair."""
    both = (value, value) if isinstance(value, int) else value
    if not isinstance(both, (tuple, list)) or len(both) != 2:
        raise ValueError(
            f"{op}: {name}={value!r} is neither an int nor a pair; give one (MaskedConv2d also "
            "takes padding='same' and other padding modes)"
        )
    return both


def whole(op: str, name: str, value: Any, remedy: str = COUNT) -> int:
    """The int of an integer argument, which may be of numpy or a tensor of one."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name}={value!r} is not an integer; {remedy}") from None


def check_weight(op: str, weight: Tensor, name: str = "weight") -> None:
    check_tensor(op, name, weight)
    if weight.dim() < 2:
        raise ValueError(
            f"{op}: {name} has shape {tuple(weight.shape)}, but a weight has at least the 2 "
            "dimensions (out, in); leave vectors such as biases out"
        )
    if weight.layout != torch.strided:
        raise TypeError(
            f"{op}: {name} has layout {weight.layout}, but weights are dense tensors; convert it "
            "with to_dense()"
        )
    if weight.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} has dtype {weight.dtype}, which is not one of float32, bfloat16, "
            "float16, float64; convert it first"
        )


def check_weights(op: str, weights: list[Tensor]) -> None:
    for index, weight in enumerate(weights):
        check_weight(op, weight, f"weights[{index}]")
        for what in ("device", "dtype"):
            if getattr(weight, what) != getattr(weights[0], what):
                raise ValueError(
                    f"{op}: weights[{index}] has {what} {getattr(weight, what)}, but weights[0] "
                    f"has {getattr(weights[0], what)}; one call takes weights of one {what}"
                )


def check_bits(op: str, bits: Tensor, shape: tuple[int, int, int], name: str = "bits") -> None:
    if not isinstance(bits, Tensor):
        raise wrong_type(op, name, bits, "a tensor of mask bits; make it with ops.pack_mask(mask)")
    if bits.dtype != torch.int32:
        raise TypeError(
            f"{op}: {name} has dtype {bits.dtype}, but mask bits are int32 words; make them with "
            "ops.pack_mask(mask)"
        )
    if tuple(bits.shape) != tuple(shape):
        raise ValueError(
            f"{op}: {name} has shape {tuple(bits.shape)}, but this weight has mask bits "
            f"(out, taps, ceil(in / 32)) = {tuple(shape)}; make them with ops.pack_mask(mask)"
        )


def check_device(op: str, tensor: Tensor, weight: Tensor, name: str) -> None:
    if tensor.device != weight.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, but its weight is on {weight.device}; move it"
        )


def check_padding(op: str, bits: Tensor, inputs: int) -> None:
    """Refuse bits beyond the last input, which would count as kept (waits for the device)."""
    if inputs % 32 and (bits[..., -1] >> inputs % 32).any():
        raise ValueError(
            f"{op}: mask has bits set beyond in={inputs}; padding bits must be 0: make it with "
            "ops.pack_mask(mask) or complement it with ops.mask_andnot"
        )


def check_same_length(op: str, weights: list[Tensor], other: list, name: str) -> None:
    if len(other) != len(weights):
        raise ValueError(
            f"{op}: {name} has {len(other)} entries for {len(weights)} weights; give one each"
        )


def detached(tensor: Any) -> Any:
    """Without its gradient; what is no tensor as it is, for the op to refuse."""
    return tensor.detach() if isinstance(tensor, Tensor) else tensor
