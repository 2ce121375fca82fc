"""Gradual magnitude pruning (Zhu and Gupta, 2017)."""

from __future__ import annotations

import math
from dataclasses import replace

from ..patterns import NM, Dense, Pattern
from ..schedules import cubic, length_in_steps
from ..selection import magnitude_masks
from .base import Context, Pass, Stage
from .dynamic import Changing, present_weights, replace_masks
from .dynamic_options import GradualOptions

__all__ = ["GradualMagnitude"]


class GradualMagnitude(Changing):
    """Dense at first, then the smallest weights go, as the kept share falls (Zhu and Gupta, 2017).

    Weights of all layers compete, unlike in the paper, which prunes every layer alike. What is
    pruned no longer trains. The paper keeps its value; here it is zero, which makes no difference
    to the network, since it never returns: a later mask lies within the one before. Channels and
    blocks go as a whole; N:M falls from m:m to n:m by whole n.
    """

    Options = GradualOptions
    NAME = "gmp"

    def plan(self, ctx: Context) -> list[Stage]:
        stages = super().plan(ctx)
        length = ctx.config.epochs, ctx.steps_per_epoch
        self.start = length_in_steps(ctx.options.ramp_start, *length)
        if self.start >= self.timetable.last():
            raise ValueError(
                f"gmp: ramp_start={ctx.options.ramp_start} is step {self.start}, but the last "
                f"change up to ramp_end={ctx.options.ramp_end} is step {self.timetable.last()}; "
                "start earlier, end later, or lower update_every"
            )
        return stages

    def before_stage(self, ctx: Context) -> None:
        super().before_stage(ctx)
        pattern, _, _ = self.present(ctx)
        everything = magnitude_masks(present_weights(ctx), Dense())
        ctx.cocktail.add(pattern, everything, ctx.stage)

    def step(self, ctx: Context) -> list[Pass]:
        return [Pass(self.name(ctx))]

    def change(self, ctx: Context) -> None:
        pattern, _, _ = self.present(ctx)
        if ctx.step >= self.start:
            progress = (ctx.step - self.start) / (self.timetable.last() - self.start)
            now = _with_density(pattern, cubic(1.0, pattern.density, progress))
            with ctx.timed("mask"):
                # pruned weights are zero, and rank last
                masks = magnitude_masks(present_weights(ctx), now, ctx.cocktail.outputs)
            replace_masks(ctx, str(pattern), masks)


def _with_density(pattern: Pattern, density: float) -> Pattern:
    """The same kind of pattern with another density; N:M with the next higher n."""
    if density <= pattern.density:
        return pattern
    if isinstance(pattern, NM):
        n = max(pattern.n, math.ceil(density * pattern.m - 1e-9))
        return NM(n, pattern.m) if n < pattern.m else Dense()
    return replace(pattern, sparsity=max(0.0, 1.0 - density))
