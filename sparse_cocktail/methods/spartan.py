"""Spartan: soft top-k masks that sharpen while all weights train (Tai et al., NeurIPS 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..costs import flops
from ..modules import output_positions
from ..patterns import Pattern
from ..reference import ones
from ..selection import check_ranks_agree
from ..soft_masks import SoftMasks, block_of
from .base import Context, Pass, Stage
from .menu import layers_to_prune
from .separate import Separate
from .spartan_options import SpartanOptions

__all__ = ["Spartan", "SpartanOptions"]


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

    The masks of a step are made once for all parts of an accumulated batch. A soft step waits for
    the device once, to learn which channels are silent; with layers whose units cost unequally
    (channels, flops), about 50 times, as the hard mask is then found by bisection.
    """

    Options = SpartanOptions

    @dataclass
    class State:
        roots: list = field(default_factory=list)  # of the last soft masks, one per budget
        kept: dict = field(default_factory=dict)  # frozen soft values by pruned layer

    _made: tuple[int, int] | None = None  # stage and step whose masks the cocktail holds

    # ---- what is pruned, and when ----------------------------------------------------------------

    def plan(self, ctx: Context) -> list[Stage]:
        o = ctx.options
        o.check()
        if ctx.config.compile:
            raise ValueError(
                "spartan: compile=True, but Spartan makes the weights outside of the network at "
                "every pass; set compile=False"
            )
        self._soft, self._ramp = o.phases(ctx.config.epochs, ctx.steps_per_epoch)
        self._masks = {str(pattern): self._masks_of(ctx, pattern) for pattern in o.menu()}
        return super().plan(ctx)

    def _masks_of(self, ctx: Context, pattern: Pattern) -> SoftMasks:
        o, layers = ctx.options, list(ctx.cocktail.layers.items())
        everything, positions = self._costs(ctx)
        places = layers_to_prune(ctx, pattern)
        shapes = {i: tuple(layers[i][1].weight.shape) for i in places}
        costs = {i: positions.get(layers[i][0], 1) for i in places}
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
        place = ctx.stage, ctx.step
        with ctx.timed("mask"):
            known = ctx.cocktail.masks(name) if self._made == place else None
            made, bits, self.state.roots = masks.weights(
                weights, *self.progress(ctx.step), self.state.roots, known
            )
            if known is None:
                ctx.cocktail.set_masks(name, bits)  # silences what is all pruned
                self._made = place
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
            check_ranks_agree(ctx.cocktail.bank, [ctx.cocktail.subnets[name].row])

    @torch.no_grad()
    def after_epoch(self, ctx: Context) -> None:
        """At a network's end, make its weights those that it computes with."""
        if ctx.epoch + 1 == ctx.stages[ctx.stage].epochs:
            _, _, weights = self._present(ctx)
            for weight, made in zip(weights, self._frozen_weights(ctx), strict=True):
                weight.copy_(made)
            self.state.roots, self.state.kept = [], {}
