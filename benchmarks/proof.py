"""What times do not show of 2:4 on a card: torch's both-ways tile, and calls for a profiler.

    python benchmarks/proof.py both-ways --out FILE.json
    ncu --clock-control none -k regex:nm_ python benchmarks/proof.py calls

`python benchmarks/gpu.py proof` runs both, and compute-sanitizer over tests/test_gpu_nm.py.

torch prunes 4x4 tiles so that a weight and its transpose are 2:4, packs both in one kernel, and
multiplies them by cuSPARSELt. On an H100 the products were said to be wrong (pytorch/ao#1617). Here
they are compared with the dense product of the very weight that the kernel says it has kept, and
with cuSPARSELt after its own compression of that weight, in both directions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT as Semi

from sparse_cocktail import ops

from groups_masked import BOUND  # isort: skip - neighbours, not packages
from machine import describe  # isort: skip
from output import write  # isort: skip

SHAPES = ((128, 128, 128), (512, 384, 256), (4096, 4096, 4096), (8192, 4096, 1024))  # out, in, rows
DTYPES = (torch.bfloat16, torch.float16)
ALGORITHMS = ("", "largest_abs_values_greedy")  # the default ranks signed values


# ---- both ways -----------------------------------------------------------------------------------


def two_of_four(weight: Tensor) -> bool:
    """Whether every 4 neighbours in a row hold at most 2 nonzeros."""
    return bool((weight.unflatten(1, (-1, 4)).ne(0).sum(-1) <= 2).all())


def judged(y: Tensor, weight: Tensor, x: Tensor) -> float:
    """Largest error of y against weight @ x in float64, in units of the dense product's error."""
    rows = torch.linspace(0, len(weight) - 1, min(64, len(weight)), device=x.device).long()
    exact = weight[rows].double() @ x.double()
    dense = ((weight @ x)[rows].double() - exact).abs().max()
    error = (y[rows].double() - exact).abs().max() / dense.clamp_min(1e-12)
    return float(error.nan_to_num(nan=float("inf"), posinf=float("inf")).clamp_max(1e30))


def _milliseconds(call: Callable) -> float:
    from triton.testing import do_bench

    return round(do_bench(call, return_mode="median"), 5)


def _first_line(error: Exception) -> str:
    return f"{error}".partition("\n")[0][:200]


def both_ways(shape: Sequence[int], dtype: torch.dtype, algorithm: str) -> Iterator[dict[str, Any]]:
    """A row per direction and way: its error, whether it is right, and its time."""
    out, inputs, columns = shape
    torch.manual_seed(0)
    weight = torch.randn(out, inputs, device="cuda").to(dtype)
    facts = {
        "case": f"{out} x {inputs}, {columns} columns of x",
        "dtype": str(dtype).removeprefix("torch."),
        "algorithm": algorithm or "default",
    }
    unknown = {"error": None, "ms": None}
    try:
        tile = Semi.prune_dense_static_sort(weight, algorithm)
        kept = torch._sparse_semi_structured_apply_dense(weight, tile.compressed_swizzled_bitmask)
    except RuntimeError as error:  # of a card that it does not know
        row = {"impl": "torch/both-ways tile", "direction": "pruning", **facts, **unknown}
        yield {**row, "note": _first_line(error), "right": False}
        return
    facts["kept"] = round(float(kept.ne(0).float().mean()), 4)
    facts["two_of_four"] = two_of_four(kept) and two_of_four(kept.t())
    for direction, dense, packed in (("W x", kept, tile), ("W^T x", kept.t(), tile.t())):
        x = torch.randn(dense.shape[1], columns, device="cuda").to(dtype)
        whole = dense.contiguous()
        own = Semi.from_dense(whole)
        ways = {
            "torch/dense": lambda: whole @ x,  # noqa: B023 - called in this round
            "torch/both-ways tile": lambda: torch.mm(packed, x),  # noqa: B023
            "torch/cuSPARSELt's own compression": lambda: torch.mm(own, x),  # noqa: B023
        }
        for name, call in ways.items():
            row = {"impl": name, "direction": direction, **facts, **unknown}
            try:
                row["error"] = judged(call(), whole, x)
                row["ms"] = _milliseconds(call)
            except RuntimeError as error:
                row["note"] = _first_line(error)
            yield {**row, "right": row["error"] is not None and row["error"] <= BOUND}


def run_both_ways(path: Path, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """All shapes, dtypes and algorithms; the file is written after each, for a kernel may crash."""
    result = {"format": 1, "bench": "both-ways", "rows": []}
    result["environment"] = describe(torch.device("cuda"))
    for shape in SHAPES:
        for dtype in DTYPES:
            for algorithm in ALGORITHMS:
                for row in both_ways(shape, dtype, algorithm):
                    result["rows"].append(row)
                    said = "right" if row["right"] else f"WRONG: {row.get('note', row['error'])}"
                    names = ("case", "dtype", "algorithm", "direction", "impl")
                    tell(", ".join(row[name] for name in names) + f": {said}, {row['ms']} ms")
                write(path, result)
    return result


# ---- calls for a profiler ------------------------------------------------------------------------


def calls() -> None:
    """Each 2:4 kernel on the shapes of the targets: every tile for Hopper, and what is skinny."""
    kernels = torch.ops.sparse_cocktail_cuda
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for out, inputs, rows in ((8192, 8192, 8192), (11008, 4096, 16), (11008, 4096, 1)):
        weight = torch.randn(out, inputs, device="cuda")
        x = torch.randn(rows, inputs, device="cuda").bfloat16()
        packed, meta = ops.nm_pack_weight(weight, None, torch.bfloat16)
        given = (x, packed, meta, out, None, 0)
        if rows <= 16:
            kernels.nm_skinny(*given, 0)
            continue
        kernels.nm_gemm_sm80(*given, 0)
        for tile in range(1, 9) if hopper else ():
            kernels.nm_gemm_sm90(*given, tile)
    torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("both-ways", "calls"))
    parser.add_argument("--out", type=Path, default=Path("both-ways.json"), help="JSON file")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"error: proof {given.what} needs a GPU, but torch sees none here", file=sys.stderr)
        return 2
    if given.what == "calls":
        calls()
    else:
        run_both_ways(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
