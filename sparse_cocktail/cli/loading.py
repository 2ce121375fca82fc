"""What commands load: the cocktails of a finished run or of a file, and the data of the run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "FileArgument",
    "ModelOption",
    "data_of",
    "files_of",
    "load_cocktail",
    "network_of",
]

FileArgument = Annotated[Path, typer.Argument(help="cocktail.safetensors, or the folder of a run")]

ModelOption = Annotated[
    str, typer.Option("--model", help="package.module:function, when the model is your own")
]


def _networks(path: Path) -> list[tuple[str, Path]]:
    """Separate networks of a finished run: name and file; ValueError for a run without any."""
    from ..files import read_json

    results = path / "results.json"
    rows = read_json(results)["subnets"] if results.is_file() else []
    if found := [(row["name"], path / row["weights"]) for row in rows if row["weights"]]:
        return found
    raise ValueError(
        f"{path} holds no finished run; for an interrupted one: sparse-cocktail resume {path}"
    )


def files_of(path: Path) -> list[Path]:
    """The cocktail of a file or run; a run of separate networks has one for each.

    Raises ValueError for a run that is not finished.
    """
    if not path.is_dir():
        return [path]
    whole = path / "cocktail.safetensors"
    return [whole] if whole.is_file() else sorted({file for _, file in _networks(path)})


def network_of(path: Path, subnet: str) -> tuple[Path, str]:
    """The file that a subnet of a file or run is in, and its name there.

    Args:
        path: as of `files_of`.
        subnet: its name, canonical or not, or that of its file in a run of separate networks.

    Raises:
        ValueError: for a run that is not finished, and a name of none or of several networks.
    """
    from ..patterns import parse

    if not path.is_dir() or (path / "cocktail.safetensors").is_file():
        return files_of(path)[0], subnet
    networks, name = _networks(path), subnet
    with suppress(ValueError):
        name = str(parse(subnet))
    found = [(file, own) for own, file in networks if own == name]
    found = found or [(file, own) for own, file in networks if file.stem == subnet]
    if len(found) > 1:
        raise ValueError(
            f"{path} has {len(found)} networks {name}; name the file of one: "
            f"{', '.join(file.stem for file, _ in found)}"
        )
    if not found:
        names = dict.fromkeys(name for own, file in networks for name in (own, file.stem))
        raise ValueError(f"{path} has no network {name}; name one of {', '.join(names)}")
    return found[0]


def load_cocktail(path: Path, model: str = ""):
    """One cocktail of a file or run; your own model is built as the run built it."""
    from .. import models
    from ..cocktail import Cocktail
    from ..cocktail_file import read_cocktail

    path, *others = files_of(path)
    if others:
        raise ValueError(
            f"{path.parent.parent} holds {1 + len(others)} networks of separate weights, such as "
            f"{path.stem}: name one, or give its file in {path.parent}"
        )
    if not model:
        return Cocktail.load(path)
    header, _ = read_cocktail(path)
    arguments = header["extra"].get("config", {}).get("model_args")
    return Cocktail.load(path, models.create(model, arguments))


def data_of(cocktail, data: str | None = None, folder: str | None = None):
    """The data set of the run that made a cocktail, unless others are given."""
    from .. import data as data_sets

    config = cocktail.extra.get("config", {})
    name = data or config.get("data")
    if name is None or name.startswith("custom:"):
        raise ValueError("the file names no data set that can be loaded; give --data")
    folder = config.get("data_dir", "") if folder is None else folder
    return data_sets.load(name, folder, config.get("workers", 0))
