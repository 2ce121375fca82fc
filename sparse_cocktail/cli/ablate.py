"""`sparse-cocktail ablate`: single decisions changed, over several seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..ablation import VARIANTS
from .base import app, changed_fields, console, runs_shown

_HELP = (
    "Train a recipe with single decisions changed, over several seeds; table and pictures.\n\n"
    "Every variant changes one thing in the published procedure (`paper`); `default` is the recipe "
    "as it is. The same command goes on where it was stopped: finished runs stay, unfinished ones "
    "resume.\n\nVariants:\n\n" + "\n\n".join(f"{v.name}: {v.says}" for v in VARIANTS)
)


@app.command(help=_HELP)
def ablate(
    recipe: Annotated[str, typer.Option(help="recipe by name, or a YAML file")] = "digits",
    seeds: Annotated[int, typer.Option(help="seeds 1 to this number", min=1)] = 5,
    out: Annotated[
        Path | None, typer.Option(help="folder of all runs (default: runs/ablation-RECIPE)")
    ] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="only these; may be repeated (default: all)")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="FIELD=VALUE for all runs, such as epochs=4; may be repeated"),
    ] = None,
    jobs: Annotated[int, typer.Option(help="runs at a time", min=1)] = 1,
) -> None:
    from ..ablation import ablate as run
    from ..ablation_plots import plot_ablation

    changes = changed_fields("ablate", change)
    out = out or Path("runs") / f"ablation-{Path(recipe).stem}"
    with runs_shown() as tell:
        summary = run(recipe, out, range(1, seeds + 1), variant or (), changes, jobs, tell)
    console.print(_table(summary))
    pictures = plot_ablation(out)
    files = [out / "ablation.json", out / "ablation.md", *pictures]
    console.print(", ".join(map(str, files)))


def _table(summary: dict) -> Table:
    from ..runs import spread

    families = list(summary["rows"][0]["accuracy"])
    title = f"{summary['recipe']}, seeds {', '.join(map(str, summary['seeds']))}"
    table = Table(
        title=title,
        caption="test accuracy in percent, mean over subnets and seeds ± std over seeds",
    )
    table.add_column("variant")
    for name in [*families, "passes"]:
        table.add_column(name, justify="right")
    for row in summary["rows"]:
        cells = [spread(row["accuracy"][name]) for name in families]
        table.add_row(row["name"], *cells, f"{row['passes']:,.0f}")
    return table
