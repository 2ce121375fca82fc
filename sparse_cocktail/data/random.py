"""Random generators that are a function of several numbers, such as (seed, stage, epoch)."""

from __future__ import annotations

import torch

__all__ = ["generator_for"]


def generator_for(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by several numbers."""
    seed = 0
    for number in numbers:  # a plain mix; neighbouring numbers give unrelated streams
        seed = (seed * 0x9E3779B97F4A7C15 + number + 0x632BE59BD9B4E019) % 2**63
        seed = (seed ^ (seed >> 29)) * 0xBF58476D1CE4E5B9 % 2**63
    return torch.Generator().manual_seed(seed)
