"""Compiles the Triton kernels of the masked family for sm_80 or sm_90 without a GPU.

Run by test_triton_masked.py in a process of its own: kernels that were imported under
TRITON_INTERPRET=1 cannot be compiled. One JSON line per kernel: bytes of stack (spilled
registers), registers, shared memory (bytes), and how many tensor-core products and asynchronous
copies its PTX has.

    python tests/triton_compile_masked.py sm_90
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from sparse_cocktail.kernels import masked_conv, masked_linear
from sparse_cocktail.kernels.masked_tiles import DIRECT as DIRECT_SIZE
from sparse_cocktail.kernels.masked_tiles import GROUP, TILES, Tile, tile_of_table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
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


def compiled(kernel, constants, types, plain, tile, capability):
    """The compiled kernel, and its use of resources."""
    names = kernel.arg_names
    constants = {n: v for n, v in constants.items() if n in names}
    signature = {n: f"*{types[n]}" if n in types else "i32" for n in names}
    signature |= dict.fromkeys(constants, "constexpr")
    values = {(names.index(n),): v for n, v in constants.items()}
    divisible = [n for n in names if signature[n][0] == "*" or (n in plain and n not in constants)]
    hints = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    source = ASTSource(kernel, signature, values, hints)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
    return result, report.stdout


def main(capability):
    for name, case in cases(capability):
        result, report = compiled(*case, capability)
        ptx = result.asm["ptx"]
        row = {
            "name": name,
            "stack": int(re.search(r"STACK:(\d+)", report)[1]),
            "registers": int(re.search(r"REG:(\d+)", report)[1]),
            "shared": result.metadata.shared,
            "products": len(re.findall(r"mma\.sync|wgmma\.mma_async", ptx)),
            "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
            "copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
            "wide_copies": len(re.findall(r"cp\.async\.cg\.shared\.global[^;]*, 0x10", ptx)),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1].removeprefix("sm_")))
