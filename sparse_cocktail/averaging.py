"""Averages of weight sets: greedy interpolation over a pool, running means that stay sparse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["ALPHAS", "Choice", "greedy_interpolation", "greedy_pool", "interpolate", "superpose"]

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


def greedy_pool(
    start: State,
    pool: Iterable[tuple[int, State]],
    score: Callable[[State], float],
    pruned: Callable[[State], State],
    alphas: Sequence[float],
) -> tuple[State, list[Choice]]:
    """Mix a pool of weight sets into one of them, a member at a time (Lottery Pools).

    A mix is pruned before it is scored, and taken when it scores no less than the present weights;
    in its Choice, alpha is 1 where none was.

    Args:
        start: the present weights at first.
        pool: (number, weights), in order.
        score: score(weights) on hold-out data, higher is better.
        pruned: makes a mix as sparse as the present weights are.
        alphas: candidate shares of the present weights; the first of those that score the same.

    Returns:
        The weights, and one Choice per member.
    """
    best, top, choices = start, score(start), []
    for number, state in pool:
        scores = {alpha: score(pruned(interpolate(best, state, alpha))) for alpha in alphas}
        chosen = max(scores, key=scores.__getitem__)
        tried = sorted([*map(list, scores.items()), [1.0, top]])
        if scores[chosen] >= top:
            best, top = pruned(interpolate(best, state, chosen)), scores[chosen]
        else:
            chosen = 1.0
        choices.append(Choice(number, chosen, top, tried))
    return best, choices


def superpose(
    average: State,
    ticket: State,
    number: int,
    pruned: Callable[[State], State],
    share: float | None = None,
) -> State:
    """Let a ticket join a running mean, which is pruned at once (Sup-tickets, Yin et al., 2022).

    Pruned after every ticket and not after the last one, the mean loses the weights that few
    tickets have before later ones are averaged with them.

    Args:
        average: of `number` weight sets: the first one, and the tickets so far.
        ticket: the next one.
        number: of weight sets in the average; the ticket counts 1 / (number + 1).
        pruned: makes the mean as sparse as they are.
        share: count every ticket by this share instead: a moving average ("CIMA").
    """
    share = 1.0 / (number + 1) if share is None else share
    return pruned(interpolate(average, ticket, 1.0 - share))
