"""AC/DC: dense and sparse phases of one network take turns (Peste et al., NeurIPS 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from .. import ops
from ..patterns import Pattern
from ..schedules import length_in_steps
from ..selection import check_ranks_agree, magnitude_masks
from .base import Context, Pass, Stage, check_range, option
from .menu import MenuOptions, report_ineligible
from .separate import Separate
from .updates import reset_momentum, zero_pruned

__all__ = ["ACDC", "ACDCOptions", "phases"]


@dataclass
class ACDCOptions(MenuOptions):
    """Recipe fields of AC/DC; the defaults are the shares of the paper's 100 epochs."""

    first_dense: float = option(0.1, "dense phase at the start: epochs (int) or share of a stage")
    phase: float = option(0.05, "each sparse or dense phase of those that take turns after it")
    last_dense: float = option(0.1, "last dense phase; what it ends with is the dense network")
    last_sparse: float = option(0.15, "sparse phase at the end")
    reset_at_sparse: bool = option(
        False, "forget momentum where a sparse phase begins, not only where a dense one does"
    )
    finetune: float = option(
        0, "train the dense network further, alone: epochs (int) or share of a stage (0: off)"
    )

    def finetune_epochs(self, epochs: int) -> int:
        """Length of the dense network's own stage; 0 for none."""
        if isinstance(self.finetune, int) or not self.finetune:
            return int(self.finetune)
        return max(1, round(self.finetune * epochs))

    def phases(self, epochs: int, steps_per_epoch: int) -> list[tuple[int, str]]:
        """`phases` of a stage; borders are those of epochs where a phase is one or longer."""
        names = ("first_dense", "phase", "last_dense", "last_sparse")
        check_range("acdc", self, "[0, inf)", (*names, "finetune"), "give epochs or a share")
        lengths = {n: length_in_steps(getattr(self, n), epochs, steps_per_epoch) for n in names}
        steps = epochs * steps_per_epoch
        fixed = sum(length for name, length in lengths.items() if name != "phase")
        if fixed > steps or not self.phase or not self.last_dense or not self.last_sparse:
            shown = ", ".join(f"{name}={getattr(self, name)}" for name in names)
            raise ValueError(
                f"acdc: {shown} make no schedule of {epochs} epochs: all but first_dense must be "
                "positive, and first_dense, last_dense and last_sparse fit in together"
            )
        unit = steps_per_epoch if lengths["phase"] >= steps_per_epoch else 1
        return phases(steps, **lengths, unit=unit)


def phases(
    steps: int, first_dense: int, phase: int, last_dense: int, last_sparse: int, unit: int = 1
) -> list[tuple[int, str]]:
    """(first step, "dense" or "sparse") of every phase of AC/DC, in order.

    A dense phase, then phases of about `phase` steps, sparse ones first, evenly over what is left
    before the last dense and the last sparse one. The first two and the last two phases exist
    however few steps there are; turns that would be shorter than a unit are left out.

    Args:
        steps: of the whole network, 2 or more.
        first_dense, phase, last_dense, last_sparse: lengths in steps.
        unit: what borders are multiples of, such as the steps of an epoch.
    """
    if steps < 2:
        raise ValueError(f"acdc: steps={steps} is below 2, one dense and one sparse; train longer")

    def border(step: float) -> int:
        return unit * math.floor(step / unit + 0.5)

    end = min(max(border(steps - last_sparse), 1), steps - 1)
    last = max(min(border(steps - last_sparse - last_dense), end - 1), 1)
    first = min(max(border(first_dense), 1), last)
    turns = min(max(round((last - first) / max(phase, 1)), 1), (last - first) // unit)
    made = [(0, "dense")]
    made += [
        (border(first + (last - first) * i / turns), "dense" if i % 2 else "sparse")
        for i in range(turns)
    ]
    made += [(last, "dense"), (end, "sparse")]
    return made[:1] + [new for before, new in pairwise(made) if new[1] != before[1]]


def dense_file(pattern: Pattern) -> str:
    """Where the dense network of a pattern's run lies in the run's folder."""
    return f"pool/dense-{pattern}.safetensors"


class ACDC(Separate):
    """Pairs of a dense and a sparse network, one training run for each pattern.

    A sparse phase starts with new magnitude masks, which then stay, and trains what they keep; the
    rest is zero. A dense phase trains everything, with momentum forgotten at its start.

    Weights come back as zeros. A whole channel that does so stays silent where BatchNorm's shift is
    negative and a ReLU follows, so channels change places less than single weights.
    """

    Options = ACDCOptions

    def plan(self, ctx: Context) -> list[Stage]:
        starts = ctx.options.phases(ctx.config.epochs, ctx.steps_per_epoch)
        self._starts = dict(starts)
        self._last = starts[-1][0]
        report_ineligible(ctx, ctx.options.menu())
        return super().plan(ctx)

    def network_stages(self, ctx: Context, pattern: Pattern) -> list[Stage]:
        stages = super().network_stages(ctx, pattern)
        if epochs := ctx.options.finetune_epochs(ctx.config.epochs):
            lr = ctx.options.learning_rate(ctx.config.lr, epochs * ctx.steps_per_epoch)
            stages.append(Stage("dense", epochs, lr, dense_file(pattern)))
        return stages

    @classmethod
    def network_cost(cls, options: ACDCOptions, epochs: int) -> float:
        return float(epochs + options.finetune_epochs(epochs))

    def step(self, ctx: Context) -> list[Pass]:
        pattern, part, _ = self.present(ctx)
        kind = self._starts[max(start for start in self._starts if start <= ctx.step)]
        return [Pass(str(pattern) if part == 0 and kind == "sparse" else "dense")]

    def after_step(self, ctx: Context) -> None:
        """Between two phases; before the checkpoint, so that a resumed run does not repeat it."""
        pattern, part, _ = self.present(ctx)
        kind = self._starts.get(ctx.step + 1) if part == 0 else None
        if ctx.step + 1 == self._last and part == 0:
            ctx.save_weights(dense_file(pattern))
        if kind == "sparse":
            with ctx.timed("mask"):
                self._compress(ctx, pattern)
        if kind == "dense" or (kind == "sparse" and ctx.options.reset_at_sparse):
            reset_momentum(ctx)

    def _compress(self, ctx: Context, pattern: Pattern) -> None:
        """Masks by the present magnitudes; what they prune becomes zero."""
        cocktail, name = ctx.cocktail, str(pattern)
        if name in cocktail.subnets:
            row = cocktail.subnets[name].row
            before = cocktail.bank.flat(row).clone()
            weights = [layer.weight for layer in cocktail.layers.values()]
            cocktail.set_masks(name, magnitude_masks(weights, pattern, cocktail.outputs))
            new = ops.mask_andnot(cocktail.bank.flat(row), before)
            kept = cocktail.bank.count(row)
            ctx.log("masks", subnet=name, changed=int(ops.mask_count(new)) / max(kept, 1))
        else:
            row = cocktail.add(pattern, stage=ctx.stage).row
        check_ranks_agree(cocktail.bank, [row])
        zero_pruned(ctx, name)

    def after_stage(self, ctx: Context) -> None:
        pattern, part, _ = self.present(ctx)
        ctx.save_weights(dense_file(pattern) if part else f"pool/{pattern}.safetensors")

    def report(self, ctx: Context) -> list[str]:
        return ["dense"] if self.present(ctx)[1] else super().report(ctx)

    def weight_sets(self, ctx: Context) -> dict[str, list[str]]:
        dense = {dense_file(pattern): ["dense"] for pattern in ctx.options.menu()}
        return {**dense, **super().weight_sets(ctx)}
