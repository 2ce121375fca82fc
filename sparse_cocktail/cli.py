"""The command `sparse-cocktail`: train, eval, export, info."""

from __future__ import annotations

import dataclasses
import inspect
import json
import platform
import re
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

__all__ = ["app", "main"]

app = typer.Typer(
    help="Co-train a dense network and a whole menu of sparse subnetworks from one weight set.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


# ---- train ---------------------------------------------------------------------------------------


def _train(
    recipe: Annotated[
        str, typer.Option(help="recipe by name, or a YAML file; its fields can be overridden below")
    ] = "digits",
    out: Annotated[Path, typer.Option(help="folder for everything of the run")] = Path(
        "runs/latest"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the last checkpoint")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="start anew in a folder that holds a run")
    ] = False,
    paper: Annotated[
        bool, typer.Option("--paper", help="the published procedure: no consolidation")
    ] = False,
    **overrides: Any,
) -> None:
    """Train, evaluate every subnet, and leave results, cocktail, log and plots in one folder."""
    from .config import read_recipe
    from .engine import train
    from .plots import plot_run, results_table

    fields = read_recipe(recipe)
    if resume and (out / "config.json").is_file():
        fields = json.loads((out / "config.json").read_text())
    if paper:
        if overrides.get("consolidate") is not None:
            raise ValueError("train: --paper means --consolidate 0; give one of them")
        fields["consolidate"] = 0.0
    fields.update({name: value for name, value in overrides.items() if value is not None})
    model, data = fields.pop("model", "resnet8"), fields.pop("data", "digits")
    results = train(model, data, out, resume=resume, overwrite=overwrite, console=console, **fields)
    pictures = plot_run(out)
    console.print(results_table(results))
    seconds = results["seconds"]
    console.print(
        f"{len(results['subnets'])} networks in {seconds['total']:.0f} s (mask steps "
        f"{seconds.get('mask', 0.0):.2f} s): "
        + ", ".join(map(str, [out / "results.json", out / "cocktail.safetensors", *pictures]))
    )


_METAVAR = {"bool": "true|false", "dict": "JSON", "int": "INT", "float": "NUMBER", "str": "TEXT"}


def _field_help(field: dataclasses.Field) -> str:
    """The field's own words, and its default outside of a recipe."""
    default = field.default
    if default is dataclasses.MISSING:
        default = json.dumps(field.default_factory())
    shown = f"{default:.4g}" if isinstance(default, float) else str(default).lower()
    return field.metadata.get("help", "") + (f" (default {shown})" if shown else "")


def _with_recipe_options(function: typing.Callable) -> typing.Callable:
    """Give `train` one option per recipe field, from the fields' own documentation."""
    from .config import Config
    from .methods import METHODS

    parameters = [
        p
        for p in inspect.signature(function, eval_str=True).parameters.values()
        if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    taken = {p.name for p in parameters}
    groups = [("Recipe", Config), *((f"Method {n}", m.Options) for n, m in METHODS.items())]
    for panel, kind in groups:
        for field in dataclasses.fields(kind):
            if field.name in taken:
                continue
            taken.add(field.name)
            option = typer.Option(
                f"--{field.name.replace('_', '-')}",
                help=_field_help(field),
                rich_help_panel=panel,
                show_default=False,
                metavar=_METAVAR.get(str(field.type), str(field.type).upper()),
            )
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[str | None, option],
                )
            )
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


# ---- eval, export, info --------------------------------------------------------------------------

FileArgument = Annotated[Path, typer.Argument(help="cocktail.safetensors, or the folder of a run")]


ModelOption = Annotated[
    str, typer.Option("--model", help="package.module:function, when the model is your own")
]


def _load(path: Path, model: str = ""):
    """The cocktail of a file or run; your own model is built as the run built it."""
    from . import models
    from .cocktail import Cocktail
    from .cocktail_file import read_cocktail

    if path.is_dir():
        if not (path / "cocktail.safetensors").is_file():
            raise ValueError(
                f"{path} holds no finished run; go on with: sparse-cocktail train --resume --out "
                f"{path}"
            )
        path = path / "cocktail.safetensors"
    if not model:
        return Cocktail.load(path)
    header, _ = read_cocktail(path)
    arguments = header["extra"].get("config", {}).get("model_args")
    return Cocktail.load(path, models.create(model, arguments))


def _data_of(cocktail, data: str | None = None, folder: str | None = None):
    """The data set of the run that made a cocktail, unless others are given."""
    from . import data as data_sets

    config = cocktail.extra.get("config", {})
    name = data or config.get("data")
    if name is None or name.startswith("custom:"):
        raise ValueError("the file names no data set that can be loaded; give --data")
    return data_sets.load(name, config.get("data_dir", "") if folder is None else folder)


