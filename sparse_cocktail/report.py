"""What a finished run says of itself: results.json."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .methods import Context, Method

__all__ = ["environment", "run_results"]

FORMAT = 1


def run_results(
    ctx: Context, method: Method, facts: dict[str, Any], scores: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The content of results.json (README, "Formats").

    Args:
        ctx, method: of the finished run.
        facts: all fields of the run.
        scores: what `Method.finish` returned.
    """
    rows = {r["name"]: r for r in ctx.cocktail.summary(ctx.data.example(1).to(ctx.device))}
    subnets = []
    for name, score in scores.items():
        accuracies = {
            "accuracy": score["accuracy"],
            "accuracy_own": score.get("accuracy_own"),
            "accuracy_interpolated": score.get("accuracy_interpolated"),
            "weights": score.get("weights"),
        }
        subnets.append({**rows[score.get("subnet", name)], **accuracies})
    return {
        "format": FORMAT,
        "method": ctx.config.method,
        "data": ctx.data.name,
        "model": ctx.config.model,
        "seed": ctx.config.seed,
        "config": facts,
        "environment": environment(ctx.device),
        "seconds": {name: round(value, 3) for name, value in ctx.seconds.items()},
        "passes": passes(ctx),
        "subnets": subnets,
        "method_state": dataclasses.asdict(method.state),
    }


def passes(ctx: Context) -> dict[str, float]:
    """What a run computed, by what it was doing, in forward-backward passes of one batch.

    A forward alone counts as a third. "evaluate" is measuring for logs and the report.
    """
    sums: dict[str, float] = {}
    for name, samples in ctx.samples.items():
        doing, kind = name.rsplit(" ", 1)
        share = samples / ctx.config.batch_size / (3.0 if kind == "forward" else 1.0)
        sums[doing] = sums.get(doing, 0.0) + share
    return {name: round(value, 1) for name, value in sums.items()}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and the machine's part in a result."""
    return {
        "sparse_cocktail": __version__,
        "revision": _revision(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def _revision() -> str | None:
    """The git revision of the checkout that runs, if it is one."""
    folder = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if (folder / "csrc").is_dir() else None
