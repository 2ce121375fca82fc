"""What subnets cost: weights that remain, multiply-adds, bytes, milliseconds; and the best choice.

Everything is counted from masks and shapes but the latency, which is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .modules import output_positions

__all__ = ["Costs", "Remains", "best", "flops", "latency_ms", "remains", "state_bytes"]

MEASURE_SECONDS = 0.2  # of repeated runs per subnet: the median of dozens to hundreds of them


@dataclass
class Remains:
    """What a mask leaves: `kept` weights per masked layer, and what it takes off the dense network.

    `zeros` is the number of parameters that are zero, `saved` the bytes (below 0 where a mask costs
    more than it removes).
    """

    kept: dict[str, int]
    zeros: int = 0
    saved: int = 0


def remains(
    layers: dict[str, nn.Module],
    norms: Sequence[tuple[nn.Module, int]],
    bits: Sequence[Tensor] | None,
    live: Sequence[Tensor] | None,
) -> Remains:
    """Count what one subnet's masks leave.

    Args:
        layers: the masked layers by name.
        norms: pairs (BatchNorm, index of the layer that it follows).
        bits: packed mask per layer, or None for the dense network.
        live: bool (out,) per layer: the channels that are not wholly pruned.
    """
    left = Remains({name: layer.weight.numel() for name, layer in layers.items()})
    if bits is None:
        return left
    counts = torch.stack([ops.mask_count(b) for b in bits]).tolist()
    silent = torch.stack([(~channels).sum() for channels in live]).tolist()
    for (name, layer), kept, pruned in zip(layers.items(), counts, silent, strict=True):
        weight, bias = layer.weight, layer.bias
        out = weight.shape[0]
        in_rows = (out - pruned) * (weight.numel() // max(out, 1))
        mask_bytes = 0 if kept == in_rows else -(-in_rows // 8)  # complete rows need no mask
        left.kept[name] = kept
        left.zeros += weight.numel() - kept + (0 if bias is None else pruned)
        left.saved += (weight.numel() - kept) * weight.element_size() - mask_bytes
        left.saved += 0 if bias is None else pruned * bias.element_size()
    for norm, index in norms:
        affine = [t for t in (norm.weight, norm.bias) if t is not None]
        statistics = [t for t in (norm.running_mean, norm.running_var) if t is not None]
        left.zeros += silent[index] * len(affine)
        left.saved += silent[index] * sum(t.element_size() for t in affine + statistics)
    return left


def state_bytes(model: nn.Module) -> int:
    """Bytes of a model's state dict (parameters and persistent buffers), shared tensors once."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if torch.is_tensor(t)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def flops(model: nn.Module, positions: dict[str, int], kept: dict[str, int]) -> int:
    """Multiply-adds per sample: weights that are kept times output positions, over all layers."""
    weights = {name: model.get_submodule(name).weight.numel() for name in positions}
    return sum(kept.get(name, weights[name]) * count for name, count in positions.items())


def latency_ms(network: nn.Module, example_input: Tensor) -> float:
    """Median milliseconds of one forward on the input's device, with torch's present threads.

    CUDA work is waited for; the first runs are warm-up.
    """
    from torch.utils.benchmark import Timer  # with half a second of imports

    timer = Timer(
        "network(x)",
        globals={"network": network, "x": example_input},
        num_threads=torch.get_num_threads(),
    )
    with torch.no_grad():
        return 1e3 * timer.blocked_autorange(min_run_time=MEASURE_SECONDS).median


