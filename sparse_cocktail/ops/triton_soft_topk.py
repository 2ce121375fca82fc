"""The `soft_topk` ops on Triton: what a call needs around its kernels.

Nothing here waits for the device, and how many kernels run depends on the shapes alone: calls can
be captured in CUDA graphs, and give the same bits each time.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..kernels import launch, plan, soft_grad, soft_tiles, soft_topk
from ..kernels.simple import KINDS, NUMBERS
from .soft_topk import _like, _new_masks
from .triton_masks import _check_device

# Newton's method from the sample's root; many points at once, 4 bits of the threshold each, if it
# is lost; and Newton's method again. A search that is done lets the rest return at once.
SWEEPS = (1,) * 5 + (soft_topk.POINTS,) * 14 + (1,) * 6


def _programs(device: torch.device, tiles: int, points: int = 1) -> int:
    """4 programs per multiprocessor, or one where there are many points. Few are interpreted."""
    if device.type != "cuda":
        return min(tiles, 3 if points == 1 else 1)
    return min(tiles, launch._processors(device) * (4 if points == 1 else 1))


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def upload(numbers: list[int], device: torch.device) -> Tensor:
    """int64 numbers on the device, without a wait."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return plan.to_device(torch.tensor(numbers, dtype=torch.int64), device)
    return put(numbers, device)


