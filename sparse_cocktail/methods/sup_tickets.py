"""Sup-tickets: superpose cheap tickets of one sparse training run (Yin et al., UAI 2022)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from .. import ops
from ..averaging import superpose
from ..patterns import Pattern, Unstructured
from ..recalibrate import recalibrate
from ..selection import check_ranks_agree
from .base import Context, Pass, Stage
from .dynamic import SET, explore, growth
from .separate import Separate
from .sup_tickets_options import Cycles, SupTicketsOptions
from .updates import zero_pruned

__all__ = ["SupTickets"]

MOVING_SHARE = 0.5  # of the newest ticket in the paper's moving average ("CIMA")

Weights = dict[str, Tensor]


class SupTickets(Separate):
    """A base method trains each network; then short cycles give tickets that are averaged.

    A cycle starts with one large change of the mask, which is then left alone, and its learning
    rate goes up and down again. At the low point at its end the weights join a running mean that
    starts from the end of pre-training; the mean is pruned to the density of the network, and its
    BatchNorm statistics are estimated anew. Training goes on from the weights as they were. The
    last mean is what the method leaves. The forwards for these statistics come on top of `cost`.

    Any method fits that trains every network in one stage. Masks of other patterns than
    unstructured stay as the base left them, the mean's too.
    """

    Options = SupTicketsOptions

    @dataclass
    class State:
        base: Any = None  # of the base method
        tickets: list = field(default_factory=list)  # hold-out accuracy of every mean, as dicts

    # ---- the base's part -------------------------------------------------------------------------

    def plan(self, ctx: Context) -> list[Stage]:
        o, epochs = ctx.options, ctx.config.epochs
        o.check()
        kind, options = o.base_method()
        self.cycles = Cycles.split(epochs, o.cyclic_share, o.ticket_cycle)
        if not self.cycles.count:
            ctx.say(
                f"sup-tickets: epochs={epochs} has no room for a cycle (cyclic_share="
                f"{o.cyclic_share}, ticket_cycle={o.ticket_cycle}), so nothing is averaged"
            )
        self.base, self.random = kind(), issubclass(kind, SET) and kind.RANDOM
        self._inner = {
            "config": dataclasses.replace(ctx.config, epochs=self.cycles.pretrain),
            "options": options,
            "stages": [],
        }
        self.state.base = self.base.state
        stages = self._inner["stages"] = self.base.plan(self._as_base(ctx))
        if len(stages) != len(o.menu()):
            raise ValueError(
                f"sup-tickets: base={o.base!r} trains a network in several stages; take one that "
                "trains it in one, such as rigl"
            )
        self._parts = self.base._parts
        return [
            dataclasses.replace(s, epochs=epochs, lr=partial(self._lr, ctx, s.lr)) for s in stages
        ]

    @classmethod
    def cost(cls, options: SupTicketsOptions, epochs: int) -> float:
        kind, own = options.base_method()
        cycles = Cycles.split(epochs, options.cyclic_share, options.ticket_cycle)
        cyclic = cycles.count * cycles.length * len(options.menu())
        return kind.cost(own, cycles.pretrain) + cyclic

    def _as_base(self, ctx: Context) -> Context:
        """What the base sees: the same run, which for it ends with pre-training."""
        inner = copy.copy(ctx)
        vars(inner).update(self._inner)
        return inner

    def _lr(self, ctx: Context, before: Callable[[int], float], step: int) -> float:
        o, per_epoch = ctx.options, ctx.steps_per_epoch
        if step < self.cycles.pretrain * per_epoch:
            return before(step)
        return self.cycles.lr(step, per_epoch, o.ticket_low_lr, o.ticket_high_lr)

    def _pretrains(self, ctx: Context) -> bool:
        return ctx.epoch < self.cycles.pretrain

    # ---- steps -----------------------------------------------------------------------------------

    def before_stage(self, ctx: Context) -> None:
        self.base.before_stage(self._as_base(ctx))

    def step(self, ctx: Context) -> list[Pass]:
        if self._pretrains(ctx):
            return self.base.step(self._as_base(ctx))
        pattern, _, _ = self.present(ctx)
        return [Pass(str(pattern), dense_grad=self._explores(ctx, pattern) and not self.random)]

    def _starts(self, ctx: Context) -> bool:
        return self.cycles.starts(ctx.step, ctx.steps_per_epoch)

    def _explores(self, ctx: Context, pattern: Pattern) -> bool:
        return self._starts(ctx) and isinstance(pattern, Unstructured)

    def after_pass(self, ctx: Context) -> None:
        if self._pretrains(ctx):
            self.base.after_pass(self._as_base(ctx))

    def before_step(self, ctx: Context) -> None:
        if self._pretrains(ctx):
            self.base.before_step(self._as_base(ctx))
        elif self._explores(ctx, self.present(ctx)[0]):
            self._growth = growth(ctx, self.random)

    def after_step(self, ctx: Context) -> None:
        if self._pretrains(ctx):
            self.base.after_step(self._as_base(ctx))
            return
        pattern, _, _ = self.present(ctx)
        if self._starts(ctx) or ctx.config.mask_update == "shared":  # else they stay zero
            zero_pruned(ctx, str(pattern))
        if self._explores(ctx, pattern):
            explore(ctx, str(pattern), ctx.options.ticket_drop, self._growth)
            self._growth = None

    # ---- tickets ---------------------------------------------------------------------------------

    def after_epoch(self, ctx: Context) -> None:
        if self._pretrains(ctx):
            self.base.after_epoch(self._as_base(ctx))
        ticket = self.cycles.ticket(ctx.epoch)
        if ticket == 0:
            self.base.after_stage(self._as_base(ctx))
            ctx.save_weights(self._file(ctx, 0))
        elif ticket is not None:
            self._superpose(ctx, ticket)

    def _file(self, ctx: Context, number: int) -> str:
        """The mean after a ticket. Each has its own file, so that a resumed run may repeat one."""
        return f"pool/{self.present(ctx)[0]}-mean-{number:02d}.safetensors"

    def _superpose(self, ctx: Context, number: int) -> None:
        """Fold the present weights into the mean; only the last mean stays in the model."""
        cocktail, name = ctx.cocktail, str(self.present(ctx)[0])
        share = MOVING_SHARE if ctx.options.average == "moving" else None
        kept: list[Tensor] = []

        def pruned(state: Weights) -> Weights:
            names = [f"{layer}.weight" for layer in cocktail.layers]
            kept[:] = self._keep(ctx, masks, [state[n] for n in names])
            pairs = zip(names, kept, strict=True)
            return state | {n: ops.masked_weight(state[n], bits) for n, bits in pairs}

        with ctx.timed("superpose"):
            masks = [bits.clone() for bits in cocktail.masks(name)]
            ticket = {k: tensor.clone() for k, tensor in ctx.weights().items()}
            average = ctx.read_weights(self._file(ctx, number - 1))
            self._load(ctx, superpose(average, ticket, number, pruned, share), name, kept)
            if batches := ctx.calibration():
                with cocktail.using(name):
                    recalibrate(ctx.model, batches)
                ctx.count("forward", sum(map(len, batches)))
            ctx.save_weights(self._file(ctx, number))
        with ctx.timed("evaluate"), cocktail.using(name):
            accuracy = ctx.accuracy("holdout")
        ctx.log("superpose", subnet=name, ticket=number, holdout=accuracy)
        self.state.tickets.append({"subnet": name, "ticket": number, "holdout": accuracy})
        if number < self.cycles.count:
            self._load(ctx, ticket, name, masks)

    def _keep(self, ctx: Context, masks: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        """Bits of the mean: its largest weights, as many as the network has in its `masks`."""
        pattern, _, _ = self.present(ctx)
        if not isinstance(pattern, Unstructured):
            return masks  # those of all tickets
        counts = [int(ops.mask_count(bits)) for bits in masks]
        keep = counts if ctx.options.prune_scope == "layerwise" else sum(counts)
        return ops.topk_masks(weights, keep)

    def _load(self, ctx: Context, weights: Weights, name: str, masks: list[Tensor]) -> None:
        """Give the model these weights, and the subnet these masks."""
        ctx.cocktail.activate("dense")
        ctx.model.load_state_dict(weights)
        ctx.cocktail.set_masks(name, masks)
        check_ranks_agree(ctx.cocktail.bank, [ctx.cocktail.subnet(name).row])
