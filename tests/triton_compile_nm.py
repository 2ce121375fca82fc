"""Compiles the Triton kernels of the N:M family for sm_80 or sm_90 without a GPU.

Run by test_triton_nm.py in a process of its own: kernels that were imported under
TRITON_INTERPRET=1 cannot be compiled. See triton_compiling.py for what it prints.

    python tests/triton_compile_nm.py sm_90
"""

import sys

import triton
from sparse_cocktail.kernels import nm, nm_linear
from sparse_cocktail.kernels.masked_tiles import GROUP, Tile
from triton_compiling import print_reports

RAW = {0: "i32", 1: "i16", 2: "i16"}  # of a format
FORMATS = {"fp32": 0, "bf16": 1, "fp16": 2}
PLAIN = {"words", "words_per_row", "inputs", "outputs", "kept", "stride_x", "stride_out", "part"}
ONE_TAP = {"taps": 1, "stride_in": 1}  # Triton makes constants of ones
SMALLEST = Tile(0, 0, 0, 4, 3)


def compress(keep, group, source="bf16", target=None, flat=True, given=False, odd=False):
    """(kernel, constants, types, divisible arguments, warps and stages)."""
    weight, values = FORMATS[source], FORMATS[target or source]
    constants = {"KEEP": keep, "GROUP": group, "FORMAT": weight, "RESULT": values, "GIVEN": given}
    constants |= {"FLAT": flat, "BLOCK": nm.BLOCK} | ({} if odd else ONE_TAP)
    types = {"p_weight": RAW[weight], "p_values": RAW[values], "p_bits": "i32", "p_given": "i32"}
    return nm.compress, constants, types, set() if odd else PLAIN, SMALLEST


def compress_any(group, source="bf16", given=False):
    width = triton.next_power_of_2(group)
    _, constants, types, _, tile = compress(group // 2, group, source, given=given, odd=True)
    constants |= {"WIDTH": width, "SIZE": max(nm.GROUPS, nm.ANY_SIZE // width)}
    return nm.compress_any, constants, types, set(), tile


def decompress(keep, group, kind="bf16", flat=True, odd=False):
    constants = {"KEEP": keep, "GROUP": group, "FLAT": flat, "BLOCK": nm.BLOCK}
    types = {"p_values": RAW[FORMATS[kind]], "p_bits": "i32", "p_result": RAW[FORMATS[kind]]}
    return nm.decompress, constants, types, set() if odd else PLAIN, SMALLEST


def linear(
    keep, group, tile, x="bf16", values=None, activation=1, odd=False, parts=False, tf32=True
):
    constants = {"BIAS": not parts, "ACTIVATION": 0 if parts else activation, "EVEN": not odd}
    constants |= {"PRECISION": "tf32" if tf32 else "ieee", "KEEP": keep, "GROUP": group}
    constants |= {"BAND": GROUP, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    if parts:
        constants |= {"p_bias": None}  # left out, as the bias is where there is none
    types = {"p_x": x, "p_values": values or x, "p_bits": "i32", "p_bias": "fp32"}
    types |= {"p_y": "fp32" if parts else x}
    return nm_linear.nm_linear, constants, types, set() if odd else PLAIN, tile


def of_tiles(capability):
    """The products at every tile of a card: the main patterns, and a layer of odd sizes."""
    for (card, bucket), tile in nm_linear.TILES.items():
        if card != capability and (card, capability) != (86, 80):
            continue
        types = {"x": "fp32" if bucket in ("tf32", "ieee") else "bf16", "tf32": bucket != "ieee"}
        patterns = ((2, 4), (4, 8), (1, 4)) if bucket == "skinny" and card == 90 else ((2, 4),)
        for keep, group in patterns if bucket != "odd" else ():
            yield f"linear-{card}-{bucket}-{keep}:{group}", linear(keep, group, tile, **types)
        if bucket not in ("few", "many") and card == capability:
            yield f"linear-{card}-{bucket}-odd", linear(4, 8, tile, odd=True, **types)


def cases(capability):
    """(name, case); the tests read from the name what a kernel must have.

    One target is compiled in full: the other shares the kernels and most of their tiles.
    """
    yield from of_tiles(capability)
    full = capability == 90
    patterns = ((1, 2), (2, 4), (3, 4), (4, 8), (1, 4)) if full else ((2, 4),)
    for keep, group in patterns:
        for source, target in (("bf16", "bf16"), ("fp32", "fp32"), ("fp32", "bf16")):
            name = f"{keep}:{group}-{source}-{target}"
            if source == target or (keep, group) == (2, 4):
                yield f"compress-{name}", compress(keep, group, source, target)
            if source == target and group != 2:
                yield f"decompress-{name}", decompress(keep, group, source)
    skinny, many = (nm_linear.TILES[capability, b] for b in ("skinny", "many"))
    yield "compress-odd-bf16", compress(4, 8, flat=False, odd=True)
    yield "compress_any-12", compress_any(12)
    if not full:
        return
    yield "linear-90-gelu", linear(2, 4, many, activation=2)
    for source in ("bf16", "fp32"):
        yield f"compress-rows-{source}", compress(2, 4, source, flat=False)
        yield f"decompress-odd-{source}", decompress(4, 8, source, flat=False, odd=True)
    yield "compress-given", compress(2, 4, given=True)
    yield "compress-odd-fp32", compress(4, 8, "fp32", flat=False, odd=True)
    yield "decompress-rows", decompress(2, 4, flat=False)
    yield "compress_any-32", compress_any(32, "fp32")
    yield "compress_any-given", compress_any(12, given=True)
    types = {"p_values": "i16", "p_bits": "i32", "p_result": "i16"}
    constants = {"KEEP": 5, "GROUP": 12, "SIZE": nm.ANY_SIZE}
    yield "decompress_any", (nm.decompress_any, constants, types, set(), SMALLEST)
    for keep, group in ((2, 8), (4, 16), (2, 32)):
        yield f"linear-90-skinny-{keep}:{group}", linear(keep, group, skinny)
    yield "linear-90-parts", linear(2, 4, skinny, "fp16", parts=True)
    yield "linear-90-master", linear(2, 4, many, values="fp32")
    yield "linear-90-few_rows", linear(4, 8, many._replace(n=16))
    types = {"p_parts": "fp32", "p_bias": "fp32", "p_y": "bf16"}
    constants = {"BIAS": True, "ACTIVATION": 2, "SIZE": nm_linear.SUM_SIZE}
    yield "sum_parts", (nm_linear.sum_parts, constants, types, set(), SMALLEST)


if __name__ == "__main__":
    print_reports(cases, sys.argv[1])
