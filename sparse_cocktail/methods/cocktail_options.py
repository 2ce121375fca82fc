"""Recipe fields of Sparse Cocktail, and the sets of them that the paper and its code stand for."""

from __future__ import annotations

from dataclasses import dataclass

from ..patterns import NM, Channel, Unstructured, parse
from ..schedules import geometric_density
from .base import check_choices, check_range, option

__all__ = ["PAPER", "PARITY", "CocktailOptions"]

# Fields that make the published procedure out of a recipe, whose lengths are its own.
PAPER = {"interpolation": True, "consolidate": 0.0}
# The public code's ways besides.
PARITY = {
    **PAPER,
    "first_cycle": 110 / 150,  # the code's defaults, not those of the paper's Table 5
    "cycle": 20 / 150,
    "counts": "measured",
    "nested_channels": False,
    "mask_update": "shared",
    "silence": False,
    "teacher_statistics": "update",
    "abandon": False,
    "objective": "stages",
    "search_samples": 0,
    "recalibrate_samples": 0,
}

_CHOICES = {
    "counts": ("exact", "measured"),
    "objective": ("distinct", "stages"),
    "consolidate_draw": ("uniform", "pattern", "sparsest"),
}
_RANGES = (
    ("(0, 1)", ("prune_unstructured", "prune_channel"), "the paper uses 0.2 and 0.1"),
    ("[0, 1]", ("beta",), "the paper uses 0.8"),
    ("[0, inf)", ("first_cycle", "cycle"), "give epochs or a share"),
    ("[0, inf)", ("consolidate", "search_samples"), "0 leaves it out"),
    ("[0, inf)", ("restart_lr", "min_lr", "consolidate_lr"), "give a learning rate"),
    ("[0, inf)", ("consolidate_weight", "dense_weight"), "give a factor"),
)


@dataclass
class CocktailOptions:
    """Recipe fields of Sparse Cocktail; the defaults are ours, `PAPER` makes the published ones."""

    stages: int = option(10, "pruning stages after the dense one")
    prune_unstructured: float = option(0.2, "share of the remaining weights removed per stage")
    prune_channel: float = option(0.1, "share of the remaining channels removed per stage")
    nm: dict = option({"1:2": 2, "2:4": 5, "4:8": 8}, "N:M patterns and the stage that makes each")
    umg: bool = option(
        True, "unified mask generation: score channels by what the other masks keep of them"
    )
    beta: float = option(0.8, "share of the unstructured mask in channel scores")
    counts: str = option(
        "exact", "how many weights and channels stay: exact, or measured as in the public code"
    )
    nested_channels: bool = option(False, "choose channels among the previous stage's only")
    rewind: int = option(
        1, "completed epochs of stage 0 that stages rewind to (0: train on without rewinding)"
    )
    first_cycle: float = option(2 / 3, "first cosine: epochs (int) or share of a stage")
    cycle: float = option(1 / 6, "cosine restarts: epochs (int) or share of a stage")
    restart_lr: float = option(0.01, "learning rate of restarts")
    min_lr: float = option(0.001, "learning rate at a cycle's end")
    dense_pivot: bool = option(
        True, "a dense step before every sparse one; off: all take turns (AST's order)"
    )
    distill: bool = option(True, "teach sparse steps by the dense network")
    pair_batches: bool = option(
        False,
        "a sparse step repeats the dense step's batch and takes its output for a teacher; an epoch "
        "then sees half of the data",
    )
    interpolation: bool = option(False, "fold the stages' weights into one set, greedily")
    search_samples: int = option(
        256, "samples to recalibrate BatchNorm in the search (0: mix statistics)"
    )
    abandon: bool = option(True, "the search may leave a stage's weights out (alpha = 1)")
    objective: str = option(
        "distinct", "score of the search: distinct subnets, or stages as in the public code"
    )
    dense_weight: float = option(1.0, "weight of the dense network in that score")
    consolidate: float = option(
        8.5, "train all subnets together at the end: length in stages (0: off)"
    )
    consolidate_lr: float = option(1.0, "its initial learning rate, as a share of lr")
    consolidate_subnets: int = option(2, "subnets per step of it, besides the dense network")
    consolidate_weight: float = option(0.5, "weight of each one's loss")
    consolidate_draw: str = option(
        "uniform", "which: uniform, pattern (patterns take turns) or sparsest (one is)"
    )

    def patterns(self, stage: int) -> tuple[Unstructured, Channel]:
        """The unstructured and the channel pattern of a stage, from 1 on."""
        return (
            Unstructured(1.0 - geometric_density(self.prune_unstructured, stage)),
            Channel(1.0 - geometric_density(self.prune_channel, stage)),
        )

    def nm_at(self, stage: int) -> str | None:
        """The N:M pattern in force in a stage; None before the first one."""
        made = [name for name, at in self.nm.items() if at <= stage]
        return max(made, key=self.nm.__getitem__, default=None)

    def check(self, epochs: int) -> None:
        """Raise ValueError for fields that contradict each other or make no run of `epochs`."""
        if self.stages < 1:
            raise ValueError(f"cocktail: stages={self.stages} is below 1; 10 is the paper's number")
        if not 0 <= self.rewind <= epochs:
            raise ValueError(
                f"cocktail: rewind={self.rewind} is not in [0, epochs={epochs}]; it counts "
                "completed epochs of stage 0, and 0 means no rewinding"
            )
        check_choices("cocktail", self, _CHOICES)
        for interval, names, remedy in _RANGES:
            check_range("cocktail", self, interval, names, remedy)
        if self.consolidate_subnets < 1:
            raise ValueError(
                f"cocktail: consolidate_subnets={self.consolidate_subnets} is below 1; "
                "--consolidate 0 leaves the consolidation out"
            )
        if self.pair_batches and not (self.dense_pivot and self.distill):
            raise ValueError(
                "cocktail: pair_batches=True needs dense_pivot and distill: it repeats the dense "
                "step's batch to save the teacher's forward"
            )
        ladder = [str(p) for k in range(1, self.stages + 1) for p in self.patterns(k)]
        if len(set(ladder)) < len(ladder):
            raise ValueError(
                f"cocktail: stages={self.stages} gives two subnets the same name (four decimals); "
                "use fewer stages or smaller shares"
            )
        made_at = list(self.nm.values())
        if any(type(stage) is not int or stage < 1 for stage in made_at) or len(set(made_at)) < len(
            made_at
        ):
            raise ValueError(
                f"cocktail: nm={self.nm} must give every pattern a stage of its own, a whole "
                'number from 1 on, as in {"1:2": 2, "2:4": 5}'
            )
        for name in self.nm:
            if not isinstance(parse(name), NM):
                raise ValueError(f"cocktail: nm has {name!r}, which is no N:M pattern such as 2:4")
