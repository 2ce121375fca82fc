"""Exact global top-k over the processes of a group: they exchange counts, not weights.

A radix select. Every rank counts its elements by one 16-bit digit of their integer keys, the sum of
these histograms over the ranks says which digit the k-th largest key has, and the next round looks
at the keys that share it. After one round (16-bit dtypes), two (float32) or four (float64) each
rank knows how many of its own elements are kept: all above the threshold, and its share of the
ties. `ops.topk_masks` of that many is then its part of the mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops
from .ops.checks import as_list, check_weights, whole
from .ops.masks import check_within
from .reference import WORD, bits_shape

__all__ = ["global_topk"]

PLACEMENTS = ("replicate", "shard")
DIGIT = 16  # bits: 512 KiB of int64 counts to all-reduce per round, and few rounds
KEYS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of the dtype
# Elements whose keys are made at a time, which bounds the temporary memory to a few times this.
# Large against the 65,536 counts that every chunk adds; on a CPU its keys stay in the cache (one
# core, 10M float32: 39 ms with 2^18, 56 ms with 2^16, 75 ms with 2^20).
CHUNK = {"cpu": 2**18, "cuda": 2**24}


def global_topk(
    weights: Sequence[Tensor],
    keep: int,
    group: dist.ProcessGroup | None = None,
    placement: str = "replicate",
    within: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Bits that keep exactly the `keep` largest |value| over all ranks: those of `ops.topk_masks`.

    Every rank of the group calls this. Without a process group it is `ops.topk_masks`.

    Args:
        weights: tensors (out, in, *taps) of one dtype; those of one rank on one device.
        keep: number of elements, over all weights of all ranks together.
        group: None is the default group.
        placement: "replicate": every rank holds the same weights, as under DDP. The ranks share the
            work, and all return the masks of all weights. Equal values are not verified, and masks
            agree even where they differ. "shard": every rank holds weights of its own, perhaps
            none; they follow each other in the order of the ranks, and each rank returns the masks
            of its own.
        within: bits of the eligible elements; where fewer are eligible, all of them are kept.

    Returns:
        One int32 tensor of bits (out, taps, ceil(in / 32)) per weight of this rank.

    Raises:
        ValueError, TypeError: on every rank alike, also when the arguments of one rank are at fault
            or the ranks disagree about keep, placement, dtype or (replicate) shapes.
    """
    world = dist.get_world_size(group) if dist.is_initialized() else 1
    if world < 1:
        raise ValueError(
            f"global_topk: group does not contain rank {dist.get_rank()} that calls it; only the "
            "ranks of a group take part"
        )
    call, weights, within = _describe(weights, keep, placement, within)
    calls = [call] * world
    if world > 1:
        dist.all_gather_object(calls, call, group)
    _check_calls(calls)
    keep = call["keep"]
    if world == 1:
        return ops.topk_masks(weights, keep, within)
    exchange = _Exchange(calls, weights, group)
    dtype = next((call["dtype"] for call in calls if call["dtype"]), torch.float32)
    if placement == "shard":
        return ops.topk_masks(weights, _share(exchange, weights, keep, within, dtype), within)
    cuts = _cuts([w.shape for w in weights], world)
    own = [(i, slice(*rows)) for i, rows in enumerate(cuts[exchange.rank])]
    parts = [weights[i][rows] for i, rows in own]
    eligible = None if within is None else [within[i][rows] for i, rows in own]
    bits = ops.topk_masks(parts, _share(exchange, parts, keep, eligible, dtype), eligible)
    return _assemble(exchange, bits, weights, cuts)


# ---- what the ranks tell each other first --------------------------------------------------------


