"""AST: subnets take turns on shared weights (Yang et al., NeurIPS 2022)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import ops
from ..patterns import Channel, Dense
from ..reference import ones
from ..schedules import cosine, length_in_steps
from ..selection import check_ranks_agree
from .ast_masks import next_masks
from .ast_options import ASTOptions
from .base import Context, Method, Pass, Stage
from .menu import report_ineligible
from .mutualnet import prefix_masks
from .updates import dense_gradients

__all__ = ["AST", "without_conflict"]

FIXED = (Dense, Channel)  # patterns whose masks stay as they begin


class AST(Method):
    """Groups of as many steps as there are subnets: each step one subnet on a batch of its own.

    Masks begin full. A subnet's updates set its scheduled density by the magnitude of the shared
    weights, pruned ones included, then prune and regrow in every layer by a dense gradient. From
    the ramp's end to `update_until` they prune and regrow only. Where fp16 makes the gradient of
    an update infinite, it does not regrow.

    Beyond the paper, channel subnets take part, with MutualNet's masks from the first step on: the
    first channels of every layer. With `dense` the dense network has a turn like a subnet, the
    first of a group; with `interleave` turns go round the families.

    With `own_norms` every BatchNorm layer is a subnet's own, the stem's too, which the paper's
    networks share.
    """

    Options = ASTOptions

    @dataclass
    class State:
        previous: list = field(default_factory=list)  # gradients of the step before, in its group
        optimizer: dict = field(default_factory=dict)  # of each subnet's own scales and shifts

    # ---- schedule --------------------------------------------------------------------------------

    def plan(self, ctx: Context) -> list[Stage]:
        o, epochs = ctx.options, ctx.config.epochs
        o.check()
        self._menu = o.turns()
        total = epochs * ctx.steps_per_epoch
        lengths = (o.ramp_start, o.ramp_end, o.update_until, o.update_every)
        self._start, self._end, self._stop, every = (
            length_in_steps(length, epochs, ctx.steps_per_epoch) for length in lengths
        )
        if not self._start <= self._end <= self._stop <= total:
            raise ValueError(
                f"ast: ramp_start={o.ramp_start}, ramp_end={o.ramp_end} and "
                f"update_until={o.update_until} are not in order within epochs={epochs}; each "
                "must come at or after the one before"
            )
        self._period = max(1, round(every / len(self._menu)))  # in steps of one subnet
        report_ineligible(ctx, o.menu())
        return [Stage("train", epochs, o.learning_rate(ctx.config.lr, total))]

    @classmethod
    def cost(cls, options: ASTOptions, epochs: int) -> float:
        return float(epochs)

    def turn(self, step: int) -> tuple[int, int]:
        """The subnet of a step, by its place in the menu, and how many steps it had before."""
        return step % len(self._menu), step // len(self._menu)

    def updates(self, ctx: Context, step: int) -> bool:
        """Whether a step ends with new masks for its subnet."""
        index, own = self.turn(step)
        if isinstance(self._menu[index], FIXED):
            return False
        due = (own - round(index * ctx.options.offset * self._period)) % self._period == 0
        return (due and self._start <= step < self._stop) or self._closes(step)

    def _closes(self, step: int) -> bool:
        """Whether this is the subnet's first step with its final density."""
        return step - len(self._menu) < self._end <= step

    def _progress(self, step: int) -> float:
        """Of the density ramp, in [0, 1]."""
        return 1.0 if step >= self._end else (step - self._start) / (self._end - self._start)

    # ---- steps -----------------------------------------------------------------------------------

    def before_stage(self, ctx: Context) -> None:
        cocktail = ctx.cocktail
        for pattern in ctx.options.networks():
            masks = [ones(weight) for weight in cocktail.bank.weights]
            if isinstance(pattern, Channel):
                masks = prefix_masks(cocktail.bank.weights, pattern, cocktail.outputs)
            if not isinstance(pattern, Dense):
                cocktail.add(pattern, masks, ctx.stage)
            if ctx.options.own_norms:
                cocktail.keep_norms(str(pattern))

    def step(self, ctx: Context) -> list[Pass]:
        name = str(self._menu[self.turn(ctx.step)[0]])
        self._pass = Pass(name, dense_grad=self.updates(ctx, ctx.step))
        return [self._pass]

    @torch.no_grad()
    def before_step(self, ctx: Context) -> None:
        weights = [layer.weight for layer in ctx.cocktail.layers.values()]
        dense = self._pass.subnet == "dense"  # the first of its group: none to correct by
        masks = [] if dense else ctx.cocktail.masks(self._pass.subnet)
        self._due, self._dense = self._pass.dense_grad, None
        if self._due:
            self._dense = dense_gradients(ctx)
            for weight, bits in zip(weights, masks, strict=True):
                weight.grad.copy_(ops.masked_weight(weight.grad, bits))
            self._pass.dense_grad = False  # it has served: the engine may freeze pruned weights
        if ctx.options.correct_gradients:
            self._correct(ctx, weights, masks)
        if ctx.options.own_norms:
            self._take_optimizer(ctx)

    def _correct(self, ctx: Context, weights: list[Tensor], masks: list[Tensor]) -> None:
        """Project each layer's gradient; what comes next is compared with the uncorrected one.

        Where pruned weights are frozen, the part of the previous gradient that they have is left
        out, so that the update itself has no part along the rest.
        """
        mine = [w.grad.nan_to_num(0.0, 0.0, 0.0) for w in weights]  # infinite where fp16 overflows
        shared = ctx.config.mask_update == "shared"
        for weight, bits, before in zip(weights, masks, self.state.previous, strict=False):
            # strided like the weight, which a resume forgets and sums round by
            before = torch.empty_like(weight).copy_(before)
            before = before if shared else ops.masked_weight(before, bits)
            weight.grad.copy_(without_conflict(weight.grad, before))
        last = self.turn(ctx.step)[0] == len(self._menu) - 1
        self.state.previous = [] if last else mine  # a new group starts without

    def _take_optimizer(self, ctx: Context) -> None:
        """Give the optimizer what it knew of this subnet's scales and shifts when it last had them.

        The optimizer writes into these very tensors.
        """
        parameters = ctx.cocktail.affine()
        known = self.state.optimizer.get(self._pass.subnet) or [{} for _ in parameters]
        self.state.optimizer[self._pass.subnet] = [
            # counters, of no dimension, stay where the optimizer has them
            {k: v.to(p.device) if isinstance(v, Tensor) and v.dim() else v for k, v in old.items()}
            for p, old in zip(parameters, known, strict=True)
        ]
        for p, mine in zip(parameters, self.state.optimizer[self._pass.subnet], strict=True):
            ctx.optimizer.state[p] = mine

    def after_step(self, ctx: Context) -> None:
        if ctx.options.own_norms:
            ctx.cocktail.keep_norms(self._pass.subnet)
        if self._due:
            progress = (ctx.step - self._start) / max(1, self._stop - self._start)
            drop = cosine(ctx.options.drop, ctx.options.drop_end, progress)
            self._update(ctx, self.turn(ctx.step)[0], self._dense, drop)
            self._dense = None

    def _update(
        self, ctx: Context, index: int, gradients: list[Tensor] | None = None, drop: float = 0.0
    ) -> None:
        cocktail, pattern = ctx.cocktail, self._menu[index]
        ramp = self._progress(ctx.step) if ctx.step < self._end + len(self._menu) else None
        with ctx.timed("mask"):
            weights = [layer.weight.detach() for layer in cocktail.layers.values()]
            present = cocktail.masks(str(pattern))
            made = next_masks(weights, pattern, present, ramp, gradients, drop)
            cocktail.set_masks(str(pattern), made)
            check_ranks_agree(cocktail.bank, [cocktail.subnets[str(pattern)].row])

    # ---- end -------------------------------------------------------------------------------------

    def after_stage(self, ctx: Context) -> None:
        closed = {self.turn(step)[0] for step in range(self._end, ctx.step)}
        for index, pattern in enumerate(self._menu):
            if index not in closed and not isinstance(pattern, FIXED):
                self._update(ctx, index)  # the ramp ends with the run
        self.state = self.State()

    def report(self, ctx: Context) -> list[str]:
        return [str(pattern) for pattern in ctx.options.networks()]

    def weight_sets(self, ctx: Context) -> dict[str, list[str]]:
        return {"": self.report(ctx)}


def without_conflict(gradient: Tensor, previous: Tensor) -> Tensor:
    """The gradient without its part along `previous` where the two point against each other.

    Args:
        gradient, previous: of one layer, of one shape.

    Returns:
        gradient - <gradient, previous> / |previous|^2 * previous where the product is negative (the
        paper's gradient correction; PCGrad, Yu et al., NeurIPS 2020), else the gradient.
    """
    product = (gradient * previous).sum()
    share = torch.where(product < 0, product / previous.square().sum(), 0.0)
    return gradient - share * previous
