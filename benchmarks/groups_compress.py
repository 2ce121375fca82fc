"""Groups of `bench_nm.py`: weights are compressed, decompressed, and packed for tensor cores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from sparse_cocktail import ops, reference_nm

from gates import Verdict, as_bits  # isort: skip - neighbours, not packages
from groups_masks import _limits, our_name  # isort: skip
from peers_nm import NotHere, Way, compress_ways, decompress_ways  # isort: skip
from peers_nm import dense_of, pack_ways  # isort: skip
from shapes import CASES, Case, Weights, like_weight  # isort: skip
from timing import REFERENCE, Group, Impl  # isort: skip

__all__ = ["SHORT", "compress_cases", "makers"]

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
RAW = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def compress_cases(quick: bool) -> list[Case]:
    """Weights that are compressed: two linear layers, and the convolutions of ResNet-50."""
    if quick:
        return [Case("small", ((16, 8, 3, 3), (24, 40, 1, 1))), Case("small linear", ((64, 256),))]
    convolutions = [s for s in CASES["resnet50"].shapes if len(s) == 4 and s[1] % 8 == 0]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        end = "" if dtype == torch.float32 else "-bf16"
        found += [
            Case(f"4096x4096{end}", ((4096, 4096),), dtype=dtype),
            Case(f"11008x4096{end}", ((11008, 4096),), dtype=dtype),
            Case(f"resnet50{end}", tuple(convolutions), dtype=dtype),
        ]
    return found


class _SameBits:
    """A gate: values and masks equal the reference in every bit."""

    def __init__(self, expected: Sequence[Tensor]) -> None:
        self.expected = expected

    def __call__(self, result: Sequence[Tensor]) -> Verdict:
        if len(result) != len(self.expected):
            return Verdict(math.inf, says=f"{len(result)} tensors, not {len(self.expected)}")
        wrong = 0
        for got, want in zip(result, self.expected, strict=True):
            got = as_bits(got)
            if got.dtype != want.dtype or got.shape != want.shape:
                return Verdict(math.inf, says=f"{got.dtype} of shape {tuple(got.shape)}")
            if got.dtype in RAW:
                got, want = got.view(RAW[got.dtype]), want.view(RAW[want.dtype])
            wrong += 0 if torch.equal(got, want) else int((got != want).sum())
        return Verdict(wrong, says="" if wrong == 0 else f"{wrong} elements differ")


def _flat(results: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [tensor for result in results for tensor in result]


def _references(weights: Weights, n: int, m: int) -> list[tuple[Tensor, Tensor]]:
    """(values, bits) of each weight, by the definition; kept for all groups of these weights."""
    if (n, m) not in weights.memo:
        found = [reference_nm.nm_compress(w, n, m) for w in weights.tensors]
        weights.memo[n, m] = found
    return weights.memo[n, m]


def _ours(op: str, bind: Callable, device: torch.device, result: Callable) -> list[Impl]:
    """The op as dispatched; what computes it where that is the reference."""
    name = our_name(op, device)
    return [Impl(name or REFERENCE, bind, result, few=0 if name else 3)]


def compress(n: int, m: int, dtype: torch.dtype, weights: Weights) -> Group:
    own = weights.case.dtype

    def bind(run: Callable, given: Weights) -> Callable:
        return lambda: [run(w) for w in given.tensors]

    ours = partial(bind, lambda w: ops.nm_compress(w, n, m, None, dtype))
    impls = _ours("nm_compress", ours, weights.device, _flat)
    for name, way in compress_ways(m).items():
        run = lambda w, way=way: way(w, n, m, dtype)  # noqa: E731
        impls.append(Impl(name, partial(bind, run), _flat, note="bool mask", few=3))
    expected = _flat((v.to(dtype), b) for v, b in _references(weights, n, m))
    moved = weights.case.numel * (own.itemsize + n / m * dtype.itemsize + 1 / 8)
    setting = f"{n}:{m}, {SHORT[own]} to {SHORT[dtype]}"
    return Group("nm_compress", setting, [*impls, *_limits()], _SameBits(expected), moved)


def decompress(n: int, m: int, weights: Weights) -> Group:
    def made(given: Weights) -> list[tuple]:
        return [(*ops.nm_compress(w, n, m), n, m, w.shape) for w in given.tensors]

    def ours(given: Weights) -> Callable:
        arguments = made(given)
        return lambda: [ops.nm_decompress(*each) for each in arguments]

    def other(name: str, given: Weights) -> Callable:
        calls = []
        for (values, bits, *_), weight in zip(made(given), given.tensors, strict=True):
            mask = like_weight(ops.unpack_mask(bits, weight.shape), weight)
            calls.append(decompress_ways(values, mask, n, m)[name])
        return lambda: [call() for call in calls]

    impls = _ours("nm_decompress", ours, weights.device, list)
    note = "masks or places ready beforehand, not packed"
    for name in ("torch/scatter", "torch/masked_scatter"):
        impls.append(Impl(name, partial(other, name), note=note, few=3))
    pairs = zip(_references(weights, n, m), weights.tensors, strict=True)
    expected = [reference_nm.nm_decompress(*both, n, m, w.shape) for both, w in pairs]
    size = weights.case.dtype.itemsize
    moved = weights.case.numel * (size + n / m * size + 1 / 8)
    setting = f"{n}:{m}, {SHORT[weights.case.dtype]}"
    return Group("nm_decompress", setting, [*impls, *_limits()], _SameBits(expected), moved)


class _PackGate:
    """Ours equal the packed reference bit by bit; what torch packed has the same dense weight."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        (weight,) = weights.tensors
        self.packed = _SameBits(reference_nm.nm_pack_weight(weight, None, dtype))
        values, bits = _references(weights, 2, 4)[0]
        self.dense = reference_nm.nm_decompress(values.to(dtype), bits, 2, 4, weight.shape)

    def __call__(self, result: list) -> Verdict:
        kind, found = result
        if kind == "ours":
            return self.packed(found)
        dense = dense_of(found)
        if dense is None:
            return Verdict(0.0)
        wrong = int((dense != self.dense).sum())
        return Verdict(wrong, says="" if wrong == 0 else f"{wrong} weights differ")


