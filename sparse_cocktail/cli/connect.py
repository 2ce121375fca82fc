"""`sparse-cocktail connect`: the error on the lines between a run's networks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .base import app, console
from .loading import ModelOption, data_of, load_cocktail


@app.command()
def connect(
    run: Annotated[Path, typer.Argument(help="the folder of a finished run of method cocktail")],
    points: Annotated[
        int, typer.Option(help="between adjacent stages and between patterns, with both ends")
    ] = 11,
    matrix_points: Annotated[int, typer.Option(help="between stages further apart")] = 5,
    split: Annotated[
        str, typer.Option(help="errors on: holdout, or train where that is small")
    ] = "holdout",
    samples: Annotated[
        int | None,
        typer.Option(
            help="training samples for BatchNorm statistics at every point (0: the ends' are "
            "mixed; default: as in the run)"
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="data set (default: that of the run)")] = None,
    data_dir: Annotated[str | None, typer.Option(help="folder with the files of the data")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto")] = "auto",
    model: ModelOption = "",
) -> None:
    """Measure linear mode connectivity: error barriers between stages and between patterns.

    The weights of two networks are mixed in shares from 1 to 0, and the error is measured along the
    way; the barrier is the highest rise above the line between the ends' errors. Writes
    RUN/connectivity.json and two pictures.
    """
    from ..connectivity import check_run, lines_of, measure_connectivity
    from ..connectivity_plots import plot_connectivity

    check_run(run)
    cocktail = load_cocktail(run, model)
    count = len(lines_of(cocktail))
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)

        def tell(done: int, total: int, what: str) -> None:
            if done == 0:
                console.print(f"{count} lines, {total} networks to evaluate")
            bar.update(task, completed=done, total=total, description=what)

        result = measure_connectivity(
            run,
            cocktail,
            data_of(cocktail, data, data_dir),
            points=points,
            matrix_points=matrix_points,
            split=split,
            samples=samples,
            device=device,
            tell=tell,
        )
    console.print(_table(result))
    files = [run / "connectivity.json", *plot_connectivity(run)]
    console.print(", ".join(map(str, files)), markup=False, highlight=False, soft_wrap=True)


def _table(result: dict) -> Table:
    """Mean and maximum of the barriers, for every kind of line."""
    sample = 100.0 / result["measured_on"]
    table = Table(
        title="error barriers",
        caption=f"points of error on {result['split']}; one sample is {sample:.2g} points",
    )
    table.add_column("between")
    for name in ("lines", "mean", "largest"):
        table.add_column(name, justify="right")
    groups: dict[str, list[float]] = {}
    for row in result["stages"]:
        (pattern,), adjacent = row["patterns"], row["b"][0] == row["a"][0] + 1
        kinds = ("adjacent stages", "all stages") if adjacent else ("all stages",)
        for kind in kinds:
            groups.setdefault(f"{pattern}, {kind}", []).append(row["barrier"])
    for row in result["patterns"]:
        groups.setdefault(" to ".join(row["patterns"]), []).append(row["barrier"])
    for name, found in groups.items():
        mean = sum(found) / len(found)
        table.add_row(name, str(len(found)), f"{mean:.2f}", f"{max(found):.2f}")
    return table
