"""Masks that change while a sparse network trains: SET, RigL, GraNet, and gradual pruning."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .. import ops
from ..allocation import ALLOCATIONS, layer_counts
from ..patterns import NM, Dense, Pattern, Unstructured
from ..regrowth import prune_and_regrow, random_masks
from ..schedules import cosine, cubic, decay_at, keep_count, length_in_steps
from ..selection import check_ranks_agree, magnitude_masks
from .base import Context, Pass, Stage, option
from .menu import MenuOptions, report_ineligible
from .separate import Separate
from .updates import zero_pruned

__all__ = ["SET", "GraNet", "GradualMagnitude", "RigL", "Timetable", "explore", "replace_masks"]

LR_SCHEDULES = ("cosine", "steps")


@dataclass
class TimetableOptions(MenuOptions):
    """Recipe fields of methods that change masks at regular times."""

    lr_schedule: str = option(
        "cosine", "cosine from lr to min_lr, or steps: a tenth at 50 % and 75 % of a network"
    )
    update_every: float = option(
        0.02, "between two changes of the mask: epochs (int) or share of a network's (float)"
    )

    def check(self, method: str) -> None:
        """Raise ValueError for fields out of range."""
        if self.lr_schedule not in LR_SCHEDULES:
            known = ", ".join(LR_SCHEDULES)
            raise ValueError(f"{method}: lr_schedule={self.lr_schedule!r} is not one of {known}")
        for name in ("update_every", "update_until", "ramp_end"):
            if not (value := getattr(self, name, 1)) > 0:
                raise ValueError(
                    f"{method}: {name}={value} is not positive; give epochs or a share"
                )


@dataclass
class DynamicOptions(TimetableOptions):
    """Recipe fields of SET and RigL."""

    FAMILIES = (Unstructured,)

    update_until: float = option(
        0.75, "the last change of the mask: epochs (int) or share of a network's (float)"
    )
    drop: float = option(0.5, "share of every layer's weights that are replaced at first")
    drop_end: float = option(0.0, "the same at the last change; a cosine in between")
    allocation: str = option("erk", "kept weights per layer: global, uniform or erk")

    def check(self, method: str) -> None:
        super().check(method)
        for name in ("drop", "drop_end"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{method}: {name}={value} is not in [0, 1]; 0.5 is usual")
        if self.allocation not in ALLOCATIONS:
            known = ", ".join(ALLOCATIONS)
            raise ValueError(f"{method}: allocation={self.allocation!r} is not one of {known}")


@dataclass
class GraNetOptions(DynamicOptions):
    """Recipe fields of GraNet."""

    drop_end: float = option(0.5, "the same at the last change; a cosine in between")
    start_density: float = option(0.5, "kept share at the start; at least that of the pattern")
    ramp_end: float = option(
        0.5, "the kept share has reached its target: epochs (int) or share of a network's (float)"
    )

    def check(self, method: str) -> None:
        super().check(method)
        if not 0 < self.start_density <= 1:
            raise ValueError(f"{method}: start_density={self.start_density} is not in (0, 1]")


@dataclass
class GradualOptions(TimetableOptions):
    """Recipe fields of gradual magnitude pruning."""

    ramp_start: float = option(0.1, "pruning starts: epochs (int) or share of a network's (float)")
    ramp_end: float = option(
        0.7, "the kept share has reached its target: epochs (int) or share of a network's (float)"
    )

    def check(self, method: str) -> None:
        super().check(method)
        if not self.ramp_start >= 0:
            raise ValueError(f"{method}: ramp_start={self.ramp_start} is not 0 or more")


@dataclass(frozen=True)
class Timetable:
    """Masks change in the steps every, 2 * every, ... up to `until`, counted from 0."""

    every: int
    until: int

    @classmethod
    def of(cls, method: str, every: float, until: float, epochs: int, per_epoch: int) -> Timetable:
        """From lengths in epochs (int) or shares (float); ValueError where no step is left.

        At least one change comes, and a step without one follows the last.
        """
        steps = epochs * per_epoch
        if steps < 3:
            raise ValueError(
                f"{method}: a network trains for {steps} steps, but a change of the mask needs one "
                "before and one after it; give more epochs or smaller batches"
            )
        last = min(max(1, length_in_steps(until, epochs, per_epoch)), steps - 2)
        return cls(min(max(1, length_in_steps(every, epochs, per_epoch)), last), last)

    def due(self, step: int) -> bool:
        return 0 < step <= self.until and step % self.every == 0

    def last(self, until: int | None = None) -> int:
        """The last change that comes up to a step; the first one, where that comes later."""
        until = self.until if until is None else min(until, self.until)
        return max(1, until // self.every) * self.every


class _Changing(Separate):
    """Shared by all methods here: one network per pattern, whose mask changes at times."""

    NAME = ""

    def plan(self, ctx: Context) -> list[Stage]:
        o = ctx.options
        o.check(self.NAME)
        until = o.update_until if isinstance(o, DynamicOptions) else o.ramp_end
        timing = o.update_every, until, ctx.config.epochs, ctx.steps_per_epoch
        self.timetable = Timetable.of(self.NAME, *timing)
        report_ineligible(ctx, o.menu())
        return super().plan(ctx)

    def network_stages(self, ctx: Context, pattern: Pattern) -> list[Stage]:
        (stage,) = super().network_stages(ctx, pattern)
        if ctx.options.lr_schedule == "steps":
            lr, steps = ctx.config.lr, stage.epochs * ctx.steps_per_epoch
            stage.lr = lambda step: decay_at(lr, step / steps, (0.5, 0.75), 0.1)
        return [stage]

    def name(self, ctx: Context) -> str:
        """The subnet that is being trained."""
        return str(self.present(ctx)[0])

    def after_step(self, ctx: Context) -> None:
        zero_pruned(ctx, self.name(ctx))
        if self.timetable.due(ctx.step):
            self.change(ctx)

    def change(self, ctx: Context) -> None:
        """Change the mask, after the optimizer step."""
        raise TypeError(f"{type(self).__name__} must override change(ctx)")


class SET(_Changing):
    """Sparse from the start: the smallest weights move to random places (Mocanu et al., 2018).

    Layers keep their numbers of weights. What moved starts from 0, without momentum.
    """

    Options = DynamicOptions
    NAME = "set"
    RANDOM = True

    def before_stage(self, ctx: Context) -> None:
        super().before_stage(ctx)
        pattern, _, _ = self.present(ctx)
        weights = _weights(ctx)
        density = self.density(ctx, pattern, 0)
        keep = layer_counts([w.shape for w in weights], density, ctx.options.allocation)
        ctx.cocktail.add(pattern, random_masks(weights, keep, ctx.generator()), ctx.stage)

    def density(self, ctx: Context, pattern: Pattern, step: int) -> float:
        """Kept share at a step: here that of the pattern."""
        return pattern.density

    def drop(self, ctx: Context) -> float:
        """Share of the weights to replace now (RigL, section 3.2: a cosine to the last change)."""
        progress = ctx.step / self.timetable.last()
        return cosine(ctx.options.drop, ctx.options.drop_end, progress)

    def step(self, ctx: Context) -> list[Pass]:
        due = self.timetable.due(ctx.step)
        return [Pass(self.name(ctx), dense_grad=due and not self.RANDOM)]

    def change(self, ctx: Context) -> None:
        explore(ctx, self.name(ctx), self.drop(ctx), self.RANDOM)


class RigL(SET):
    """They move to where the dense gradient is largest (Evci et al., ICML 2020).

    That is the gradient of the very step after which they move, over its whole batch. A channel
    that has lost all of its weights is silent behind BatchNorm, gets no gradient, and stays so
    (with `silence` off it may come back).
    """

    NAME = "rigl"
    RANDOM = False


class GraNet(RigL):
    """RigL from a denser start: the smallest of all go as the kept share falls (Liu et al., 2021).

    A change first prunes globally by magnitude to the density of a cubic schedule, then replaces
    weights within every layer.
    """

    Options = GraNetOptions
    NAME = "granet"

    def density(self, ctx: Context, pattern: Pattern, step: int) -> float:
        o, length = ctx.options, (ctx.config.epochs, ctx.steps_per_epoch)
        end = self.timetable.last(length_in_steps(o.ramp_end, *length))
        return cubic(max(o.start_density, pattern.density), pattern.density, step / end)

    def change(self, ctx: Context) -> None:
        pattern, _, _ = self.present(ctx)
        weights, masks = _weights(ctx), ctx.cocktail.masks(str(pattern))
        numel = ctx.cocktail.bank.numel
        keep = keep_count(self.density(ctx, pattern, ctx.step), numel)
        with ctx.timed("mask"):
            ctx.cocktail.set_masks(str(pattern), ops.topk_masks(weights, keep, within=masks))
        super().change(ctx)


class GradualMagnitude(_Changing):
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
        everything = magnitude_masks(_weights(ctx), Dense())
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
                masks = magnitude_masks(_weights(ctx), now, ctx.cocktail.outputs)
            replace_masks(ctx, str(pattern), masks)


def _with_density(pattern: Pattern, density: float) -> Pattern:
    """The same kind of pattern with another density; N:M with the next higher n."""
    if density <= pattern.density:
        return pattern
    if isinstance(pattern, NM):
        n = max(pattern.n, math.ceil(density * pattern.m - 1e-9))
        return NM(n, pattern.m) if n < pattern.m else Dense()
    return replace(pattern, sparsity=max(0.0, 1.0 - density))


# ---- changes of a mask, for other methods too ----------------------------------------------------


def _weights(ctx: Context) -> list[torch.Tensor]:
    return [layer.weight.detach() for layer in ctx.cocktail.layers.values()]


def explore(ctx: Context, name: str, drop: float, random: bool) -> None:
    """Replace a share of every layer's weights: call it after the optimizer step.

    Args:
        name: of the subnet; its pruned weights are zero.
        drop: share of its weights that go, the smallest first.
        random: grow at random, else by the gradients that the layers hold, which must be dense.
    """
    with ctx.timed("mask"):
        by = {"generator": ctx.generator()} if random else {"gradients": _gradients(ctx)}
        masks = prune_and_regrow(_weights(ctx), ctx.cocktail.masks(name), drop, **by)
    replace_masks(ctx, name, masks)


def _gradients(ctx: Context) -> list[torch.Tensor]:
    weights = [layer.weight for layer in ctx.cocktail.layers.values()]
    return [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]


def replace_masks(ctx: Context, name: str, masks: list[torch.Tensor]) -> None:
    """Give a subnet other masks; weights and momentum outside of them become zero."""
    with ctx.timed("mask"):
        ctx.cocktail.set_masks(name, masks)
        check_ranks_agree(ctx.cocktail.bank.digest(ctx.cocktail.subnet(name).row))
        zero_pruned(ctx, name)
