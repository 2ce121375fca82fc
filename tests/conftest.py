"""Fixtures of all tests: seeds, threads, and where a backend can run on this machine."""

import os

import pytest
import torch
from hypothesis import settings

from sparse_cocktail import ops

# Examples are drawn from a fixed seed, so that a failure comes back on the next run.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=40)
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


@pytest.fixture(scope="session")
def device_of():
    """`device_of(backend)`: the device whose tensors a backend takes here, or None."""

    def find(backend: str) -> torch.device | None:
        if backend in ("reference", "cpp"):
            return torch.device("cpu")
        if torch.cuda.is_available():
            return torch.device("cuda")
        interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
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
    """`usable(op)`: pairs (backend, device) of an op's implementations that run on this machine."""
    return lambda op: [(b, device_of(b)) for b in ops.implementations(op) if device_of(b)]
