"""The command `sparse-cocktail`."""

from __future__ import annotations

from rich.console import Console

# All but `app` are imported for what they register there.
from . import ablate, bench, compare, connect, menu, pictures, train, tune  # noqa: F401
from .base import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command; errors a user can mend are one line, not a traceback."""
    from ..engine import Interrupted
    from ..runs import RunFailed
    from ..selection import MasksDiffer

    known = (ValueError, KeyError, TypeError, OSError, FloatingPointError, RunFailed, MasksDiffer)
    try:
        app()
    except known as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        errors = Console(stderr=True, emoji=False)
        errors.print("error: ", style="bold red", end="")
        errors.print(str(text), highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from error
    except Interrupted as stop:
        Console(stderr=True, emoji=False).print(str(stop), highlight=False, markup=False)
        raise SystemExit(128 + stop.number) from stop
