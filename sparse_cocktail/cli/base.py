"""The application that every command registers with, and the console they write to."""

from __future__ import annotations

import typer
from rich.console import Console

__all__ = ["app", "console"]

app = typer.Typer(
    help="Co-train a dense network and a whole menu of sparse subnetworks from one weight set.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