def _describe(
    weights, keep, placement, within
) -> tuple[dict[str, Any], list[Tensor], list[Tensor] | None]:
    """What the ranks compare of this one's arguments, and its lists.

    What is wrong with them is part of the description: it has to reach all ranks.
    """
    try:
        if placement not in PLACEMENTS:
            raise ValueError(
                f"global_topk: placement={placement!r} is unknown; use 'replicate' where every "
                "rank holds the same weights, or 'shard' where each holds its own"
            )
        keep = whole("global_topk", "keep", keep)
        weights = as_list("global_topk", "weights", weights)
        check_weights("global_topk", weights)
        weights = [w.detach() for w in weights]
        if within is not None:
            within = as_list("global_topk", "within", within)
            check_within("global_topk", weights, within)
    except Exception as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        return {"problem": (kind, str(error))}, [], None
    call = {
        "problem": None,
        "placement": placement,
        "keep": keep,
        "shapes": [tuple(w.shape) for w in weights],
        "dtype": weights[0].dtype if weights else None,
        "device": weights[0].device.type if weights else None,
        "within": None if within is None else "given",
    }
    return call, weights, within


def _check_calls(calls: list[dict[str, Any]]) -> None:
    """Raise the same error on every rank."""
    for rank, call in enumerate(calls):
        if call["problem"] is not None:
            kind, message = call["problem"]
            raise kind(message if len(calls) == 1 else f"{message} (on rank {rank})")
    holding = [call for call in calls if call["shapes"]]
    rules = [
        ("placement", calls, "every rank passes the same one"),
        ("keep", calls, "every rank passes the count over all ranks together"),
        ("dtype", holding, "convert the weights to one dtype"),
        ("within", holding, "give it on every rank that holds weights, or on none"),
    ]
    if calls[0]["placement"] == "replicate":
        rules.append(("shapes", calls, "use placement='shard' where each rank has its own weights"))
    for name, of, remedy in rules:
        values = [call[name] for call in of]
        others = [value for value in values if value != values[0]]
        if others:
            raise ValueError(
                f"global_topk: {name} differs between the ranks: one has {values[0]}, another "
                f"{others[0]}; {remedy}"
            )
    keep, held = calls[0]["keep"], calls[:1] if calls[0]["placement"] == "replicate" else calls
    total = sum(math.prod(shape) for call in held for shape in call["shapes"])
    if not 0 <= keep <= total:
        raise ValueError(
            f"global_topk: keep={keep} is not in [0, {total}], the number of elements over all "
            "ranks; give a count, for example round(density * total)"
        )


class _Exchange:
    """Sums and gathers over the ranks, on a device that the group can use."""

    def __init__(self, calls: list[dict], weights: list[Tensor], group) -> None:
        self.group, self.world, self.rank = group, len(calls), dist.get_rank(group)
        served = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
        on_gpu = any(call["device"] == "cuda" for call in calls) or "cpu" not in served
        self.device = torch.device("cpu")
        if on_gpu and served.get("cuda") == "nccl":
            own = [w.device for w in weights[:1] if w.is_cuda]
            self.device = (own or [torch.device("cuda", torch.cuda.current_device())])[0]

    def sum(self, counts: Tensor) -> Tensor:
        """The sum over the ranks, on the exchange's device."""
        total = counts.to(self.device, copy=True)
        dist.all_reduce(total, group=self.group)
        return total

    def gather(self, values: Tensor) -> list[Tensor]:
        """What the ranks hold, which is of one shape, in their order."""
        values = values.to(self.device)
        held = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(held, values, self.group)
        return held


# ---- how many of its elements a rank keeps -------------------------------------------------------


def _share(
    exchange: _Exchange,
    weights: list[Tensor],
    keep: int,
    within: list[Tensor] | None,
    dtype: torch.dtype,
) -> int:
    """This rank's part of the `keep` largest elements of all ranks."""
    sure = ties = 0  # own elements above the threshold, and own elements equal to it
    prefix = None  # the digits of the threshold that are known
    for shift in reversed(range(0, 8 * dtype.itemsize, DIGIT)):
        own = _histogram(weights, within, shift, prefix)
        counts = exchange.sum(own)
        at_least = counts.flip(0).cumsum(0).flip(0)  # elements whose digit is this or larger
        if prefix is None and keep >= int(at_least[0]):
            return int(own.sum())  # no more are eligible than are asked for
        if keep == 0:
            return 0
        digit = int((at_least >= keep).sum()) - 1  # of the keep-th largest
        keep -= int(at_least[digit] - counts[digit])
        sure += int(own[digit + 1 :].sum())
        ties = int(own[digit])
        prefix = digit if prefix is None else prefix << DIGIT | digit
    held = exchange.gather(torch.tensor([ties]))
    before = sum(int(count) for count in held[: exchange.rank])
    return sure + min(max(keep - before, 0), ties)


