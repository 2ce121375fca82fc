"""Imports point one way through the library, and importing it stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What stands left may be imported by what stands right; modules of one row do not see each other.
ORDER = (
    ("vit",),
    ("files", "kernels", "patterns", "schedules", "models", "distributed"),
    ("allocation", "reference", "subnet"),
    ("reference_nm", "reference_soft_topk"),
    ("ops",),
    ("bank", "global_selection", "nm_formats", "regrowth", "soft_masks"),
    ("selection", "packing", "batch_norm"),
    ("modules",),
    ("conversion", "premask", "nm_modules", "sparse_modules"),
    ("cocktail_file",),
    ("recalibrate", "costs", "pruning", "channel_watch"),
    ("own_norms", "slimming", "compression"),
    ("serving",),
    ("cocktail", "averaging"),
    ("tasks", "data", "freezing"),
    ("methods",),
    ("checkpoint", "config", "callbacks"),
    ("preparation", "stepping", "run_folder", "report", "stopping"),
    ("engine",),
    ("plots", "runs", "connectivity"),
    ("ablation", "compare_tables"),
    ("ablation_plots", "compare", "connectivity_plots"),
    ("compare_plots", "page"),
    ("cli",),
)
LEVEL = {module: level for level, row in enumerate(ORDER) for module in row}
KERNELS_MAY_IMPORT = {"torch", "triton", *sys.stdlib_module_names}


def source_files():
    """(parts of the module's name below sparse_cocktail, file) of all modules."""
    library = ROOT / "sparse_cocktail"
    places = [(path.relative_to(library), path) for path in library.rglob("*.py")]
    places += [(path.relative_to(ROOT), path) for path in (ROOT / "kernels").rglob("*.py")]
    modules = [(place.with_suffix("").parts, path) for place, path in sorted(places)]
    return [(parts, path) for parts, path in modules if parts != ("__init__",)]


def imported(parts, source):
    """(line, absolute module name) of everything that a module imports.

    A name from the library's root counts as the module of that name.
    """
    package = ("sparse_cocktail", *parts[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "sparse_cocktail":
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def wrong_arrows(parts, source):
    """One line of text per import that breaks the order."""
    name = parts[0]
    if name not in LEVEL:
        return [f"module {name} has no place in ORDER of {Path(__file__).name}: give it one"]
    wrong = []
    for line, target in imported(parts, source):
        top, _, rest = target.partition(".")
        other = rest.partition(".")[0]
        if top == "sparse_cocktail":
            if other.startswith("__"):  # __version__ and the like, from the root
                continue
            if other not in LEVEL:
                wrong.append(f"line {line}: {target} has no place in ORDER")
            elif other != name and LEVEL[other] >= LEVEL[name]:
                wrong.append(
                    f"line {line}: {name} imports {other}, which stands above or beside it"
                )
        elif name == "kernels" and top not in KERNELS_MAY_IMPORT:
            wrong.append(
                f"line {line}: kernels import {top}; they may import torch and triton only"
            )
    return wrong


def test_there_are_modules_to_check():
    found = {parts[0] for parts, _ in source_files()}
    assert {"files", "patterns", "schedules", "reference", "ops"} <= found


@pytest.mark.parametrize(
    ("parts", "path"), source_files(), ids=[".".join(parts) for parts, _ in source_files()]
)
def test_imports_point_one_way(parts, path):
    wrong = wrong_arrows(parts, path.read_text())
    assert not wrong, f"{path.relative_to(ROOT)}: {'; '.join(wrong)}"


@pytest.mark.parametrize(
    ("parts", "source", "message"),
    [
        (("bank",), "from . import ops, selection", "bank imports selection"),
        (("bank",), "from .selection import eligible", "bank imports selection"),
        (("bank",), "import sparse_cocktail.cli", "bank imports cli"),
        (("bank",), "from sparse_cocktail.modules import MaskedLinear", "bank imports modules"),
        (("ops", "masks"), "from .. import bank", "ops imports bank"),
        (("ops", "masks"), "from ..bank import MaskBank", "ops imports bank"),
        (("patterns",), "def f():\n    from . import schedules", "line 2: patterns imports"),
        (("methods", "ast"), "from ..engine import train", "methods imports engine"),
        (("kernels", "nm"), "import numpy as np", "kernels import numpy"),
        (("kernels", "nm"), "from sparse_cocktail import reference", "kernels imports reference"),
        (("bank",), "from .helpers import x", "sparse_cocktail.helpers has no place"),
        (("helpers",), "import torch", "module helpers has no place"),
    ],
)
def test_the_check_finds_a_wrong_arrow(parts, source, message):
    (wrong,) = wrong_arrows(parts, source)
    assert message in wrong


@pytest.mark.parametrize(
    ("parts", "source"),
    [
        (("bank",), "from . import ops\nfrom .reference import ones\nimport torch"),
        (
            ("ops", "masks"),
            "from .dispatch import define\nfrom .. import reference\nfrom . import x",
        ),
        (("kernels", "nm"), "import triton.language as tl\nfrom .tiles import TILE\nimport math"),
        (("kernels", "nm"), "from sparse_cocktail.kernels.tiles import TILE"),
        (("cli",), "from . import __version__, engine\nfrom .methods.base import Method"),
    ],
)
def test_the_check_lets_right_arrows_pass(parts, source):
    assert wrong_arrows(parts, source) == []


def test_import_is_cheap_and_silent():
    program = """
import sys
import sparse_cocktail
print([m for m in ("triton", "matplotlib", "sklearn") if m in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("[]\n", "")
