"""The only training loop: stages of optimizer steps, each made of passes over subnets."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from . import data as data_sets
from . import models
from .checkpoint import random_states, restore_dataclass, restore_random_states
from .cocktail import Cocktail
from .config import Config, split_fields
from .data import Data
from .distributed import gather, mean, own_device, replicate
from .methods import METHODS, Context, Method
from .ops.checks import check_module, wrong_type
from .preparation import new_optimizer, prepare_model
from .report import run_results
from .run_folder import RunFolder
from .stepping import Stepper, stride_like_parameters
from .stopping import Interrupted, StopRequest
from .tasks import Classification, Task

__all__ = ["Interrupted", "Trainer", "train"]


def train(
    model: str | nn.Module = "resnet8",
    data: str | Data = "digits",
    out: str | os.PathLike = "runs/latest",
    *,
    task: Task | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Train with any method and leave everything of the run in one folder.

    Args:
        model: name of a model, or a module (plain or already converted).
        data: name of a data set, or a `Data`.
        out: the run's folder: results.json, cocktail.safetensors, log.jsonl, config.json.
        task: loss, distillation and metric; classification by default.
        resume: go on from the folder's checkpoint, bit for bit.
        overwrite: start anew in a folder that holds a run.
        console: where progress is shown (None: nowhere).
        fields: recipe fields, as in `sparse-cocktail train --help`.

    Returns:
        The content of results.json.

    Raises:
        ValueError: for bad fields, a folder that holds another run, or a damaged checkpoint.
        FloatingPointError: when the loss is not finite; the last good checkpoint stays.
        Interrupted: on SIGTERM or Ctrl-C, after writing a checkpoint.
    """
    for name, value in (("model", model), ("data", data)):
        fields[name] = value if isinstance(value, str) else f"custom:{type(value).__name__}"
    config, options = split_fields(fields)
    trainer = Trainer(config, options, Path(out), console or Console(quiet=True), task)
    trainer.prepare(model, data, resume, overwrite)
    return trainer.run()


