"""Keep what a subnet prunes as it is, while an optimizer changes the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .cocktail import Cocktail
from .reference import ones

__all__ = ["Frozen", "is_like"]


class Frozen:
    """Holds what subnets prune of a model's parameters, and of an optimizer's moments of them.

    `hold` before the optimizer's step copies it, `restore` after the step puts it back. Of biases,
    scales and shifts that is what belongs to silent channels. All is done in lists, for a step has
    hundreds of tensors; on a CPU the copies' memory is kept, since new pages cost more than copies.
    """

    def __init__(self, cocktail: Cocktail) -> None:
        self.cocktail = cocktail
        self.weights = [layer.weight for layer in cocktail.layers.values()]
        self.vectors, self.layers = cocktail.channel_parameters()
        self.full = torch.cat([ones(weight).flatten() for weight in self.weights])
        self.at_once = self.weights[0].is_cuda  # a launch for all, not work in place
        self.scratch: dict[tuple[int, str], Tensor] = {}

    @torch.no_grad()
    def hold(self, names: Sequence[str], optimizer: torch.optim.Optimizer | None = None) -> None:
        """Copy what these subnets prune; what any of them keeps is not pruned.

        Args:
            names: of subnets, without dense.
            optimizer: its tensors of a parameter's shape are moments; None: leave them alone.
        """
        self.optimizer, bank = optimizer, self.cocktail.bank
        rows = [self.cocktail.subnet(name).row for name in names]
        kept = bank.flat(rows[0])
        for row in rows[1:]:
            kept = kept | bank.flat(row)
        self.bits, self.pruned = (bank.split(flat) for flat in (kept, self.full & ~kept))
        self.held_weights = self._held_weights()

        live = self.cocktail.live(names)
        sizes = [len(channels) for channels in live]
        alive = torch.cat(live).to(self.weights[0].dtype)
        self.live, dead = (flat.split(sizes) for flat in (alive, 1 - alive))
        self.held_vectors = self._tensors(self.vectors)
        if self.held_vectors:
            factors = [dead[self.layers[index]] for index, _ in self.held_vectors]
            made = torch._foreach_mul(list(self.held_vectors.values()), factors)
            self.held_vectors = dict(zip(self.held_vectors, made, strict=True))

    def _held_weights(self) -> dict[tuple[int, str], Tensor]:
        """On a GPU what is pruned, zero elsewhere; on a CPU everything."""
        found = self._tensors(self.weights)
        if self.at_once:
            bits = [self.pruned[index] for index, _ in found]
            made = ops.masked_weights(list(found.values()), bits)
            return dict(zip(found, made, strict=True))
        for key, tensor in found.items():
            if key not in self.scratch or not _alike(self.scratch[key], tensor):
                self.scratch[key] = torch.empty_like(tensor)
        held = {key: self.scratch[key] for key in found}
        torch._foreach_copy_(list(held.values()), list(found.values()))
        return held

    def _tensors(self, parameters: Sequence[nn.Parameter]) -> dict[tuple[int, str], Tensor]:
        """The parameters and their moments, by place and name."""
        found = {}
        for index, parameter in enumerate(parameters):
            found[index, ""] = parameter.detach()
            state = self.optimizer.state.get(parameter, {}) if self.optimizer else {}
            found |= {(index, k): v for k, v in state.items() if is_like(v, parameter)}
        return found

    @torch.no_grad()
    def restore(self) -> None:
        """Give pruned weights and silent channels, moments included, their values of before."""
        found, held = self._tensors(self.weights), self.held_weights
        if self.at_once:
            bits = [self.bits[index] for index, _ in found]
            kept = ops.masked_weights(list(found.values()), bits)
            torch._foreach_copy_(list(found.values()), kept)
            _add(found, held)
        else:
            for key in found.keys() - held.keys():  # a moment that the step has made
                ops.masked_weight_(found[key], self.bits[key[0]])
            for dtype in {tensor.dtype for tensor in held.values()}:  # a call takes one
                keys = [key for key, tensor in held.items() if tensor.dtype == dtype]
                bits = [self.pruned[index] for index, _ in keys]
                ops.masked_copy_([found[k] for k in keys], [held[k] for k in keys], bits)
        if found := self._tensors(self.vectors):
            factors = [self.live[self.layers[index]] for index, _ in found]
            torch._foreach_mul_(list(found.values()), factors)
            _add(found, self.held_vectors)
        self.held_weights = self.held_vectors = {}


def _alike(one: Tensor, other: Tensor) -> bool:
    layouts = [(t.shape, t.stride(), t.dtype, t.device) for t in (one, other)]
    return layouts[0] == layouts[1]


def _add(tensors: dict[Any, Tensor], held: dict[Any, Tensor]) -> None:
    """Add what was held; a moment that the step has made had nothing."""
    if held:
        torch._foreach_add_([tensors[key] for key in held], list(held.values()))


def is_like(value: Any, parameter: Tensor) -> bool:
    """Whether something of an optimizer's state belongs to single values of a parameter."""
    return isinstance(value, Tensor) and value.shape == parameter.shape
