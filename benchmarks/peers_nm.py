"""What the N:M ops are measured against: eager torch, and torch's own 2:4 where it is built.

Of compressing: functions of one weight, that give values and a bool mask. Of products: ways to get
a call `x -> y` for a dense weight with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from torch.utils import mkldnn

from sparse_cocktail.reference import weight_view

from peers_masks import _groups, _nm_compare, _of_groups  # isort: skip - neighbours, not packages

__all__ = ["DENSE", "NotHere", "Way", "compress_ways", "decompress_ways", "pack_ways", "ways"]

DENSE = "torch/dense"


class NotHere(RuntimeError):
    """This machine or build of torch does not have it: the reason of a row without time."""


# ---- compress, decompress ------------------------------------------------------------------------


def _values(weight: Tensor, mask: Tensor, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """Kept weights in memory order, by masked_select."""
    view = weight_view(weight)
    kept = view.masked_select(weight_view(mask))
    return kept.view(*view.shape[:2], view.shape[2] // m * n).to(dtype)


def _by_topk(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    places = _groups(weight, m).topk(n, dim=-1, sorted=False).indices.sort(-1).values
    groups = weight_view(weight).unflatten(-1, (-1, m))
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, places, True)
    return groups.gather(-1, places).flatten(-2).to(dtype), _of_groups(mask, weight)


def _by_selecting(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    places = _groups(weight, m).topk(n, dim=-1, sorted=False).indices
    mask = torch.zeros_like(_groups(weight, m), dtype=torch.bool).scatter_(-1, places, True)
    mask = _of_groups(mask, weight)
    return _values(weight, mask, n, m, dtype), mask


def _by_comparing(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mask = _nm_compare(weight, n, m)
    return _values(weight, mask, n, m, dtype), mask


def _by_sorting(weight: Tensor, n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    groups, size = weight_view(weight).unflatten(-1, (-1, m)), _groups(weight, m)
    places = size.argsort(dim=-1, descending=True, stable=True)[..., :n].sort(-1).values
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, places, True)
    return groups.gather(-1, places).flatten(-2).to(dtype), _of_groups(mask, weight)


def compress_ways(m: int) -> dict[str, Callable]:
    """(weight, n, m, dtype) -> (values, bool mask), by name.

    Ties go anywhere in topk, and to the lower place in the others.
    """
    found = {"torch/topk+sort+gather": _by_topk, "torch/topk+masked_select": _by_selecting}
    if m <= 4:
        found["torch/compare+masked_select"] = _by_comparing
    else:
        found["torch/stable sort+gather"] = _by_sorting
    return found


def decompress_ways(values: Tensor, mask: Tensor, n: int, m: int) -> dict[str, Callable]:
    """Calls that make the dense weight; places and masks are ready beforehand, and not packed."""
    view = weight_view(mask)
    groups = view.unflatten(-1, (-1, m))
    order = groups.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    places = order[..., :n].contiguous()
    parts = values.unflatten(-1, (-1, n))

    def scatter() -> Tensor:
        return _of_groups(parts.new_zeros(groups.shape).scatter_(-1, places, parts), mask)

    def masked_scatter() -> Tensor:
        dense = values.new_zeros(view.shape).masked_scatter_(view, values)
        return _of_groups(dense.unflatten(-1, (-1, m)), mask)

    return {"torch/scatter": scatter, "torch/masked_scatter": masked_scatter}


# ---- torch's packed 2:4 --------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way to compute something, or why it is not to be had here.

    Args:
        build: what is not timed -> the call.
        missing: why it cannot run; then nothing is built.
        graph: whether a CUDA graph of it is tried.
    """

    name: str
    build: Callable[..., Callable]
    missing: str = ""
    note: str = ""
    graph: bool = True


def _cutlass_missing(device: torch.device) -> str:
    if device.type != "cuda":
        return "torch's CUTLASS 2:4 needs a GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 8:
        return f"torch's CUTLASS 2:4 takes compute capability 8.x, and this is {major}.{minor}"
    return ""


def _cusparselt_missing(device: torch.device) -> str:
    if device.type != "cuda":
        return "cuSPARSELt needs a GPU"
    if not torch.backends.cusparselt.is_available():
        return "this build of torch has no cuSPARSELt"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        ""
        if major >= 8
        else f"cuSPARSELt needs compute capability 8.0, and this is {major}.{minor}"
    )


