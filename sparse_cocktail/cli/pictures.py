"""Commands that show a finished run: plot, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .base import app, console

RunArgument = Annotated[Path, typer.Argument(help="the folder of a finished run")]


@app.command()
def plot(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option(help="folder for the pictures (default: RUN/plots)")
    ] = None,
) -> None:
    """Draw the pictures of a run again, from its results.json and log.jsonl."""
    from ..page import read_run
    from ..plots import pictures, save_figure

    place = run / "plots" if out is None else out
    if place.exists() and not place.is_dir():
        raise ValueError(f"plot: out={place} is a file; give a folder for the pictures")
    results, log = read_run(run, "plot")
    for name, picture in pictures(results, log).items():
        path = save_figure(place / f"{name}.png", picture.draw, picture.size)
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    if not log:
        console.print("no log.jsonl: the picture of the training is left out")


@app.command()
def report(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="FILE.html (default: RUN/report.html)")] = None,
) -> None:
    """Write one HTML page about a run, which needs no other file and no network."""
    from ..page import write_page

    if out is not None and (out.suffix not in (".html", ".htm") or out.is_dir()):
        raise ValueError(f"report: out={out} must be a file that ends in .html")
    console.print(str(write_page(run, out)), markup=False, highlight=False, soft_wrap=True)
