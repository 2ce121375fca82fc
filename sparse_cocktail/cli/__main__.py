"""`python -m sparse_cocktail.cli` is the command too."""

from . import main

main()
