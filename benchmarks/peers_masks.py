"""What the mask ops are measured against: plain torch and numpy, each written in its best form.

Peers give bool masks in the shape of their weights (a view where a copy is not needed); channels of
a mask may be a broadcast view. Weights are read in memory order where the order does not matter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparse_cocktail.reference import bits_shape, weight_view

from selecting import bools, flat, magnitudes, unflat, with_mask  # isort: skip - neighbours
from shapes import Weights  # isort: skip
from timing import Bound, Impl  # isort: skip

__all__ = [
    "block_peers",
    "masked_peers",
    "nm_peers",
    "pack_peers",
    "topk_peers",
    "unified_peers",
]

KTHVALUE_LIMIT = 150_000_000  # on a GPU it runs in one block: 0.7 s at 1e8 weights


# ---- top-k ---------------------------------------------------------------------------------------


def _topk_scatter(weights: Sequence[Tensor], keep: int, within=None) -> list[Tensor]:
    scores = magnitudes(weights, within)
    places = torch.topk(scores, keep, sorted=False).indices
    mask = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, places, True)
    return unflat(mask, weights)


def _kthvalue(weights: Sequence[Tensor], keep: int, within=None) -> list[Tensor]:
    scores = magnitudes(weights, within)
    threshold = torch.kthvalue(scores, scores.numel() - keep + 1).values
    return unflat(scores >= threshold, weights)


def _topk_threshold(weights: Sequence[Tensor], keep: int, within=None) -> list[Tensor]:
    scores = magnitudes(weights, within)
    threshold = torch.topk(scores, keep, sorted=False).values.min()
    return unflat(scores >= threshold, weights)


def _partition(weights: Sequence[Tensor], keep: int) -> list[Tensor]:
    scores = np.concatenate([flat(w).numpy() for w in weights])
    np.abs(scores, out=scores)
    place = scores.size - keep
    threshold = np.partition(scores, place)[place]
    return unflat(torch.from_numpy(scores >= threshold), weights)


def _global_unstructured(keep: int) -> Callable[[Weights], Bound]:
    """torch.nn.utils.prune on modules with contiguous weights: it refuses channels_last ones."""

    def bind(weights: Weights) -> Bound:
        modules = [nn.Module() for _ in weights.tensors]
        pruned = weights.case.numel - keep

        def reset() -> None:
            for module, weight in zip(modules, weights.tensors, strict=True):
                for hook in list(module._forward_pre_hooks):
                    del module._forward_pre_hooks[hook]
                module._parameters.clear()
                module._buffers.clear()
                module.__dict__.pop("weight", None)
                values = weight.clone(memory_format=torch.contiguous_format)
                module.weight = nn.Parameter(values)

        def call() -> list[nn.Module]:
            names = [(module, "weight") for module in modules]
            prune.global_unstructured(names, prune.L1Unstructured, amount=pruned)
            return modules

        return Bound(call, reset)

    return bind


def topk_peers(weights: Weights, keep: int, every: bool = True) -> list[Impl]:
    """Peers of `topk_masks`. Not `every`: without the slow ones."""

    def impl(name: str, select: Callable) -> Impl:
        return Impl(name, with_mask(lambda tensors, _: select(tensors, keep), None))

    gpu = weights.device.type == "cuda"
    peers = [
        impl("torch/topk", _topk_scatter),
        impl("torch/topk threshold", _topk_threshold),
    ]
    if not gpu or (every and weights.case.numel < KTHVALUE_LIMIT):
        peers.append(impl("torch/kthvalue", _kthvalue))
    if every:
        peers.append(
            Impl(
                "torch/prune.global_unstructured",
                _global_unstructured(keep),
                lambda modules: [m.weight_mask.bool() for m in modules],
                graph=False,
                note="contiguous copies of the weights, made beforehand",
            )
        )
    if not gpu and weights.case.dtype == torch.float32:
        peers.append(impl("numpy/partition", _partition))
    return peers


# ---- N:M -----------------------------------------------------------------------------------------


def _groups(weight: Tensor, m: int) -> Tensor:
    """|w| as (out, taps, in / m, m): groups of m along `in`."""
    return weight_view(weight).abs().unflatten(-1, (-1, m))


def _of_groups(mask: Tensor, weight: Tensor) -> Tensor:
    """A mask of groups in the weight's shape, as a view."""
    view = mask.flatten(-2)  # (out, taps, in)
    if weight.dim() == 2:
        return view.squeeze(1)
    return view.transpose(1, 2).unflatten(2, weight.shape[2:])


