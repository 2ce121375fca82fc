"""Recipe fields of AST."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..patterns import NM, Channel, Dense, Pattern, Unstructured
from .base import check_range, option
from .menu import MenuOptions

__all__ = ["ASTOptions", "interleaved"]


@dataclass
class ASTOptions(MenuOptions):
    """Recipe fields of AST. Lengths are epochs (int) or shares of the run (float)."""

    FAMILIES = (Unstructured, Channel, NM)

    dense: bool = option(False, "the dense network takes turns too and is reported")
    interleave: bool = option(False, "families share the turns of a group evenly, not in a row")
    own_norms: bool = option(True, "BatchNorm of its own for every subnet, scales and shifts too")
    correct_gradients: bool = option(
        True, "take out of a gradient what goes against that of the subnet before"
    )
    ramp_start: float = option(0.0, "where densities begin to fall: epochs (int) or share")
    ramp_end: float = option(0.6875, "where they reach the patterns': epochs (int) or share")
    update_until: float = option(0.8, "where masks become final: epochs (int) or share")
    update_every: float = option(0.016, "between a subnet's mask updates: epochs (int) or share")
    offset: float = option(
        0.3, "what a subnet's updates come later than the one's before, as a share of update_every"
    )
    drop: float = option(0.5, "share of every layer's weights that are replaced at first")
    drop_end: float = option(0.005, "the same at update_until; a cosine in between")

    def networks(self) -> list[Pattern]:
        """What takes turns: the dense network if it does, then the menu."""
        return [*([Dense()] if self.dense else []), *self.menu()]

    def turns(self) -> list[Pattern]:
        """The same in the order of turns; the dense network is the first in any."""
        order = interleaved if self.interleave else list
        return [*([Dense()] if self.dense else []), *order(self.menu())]

    def check(self) -> None:
        """Raise ValueError for fields out of range."""
        check_range("ast", self, "[0, 1]", ("offset", "drop", "drop_end"), "give a share")
        lengths = ("ramp_start", "ramp_end", "update_until", "update_every")
        check_range("ast", self, "[0, inf)", lengths, "give epochs or a share")


def interleaved(patterns: Sequence[Pattern]) -> list[Pattern]:
    """Patterns in an order that spreads those of every family evenly, each family in its order."""
    families: dict[type, list[Pattern]] = {}
    for pattern in patterns:
        families.setdefault(type(pattern), []).append(pattern)
    places = {p: (k + 0.5) / len(some) for some in families.values() for k, p in enumerate(some)}
    return sorted(patterns, key=places.__getitem__)
