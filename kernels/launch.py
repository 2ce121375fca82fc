"""The order in which kernels run: one selection from a list of weights and its scratch memory.

Nothing here allocates memory on the device or waits for it, so that a CUDA graph can capture a
selection; how many programs a kernel gets depends on the device and the plan alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import bracket, channels, select, simple, sweep
from .plan import CHANNEL_BLOCK, Plan, plan_of, table_of, to_device

SAMPLES = 1 << 16
CANDIDATES_SIZE = 1024  # candidates a program takes at a time
PER_PROCESSOR = 8  # programs per multiprocessor of kernels that walk over tiles
# Warps where 4, the default, would spill registers: kernels with int64 blocks and histograms.
WARPS = 8


def interpreted() -> bool:
    return triton.knobs.runtime.interpret


@functools.lru_cache
def _processors(device: torch.device) -> int:
    # A few, so that tests see the work split, where the kernels are interpreted.
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(device: torch.device, pieces: int) -> int:
    """Programs of a kernel that walks over `pieces` of work."""
    most = 3 if device.type != "cuda" else PER_PROCESSOR * _processors(device)
    return max(1, min(pieces, most))


def sample_size(device: torch.device) -> int:
    """Samples per program: 128 programs with 4 per thread; few programs where interpreted."""
    return 512 if device.type == "cuda" else 1 << 14


def on_device(device: torch.device):
    """Triton launches on the current device: make it that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True)
class Trial:
    """How tests lead a selection astray. The result stays exact."""

    drift: float = 0.0  # samples by which the wanted rank is moved
    force_miss: bool = False


STRAIGHT = Trial()


class Scratch:
    """The pieces of one scratch memory under their names in the plan."""

    def __init__(self, plan: Plan, memory: Tensor) -> None:
        self._plan, self._memory = plan, memory

    def __getattr__(self, name: str) -> Tensor:
        return self._plan.regions[name].of(self._memory)

    def zero_(self) -> None:
        start, end = self._plan.zeroed
        self._memory[start:end].zero_()


def new_scratch(
    plan: Plan, weights: Sequence[Tensor], keep: int = 0, channel_keep: Sequence[int] | None = None
) -> Tensor:
    """Scratch memory with the tables of these weights, on their device."""
    device = weights[0].device
    memory = torch.empty(plan.size, dtype=torch.uint8, device=device)
    addresses = [w.data_ptr() for w in weights]
    for index, _ in plan.staged:
        addresses[index] = memory.data_ptr() + plan.regions[f"staged_{index}"].start
    fixed = table_of(plan, weights, addresses, keep, channel_keep)
    memory[: len(fixed)].copy_(to_device(fixed, device))
    Scratch(plan, memory).ties.zero_()
    return memory


def stage(plan: Plan, memory: Tensor, weights: Sequence[Tensor]) -> None:
    """Copy weights whose taps have no common stride to where the table expects them."""
    for index, _ in plan.staged:
        weight = weights[index]
        copy = plan.regions[f"staged_{index}"].of(memory).view(weight.dtype)
        copy.view(weight.shape).copy_(weight)


@dataclass(frozen=True)
class Unified:
    """What a unified selection does beside the top-k."""

    ratio: tuple[int, int] | None  # fresh N:M masks
    nm_from: Tensor | None  # or the row that holds them; neither: all ones
    nm_row: Tensor | None
    parts: tuple[int, int]  # integer weights of the two masks in the score
    channel_keep: Tensor
    channel: Tensor


def select_row(
    weights: Sequence[Tensor],
    keep: Tensor,
    within: Tensor | None,
    row: Tensor,
    memory: Tensor,
    unified: Unified | None = None,
    trial: Trial = STRAIGHT,
    capacity: int | None = None,
) -> None:
    """Write the top-k bits of all weights together to `row`, and the unified rows.

    Args:
        keep: int64 on the device.
        memory: from `new_scratch` with the plan of these weights.
        trial, capacity: for tests.
    """
    plan = plan_of(weights, capacity)
    if plan.tiles == 0:
        return
    stage(plan, memory, weights)
    scratch = Scratch(plan, memory)
    scratch.zero_()
    with on_device(row.device):
        _select(plan, scratch, keep, within, row, unified, trial)


