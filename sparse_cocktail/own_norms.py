"""What subnets have of their own in BatchNorm: statistics, and scales and shifts if they want."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .recalibrate import recalibrate

__all__ = ["OwnNorms", "copies", "copy_all"]


class OwnNorms:
    """The part of `Cocktail` that moves a subnet's BatchNorm into the model and out of it.

    A subnet without anything of its own computes with what the model holds for all such subnets;
    that is set aside while another subnet's own is in the model.
    """

    norms: dict[str, nn.Module]
    subnets: dict[str, Any]
    _shared: list[Tensor] | None
    _shared_affine: list[Tensor] | None

    def statistics(self) -> list[Tensor]:
        """The model's running means and variances, the buffers themselves."""
        return [t for norm in self.norms.values() for t in (norm.running_mean, norm.running_var)]

    def affine(self) -> list[nn.Parameter]:
        """The scales and shifts of the same layers, the parameters themselves."""
        return [p for norm in self.norms.values() if norm.affine for p in (norm.weight, norm.bias)]

    def own_parameters(self) -> list[nn.Parameter]:
        """Parameters that differ between subnets: `affine`, where a subnet has its own."""
        own = any(subnet.affine is not None for subnet in self.subnets.values())
        return self.affine() if own else []

    def keep_norms(self, name: str) -> None:
        """Make what the model's BatchNorm holds now this subnet's own: statistics and affine."""
        subnet = self.subnet(name)
        for what, present in (("statistics", self.statistics()), ("affine", self.affine())):
            if getattr(subnet, what) is None:
                setattr(subnet, what, [t.detach().clone() for t in present])
            else:
                copy_all(getattr(subnet, what), present)

    def recalibrate(self, name: str, batches: Iterable[Tensor]) -> None:
        """Estimate a subnet's own BatchNorm statistics from batches of inputs, and keep them."""
        with self.preserved_statistics():
            self.activate(name)
            recalibrate(self.model, batches)
            own = [t.clone() for t in self.statistics()]
        subnet = self.subnet(name)
        subnet.statistics = own
        if self.active == subnet.name:
            self.activate(name)

    @contextmanager
    def preserved_statistics(self) -> Iterator[None]:
        """Whatever happens to the model's BatchNorm and mask inside is undone afterwards."""
        held = [b for norm in self.norms.values() for b in norm.buffers(recurse=False)]
        held += self.own_parameters()
        before, shared, active = [t.clone() for t in held], self._shared, self.active
        shared_affine = self._shared_affine
        try:
            yield
        finally:
            self._set_masks(self.subnet(active))
            copy_all(held, before)  # `live` among them, which _set_masks wrote as it was
            self._shared, self._shared_affine = shared, shared_affine

    def _take(self, subnet: Any) -> None:
        """Put a subnet's own into the model, or what is shared where it has none."""
        self._shared = _swap(self.statistics(), subnet.statistics, self._shared)
        if subnet.affine is not None or self._shared_affine is not None:
            self._shared_affine = _swap(self.affine(), subnet.affine, self._shared_affine)

    def _take_shared(self) -> None:
        """Put into the model what all subnets share."""
        self._shared = _swap(self.statistics(), None, self._shared)
        self._shared_affine = _swap(self.affine(), None, self._shared_affine)


def _swap(
    present: list[Tensor], own: list[Tensor] | None, aside: list[Tensor] | None
) -> list[Tensor] | None:
    """Overwrite what is in the model; returns what is set aside from then on."""
    if own is not None:
        aside = [t.detach().clone() for t in present] if aside is None else aside
        copy_all(present, own)
        return aside
    if aside is not None:
        copy_all(present, aside)
    return None


@torch.no_grad()
def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Overwrite tensors by others, in one call."""
    if targets:
        torch._foreach_copy_(targets, sources)


def copies(tensors: list[Tensor] | None, like: list[Tensor]) -> list[Tensor] | None:
    """Copies of tensors, on the devices of others; None stays None."""
    if tensors is None:
        return None
    return [t.to(other.device, copy=True) for t, other in zip(tensors, like, strict=True)]
