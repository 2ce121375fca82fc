"""Spartan: soft top-k masks that sharpen while all weights train (Tai et al., NeurIPS 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..allocation import ALLOCATIONS
from ..costs import flops
from ..modules import output_positions
from ..patterns import Block, Channel, Pattern, Unstructured
from ..reference import ones
from ..schedules import length_in_steps
from ..selection import check_ranks_agree, eligible
from ..soft_masks import SoftMasks, block_of
from .base import Context, Pass, Stage, option
from .menu import MenuOptions
from .separate import Separate

__all__ = ["Spartan", "SpartanOptions"]

_CHOICES = {
    "cost_model": ("sparsity", "flops"),
    "allocation": ALLOCATIONS,
    "normalise": ("none", "rms"),
}
SHARPEST = 1e6  # times the root of any unit's size it is in the range of ops.soft_topk_multi


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
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"spartan: {name}={value!r} is not one of {', '.join(allowed)}")
        if not 0 <= self.sharpness <= SHARPEST:
            raise ValueError(
                f"spartan: sharpness={self.sharpness} is not in [0, {SHARPEST:g}]; the paper ends "
                "at 10 for ResNet-50 and 20 for ViT-B/16"
            )
        if not self.soft_phase > 0:
            raise ValueError(f"spartan: soft_phase={self.soft_phase} is not positive; 0.8 is usual")
        if not self.budget_ramp >= 0:
            raise ValueError(f"spartan: budget_ramp={self.budget_ramp} is not 0 or more")
        if self.cost_model == "flops" and self.allocation != "global":
            raise ValueError(
                f"spartan: cost_model='flops' needs allocation='global', not {self.allocation!r}: "
                "the weights of one layer all cost the same; set one of the two back"
            )


class Spartan(Separate):
    """One network per pattern: a soft phase, then the mask is frozen and training goes on.

    In the soft phase the network computes with w * m, where m is the soft mask of all weights (or
    blocks, or channels) under a budget, zeroed where the budget does not reach; all weights get
    gradients, through the mask too. The budget falls and the mask sharpens along lines. Then the
    soft values of what is left stay as they are, and in the end they are multiplied into the
    weights.

    A channel of which nothing is left at the moment is silent, its BatchNorm too, as in every
    masked network here. Otherwise BatchNorm multiplies the gradient of its zeros by 1 / sqrt(eps) =
    316, and the weights explode (digits, block-4x4-0.9: 60 % instead of 97 %; `silence=False`).

    Units of unequal size (channels) share a global budget of weights: the sharpness then goes with
    the root of their mean size. Layers that a block does not divide stay dense; Spartan's own code
    prunes those unstructured, without a word but a print.
    """

    Options = SpartanOptions

    @dataclass
    class State:
        roots: list = field(default_factory=list)  # of the last soft masks, one per budget
        kept: dict = field(default_factory=dict)  # frozen soft values by pruned layer

    # ---- what is pruned, and when ----------------------------------------------------------------

    def plan(self, ctx: Context) -> list[Stage]:
        o, epochs = ctx.options, ctx.config.epochs
        o.check()
        soft, ramp = (
            length_in_steps(x, epochs, ctx.steps_per_epoch) for x in (o.soft_phase, o.budget_ramp)
        )
        steps = epochs * ctx.steps_per_epoch
        if not ramp <= soft <= steps:
            raise ValueError(
                f"spartan: budget_ramp={o.budget_ramp} and soft_phase={o.soft_phase} are {ramp} "
                f"and {soft} steps of {steps}; the budget falls within the soft phase, and that "
                "ends within the run"
            )
        self._soft, self._ramp = max(1, soft), ramp
        self._masks = {str(pattern): self._masks_of(ctx, pattern) for pattern in o.menu()}
        return super().plan(ctx)

    def _masks_of(self, ctx: Context, pattern: Pattern) -> SoftMasks:
        o, shapes, costs = ctx.options, {}, {}
        everything, positions = self._costs(ctx)
        for index, (name, layer) in enumerate(ctx.cocktail.layers.items()):
            reason = eligible(layer.weight.shape, pattern)
            if isinstance(pattern, Channel) and index in ctx.cocktail.outputs:
                reason = "its channels are the outputs"
            if reason:
                ctx.log("left_dense", pattern=str(pattern), layer=name, reason=reason)
                continue
            shapes[index] = tuple(layer.weight.shape)
            costs[index] = positions.get(name, 1)
        if not shapes:
            raise ValueError(
                f"spartan: no layer of {ctx.config.model} can take {pattern}; choose other patterns"
            )
        density, own = pattern.density, sum(math.prod(s) * costs[i] for i, s in shapes.items())
        if o.adjust_cost:  # what is not pruned costs, too
            density = 1.0 - (1.0 - density) * everything / own
        if density <= 0:
            raise ValueError(
                f"spartan: adjust_cost=True, but layers that {pattern} cannot prune cost "
                f"{everything - own:,} of {everything:,}, more than it leaves; prune less, or mask "
                "more layers (mask_linear, mask_first)"
            )
        rms = o.normalise == "rms"
        return SoftMasks(shapes, block_of(pattern), density, o.allocation, costs, rms, o.sharpness)

    def _costs(self, ctx: Context) -> tuple[int, dict[str, int]]:
        """The cost of the whole network, and that of one weight per layer where it is not 1."""
        model = ctx.model
        if ctx.options.cost_model == "sparsity":
            return sum(p.numel() for p in model.parameters()), {}
        positions = output_positions(model, ctx.data.example(1).to(ctx.device))
        return flops(model, positions, {}), positions

    # ---- steps -----------------------------------------------------------------------------------

    def before_stage(self, ctx: Context) -> None:
        super().before_stage(ctx)
        _, _, weights = self._present(ctx)
        ctx.cocktail.add(self.present(ctx)[0], [ones(w) for w in weights], stage=ctx.stage)

    def step(self, ctx: Context) -> list[Pass]:
        name, *_ = self._present(ctx)
        if self.state.kept:
            return [Pass(name, weights=partial(self._frozen_weights, ctx))]
        return [Pass(name, weights=partial(self._soft_weights, ctx), dense_grad=True)]

    def _present(self, ctx: Context) -> tuple[str, SoftMasks, list[Tensor]]:
        """Name and masks of the network in training, and the weights of all masked layers."""
        name = str(self.present(ctx)[0])
        return name, self._masks[name], [m.weight for m in ctx.cocktail.layers.values()]

    def progress(self, step: int) -> tuple[float, float]:
        """How far the budget has fallen and the sharpness has risen at a step of a network."""
        return step / self._ramp if self._ramp else 1.0, step / self._soft

    def _soft_weights(self, ctx: Context) -> list[Tensor]:
        name, masks, weights = self._present(ctx)
        with ctx.timed("mask"):
            fall, rise = self.progress(ctx.step)
            made, bits, self.state.roots = masks.weights(weights, fall, rise, self.state.roots)
            ctx.cocktail.set_masks(name, bits)  # silences what is all pruned
        return made

    def _frozen_weights(self, ctx: Context) -> list[Tensor]:
        _, masks, weights = self._present(ctx)
        self.state.kept = {i: m.to(ctx.device) for i, m in self.state.kept.items()}
        return masks.products(weights, self.state.kept)

    def after_step(self, ctx: Context) -> None:
        """At the end of the soft phase, take the masks of the present weights for good."""
        if ctx.step + 1 != self._soft:
            return
        with ctx.timed("mask"):
            name, masks, weights = self._present(ctx)
            self.state.kept, bits = masks.freeze(weights, self.state.roots)
            ctx.cocktail.set_masks(name, bits)
            check_ranks_agree(ctx.cocktail.bank.digest(ctx.cocktail.subnets[name].row))

    @torch.no_grad()
    def after_epoch(self, ctx: Context) -> None:
        """At a network's end, make its weights those that it computes with."""
        if ctx.epoch + 1 == ctx.stages[ctx.stage].epochs:
            _, _, weights = self._present(ctx)
            for weight, made in zip(weights, self._frozen_weights(ctx), strict=True):
                weight.copy_(made)
            self.state.roots, self.state.kept = [], {}