def _pruned(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(mask, weight, 0.0).to(dtype)


def pack_ways(device: torch.device) -> list[Way]:
    """build(weight, mask, dtype) -> a call whose result `dense_of` turns into the weight again."""
    from_dense = sparse_semi_structured_from_dense_cutlass

    def plain(weight: Tensor, _, dtype: torch.dtype) -> Callable:
        return lambda: from_dense(_pruned(weight, _nm_compare(weight, 2, 4), dtype))

    def cutlass(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Callable:
        dense = _pruned(weight, mask, dtype)
        return lambda: SparseSemiStructuredTensorCUTLASS.from_dense(dense)

    def cslt(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Callable:
        dense = _pruned(weight, mask, dtype)
        return lambda: SparseSemiStructuredTensorCUSPARSELT.from_dense(dense)

    def tile(weight: Tensor, _, dtype: torch.dtype) -> Callable:
        dense = weight.to(dtype)
        algorithm = "largest_abs_values_greedy"
        return lambda: torch._sparse_semi_structured_tile(dense, algorithm, True)

    pruned, gpu = "without pruning: the weight has its zeros", device.type == "cuda"
    found = [Way("torch/compare + CUTLASS layout", plain)]
    if gpu:
        found.append(Way("torch/to CUTLASS", cutlass, _cutlass_missing(device), pruned))
        found.append(Way("torch/to cuSPARSELt", cslt, _cusparselt_missing(device), pruned))
        missing = "" if hasattr(torch, "_sparse_semi_structured_tile") else "torch has no such op"
        note = "4x4 tiles, both directions: another mask, not compared"
        found.append(Way("torch/_sparse_semi_structured_tile", tile, missing, note))
    return found


def dense_of(packed) -> Tensor | None:
    """The dense weight of what torch packed; None where that is another pruning."""
    if isinstance(packed, tuple) and len(packed) == 2:
        return sparse_semi_structured_to_dense_cutlass(*packed)
    if isinstance(packed, SparseSemiStructuredTensorCUSPARSELT):
        eye = torch.eye(packed.shape[1], dtype=packed.dtype, device=packed.device)
        return F.linear(eye, packed).t()
    return None if isinstance(packed, tuple) else packed.to_dense()


# ---- products ------------------------------------------------------------------------------------


def _dense(weight: Tensor, x: Tensor) -> Callable:
    return lambda: F.linear(x, weight)


def _onednn(weight: Tensor, x: Tensor) -> Callable:
    """The dense layer as torch.utils.mkldnn converts it, which it can be for inference only."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    converted = mkldnn.to_mkldnn(layer.eval(), weight.dtype)
    given = x.to_mkldnn()
    return lambda: converted(given)


def _cutlass(weight: Tensor, x: Tensor) -> Callable:
    sparse = SparseSemiStructuredTensorCUTLASS.from_dense(weight)
    return lambda: F.linear(x, sparse)


def _cusparselt(weight: Tensor, x: Tensor) -> Callable:
    sparse = SparseSemiStructuredTensorCUSPARSELT.from_dense(weight)
    return lambda: F.linear(x, sparse)


def _cusparselt_best(weight: Tensor, x: Tensor) -> Callable:
    packed = torch._cslt_compress(weight)
    padded = F.pad(x, (0, 0, 0, -x.shape[0] % 8)).t()  # as torch's subclass pads
    best = int(torch._cslt_sparse_mm_search(packed, padded, transpose_result=True))
    sparse = SparseSemiStructuredTensorCUSPARSELT.from_dense(weight)
    sparse.alg_id_cusparselt = best  # an argument of from_dense in newer versions only
    return lambda: F.linear(x, sparse)


def ways(device: torch.device, dtype: torch.dtype, n: int, m: int) -> list[Way]:
    """Products of x with a dense weight that has zeros: build(weight, x) -> the call."""
    found = [Way(DENSE, _dense)]
    if device.type != "cuda":
        slow = dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        missing = "oneDNN has no bfloat16 on this processor" if slow else ""
        return [*found, Way(f"{DENSE}, oneDNN tensors", _onednn, missing)]
    if (n, m) not in ((2, 4), (1, 2)) or dtype not in (torch.bfloat16, torch.float16):
        return found
    note = "the fastest of its algorithms, searched beforehand"
    return [
        *found,
        Way("torch/CUTLASS 2:4", _cutlass, _cutlass_missing(device)),
        Way("torch/cuSPARSELt", _cusparselt, _cusparselt_missing(device)),
        Way("torch/cuSPARSELt, best", _cusparselt_best, _cusparselt_missing(device), note),
    ]
