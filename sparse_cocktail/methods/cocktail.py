"""Sparse Cocktail: co-train a dense network and every pattern and ratio (Li et al., ICML 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from ..averaging import ALPHAS, greedy_interpolation
from ..patterns import parse
from ..schedules import cosine, cyclic_cosine, keep_count, length_in_steps
from ..selection import check_ranks_agree, eligible, unified_stage
from .base import Context, Method, Pass, Stage
from .cocktail_options import PAPER, PARITY, CocktailOptions
from .consolidation import draw_subnets

__all__ = ["SparseCocktail"]

REWIND = "rewind.safetensors"
INTERPOLATED = "interpolated.safetensors"


def pool_file(stage: int) -> str:
    """Where the trained weights of a stage lie in the run's folder."""
    return f"pool/stage-{stage:02d}.safetensors"


class SparseCocktail(Method):
    """Iterative pruning with rewinding, dense-pivot co-training, interpolation, consolidation."""

    Options = CocktailOptions
    PRESETS = {"paper": PAPER, "parity": PARITY}

    @dataclass
    class State:
        nm_now: str | None = None  # the N:M subnet in force
        choices: list = field(default_factory=list)  # of the interpolation, as dicts

    # ---- stages ----------------------------------------------------------------------------------

    def plan(self, ctx: Context) -> list[Stage]:
        o, config = ctx.options, ctx.config
        o.check(config.epochs)
        self._report_ineligible(ctx)
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
        start = REWIND if o.rewind else None
        stages = [Stage("dense", config.epochs, lr)]
        stages += [Stage(f"stage {k}", config.epochs, lr, start) for k in range(1, o.stages + 1)]
        if o.consolidate:
            epochs = max(1, round(o.consolidate * config.epochs))
            steps = epochs * ctx.steps_per_epoch
            peak = o.consolidate_lr * config.lr
            stages.append(Stage("consolidate", epochs, lambda t: cosine(peak, o.min_lr, t / steps)))
        return stages

    @classmethod
    def cost(cls, options: CocktailOptions, epochs: int) -> float:
        teacher = 1 / 3 if options.distill and not options.pair_batches else 0.0
        sparse = 1 / 2 if options.dense_pivot else 3 / 4  # of the steps
        stages = epochs + options.stages * epochs * (1.0 + sparse * teacher)
        if not options.consolidate:
            return stages
        rounds = max(1, round(options.consolidate * epochs))
        return stages + rounds * (1 + options.consolidate_subnets)

    def _report_ineligible(self, ctx: Context) -> None:
        """Log what the N:M patterns leave dense, before the first step."""
        for name, stage in ctx.options.nm.items():
            if stage > ctx.options.stages:
                ctx.log("not_made", pattern=name, reason=f"stage {stage} is beyond the last")
                ctx.say(f"{name} is not made: its stage {stage} is beyond the last, see --nm")
                continue
            for layer, module in ctx.cocktail.layers.items():
                if reason := eligible(module.weight.shape, parse(name)):
                    ctx.log("left_dense", pattern=name, layer=layer, reason=reason)

    def before_stage(self, ctx: Context) -> None:
        if 1 <= ctx.stage <= ctx.options.stages:
            with ctx.timed("mask"):
                self._make_masks(ctx, ctx.stage)

    def _make_masks(self, ctx: Context, k: int) -> None:
        """P_k: the masks of stage k from the weights that the stage before trained."""
        o, cocktail = ctx.options, ctx.cocktail
        unstructured, channel = o.patterns(k)
        new_nm = next((parse(name) for name, stage in o.nm.items() if stage == k), None)
        previous = [str(p) for p in o.patterns(k - 1)] if k > 1 else None
        rows = {name: subnet.row for name, subnet in cocktail.subnets.items()}
        last_u, last_c = (rows[name] for name in previous) if previous else (None, None)
        keep, channel_keep = self._counts(ctx, k, last_u, last_c)
        u, c, n = unified_stage(
            cocktail.bank,
            keep,
            channel_keep,
            new_nm,
            o.beta,
            within=last_u,
            nm_from=rows[self.state.nm_now] if self.state.nm_now else None,
            channels_within=last_c if o.nested_channels else None,
            unified=o.umg,
        )
        cocktail.add(unstructured, u, stage=k)
        cocktail.add(channel, c, stage=k)
        if new_nm is not None:
            self.state.nm_now = cocktail.add(new_nm, n, stage=k).name
        check_ranks_agree(cocktail.bank)

    def _counts(
        self, ctx: Context, k: int, last_u: int | None, last_c: int | None
    ) -> tuple[int, list[int]]:
        """Weights to keep over all layers, and channels to keep in each."""
        o, bank, outputs = ctx.options, ctx.cocktail.bank, ctx.cocktail.outputs
        widths = [w.shape[0] for w in bank.weights]
        if o.counts == "exact":
            densities = [pattern.density for pattern in o.patterns(k)]
            keep = keep_count(densities[0], bank.numel)
            channels = [keep_count(densities[1], width) for width in widths]
        else:  # the next step from what the last one left; "above the k-th" leaves k - 1
            left = [1.0 if r is None else bank.count(r) / bank.numel for r in (last_u, last_c)]
            left_u, left_c = left[0] * (1 - o.prune_unstructured), left[1] * (1 - o.prune_channel)
            keep = max(1, int(bank.numel * left_u) - 1)
            channels = [max(1, int(width * left_c) - 1) for width in widths]
        for i in outputs:
            channels[i] = widths[i]
        return keep, channels

    # ---- steps -----------------------------------------------------------------------------------

    def step(self, ctx: Context) -> list[Pass]:
        o, turn = ctx.options, ctx.step_in_epoch
        if ctx.stage == 0:
            return [Pass("dense")]
        if ctx.stage > o.stages:
            return self._consolidation_step(ctx)
        unstructured, channel = map(str, o.patterns(ctx.stage))
        # before the first N:M mask its turn is the dense network's: 1:1
        order = (unstructured, channel, self.state.nm_now or "dense")
        if not o.dense_pivot:
            name = ("dense", *order)[turn % 4]
            return [Pass(name, teacher="dense" if o.distill and turn % 4 else None)]
        if turn % 2 == 0:
            return [Pass("dense", keep=o.pair_batches)]  # the pivot
        teacher = ("previous" if o.pair_batches else "dense") if o.distill else None
        return [Pass(order[(turn - 1) // 2 % 3], teacher=teacher)]

    def _consolidation_step(self, ctx: Context) -> list[Pass]:
        """The pivot and some subnets of any stage and pattern, taught by the pivot's logits."""
        o = ctx.options
        teacher = 0 if o.distill else None
        drawn = draw_subnets(ctx, o.consolidate_subnets, o.consolidate_draw)
        return [Pass("dense"), *(Pass(n, o.consolidate_weight, teacher) for n in drawn)]

    def after_epoch(self, ctx: Context) -> None:
        if ctx.stage == 0 and ctx.epoch + 1 == ctx.options.rewind:
            ctx.save_weights(REWIND)

    # ---- after the stages ------------------------------------------------------------------------

    def after_stage(self, ctx: Context) -> None:
        if ctx.stage <= ctx.options.stages:
            ctx.save_weights(pool_file(ctx.stage))
        if ctx.stage == ctx.options.stages and ctx.options.interpolation:
            with ctx.timed("interpolate"):
                self._interpolate(ctx)

    def _interpolate(self, ctx: Context) -> None:
        """Fold the weights of stages 1..N into one set that serves every subnet."""
        o, cocktail = ctx.options, ctx.cocktail
        calibration = ctx.calibration(o.search_samples) if o.search_samples else []

        candidates = (o.stages - 1) * (len(ALPHAS) if o.abandon else len(ALPHAS) - 1)
        scored = 0

        def score(state, stage: int) -> float:
            nonlocal scored
            ctx.progress("interpolate", scored, candidates)
            scored += 1
            ctx.model.load_state_dict(state)
            found = [n for n, s in cocktail.subnets.items() if (s.stage or 0) <= stage]
            return self._objective(o, stage, ctx.measure(found, "holdout", calibration))

        cocktail.activate("dense")
        pool = ((k, ctx.read_weights(pool_file(k))) for k in range(1, o.stages + 1))
        state, choices = greedy_interpolation(pool, score, ALPHAS, o.abandon)
        self.state.choices = [vars(choice) for choice in choices]
        for choice in choices:
            ctx.log("interpolate", stage=choice.stage, alpha=choice.alpha, score=choice.score)
        ctx.model.load_state_dict(state)
        ctx.save_weights(INTERPOLATED)

    def _objective(self, o: CocktailOptions, stage: int, scores: dict[str, float]) -> float:
        """Mean over the distinct subnets; or over stages, each with dense and its three subnets."""
        if o.objective == "distinct":
            weights = {name: o.dense_weight if name == "dense" else 1.0 for name in scores}
            return sum(weights[n] * s for n, s in scores.items()) / sum(weights.values())
        total = 0.0
        for k in range(1, stage + 1):
            names = ["dense", *map(str, o.patterns(k)), o.nm_at(k)]  # no N:M yet: counts as 0
            total += sum(scores[name] for name in names if name) / 4
        return total / stage

    def finish(self, ctx: Context) -> dict[str, dict[str, float]]:
        cocktail, scores = ctx.cocktail, {name: {} for name in ctx.cocktail.subnets}
        cocktail.activate("dense")
        final = {k: v.clone() for k, v in ctx.weights().items()}
        for k in range(ctx.options.stages + 1):
            ctx.model.load_state_dict(ctx.read_weights(pool_file(k)))
            own = [name for name, subnet in cocktail.subnets.items() if (subnet.stage or 0) == k]
            for name, accuracy in ctx.measure(own, "test").items():
                scores[name]["accuracy_own"] = accuracy
        if ctx.options.interpolation:
            ctx.model.load_state_dict(ctx.read_weights(INTERPOLATED))
            for name, accuracy in ctx.measure(list(scores), "test").items():
                scores[name]["accuracy_interpolated"] = accuracy
        ctx.model.load_state_dict(final)
        for name, accuracy in self.final_accuracies(ctx, list(scores)).items():
            scores[name]["accuracy"] = accuracy
        return scores
