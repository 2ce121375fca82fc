"""The groups of `bench_masks.py`: what runs ours, the reference, the peers, and which gate."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_cocktail import ops, reference
from sparse_cocktail.bank import MaskBank
from sparse_cocktail.ops.dispatch import chosen
from sparse_cocktail.reference import block_count

import gates  # isort: skip - neighbours, not packages
import peers_masks as peers  # isort: skip
from selecting import keep_count, within  # isort: skip
from shapes import Weights  # isort: skip
from timing import COPY, READ_PASS, REFERENCE, Bound, Group, Impl  # isort: skip

__all__ = ["GROWTH", "makers"]

GROWTH = ("1e4", "1e5", "1e6", "1e7", "1e8", "1e9")
REFERENCE_LIMIT = 3e7  # weights above which results are proven exact without the reference
BETA, NM, DENSITY, EARLIER = 0.8, (2, 4), 0.5, 0.25  # of unified masks; EARLIER: share within
RATIOS = ((1, 2), (2, 4), (4, 8), (1, 4), (2, 8))
BLOCK = (16, 16)

Maker = Callable[[Weights], Group]


# ---- ours ----------------------------------------------------------------------------------------


def our_name(op: str, device: torch.device) -> str | None:
    """Name of the implementation that an op has on a device; None where it is the reference."""
    backend = chosen(op, device)
    if backend == "reference":
        return None
    level = getattr(ops, "cpu_level", lambda: "")() if backend == "cpp" else ""
    return f"ours/{backend}-{level}" if level else f"ours/{backend}"


def _limits() -> list[Impl]:
    def copy(given: Weights):
        target = torch.empty_like(given.flat)
        return lambda: target.copy_(given.flat)

    def read(given: Weights):  # the bytes as float32: a sum of bfloat16 is bound by conversion
        words = given.flat.view(torch.float32)
        return lambda: words.sum()

    return [Impl(READ_PASS, read), Impl(COPY, copy)]


def _ours(
    op: str, bind: Callable, device: torch.device, oracle: bool, result: Callable = list
) -> list[Impl]:
    """The op as dispatched, and as the reference computes it where that is wanted or all there is.

    `bind(weights)` returns the call, of whatever backend is in force.
    """

    def slow(given: Weights):
        bound = bind(given)
        call = getattr(bound, "call", bound)

        def forced():
            with ops.backend("reference"):
                return call()

        if call is not bound:
            bound.call = forced
            return bound
        return forced

    name = our_name(op, device)
    # on a GPU functional ops upload a table of addresses, which a graph cannot capture
    uploads = device.type == "cuda" and op not in ("unpack_mask", "mask_count")
    made = [Impl(name, bind, result, graph=not uploads)] if name else []
    if oracle or not name:
        made.append(Impl(REFERENCE, slow, result, graph=False, few=3))
    return made


def _in_bank(op: str, fill: Callable, device: torch.device) -> list[Impl]:
    """MaskBank's form in place. `fill(weights)` returns (bank, call, rows, how it is bound)."""
    name = our_name(op, device)
    if not name:
        return []

    def bind(given: Weights):
        bank, call, rows, bound = fill(given)

        def run() -> list[Tensor]:
            call()
            return [bits for row in rows for bits in bank.views(row)]

        return run if bound is None else bound(run)

    return [Impl(f"{name} bank", bind, note="a row of MaskBank, in place")]


def _count(value: int | list[int], given: Weights) -> Tensor:
    return torch.tensor(value, dtype=torch.int64, device=given.device)


# ---- groups of implementations -------------------------------------------------------------------


def topk(share: float, every: bool, oracle: bool) -> Maker:
    def make(weights: Weights) -> Group:
        keep, device = keep_count(weights, share), weights.device

        def bind(given: Weights):
            return lambda: ops.topk_masks(given.tensors, keep)

        def fill(given: Weights):
            bank, count = MaskBank(given.tensors), _count(keep, given)
            row = bank.add()
            return bank, lambda: bank.topk_(row, count), (row,), None

        impls = [
            *_ours("topk_masks", bind, device, oracle),
            *_in_bank("topk_row_", fill, device),
            *peers.topk_peers(weights, keep, every),
            *_limits(),
        ]
        if weights.case.numel <= REFERENCE_LIMIT:
            gate = gates.equals(reference.topk_masks(weights.tensors, [keep]))
        else:
            gate = gates.proven(lambda out: gates.exact_topk(weights.tensors, out, keep))

        floor = weights.case.bytes + weights.case.numel / 8
        return Group("topk_masks", f"keep {100 * share:g} %", impls, gate, floor)

    return make


