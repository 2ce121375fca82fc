"""One place that defines ops and chooses who computes them.

Every op is one `torch.library` op with a schema, a fake and, if it is differentiable, a gradient.
Its only kernel is the chooser below, which calls one of the op's implementations:

    reference   plain PyTorch, any device (always there)
    cpp         csrc/cpu, CPU tensors, when the extension is built
    triton      kernels/, CUDA tensors (CPU tensors under TRITON_INTERPRET=1)
    cuda        csrc/cuda, CUDA tensors, when built

The choice is made at run time, inside the op, so a forced backend also holds in compiled graphs.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .checks import check_types

__all__ = ["BACKENDS", "backend", "implementations", "extension_path"]

BACKENDS = ("reference", "cpp", "triton", "cuda")

_library = torch.library.Library("sparse_cocktail", "DEF")
_implementations: dict[str, dict[str, Callable]] = {}
_kernels: dict[str, Callable] = {}  # the chooser of each op
_forced: str | None = None  # one for all threads: a backward pass on CUDA runs in another thread


def _load_extension() -> Path | None:
    found = sorted(Path(__file__).parent.parent.glob("_C*.so"))
    if not found:
        return None
    torch.ops.load_library(str(found[0]))
    return found[0]


extension_path = _load_extension()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend for every op inside the `with` block: reference, cpp, triton or cuda.

    An op that has no such implementation raises ValueError when it is called.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"ops.backend: name={name!r} is unknown; use one of {', '.join(BACKENDS)}")
    if name == "cpp" and extension_path is None:
        raise ValueError(
            "ops.backend: name='cpp' needs the C++ extension, which is not built; run "
            "'pip install --no-build-isolation -e .' in the checkout"
        )
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


CPU_LEVELS = ("portable", "avx2", "avx512")


def cpu_levels() -> tuple[str, ...]:
    """Instruction sets that the C++ kernels can use on this machine, the slowest first.

    SPARSE_COCKTAIL_CPU_LEVEL names a lower one as the highest: what the process computes, chooses
    and measures is then that of a machine without the others.
    """
    if extension_path is None:
        return ()
    return CPU_LEVELS[: torch.ops.sparse_cocktail_cpp.best_cpu_level() + 1][: _lowered() + 1]


def _lowered() -> int:
    """The place in CPU_LEVELS of the level that the environment allows."""
    name = os.environ.get("SPARSE_COCKTAIL_CPU_LEVEL") or CPU_LEVELS[-1]
    if name not in CPU_LEVELS:
        raise ValueError(
            f"ops.cpu_levels: SPARSE_COCKTAIL_CPU_LEVEL={name!r} is unknown; set it to one of "
            f"{', '.join(CPU_LEVELS)}, or leave it out"
        )
    return CPU_LEVELS.index(name)


@contextmanager
def _forced_level(level: int) -> Iterator[None]:
    cpp = torch.ops.sparse_cocktail_cpp
    before = cpp.cpu_level()
    cpp.force_cpu_level(level)
    try:
        yield
    finally:
        cpp.force_cpu_level(before)


if cpu_levels():
    torch.ops.sparse_cocktail_cpp.force_cpu_level(len(cpu_levels()) - 1)


def cpu_level(name: str | None = None) -> str | AbstractContextManager[None] | None:
    """The instruction set that the C++ kernels use: portable, avx2 or avx512.

    `cpu_level()` names it (None without the extension). `with cpu_level(name):` forces another for
    the process; all give the same bits.
    """
    levels = cpu_levels()
    if name is None:
        return levels[torch.ops.sparse_cocktail_cpp.cpu_level()] if levels else None
    if name not in levels:
        raise ValueError(
            f"ops.cpu_level: name={name!r} is not among the levels of this machine, "
            f"{', '.join(levels) or 'none: the C++ extension is not built'}"
        )
    return _forced_level(levels.index(name))


def defined() -> tuple[str, ...]:
    """Names of all ops."""
    return tuple(sorted(_implementations))


def implementations(op: str) -> tuple[str, ...]:
    """Backends that implement an op here, the fallback `reference` first."""
    if op not in _implementations:
        raise ValueError(
            f"ops.implementations: op={op!r} is unknown; use one of {', '.join(_implementations)}"
        )
    return tuple(_implementations[op])


PREFERRED = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}


def chosen(op: str, device: torch.device) -> str:
    """The backend that computes an op on a device now."""
    table = _implementations[op]
    if _forced is not None:
        if _forced not in table:
            raise ValueError(
                f"{op}: backend {_forced!r} is forced but does not implement it; it has "
                f"{', '.join(table)}"
            )
        return _forced
    return next((b for b in PREFERRED.get(device.type, ()) if b in table), "reference")


def inside(op: str) -> Callable:
    """An op as other ops call it in their implementations: without checks, and without a second way
    through PyTorch's dispatcher, where nothing is left to do there."""
    table = _implementations[op]
    return lambda *args: table[chosen(op, _device(args))](*args)


