"""Ablations: one recipe trained with single decisions changed, over several seeds, in one table."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import apply_preset, for_method, read_recipe
from .methods.cocktail_options import PARITY
from .runs import (
    Tell,
    heading,
    markdown_table,
    over_runs,
    read_runs,
    spread,
    told,
    train_all,
    write_summary,
)

__all__ = ["VARIANTS", "Variant", "ablate", "collect", "markdown", "variant_fields"]


@dataclass(frozen=True)
class Variant:
    """A recipe with some fields changed.

    Attributes:
        name: of its folder and row.
        says: what it changes, in words.
        fields: recipe fields.
        paper: start from the published procedure; else from the recipe's defaults.
    """

    name: str
    says: str
    fields: dict[str, Any] = field(default_factory=dict)
    paper: bool = True


# The published procedure comes first: every other row but the last two changes one thing in it.
VARIANTS = (
    Variant("paper", "the published procedure, with the decisions of this library"),
    # the paper's own ablation (Figure 3)
    Variant("no-umg", "channels by the L1 norm of their weights (w/o UMG)", {"umg": False}),
    Variant(
        "ast-order", "subnets take turns, no dense pivot (AST's order)", {"dense_pivot": False}
    ),
    Variant("no-interpolation", "the last stage's weights for all", {"interpolation": False}),
    Variant("no-rewind", "stages train on without rewinding", {"rewind": 0}),
    Variant("no-distill", "no distillation from the dense network", {"distill": False}),
    # where paper, code and common practice differ
    Variant("nested-channels", "channels nested, too", {"nested_channels": True}),
    Variant("pair-batches", "the dense step's batch and output reused", {"pair_batches": True}),
    Variant("shared-update", "pruned weights decay and drift", {"mask_update": "shared"}),
    Variant("loud-channels", "BatchNorm of pruned channels not silenced", {"silence": False}),
    Variant("teacher-updates", "the teacher updates statistics", {"teacher_statistics": "update"}),
    Variant("measured-counts", "counts from measured sparsity", {"counts": "measured"}),
    Variant("mixed-statistics", "no recalibration in the search", {"search_samples": 0}),
    Variant(
        "no-recalibration",
        "no recalibration at all",
        {"search_samples": 0, "recalibrate_samples": 0},
    ),
    Variant("never-abandon", "the search keeps some of every stage", {"abandon": False}),
    Variant("stage-objective", "the search's score per stage", {"objective": "stages"}),
    Variant(
        "code-schedule",
        "learning rate of the public code",
        {name: PARITY[name] for name in ("first_cycle", "cycle")},
    ),
    Variant("parity", "all of the public code's ways", {k: v for k, v in PARITY.items()}),
    Variant("default", "the recipe as it is, with consolidation", paper=False),
)


def ablate(
    recipe: str,
    out: str | os.PathLike,
    seeds: Iterable[int] = range(1, 6),
    names: Iterable[str] = (),
    changes: dict[str, Any] | None = None,
    jobs: int = 1,
    tell: Tell = told,
) -> dict[str, Any]:
    """Train every variant with every seed, and write OUT/ablation.json and OUT/ablation.md.

    Runs lie in OUT/VARIANT/seed-S; finished ones are kept and unfinished ones resumed, so the same
    call goes on after a stop.

    Args:
        recipe: name or YAML file.
        out: folder.
        seeds: one run each.
        names: of variants (all by default).
        changes: recipe fields for all variants, such as a smaller number of epochs.
        jobs: runs at a time, each in a process of its own.
        tell: called after every run.

    Raises:
        ValueError: for an unknown variant, and as `train_all`.
        RunFailed: as `train_all`.
    """
    seeds, out = list(seeds), Path(out)
    chosen = _chosen(list(names))
    recipes = {v.name: variant_fields(recipe, v, changes or {}) for v in chosen}
    order = [(v.name, seed) for seed in seeds for v in chosen]  # all rows of a seed come together
    runs = {f"{name}, seed {s}": (recipes[name], out / name, s) for name, s in order}
    train_all(runs, jobs, tell)
    summary = collect(out, recipe, chosen, seeds, changes or {})
    write_summary(out / "ablation", summary, markdown(summary))
    return summary


def _chosen(names: list[str]) -> list[Variant]:
    known = {variant.name: variant for variant in VARIANTS}
    for name in names:
        if name not in known:
            raise ValueError(f"ablate: variant {name!r} is unknown; use some of {', '.join(known)}")
    return [v for v in VARIANTS if v.name in names or not names]


def variant_fields(recipe: str, variant: Variant, changes: dict[str, Any]) -> dict[str, Any]:
    """The complete fields of a variant: recipe, published procedure, changes, its own."""
    fields = for_method(read_recipe(recipe))
    if fields["method"] != "cocktail":
        raise ValueError(
            f"ablate: recipe {recipe} trains {fields['method']}, but the ablations are of cocktail"
        )
    if variant.paper:
        apply_preset(fields, "paper", {})
    fields.pop("paper", None)
    return {**fields, **changes, **variant.fields}


def collect(
    out: str | os.PathLike,
    recipe: str,
    variants: Iterable[Variant],
    seeds: list[int],
    changes: dict[str, Any],
) -> dict[str, Any]:
    """Means and standard deviations over seeds, from the runs' results.json."""
    rows = []
    for variant in variants:
        results = read_runs(Path(out) / variant.name, seeds)
        rows.append(
            {
                "name": variant.name,
                "says": variant.says,
                "fields": variant.fields,
                "paper": variant.paper,
                **over_runs(results),
                "choices": [r["method_state"]["choices"] for r in results],
            }
        )
    return {**heading(recipe, changes, seeds, results[0]), "rows": rows}


def markdown(summary: dict[str, Any]) -> str:
    """The table as Markdown, with what its columns mean."""
    families = list(summary["rows"][0]["accuracy"])
    head = ["variant", "what it changes", *families, "passes"]
    cells = [
        [row["name"], row["says"], *(spread(row["accuracy"][name]) for name in families)]
        + [f"{row['passes']:,.0f}"]
        for row in summary["rows"]
    ]
    lines = [
        f"# Ablation: {summary['recipe']} ({summary['model']} on {summary['data']})",
        "",
        f"Test accuracy in percent, mean over the subnets of a pattern and over the seeds "
        f"{', '.join(map(str, summary['seeds']))}; ± is the standard deviation over seeds. Passes: "
        "forward-backward passes of one batch, a forward alone counted as a third; the search's "
        "included, measuring for the report left out.",
        "",
        *markdown_table(head, cells),
    ]
    return "\n".join(lines) + "\n"
