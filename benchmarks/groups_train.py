"""What `bench_train.py` times: steps of the engine in a pruning stage, and of PyTorch alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from sparse_cocktail import Cocktail, models, ops
from sparse_cocktail.config import split_fields
from sparse_cocktail.data import Data, Split
from sparse_cocktail.engine import Trainer
from sparse_cocktail.methods import METHODS
from sparse_cocktail.modules import masked_layers
from sparse_cocktail.preparation import new_optimizer
from sparse_cocktail.pruning import followers

from gates import Verdict, equals  # isort: skip - neighbours, not packages
from groups_masked import Dense, Rounding, exactly, peak_bytes, saved_bytes  # isort: skip
from groups_networks import watched  # isort: skip
from peers_masked import DENSE, PRUNE, pruned_network  # isort: skip
from shapes import Case, like_weight  # isort: skip
from timing import Bound, Group, Impl  # isort: skip

__all__ = ["ENGINE", "FIXED", "PERIOD", "STAGE", "TURNS", "Bench", "EngineSteps", "Training"]

ENGINE = "ours/engine"
FIXED = "torch/dense, deterministic"  # cuDNN's algorithms that repeat their bits, as the engine has
NUDGED = 4  # runs of PyTorch beside the first, which tell how far rounding can carry
PERIOD = 6  # steps: dense, unstructured, dense, channel, dense, N:M
STAGE = 5  # of ten: its N:M ratio is 2:4, 33 % of the weights and 59 % of the channels are left
TURNS = {"dense": 0, "unstructured": 1, "channel": 3, "n:m": 5}  # places in the period
Tensors = list[Tensor]
Masks = tuple[dict[str, Tensor], dict[str, Tensor]]  # of weights, and of BatchNorm's channels


class Training:
    """A plain network and two batches on the device; for `measure` one set, which is itself."""

    def __init__(self, name: str, shape: tuple[int, ...], device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.plain = models.build(name, {"inputs": shape[1]})
            for weight in (p.data for p in self.plain.parameters() if p.dim() > 1):
                weight.normal_(std=weight[0].numel() ** -0.5)  # with tails: no layer dies
            self.classes = self.plain.fc.out_features
            images = torch.randn(2 * shape[0], *shape[1:])
            labels = torch.randint(self.classes, (len(images),))
        self.plain.to(device, memory_format=torch.channels_last).train()
        self.images, self.labels = images.to(device), labels.to(device)
        self.batch, self.device, self.sets = shape[0], device, [self]
        self.gpu = device.type == "cuda"
        # what results are compared in; on a GPU, where they are of bfloat16, it takes less memory
        self.wide = torch.float32 if self.gpu else torch.float64
        shapes = tuple(tuple(p.shape) for p in self.plain.parameters())
        size = "x".join(map(str, shape[2:]))
        self.case = Case(f"{name}, {shape[0]} images of {size}", shapes)

    def first(self) -> int:
        return 0

    next = first

    def batches(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.images.to(dtype).chunk(2), self.labels.chunk(2), strict=True))


# ---- steps ---------------------------------------------------------------------------------------


class EngineSteps:
    """Optimizer steps of a real `Trainer` in stage STAGE.

    The learning rate is 0: every sample finds the same weights.

    Args:
        dtype: None trains as a run does (bf16 autocast on a GPU, else fp32); one of its own is
            that of weights and images.
        like: take the masks of these steps instead of making them.
    """

    def __init__(
        self, training: Training, dtype: torch.dtype | None = None, like: EngineSteps | None = None
    ) -> None:
        self.batches = training.batches(dtype or torch.float32)
        (x, labels), gpu = self.batches[0], training.gpu
        images = training.images.to(x.dtype)
        few = Split(x[:1], labels[:1])
        data = Data("random", training.classes, Split(images, training.labels), few, few)
        fields = {
            "method": "cocktail",
            "device": str(training.device),
            "precision": "bf16" if gpu and dtype is None else "fp32",
            "batch_size": training.batch,
            "channels_last": True,
        }
        model = copy.deepcopy(training.plain).to(dtype or torch.float32)
        with TemporaryDirectory() as folder:
            trainer = Trainer(*split_fields(fields), Path(folder), Console(quiet=True))
            trainer.prepare(model, data)
            trainer.files.finish({})
        self.ctx, self.method, self.stepper = trainer.ctx, trainer.method, trainer.stepper
        ctx = self.ctx
        if like is None:
            for ctx.stage in range(1, STAGE + 1):
                self.method.before_stage(ctx)
        else:
            ctx.stage, self.method.state = STAGE, copy.copy(like.method.state)
            ctx.cocktail.restore(like.ctx.cocktail.state())
        ctx.optimizer = new_optimizer(ctx.model, ctx.config)
        ctx.network.train()
        self.models, self._kept = [ctx.model], None
        unstructured, channel = map(str, ctx.options.patterns(STAGE))
        self.names = {0: "dense", 1: unstructured, 3: channel, 5: self.method.state.nm_now}

    def start(self, place: int, pair: bool) -> None:
        """Be ready for the step at a place of the period; `pair` is the field `pair_batches`."""
        self.ctx.options.pair_batches = pair
        if pair and place % 2 and self._kept is None:
            self.step(place - 1)
            self._kept = self.stepper.kept
        self.stepper.kept = self._kept if pair and place % 2 else None
        self.stepper.losses = []

    def step(self, place: int) -> None:
        self.ctx.step = place
        self.stepper.step(*self.batches[place % 2], 0.0)

    def found(self) -> Tensors:
        """The losses since `start`, and gradients of the last step."""
        losses = torch.stack([loss for *_, loss in self.stepper.losses])
        return [losses, *watched(self.ctx.model)]


class TorchSteps:
    """The same steps by PyTorch alone: of the dense network, or with masks by torch's prune.

    Args:
        pruned: what `pruned_network` takes by places in the period; the dense network has all
            others.
        dtype: as for `EngineSteps`.
    """

    def __init__(
        self,
        training: Training,
        pruned: dict[int, Masks] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.batches = training.batches(dtype or torch.float32)
        self.device, self.bf16 = training.device.type, training.gpu and dtype is None
        plain = copy.deepcopy(training.plain).to(dtype or torch.float32)
        self.by_place = {0: plain}
        for place, masks in (pruned or {}).items():
            self.by_place[place] = pruned_network(plain, *masks)
        self.models = list(self.by_place.values())
        how = {"lr": 0.0, "momentum": 0.9, "weight_decay": 1e-4}
        self.optimizers = {m: torch.optim.SGD(m.parameters(), **how) for m in self.models}
        self.pair, self.losses, self.last = False, [], self.models[0]
        self._taught: Tensor | None = None  # the dense network's output

    def start(self, place: int, pair: bool) -> None:
        self.pair = pair and len(self.models) > 1
        if self.pair and self._taught is None:
            self.step(0)
        self.losses = []

    def step(self, place: int) -> None:
        x, target = self.batches[0 if self.pair else place % 2]
        x = x.contiguous(memory_format=torch.channels_last)
        dense, model = self.models[0], self.by_place.get(place, self.models[0])
        self.optimizers[model].zero_grad(set_to_none=True)
        teacher = self._taught if model is not dense else None
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            if model is not dense and not self.pair:
                with torch.no_grad():
                    teacher = dense(x)
            output = model(x)
            loss = F.cross_entropy(output, target)
            if teacher is not None:
                loss = 0.5 * (loss + F.cross_entropy(output, teacher.softmax(1)))
        loss.backward()
        self.optimizers[model].step()
        if model is dense and self.pair:
            self._taught = output.detach()
        self.losses.append(loss.detach())
        self.last = model

    def found(self) -> Tensors:
        return [torch.stack(self.losses), *watched(self.last)]


Steps = EngineSteps | TorchSteps


def _pruned(engine: EngineSteps) -> dict[int, Masks]:
    """The engine's masks as `pruned_network` takes them, by places of the period."""
    made, cocktail, model = {}, engine.ctx.cocktail, engine.ctx.model
    names = {module: name for name, module in model.named_modules()}
    for place, subnet in engine.names.items():
        if place == 0:
            continue
        with cocktail.using(subnet):
            layers = masked_layers(model)
            masks = {name: like_weight(m.mask, m.weight) for name, m in layers.items()}
            live = {names[norm]: norm.live.clone() for norm, _ in followers(model, layers)}
            made[place] = masks, live
    return made


