"""Masks that change while a sparse network trains: SET, RigL and GraNet."""

from __future__ import annotations

from typing import Any

import torch

from .. import ops
from ..allocation import layer_counts
from ..patterns import Pattern
from ..regrowth import prune_and_regrow, random_masks
from ..schedules import cosine, cubic, keep_count, length_in_steps
from ..selection import check_ranks_agree
from .base import Context, Pass, Stage
from .dynamic_options import DynamicOptions, GraNetOptions, Timetable
from .menu import report_ineligible
from .separate import Separate
from .updates import dense_gradients, zero_pruned

__all__ = [
    "SET",
    "Changing",
    "GraNet",
    "RigL",
    "explore",
    "growth",
    "present_weights",
    "replace_masks",
]


class Changing(Separate):
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

    def name(self, ctx: Context) -> str:
        """The subnet that is being trained."""
        return str(self.present(ctx)[0])

    def after_step(self, ctx: Context) -> None:
        due = self.timetable.due(ctx.step)
        # in the other steps they are zero already, and the engine has them stay so
        if due or ctx.step == 0 or ctx.config.mask_update == "shared":
            zero_pruned(ctx, self.name(ctx))
        if due:
            self.change(ctx)

    def change(self, ctx: Context) -> None:
        """Change the mask, after the optimizer step."""
        raise TypeError(f"{type(self).__name__} must override change(ctx)")


class SET(Changing):
    """Sparse from the start: the smallest weights move to random places (Mocanu et al., 2018).

    Layers keep their numbers of weights. What moved starts from 0, without momentum.
    """

    Options = DynamicOptions
    NAME = "set"
    RANDOM = True

    def before_stage(self, ctx: Context) -> None:
        super().before_stage(ctx)
        pattern, _, _ = self.present(ctx)
        weights = present_weights(ctx)
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

    def before_step(self, ctx: Context) -> None:
        if self.timetable.due(ctx.step):
            self.growth = growth(ctx, self.RANDOM)

    def change(self, ctx: Context) -> None:
        explore(ctx, self.name(ctx), self.drop(ctx), self.growth)
        self.growth = None  # frees the gradients


class RigL(SET):
    """They move to where the dense gradient is largest (Evci et al., ICML 2020).

    That is the gradient of the very step after which they move, over its whole batch; where fp16
    makes it infinite, they stay until the next change. A channel that has lost all of its weights
    is silent behind BatchNorm, gets no gradient, and stays so (with `silence` off it may come
    back).
    """

    class Options(DynamicOptions):
        """Recipe fields of RigL: those of SET."""

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
        weights, masks = present_weights(ctx), ctx.cocktail.masks(str(pattern))
        numel = ctx.cocktail.bank.numel
        keep = keep_count(self.density(ctx, pattern, ctx.step), numel)
        with ctx.timed("mask"):
            ctx.cocktail.set_masks(str(pattern), ops.topk_masks(weights, keep, within=masks))
        super().change(ctx)


# ---- changes of a mask, for other methods too ----------------------------------------------------


def present_weights(ctx: Context) -> list[torch.Tensor]:
    return [layer.weight.detach() for layer in ctx.cocktail.layers.values()]


def growth(ctx: Context, random: bool) -> dict[str, Any] | None:
    """By what weights are to grow after this step, for `explore`: call it before that step.

    At random, or by the gradients that the layers hold, which must be dense; None where one of
    these is not finite.
    """
    if random:
        return {"generator": ctx.generator()}
    gradients = dense_gradients(ctx)
    return None if gradients is None else {"gradients": gradients}


def explore(ctx: Context, name: str, drop: float, by: dict[str, Any] | None) -> None:
    """Replace a share of every layer's weights: call it after the optimizer step.

    Args:
        name: of the subnet; its pruned weights are zero.
        drop: share of its weights that go, the smallest first.
        by: what `growth` gave; None: all stay.
    """
    if by is None:
        return
    with ctx.timed("mask"):
        masks = prune_and_regrow(present_weights(ctx), ctx.cocktail.masks(name), drop, **by)
    replace_masks(ctx, name, masks)


def replace_masks(ctx: Context, name: str, masks: list[torch.Tensor]) -> None:
    """Give a subnet other masks; weights and momentum outside of them become zero."""
    with ctx.timed("mask"):
        ctx.cocktail.set_masks(name, masks)
        check_ranks_agree(ctx.cocktail.bank, [ctx.cocktail.subnet(name).row])
        zero_pruned(ctx, name)