def _histogram(
    weights: list[Tensor], within: list[Tensor] | None, shift: int, prefix: int | None
) -> Tensor:
    """int64 (65536,): eligible elements by the digit at `shift`, of keys that start with prefix."""
    device = weights[0].device if weights else None
    counts = torch.zeros(2**DIGIT, dtype=torch.int64, device=device)
    for i, weight in enumerate(weights):
        for values in _chunks(weight, None if within is None else within[i]):
            keys = _keys(values)
            if prefix is not None:
                keys = keys[keys >> (shift + DIGIT) == prefix] & (2**DIGIT - 1) << shift
            counts += torch.bincount(keys >> shift, minlength=2**DIGIT)
    return counts


def _chunks(weight: Tensor, bits: Tensor | None) -> Iterator[Tensor]:
    """The eligible values of a weight in flat pieces, cut at whole words of mask bits."""
    taps = max(1, math.prod(weight.shape[2:]))
    limit = CHUNK.get(weight.device.type, CHUNK["cpu"])
    cols = max(1, limit // (taps * WORD)) * WORD
    rows = max(1, limit // (taps * min(cols, max(1, weight.shape[1]))))
    for top in range(0, weight.shape[0], rows):
        for left in range(0, weight.shape[1], cols):
            values = weight[top : top + rows, left : left + cols]
            if bits is None:
                yield values.flatten()
            else:
                words = bits[top : top + rows, :, left // WORD : (left + cols) // WORD]
                yield values.masked_select(ops.unpack_mask(words, values.shape))


def _keys(values: Tensor) -> Tensor:
    """Integers >= 0 of the values' width that order like |value|, NaN on top (reference.key)."""
    integer = KEYS[values.dtype.itemsize]
    return torch.where(values.isnan(), torch.iinfo(integer).max, values.abs().view(integer))


# ---- replicas: who does which part ---------------------------------------------------------------


def _cuts(shapes: Sequence[Sequence[int]], world: int) -> list[list[tuple[int, int]]]:
    """Per rank and weight the range of `out` that the rank works on, in the order of the sequence.

    Ranks get equal numbers of elements, up to one row of a weight: `out` leads the order.
    """
    sizes = [math.prod(shape) for shape in shapes]
    starts = [0, *accumulate(sizes)]
    bounds = [starts[-1] * rank // world for rank in range(world + 1)]

    def first_row(shape: Sequence[int], start: int, bound: int) -> int:
        row = max(1, math.prod(shape[1:]))
        return min(max(-(-(bound - start) // row), 0), shape[0])

    edges = [
        [first_row(shape, start, bound) for shape, start in zip(shapes, starts, strict=False)]
        for bound in bounds
    ]
    return [list(zip(*pair, strict=True)) for pair in zip(edges, edges[1:], strict=False)]


def _assemble(
    exchange: _Exchange, bits: list[Tensor], weights: list[Tensor], cuts: list[list[tuple]]
) -> list[Tensor]:
    """The bits of whole weights from the parts of all ranks."""
    shapes = [bits_shape(w.shape) for w in weights]
    rows = [taps * words for _, taps, words in shapes]  # int32 words per row of a weight
    lengths = [
        sum((end - start) * row for (start, end), row in zip(cut, rows, strict=True))
        for cut in cuts
    ]
    if not max(lengths):
        return [w.new_zeros(s, dtype=torch.int32) for w, s in zip(weights, shapes, strict=True)]
    padded = bits[0].new_zeros(max(lengths))  # a gather takes equal lengths
    torch.cat([b.flatten() for b in bits], out=padded[: lengths[exchange.rank]])
    held = exchange.gather(padded)
    flat = torch.cat([part[:length] for part, length in zip(held, lengths, strict=True)])
    parts = flat.to(bits[0].device).split([math.prod(shape) for shape in shapes])
    return [part.view(shape).clone() for part, shape in zip(parts, shapes, strict=True)]