# ---- the gate ------------------------------------------------------------------------------------


class Losses:
    """Losses of a period's steps, and gradients by place, each step taken alone."""

    def __init__(self, steps: Steps, pair: bool, dense: bool = False) -> None:
        self.grads: dict[int, Tensors] = {}
        losses = {}
        for place in (0, 1) if dense else TURNS.values():
            steps.start(place, pair)
            steps.step(place)
            loss, *grads = steps.found()
            losses[place] = loss[-1]
            self.grads[place] = [grad.clone() for grad in grads]
        shown = [place % 2 if dense else place * (place % 2) for place in range(PERIOD)]
        self.losses = torch.stack([losses[place] for place in shown])

    def at(self, places: Sequence[int], losses: Tensor | None = None) -> Tensors:
        """What the steps at these places find; others of the period have this record's losses."""
        whole = self.losses.clone()
        if losses is not None:
            whole[list(places)] = losses.to(whole.dtype)
        last = places[-1]
        return [whole, *self.grads[last if last in self.grads else last % 2]]


def _nearly(steps: TorchSteps, pair: bool, dtype: torch.dtype, dense: bool = False) -> list[Losses]:
    """What the steps find on their batches, and on some that differ from these by rounding."""
    made, batches = [], steps.batches
    for seed in range(1 + NUDGED):
        draws = torch.Generator().manual_seed(seed)
        steps.batches = []
        for x, labels in batches:
            signs = torch.randint(-1, 2, x.shape, generator=draws).to(x.device)
            nudge = torch.finfo(dtype).eps * signs * (seed > 0)
            steps.batches.append((x * (1 + nudge), labels))
        steps._taught = None
        made.append(Losses(steps, pair, dense))
    steps.batches, steps._taught = batches, None
    return made


