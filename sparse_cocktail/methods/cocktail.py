"""Sparse Cocktail: co-train a dense network and every pattern and ratio (Li et al., ICML 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from ..averaging import ALPHAS, greedy_interpolation
from ..patterns import NM, Channel, Unstructured, parse
from ..schedules import cosine, cyclic_cosine, geometric_density, length_in_steps
from ..selection import check_ranks_agree, eligible, unified_stage
from .base import Context, Method, Pass, Stage

__all__ = ["SparseCocktail"]

REWIND = "rewind.safetensors"
INTERPOLATED = "interpolated.safetensors"


def pool_file(stage: int) -> str:
    """Where the trained weights of a stage lie in the run's folder."""
    return f"pool/stage-{stage:02d}.safetensors"


class SparseCocktail(Method):
    """Iterative pruning with rewinding, dense-pivot co-training, interpolation, consolidation."""

    @dataclass
    class Options:
        stages: int = field(default=10, metadata={"help": "pruning stages after the dense one"})
        prune_unstructured: float = field(
            default=0.2, metadata={"help": "share of the remaining weights removed per stage"}
        )
        prune_channel: float = field(
            default=0.1, metadata={"help": "share of the remaining channels removed per stage"}
        )
        nm: dict = field(
            default_factory=lambda: {"1:2": 2, "2:4": 5, "4:8": 8},
            metadata={"help": "N:M patterns and the stage that makes each"},
        )
        beta: float = field(
            default=0.8, metadata={"help": "share of the unstructured mask in channel scores"}
        )
        nested_channels: bool = field(
            default=False, metadata={"help": "choose channels among the previous stage's only"}
        )
        rewind: int = field(
            default=1, metadata={"help": "completed epochs of stage 0 that stages rewind to"}
        )
        first_cycle: float = field(
            default=2 / 3, metadata={"help": "first cosine: epochs (int) or share of a stage"}
        )
        cycle: float = field(
            default=1 / 6, metadata={"help": "cosine restarts: epochs (int) or share of a stage"}
        )
        restart_lr: float = field(default=0.01, metadata={"help": "learning rate of restarts"})
        min_lr: float = field(default=0.001, metadata={"help": "learning rate at a cycle's end"})
        search_samples: int = field(
            default=256,
            metadata={"help": "samples to recalibrate BatchNorm in the search (0: mix statistics)"},
        )
        consolidate: float = field(
            default=1.0,
            metadata={"help": "train all subnets together at the end: share of a stage (0: off)"},
        )
        consolidate_lr: float = field(
            default=0.5, metadata={"help": "its initial learning rate, as a share of lr"}
        )

    @dataclass
    class State:
        nm_now: str | None = None  # the N:M subnet in force
        choices: list = field(default_factory=list)  # of the interpolation, as dicts

    # ---- stages ----------------------------------------------------------------------------------

    def plan(self, ctx: Context) -> list[Stage]:
        o, config = ctx.options, ctx.config
        self._check(ctx)
        lengths = (o.first_cycle, o.cycle)
        first, cycle = (length_in_steps(x, config.epochs, ctx.steps_per_epoch) for x in lengths)
        lr = partial(
            cyclic_cosine,
            first=first,
            cycle=cycle,
            lr=config.lr,
            restart_lr=o.restart_lr,
            min_lr=o.min_lr,
        )
        stages = [Stage("dense", config.epochs, lr)]
        stages += [Stage(f"stage {k}", config.epochs, lr, REWIND) for k in range(1, o.stages + 1)]
        if o.consolidate:
            epochs = max(1, round(o.consolidate * config.epochs))
            steps = epochs * ctx.steps_per_epoch
            start = o.consolidate_lr * config.lr
            stages.append(
                Stage("consolidate", epochs, lambda t: cosine(start, o.min_lr, t / steps))
            )
        return stages

    def _check(self, ctx: Context) -> None:
        o = ctx.options
        if o.stages < 1:
            raise ValueError(f"cocktail: stages={o.stages} is below 1; 10 is the paper's number")
        if not 1 <= o.rewind <= ctx.config.epochs:
            raise ValueError(
                f"cocktail: rewind={o.rewind} is not in [1, epochs={ctx.config.epochs}]; it counts "
                "completed epochs of stage 0"
            )
        for name in ("prune_unstructured", "prune_channel"):
            if not 0.0 < getattr(o, name) < 1.0:
                raise ValueError(f"cocktail: {name}={getattr(o, name)} is not in (0, 1)")
        if not 0.0 <= o.beta <= 1.0:
            raise ValueError(f"cocktail: beta={o.beta} is not in [0, 1]; the paper uses 0.8")
        ladder = [str(p) for k in range(1, o.stages + 1) for p in self._patterns(o, k)]
        if len(set(ladder)) < len(ladder):
            raise ValueError(
                f"cocktail: stages={o.stages} gives two subnets the same name (four decimals); use "
                "fewer stages or smaller shares"
            )
        made_at = list(o.nm.values())
        if any(type(stage) is not int or stage < 1 for stage in made_at) or len(set(made_at)) < len(
            made_at
        ):
            raise ValueError(
                f"cocktail: nm={o.nm} must give every pattern a stage of its own, a whole number "
                'from 1 on, as in {"1:2": 2, "2:4": 5}'
            )
        for name, stage in o.nm.items():
            pattern = parse(name)
            if not isinstance(pattern, NM):
                raise ValueError(f"cocktail: nm has {name!r}, which is no N:M pattern such as 2:4")
            if stage > o.stages:
                ctx.log("not_made", pattern=name, reason=f"stage {stage} is beyond the last")
                continue
            for layer, module in ctx.cocktail.layers.items():
                if reason := eligible(module.weight.shape, pattern):
                    ctx.log("left_dense", pattern=name, layer=layer, reason=reason)

    def before_stage(self, ctx: Context) -> None:
        if 1 <= ctx.stage <= ctx.options.stages:
            with ctx.timed("mask"):
                self._make_masks(ctx, ctx.stage)

    def _make_masks(self, ctx: Context, k: int) -> None:
        """P_k: the masks of stage k from the weights that the stage before trained."""
        o, cocktail = ctx.options, ctx.cocktail
        unstructured, channel = self._patterns(o, k)
        new_nm = next((parse(name) for name, stage in o.nm.items() if stage == k), None)
        previous = [str(p) for p in self._patterns(o, k - 1)] if k > 1 else None
        rows = {name: subnet.row for name, subnet in cocktail.subnets.items()}
        u, c, n = unified_stage(
            cocktail.bank,
            unstructured,
            channel,
            new_nm,
            o.beta,
            within=rows[previous[0]] if previous else None,
            nm_from=rows[self.state.nm_now] if self.state.nm_now else None,
            nested_channels_from=rows[previous[1]] if previous and o.nested_channels else None,
            outputs=cocktail.outputs,
        )
        cocktail.add(unstructured, u, stage=k)
        cocktail.add(channel, c, stage=k)
        if new_nm is not None:
            self.state.nm_now = cocktail.add(new_nm, n, stage=k).name
        check_ranks_agree("".join(cocktail.bank.digest(i) for i in range(len(cocktail.bank))))

    @staticmethod
    def _patterns(o: SparseCocktail.Options, k: int) -> tuple[Unstructured, Channel]:
        return (
            Unstructured(1.0 - geometric_density(o.prune_unstructured, k)),
            Channel(1.0 - geometric_density(o.prune_channel, k)),
        )

    # ---- steps -----------------------------------------------------------------------------------

    def step(self, ctx: Context) -> list[Pass]:
        if ctx.stage == 0:
            return [Pass("dense")]
        if ctx.stage > ctx.options.stages:
            return self._consolidation_step(ctx)
        turn = ctx.step_in_epoch
        if turn % 2 == 0:
            return [Pass("dense")]  # the pivot
        unstructured, channel = map(str, self._patterns(ctx.options, ctx.stage))
        # before the first N:M mask its turn is the dense network's: 1:1
        order = (unstructured, channel, self.state.nm_now or "dense")
        return [Pass(order[(turn - 1) // 2 % 3], teacher="dense")]

    def _consolidation_step(self, ctx: Context) -> list[Pass]:
        """The pivot and two subnets of any stage and pattern, taught by the pivot's logits."""
        sparse = [name for name in ctx.cocktail.subnets if name != "dense"]
        drawn = torch.randperm(len(sparse), generator=ctx.generator())[:2].tolist()
        return [Pass("dense"), *(Pass(sparse[i], weight=0.5, teacher=0) for i in drawn)]

    def after_epoch(self, ctx: Context) -> None:
        if ctx.stage == 0 and ctx.epoch + 1 == ctx.options.rewind:
            ctx.save_weights(REWIND)

    # ---- after the stages ------------------------------------------------------------------------

    def after_stage(self, ctx: Context) -> None:
        if ctx.stage <= ctx.options.stages:
            ctx.save_weights(pool_file(ctx.stage))
        if ctx.stage == ctx.options.stages:
            with ctx.timed("interpolate"):
                self._interpolate(ctx)

    def _interpolate(self, ctx: Context) -> None:
        """Fold the weights of stages 1..N into one set that serves every subnet."""
        o, cocktail = ctx.options, ctx.cocktail
        calibration = ctx.calibration(o.search_samples) if o.search_samples else []

        def score(state, stage: int) -> float:
            ctx.model.load_state_dict(state)
            found = [n for n, s in cocktail.subnets.items() if (s.stage or 0) <= stage]
            scores = ctx.measure(found, "holdout", calibration)
            return sum(scores.values()) / len(scores)

        cocktail.activate("dense")
        pool = ((k, ctx.read_weights(pool_file(k))) for k in range(1, o.stages + 1))
        state, choices = greedy_interpolation(pool, score, ALPHAS)
        self.state.choices = [vars(choice) for choice in choices]
        for choice in choices:
            ctx.log("interpolate", stage=choice.stage, alpha=choice.alpha, score=choice.score)
        ctx.model.load_state_dict(state)
        ctx.save_weights(INTERPOLATED)

    def finish(self, ctx: Context) -> dict[str, dict[str, float]]:
        cocktail, scores = ctx.cocktail, {name: {} for name in ctx.cocktail.subnets}
        cocktail.activate("dense")
        final = {k: v.clone() for k, v in ctx.weights().items()}
        for k in range(ctx.options.stages + 1):
            ctx.model.load_state_dict(ctx.read_weights(pool_file(k)))
            own = [name for name, subnet in cocktail.subnets.items() if (subnet.stage or 0) == k]
            for name, accuracy in ctx.measure(own, "test").items():
                scores[name]["accuracy_own"] = accuracy
        ctx.model.load_state_dict(ctx.read_weights(INTERPOLATED))
        for name, accuracy in ctx.measure(list(scores), "test").items():
            scores[name]["accuracy_interpolated"] = accuracy
        ctx.model.load_state_dict(final)
        for name, accuracy in self.final_accuracies(ctx).items():
            scores[name]["accuracy"] = accuracy
        return scores