def nm(n: int, m: int, every: bool, oracle: bool) -> Maker:
    def make(weights: Weights) -> Group:
        places, device = weights.divisible(m), weights.device
        tensors = [weights.tensors[i] for i in places]
        count = sum(t.numel() for t in tensors)

        def bind(given: Weights):
            chosen_ones = [given.tensors[i] for i in places]
            return lambda: [ops.nm_mask(w, n, m) for w in chosen_ones]

        def fill(given: Weights):
            bank = MaskBank([given.tensors[i] for i in places])
            row = bank.add()
            return bank, lambda: bank.nm_(row, n, m), (row,), None

        impls = [
            *_ours("nm_mask", bind, device, oracle),
            *_in_bank("nm_row_", fill, device),
            *peers.nm_peers(weights, n, m, every),
            *_limits(),
        ]
        floor = count * (weights.case.dtype.itemsize + 1 / 8)
        if weights.case.numel <= REFERENCE_LIMIT:
            gate = gates.equals([reference.nm_mask(t, n, m) for t in tensors])
        else:
            gate = gates.proven(lambda out: gates.exact_nm(tensors, out, n, m))

        return Group("nm_mask", f"{n}:{m}", impls, gate, floor, weights=count)

    return make


def unified(nested: bool, every: bool, oracle: bool) -> Maker:
    def make(weights: Weights) -> Group:
        case, tensors, device = weights.case, weights.tensors, weights.device
        earlier = round(EARLIER * case.numel) if nested else None
        keep = keep_count(weights, 0.2, earlier)
        channels = [max(1, math.floor(DENSITY * shape[0] + 0.5)) for shape in case.shapes]
        arguments = (keep, NM, channels, BETA)

        def bind(given: Weights):
            before = within(given, earlier) if nested else None
            bits = before.bits if nested else None

            def call():
                return ops.unified_masks(given.tensors, *arguments, bits)

            return before.bound(call) if nested else call

        def fill(given: Weights):
            bank = MaskBank(given.tensors)
            rows = (bank.add(), bank.add(), bank.add())
            before = within(given, earlier) if nested else None
            old = bank.add(before.bits) if nested else None
            count, channel_count = _count(keep, given), _count(channels, given)

            def call() -> None:
                bank.unified_(rows, count, NM, channel_count, BETA, old)

            def bound(run: Callable) -> Bound:
                return before.bound(run, lambda: bank.set_(old, before.bits))

            return bank, call, rows, bound if nested else None

        def flat(out) -> list[Tensor]:
            return [bits for masks in out for bits in masks]

        impls = [
            *_ours("unified_masks", bind, device, oracle, flat),
            *_in_bank("unified_rows_", fill, device),
            *peers.unified_peers(weights, arguments, earlier, every),
            *_limits(),
        ]
        bits = within(weights, earlier).bits if nested else None
        if case.numel <= REFERENCE_LIMIT:
            gate = gates.equals(flat(reference.unified_masks(tensors, *arguments, bits, None)))
        else:
            gate = gates.proven(lambda out: gates.exact_unified(tensors, out, *arguments, bits))

        floor = case.bytes + case.numel * (4 if nested else 3) / 8
        setting = "keep 20 %, 2:4, channels 50 %" + (", within 25 %" if nested else "")
        return Group("unified_masks", setting, impls, gate, floor)

    return make


