"""Compiles the Triton kernels of the soft top-k for sm_80 or sm_90 without a GPU.

Run by test_triton_soft_topk.py in a process of its own: kernels that were imported under
TRITON_INTERPRET=1 cannot be compiled. See triton_compiling.py for what it prints.

    python tests/triton_compile_soft_topk.py sm_90
"""

import sys

import torch
from sparse_cocktail.kernels import soft_grad, soft_tiles, soft_topk
from sparse_cocktail.kernels.masked_tiles import Tile
from sparse_cocktail.kernels.simple import KINDS, NUMBERS
from triton_compiling import print_reports

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TYPES = {"p_table": "i64"}
TYPES |= dict.fromkeys(("p_single", "p_state", "p_parts", "p_next", "p_next_parts"), "fp64")
TYPES |= {"p_given": "fp64", "p_root": "fp64", "p_ratios": "fp32", "p_sampled": "fp32"}
TILE = Tile(0, 0, 0, soft_topk.WARPS, 3)
PROCESSORS = {80: 108, 90: 132}


def case(kernel, capability, values, each, old=1, points=1, given=True, target=F32):
    """(kernel, constants, types, divisible arguments, warps)."""
    number = values if values == F64 else F32
    slots = 1 << (4 * PROCESSORS[capability] - 1).bit_length()
    constants = {"KIND": KINDS[values], "SOURCE": NUMBERS[KINDS[values]]}
    constants |= {"COSTS": NUMBERS[KINDS[number]], "NUMBER": NUMBERS[KINDS[number]]}
    constants |= {"EACH": each, "GIVEN": given, "OLD_POINTS": old, "POINTS": points}
    constants |= {"RESULT_KIND": KINDS[target], "TARGETS": NUMBERS[KINDS[target]]}
    constants |= {
        "LISTED": 64,
        "SLOTS": slots,
        "SAMPLES": soft_topk.SAMPLES,
        "SIZE": soft_topk.SAMPLE,
    }
    constants |= {"BLOCK": soft_topk.BLOCK, "GROUP": 16 // values.itemsize}
    return kernel, constants, TYPES, set(), TILE


def of_values(capability, values, each):
    """The kernels of one dtype; costs, masks and gradients are float32 for 16-bit values."""
    name = f"{str(values)[6:]}-{'each' if each else 'one'}"
    yield f"sweep-{name}", case(soft_topk.sweep, capability, values, each)
    yield f"masks-{name}", case(soft_topk.masks, capability, values, each)
    if values in (BF16, F16):
        return
    yield f"sample-{name}", case(soft_topk.sample, capability, values, each)
    many = {"old": soft_topk.POINTS, "points": soft_topk.POINTS}
    yield f"trials-{name}", case(soft_topk.sweep, capability, values, each, **many)
    yield f"shares-{name}", case(soft_grad.shares, capability, values, each)
    yield f"grads-{name}", case(soft_grad.grads, capability, values, each, target=values)


def cases(capability):
    """(name, case); one target is compiled in full: what differs is the compiler's last step."""
    many = soft_topk.POINTS
    yield from of_values(capability, F32, False)
    yield "start-each", case(soft_topk.start, capability, F32, True)
    yield "sum_costs", case(soft_topk.sum_costs, capability, F32, True)
    if capability == 80:
        return
    yield from of_values(capability, F32, True)
    yield from of_values(capability, F64, True)
    yield from of_values(capability, BF16, False)
    yield from of_values(capability, F16, True)
    for old, points in ((0, 1), (1, many), (many, 1)):
        made = case(soft_topk.sweep, capability, F32, False, old=old, points=points)
        yield f"after-{old}-at-{points}", made
    yield "start-alone", case(soft_topk.start, capability, F32, False, given=False)
    yield "grads-bfloat16", case(soft_grad.grads, capability, F32, False, target=BF16)
    yield "put", (soft_tiles.put, {}, TYPES, set(), TILE)


if __name__ == "__main__":
    print_reports(cases, sys.argv[1])
