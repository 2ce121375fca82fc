"""`convert`: put masked layers into a model in place, and say what was left and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .batch_norm import MaskedBatchNorm2d
from .modules import MaskedConv2d, MaskedLinear, evaluating
from .ops.checks import check_module, wrong_type

__all__ = ["Conversion", "convert"]

_SWAPS = {
    nn.Linear: MaskedLinear,
    nn.Conv2d: MaskedConv2d,
    nn.BatchNorm2d: MaskedBatchNorm2d,
}
_READS_WEIGHT = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass
class Conversion:
    """What `convert` did: names of masked layers, and the layers it left with the reason."""

    masked: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def convert(
    model: nn.Module,
    skip: Callable[[str, nn.Module], bool] | Iterable[str] | None = None,
    example_input: Tensor | tuple | None = None,
    channels_last: bool = False,
    mask_first: bool = False,
) -> nn.Module:
    """Swap nn.Linear, nn.Conv2d and nn.BatchNorm2d for their masked forms, in place.

    Parameters stay the same objects, so an existing optimizer stays valid. The first convolution
    stays dense unless `mask_first`. Layers are left, with the reason in `model.conversion.left`,
    when their parent reads the weight itself, when their weight is tied to another layer, when they
    are of a subclass, and when `skip` says so. A `Cocktail` silences the channels that a
    convolution prunes in the BatchNorm behind it, too; these pairs come from one recorded forward
    when `example_input` is given, else from the order of registration.

    Args:
        model: any module.
        skip: names to leave dense, or a function (name, module) -> bool.
        example_input: a tensor (or tuple of arguments) for one forward in eval mode.
        channels_last: re-lay 4-D weights in channels_last under the same Parameters.
        mask_first: mask the first convolution too.

    Returns:
        The same model.

    Raises:
        ValueError: when `skip` names a layer that is not there, or nothing could be converted.
    """
    check_module("convert", "model", model)
    report = getattr(model, "conversion", Conversion())
    names = dict(model.named_modules(remove_duplicate=False))
    first = None if mask_first else _first_convolution(model, example_input)
    reasons = _reasons_to_leave(model, names, skip, first)
    made: dict[nn.Module, nn.Module] = {}  # a BatchNorm may stand under several names
    for name, module in names.items():
        norm = isinstance(module, nn.BatchNorm2d)
        if name in reasons and not norm:
            report.left[name] = reasons[name]
        if norm and type(module) not in (nn.BatchNorm2d, MaskedBatchNorm2d):
            kind = type(module).__name__
            report.left[name] = f"subclass {kind}: pruned channels are not silenced behind it"
        if type(module) not in _SWAPS or name == "" or name in report.left:
            continue
        parent, _, child = name.rpartition(".")
        if module not in made:
            made[module] = _SWAPS[type(module)].from_dense(module)
        setattr(names[parent], child, made[module])
        if not norm:
            report.masked.append(name)
    if not report.masked:
        raise ValueError(
            f"convert: no layer of {type(model).__name__} was converted (left: {report.left}); the "
            "model needs nn.Linear or nn.Conv2d layers beyond its first convolution"
        )
    if channels_last:
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    pairs = _recorded_pairs(model, example_input) if example_input is not None else None
    for norm, source in (_registered_pairs(model) if pairs is None else pairs).items():
        model.get_submodule(norm).source = source
    model.conversion = report
    return model


def _first_convolution(model: nn.Module, example: Tensor | tuple | None) -> str | None:
    """Name of the convolution that runs first in a forward, or is registered first without one."""
    convolutions = {m: n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    called: list[str] = []
    if example is not None and convolutions:
        handles = [
            module.register_forward_pre_hook(lambda m, _: called.append(convolutions[m]))
            for module in convolutions
        ]
        _forward(model, example, handles)
    return next(iter([*called, *convolutions.values()]), None)


def _forward(model: nn.Module, example: Tensor | tuple, handles: list) -> None:
    """One forward in eval mode, after which the hooks are removed."""
    try:
        with evaluating(model), torch.no_grad():
            model(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for handle in handles:
            handle.remove()


def _reasons_to_leave(model, names, skip, first: str | None) -> dict[str, str]:
    reasons: dict[str, str] = {} if first is None else {first: "first convolution"}
    usable = skip is None or callable(skip) or isinstance(skip, Iterable)
    if not usable or isinstance(skip, (type, nn.Module)):
        wanted = "a list of names of layers, or a function (name, module) -> bool"
        raise wrong_type("convert", "skip", skip, wanted)
    if skip is not None and not callable(skip):
        wanted = {skip} if isinstance(skip, str) else set(skip)
        layers = [n for n, m in names.items() if isinstance(m, (nn.Linear, nn.Conv2d))]
        covered = {w for w in wanted for n in layers if f"{n}.".startswith(f"{w}.")}
        if useless := sorted(wanted - covered):
            raise ValueError(
                f"convert: skip names {useless}, but no linear or convolution layer is called "
                f"so or lies inside; the model's layers are {layers}"
            )
        inside = tuple(f"{w}." for w in wanted)

        def skip(name, _):
            return f"{name}.".startswith(inside)

    owners: dict[int, list[str]] = {}
    for name, module in names.items():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            if isinstance(getattr(module, "weight", None), nn.Parameter):
                owners.setdefault(id(module.weight), []).append(name)  # e.g. a tied embedding
            continue
        owners.setdefault(id(module.weight), []).append(name)
        if not isinstance(module.weight, nn.Parameter):
            reasons[name] = "its weight is computed (pruned or re-parametrised), not a Parameter"
        if skip is not None and skip(name, module):
            reasons[name] = "skipped on request"
        parents = [model, *(names[name[:i]] for i, c in enumerate(name) if c == ".")]
        if reader := next((p for p in parents if isinstance(p, _READS_WEIGHT)), None):
            reasons[name] = f"{type(reader).__name__} reads its weight directly"
        if type(module) not in (*_SWAPS, *_SWAPS.values()):
            reasons[name] = f"subclass {type(module).__name__}"
    for shared in owners.values():
        for name in shared if len(shared) > 1 else ():
            reasons[name] = f"weight tied between {', '.join(shared)}"
    return reasons


def _registered_pairs(model: nn.Module) -> dict[str, str]:
    """BatchNorm name -> the convolution registered just before it, where the widths agree."""
    pairs, previous = {}, None
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            previous = (name, module)
        elif isinstance(module, MaskedBatchNorm2d) and previous is not None:
            source, convolution = previous
            same_width = convolution.out_channels == module.num_features
            if isinstance(convolution, MaskedConv2d) and same_width:
                pairs[name] = source
            previous = None
    return pairs


def _recorded_pairs(model: nn.Module, example: Tensor | tuple) -> dict[str, str]:
    """BatchNorm name -> the convolution whose very output it received in one forward."""
    produced: dict[int, tuple[str, Tensor]] = {}  # the tensor is held, so its id stays unique
    sources: dict[str, set[str | None]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, MaskedConv2d):

            def remember(_, inputs, output, name=name):
                produced[id(output)] = (name, output)

            handles.append(module.register_forward_hook(remember))
        elif isinstance(module, MaskedBatchNorm2d):

            def pair(_, inputs, name=name):
                source = produced.get(id(inputs[0]), (None,))[0]
                sources.setdefault(name, set()).add(source)

            handles.append(module.register_forward_pre_hook(pair))
    _forward(model, example, handles)
    # a BatchNorm that is called behind several things belongs to none of them
    single = {norm: next(iter(found)) for norm, found in sources.items() if len(found) == 1}
    return {norm: source for norm, source in single.items() if source is not None}