class Costs:
    """What a Cocktail says of the cost of its subnets: rows of figures."""

    def summary(self, example_input: Tensor | None = None) -> list[dict[str, Any]]:
        """One row per subnet: name, pattern, sparsity, nnz, parameters, bytes, flops, accuracy.

        `sparsity` is the share of the masked layers' weights that is zero, `nnz` the number that is
        not, `parameters` the nonzero parameters of the whole network, `flops` the multiply-adds per
        sample that remain (kept weights times output positions; None without `example_input`).

        `bytes` is what the subnet needs when it is stored alone: its kept weights, one mask bit per
        weight of the channels that are left (none in a layer that keeps all of them), and all other
        parameters and buffers. Wholly pruned channels count nothing, nor do their bias and their
        share of the BatchNorm behind; the inputs they fed do count. The dense network needs its
        state dict.
        """
        with self.using("dense"):
            stored = state_bytes(self.model)
            positions = None
            if example_input is not None:
                positions = output_positions(self.model, example_input)
        total = sum(p.numel() for p in self.model.parameters())
        rows = []
        for subnet in self.subnets.values():
            bits = None if subnet.row is None else self.bank.views(subnet.row)
            left = remains(self.layers, self._silenced, bits, subnet.live)
            nnz = sum(left.kept.values())
            work = None if positions is None else flops(self.model, positions, left.kept)
            rows.append(
                {
                    "name": subnet.name,
                    "pattern": subnet.pattern.kind,
                    "sparsity": 1.0 - nnz / self.bank.numel,
                    "nnz": nnz,
                    "parameters": total - left.zeros,
                    "bytes": stored - left.saved,
                    "flops": work,
                    "accuracy": subnet.accuracy,
                }
            )
        return rows


# ---- the best choice -----------------------------------------------------------------------------


def best(
    rows: Sequence[dict[str, Any]],
    limits: dict[str, float | None],
    measure: Callable[[str], float],
) -> str:
    """Name of the best row within limits.

    Args:
        rows: of `Cocktail.summary`.
        limits: largest "flops", "bytes" and "ms"; None is no limit. Rows hold the first two.
        measure: milliseconds of a row by name; called only as far as the answer needs it.

    Raises:
        ValueError: when no limit is given or nothing fits.
        TypeError: for a limit that is no number.
    """
    limits = {what: limit for what, limit in limits.items() if limit is not None}
    if not limits:
        raise ValueError(
            "Cocktail.pick: no limit is given; give max_flops, max_bytes or max_ms, or name the "
            "subnet yourself"
        )
    for what, limit in limits.items():
        if not isinstance(limit, Real) or isinstance(limit, bool):
            raise TypeError(
                f"Cocktail.pick: max_{what}={limit!r} is a {type(limit).__name__}; give a number"
            )
    counted = {what: limit for what, limit in limits.items() if what != "ms"}
    fitting = [row for row in rows if all(row[w] <= limit for w, limit in counted.items())]
    if not fitting:
        raise _nothing_fits(rows, counted)
    fitting.sort(key=_rank, reverse=True)
    if "ms" not in limits:
        return fitting[0]["name"]
    timed = []
    for row in fitting:
        timed.append({**row, "ms": measure(row["name"])})
        if timed[-1]["ms"] <= limits["ms"]:
            return row["name"]
    raise _nothing_fits(timed, limits)


def _rank(row: dict[str, Any]) -> tuple:
    """Larger is better: recorded accuracy, else the number of weights; then what costs less."""
    accuracy, cost = row["accuracy"], (-(row["flops"] or 0), -row["bytes"])
    return (accuracy is not None, row["nnz"] if accuracy is None else accuracy, *cost)


def _nothing_fits(rows: Sequence[dict[str, Any]], limits: dict[str, float]) -> ValueError:
    asked = " and ".join(f"max_{what}={limit:,}" for what, limit in limits.items())
    least = {what: min(rows, key=lambda row, what=what: row[what]) for what in limits}
    found = ", ".join(
        f"{what} {row[what]:.4g} ({row['name']})"
        if what == "ms"
        else f"{what} {row[what]:,} ({row['name']})"
        for what, row in least.items()
    )
    return ValueError(
        f"Cocktail.pick: no subnet has {asked}; the smallest there are: {found}; allow more, or "
        "add a sparser subnet"
    )
