"""Published training methods, one file each over `base.py`."""

from .base import Context, Method, Pass, Stage
from .cocktail import SparseCocktail

__all__ = ["METHODS", "Context", "Method", "Pass", "SparseCocktail", "Stage"]

METHODS: dict[str, type[Method]] = {"cocktail": SparseCocktail}