def _nm_topk(weight: Tensor, n: int, m: int) -> Tensor:
    groups = _groups(weight, m)
    places = groups.topk(n, dim=-1, sorted=False).indices
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, places, True)
    return _of_groups(mask, weight)


def _nm_argsort(weight: Tensor, n: int, m: int) -> Tensor:
    groups = _groups(weight, m)
    places = groups.argsort(dim=-1, descending=True)[..., :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, places, True)
    return _of_groups(mask, weight)


def _nm_compare(weight: Tensor, n: int, m: int) -> Tensor:
    """Rank of each element by comparing it with the others of its group; ties to the lower one."""
    parts = _groups(weight, m).unbind(-1)
    ranks = [torch.zeros_like(parts[0], dtype=torch.int8) for _ in parts]
    for i, j in itertools.combinations(range(m), 2):
        larger = parts[i] >= parts[j]
        ranks[j] += larger
        ranks[i] += ~larger
    return _of_groups(torch.stack([rank < n for rank in ranks], -1), weight)


def _patterns(n: int, m: int, device: torch.device) -> Tensor:
    """All choices of n of m as rows of a bool matrix; 6 for 2:4."""
    rows = [[i in chosen for i in range(m)] for chosen in itertools.combinations(range(m), n)]
    return torch.tensor(rows, device=device)


def _nm_patterns(weight: Tensor, patterns: Tensor, m: int) -> Tensor:
    """As in ASP: the pattern with the largest sum of |w|, by one product with all patterns."""
    groups = _groups(weight, m)
    best = (groups @ patterns.T.to(groups.dtype)).argmax(-1)
    return _of_groups(patterns[best], weight)


def nm_peers(weights: Weights, n: int, m: int, every: bool = True) -> list[Impl]:
    """Peers of `nm_mask` over all layers with in % m == 0."""
    places = weights.divisible(m)

    def impl(name: str, select: Callable, *arguments) -> Impl:
        def bind(given: Weights):
            tensors = [given.tensors[i] for i in places]
            return lambda: [select(w, *arguments) for w in tensors]

        return Impl(name, bind)

    peers = [impl("torch/topk+scatter", _nm_topk, n, m)]
    if every:
        peers.append(impl("torch/argsort+scatter", _nm_argsort, n, m))
    if m <= 4:
        peers.append(impl("torch/compare", _nm_compare, n, m))
    if (n, m) == (2, 4):
        patterns = _patterns(n, m, weights.device)
        peers.append(impl("torch/patterns (ASP)", _nm_patterns, patterns, m))
        peers[-1].note = "compares rounded sums of two"
    return peers


# ---- unified -------------------------------------------------------------------------------------


def _all(weight: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=weight.device).expand(weight.shape)


def _channels(scores: Tensor, keep: int, weight: Tensor) -> Tensor:
    rows = torch.zeros_like(scores, dtype=torch.bool)
    rows[torch.topk(scores, keep).indices] = True
    return rows.view(-1, *[1] * (weight.dim() - 1)).expand(weight.shape)


def _unified_plain(weights, keep, nm, channel_keep, beta, within=None) -> list[Tensor]:
    """The three steps as a trainer writes them: a layer at a time, masks times weights."""
    scores = magnitudes(weights, within)
    flat = torch.zeros_like(scores, dtype=torch.bool)
    flat[torch.topk(scores, keep).indices] = True
    unstructured = unflat(flat, weights)
    groups = [_nm_topk(w, *nm) if w.shape[1] % nm[1] == 0 else _all(w) for w in weights]
    channel = []
    for w, mu, mn, count in zip(weights, unstructured, groups, channel_keep, strict=True):
        dims = tuple(range(1, w.dim()))
        score = beta * (w * mu).abs().sum(dims) + (1 - beta) * (w * mn).abs().sum(dims)
        channel.append(_channels(score, count, w))
    return [*unstructured, *groups, *channel]


def _unified_tuned(select, select_nm):
    """One threshold, comparisons for N:M, and one weighted sum per channel."""

    def run(weights, keep, nm, channel_keep, beta, within=None) -> list[Tensor]:
        unstructured = select(weights, keep, within)
        groups = [select_nm(w, *nm) if w.shape[1] % nm[1] == 0 else _all(w) for w in weights]
        channel = []
        for w, mu, mn, count in zip(weights, unstructured, groups, channel_keep, strict=True):
            dims = tuple(range(1, w.dim()))
            share = mu * beta
            share += mn * (1 - beta)
            share *= w
            # not vector_norm: its plain sums swap channels that are close
            channel.append(_channels(share.abs_().sum(dims), count, w))
        return [*unstructured, *groups, *channel]

    return run