class Trainer:
    """One run: `prepare`, then `run`."""

    def __init__(
        self, config: Config, options: Any, folder: Path, console: Console, task: Task | None = None
    ) -> None:
        self.config, self.options, self.folder = config, options, folder
        self.task = task or Classification(config.label_smoothing)
        self.method: Method = METHODS[config.method]()
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.console = console if self.rank == 0 else Console(quiet=True)
        self.stop = StopRequest(f"go on with: sparse-cocktail resume {folder}")
        self.board = None
        self.closed = 0  # epochs of the present stage whose after_epoch has run
        self.facts = {**dataclasses.asdict(config), **dataclasses.asdict(options)}
        self.files = RunFolder(folder, self.facts, writes=self.rank == 0)

    # ---- set-up ----------------------------------------------------------------------------------

    def prepare(
        self,
        model: str | nn.Module,
        data: str | Data,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Everything before the first step; arguments as in `train`."""
        config = self.config
        self.files.check(resume, overwrite)
        random.seed(config.seed)
        np.random.seed(config.seed)
        torch.manual_seed(config.seed)
        if config.threads:
            torch.set_num_threads(config.threads)
        if isinstance(model, str):
            if model.startswith("custom:"):
                raise ValueError(
                    f"train: the run's model ({model}) was given in Python; resume it there with "
                    "train(model, data, out=..., resume=True)"
                )
            model = models.create(model, config.model_args)
        check_module("train", "model", model)
        if isinstance(data, str):
            data = data_sets.load(data, config.data_dir, config.workers, config.randaugment)
        if not hasattr(data, "steps_per_epoch"):
            wanted = "a name or data.Data(name, classes, train, holdout, test)"
            raise wrong_type("train", "data", data, wanted)
        if not all(hasattr(self.task, name) for name in ("loss", "distill", "metric")):
            raise wrong_type("train", "task", self.task, "an object with loss, distill and metric")
        device = own_device(config.device)
        if device.startswith("cuda"):
            if not torch.cuda.is_available():
                raise ValueError(f"config: device={device!r}, but torch sees no GPU; use cpu")
            torch.backends.cudnn.deterministic = True  # a resumed run repeats its bits
        self.device = torch.device(device)
        model = prepare_model(model, config, data.example(2), self.device)
        network: nn.Module = torch.compile(model) if config.compile else model
        if self.world > 1:
            network = replicate(network)
        self.ctx = Context(
            config=config,
            options=self.options,
            cocktail=Cocktail(model),
            data=data.to(self.device),
            task=self.task,
            folder=self.folder,
            device=self.device,
            network=network,
            log=self.log,
            say=lambda text: self.console.print(text, markup=False, highlight=False),
            steps_per_epoch=data.steps_per_epoch(config.batch_size, self.world),
        )
        self.stepper = Stepper(self.ctx, self.method)
        self.ctx.stages = self.method.plan(self.ctx)
        writer = self._tensorboard_writer()
        if self.world > 1:
            dist.barrier()  # every rank has checked the folder before rank 0 changes it
        self._describe()
        if (checkpoint := self.files.claim(resume)) is not None:
            self._restore(checkpoint)
        if writer is not None and self.rank == 0:
            self.board = writer(str(self.folder / "tensorboard"))

    def _describe(self) -> None:
        """Say before the first step what is masked and what stays dense."""
        report = self.ctx.model.conversion
        left = "; ".join(f"{name} ({reason})" for name, reason in report.left.items())
        self.console.print(
            f"{len(self.ctx.cocktail.layers)} layers with {self.ctx.cocktail.bank.numel:,} weights "
            f"are masked on {self.device}. Dense: {left or 'none'}",
            markup=False,
            highlight=False,
        )
        self.log("conversion", masked=list(self.ctx.cocktail.layers), left=report.left)

    def _tensorboard_writer(self) -> type | None:
        if not self.config.tensorboard:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "tensorboard=true needs the extra [log]: pip install 'sparse-cocktail[log]'"
            ) from error
        return SummaryWriter

    # ---- the run ---------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        ctx, start, before = self.ctx, perf_counter(), self.ctx.seconds.get("total", 0.0)
        self._clock = lambda: before + perf_counter() - start
        total = sum(stage.epochs for stage in ctx.stages) * ctx.steps_per_epoch
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        with progress, self.stop.listening():
            bar = progress.add_task(f"{self.config.method}", total=total)
            side = progress.add_task("", visible=False)

            def show(what: str, done: int, of: int) -> None:
                if done == 0:
                    progress.reset(side)  # time left by this work's speed alone
                visible = done + 1 < of
                progress.update(side, description=what, completed=done, total=of, visible=visible)

            ctx.progress = show
            done = sum(s.epochs for s in ctx.stages[: ctx.stage]) * ctx.steps_per_epoch
            progress.update(bar, completed=done + ctx.step)
            for index in range(ctx.stage, len(ctx.stages)):
                self._run_stage(
                    index, lambda text: progress.update(bar, advance=1, description=text)
                )
            with ctx.timed("evaluate"), self.stop.at_once():
                scores = self.method.finish(ctx)
        ctx.seconds["total"] = self._clock()
        results = run_results(ctx, self.method, self.facts, scores)
        self.log("finished", seconds=ctx.seconds["total"])
        names = self.method.weight_sets(ctx).get("")
        if self.rank == 0 and names is not None:
            facts = {"config": self.facts, "revision": results["environment"]["revision"]}
            ctx.cocktail.save(self.folder / "cocktail.safetensors", facts, names)
        self.files.finish(results)
        if self.board is not None:
            self.board.close()
        return results

    def _run_stage(self, index: int, tick) -> None:
        ctx, method = self.ctx, self.method
        ctx.stage, stage = index, self.ctx.stages[index]
        if ctx.step == 0:
            ctx.epoch = self.closed = 0
            method.before_stage(ctx)
            ctx.cocktail.activate("dense")
            if stage.start_from:
                ctx.model.load_state_dict(ctx.read_weights(stage.start_from))
            ctx.optimizer = new_optimizer(ctx.model, self.config)
        ctx.network.train()
        ctx.epoch = max(self.closed - 1, 0)
        for ctx.epoch in range(self.closed, stage.epochs):
            skip = ctx.step - ctx.epoch * ctx.steps_per_epoch
            batches = ctx.data.epoch(
                (self.config.seed, index, ctx.epoch),
                self.config.batch_size,
                skip,
                self.rank,
                self.world,
            )
            for inputs, targets in batches:
                self.stepper.step(inputs, targets, stage.lr(ctx.step))
                ctx.step += 1
                self.stop.where = f"step {ctx.step} of stage {index}"
                tick(f"{stage.name} ({index + 1}/{len(ctx.stages)})")
                if ctx.step % self.config.log_every == 0:
                    self._flush_losses(stage)
                stop = self.stop.asked(ctx.step, self.config.log_every, self.device)
                if stop or ctx.step % self.config.checkpoint_every == 0:
                    self._flush_losses(stage)
                    self._checkpoint()
                if stop:
                    self.stop.obey()
            method.after_epoch(ctx)
            self.closed = ctx.epoch + 1
        self._flush_losses(stage)
        self._checkpoint()  # what follows may be long
        self._report_stage(stage)
        with self.stop.at_once():
            method.after_stage(ctx)
        ctx.stage, ctx.step = index + 1, 0
        self._checkpoint()

    def _report_stage(self, stage) -> None:
        ctx = self.ctx
        with ctx.timed("evaluate"):
            scores = ctx.measure(self.method.report(ctx), "holdout")
        self.log("stage", name=stage.name, holdout=scores)
        shown = ", ".join(f"{name} {score:.1f}" for name, score in scores.items())
        self.console.print(f"[bold]{stage.name}[/bold]: hold-out {shown}")

    # ---- logs, checkpoints, signals --------------------------------------------------------------

    def _flush_losses(self, stage) -> None:
        """Write the collected losses; stop at the first one that is not finite."""
        losses, self.stepper.losses = self.stepper.losses, []
        if not losses:
            return
        values = mean(torch.stack([loss.float() for *_, loss in losses])).tolist()
        lines: dict[str, list[float]] = {}
        for (step, subnet, _), value in zip(losses, values, strict=True):
            if not np.isfinite(value):
                raise FloatingPointError(
                    f"the loss of {subnet} is {value} at step {step} of {stage.name} (stage "
                    f"{self.ctx.stage}); the last good checkpoint is {self.files.checkpoint_path}: "
                    "lower lr, add warmup or clip_norm, or check the data for NaN"
                )
            lines.setdefault(subnet, []).append(value)
        lr = self.ctx.optimizer.param_groups[0]["lr"]
        self.log("train", lr=lr, loss={k: sum(v) / len(v) for k, v in lines.items()})

    def log(self, event: str, **values: Any) -> None:
        """Append one line to log.jsonl (and TensorBoard)."""
        if self.rank != 0:
            return
        ctx = self.ctx
        self.files.log(
            {"event": event, "stage": ctx.stage, "epoch": ctx.epoch, "step": ctx.step, **values}
        )
        if self.board is not None and event == "train":
            step = ctx.step + sum(s.epochs for s in ctx.stages[: ctx.stage]) * ctx.steps_per_epoch
            self.board.add_scalar("lr", values["lr"], step)
            for name, loss in values["loss"].items():
                self.board.add_scalar(f"loss/{name}", loss, step)

    def _checkpoint(self) -> None:
        """Write a checkpoint; it is on the disk before any rank goes on."""
        ctx = self.ctx
        weights = ctx.weights()
        ctx.check_finite(weights)
        ctx.seconds["total"] = self._clock()
        tree = {
            "stage": ctx.stage,
            "step": ctx.step,
            "closed": self.closed,
            "seconds": ctx.seconds,
            "samples": ctx.samples,
            "model": weights,
            "cocktail": ctx.cocktail.state(),
            "optimizer": ctx.optimizer.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "method": self.method.state,
            "ranks": gather(self._own_state(weights)),
        }
        self.files.save_checkpoint(tree)
        if self.world > 1:
            dist.barrier()

    def _own_state(self, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What differs between ranks: random states, BatchNorm statistics, a kept batch."""
        parameters = dict(self.ctx.model.named_parameters(remove_duplicate=False))
        state, kept = self.ctx.cocktail.state(), self.stepper.kept
        own = {s["name"]: s["statistics"] for s in state["subnets"] if s["statistics"] is not None}
        shared = state["shared"]
        return {
            "random": random_states(self.device),
            "buffers": {k: v.cpu() for k, v in weights.items() if k not in parameters},
            "shared": None if shared is None else [t.cpu() for t in shared],
            "statistics": {name: [t.cpu() for t in own[name]] for name in own},
            "kept": {k: [_strided(t) for t in v] for k, v in (kept or {}).items()},
        }

    def _restore(self, tree: dict[str, Any]) -> None:
        ctx, processes = self.ctx, len(tree["ranks"])
        if processes != self.world:
            raise ValueError(
                f"resume: the run in {self.folder} has {processes} processes, but {self.world} "
                f"were started; start {processes} (torchrun --nproc-per-node)"
            )
        if self.world > 1:
            self._settle_buckets()
        own = tree["ranks"][self.rank]
        ctx.stage, ctx.step, self.closed = tree["stage"], tree["step"], tree["closed"]
        ctx.seconds, ctx.samples, kept = tree["seconds"], tree["samples"], own["kept"]
        if kept:
            made = {k: [_unstrided(t, self.device) for t in v] for k, v in kept.items()}
            self.stepper.kept = made
        ctx.model.load_state_dict({**tree["model"], **own["buffers"]})
        ctx.cocktail.restore({**tree["cocktail"], "shared": own["shared"]})
        for name, statistics in own["statistics"].items():
            ctx.cocktail.subnets[name].statistics = [t.to(self.device) for t in statistics]
        restore_dataclass(self.method.state, tree["method"])
        ctx.optimizer = new_optimizer(ctx.model, self.config)
        ctx.optimizer.load_state_dict(tree["optimizer"])
        stride_like_parameters(ctx.optimizer)
        if tree["scaler"]:
            self.stepper.scaler.load_state_dict(tree["scaler"])
        restore_random_states(own["random"], self.device)

    def _settle_buckets(self) -> None:
        """One forward and backward, whose traces `_restore` overwrites.

        DDP orders gradients by the first backward of a process; with three ranks or more their
        order decides in which order ranks are summed, so a resumed run would round otherwise.
        """
        ctx, config = self.ctx, self.config
        first = ctx.data.epoch((config.seed, 0, 0), config.batch_size, 0, self.rank, self.world)
        inputs, targets = next(iter(first))
        ctx.network.train()
        self.task.loss(ctx.network(inputs), targets).backward()
        ctx.model.zero_grad(set_to_none=True)


def _strided(tensor: torch.Tensor) -> dict[str, Any]:
    """A tensor with its strides, which files do not keep and convolutions round by."""
    return {"values": tensor.cpu(), "strides": list(tensor.stride())}


def _unstrided(stored: dict[str, Any], device: torch.device) -> torch.Tensor:
    values = stored["values"]
    made = torch.empty_strided(values.shape, stored["strides"], dtype=values.dtype, device=device)
    return made.copy_(values)
