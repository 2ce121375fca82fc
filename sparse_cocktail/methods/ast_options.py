"""Recipe fields of AST."""

from __future__ import annotations

from dataclasses import dataclass

from ..patterns import NM, Unstructured
from .base import check_range, option
from .menu import MenuOptions

__all__ = ["ASTOptions"]


@dataclass
class ASTOptions(MenuOptions):
    """Recipe fields of AST. Lengths are epochs (int) or shares of the run (float)."""

    FAMILIES = (Unstructured, NM)

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

    def check(self) -> None:
        """Raise ValueError for fields out of range."""
        check_range("ast", self, "[0, 1]", ("offset", "drop", "drop_end"), "give a share")
        lengths = ("ramp_start", "ramp_end", "update_until", "update_every")
        check_range("ast", self, "[0, inf)", lengths, "give epochs or a share")
