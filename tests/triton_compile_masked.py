"""Compiles the Triton kernels of the masked family for sm_80 or sm_90 without a GPU.

Run by test_triton_masked.py in a process of its own: kernels that were imported under
TRITON_INTERPRET=1 cannot be compiled. See triton_compiling.py for what it prints.

    python tests/triton_compile_masked.py sm_90
"""

import sys

from sparse_cocktail.kernels import masked_conv, masked_linear
from sparse_cocktail.kernels.masked_tiles import DIRECT as DIRECT_SIZE
from sparse_cocktail.kernels.masked_tiles import GROUP, TILES, Tile, tile_of_table
from triton_compiling import print_reports

OPS = ("forward", "input_grad", "weight_grad")
LINEAR = {
    "forward": masked_linear.linear_forward,
    "input_grad": masked_linear.linear_input_grad,
    "weight_grad": masked_linear.linear_weight_grad,
}
CONV = {
    "forward": masked_conv.conv_forward,
    "input_grad": masked_conv.conv_input_grad,
    "weight_grad": masked_conv.conv_weight_grad,
}
DIRECT = {
    "forward": masked_conv.direct_forward,
    "input_grad": masked_conv.direct_input_grad,
    "weight_grad": masked_conv.direct_weight_grad,
}
# A 3x3 layer of channels that 16 divides, stride 1 and one group; Triton makes constants of ones.
PLAIN = {
    "batch",
    "inputs",
    "outputs",
    "stride_x",
    "stride_grad",
    "stride_out",
    "stride_tap",
    "part",
}
ONES = {"stride_in": 1, "groups": 1, "step_h": 1, "step_w": 1, "dilate_h": 1, "dilate_w": 1}
ONES |= {"pad_h": 1, "pad_w": 1, "period_h": 1, "period_w": 1, "jump_h": 1, "jump_w": 1}
# What _fitted makes of tiles: for 64 outputs, for 32 rows, and for the smallest layers.
FEW_OUTPUTS, FEW_ROWS = Tile(64, 256, 64, 8, 3), Tile(64, 32, 64, 4, 4)
SMALLEST = Tile(16, 16, 16, 4, 3)


def product(
    kernel, tile, x="bf16", weight="fp32", bucket="", ones=ONES, plain=PLAIN, odd=False,
    parts=False,
):  # fmt: skip
    """One kernel as (kernel, constants, types, divisible arguments, tile).

    Of `odd` layers nothing is known but that they are not dilated; `parts` writes parts of K.
    """
    if odd:
        ones, plain = {"dilate_h": 1, "dilate_w": 1}, set()
    chosen = {"BIAS": not parts, "MASKED": not parts, "EVEN": not odd, "GROUP": GROUP}
    chosen |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    chosen |= {"PRECISION": "ieee" if bucket == "ieee" else "tf32"}
    if parts:
        chosen |= {"p_bias": None}  # left out, as the bias is where there is none
    result = "fp32" if parts else weight if "weight_grad" in kernel.__name__ else x
    types = {"p_x": x, "p_grad": x, "p_weight": weight, "p_bits": "i32", "p_bias": "fp32"}
    types |= {"p_y": result, "p_result": result, "p_parts": "fp32"}
    return kernel, {**chosen, **ones}, types, plain, tile


def of_table(card, layers):
    """Every kernel of these layers at every tile of a card."""
    for (owner, own, bucket), tile in TILES.items():
        types = {"x": "fp32"} if bucket in ("wide-tf32", "small", "ieee") else {}
        for op in OPS if owner == card else ():
            if bucket == "skinny" and op == "weight_grad":
                continue
            for layer, kernels in layers.items():
                if own in (None, kernels[op].__name__):
                    case = product(kernels[op], tile, bucket=bucket, **types)
                    yield f"{card}-{layer}-{op}-{bucket}", case


def cases(capability):
    """(name, product); the tests read from the name what a kernel must have.

    One target is compiled in full: the other shares the kernels and most of their tiles.
    """
    full = capability == 90
    layers = {"linear": LINEAR, "conv": CONV}
    yield from of_table(capability, layers)
    if not full:
        yield from of_table(86, {"linear": LINEAR})
    for layer, kernels in layers.items():
        for op, kernel in kernels.items():
            name, small = f"{capability}-{layer}-{op}", tile_of_table(capability, "", "small")
            yield f"{name}-odd", product(kernel, small, odd=True)
            if not full:
                continue
            wide = tile_of_table(90, "", "wide")
            yield f"{name}-wide-bf16", product(kernel, wide, weight="bf16")
            yield f"{name}-odd-fp32", product(kernel, small, x="fp32", odd=True)
            yield f"{name}-few_outputs", product(kernel, FEW_OUTPUTS, parts=True)
            if op != "weight_grad":
                yield f"{name}-few_rows", product(kernel, FEW_ROWS, x="fp16")
            yield f"{name}-smallest", product(kernel, SMALLEST, x="fp16", odd=True)
            numbers = [n for n in kernel.arg_names if n.islower() and not n.startswith("p_")]
            ones = dict.fromkeys(numbers, 1)  # Triton makes constants of them all
            yield f"{name}-ones", product(kernel, SMALLEST, ones=ones)
    for op, kernel in DIRECT.items():
        tile = Tile(64, DIRECT_SIZE // 64, 0, 4, 3)
        depthwise = {"stride_in": 1, "inputs": 1, "outputs": 1}
        case = product(kernel, tile, ones=depthwise, plain={"groups", "stride_tap"})
        yield f"{capability}-direct-{op}", case
        yield f"{capability}-direct-{op}-odd", product(kernel, tile, odd=True)
    case = product(masked_linear.sum_parts, SMALLEST, parts=True, ones={"SIZE": 1024})
    yield f"{capability}-sum_parts", case


if __name__ == "__main__":
    print_reports(cases, sys.argv[1])
