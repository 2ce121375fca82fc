"""One optimizer step: its passes, their losses and teachers, and the weights that stay frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from .data import generator_for, mix
from .freezing import Frozen, is_like
from .methods import Context, Method, Pass
from .premask import given_weights, premasked
from .recalibrate import frozen_statistics
from .schedules import length_in_steps

__all__ = ["Stepper", "stride_like_parameters"]

# Bytes of masked weights up to which a pass makes them all in one call and keeps them for its
# backward: calls cost more than memory there.
_SMALL = 2**22
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Stepper:
    """Runs the steps that a method describes.

    `losses` collects (step, subnet, loss on the device) until the engine takes them, so that no
    step waits for the device.
    """

    def __init__(self, ctx: Context, method: Method) -> None:
        self.ctx, self.method = ctx, method
        fp16 = ctx.config.precision == "fp16"
        self.scaler = torch.amp.GradScaler(ctx.device.type, enabled=fp16)
        self.losses: list[tuple[int, str, Tensor]] = []
        self.kept: dict[str, list[Tensor]] | None = None  # batch and output of the step before
        self.distributed = hasattr(ctx.network, "no_sync")
        self.frozen = Frozen(ctx.cocktail)
        masked = sum(layer.weight.nbytes for layer in ctx.cocktail.layers.values())
        self.small = masked <= _SMALL and not ctx.config.compile

    def step(self, inputs: Tensor, targets: Tensor, lr: float) -> None:
        """All passes forward and backward, then one optimizer step at learning rate `lr`."""
        ctx, config = self.ctx, self.ctx.config
        warmup = length_in_steps(config.warmup, ctx.stages[ctx.stage].epochs, ctx.steps_per_epoch)
        if ctx.step < warmup:
            lr *= (ctx.step + 1) / warmup
        for group in ctx.optimizer.param_groups:
            group["lr"] = lr
        if config.mixup or config.cutmix:
            draws = generator_for(config.seed, ctx.stage, ctx.step, 2)  # 1 is the method's own
            classes = ctx.data.classes
            inputs, targets = mix(inputs, targets, classes, config.mixup, config.cutmix, draws)
        if config.channels_last and inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        passes = self.method.step(ctx)
        if any(each.teacher == "previous" for each in passes):
            parts = list(zip(self.kept["inputs"], self.kept["targets"], strict=True))
        else:
            chunks = inputs.chunk(config.accumulate), targets.chunk(config.accumulate)
            parts = list(zip(*chunks, strict=True))
        ctx.optimizer.zero_grad(set_to_none=True)
        outputs: list[list[Tensor]] = []
        for each in passes:
            last = len(outputs) == len(passes) - 1
            outputs.append(self._run_pass(each, parts, outputs, last))
            self.method.after_pass(ctx)
        self.kept = None
        if passes[-1].keep:
            inputs, targets = map(list, zip(*parts, strict=True))
            self.kept = {"inputs": inputs, "targets": targets, "outputs": outputs[-1]}
        self.scaler.unscale_(ctx.optimizer)
        if config.clip_norm:
            nn.utils.clip_grad_norm_(ctx.model.parameters(), config.clip_norm)
        self.method.before_step(ctx)
        with self._frozen(passes):
            self.scaler.step(ctx.optimizer)
        self.scaler.update()
        self.method.after_step(ctx)

    def _run_pass(self, each: Pass, parts: list, outputs: list, last: bool) -> list[Tensor]:
        """Forward and backward over the parts of the batch; returns the detached outputs."""
        ctx = self.ctx
        teachers: list[Tensor | None] = [None] * len(parts)
        if each.teacher == "dense":
            teachers = [self._teach(_transformed(each, x)) for x, _ in parts]
        elif each.teacher == "previous":
            teachers = self.kept["outputs"]
        elif each.teacher is not None:
            teachers = outputs[each.teacher]
        ctx.cocktail.activate(each.subnet)
        for layer in ctx.cocktail.layers.values():
            layer.dense_grad = each.dense_grad
        results, losses = [], []
        total = sum(len(x) for x, _ in parts)
        for index, ((x, target), teacher) in enumerate(zip(parts, teachers, strict=True)):
            wait = self.distributed and not (last and index == len(parts) - 1)
            share = len(x) / total
            with ctx.network.no_sync() if wait else nullcontext(), ExitStack() as held:
                with self._autocast():
                    if each.weights is not None:
                        # until the backward ends, in which gradient checkpointing computes anew
                        held.enter_context(self._given(each))
                    with self._premasked(each):
                        output = ctx.network(_transformed(each, x))
                    loss = self._loss(each, output, target, teacher)
                self.scaler.scale(loss * (each.weight * share)).backward()
            results.append(output.detach())
            losses.append(loss.detach() * share)
        ctx.count("backward", total)
        self.losses.append((ctx.step, each.subnet, torch.stack(losses).sum()))
        return results

    def _loss(self, each: Pass, output: Tensor, target: Tensor, teacher: Tensor | None) -> Tensor:
        if each.loss is not None:
            return each.loss(output, target, teacher)
        loss = self.ctx.task.loss(output, target)
        if teacher is None:
            return loss
        return 0.5 * (loss + self.ctx.task.distill(output, teacher))  # Sparse Cocktail, Eq. 1

    @torch.no_grad()
    def _teach(self, x: Tensor) -> Tensor:
        """The dense network's output in batch statistics; running ones stay, unless asked for."""
        ctx = self.ctx
        ctx.cocktail.activate("dense")
        ctx.count("forward", len(x))
        update = ctx.config.teacher_statistics == "update"
        with nullcontext() if update else frozen_statistics(ctx.model), self._autocast():
            return ctx.model(x)

    def _given(self, each: Pass):
        """The masked layers compute with what the method makes."""
        if self.ctx.config.compile:
            raise ValueError(
                f"config: compile=True, but method {self.ctx.config.method} makes weights "
                "outside of the network at every pass; set compile=False"
            )
        return given_weights(self.ctx.cocktail.layers.values(), each.weights())

    def _premasked(self, each: Pass):
        """Small masked layers do not make what they compute with, where nothing else is given."""
        small = self.small and each.weights is None
        return premasked(self.ctx.cocktail.layers.values(), keep=True) if small else nullcontext()

    def _autocast(self):
        dtype = _AUTOCAST.get(self.ctx.config.precision)
        return torch.autocast(self.ctx.device.type, dtype) if dtype else nullcontext()

    @contextmanager
    def _frozen(self, passes: list[Pass]) -> Iterator[None]:
        """Undo what the optimizer does to pruned weights and silent channels, momentum included."""
        cocktail, optimizer = self.ctx.cocktail, self.ctx.optimizer
        rows = {cocktail.subnets[each.subnet].row for each in passes}
        dense = None in rows or any(each.dense_grad for each in passes)
        if dense or self.ctx.config.mask_update == "shared":
            yield
            return
        self.frozen.hold([each.subnet for each in passes], optimizer)
        yield
        self.frozen.restore()


@torch.no_grad()
def stride_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Lay what an optimizer remembers out like its parameters: files do not keep strides."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if is_like(value, parameter) and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _transformed(each: Pass, x: Tensor) -> Tensor:
    return x if each.transform is None else each.transform(x)
