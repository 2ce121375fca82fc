"""Fixtures of all tests: seeds, threads, and where a backend can run on this machine."""

import functools
import importlib.util
import inspect
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from sparse_cocktail import ops

# Without a GPU, Triton kernels are interpreted on CPU tensors. They read this when they are first
# imported, which the first Triton op does.
if torch.cuda.is_available():
    # fp32 is compared as fp32: cuDNN would round operands of convolutions to TF32, its default, in
    # some of two equal layers and not in the other
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True  # two equal gradients are compared bit by bit
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Programs that tests start find this package where it is not installed.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
PLACES = [str(ROOT), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, PLACES))


def _complete_torchvision() -> torch.library.Library | None:
    """Make torchvision importable where its compiled operators are missing.

    That is so when it was built for another torch, such as the CUDA build beside a CPU torch. The
    import then fails at the first operator that torchvision describes, and with it the imports of
    timm and transformers. Placeholders under the operators' names let it pass; what the tests use
    of torchvision (folders, pictures of PIL) calls none of them.

    Returns the library that holds the placeholders: they last as long as it does.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    placeholders = None
    while True:
        try:
            importlib.import_module("torchvision")
            return placeholders
        except RuntimeError as error:
            missing = re.match(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
        placeholders = placeholders or torch.library.Library("torchvision", "FRAGMENT")
        placeholders.define(f"{missing[1]}() -> ()")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


_TORCHVISION_PLACEHOLDERS = _complete_torchvision()

# Examples are drawn from a fixed seed, so that a failure comes back on the next run. A machine that
# stands still for a while is no failure: neither a draw nor an example has a limit of time.
settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads():
    """`threads(n)` sets torch's thread count; the old one comes back after the test.

    Tests start with one thread: on small shapes more of them only wait for each other
    (test_masks.py on 2 shared cores: 12 s with two threads, 4 s with one).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@functools.lru_cache
def _quicken_interpreter() -> None:
    """Save the interpreter half of its time; what it computes stays the same.

    Its check of every integer operation reports to device-side asserts, which are off as well: a
    quarter. Every call of a kernel, and of a function inside one, searches all of triton.language
    for the functions that it replaces: 40 % of the rest (0.19 s per selection, now 0.11 s). Which
    names these are never changes, so one search is enough.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
    if not {"_patch_builtin", "_patch_attr"} <= vars(interpreter).keys():
        return  # another version of Triton, as slow as it is
    is_builtin = importlib.import_module("triton.language.core").is_builtin

    @functools.lru_cache(None)
    def builtins_of(package) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package, builder, *scope) -> None:
        for name in builtins_of(package):
            member = getattr(package, name)
            if is_builtin(member):  # inside a kernel, its own call has replaced them all
                interpreter._patch_attr(package, name, member, builder, *scope)

    interpreter._patch_builtin = patch_builtin


def _interpreted(backend: str) -> bool:
    """Whether this backend is Triton under its interpreter, which is slow: 0.1 s per selection."""
    return backend == "triton" and not torch.cuda.is_available()


_LATIN = (torch.float32, torch.bfloat16, torch.float16)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Thin the products of dtypes with other axes for interpreted kernels, like a Latin square.

    Every combination of the other axes still meets the kernels, with one dtype instead of all.
    float64, which the selections hand to the reference, meets the first combination only.
    """
    combinations: dict[str, dict[str, int]] = {}
    dropped = []
    for item in items:
        if "kernels" in item.fixturenames:  # reports of what a compiler made, see triton_compiling
            item.add_marker("compiler")
        case = getattr(item, "callspec", None)
        dtype = case and case.params.get("dtype")
        if dtype is None or not _interpreted(case.params.get("backend")):
            continue
        seen = combinations.setdefault(item.nodeid.partition("[")[0], {})
        number = seen.setdefault(case.id.replace(str(dtype)[6:], "", 1), len(seen))
        wanted = _LATIN.index(dtype) == number % 3 if dtype in _LATIN else number == 0
        if not wanted:
            dropped.append(item)
    config.hook.pytest_deselected(items=dropped)
    gone = set(dropped)
    items[:] = [item for item in items if item not in gone]


@pytest.fixture(scope="session")
def device_of():
    """`device_of(backend)`: the device whose tensors a backend takes here, or None."""

    def find(backend: str) -> torch.device | None:
        if backend in ("reference", "cpp"):
            return torch.device("cpu")
        if torch.cuda.is_available():
            return torch.device("cuda")
        interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if interpreted:
            _quicken_interpreter()
        return torch.device("cpu") if interpreted else None

    return find


@pytest.fixture
def device(backend, device_of):
    """Device of the test's `backend`; skips where this machine cannot run it."""
    found = device_of(backend)
    if found is None:
        pytest.skip(f"{backend}: no CUDA GPU on this machine (Triton: or TRITON_INTERPRET=1)")
    return found


@pytest.fixture(scope="session")
def usable(device_of):
    """`usable(op)`: pairs (backend, device) of an op's implementations that run on this machine.

    Interpreted kernels are left out: test_triton.py draws fewer examples for them.
    """
    return lambda op: [
        (b, device_of(b)) for b in ops.implementations(op) if device_of(b) and not _interpreted(b)
    ]
