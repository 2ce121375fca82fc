"""Consolidation: which subnets are trained together in one step, after the stages."""

from __future__ import annotations

import torch

from .base import Context

__all__ = ["draw_subnets"]


def draw_subnets(ctx: Context, count: int, how: str) -> list[str]:
    """Names of `count` different sparse subnets for one step, a function of seed and step."""
    generator = ctx.generator()
    subnets = [s for s in ctx.cocktail.subnets.values() if s.row is not None]
    order = torch.randperm(len(subnets), generator=generator).tolist()
    drawn = [subnets[i] for i in order]
    if how == "uniform":
        return [s.name for s in drawn[:count]]
    families: dict[type, list] = {}
    for subnet in drawn:
        families.setdefault(type(subnet.pattern), []).append(subnet)
    kinds = sorted(families, key=lambda kind: kind.__name__)
    turns = torch.randperm(len(kinds), generator=generator).tolist()
    if how == "sparsest":
        first = max(families[kinds[turns[0]]], key=lambda s: s.pattern.sparsity)
        rest = [s for s in drawn if s is not first]
        return [s.name for s in [first, *rest][:count]]
    members = [families[kinds[turn]] for turn in turns]
    rounds = [m[i] for i in range(max(map(len, members))) for m in members if i < len(m)]
    return [s.name for s in rounds[:count]]
