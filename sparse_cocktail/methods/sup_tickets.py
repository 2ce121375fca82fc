"""Sup-tickets: superpose cheap tickets of one sparse training run (Yin et al., UAI 2022)."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from .. import ops
from ..averaging import superpose
from ..patterns import Pattern, Unstructured
from ..recalibrate import recalibrate
from ..schedules import triangular
from ..selection import check_ranks_agree
from .base import Context, Pass, Stage, option
from .dynamic import SET, explore
from .menu import MenuOptions
from .separate import Separate
from .updates import zero_pruned

__all__ = ["Cycles", "SupTickets", "SupTicketsOptions"]

_CHOICES = {"prune_scope": ("global", "layerwise"), "average": ("mean", "moving")}
MOVING_SHARE = 0.5  # of the newest ticket in the paper's moving average ("CIMA")

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Cycles:
    """How a network's epochs are split: `pretrain`, then `count` cycles of `length` epochs."""

    pretrain: int
    count: int
    length: int

    @classmethod
    def split(cls, epochs: int, share: float, length: float) -> Cycles:
        """As many whole cycles as fit into a share of the epochs; one, where only the run has room.

        Args:
            epochs: of the network.
            share: of them for all cycles together.
            length: of a cycle: epochs (int) or share of the network's (float), at least one epoch.
        """
        length = length if isinstance(length, int) else max(1, round(length * epochs))
        count = math.floor(epochs * share / length + 1e-9) or int(length < epochs)
        return cls(epochs - count * length, count, length)

    def ticket(self, epoch: int) -> int | None:
        """Number of the ticket, from 1, that an epoch completes; 0: the end of pre-training."""
        since = epoch + 1 - self.pretrain
        return since // self.length if since >= 0 and since % self.length == 0 else None

    def starts(self, step: int, per_epoch: int) -> bool:
        """Whether a step of the network is the first one of a cycle."""
        since = step - self.pretrain * per_epoch
        return since >= 0 and since % (self.length * per_epoch) == 0

    def lr(self, step: int, per_epoch: int, low: float, high: float) -> float:
        """Learning rate of a step in the cycles: low, high, low; a cycle's last step has `low`."""
        length = self.length * per_epoch
        since = step - self.pretrain * per_epoch
        return triangular(low, high, (since % length + 1) / length)


@dataclass
class SupTicketsOptions(MenuOptions):
    """Recipe fields of Sup-tickets."""

    base: str = option(
        "rigl", "method that trains a network first: set, rigl, granet, gmp or another of its kind"
    )
    base_options: dict = option({}, 'fields of that method, as JSON: {"drop": 0.3}')
    lr_schedule: str = option(
        "steps", "cosine from lr to min_lr, or steps: a tenth at 50 % and 75 % of a network"
    )
    cyclic_share: float = option(0.1, "share of a network's epochs for the cycles")
    ticket_cycle: float = option(
        0.032, "a cycle, which gives one ticket: epochs (int) or share of a network's (float)"
    )
    ticket_low_lr: float = option(0.001, "learning rate at a cycle's start and end")
    ticket_high_lr: float = option(0.005, "learning rate in its middle")
    ticket_drop: float = option(
        0.5, "share of every layer's weights that are replaced when a cycle starts"
    )
    prune_scope: str = option(
        "global", "weights compete when the average is pruned: global, or layerwise"
    )
    average: str = option("mean", "of all tickets, or moving: every new one counts half")

    def check(self) -> None:
        """Raise ValueError for fields out of range."""
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"sup-tickets: {name}={value!r} is not one of {allowed}")
        for name in ("cyclic_share", "ticket_drop"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"sup-tickets: {name}={value} is not in [0, 1]; give a share")
        for name in ("ticket_low_lr", "ticket_high_lr"):
            if not (value := getattr(self, name)) >= 0:
                raise ValueError(f"sup-tickets: {name}={value} is not 0 or more")
        if not self.ticket_cycle > 0:
            raise ValueError(f"sup-tickets: ticket_cycle={self.ticket_cycle} is not positive")

    def base_method(self) -> tuple[type[Separate], Any]:
        """The class of the base and its options: `base_options`, and fields that it has too."""
        from . import METHODS  # which holds this method, too

        kind = METHODS.get(self.base)
        if kind is None or not issubclass(kind, Separate) or issubclass(kind, SupTickets):
            fit = [n for n, m in METHODS.items() if issubclass(m, Separate) and m is not SupTickets]
            raise ValueError(f"sup-tickets: base={self.base!r} is not one of {', '.join(fit)}")
        known = [f.name for f in dataclasses.fields(kind.Options)]
        if unknown := sorted(set(self.base_options) - set(known)):
            raise ValueError(
                f"sup-tickets: base_options has {unknown[0]!r}, which {self.base} does not know; "
                f"its fields are {', '.join(known)}"
            )
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in known}
        return kind, kind.Options(**{**own, **self.base_options})


class SupTickets(Separate):
    """A base method trains each network; then short cycles give tickets that are averaged.

    A cycle starts with one large change of the mask, which is then left alone, and its learning
    rate goes up and down again. At the low point at its end the weights join a running mean that
    starts from the end of pre-training; the mean is pruned to the density of the network, and its
    BatchNorm statistics are estimated anew. Training goes on from the weights as they were. The
    last mean is what the method leaves.

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
            ctx.say(f"sup-tickets: epochs={epochs} has no room for a cycle, so nothing is averaged")
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

    def _explores(self, ctx: Context, pattern: Pattern) -> bool:
        starts = self.cycles.starts(ctx.step, ctx.steps_per_epoch)
        return starts and isinstance(pattern, Unstructured)

    def after_pass(self, ctx: Context) -> None:
        if self._pretrains(ctx):
            self.base.after_pass(self._as_base(ctx))

    def before_step(self, ctx: Context) -> None:
        if self._pretrains(ctx):
            self.base.before_step(self._as_base(ctx))

    def after_step(self, ctx: Context) -> None:
        if self._pretrains(ctx):
            self.base.after_step(self._as_base(ctx))
            return
        pattern, _, _ = self.present(ctx)
        zero_pruned(ctx, str(pattern))
        if self._explores(ctx, pattern):
            explore(ctx, str(pattern), ctx.options.ticket_drop, self.random)

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
            self._measure(ctx, name, number)
            ctx.save_weights(self._file(ctx, number))
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
        check_ranks_agree(ctx.cocktail.bank.digest(ctx.cocktail.subnet(name).row))

    def _measure(self, ctx: Context, name: str, number: int) -> None:
        """Estimate the mean's BatchNorm statistics, in the model, and its hold-out accuracy."""
        with ctx.timed("evaluate"), ctx.cocktail.using(name):
            if batches := ctx.calibration():
                recalibrate(ctx.model, batches)
                ctx.count("forward", sum(map(len, batches)))
            accuracy = ctx.accuracy("holdout")
        ctx.log("superpose", subnet=name, ticket=number, holdout=accuracy)
        self.state.tickets.append({"subnet": name, "ticket": number, "holdout": accuracy})
