"""The networks of `bench_masked.py`: training steps, and the loop that co-trains subnets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_cocktail import Cocktail, convert, models, premasked
from sparse_cocktail.modules import masked_layers
from sparse_cocktail.pruning import followers, prune_

from gates import Verdict  # isort: skip - neighbours, not packages
from groups_masked import Dense, Rounding, exactly, peak_bytes, places, saved_bytes  # isort: skip
from peers_masked import DENSE, PRUNE, pruned_network  # isort: skip
from shapes import Case, like_weight  # isort: skip
from timing import Bound, Group, Impl  # isort: skip

__all__ = ["PREMASKED", "Networks", "loop_group", "network_group", "watched"]

PREMASKED = "ours/premasked"  # all W*m of a network in one call, kept for the backward
CONVERTED = "torch/dense, converted"  # masked modules without a mask
Tensors = list[Tensor]
Make = Callable[[nn.Module], nn.Module]


class Networks:
    """A plain network, its images, and the inputs of `measure`: one set, which is itself."""

    def __init__(self, name: str, shape: tuple[int, ...], device: torch.device) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.plain = models.build(name, {"inputs": shape[1]})
            for weight in (p.data for p in self.plain.parameters() if p.dim() > 1):
                weight.normal_(std=weight[0].numel() ** -0.5)  # with tails: no layer dies
            self.x = torch.randn(shape)
            self.target = torch.randint(0, 10, shape[:1])
        self.plain.to(device, memory_format=torch.channels_last).train()
        self.x = self.x.to(device, memory_format=torch.channels_last)
        self.target = self.target.to(device)
        self.device, self.sets = device, [self]
        self.gates: dict[str, Rounding] = {}  # by pattern
        shapes = tuple(tuple(p.shape) for p in self.plain.parameters())
        size = "x".join(map(str, shape[2:]))
        self.case = Case(f"{name}, {shape[0]} images of {size}", shapes)

    def first(self) -> int:
        return 0

    next = first

    def loss(self, model: nn.Module, exact: bool = False) -> tuple[Tensor, Tensor]:
        """(loss, logits); on a GPU in bf16 with fp32 weights, unless `exact`."""
        bf16 = self.device.type == "cuda" and not exact
        with torch.autocast("cuda", torch.bfloat16) if bf16 else nullcontext():
            logits = model(self.x.to(next(model.parameters()).dtype))
        return F.cross_entropy(logits, self.target), logits


def watched(model: nn.Module) -> Tensors:
    """Gradients that the gate looks at: of five weights, from the first layer to the last."""
    parameters = [p for p in model.parameters() if p.dim() > 1]
    return [parameters[i].grad for i in places(len(parameters), 5, torch.device("cpu")).tolist()]


def _gate(networks: Networks, makes: Iterable[Make]) -> Rounding:
    """The plain network as each of `makes` prunes it, added up, against itself in float64.

    On a GPU in float32, which takes less memory: there the other one is in bfloat16.
    """
    gpu = networks.device.type == "cuda"
    exact = copy.deepcopy(networks.plain).to(torch.float32 if gpu else torch.float64)
    results = []
    for plain, wide in ((networks.plain, False), (exact, True)):
        passes = []
        for make in makes:
            model = make(plain)
            with exactly():
                loss, logits = networks.loss(model, wide)
                loss.backward()
            passes.append([logits.detach(), *watched(model)])
        results.append([torch.stack(same).sum(0) for same in zip(*passes, strict=True)])
    return Rounding(*results, torch.bfloat16 if gpu else torch.float32, norm=2)


def _pruned(plain: nn.Module, pattern: str) -> tuple[nn.Module, Make]:
    """The network with our masks, and what prunes a plain one alike by torch's prune."""
    ours = prune_(convert(copy.deepcopy(plain), channels_last=True), pattern)
    masked = masked_layers(ours)
    masks = {name: like_weight(m.mask, m.weight) for name, m in masked.items() if m.masked}
    names = {module: name for name, module in ours.named_modules()}
    live = {names[norm]: norm.live for norm, _ in followers(ours, masked) if norm.masked}
    return ours, lambda model: pruned_network(model, masks, live)


