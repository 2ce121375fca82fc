"""Models for inference whose layers hold what their masks keep, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .modules import masked_layers
from .nm_modules import NMConv2d, NMLinear
from .ops.checks import check_module, wrong_type
from .patterns import NM, Pattern, parse
from .pruning import replaced
from .selection import eligible
from .sparse_modules import SparseConv2d, SparseLinear

__all__ = ["load_compressed", "to_compressed"]

MOST_KEPT = 0.5  # share of a layer's weights above which holding them alone gains little


def to_compressed(model: nn.Module, pattern: str | Pattern | None = None) -> nn.Module:
    """A copy of a model for inference, its masked layers in layers that hold what is kept.

    Of an N:M pattern these are `NMLinear` and `NMConv2d`. Otherwise they are `SparseLinear` and
    `SparseConv2d`, where half of a layer's weights or fewer are kept. All other layers, and all
    BatchNorms, become plain ones. `load_compressed` reads the state dict back.

    Args:
        pattern: N:M, where every mask keeps at most n of every m weights along the inputs; None or
            another pattern: whatever the masks keep.

    Raises:
        ValueError: for a mask that does not fit N:M, and where no layer has a mask of it (or any).
    """
    check_module("to_compressed", "model", model)
    pattern = None if pattern is None else parse(pattern)
    wanted = pattern if isinstance(pattern, NM) else None
    layers = {name: layer for name, layer in masked_layers(model).items() if layer.masked}
    if wanted is not None:
        layers = {n: m for n, m in layers.items() if not eligible(m.weight.shape, wanted)}
    if not layers:
        what, name = ("", "unstructured-0.9") if wanted is None else (f" of {wanted}", str(wanted))
        raise ValueError(
            f"to_compressed: no layer of {type(model).__name__} has a mask{what}; prune it with "
            f"prune_(model, '{name}') first"
        )

    def make(name: str, layer: nn.Module) -> nn.Module:
        conv = isinstance(layer, nn.Conv2d)
        if name not in layers or (wanted is None and layer.density > MOST_KEPT):
            return layer.to_dense()
        if wanted is None:
            return (SparseConv2d if conv else SparseLinear).from_masked(layer)
        try:
            return (NMConv2d if conv else NMLinear).from_masked(layer, wanted)
        except ValueError as error:
            raise ValueError(f"to_compressed: layer {name!r}: {error}") from error

    return replaced(model, make)


def load_compressed(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Load the state dict of a compressed model into a whole one, in place.

    Args:
        model: plain torch.nn, of the architecture that was compressed; its layers are exchanged
            where the state dict holds what they keep.
        state: the state dict of `to_compressed`'s result.

    Returns:
        The same model in eval mode; a model that is one layer comes back as another.

    Raises:
        ValueError: where the state dict is of another architecture.
    """
    check_module("load_compressed", "model", model)
    if not isinstance(state, Mapping):
        raise wrong_type("load_compressed", "state", state, "a state dict: model.state_dict()")
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        prefix = f"{name}." if name else ""
        values = state.get(f"{prefix}values")
        if values is None or type(layer) not in (nn.Linear, nn.Conv2d):
            continue
        if layer.weight.is_meta:
            raise ValueError(
                f"load_compressed: {prefix}weight is on the device meta, where nothing can be "
                "loaded; build the model on cpu or cuda"
            )
        made = _empty(layer, values, state.get(f"{prefix}nm"))
        if name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made)
        else:
            model = made
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"load_compressed: the state dict does not fit {type(model).__name__}: {error}; build "
            "the model that was compressed"
        ) from error
    return model.eval()


def _empty(layer: nn.Linear | nn.Conv2d, values: Tensor, nm: Tensor | None) -> nn.Module:
    """The layer that `values` are to be loaded into."""
    how = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    pattern = () if nm is None else (NM(*nm.tolist()),)
    if isinstance(layer, nn.Conv2d):
        return (NMConv2d if pattern else SparseConv2d)(layer, *pattern, **how)
    sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
    return (NMLinear if pattern else SparseLinear)(*sizes, *pattern, bias, **how)
