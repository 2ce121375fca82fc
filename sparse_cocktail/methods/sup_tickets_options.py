"""Recipe fields of Sup-tickets, and how they split a network's epochs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, get_type_hints

from ..schedules import triangular
from .base import check_choices, check_range, option
from .menu import MenuOptions
from .separate import Separate

__all__ = ["Cycles", "SupTicketsOptions"]

_CHOICES = {"prune_scope": ("global", "layerwise"), "average": ("mean", "moving")}
MENU_FIELDS = ("patterns", "ladder", "stages")  # say which networks there are, once for all


@dataclass(frozen=True)
class Cycles:
    """How a network's epochs are split: `pretrain`, then `count` cycles of `length` epochs."""

    pretrain: int
    count: int
    length: int

    @classmethod
    def split(cls, epochs: int, share: float, length: float) -> Cycles:
        """As many whole cycles as fit into a share of the epochs.

        Args:
            epochs: of the network.
            share: of them for all cycles together.
            length: of a cycle: epochs (int) or share of the network's (float). The latter is
                rounded to whole epochs, and there is one such cycle, where only the run has room.
        """
        whole = length if isinstance(length, int) else max(1, round(length * epochs))
        count = math.floor(epochs * share / whole + 1e-9)
        if not count and share > 0 and whole is not length:
            count = int(whole < epochs)
        return cls(epochs - count * whole, count, whole)

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
        name, rates = "sup-tickets", ("ticket_low_lr", "ticket_high_lr")
        check_choices(name, self, _CHOICES)
        check_range(name, self, "[0, 1]", ("cyclic_share", "ticket_drop"), "give a share")
        check_range(name, self, "[0, inf)", rates, "0.001 and 0.005 are the paper's")
        check_range(name, self, "(0, inf)", ["ticket_cycle"], "give epochs or a share")

    def base_method(self) -> tuple[type[Separate], Any]:
        """The class of the base and its options: `base_options`, and fields that it has too."""
        from . import METHODS  # which holds this method, too

        kind = METHODS.get(self.base)
        if kind is None or not issubclass(kind, Separate) or kind.Options is SupTicketsOptions:
            kinds = {n: m for n, m in METHODS.items() if issubclass(m, Separate)}
            fit = [n for n, m in kinds.items() if m.Options is not SupTicketsOptions]
            raise ValueError(f"sup-tickets: base={self.base!r} is not one of {', '.join(fit)}")
        known = [f.name for f in dataclasses.fields(kind.Options)]
        self._check_base_options([name for name in known if name not in MENU_FIELDS], kind)
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in known}
        return kind, kind.Options(**{**own, **self.base_options})

    def _check_base_options(self, known: list[str], kind: type[Separate]) -> None:
        types = get_type_hints(kind.Options)
        for name, value in self.base_options.items():
            if name in MENU_FIELDS:
                raise ValueError(
                    f"sup-tickets: base_options has {name!r}, but the base trains the networks of "
                    f"this method; give {name} outside of base_options"
                )
            if name not in known:
                raise ValueError(
                    f"sup-tickets: base_options has {name!r}, which {self.base} does not know; "
                    f"its fields are {', '.join(known)}"
                )
            wanted = (int, float) if types[name] is float else types[name]
            if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
                raise ValueError(
                    f"sup-tickets: base_options has {name}={value!r}, a {type(value).__name__}, "
                    f"but the field is a {types[name].__name__}; write JSON without quotes around "
                    'numbers, as in {"drop": 0.3}'
                )
