"""Recipe fields of Sup-tickets, and how they split a network's epochs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..schedules import triangular
from .base import option
from .menu import MenuOptions
from .separate import Separate

__all__ = ["Cycles", "SupTicketsOptions"]

_CHOICES = {"prune_scope": ("global", "layerwise"), "average": ("mean", "moving")}


@dataclass(frozen=True)
class Cycles:
    """How a network's epochs are split: `pretrain`, then `count` cycles of `length` epochs."""

    pretrain: int
    count: int
    length: int

    @classmethod
    def split(cls, epochs: int, share: float, length: float) -> Cycles:
        """As many whole cycles as fit into a share of the epochs; one, where only the run has room.

        Args:
            epochs: of the network.
            share: of them for all cycles together.
            length: of a cycle: epochs (int) or share of the network's (float), at least one epoch.
        """
        length = length if isinstance(length, int) else max(1, round(length * epochs))
        count = math.floor(epochs * share / length + 1e-9) or int(length < epochs)
        return cls(epochs - count * length, count, length)

    def ticket(self, epoch: int) -> int | None:
        """Number of the ticket, from 1, that an epoch completes; 0: the end of pre-training."""
        since = epoch + 1 - self.pretrain
        return since // self.length if since >= 0 and since % self.length == 0 else None

    def starts(self, step: int, per_epoch: int) -> bool:
        """Whether a step of the network is the first one of a cycle."""
        since = step - self.pretrain * per_epoch
        return since >= 0 and since % (self.length * per_epoch) == 0

    def lr(self, step: int, per_epoch: int, low: float, high: float) -> float:
        """Learning rate of a step in the cycles: low, high, low; a cycle's last step has `low`."""
        length = self.length * per_epoch
        since = step - self.pretrain * per_epoch
        return triangular(low, high, (since % length + 1) / length)


@dataclass
class SupTicketsOptions(MenuOptions):
    """Recipe fields of Sup-tickets."""

    base: str = option(
        "rigl", "method that trains a network first: set, rigl, granet, gmp or another of its kind"
    )
    base_options: dict = option({}, 'fields of that method, as JSON: {"drop": 0.3}')
    lr_schedule: str = option(
        "steps", "cosine from lr to min_lr, or steps: a tenth at every milestone"
    )
    cyclic_share: float = option(0.1, "share of a network's epochs for the cycles")
    ticket_cycle: float = option(
        0.032, "a cycle, which gives one ticket: epochs (int) or share of a network's (float)"
    )
    ticket_low_lr: float = option(0.001, "learning rate at a cycle's start and end")
    ticket_high_lr: float = option(0.005, "learning rate in its middle")
    ticket_drop: float = option(
        0.5, "share of every layer's weights that are replaced when a cycle starts"
    )
    prune_scope: str = option(
        "global", "weights compete when the average is pruned: global, or layerwise"
    )
    average: str = option("mean", "of all tickets, or moving: every new one counts half")

    def check(self) -> None:
        """Raise ValueError for fields out of range."""
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"sup-tickets: {name}={value!r} is not one of {allowed}")
        for name in ("cyclic_share", "ticket_drop"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"sup-tickets: {name}={value} is not in [0, 1]; give a share")
        for name in ("ticket_low_lr", "ticket_high_lr"):
            if not (value := getattr(self, name)) >= 0:
                raise ValueError(f"sup-tickets: {name}={value} is not 0 or more")
        if not self.ticket_cycle > 0:
            raise ValueError(f"sup-tickets: ticket_cycle={self.ticket_cycle} is not positive")

    def base_method(self) -> tuple[type[Separate], Any]:
        """The class of the base and its options: `base_options`, and fields that it has too."""
        from . import METHODS  # which holds this method, too

        kind = METHODS.get(self.base)
        if kind is None or not issubclass(kind, Separate) or kind.Options is SupTicketsOptions:
            kinds = {n: m for n, m in METHODS.items() if issubclass(m, Separate)}
            fit = [n for n, m in kinds.items() if m.Options is not SupTicketsOptions]
            raise ValueError(f"sup-tickets: base={self.base!r} is not one of {', '.join(fit)}")
        known = [f.name for f in dataclasses.fields(kind.Options)]
        if unknown := sorted(set(self.base_options) - set(known)):
            raise ValueError(
                f"sup-tickets: base_options has {unknown[0]!r}, which {self.base} does not know; "
                f"its fields are {', '.join(known)}"
            )
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in known}
        return kind, kind.Options(**{**own, **self.base_options})
