"""What a training method is to the engine: stages, passes, hooks, and a state that can be saved.

A method subclasses `Method` and overrides what it needs. The engine (`engine.py`) owns optimizers,
schedules, rewinding, precision, checkpoints and logs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..cocktail import Cocktail
from ..data import Data, generator_for
from ..distributed import from_rank_0
from ..files import read_tensors, write_tensors
from ..modules import evaluating
from ..recalibrate import recalibrate
from ..tasks import Task

__all__ = ["Context", "Method", "Pass", "Stage", "check_choices", "check_range", "option"]


def option(default: Any, text: str) -> Any:
    """A recipe field with its help text, inside a dataclass."""
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def check_choices(method: str, options: Any, choices: dict[str, Sequence[str]]) -> None:
    """Raise ValueError for a recipe field, by name, whose value is not one of its choices."""
    for name, allowed in choices.items():
        if (value := getattr(options, name)) not in allowed:
            raise ValueError(f"{method}: {name}={value!r} is not one of {', '.join(allowed)}")


# Intervals of recipe fields, and the word for those without an end.
_WORDS = {"[0, inf)": "0 or more", "(0, inf)": "positive"}


def check_range(
    method: str, options: Any, interval: str, names: Iterable[str], remedy: str
) -> None:
    """Raise ValueError for a recipe field outside of its interval, or NaN.

    Args:
        method: name for the message.
        options: what has the fields.
        interval: "[0, 1]", "(0, 1)", "[0, inf)" and the like; a round bracket leaves the end out.
        names: of the fields.
        remedy: what to do, for the message.
    """
    low, high = map(float, interval[1:-1].split(","))
    for name in names:
        value = getattr(options, name)
        inside = low < value < high
        inside |= (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")
        if not inside:
            rule = _WORDS.get(interval, f"in {interval}")
            raise ValueError(f"{method}: {name}={value} is not {rule}; {remedy}")


@dataclass
class Stage:
    """One run of the loop with its own optimizer and schedule.

    Attributes:
        name: shown to the user.
        epochs: length.
        lr: learning rate as a function of the step within the stage.
        start_from: file in the run's folder whose weights are loaded first; None goes on with the
            present ones.
    """

    name: str
    epochs: int
    lr: Callable[[int], float]
    start_from: str | None = None


@dataclass
class Pass:
    """One forward and backward inside an optimizer step; gradients of a step's passes add up.

    Attributes:
        subnet: name of the subnet that computes.
        weight: factor of its loss.
        teacher: distil from "dense" (a forward without gradient in batch statistics), from an
            earlier pass of the same step, by index, or from "previous": the last pass of the step
            before, which had `keep` set, and whose batch is used again. The loss is then half
            task, half distillation.
        keep: keep batch and output for the next step.
        loss: replaces the loss; called as loss(output, target, teacher_output).
        transform: changes the input.
        dense_grad: give pruned weights their straight-through gradient. The recipe's `clip_norm`
            counts it: such a step is clipped by the norm of all gradients.
        weights: makes what the masked layers compute with instead of their own weights: one tensor
            per layer, in the order of `Cocktail.layers`. Gradients flow through them, and it is
            called anew for every part of a batch.
    """

    subnet: str
    weight: float = 1.0
    teacher: str | int | None = None
    keep: bool = False
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    dense_grad: bool = False
    weights: Callable[[], Sequence[Tensor]] | None = None


@dataclass
class Context:
    """What hooks see. `step`, `epoch`, `stage` are zero-based; `step` counts within the stage."""

    config: Any
    options: Any
    cocktail: Cocktail
    data: Data
    task: Task
    folder: Path
    device: torch.device
    network: nn.Module  # the model as trained: possibly compiled and distributed
    log: Callable[..., None]
    stages: list[Stage] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    stage: int = 0
    epoch: int = 0
    step: int = 0
    steps_per_epoch: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)  # see `count`
    doing: str = "train"
    say: Callable[[str], None] = lambda text: None  # one line for the user
    progress: Callable[[str, int, int], None] = lambda what, done, total: None  # of long work
    _said: set[str] = field(default_factory=set, repr=False)

    def say_once(self, text: str) -> None:
        """`say`, unless it was said before."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    @property
    def model(self) -> nn.Module:
        """The bare model."""
        return self.cocktail.model

    @property
    def step_in_epoch(self) -> int:
        return self.step - self.epoch * self.steps_per_epoch

    def generator(self) -> torch.Generator:
        """Random numbers that depend on the seed and the position in the run only."""
        return generator_for(self.config.seed, self.stage, self.step, 1)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds spent inside to `seconds[what]`."""
        start, before, self.doing = perf_counter(), self.doing, what
        try:
            yield
        finally:
            self.doing = before
            self.seconds[what] = self.seconds.get(what, 0.0) + perf_counter() - start

    def count(self, what: str, samples: int) -> None:
        """Count samples that went "forward" only or forward and "backward", by what is timed."""
        name = f"{self.doing} {what}"
        self.samples[name] = self.samples.get(name, 0) + samples

    # ---- weights in files of the run -------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """Everything but masks: parameters (the tensors themselves) and copies of the buffers."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        own = {id(p) for p in self.cocktail.own_parameters()}  # another subnet's come back below
        parameters = {name: p for name, p in parameters.items() if id(p) not in own}
        with self.cocktail.using("dense"):
            state = self.model.state_dict()
            return {k: v.detach() if k in parameters else v.clone() for k, v in state.items()}

    def check_finite(self, weights: dict[str, Tensor]) -> None:
        """Raise FloatingPointError when a weight or statistic is NaN or infinite."""
        for name, tensor in weights.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise FloatingPointError(
                    f"{name} is not finite at step {self.step} of stage {self.stage}; the files of "
                    f"{self.folder}, the last good checkpoint among them, are as they were: lower "
                    "lr, add warmup or clip_norm"
                )

    def save_weights(self, name: str, facts: dict[str, Any] | None = None) -> None:
        """Write the present weights to a file of the run's folder (rank 0; the others wait).

        Its header holds `facts`, which must be JSON-able.
        """
        weights = self.weights()
        self.check_finite(weights)
        if not dist.is_initialized() or dist.get_rank() == 0:
            write_tensors(self.folder / name, weights, facts or {})
        if dist.is_initialized():
            dist.barrier()

    def read_weights(self, name: str) -> dict[str, Tensor]:
        """Weights that `save_weights` wrote, on the run's device."""
        tensors, _ = read_tensors(self.folder / name)
        return {k: v.to(self.device) for k, v in tensors.items()}

    # ---- measuring subnets -----------------------------------------------------------------------

    def calibration(self, samples: int | None = None) -> list[Tensor]:
        """Batches for BatchNorm statistics; the config's number of samples by default.

        No batch at all (0 samples) stands for the statistics that the model holds.
        """
        samples = self.config.recalibrate_samples if samples is None else samples
        if samples == 0:
            return []
        return self.data.calibration(samples, max(self.config.batch_size, 256))

    @torch.no_grad()
    def accuracy(self, split: str) -> float:
        """Mean metric of the active subnet on "holdout" or "test", in percent.

        Every rank measures, and gets what rank 0 found: on its own BatchNorm statistics another
        rank may differ, and choices by these scores must be the same on all.
        """
        total, count = 0.0, 0
        with evaluating(self.model):
            for inputs, targets in getattr(self.data, split).batches(1024):
                score, samples = self.task.metric(self.model(inputs), targets)
                total, count = total + float(score), count + samples
                self.count("forward", len(inputs))
        return from_rank_0(100.0 * total / count, self.device)

    @torch.no_grad()
    def measure(
        self, names: list[str], split: str, calibration: list[Tensor] | None = None
    ) -> dict[str, float]:
        """Accuracy of subnets with the present weights, statistics recalibrated for each.

        The model's own statistics and its active subnet are as before afterwards. An empty
        `calibration` list measures with the statistics the model holds.
        """
        batches = self.calibration() if calibration is None else calibration
        cocktail, statistics = self.cocktail, {}
        totals, count = dict.fromkeys(names, 0.0), 0
        with cocktail.preserved_statistics(), evaluating(self.model):
            for name in names:
                cocktail.activate(name)
                if batches:
                    recalibrate(self.model, batches)
                    self.count("forward", sum(map(len, batches)))
                statistics[name] = [t.clone() for t in cocktail.statistics()]
            for inputs, targets in getattr(self.data, split).batches(1024):  # each loaded once
                for name in names:
                    cocktail.activate(name)
                    for mine, own in zip(cocktail.statistics(), statistics[name], strict=True):
                        mine.copy_(own)
                    score, samples = self.task.metric(self.model(inputs), targets)
                    totals[name] += float(score)
                    self.count("forward", len(inputs))
                count += samples
        return {n: from_rank_0(100.0 * t / count, self.device) for n, t in totals.items()}