@app.command("eval")
def evaluate(
    file: FileArgument,
    subnet: Annotated[list[str] | None, typer.Option(help="only these (default: all)")] = None,
    data: Annotated[str | None, typer.Option(help="data set (default: that of the run)")] = None,
    data_dir: Annotated[str | None, typer.Option(help="folder with the files of the data")] = None,
    split: Annotated[str, typer.Option(help="train, holdout or test")] = "test",
    model: ModelOption = "",
) -> None:
    """Measure the subnets of a saved cocktail."""
    import torch

    from .tasks import Classification

    if split not in ("train", "holdout", "test"):
        raise ValueError(f"eval: split={split!r} is not one of train, holdout, test")
    cocktail = _load(file, model)
    samples = getattr(_data_of(cocktail, data, data_dir), split)
    table = Table("subnet", "sparsity", "accuracy", "parameters", title=f"{file} on {split}")
    sizes = {row["name"]: row for row in cocktail.summary()}
    for name in subnet or cocktail.subnets:
        cocktail.activate(name)
        cocktail.model.eval()
        with torch.no_grad():
            parts = [
                Classification().metric(cocktail.model(x), y) for x, y in samples.batches(1024)
            ]
        accuracy = 100.0 * sum(float(s) for s, _ in parts) / sum(n for _, n in parts)
        row = sizes[name]
        table.add_row(
            name, f"{100 * row['sparsity']:.1f} %", f"{accuracy:.2f}", f"{row['parameters']:,}"
        )
    console.print(table)


@app.command()
def export(
    file: FileArgument,
    subnet: Annotated[str, typer.Argument(help="name of the subnet, such as 2:4")],
    out: Annotated[Path, typer.Option(help="FILE.safetensors (weights) or FILE.pt2 (program)")],
    sample: Annotated[str, typer.Option(help="for .pt2: input shape without batch, 3,32,32")] = "",
    model: ModelOption = "",
) -> None:
    """Write one subnet as a plain PyTorch network, its mask baked in."""
    import torch

    from .files import write_atomic, write_tensors

    cocktail = _load(file, model)
    network = cocktail.export(subnet)
    if out.suffix == ".safetensors":
        facts = {"factory": getattr(network, "factory", None), "subnet": subnet}
        write_tensors(out, network.state_dict(), facts)
    elif out.suffix == ".pt2":
        if sample:
            if not re.fullmatch(r"\d+([x,]\d+)*", sample):
                raise ValueError(f"export: sample={sample!r} is no shape such as 3,32,32")
            shape = tuple(int(part) for part in re.split("[x,]", sample))
        else:
            shape = _data_of(cocktail).sample_shape
        batch = torch.export.Dim("batch")
        program = torch.export.export(
            network, (torch.zeros(2, *shape),), dynamic_shapes=({0: batch},)
        )
        write_atomic(out, lambda stream: torch.export.save(program, stream))
    else:
        raise ValueError(f"export: out={out} must end in .safetensors or .pt2")
    console.print(f"{subnet} of {file} -> {out}")


@app.command()
def info(
    file: Annotated[
        Path | None,
        typer.Argument(help="a cocktail or the folder of a run (default: this machine)"),
    ] = None,
    model: ModelOption = "",
) -> None:
    """Say what is active on this machine, or what a cocktail file holds."""
    if file is None:
        _machine()
        return
    cocktail = _load(file, model)
    table = Table("subnet", "sparsity", "nnz", "parameters", "accuracy", title=str(file))
    for row in cocktail.summary():
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.2f}"
        table.add_row(
            row["name"],
            f"{100 * row['sparsity']:.1f} %",
            f"{row['nnz']:,}",
            f"{row['parameters']:,}",
            accuracy,
        )
    console.print(table)


def _machine() -> None:
    import torch

    from . import __version__, ops

    table = Table("what", "value", title="sparse-cocktail")
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    for what, value in {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "GPU": cuda,
        "C++ extension": ops.extension_path or "not built: plain PyTorch is used",
    }.items():
        table.add_row(what, str(value))
    console.print(table)
    kernels = Table("op", "implementations (reference = plain PyTorch)", title="ops")
    for op in sorted(
        set(ops.__all__) - {"BACKENDS", "backend", "extension_path", "implementations"}
    ):
        kernels.add_row(op, ", ".join(ops.implementations(op)))
    console.print(kernels)


# ---- entry ---------------------------------------------------------------------------------------

app.command("train")(_with_recipe_options(_train))


def main() -> None:
    """Run the command; errors a user can mend are one line, not a traceback."""
    from .engine import Interrupted

    try:
        app()
    except (ValueError, KeyError, TypeError, OSError, FloatingPointError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        errors = Console(stderr=True)
        errors.print("error: ", style="bold red", end="")
        errors.print(str(text), highlight=False, markup=False)
        raise SystemExit(2) from error
    except Interrupted as stop:
        Console(stderr=True).print(str(stop), highlight=False, markup=False)
        raise SystemExit(128 + stop.number) from stop


if __name__ == "__main__":
    main()
