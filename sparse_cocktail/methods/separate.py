"""Methods that train one network per pattern, each from the same initial weights."""

from __future__ import annotations

from dataclasses import replace

from ..patterns import Pattern
from .base import Context, Method, Stage
from .menu import MenuOptions

__all__ = ["Separate"]

INITIAL = "initial.safetensors"


class Separate(Method):
    """One network per pattern of the menu, a run of stages each; `epochs` counts for one network.

    A subclass says what a network's stages are and puts its pattern on the menu in `before_stage`,
    where `present` tells which one is being trained.
    """

    Options = MenuOptions

    # ---- to override -----------------------------------------------------------------------------

    def network_stages(self, ctx: Context, pattern: Pattern) -> list[Stage]:
        """The stages of one network: one, whose learning rate falls."""
        epochs = ctx.config.epochs
        lr = ctx.options.learning_rate(ctx.config.lr, epochs * ctx.steps_per_epoch)
        return [Stage("train", epochs, lr)]

    @classmethod
    def network_cost(cls, options: MenuOptions, epochs: int) -> float:
        """`cost` of one network."""
        return float(epochs)

    # ---- what follows from it --------------------------------------------------------------------

    @classmethod
    def cost(cls, options: MenuOptions, epochs: int) -> float:
        return len(options.menu()) * cls.network_cost(options, epochs)

    def plan(self, ctx: Context) -> list[Stage]:
        self._parts: list[tuple[Pattern, int, bool]] = []  # of every stage: see `present`
        stages = []
        for pattern in ctx.options.menu():
            some = self.network_stages(ctx, pattern)
            for part, stage in enumerate(some):
                start = INITIAL if part == 0 and stages else stage.start_from
                stages.append(replace(stage, name=f"{pattern} {stage.name}", start_from=start))
                self._parts.append((pattern, part, part == len(some) - 1))
        return stages

    def present(self, ctx: Context) -> tuple[Pattern, int, bool]:
        """What the present stage trains: the pattern, which of its stages, whether the last."""
        return self._parts[ctx.stage]

    def before_stage(self, ctx: Context) -> None:
        if ctx.stage == 0:
            ctx.save_weights(INITIAL)

    def after_stage(self, ctx: Context) -> None:
        pattern, _, last = self.present(ctx)
        if last:
            ctx.save_weights(f"pool/{pattern}.safetensors")

    def report(self, ctx: Context) -> list[str]:
        return [str(self.present(ctx)[0])]

    def weight_sets(self, ctx: Context) -> dict[str, list[str]]:
        return {f"pool/{pattern}.safetensors": [str(pattern)] for pattern in ctx.options.menu()}
