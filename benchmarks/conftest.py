"""Fixtures of `pytest benchmarks/bench_masks.py --benchmark-only`."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from groups_masks import makers  # isort: skip - neighbours, not packages
from machine import cache_bytes, memory_bytes  # isort: skip
from shapes import CASES, Inputs  # isort: skip
from timing import Bound  # isort: skip


@cache
def _inputs(case: str) -> Inputs:
    cached = (0, 0) if case == "small" else (cache_bytes(), memory_bytes() // 8)
    return Inputs(CASES[case], torch.device("cpu"), *cached)


@cache
def _group(case: str, index: int):
    return makers("small")[index][1](_inputs(case).sets[0])


def pytest_generate_tests(metafunc) -> None:
    """One test per group and implementation; the small weights give the names."""
    if "prepared" not in metafunc.fixturenames:
        return
    choices, names = [], []
    for index in range(len(makers("small"))):
        group = _group("small", index)
        for place, impl in enumerate(group.impls):
            choices.append((index, place))
            names.append(f"{group.op}, {group.setting}, {impl.name}".replace("/", "."))
    metafunc.parametrize("prepared", choices, ids=names, indirect=True)


@pytest.fixture
def prepared(request):
    """(implementation, gate, one bound call per set of weights) of ResNet-50."""
    index, place = request.param
    group = _group("resnet50", index)
    impl = group.impls[place]
    bound = (impl.bind(weights) for weights in _inputs("resnet50").sets)
    return impl, group.gate, [b if isinstance(b, Bound) else Bound(b) for b in bound]
