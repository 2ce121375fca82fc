"""The only training loop: stages of optimizer steps, each made of passes over subnets."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import data as data_sets
from . import models
from .checkpoint import restore_dataclass
from .cocktail import Cocktail
from .config import Config, split_fields
from .conversion import convert
from .data import Data
from .files import read_tensors
from .methods import METHODS, Context, Method
from .report import run_results
from .run_folder import RunFolder
from .stepping import Stepper
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
        self.stop = StopRequest(f"go on with --resume --out {folder}")
        self.board = None
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
        data = data_sets.load(data, config.data_dir) if isinstance(data, str) else data
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda"):
            if not torch.cuda.is_available():
                raise ValueError(f"config: device={device!r}, but torch sees no GPU; use cpu")
            torch.backends.cudnn.deterministic = True  # a resumed run repeats its bits
        self.device = torch.device(device)
        if not hasattr(model, "conversion"):
            skip = None if config.mask_linear else _linear_layers(model)
            example = data.train.inputs[:2].to(self.device)
            model = convert(model.to(self.device), skip, example, config.channels_last)
        model.to(self.device)
        if config.init:
            self._load_initial(model)
        network: nn.Module = torch.compile(model) if config.compile else model
        if self.world > 1:
            network = DistributedDataParallel(network, broadcast_buffers=False)
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

    def _load_initial(self, model: nn.Module) -> None:
        tensors, _ = read_tensors(self.config.init)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"config: init={self.config.init!r} does not fit: {error}") from error

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

    def _new_optimizer(self) -> torch.optim.Optimizer:
        config, model = self.config, self.ctx.model
        vectors = [] if config.decay_norm_bias else [p for p in model.parameters() if p.dim() < 2]
        plain = {id(p) for p in vectors}  # biases, scales and shifts
        groups = [
            {
                "params": [p for p in model.parameters() if id(p) not in plain],
                "weight_decay": config.weight_decay,
            },
            {"params": [p for p in model.parameters() if id(p) in plain], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(
            [g for g in groups if g["params"]],
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
        )

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
        if self.rank == 0:
            facts = {"config": self.facts, "revision": results["environment"]["revision"]}
            ctx.cocktail.save(self.folder / "cocktail.safetensors", facts)
        self.files.finish(results)
        if self.board is not None:
            self.board.close()
        return results

    def _run_stage(self, index: int, tick) -> None:
        ctx, method = self.ctx, self.method
        ctx.stage, stage = index, self.ctx.stages[index]
        if ctx.step == 0:
            ctx.epoch = 0
            method.before_stage(ctx)
            ctx.cocktail.activate("dense")
            if stage.start_from:
                ctx.model.load_state_dict(ctx.read_weights(stage.start_from))
            ctx.optimizer = self._new_optimizer()
        ctx.network.train()
        first = max(ctx.step - 1, 0) // ctx.steps_per_epoch  # the epoch of the last step done
        for ctx.epoch in range(first, stage.epochs):
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
            of_stage = [n for n, s in ctx.cocktail.subnets.items() if s.stage == ctx.stage]
            scores = ctx.measure(["dense", *of_stage], "holdout")
        self.log("stage", name=stage.name, holdout=scores)
        shown = ", ".join(f"{name} {score:.1f}" for name, score in scores.items())
        self.console.print(f"[bold]{stage.name}[/bold]: hold-out {shown}")

    # ---- logs, checkpoints, signals --------------------------------------------------------------

    def _flush_losses(self, stage) -> None:
        """Write the collected losses; stop at the first one that is not finite."""
        losses, self.stepper.losses = self.stepper.losses, []
        if not losses:
            return
        values = torch.stack([loss.float() for *_, loss in losses]).tolist()
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
        ctx = self.ctx
        weights = ctx.weights()
        ctx.check_finite(weights)
        ctx.seconds["total"] = self._clock()
        on_gpu = self.device.type == "cuda"
        tree = {
            "stage": ctx.stage,
            "step": ctx.step,
            "seconds": ctx.seconds,
            "model": weights,
            "cocktail": ctx.cocktail.state(),
            "optimizer": ctx.optimizer.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "method": self.method.state,
            "random": {
                "cpu": torch.get_rng_state(),
                "device": torch.cuda.get_rng_state(self.device) if on_gpu else None,
            },
        }
        self.files.save_checkpoint(tree)

    def _restore(self, tree: dict[str, Any]) -> None:
        ctx = self.ctx
        ctx.stage, ctx.step, ctx.seconds = tree["stage"], tree["step"], tree["seconds"]
        ctx.model.load_state_dict(tree["model"])
        ctx.cocktail.restore(tree["cocktail"])
        restore_dataclass(self.method.state, tree["method"])
        ctx.optimizer = self._new_optimizer()
        ctx.optimizer.load_state_dict(tree["optimizer"])
        if tree["scaler"]:
            self.stepper.scaler.load_state_dict(tree["scaler"])
        torch.set_rng_state(tree["random"]["cpu"])
        if tree["random"]["device"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(tree["random"]["device"], self.device)


def _linear_layers(model: nn.Module) -> Callable[[str, nn.Module], bool]:
    if not any(isinstance(m, nn.Conv2d) for m in list(model.modules())):
        raise ValueError(
            f"train: {type(model).__name__} has no convolution, and linear layers are left dense; "
            "set mask_linear=True (--mask-linear true)"
        )
    return lambda _, module: isinstance(module, nn.Linear)
