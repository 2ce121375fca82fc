"""Recipe fields of Spartan, and what its masks make of them."""

from __future__ import annotations

from dataclasses import dataclass

from ..allocation import ALLOCATIONS
from ..patterns import Block, Channel, Unstructured
from ..schedules import length_in_steps
from .base import check_choices, check_range, option
from .menu import MenuOptions

__all__ = ["SpartanOptions"]

_CHOICES = {
    "cost_model": ("sparsity", "flops"),
    "allocation": ALLOCATIONS,
    "normalise": ("none", "rms"),
}
# Times the root of any unit's size it is in the range of ops.soft_topk_multi.
SHARPNESS = "[0, 1e6]"


@dataclass
class SpartanOptions(MenuOptions):
    """Recipe fields of Spartan."""

    FAMILIES = (Unstructured, Channel, Block)

    sharpness: float = option(
        10.0, "of the soft mask at the end of soft_phase; times the root of a block's size"
    )
    soft_phase: float = option(
        0.8, "soft masks sharpen, then freeze: epochs (int) or share of a network's (float)"
    )
    budget_ramp: float = option(
        0.2, "the kept share falls from 1 to its target: epochs (int) or share (float)"
    )
    cost_model: str = option("sparsity", "what a weight costs: sparsity (1) or flops (positions)")
    allocation: str = option("global", "kept weights per layer: global, uniform or erk")
    normalise: str = option("none", "rank weights as they are, or divided by their layer's rms")
    adjust_cost: bool = option(
        False, "prune masked layers more, so that the whole network has the pattern's density"
    )

    def check(self) -> None:
        """Raise ValueError for fields out of range or that contradict each other."""
        check_choices("spartan", self, _CHOICES)
        remedy = "the paper ends at 10 for ResNet-50 and 20 for ViT-B/16"
        check_range("spartan", self, SHARPNESS, ["sharpness"], remedy)
        check_range("spartan", self, "(0, inf)", ["soft_phase"], "0.8 is usual")
        check_range("spartan", self, "[0, inf)", ["budget_ramp"], "0.2 is usual")
        if self.cost_model == "flops" and self.allocation != "global":
            raise ValueError(
                f"spartan: cost_model='flops' needs allocation='global', not {self.allocation!r}: "
                "the weights of one layer all cost the same; set one of the two back"
            )

    def phases(self, epochs: int, steps_per_epoch: int) -> tuple[int, int]:
        """Steps of the soft phase, and of the fall of the budget in it; ValueError if it is not."""
        soft, ramp = (
            length_in_steps(x, epochs, steps_per_epoch) for x in (self.soft_phase, self.budget_ramp)
        )
        steps = epochs * steps_per_epoch
        if not ramp <= soft <= steps:
            raise ValueError(
                f"spartan: budget_ramp={self.budget_ramp} and soft_phase={self.soft_phase} are "
                f"{ramp} and {soft} steps of {steps}; the budget falls within the soft phase, and "
                "that ends within the run: lower them, or raise epochs"
            )
        return max(1, soft), ramp