class Gate:
    """Errors of losses and gradients, in units of PyTorch's own, are at most twice these.

    They are against the same steps in `Training.wide`; a single step's loss counts beside the
    exact ones of the others, since one error may be small by luck. PyTorch's own are the largest of
    several runs: rounding turns a ReLU near zero on or off, and gradients behind it jump.
    """

    def __init__(self, torchs: Sequence[Losses], exact: Losses, dtype: torch.dtype) -> None:
        self.torchs, self.exact, self.dtype = torchs, exact, dtype

    def __call__(self, places: Sequence[int], found: Tensors) -> Verdict:
        losses, *grads = found
        if len(losses) != len(places):
            return Verdict(float("inf"), says=f"{len(losses)} losses of {len(places)} steps")
        exact = self.exact.at(places)
        every = [Rounding(some.at(places), exact, self.dtype, norm=2) for some in self.torchs]
        rounding = every[0]
        rounding.units = list(map(max, zip(*(each.units for each in every), strict=True)))
        return rounding([self.exact.at(places, losses)[0], *grads])


# ---- groups --------------------------------------------------------------------------------------


class Bench:
    """Engine and peers of one network, and the groups that are timed of them.

    Raises ValueError when the engine's steps in `Training.wide` are not PyTorch's.
    """

    def __init__(self, training: Training) -> None:
        self.training, self.engine = training, EngineSteps(training)
        self.names = self.engine.names
        pruned = _pruned(self.engine)
        self.dense, self.peer = TorchSteps(training), TorchSteps(training, pruned)
        self.gates = self._gates(pruned)

    def _gates(self, pruned: dict[int, Masks]) -> dict[tuple[bool, bool], Gate]:
        """By (is of the dense network, pair)."""
        training, wide = self.training, self.training.wide
        dtype = torch.bfloat16 if training.gpu else torch.float32
        made = {}
        with ops.backend("reference"), exactly():  # every op by its definition
            own = EngineSteps(training, wide, self.engine)
            torchs = TorchSteps(training, pruned, wide)
            exact = {pair: (Losses(own, pair), Losses(torchs, pair)) for pair in (True, False)}
            dense = Losses(TorchSteps(training, None, wide), False, dense=True)
        for pair, (ours, theirs) in exact.items():
            narrow = _nearly(self.peer, pair, dtype)
            check = Gate(narrow, theirs, dtype)
            for place, name in self.names.items():
                verdict = check((place,), [ours.losses[[place]], *ours.grads[place]])
                if not verdict.ok:
                    raise ValueError(
                        f"bench train: the engine's step of {name} in {wide} is not that of "
                        f"PyTorch: {verdict.says}; compare stepping.py with groups_train.py"
                    )
            made[False, pair] = Gate(narrow, ours, dtype)
        made[True, False] = Gate(_nearly(self.dense, False, dtype, dense=True), dense, dtype)
        return made

    def _impl(self, name: str, steps: Steps, places: Sequence[int], pair: bool) -> Impl:
        kind, fixed = (Dense if steps is self.dense else list), name in (ENGINE, FIXED)
        if steps is self.dense and len(places) == 1:
            places = (0,)  # whatever the step is compared with

        def reset() -> None:
            if self.training.gpu:
                torch.backends.cudnn.deterministic = fixed
            steps.start(places[0], pair)

        def call() -> Steps:
            for place in places:
                steps.step(place)
            return steps

        result = lambda steps: kind([places, *steps.found()])  # noqa: E731
        return Impl(name, lambda _: Bound(call, reset), result, graph=False)

    def steps(self, setting: str, places: Sequence[int], pair: bool) -> tuple[Group, dict]:
        """A group of some steps of the period, and what measures the memory of each."""
        ways = {ENGINE: self.engine, DENSE: self.dense}
        if self.training.gpu:
            ways[FIXED] = self.dense
        if any(places):
            ways[PRUNE] = self.peer
        impls = [self._impl(name, steps, places, pair) for name, steps in ways.items()]
        memory = {
            impl.name: lambda impl=impl: self._memory(impl, ways[impl.name], len(places) == 1)
            for impl in impls
        }

        def gate(out: list) -> Verdict:
            places, *found = out
            dense = isinstance(out, Dense)
            return self.gates[dense, pair and not dense](places, found)

        weights = self.training.case.numel
        op = "period" if len(places) > 1 else "step"
        return Group(op, setting, impls, gate, 4 * weights, weights=weights), memory

    def _memory(self, impl: Impl, steps: Steps, single: bool) -> int | None:
        """Peak on a GPU; on the CPU what a single step keeps for its backward."""
        bound = impl.bind(self.training)
        if not self.training.gpu:
            bound.reset()
            parameters = [p for model in steps.models for p in model.parameters()]
            return saved_bytes(bound.call, parameters) if single else None

        def step() -> None:
            bound.run()
            for model in steps.models:
                model.zero_grad(set_to_none=True)

        return peak_bytes(step)

    def masks(self) -> Group:
        """All mask steps of a run, from the first stage on."""
        engine = self.engine.ctx
        count = engine.options.stages
        ctx, method = engine, self.engine.method

        def reset() -> None:
            nonlocal ctx, method
            engine.cocktail.activate("dense")
            ctx = replace(engine, cocktail=Cocktail(engine.model))
            method = METHODS["cocktail"]()

        def call() -> Cocktail:
            for ctx.stage in range(1, count + 1):
                method.before_stage(ctx)
            return ctx.cocktail

        def rows(cocktail: Cocktail) -> Tensors:
            return [cocktail.bank.flat(row) for row in range(len(cocktail.bank))]

        bound = Bound(call, reset)
        with ops.backend("reference"):
            gate = equals([row.clone() for row in rows(bound.run())])
        impl = Impl("ours/before_stage", lambda _: bound, rows, graph=False)
        numel = engine.cocktail.bank.numel
        return Group("masks", f"{count} mask steps", [impl], gate, 4 * numel, weights=numel)

    def activate(self) -> Group:
        """The switch to each of the period's networks in turn."""
        cocktail, names = self.engine.ctx.cocktail, list(self.names.values())

        def call() -> Tensors:
            for name in names:
                cocktail.activate(name)
            return [layer.mask_bits for layer in cocktail.layers.values()]

        gate = equals([bits.clone() for bits in cocktail.masks(names[-1])])
        impl = Impl("ours/activate", lambda _: Bound(call), list, graph=False)
        size = cocktail.bank.flat(0).nbytes
        setting = f"{', '.join(names)} in turn"
        return Group("activate", setting, [impl], gate, size, weights=cocktail.bank.numel)
