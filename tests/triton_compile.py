"""Compiles every Triton kernel for sm_80 and sm_90 without a GPU; prints one JSON line per kernel.

Run by test_triton.py in a process of its own: kernels that were imported under TRITON_INTERPRET=1
cannot be compiled.

    python tests/triton_compile.py sm_90
"""

import contextlib
import io
import json
import re
import sys

import torch
import triton
from sparse_cocktail.kernels import bracket, channels, launch, plan, select, simple, sweep
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

INT32 = {"p_map", "p_eligible", "p_ties", "p_tile_ties", "p_row", "p_nm_from", "p_nm_row"}
INT32 |= {"p_within", "p_channel_map", "p_words"}
SCALARS = {"blocks", "rows", "span", "cols", "elements", "inputs", "taps", "words"}


def types(name, over):
    if name in over:
        return over[name]
    if name in SCALARS:
        return "i32"
    return "*i32" if name in INT32 else "*i8" if name == "p_mask" else "*i64"


def cases(full):
    """(name, kernel, constants, warps, types that differ); every kernel, and if `full` more ratios.

    One target is compiled in full: what differs between them is the compiler's last step.
    """
    ratios = ((1, 2), (2, 4), (1, 4), (2, 8), (4, 8), (3, 7), (16, 32)) if full else ((2, 4),)
    block = plan.tile_words(interpreted=False)
    sample = {"p_histogram": "*i32"}
    for name, number in (("fp32", 0), ("bf16", 1)):
        common = {"FORMAT": number, "BLOCK": block}
        plain = {**common, "NM": 0, "N": 1, "M": 2, "WRITE_NM": False}
        for final in (False, True):
            constants = {**plain, "WITHIN": final or not full, "FINAL": final}
            yield f"sweep-{name}-{final=}", sweep.sweep, constants, 4, {}
            for n, m in ((2, 4), (4, 8)) if full and not final else ((2, 4),):
                unified = {**plain, "NM": 1, "N": n, "M": m, "WRITE_NM": True}
                constants = {**unified, "WITHIN": True, "FINAL": final}
                warps = 4 if final else launch.WARPS
                yield f"unified-{name}-{n}:{m}-{final=}", sweep.sweep, constants, warps, {}
        yield f"sum_channels-{name}", sweep.sum_channels, common, launch.WARPS, {}
        constants = {**common, "WITHIN": True, "SAMPLES": launch.SAMPLES}
        constants["SIZE"] = launch.sample_size(torch.device("cuda"))
        yield f"sample-{name}", bracket.sample, constants, 4, sample
        constants = {"FORMAT": number, "WITHIN": True, "DRIFT": 0.0, "FORCE_MISS": False}
        yield f"bracket-{name}", bracket.bracket, constants, launch.WARPS, sample
        size = {"SIZE": launch.CANDIDATES_SIZE}
        for level in (0, 1):
            constants = {**common, **size, "WITHIN": True, "LEVEL": level}
            warps = launch.WARPS if level == 0 else 4
            yield f"digits-{name}-{level}", select.digits, constants, warps, {}
            constants = {"FORMAT": number, "LEVEL": level}
            yield f"choose-{name}-{level}", select.choose, constants, launch.WARPS, {}
        yield f"fix_up-{name}", select.fix_up, {**common, **size, "SCORES": True}, launch.WARPS, {}
        yield f"apply_ties-{name}", select.apply_ties, {**common, "SCORES": True}, 4, {}
        for n, m in ratios:
            yield f"nm_row-{name}-{n}:{m}", simple.nm_row, {**common, "N": n, "M": m}, 4, {}
        constants = {"FORMAT": number, "BLOCKS": 8, "SIZE": 256}
        yield f"block_scores-{name}", channels.block_scores, constants, launch.WARPS, {}
    yield "count_eligible", bracket.count_eligible, {"BLOCK": block}, 4, {}
    yield "cut", select.cut, {}, 4, {}
    constants = {"PART_U": 4, "PART_NM": 1, "SIZE": 256}
    yield "combine_scores", channels.combine_scores, constants, 4, {}
    constants = {"CHANNELS_OF": plan.CHANNEL_BLOCK, "CHUNK": 64}
    yield "keep_channels", channels.keep_channels, constants, 4, {}
    yield "pack_bytes", simple.pack_bytes, {"BLOCK": block}, 4, {}
    yield "unpack_words", simple.unpack_words, {"SIZE": 1024}, 4, {}
    yield "count_words", simple.count_words, {"SIZE": 1024}, 4, {}
    names = ("KIND", "RESULT_KIND", "SOURCE", "TARGET")
    f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
    for source, target in ((f32, f32), (f32, bf16), (bf16, bf16), (f16, f32), (f64, f16)):
        chosen = dict(zip(names, simple.kinds(source, target), strict=True))
        name = f"masked_weights-{str(source)[6:]}-{str(target)[6:]}"
        yield name, simple.masked_weights, {**chosen, "BLOCK": block}, 4, {}


def compiled(kernel, constants, warps, over, capability):
    """PTX of a kernel, and what ptxas says of it when Triton runs it, with the flags of Triton."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types(n, over) for n in names}
    values = {(names.index(n),): v for n, v in constants.items()}
    aligned = [["tt.divisibility", 16]]
    pointers = {(i,): aligned for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(kernel, signature, values, pointers)
    target = GPUTarget("cuda", capability, 32)
    with contextlib.redirect_stdout(io.StringIO()) as report, triton.knobs.nvidia.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source, target=target, options={"num_warps": warps})
    return kernel.asm["ptx"], report.getvalue()


def main(capability):
    for name, kernel, constants, warps, over in cases(full=capability == 90):
        ptx, report = compiled(kernel, constants, warps, over, capability)
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
        row = {
            "name": name,
            "spills": spills,
            "wide_loads": len(re.findall(r"ld\.global.*v4", ptx)),
        }
        row["registers"] = int(re.search(r"Used (\d+) registers", report)[1])
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1].removeprefix("sm_")))