def pack(dtype: torch.dtype, weights: Weights) -> Group:
    """nm_pack_weight of a case with one linear weight."""

    def ours(given: Weights) -> Callable:
        (weight,) = given.tensors
        return lambda: ops.nm_pack_weight(weight, None, dtype)

    def other(way: Way, given: Weights) -> Callable:
        if way.missing:
            raise NotHere(way.missing)
        (weight,) = given.tensors
        mask = ops.unpack_mask(ops.nm_mask(weight, 2, 4), weight.shape)
        return way.build(weight, mask, dtype)

    impls = _ours("nm_pack_weight", ours, weights.device, lambda out: ["ours", out])
    for way in pack_ways(weights.device):
        bind, result = partial(other, way), lambda out: ["torch", out]
        impls.append(Impl(way.name, bind, result, way.graph and not way.missing, way.note, few=3))
    own, gate = weights.case.dtype, _PackGate(weights, dtype)
    moved = weights.case.numel * (own.itemsize + dtype.itemsize / 2 + 1 / 8)
    setting = f"2:4, {SHORT[own]} to {SHORT[dtype]}"
    return Group("nm_pack_weight", setting, [*impls, *_limits()], gate, moved)


def makers(case: Case) -> list[Callable[[Weights], Group]]:
    """The groups of one case, in the order of running."""
    own, half = case.dtype, torch.bfloat16
    made = [partial(compress, 2, 4, own)]
    if own != half:
        made.append(partial(compress, 2, 4, half))
    if case.name.startswith(("4096x4096", "small")):  # a pattern more
        made.append(partial(compress, 4, 8, own))
    made.append(partial(decompress, 2, 4))
    if len(case.shapes) == 1:
        made.append(partial(pack, half))
    return made
