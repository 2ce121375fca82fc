"""Weights, masks and comparisons that the tests of the packed 2:4 format share."""

import pytest
import torch

from sparse_cocktail import ops

CPP = torch.ops.sparse_cocktail_cpp
needs_cpp = pytest.mark.skipif(ops.extension_path is None, reason="the C++ extension is not built")
SHAPES = ((1, 4), (3, 8), (16, 64), (17, 36), (64, 64), (65, 132), (96, 200))
DTYPES = (torch.bfloat16, torch.float16)


def named(shape):
    return f"{shape[0]}x{shape[1]}"


def weight_of(out, inputs, dtype=torch.float32, seed=0):
    """Small integers with ties, zeros of both signs and groups that are all zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-4, 5, (out, inputs), generator=generator).to(dtype)
    weight[torch.rand(out, inputs, generator=generator) < 0.1] = -0.0
    weight.view(out, -1, 4)[torch.rand(out, inputs // 4, generator=generator) < 0.1] = 0.0
    return weight


def bits_of(out, inputs, seed=0):
    """Masks of 2:4 of which many groups keep one or none."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(out, inputs // 4, 4, generator=generator).argsort(-1)
    keep = torch.randint(0, 3, (out, inputs // 4, 1), generator=generator)
    return ops.pack_mask((ranks < keep).view(out, inputs))


def masked(weight, bits):
    return torch.where(ops.unpack_mask(bits, weight.shape), weight, torch.zeros_like(weight))


def raw(tensor):
    """The bits of floating-point numbers, so that NaN and -0.0 compare."""
    return tensor.view(torch.int16)