def blocks(oracle: bool) -> Maker:
    def make(weights: Weights) -> Group:
        rows, cols = BLOCK
        places = [
            i for i, w in enumerate(weights.tensors) if w.shape[0] % rows + w.shape[1] % cols == 0
        ]
        tensors = [weights.tensors[i] for i in places]
        keep = sum(block_count(t.shape, BLOCK) for t in tensors) // 5
        count = sum(t.numel() for t in tensors)

        def bind(given: Weights):
            chosen_ones = [given.tensors[i] for i in places]
            return lambda: ops.block_masks(chosen_ones, keep, BLOCK)

        impls = [
            *_ours("block_masks", bind, weights.device, oracle),
            *peers.block_peers(weights, places, keep, BLOCK),
            *_limits(),
        ]
        gate = gates.equals(reference.block_masks(tensors, [keep], BLOCK))
        floor = count * (weights.case.dtype.itemsize + 1 / 8)
        return Group("block_masks", "16x16, keep 20 %", impls, gate, floor, weights=count)

    return make


def masked(dtype: torch.dtype | None, oracle: bool) -> Maker:
    def make(weights: Weights) -> Group:
        case, own = weights.case, weights.case.dtype
        bits = ops.topk_masks(weights.tensors, round(0.2 * case.numel))
        target = dtype or own

        def bind(given: Weights):
            masks = [b.clone() for b in bits]
            return lambda: ops.masked_weights(given.tensors, masks, dtype)

        pairs = zip(weights.tensors, bits, strict=True)
        gate = gates.same_values([reference.masked_weight(w, b, dtype) for w, b in pairs])
        impls = [
            *_ours("masked_weights", bind, weights.device, oracle),
            *peers.masked_peers(bits, target, cast=target != own),
            *_limits(),
        ]
        floor = case.bytes + case.numel * (1 / 8 + target.itemsize)
        short = {torch.float32: "fp32", torch.bfloat16: "bf16"}
        setting = short[own] if target == own else f"{short[own]} to {short[target]}"
        return Group("masked_weights", f"keep 20 %, {setting}", impls, gate, floor)

    return make


def packing(op: str) -> Maker:
    """pack_mask, unpack_mask or mask_count over the linear layers whose `in` is whole words."""

    def make(weights: Weights) -> Group:
        linear = [w for w in weights.tensors if w.dim() == 2 and w.shape[1] % 32 == 0]
        masks = [w.abs() > w.abs().mean() for w in linear]
        bits = [gates.as_bits(mask) for mask in masks]
        result: Callable = list
        given, call, gate = {
            "pack_mask": (masks, ops.pack_mask, gates.equals(bits)),
            "unpack_mask": (bits, None, gates.same_values(masks)),
            "mask_count": (bits, ops.mask_count, None),
        }[op]
        if op == "mask_count":
            result = lambda out: [torch.stack(list(out))]  # noqa: E731
            gate = gates.same_values([torch.stack([mask.sum() for mask in masks])])

        def bind(_: Weights):
            own = [g.clone() for g in given]
            if op == "unpack_mask":
                shapes = [m.shape for m in masks]
                return lambda: [ops.unpack_mask(*each) for each in zip(own, shapes, strict=True)]
            return lambda: [call(g) for g in own]

        impls = [
            *_ours(op, bind, weights.device, True, result),
            *peers.pack_peers(op, masks),
            *_limits(),
        ]
        count = sum(m.numel() for m in masks)
        floor = count / 8 if op == "mask_count" else count * 9 / 8
        return Group(op, "linear layers", impls, gate, floor, weights=count)

    return make


def makers(case: str) -> list[tuple[str, Maker]]:
    """(op, maker) of every group of a case, in the order of running."""
    full, vit, bf16 = case in ("resnet50", "small"), case == "vit-b16", case == "resnet50-bf16"
    made = [("unified_masks", unified(False, case not in GROWTH, full))]
    if full:
        made.append(("unified_masks", unified(True, True, False)))
    for share in (0.05, 0.2, 0.5) if full else (0.2,):
        made.append(("topk_masks", topk(share, full and share == 0.2, full and share == 0.2)))
    if case in GROWTH and case not in ("1e8", "1e9"):
        return made
    for n, m in RATIOS if full else (NM,):
        made.append(("nm_mask", nm(n, m, full, full and (n, m) == NM)))
    for dtype in (None,) if bf16 else (None, torch.bfloat16):
        made.append(("masked_weights", masked(dtype, full)))
    if full or vit:
        made.append(("block_masks", blocks(full)))
    if vit or case == "small":
        made += [(op, packing(op)) for op in ("pack_mask", "unpack_mask", "mask_count")]
    return made
