"""Averages of weight sets: greedy interpolation over a pool."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["ALPHAS", "Choice", "greedy_interpolation", "interpolate"]

# Share of the current weights. 1 keeps them, so that a stage that does not help is left out.
ALPHAS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)

State = dict[str, Tensor]


@dataclass
class Choice:
    """One step of the search: the factor chosen for a stage, and the scores that were tried."""

    stage: int
    alpha: float
    score: float
    tried: list[list[float]]  # [alpha, score]


def interpolate(a: State, b: State, alpha: float) -> State:
    """alpha * a + (1 - alpha) * b for floating-point entries; others come from `a`."""
    if alpha == 1.0:
        return {name: tensor.clone() for name, tensor in a.items()}
    return {
        name: tensor.lerp(b[name], 1.0 - alpha) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in a.items()
    }


def greedy_interpolation(
    pool: Iterable[tuple[int, State]],
    score: Callable[[State, int], float],
    alphas: Sequence[float] = ALPHAS,
    abandon: bool = True,
) -> tuple[State, list[Choice]]:
    """Fold a pool of weight sets into one, a member at a time (Sparse Cocktail, section 3.6).

    Starting from the first member, each next one is mixed in with the factor that scores best;
    keeping the current weights (alpha = 1) wins unless another factor is strictly better.

    Args:
        pool: (stage, weights), in order.
        score: score(weights, stage) on hold-out data, higher is better.
        alphas: candidate shares of the current weights.
        abandon: whether keeping the current weights (alpha = 1) is a candidate.

    Returns:
        The weights, and one Choice per member after the first.
    """
    members = iter(pool)
    _, best = next(members, (None, None))
    if best is None:
        raise ValueError("greedy_interpolation: pool is empty; give at least one weight set")
    choices = []
    for stage, state in members:
        scores = {1.0: score(best, stage)} if abandon else {}
        for alpha in alphas:
            if alpha != 1.0:
                scores[alpha] = score(interpolate(best, state, alpha), stage)
        chosen = max(scores, key=scores.__getitem__)  # the first of equals: alpha = 1 leads
        best = interpolate(best, state, chosen)
        choices.append(Choice(stage, chosen, scores[chosen], sorted(map(list, scores.items()))))
    return best, choices