def put(numbers: list[int], device: torch.device) -> Tensor:
    """The same as arguments of kernels, which a CUDA graph keeps: a copy would read them again."""
    many = -(-len(numbers) // 32) * 32
    table = torch.empty(many, dtype=torch.int64, device=device)
    numbers = numbers + [0] * (many - len(numbers))
    with launch.on_device(device):
        for first in range(0, many, 32):
            soft_tiles.put[(1,)](table[first:], *numbers[first : first + 32])
    return table


def _laid_out(tensors: Sequence[Tensor], like: Sequence[Tensor], dtype: torch.dtype):
    """The tensors in a dtype, where `like` lies in memory, and fit for loads of 16 bytes."""
    placed = [_like(t, r, dtype) for t, r in zip(tensors, like, strict=True)]
    return [t if t.data_ptr() % 16 == 0 else t.clone() for t in placed]


class _List:
    """The tensors of a call that have elements, as kernels see them.

    Args:
        number: dtype of costs and grads.
    """

    def __init__(
        self,
        values: Sequence[Tensor],
        costs: Sequence[Tensor] | None,
        results: Sequence[Tensor],
        number: torch.dtype,
        grads: Sequence[Tensor] = (),
        budget: float = 0.0,
        beta: float = 0.0,
    ) -> None:
        some = [i for i, v in enumerate(values) if v.numel()]
        values, costs, results, grads = (
            [tensors[i] for i in some] if tensors else []
            for tensors in (values, costs, results, grads)
        )
        device, tiles, elements, records = values[0].device, 0, 0, []
        self.each = any(c.numel() != 1 for c in costs)
        each = zip(costs, results, strict=True) if self.each else ()
        each = [c if c.shape == r.shape else c.reshape(()).expand(r.shape) for c, r in each]
        self.lists = [
            _laid_out(values, results, values[0].dtype),
            _laid_out(each, results if each else (), number),
            results,
            _laid_out(grads, results if grads else (), number),
        ]
        for index, value in enumerate(values):
            addresses = [tensors[index].data_ptr() if tensors else 0 for tensors in self.lists]
            records += [tiles, elements, value.numel(), *addresses, 0]
            tiles += -(-value.numel() // soft_topk.BLOCK)
            elements += value.numel()
        header = [_bits(budget), _bits(beta), len(values), tiles, elements, 0, 0, 0]
        self.table = upload([*header, *records, tiles], device)
        self.single = torch.ones(len(values), dtype=torch.float64, device=device)
        if costs and not self.each:
            self.single = torch.stack([c.reshape(()).to(torch.float64) for c in costs])
        self.device, self.tiles, self.programs = device, tiles, _programs(device, tiles)
        self.slots = triton.next_power_of_2(max(self.programs, 16))
        self.chosen = {
            "EACH": self.each,
            "LISTED": triton.next_power_of_2(max(len(values), 16)),
            "SLOTS": self.slots,
            "SAMPLES": soft_topk.SAMPLES,
            "SIZE": soft_topk.SAMPLE,
            "BLOCK": soft_topk.BLOCK,
            "GROUP": 16 // values[0].element_size(),
            "num_warps": soft_topk.WARPS,
        }

    def run(self, kernel, grid: tuple[int, ...], *args, **chosen) -> None:
        """Launch a kernel with the table, with the constants that it takes."""
        chosen = self.chosen | chosen
        names = {*kernel.arg_names, "num_warps"} & chosen.keys()
        kernel[grid](self.table, self.single, *args, **{n: chosen[n] for n in names})


def soft_topk_multi(
    values: Sequence[Tensor],
    costs: Sequence[Tensor] | None,
    budget: float,
    beta: float,
    start: Tensor | None = None,
    sweeps: Sequence[int] | None = None,
) -> list[Tensor]:
    """The masks, and the root after them. Tests give the points of each of their `sweeps`."""
    masks = _new_masks(values)
    if not sum(m.numel() for m in masks):
        device = values[0].device if values else None
        return [*masks, torch.zeros(2, dtype=torch.float64, device=device)]
    _check_device("soft_topk_multi", values[0].device)
    of = _List(values, costs, masks, masks[0].dtype, budget=budget, beta=beta)
    kind, number = KINDS[values[0].dtype], KINDS[masks[0].dtype]
    of.chosen |= {"KIND": kind, "SOURCE": NUMBERS[kind], "COSTS": NUMBERS[number]}
    root = torch.empty(2, dtype=torch.float64, device=of.device)
    states = root.new_empty(2, soft_topk.STATE.value).unbind()
    # parts of the sums of a sweep, and of the one before
    parts = root.new_empty(2, (soft_topk.POINTS + 1) * soft_topk.SUMS.value * of.slots).unbind()
    sampled = root.new_empty(2, soft_topk.SAMPLES, dtype=torch.float32).unbind()
    given = root if start is None else start.contiguous()
    programs, points = of.programs, 0
    with launch.on_device(of.device):
        if of.each:
            of.run(soft_topk.sum_costs, (programs,), parts[0])
        grid = (soft_topk.SAMPLES // soft_topk.SAMPLE,)
        of.run(soft_topk.sample, grid, *sampled)
        of.run(
            soft_topk.start, (1,), parts[0], *sampled, given, states[0], programs,
            GIVEN=start is not None,
        )  # fmt: skip
        for next_points in sweeps or SWEEPS:
            # Interpreted, idle sweeps take all the time. On a GPU, asking means waiting.
            if sweeps is None and of.device.type == "cpu" and states[0][soft_topk.DONE.value]:
                break
            grid = _programs(of.device, of.tiles, next_points), next_points
            of.run(
                soft_topk.sweep, grid, states[0], parts[0], states[1], parts[1], programs,
                OLD_POINTS=points, POINTS=next_points,
            )  # fmt: skip
            (programs, points), states, parts = grid, states[::-1], parts[::-1]
        of.run(
            soft_topk.masks, (of.programs,), states[0], parts[0], root, programs, OLD_POINTS=points
        )
    return [*masks, root]


def soft_topk_grad(
    grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    costs: Sequence[Tensor] | None,
    beta: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Gradients of the values, in two passes."""
    results = [torch.empty_like(m, dtype=dtype) for m in masks]
    if not sum(m.numel() for m in masks):
        return results
    _check_device("soft_topk_grad", masks[0].device)
    exact = masks[0].dtype
    kind, target = KINDS[exact], KINDS[dtype]
    of = _List(masks, costs, results, exact, grads, beta=beta)
    parts = torch.empty(2 * of.slots, dtype=torch.float64, device=of.device)
    of.chosen |= {"KIND": kind, "NUMBER": NUMBERS[kind]}
    of.chosen |= {"RESULT_KIND": target, "TARGETS": NUMBERS[target]}
    with launch.on_device(of.device):
        of.run(soft_grad.shares, (of.programs,), parts)
        of.run(soft_grad.grads, (of.programs,), parts, of.programs)
    return results
