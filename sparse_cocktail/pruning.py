"""Prune a model in one call, and turn a masked model back into plain torch.nn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from .batch_norm import MaskedBatchNorm2d
from .conversion import convert
from .modules import MaskedConv2d, MaskedLinear, masked_layers
from .nm_modules import NMConv2d, NMLinear
from .ops.checks import check_module
from .patterns import Dense, Pattern, parse
from .selection import eligible, magnitude_masks
from .sparse_modules import SparseConv2d, SparseLinear

__all__ = ["followers", "output_layers", "prune_", "replaced", "to_dense"]


def prune_(
    model: nn.Module,
    pattern: str | Pattern | None,
    skip: Callable[[str, nn.Module], bool] | Iterable[str] | None = None,
    example_input: Tensor | tuple | None = None,
) -> nn.Module:
    """Prune a model by the present magnitudes of its weights, in place.

    A plain model is converted first (see `convert`, also for what stays dense). Then masks are set
    on its layers, so that it computes as the pruned network and can be trained on: Parameters stay
    the same objects, pruned weights get no gradient, and the state dict has `mask_bits`. A channel
    without weights is silent, its bias and BatchNorm too. The channels of the last linear layer
    stay. Layers that cannot take the pattern stay dense.

    The weights themselves are not changed. Another call makes the masks anew from all of them;
    `prune_(model, None)` takes the masks off again; `to_dense(model)` is a plain copy with zeros.

    Args:
        model: any module with nn.Linear or nn.Conv2d layers.
        pattern: a pattern or its name, such as "2:4", "unstructured-0.9", "channel-0.5".
        skip, example_input: as `convert` takes them; for the call that converts the model.

    Returns:
        The same model.

    Raises:
        ValueError: for an unknown pattern, a model without layers to mask, a pattern that no layer
            can take, and `skip` for a model that is converted already.
    """
    check_module("prune_", "model", model)
    pattern = Dense() if pattern is None else parse(pattern)
    if not masked_layers(model):
        convert(model, skip, example_input)
    elif skip is not None:
        raise ValueError(
            f"prune_: skip={skip!r} comes too late, {type(model).__name__} has masked layers "
            "already; give skip to the first call or to convert, and leave it out afterwards"
        )
    layers = masked_layers(model)
    reasons = {n: eligible(m.weight.shape, pattern) for n, m in layers.items()}
    if all(reasons.values()):
        raise ValueError(
            f"prune_: no layer of {type(model).__name__} can take the pattern {pattern}: {reasons}"
            "; take another pattern, or pad the layers"
        )
    weights = [layer.weight for layer in layers.values()]
    masks = magnitude_masks(weights, pattern, output_layers(model, layers))
    for (name, layer), bits in zip(layers.items(), masks, strict=True):
        layer.set_mask(None if reasons[name] or isinstance(pattern, Dense) else bits)
    masked = list(layers.values())
    for norm, index in followers(model, layers):
        norm.set_live(masked[index].live if masked[index].masked else None)
    return model


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of a model in plain torch.nn layers with parameters of its own, masks baked in."""
    check_module("to_dense", "model", model)
    return replaced(model, lambda _, layer: layer.to_dense())


_OURS = (MaskedLinear, MaskedConv2d, MaskedBatchNorm2d)
_OURS = (*_OURS, NMLinear, NMConv2d, SparseLinear, SparseConv2d)  # which hold what is kept


def replaced(model: nn.Module, make: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """A copy of a model with other modules in the place of our own, from name and module."""
    model = copy.deepcopy(model)
    if hasattr(model, "conversion"):
        del model.conversion
    made: dict[nn.Module, nn.Module] = {}  # a layer may stand under several names
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, _OURS):
            continue
        if module not in made:
            made[module] = make(name, module)
        if not name:
            return made[module]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[module])
    return model


# ---- how masked layers stand in a model ----------------------------------------------------------


def output_layers(model: nn.Module, layers: Sequence[str]) -> frozenset[int]:
    """Index, among masked layers, of the last linear layer: its channels are the model's outputs.

    Empty when the last linear layer is not masked.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return frozenset(i for i, name in enumerate(layers) if linear and name == linear[-1])


def followers(model: nn.Module, layers: Sequence[str]) -> list[tuple[MaskedBatchNorm2d, int]]:
    """Pairs (BatchNorm, index among masked layers of the convolution whose output it takes)."""
    index = {name: i for i, name in enumerate(layers)}
    return [
        (norm, index[norm.source])
        for norm in model.modules()
        if isinstance(norm, MaskedBatchNorm2d) and norm.source in index
    ]