class Method:
    """Base of all methods. `Options` are its recipe fields, `State` is what a resume needs."""

    # Fields by the name of a procedure, such as "paper": what `sparse-cocktail train --paper` sets.
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}

    @dataclass
    class Options:
        """Recipe fields of the method."""

    @dataclass
    class State:
        """Tree of dataclasses, dicts, lists, tensors, numbers and strings; saved in checkpoints."""

    def __init__(self) -> None:
        self.state = self.State()

    def plan(self, ctx: Context) -> list[Stage]:
        """The stages of the run."""
        raise TypeError(f"{type(self).__name__} must override plan(ctx)")

    def step(self, ctx: Context) -> list[Pass]:
        """The passes of the next optimizer step."""
        raise TypeError(f"{type(self).__name__} must override step(ctx)")

    def before_stage(self, ctx: Context) -> None:
        """Before the stage's weights are reset to `start_from`: the place to make masks."""

    def after_stage(self, ctx: Context) -> None:
        """After the last epoch of a stage: the place to collect weights."""

    def after_pass(self, ctx: Context) -> None:
        """After one pass's backward."""

    def before_step(self, ctx: Context) -> None:
        """With all gradients of the step, synchronised and unscaled."""

    def after_step(self, ctx: Context) -> None:
        """After the optimizer step."""

    def after_epoch(self, ctx: Context) -> None:
        """After an epoch; `ctx.epoch` is the epoch that ended."""

    def report(self, ctx: Context) -> list[str]:
        """What is measured on the hold-out part after a stage: dense, and the stage's subnets."""
        of_stage = [n for n, s in ctx.cocktail.subnets.items() if s.stage == ctx.stage]
        return ["dense", *(n for n in of_stage if n != "dense")]

    # ---- what a run leaves -----------------------------------------------------------------------

    @classmethod
    def cost(cls, options: Any, epochs: int) -> float:
        """What a run with `epochs` per stage computes, in forward-backward passes over the
        training set (a forward alone is a third). `sparse-cocktail compare` gives equal shares."""
        raise TypeError(f"{cls.__name__} must override cost(options, epochs)")

    def weight_sets(self, ctx: Context) -> dict[str, list[str]]:
        """Subnets by the weights that they compute with: a file of the run's folder that
        `save_weights` wrote, or "" for the weights that the model holds at the end."""
        return {"": list(ctx.cocktail.subnets)}

    def finish(self, ctx: Context) -> dict[str, dict[str, Any]]:
        """Recalibrate and measure every subnet; the only place that reads the test set.

        A file of weights becomes a cocktail file of its own with the subnets that it serves, in
        the run's folder `networks`.

        Returns {subnet: {"accuracy": percent, and optionally "accuracy_own",
        "accuracy_interpolated", and for a file of weights "weights": that of the cocktail}}. A
        subnet that computes with several sets has an entry "NAME (FILE)" with "subnet": NAME for
        each after the first.
        """
        scores: dict[str, dict[str, Any]] = {}
        for file, names in self.weight_sets(ctx).items():
            if file:
                dense = ctx.cocktail.subnets["dense"]
                dense.accuracy = dense.statistics = None  # those of other weights
                ctx.cocktail.activate("dense")
                ctx.model.load_state_dict(ctx.read_weights(file))
            place = f"networks/{Path(file).name}" if file else None
            for name, accuracy in self.final_accuracies(ctx, names).items():
                key = f"{name} ({file})" if name in scores else name
                scores[key] = {"subnet": name, "accuracy": accuracy, "weights": place}
            if file and (not dist.is_initialized() or dist.get_rank() == 0):
                ctx.cocktail.save(ctx.folder / place, {"config": vars(ctx.config)}, names)
        return scores

    def final_accuracies(self, ctx: Context, names: list[str]) -> dict[str, float]:
        """Recalibrate subnets for good and measure them on the test set."""
        scores, batches = {}, ctx.calibration()
        for index, name in enumerate(names):
            ctx.progress("measure", index, len(names))
            if batches:
                ctx.cocktail.recalibrate(name, batches)
                ctx.count("forward", sum(map(len, batches)))
            with ctx.cocktail.using(name):
                scores[name] = ctx.cocktail.subnets[name].accuracy = ctx.accuracy("test")
        return scores
