"""Linear mode connectivity of a finished cocktail run: the error on the lines between its networks.

For two networks with parameters A and B, error(alpha) is the error on the hold-out part of the
network with alpha * A + (1 - alpha) * B, its BatchNorm statistics estimated anew at every point.
Then

    barrier = max over alpha of error(alpha) - (alpha * error(1) + (1 - alpha) * error(0))

in points of error; at 0 nothing on the line is worse than the line between the ends' errors.
Frankle et al. (ICML 2020) subtract the mean of the two ends, and call below 2 points connected;
the weighted mean, as in Entezari et al. (ICLR 2022), finds no barrier in a mere difference between
the ends. No permutation of channels is sought: all stages grow from one initialization. As a
maximum of noisy numbers a barrier leans upwards, by a few samples of what it is measured on.

A network is D_k, the trained weights of stage k, with a mask of its stage baked in as zeros, as
`Cocktail.export` does it: where a mask leaves no weight of a channel, its bias and the scale and
shift of the BatchNorm behind it are zero as well. The line joins all of these numbers. So a point
of it has weights where either end has some, a channel sounds where it lives in either end, and the
ends are the networks themselves. Lines are drawn

- between stages: D_j * m_j to D_k * m_k of one pattern, and D_j to D_k (as Yin et al. 2022,
  "Lottery Pools", Figure 2, along iterative pruning);
- between patterns: D_k * m to D_k * m', the same weights under two masks of one stage (Sparse
  Cocktail, Appendix J, speaks of at most 3.2 points).

An N:M mask stays in force until the next one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .averaging import State, interpolate
from .cocktail import Cocktail
from .data import Data, FolderData, Split
from .distributed import own_device
from .files import read_json, read_tensors, write_json
from .methods.cocktail import pool_file
from .patterns import family
from .pruning import followers
from .recalibrate import recalibrate
from .tasks import Classification

__all__ = ["Line", "Network", "barrier", "baked", "check_run", "lines_of", "measure_connectivity"]


class Network(NamedTuple):
    """The weights of a stage with the mask of a subnet."""

    stage: int
    subnet: str


class Line(NamedTuple):
    """A line between two networks; of `patterns` there is one, or two between patterns."""

    patterns: tuple[str, ...]
    a: Network
    b: Network
    points: int  # both ends included

    @property
    def alphas(self) -> list[float]:
        """Shares of `a`, from 1 to 0."""
        return [1.0 - i / (self.points - 1) for i in range(self.points)]


def barrier(alphas: Sequence[float], errors: Sequence[float]) -> float:
    """How far the errors at `alphas`, from 1 to 0, rise above the line between the two ends'."""
    first, last = errors[0], errors[-1]  # so written, it is exactly 0 at both
    return max(e - last - x * (first - last) for x, e in zip(alphas, errors, strict=True))


# ---- networks and lines --------------------------------------------------------------------------


def ladder(cocktail: Cocktail) -> dict[str, dict[int, str]]:
    """{pattern: {stage: subnet}}; a mask stays in force until the next one of its pattern."""
    made = [s for s in cocktail.subnets.values() if s.row is not None and s.stage]
    last = max((s.stage for s in made), default=0)
    found = {"dense": dict.fromkeys(range(last + 1), "dense")}
    for subnet in sorted(made, key=lambda s: s.stage):
        stages = range(subnet.stage, last + 1)
        found.setdefault(family(subnet.pattern.kind), {}).update(dict.fromkeys(stages, subnet.name))
    return found


def lines_of(cocktail: Cocktail, points: int = 11, matrix_points: int = 5) -> list[Line]:
    """All lines: between the stages of every pattern, and between the patterns of every stage.

    Args:
        cocktail: of a finished run.
        points: on lines between adjacent stages and between patterns, both ends included.
        matrix_points: on lines between stages further apart.
    """
    lines, found = [], ladder(cocktail)
    for pattern, stages in found.items():
        for j, k in combinations(stages, 2):
            ends = Network(j, stages[j]), Network(k, stages[k])
            lines.append(Line((pattern,), *ends, points if k == j + 1 else matrix_points))
    sparse = [pattern for pattern in found if pattern != "dense"]
    for p, q in combinations(sparse, 2):
        for k in found[p].keys() & found[q].keys():
            lines.append(Line((p, q), Network(k, found[p][k]), Network(k, found[q][k]), points))
    return sorted(lines, key=lambda line: (line.a.stage, line.b.stage))  # few files are open