def _select(plan, scratch, keep, within, row, unified, trial) -> None:
    table, tile_map, state = scratch.table, scratch.tile_map, scratch.state
    eligible, candidates, ties = scratch.eligible, scratch.candidates, scratch.ties
    tile_ties, coarse, sums = scratch.tile_ties, scratch.coarse_ties, scratch.sums
    grid = (programs(row.device, plan.tiles),)
    many = (programs(row.device, triton.cdiv(candidates.numel(), CANDIDATES_SIZE)),)
    common = {"FORMAT": plan.format, "BLOCK": plan.block}
    nested = within is not None
    if nested:
        bracket.count_eligible[grid](table, tile_map, state, within, eligible, BLOCK=plan.block)
    slots = min(plan.tiles * plan.block * 32, SAMPLES)
    size = sample_size(row.device)
    bracket.sample[(triton.cdiv(slots, size),)](
        table, tile_map, eligible, scratch.sample, **common, WITHIN=nested, SAMPLES=SAMPLES,
        SIZE=size,
    )  # fmt: skip
    bracket.bracket[(1,)](
        table, state, keep, scratch.sample, FORMAT=plan.format, WITHIN=nested, DRIFT=trial.drift,
        FORCE_MISS=trial.force_miss, num_warps=WARPS,
    )  # fmt: skip
    nm_from, nm_row, nm = row, row, {"NM": 0, "N": 1, "M": 2, "WRITE_NM": False}
    if unified is not None:
        nm_from, nm_row, nm = _nm_of(unified, row)

    def run_sweep(final: bool) -> None:
        sweep.sweep[grid](
            table, tile_map, state, eligible, candidates, ties, tile_ties, coarse, sums, row,
            nm_from, nm_row, **common, WITHIN=nested, FINAL=final, **nm,
            num_warps=WARPS if unified is not None and not final else 4,
        )  # fmt: skip

    run_sweep(final=False)
    for level, histogram in enumerate((scratch.first, scratch.second)):
        select.digits[grid if grid[0] > many[0] else many](
            table, tile_map, state, eligible, candidates, histogram, **common, WITHIN=nested,
            LEVEL=level, SIZE=CANDIDATES_SIZE, num_warps=WARPS if level == 0 else 4,
        )  # fmt: skip
        select.choose[(1,)](
            table, state, histogram, FORMAT=plan.format, LEVEL=level, num_warps=WARPS
        )
    scores = unified is not None
    select.fix_up[many](
        table, tile_map, state, candidates, ties, tile_ties, coarse, sums, row, **common,
        SCORES=scores, SIZE=CANDIDATES_SIZE, num_warps=WARPS,
    )  # fmt: skip
    run_sweep(final=True)
    select.cut[(1,)](table, state, tile_ties, coarse)
    select.apply_ties[grid](
        table, tile_map, state, ties, tile_ties, sums, row, **common, SCORES=scores
    )
    if unified is not None:
        combine(plan, scratch, unified.parts)
        choose_channels(plan, scratch, scratch.scores, unified.channel_keep, unified.channel)


def _nm_of(unified: Unified, row: Tensor):
    """(row to read, row to write, constants) of the N:M part of a sweep."""
    nm_row = row if unified.nm_row is None else unified.nm_row
    constants = {"N": 1, "M": 2, "WRITE_NM": unified.nm_row is not None}
    if unified.ratio is not None:
        constants |= {"NM": 1, "N": unified.ratio[0], "M": unified.ratio[1]}
        return row, nm_row, constants
    if unified.nm_from is None:
        return row, nm_row, constants | {"NM": 3}
    if unified.nm_row is None:
        return unified.nm_from, row, constants | {"NM": 2}
    # The row is copied as it is, padding too, and then only read: it may be any of the other rows.
    if unified.nm_row.data_ptr() != unified.nm_from.data_ptr():
        unified.nm_row.copy_(unified.nm_from)
    return unified.nm_row, row, constants | {"NM": 2, "WRITE_NM": False}


def combine(plan: Plan, scratch: Scratch, parts: tuple[int, int]) -> None:
    """Scores of all channels from their sums."""
    if plan.channels:
        channels.combine_scores[(triton.cdiv(plan.channels, 256),)](
            scratch.table, scratch.state, scratch.sums, scratch.scores, PART_U=parts[0],
            PART_NM=parts[1], SIZE=256,
        )  # fmt: skip


def choose_channels(
    plan: Plan, scratch: Scratch, scores: Tensor, keep: Tensor, row: Tensor
) -> None:
    """Bits of the channels with the largest scores, per weight."""
    if plan.channel_blocks:
        channels.keep_channels[(plan.channel_blocks,)](
            scratch.table, scratch.channel_map, scores, keep, row, CHANNELS_OF=CHANNEL_BLOCK,
            CHUNK=64,
        )  # fmt: skip


def score_row(
    weights: Sequence[Tensor], row: Tensor, nm_row: Tensor, parts: tuple[int, int], memory: Tensor
) -> Tensor:
    """Scores (channels,) of given masks."""
    plan = plan_of(weights)
    stage(plan, memory, weights)
    scratch = Scratch(plan, memory)
    scratch.zero_()
    with on_device(row.device):
        if plan.tiles:
            sweep.sum_channels[(programs(row.device, plan.tiles),)](
                scratch.table, scratch.tile_map, row, nm_row, scratch.sums, FORMAT=plan.format,
                BLOCK=plan.block, num_warps=WARPS,
            )  # fmt: skip
        combine(plan, scratch, parts)
    return scratch.scores


def nm_with(plan: Plan, table: Tensor, tile_map: Tensor, n: int, m: int, row: Tensor) -> None:
    """N:M bits of all weights to `row`; all ones where in % m != 0."""
    if plan.tiles:
        with on_device(row.device):
            simple.nm_row[(programs(row.device, plan.tiles),)](
                table, tile_map, row, N=n, M=m, FORMAT=plan.format, BLOCK=plan.block
            )
