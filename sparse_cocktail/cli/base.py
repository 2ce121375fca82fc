"""The application that every command registers with, and what several of them do."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["app", "changed_fields", "console", "runs_shown"]

app = typer.Typer(
    help="Co-train a dense network and a whole menu of sparse subnetworks from one weight set.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# "N:M: ..." is no emoji. What goes to a file or a pipe has no screen that it must fit.
WIDE = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
console = Console(emoji=False, width=WIDE)


def changed_fields(op: str, given: list[str] | None) -> dict[str, Any]:
    """Recipe fields from the values of --set, each FIELD=VALUE."""
    changes = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{op}: --set {text!r} is not FIELD=VALUE, as in lr=0.05")
        changes[name.replace("-", "_")] = yaml.safe_load(value)
    return changes


@contextmanager
def runs_shown() -> Iterator[Callable[[int, int, str], None]]:
    """A bar of many runs; gives what they tell, as `runs.Tell`, when one has ended.

    Raises Interrupted, which says how to go on, where Ctrl-C or SIGTERM comes inside.
    """
    from ..stopping import Interrupted

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )
    try:
        with bar:
            yield _teller(bar)
    except (KeyboardInterrupt, SystemExit) as stop:  # SIGTERM comes as SystemExit, 128 + 15
        number = stop.code - 128 if isinstance(stop, SystemExit) else signal.SIGINT
        raise Interrupted(
            "stopped: finished runs are kept; the same command goes on with the others", number
        ) from stop


def _teller(bar: Progress) -> Callable[[int, int, str], None]:
    """What moves the bar when a run has ended."""
    task = bar.add_task("first runs", total=None, visible=False)

    def tell(done: int, total: int, what: str) -> None:
        bar.update(task, completed=done, total=total, description=f"done: {what}", visible=True)

    return tell
