"""Cocktail: one dense weight set, the masks of many subnets, and their BatchNorm statistics."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .bank import MaskBank
from .cocktail_file import (
    MAX_LEVELS,
    check_same,
    fitted_model,
    norm_facts,
    pack_levels,
    read_cocktail,
    unpack_levels,
    write_cocktail,
)
from .modules import masked_layers
from .ops.checks import as_list, check_module, check_padding, wrong_type
from .own_norms import OwnNorms, copies, copy_all
from .patterns import Dense, Pattern, Unstructured, parse
from .pruning import followers, output_layers
from .recalibrate import norm_layers
from .selection import eligible, magnitude_masks
from .serving import Serving
from .subnet import Subnet

__all__ = ["Cocktail", "Subnet"]


class Cocktail(OwnNorms, Serving):
    """A model whose weights are shared by a dense network and any number of sparse subnets.

    Args:
        model: a model with masked layers, as `convert` makes it. Its weights are used, not copied.

    Example:
        cocktail = Cocktail(convert(model))
        cocktail.add("2:4")
        with cocktail.using("2:4"):
            loss = criterion(model(x), y)
            loss.backward()  # ends before the next activate
    """

    def __init__(self, model: nn.Module) -> None:
        check_module("Cocktail", "model", model)
        self.model = model
        self.layers = masked_layers(model)
        if not self.layers:
            raise ValueError(
                f"Cocktail: {type(model).__name__} has no masked layers; pass convert(model)"
            )
        if masked := [name for name, layer in self.layers.items() if layer.masked]:
            raise ValueError(
                f"Cocktail: the layers {masked[:3]} have a mask set already, which would be lost; "
                "clear it with layer.set_mask(None), or add it as a subnet afterwards"
            )
        self.norms = norm_layers(model)
        self.bank = MaskBank([layer.weight for layer in self.layers.values()])
        self.subnets: dict[str, Subnet] = {"dense": Subnet("dense", Dense())}
        self.active = "dense"
        self.extra: dict[str, Any] = {}  # facts from the header of a loaded file
        self._silenced = followers(model, self.layers)
        # What all subnets share, set aside while a subnet's own is in the model.
        self._shared: list[Tensor] | None = None
        self._shared_affine: list[Tensor] | None = None
        self._latencies: dict[tuple, float] = {}  # of `latency`
        self._set_masks(self.subnets["dense"])

    @property
    def outputs(self) -> frozenset[int]:
        """Index of the last linear layer: its channels are the model's outputs, and all stay."""
        return output_layers(self.model, self.layers)

    # ---- the menu --------------------------------------------------------------------------------

    def add(
        self,
        pattern: str | Pattern,
        masks: Sequence[Tensor] | int | None = None,
        stage: int | None = None,
    ) -> Subnet:
        """Put a subnet on the menu.

        Args:
            pattern: a pattern or its name; its canonical name becomes the subnet's.
            masks: bits per masked layer, or a row of `bank`; by default made from the weights'
                present magnitudes.
            stage: the pruning round that made it.

        Raises:
            ValueError: for an unknown pattern, one that no layer can take, or a name that is there
                already.
        """
        pattern = parse(pattern)
        name = str(pattern)
        if name in self.subnets:
            raise ValueError(
                f"Cocktail.add: subnet {name!r} is on the menu already; each name is there once"
            )
        self.bank.weights[:] = [layer.weight for layer in self.layers.values()]
        if masks is None:
            if all(reasons := [eligible(w.shape, pattern) for w in self.bank.weights]):
                raise ValueError(
                    f"Cocktail.add: no layer can take the pattern {name}: {reasons[0]}; take "
                    "another pattern, or pad the layers"
                )
            masks = magnitude_masks(self.bank.weights, pattern, self.outputs)
        if not isinstance(masks, int):
            masks = self._checked("add", masks)
        row = masks if isinstance(masks, int) else self.bank.add(masks)
        subnet = Subnet(name, pattern, row, stage)
        self._look_at(subnet)
        self.subnets[name] = subnet
        return subnet

    def set_masks(self, name: str, masks: Sequence[Tensor]) -> None:
        """Give a subnet other masks (bits per masked layer), in place; its accuracy is forgotten.

        Raises ValueError for "dense", which has none, and for bits of other shapes or beyond a
        layer's last input.
        """
        subnet = self.subnet(name)
        if subnet.row is None:
            raise ValueError("Cocktail.set_masks: dense has no masks; add a subnet of a pattern")
        self.bank.weights[:] = [layer.weight for layer in self.layers.values()]
        self.bank.set_(subnet.row, self._checked("set_masks", masks))
        self._look_at(subnet)
        if self.active == subnet.name:
            self._set_masks(subnet)

    def masks(self, name: str) -> list[Tensor]:
        """The bits of a subnet per masked layer, the memory itself; ValueError for "dense"."""
        subnet = self.subnet(name)
        if subnet.row is None:
            raise ValueError("Cocktail.masks: dense has no masks; ask for a subnet of a pattern")
        return self.bank.views(subnet.row)

    def remove(self, name: str) -> None:
        """Take a subnet off the menu; "dense" stays (ValueError)."""
        subnet = self.subnet(name)
        if subnet.row is None:
            raise ValueError("Cocktail.remove: dense is always on the menu")
        if self.active == subnet.name:
            self.activate("dense")
        del self.subnets[subnet.name]

    def _checked(self, call: str, masks: Sequence[Tensor]) -> list[Tensor]:
        """Masks as a list; refuses bits beyond a layer's last input (waits for the device once)."""
        masks = self.bank.checked(masks)
        pairs = [(b, w.shape[1]) for b, w in zip(masks, self.bank.weights, strict=False)]
        tails: dict[int, list[Tensor]] = {}
        for bits, inputs in pairs:
            if inputs % 32:
                tails.setdefault(inputs % 32, []).append(bits[..., -1].flatten())
        beyond = [(torch.cat(words) >> used).any() for used, words in tails.items()]
        if beyond and torch.stack(beyond).any():
            for bits, inputs in pairs:
                check_padding(f"Cocktail.{call}", bits, inputs)
        return masks

    def _look_at(self, subnet: Subnet) -> None:
        """Note which channels new masks leave, and forget what was measured with others."""
        subnet.look_at(self.bank.views(subnet.row))
        self._latencies = {k: v for k, v in self._latencies.items() if k[0] != subnet.name}
        if dead := [n for n, rows in zip(self.layers, subnet.rows, strict=True) if not len(rows)]:
            warnings.warn(
                f"subnet {subnet.name}: no weight is left in {dead}, so its output is constant "
                "behind them; prune a trained model, prune less, or leave these layers dense "
                "(skip)",
                stacklevel=3,
            )

    def subnet(self, name: str) -> Subnet:
        """The subnet of a name, canonical or not; KeyError for an unknown one."""
        if not isinstance(name, (str, Pattern)):
            raise wrong_type("Cocktail", "name", name, "the name of a subnet, such as subnet.name")
        if name not in self.subnets:
            with suppress(ValueError):
                name = str(parse(name))  # "channel-0.5" is channel-0.5000
        if name not in self.subnets:
            raise KeyError(f"Cocktail: subnet {name!r} is unknown; there are {list(self.subnets)}")
        return self.subnets[name]

    def activate(self, name: str) -> None:
        """Make the model compute as this subnet: masks, silent channels, BatchNorm statistics.

        Bits are copied into the layers' fixed buffers, so nothing is recompiled; the backward of a
        pass must end before the next call. A subnet without BatchNorm statistics (or scales and
        shifts) of its own uses those that the model holds for all such subnets together, as in
        training.
        """
        subnet = self.subnet(name)
        self._set_masks(subnet)
        self._take(subnet)

    def _set_masks(self, subnet: Subnet) -> None:
        masked = subnet.row is not None
        layers = list(self.layers.values())
        for module in (*layers, *(norm for norm, _ in self._silenced)):
            if module.masked is not masked:
                module.masked = masked
        if masked:
            # read anew each time: model.to() replaces buffers, load_state_dict(assign=True) weights
            self.bank.weights[:] = [layer.weight for layer in layers]
            copy_all([layer.mask_bits for layer in layers], self.bank.views(subnet.row))
            copy_all([layer.live for layer in layers], subnet.live)
            for layer, rows in zip(layers, subnet.rows, strict=True):
                layer.set_rows(rows)
            norms = [norm.live for norm, _ in self._silenced]
            copy_all(norms, [subnet.live[index] for _, index in self._silenced])
            for norm, index in self._silenced:
                norm.set_whole(len(subnet.rows[index]) == norm.num_features)
        self.active = subnet.name

    @contextmanager
    def using(self, name: str) -> Iterator[nn.Module]:
        """Activate a subnet inside the `with` block, then the one before."""
        before = self.active
        self.activate(name)
        try:
            yield self.model
        finally:
            self.activate(before)

    def kept_parameters(self, names: Sequence[str]) -> list[tuple[nn.Parameter, Tensor]]:
        """Pairs (parameter, bool mask of what these subnets keep of it, taken together).

        Masked weights; biases and BatchNorm scales and shifts where channels are silent.
        """
        rows = [self.bank.views(self.subnet(name).row) for name in names]
        pairs = []
        for layer, bits, *others in zip(self.layers.values(), *rows, strict=True):
            for other in others:
                bits = ops.mask_or(bits, other)
            pairs.append((layer.weight, ops.unpack_mask(bits, layer.weight.shape)))
        live, (vectors, index) = self.live(names), self.channel_parameters()
        return pairs + [(vector, live[i]) for vector, i in zip(vectors, index, strict=True)]

    def live(self, names: Sequence[str]) -> list[Tensor]:
        """Per masked layer, bool: the channels that any of these subnets does not prune wholly."""
        first, *others = (self.subnet(name).live for name in names)
        for other in others:
            first = [mine | its for mine, its in zip(first, other, strict=True)]
        return first

    def channel_parameters(self) -> tuple[list[nn.Parameter], list[int]]:
        """Parameters of one value per channel, which are silent with it: biases of masked layers,
        scales and shifts behind them; and the indices of the layers that they belong to."""
        found = [(m.bias, i) for i, m in enumerate(self.layers.values()) if m.bias is not None]
        for norm, index in self._silenced:
            if norm.affine:
                found += [(norm.weight, index), (norm.bias, index)]
        return [parameter for parameter, _ in found], [index for _, index in found]

    # ---- state, for checkpoints ------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Masks and subnets (not the model's weights) as a tree of tensors and plain values."""
        fields = ("name", "row", "stage", "accuracy", "statistics", "affine")
        subnets = [{name: getattr(s, name) for name in fields} for s in self.subnets.values()]
        rows = [self.bank.flat(i) for i in range(len(self.bank))]
        shared = {"shared": self._shared, "shared_affine": self._shared_affine}
        return {"subnets": subnets, "rows": rows, **shared}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over copies of what `state` returned, into a cocktail without subnets."""
        norms, affine = self.statistics(), self.affine()
        for flat in state["rows"]:
            self.bank.add(self.bank.split(flat))
        for entry in state["subnets"]:
            if entry["row"] is not None:
                self.add(entry["name"], entry["row"], entry["stage"])
            subnet = self.subnets[entry["name"]]
            subnet.accuracy = entry["accuracy"]
            subnet.statistics = copies(entry["statistics"], norms)
            subnet.affine = copies(entry["affine"], affine)
        self._shared = copies(state["shared"], norms)
        self._shared_affine = copies(state["shared_affine"], affine)

    # ---- save and load ---------------------------------------------------------------------------

    def save(
        self,
        path: str | os.PathLike,
        extra: dict[str, Any] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Write everything into one safetensors file, atomically.

        Weights once, nested unstructured masks as one 4-bit prune level per weight, other masks as
        bits, BatchNorm statistics per subnet, and a JSON header with a digest over all of it.

        Args:
            path: the file.
            extra: JSON-able facts to keep in the header, such as the config of the run.
            names: of the subnets to write besides dense; all by default. KeyError for unknown ones.
        """
        if names is not None:
            names = as_list("Cocktail.save", "names", names)
            names = ["dense", *(self.subnet(name).name for name in names)]
        chosen = {n: s for n, s in self.subnets.items() if names is None or n in names}
        with self.preserved_statistics():
            self._set_masks(self.subnets["dense"])
            self._take_shared()
            tensors = {f"model.{k}": v.clone() for k, v in self.model.state_dict().items()}
        nested = self._nested(chosen)
        if nested:
            masks = [self.bank.views(self.subnets[name].row) for name in nested]
            tensors["levels"] = pack_levels(masks, self.bank.weights)
        for subnet in chosen.values():
            if subnet.row is not None and subnet.name not in nested:
                tensors[f"bits.{subnet.name}"] = self.bank.flat(subnet.row)
            for what in ("statistics", "affine"):
                if own := getattr(subnet, what):
                    tensors[f"{what}.{subnet.name}"] = torch.cat(own)
        header = {
            "factory": getattr(self.model, "factory", None),
            "layers": [[n, list(m.weight.shape)] for n, m in self.layers.items()],
            "norms": [[n, norm_facts(m)] for n, m in self.norms.items()],
            "nested": nested,
            "subnets": [
                {"name": s.name, "stage": s.stage, "accuracy": s.accuracy} for s in chosen.values()
            ],
            "extra": extra or {},
        }
        write_cocktail(path, header, tensors)

    def _nested(self, subnets: dict[str, Subnet]) -> list[str]:
        """Unstructured subnets from dense to sparse, if each lies within the one before."""
        chain = [s for s in subnets.values() if isinstance(s.pattern, Unstructured)]
        chain.sort(key=lambda s: s.pattern.sparsity)
        if not 2 <= len(chain) <= MAX_LEVELS:
            return []
        flats = [self.bank.flat(s.row) for s in chain]
        inside = all(not ops.mask_andnot(b, a).any() for a, b in pairwise(flats))
        return [s.name for s in chain] if inside else []

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module | None = None) -> Cocktail:
        """Read a cocktail back, bit for bit.

        Args:
            path: a file that `save` wrote.
            model: a model of the same architecture, plain (it is converted as the file says) or
                converted; by default one is built from the factory that the file names, which must
                be one of sparse_cocktail's own models.

        Raises:
            FileNotFoundError; ValueError for a truncated, edited or foreign file, for another
            format version, or for a model whose layers differ.
        """
        header, tensors = read_cocktail(path)
        model = fitted_model(path, header, model)
        cocktail = cls(model)
        check_same(
            path, "layers", header["layers"], cocktail.layers, lambda m: list(m.weight.shape)
        )
        check_same(path, "norms", header["norms"], cocktail.norms, norm_facts)
        state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"{path} does not fit the model ({error}); pass the model it was made from"
            ) from error
        levels = {}
        if header["nested"]:
            masks = unpack_levels(tensors["levels"], cocktail.bank.weights, len(header["nested"]))
            levels = dict(zip(header["nested"], masks, strict=True))
        for entry in header["subnets"]:
            name = entry["name"]
            if name != "dense":
                masks = levels.get(name) or cocktail.bank.split(tensors[f"bits.{name}"])
                cocktail.add(name, masks, entry["stage"])
            subnet = cocktail.subnets[name]
            subnet.stage, subnet.accuracy = entry["stage"], entry["accuracy"]
            for what, tensor in (
                ("statistics", cocktail.statistics()),
                ("affine", cocktail.affine()),
            ):
                if (flat := tensors.get(f"{what}.{name}")) is not None:
                    parts = flat.split([t.numel() for t in tensor])
                    setattr(subnet, what, [part.clone() for part in parts])
        cocktail.extra = header["extra"]
        cocktail.activate("dense")
        return cocktail
