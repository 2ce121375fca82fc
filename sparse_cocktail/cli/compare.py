"""`sparse-cocktail compare`: every training method at equal compute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from ..compare import ENTRIES
from .base import app, changed_fields, console, runs_shown

_HELP = (
    "Train a recipe with every method at equal compute, over several seeds; tables and pictures."
    "\n\nEvery run may spend the passes of the recipe's own Sparse Cocktail run, or --budget. The "
    "same command goes on where it was stopped: finished runs stay, unfinished ones resume.\n\n"
    "Entries:\n\n" + "\n\n".join(f"{entry.name}: {entry.says}" for entry in ENTRIES)
)


@app.command(help=_HELP)
def compare(
    recipe: Annotated[str, typer.Option(help="recipe by name, or a YAML file")] = "digits",
    methods: Annotated[
        str, typer.Option(help="only these entries, or all of these methods, as in cocktail,gmp")
    ] = "",
    seeds: Annotated[int, typer.Option(help="seeds 1 to this number", min=1)] = 3,
    stages: Annotated[
        int | None,
        typer.Option(help="rungs of every ladder; N:M has three (default: the recipe's)", min=1),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="compute of a run, in epochs of forward-backward passes (default: that of the "
            "recipe's Sparse Cocktail run)"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of all runs (default: runs/compare-RECIPE)")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="FIELD=VALUE for all runs that know it; may be repeated"),
    ] = None,
    jobs: Annotated[int, typer.Option(help="runs at a time", min=1)] = 1,
) -> None:
    from ..compare import compare as run
    from ..compare_plots import plot_comparison

    changes = changed_fields("compare", change)
    if stages is not None:
        changes["stages"] = stages
    names = [name.strip() for name in methods.split(",") if name.strip()]
    out = out or Path("runs") / f"compare-{Path(recipe).stem}"
    with runs_shown() as tell:
        summary = run(recipe, out, range(1, seeds + 1), names, changes, budget, jobs, tell)
    console.print(_table(summary))
    files = [out / "compare.json", out / "compare.md", *plot_comparison(out)]
    console.print(", ".join(map(str, files)))


def _table(summary: dict[str, Any]) -> Table:
    from ..plots import PATTERNS
    from ..runs import spread

    families = [k for k in PATTERNS if any(k in row["accuracy"] for row in summary["rows"])]
    table = Table(
        title=f"{summary['recipe']}, seeds {', '.join(map(str, summary['seeds']))}: "
        f"{summary['budget']:.2f} epochs of passes per run",
        caption="test accuracy in percent, mean over subnets and seeds ± std over seeds; sets: of "
        "weights; each: passes per subnet",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", no_wrap=True)
    for name in (*families, "subnets", "sets", "passes", "each"):
        short = "unstr." if name == "unstructured" else name  # a narrow terminal has room for all
        table.add_column(short, justify="right")
    for row in summary["rows"]:
        accuracies = [spread(row["accuracy"][k]) if k in row["accuracy"] else "" for k in families]
        numbers = [str(len(row["subnets"])), str(row["weight_sets"])]
        numbers += [f"{row['passes']:,.0f}", f"{row['passes_per_subnet']:,.1f}"]
        table.add_row(row["name"], *accuracies, *numbers)
    return table