def unified_peers(
    weights: Weights, arguments: tuple, eligible: int | None = None, every: bool = True
) -> list[Impl]:
    """Peers of `unified_masks`: the three steps in eager torch, tuned, and plain with `every`."""
    gpu = weights.device.type == "cuda"
    select = _topk_threshold if gpu else _kthvalue

    def impl(name: str, run: Callable) -> Impl:
        return Impl(
            name, with_mask(lambda tensors, masks: run(tensors, *arguments, masks), eligible)
        )

    plain = [impl("torch/three steps", _unified_plain)] if every else []
    return [
        *plain,
        impl("torch/three steps, tuned", _unified_tuned(select, _nm_compare)),
        impl("torch/three steps, tuned, N:M by topk", _unified_tuned(select, _nm_topk)),
    ]


# ---- blocks, masked weights, packing -------------------------------------------------------------


def block_peers(weights: Weights, places: list[int], keep: int, block: tuple) -> list[Impl]:
    """Peer of `block_masks`: sums of |w| per block, topk over all of them."""
    rows, cols = block

    def select(tensors: list[Tensor]) -> list[Tensor]:
        views = [weight_view(w) for w in tensors]
        tiles = [v.unflatten(2, (-1, cols)).unflatten(0, (-1, rows)) for v in views]
        scores = [t.abs().sum((1, 4)) for t in tiles]  # (out / rows, taps, in / cols)
        flat = torch.cat([s.flatten() for s in scores])
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen[torch.topk(flat, keep, sorted=False).indices] = True
        masks = []
        for part, score, w in zip(
            chosen.split([s.numel() for s in scores]), scores, tensors, strict=True
        ):
            full = part.view(score.shape)[:, None, :, :, None].expand(-1, rows, -1, -1, cols)
            masks.append(full.reshape(w.shape[0], -1, w.shape[1]).transpose(1, 2).reshape(w.shape))
        return masks

    def bind(given: Weights):
        tensors = [given.tensors[i] for i in places]
        return lambda: select(tensors)

    return [Impl("torch/block sums + topk", bind)]


def masked_peers(bits: Sequence[Tensor], dtype: torch.dtype, cast: bool) -> list[Impl]:
    """Peers of `masked_weights`: bool or floating-point masks, which they hold ready."""

    def impl(name: str, product: Callable, **how) -> Impl:
        def bind(given: Weights):
            tensors, masks = given.tensors, bools(bits, given.tensors)
            return lambda: [product(w, m) for w, m in zip(tensors, masks, strict=True)]

        return Impl(name, bind, **how)

    def foreach(given: Weights):
        masks = [m.to(dtype) for m in bools(bits, given.tensors)]
        return lambda: torch._foreach_mul(given.tensors, masks)

    peers = [
        impl("torch/w*m", lambda w, m: (w * m).to(dtype)),
        impl("torch/where", lambda w, m: torch.where(m, w, 0.0).to(dtype)),
    ]
    if not cast:
        note = "masks in the weights' dtype, which are more bytes to read"
        peers.append(Impl("torch/foreach_mul", foreach, note=note))
    return peers


def pack_peers(op: str, masks: list[Tensor]) -> list[Impl]:
    """numpy's ways to pack, unpack and count masks (linear layers whose `in` is whole words)."""
    if masks[0].is_cuda or any(m.dim() != 2 or m.shape[1] % 32 for m in masks):
        return []

    def impl(name: str, ready: Callable, call: Callable, result: Callable) -> Impl:
        def bind(given: Weights):
            arrays = [ready(m) for m in masks]  # fresh ones for each set of inputs
            return lambda: [call(a) for a in arrays]

        return Impl(name, bind, result, note="one thread")

    def pack(mask: np.ndarray) -> np.ndarray:
        return np.packbits(mask, axis=1, bitorder="little")

    def to_bits(out: list[np.ndarray]) -> list[Tensor]:
        words = [torch.from_numpy(p.view(np.int32)) for p in out]
        return [w.view(bits_shape(m.shape)) for w, m in zip(words, masks, strict=True)]

    return {
        "pack_mask": [impl("numpy/packbits", lambda m: m.numpy().copy(), pack, to_bits)],
        "unpack_mask": [
            impl(
                "numpy/unpackbits",
                lambda m: pack(m.numpy()),
                lambda p: np.unpackbits(p, axis=1, bitorder="little"),
                lambda out: [torch.from_numpy(a).bool() for a in out],
            )
        ],
        "mask_count": [
            impl(
                "numpy/bitwise_count",
                lambda m: pack(m.numpy()).view(np.uint64),
                lambda p: int(np.bitwise_count(p).sum()),
                lambda out: [torch.tensor(out)],
            )
        ],
    }[op]