def lazy_triton(module: str, name: str) -> Callable | None:
    """A function of sparse_cocktail/ops that is imported, with Triton, at its first call."""
    if importlib.util.find_spec("triton") is None:
        return None

    def call(*args):
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)(*args)

    return call


def _device(arguments: tuple) -> torch.device:
    for value in arguments:
        if isinstance(value, Tensor):
            return value.device
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            return value[0].device
    return torch.device("cpu")


def _listed(argument: Tensor | Sequence[Tensor] | None) -> Sequence[Tensor]:
    """The tensors of an argument."""
    if argument is None:
        return ()
    return (argument,) if isinstance(argument, Tensor) else argument


def define(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    check: Callable,
    cpp: Callable | None = None,
    triton: Callable | None = None,
    cuda: Callable | None = None,
) -> Callable:
    """Define one op. `check(*args)` raises on bad input, for real and fake tensors alike.

    Args:
        schema: as in torch.library, without the namespace.
        reference, cpp, triton, cuda: implementations with the op's arguments.
        fake: shapes and dtypes of the outputs, without data.

    Returns:
        The callable op.
    """
    op = schema.partition("(")[0]
    table = {"reference": reference}
    if cpp is not None and extension_path is not None:
        table["cpp"] = cpp
    if triton is not None:
        table["triton"] = triton
    if cuda is not None:
        table["cuda"] = cuda
    _implementations[op] = table
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    arguments = getattr(torch.ops.sparse_cocktail, op).default._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]

    def kernel(*args):
        try:
            check(*args)
        except Exception as error:
            if not str(error).startswith(f"{op}: "):
                check_types(op, args)
            raise
        result = table[chosen(op, _device(args))](*args)
        for index in written:  # kernels write memory behind autograd's back
            for tensor in _listed(args[index]):
                if not tensor.is_inference():
                    torch.autograd.graph.increment_version(tensor)
        return result

    def checked_fake(*args):
        check(*args)
        return fake(*args)

    _kernels[op] = kernel
    _library.impl(op, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_cocktail::{op}", checked_fake, lib=_library)
    return _dispatched(op)


def _dispatched(op: str) -> Callable:
    """An op by way of PyTorch's dispatcher, whose errors of types are said in our words."""
    overload = getattr(torch.ops.sparse_cocktail, op).default

    def call(*args):
        try:
            return overload(*args)
        except RuntimeError:
            check_types(op, args)
            raise

    call.__name__ = op
    return call


def undispatched(op: str) -> Callable:
    """An op with its checks, but past PyTorch's dispatcher: for eager tensors without gradient."""
    return _kernels[op]


def gradient(
    op: str, backward: Callable, setup_context: Callable, plain: Callable | None = None
) -> Callable:
    """Attach a gradient to an op defined here.

    Args:
        plain: the op with its arguments in differentiable PyTorch, for the transforms of
            torch.func, which know no custom gradients (forward mode would silently give zeros).

    Returns:
        The callable op. In plain eager mode it takes a shortcut with the same formulas: of the
        three ways through PyTorch's dispatcher, each with all arguments converted, one is left.
    """
    torch.library.register_autograd(
        f"sparse_cocktail::{op}", backward, setup_context=setup_context, lib=_library
    )
    dispatched, computed = _dispatched(op), undispatched(op)

    def forward(ctx, *args):
        result = computed(*args)
        setup_context(ctx, args, result)
        return result

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(op, (torch.autograd.Function,), methods)

    def call(*args):
        if plain is not None and torch._C._are_functorch_transforms_active():
            return plain(*args)
        tensors = [a for a in args if isinstance(a, Tensor)]
        if not eager(tensors):
            return dispatched(*args)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return function.apply(*args)
        return computed(*args)

    return call


def eager(tensors: Sequence[Tensor]) -> bool:
    """Whether nobody looks at ops but autograd: no compiler, mode, transform or tensor subclass."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and all(type(t) is Tensor or type(t) is torch.nn.Parameter for t in tensors)
    )
