"""What commands load: the cocktails of a finished run or of a file, and the data of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["FileArgument", "ModelOption", "data_of", "files_of", "load_cocktail"]

FileArgument = Annotated[Path, typer.Argument(help="cocktail.safetensors, or the folder of a run")]

ModelOption = Annotated[
    str, typer.Option("--model", help="package.module:function, when the model is your own")
]


def files_of(path: Path, subnet: str = "") -> list[Path]:
    """The cocktail of a file or run; a run of separate networks has one for each, or a subnet's.

    Raises ValueError for a run that is not finished, and a name of none or of several networks.
    """
    from ..files import read_json
    from ..patterns import parse

    if not path.is_dir():
        return [path]
    if (path / "cocktail.safetensors").is_file():
        return [path / "cocktail.safetensors"]
    results = path / "results.json"
    rows = read_json(results)["subnets"] if results.is_file() else []
    files: dict[str, list[Path]] = {}
    for row in rows:
        if row["weights"]:
            files.setdefault(row["name"], []).append(path / row["weights"])
    if not files:
        raise ValueError(
            f"{path} holds no finished run; for an interrupted one: sparse-cocktail resume {path}"
        )
    if not subnet:
        return sorted({file for some in files.values() for file in some})
    name = str(parse(subnet))
    if name not in files:
        raise ValueError(
            f"{path} has no network {name}; there are {', '.join(files)}: name one, or give its "
            "file"
        )
    if len(files[name]) > 1:
        raise ValueError(
            f"{path} has {len(files[name])} networks {name}; give the file of one: "
            f"{', '.join(map(str, files[name]))}"
        )
    return files[name]


def load_cocktail(path: Path, model: str = "", subnet: str = ""):
    """One cocktail of a file or run; your own model is built as the run built it."""
    from .. import models
    from ..cocktail import Cocktail
    from ..cocktail_file import read_cocktail

    path, *others = files_of(path, subnet)
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