def baked(cocktail: Cocktail, weights: State, name: str) -> State:
    """`weights` of the cocktail's model with a subnet's mask as zeros; other tensors are the same.

    Zero are pruned weights and, where a channel is silent, its bias and BatchNorm's scale, shift
    and running mean.
    """
    subnet = cocktail.subnet(name)
    if subnet.row is None:
        return dict(weights)
    kept = cocktail.kept_parameters([name])
    # a BatchNorm without a scale is silent through its mean
    kept += [(norm.running_mean, subnet.live[i]) for norm, i in _followers(cocktail)]
    masks = {id(tensor): keep for tensor, keep in kept}
    held = cocktail.model.state_dict(keep_vars=True)
    return {
        key: value * masks[id(held[key])] if id(held[key]) in masks else value
        for key, value in weights.items()
    }


def _followers(cocktail: Cocktail) -> list[tuple[Any, int]]:
    pairs = followers(cocktail.model, cocktail.layers)
    return [(norm, index) for norm, index in pairs if norm.running_mean is not None]


# ---- a run ---------------------------------------------------------------------------------------


def check_run(folder: str | os.PathLike) -> dict[str, Any]:
    """The config of a finished run of the method cocktail.

    Raises ValueError for a folder without one, for another method, and without stages' weights.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"connect: run={folder} holds no run (no config.json); give the folder that train "
            "wrote (--out)"
        )
    config = read_json(folder / "config.json")
    if (method := config.get("method")) != "cocktail":
        raise ValueError(
            f"connect: run={folder} is of method={method!r}, which keeps no weights of stages; "
            "give a run of method cocktail"
        )
    if not (folder / "cocktail.safetensors").is_file():
        raise ValueError(
            f"connect: run={folder} is not finished (no cocktail.safetensors); go on with: "
            f"sparse-cocktail resume {folder}"
        )
    files = [pool_file(k) for k in range(config["stages"] + 1)]
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(
            f"connect: run={folder} lacks {', '.join(missing)}, the weights that its stages "
            "trained; put the files back, or train again"
        )
    return config


def measure_connectivity(
    folder: str | os.PathLike,
    cocktail: Cocktail,
    data: Data | FolderData,
    *,
    points: int = 11,
    matrix_points: int = 5,
    split: str = "holdout",
    samples: int | None = None,
    device: str = "auto",
    tell: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, Any]:
    """Measure all lines of a finished cocktail run, and write RUN/connectivity.json.

    Args:
        folder: of the run; its pool of weights is read.
        cocktail: that of the run, on the CPU: `Cocktail.load(folder / "cocktail.safetensors")`.
        data: that of the run.
        points, matrix_points: as `lines_of` takes them, from 3 on.
        split: where errors are measured: "holdout", or "train" where that is too small to tell.
        samples: training inputs for BatchNorm statistics at a point (0: the ends' are mixed); None:
            as in the run.
        device: to compute on.
        tell: called as tell(evaluations done, of how many, what) before the first and after each.

    Returns:
        The content of the file: "networks" [{stage, subnet, error}], "stages" and "patterns" with
        a row {patterns, a, b, alphas, errors, barrier} per line; errors in percent, barriers in
        points, alphas the shares of `a`; a and b are [stage, subnet].

    Raises:
        ValueError: for a folder that is no such run, weights that do not fit, too few points, and
            another split: the test part is for the run's own report.
    """
    config = check_run(folder)
    for name, value in (("points", points), ("matrix_points", matrix_points)):
        if value < 3:
            raise ValueError(
                f"connect: {name}={value} is below 3, both ends and a point between; 11 is usual"
            )
    if split not in ("holdout", "train"):
        raise ValueError(
            f"connect: split={split!r} is neither holdout nor train; the test part is read for the "
            "run's own report alone"
        )
    samples = config["recalibrate_samples"] if samples is None else samples
    if samples < 0:
        raise ValueError(f"connect: samples={samples} is below 0; 0 mixes the ends' statistics")
    device = own_device(device)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"connect: device={device!r}, but torch sees no GPU; use cpu")
    lines = lines_of(cocktail, points, matrix_points)
    threads = torch.get_num_threads()
    torch.set_num_threads(config["threads"] or threads)  # as in the run: equal sums
    try:
        data = data.to(device)
        size = max(config["batch_size"], 256)
        batches = data.calibration(samples, size) if samples else []
        probe = _Probe(Path(folder), cocktail, getattr(data, split), batches, device)
        rows = probe.measure(lines, tell)
    finally:
        torch.set_num_threads(threads)
    errors = sorted(probe.errors.items())
    result = {
        "format": 1,
        "data": data.name,
        "model": config["model"],
        "seed": config["seed"],
        "split": split,
        "measured_on": probe.count,
        "recalibrate_samples": samples,
        "networks": [{"stage": n.stage, "subnet": n.subnet, "error": e} for n, e in errors],
        "stages": [row for row in rows if len(row["patterns"]) == 1],
        "patterns": [row for row in rows if len(row["patterns"]) == 2],
    }
    write_json(Path(folder) / "connectivity.json", result)
    return result


class _Probe:
    """Measures networks of a run on one part of its data, with one plain model for all of them."""

    def __init__(
        self,
        folder: Path,
        cocktail: Cocktail,
        part: Split,
        batches: list[Tensor],
        device: str,
    ) -> None:
        self.folder, self.cocktail, self.device = folder, cocktail, device
        self.model = cocktail.export("dense", plain=True).to(device)
        self.part, self.batches = part, batches
        self.errors: dict[Network, float] = {}
        self.count = 0  # samples of the part
        self._weights = lru_cache(2)(self._read)  # a stage's file is large, and there may be 16

    def measure(self, lines: list[Line], tell: Callable[[int, int, str], None]) -> list[dict]:
        """A row per line; `errors` has every end."""
        ends = {end for line in lines for end in (line.a, line.b)}
        total, done, rows = len(ends) + sum(line.points - 2 for line in lines), 0, []

        def error(state: State) -> float:
            nonlocal done
            found = self._error(state)
            done += 1
            tell(done, total, what)
            return found

        tell(0, total, "")
        for line in lines:
            names = " - ".join(line.patterns)
            what = f"{names}, stages {line.a.stage} and {line.b.stage}"
            a, b = (self._network(end) for end in (line.a, line.b))
            for end, state in ((line.a, a), (line.b, b)):
                if end not in self.errors:
                    self.errors[end] = error(state)
            inside = [error(interpolate(a, b, alpha)) for alpha in line.alphas[1:-1]]
            errors = [self.errors[line.a], *inside, self.errors[line.b]]
            row = {"alphas": line.alphas, "errors": errors, "barrier": barrier(line.alphas, errors)}
            rows.append({"patterns": line.patterns, "a": line.a, "b": line.b, **row})
        return rows

    def _network(self, network: Network) -> State:
        state = baked(self.cocktail, self._weights(network.stage), network.subnet)
        return {key: value.to(self.device) for key, value in state.items()}

    def _read(self, stage: int) -> State:
        path = self.folder / pool_file(stage)
        weights, _ = read_tensors(path)
        here, there = self.model.state_dict(), {k: v.shape for k, v in weights.items()}
        if there != {k: v.shape for k, v in here.items()}:
            raise ValueError(
                f"connect: {path} holds the weights of another network than the run's "
                "cocktail.safetensors; put the run's own file back, or train again"
            )
        return weights

    @torch.no_grad()
    def _error(self, state: dict[str, Tensor]) -> float:
        """Error of a network in percent."""
        self.model.load_state_dict(state)
        if self.batches:
            recalibrate(self.model, self.batches)
        right, self.count = 0.0, 0
        for inputs, targets in self.part.batches(1024):
            score, samples = Classification().metric(self.model(inputs), targets)
            right, self.count = right + float(score), self.count + samples
        return 100.0 - 100.0 * right / self.count