def network_group(
    networks: Networks, pattern: str, whole: bool
) -> tuple[Group, dict[str, Callable[[], int]]]:
    """A training step of the network: plain, converted, with a mask, under torch's prune.

    `whole`: with the optimizer's step, else forward, loss and backward.
    """
    plain = networks.plain
    ours, pruned = _pruned(plain, pattern)
    found = {
        "ours/module": ours,
        PREMASKED: copy.deepcopy(ours),
        CONVERTED: convert(copy.deepcopy(plain), channels_last=True),
        DENSE: copy.deepcopy(plain),
        PRUNE: pruned(plain),
    }
    for key, make in ((pattern, pruned), ("", copy.deepcopy)):
        if key not in networks.gates:
            networks.gates[key] = _gate(networks, [make])

    def around(model: nn.Module) -> AbstractContextManager:
        return premasked(model, keep=True) if model is found[PREMASKED] else nullcontext()

    def bind(model: nn.Module) -> Callable:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

        def step() -> tuple[nn.Module, Tensor]:
            with around(model):
                loss, logits = networks.loss(model)
            loss.backward()
            if whole:
                optimizer.step()
            return model, logits

        def reset() -> None:
            optimizer.zero_grad()

        return lambda _: Bound(step, reset)

    def memory(model: nn.Module) -> int:
        def forward() -> Tensor:
            with around(model):
                return networks.loss(model)[0]

        model.zero_grad()
        if networks.device.type == "cuda":
            return peak_bytes(lambda: forward().backward() or model.zero_grad())
        return saved_bytes(forward, list(model.parameters()))

    def impl(name: str, model: nn.Module) -> Impl:
        kind = Dense if name in (DENSE, CONVERTED) else list
        result = lambda out: kind([out[1].detach(), *watched(out[0])])  # noqa: E731
        return Impl(name, bind(model), result, graph=False)

    impls = [impl(name, model) for name, model in found.items()]
    memories = {name: lambda model=model: memory(model) for name, model in found.items()}
    setting = f"{pattern}, {'step with SGD' if whole else 'forward and backward'}"
    size = sum(p.numel() * p.element_size() for p in plain.parameters())

    def gate(out: Tensors) -> Verdict:
        return networks.gates["" if isinstance(out, Dense) else pattern](out)

    group = Group("network", setting, impls, gate, size, weights=size // 4)
    return group, {} if whole else memories


def loop_group(networks: Networks, patterns: tuple[str, ...]) -> tuple[Group, dict]:
    """A step of co-training: a pass of the dense network and of a subnet per pattern, whose
    gradients add up, then SGD; against as many passes of the plain network."""
    plain, count = networks.plain, 1 + len(patterns)
    model = convert(copy.deepcopy(plain), channels_last=True)
    cocktail = Cocktail(model)
    for pattern in patterns:
        cocktail.add(pattern)
    pruned = [_pruned(plain, pattern)[1] for pattern in patterns]
    gates = {
        list: _gate(networks, [copy.deepcopy, *pruned]),
        Dense: _gate(networks, [copy.deepcopy] * count),
    }

    def subnets(kept: bool) -> Iterable[AbstractContextManager]:
        for name in cocktail.subnets:
            cocktail.activate(name)
            yield premasked(cocktail.layers.values(), keep=True) if kept else nullcontext()

    def impl(name: str, model: nn.Module, passes: Callable[[], Iterable], kind: type) -> Impl:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

        def step() -> list[Tensor]:
            logits = []
            for around in passes():
                with around:
                    loss, found = networks.loss(model)
                loss.backward()
                logits.append(found.detach())
            optimizer.step()
            return logits

        def result(logits: list[Tensor]) -> Tensors:
            return kind([torch.stack(logits).sum(0), *watched(model)])

        return Impl(name, lambda _: Bound(step, optimizer.zero_grad), result, graph=False)

    impls = [
        impl("ours/module", model, lambda: subnets(False), list),
        impl(PREMASKED, model, lambda: subnets(True), list),
        impl(DENSE, copy.deepcopy(plain), lambda: [nullcontext()] * count, Dense),
    ]
    size = sum(p.numel() * p.element_size() for p in plain.parameters())
    setting = f"dense, {', '.join(patterns)} in turn, step with SGD"
    group = Group(
        "network", setting, impls, lambda out: gates[type(out)](out), size, weights=size // 4
    )
    return group, {}
