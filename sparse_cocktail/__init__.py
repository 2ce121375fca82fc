"""Sparse neural-network training: one set of weights, a whole menu of sparse subnetworks."""

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if (_root / "csrc").is_dir() and (_root / "kernels").is_dir():
    __path__.append(str(_root))  # in a checkout the Triton kernels lie in the sibling `kernels/`

from . import ops, patterns  # noqa: E402
from .bank import MaskBank  # noqa: E402
from .batch_norm import MaskedBatchNorm2d  # noqa: E402
from .cocktail import Cocktail, Subnet  # noqa: E402
from .compression import load_compressed, to_compressed  # noqa: E402
from .conversion import convert  # noqa: E402
from .modules import MaskedConv2d, MaskedLinear  # noqa: E402
from .nm_modules import NMConv2d, NMLinear  # noqa: E402
from .patterns import NM, Block, Channel, Dense, Unstructured, parse  # noqa: E402
from .premask import premasked  # noqa: E402
from .pruning import prune_, to_dense  # noqa: E402
from .recalibrate import recalibrate  # noqa: E402
from .slimming import load_slim, to_slim  # noqa: E402
from .sparse_modules import SparseConv2d, SparseLinear  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Cocktail",
    "Dense",
    "MaskBank",
    "MaskedBatchNorm2d",
    "MaskedConv2d",
    "MaskedLinear",
    "NMConv2d",
    "NMLinear",
    "SparseConv2d",
    "SparseLinear",
    "Subnet",
    "Unstructured",
    "convert",
    "load_compressed",
    "load_slim",
    "ops",
    "parse",
    "patterns",
    "premasked",
    "prune_",
    "recalibrate",
    "to_compressed",
    "to_dense",
    "to_slim",
    "train",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    if name == "train":  # the engine brings rich and yaml; ops and modules do without
        from .engine import train

        globals()["train"] = train
        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
