"""`sparse-cocktail train` with one option per recipe field, and `resume`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from .base import app, console


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
        bool, typer.Option("--paper", help="the published procedure, with the recipe's lengths")
    ] = False,
    parity: Annotated[
        bool, typer.Option("--parity", help="the published procedure with its public code's quirks")
    ] = False,
    plots: Annotated[bool, typer.Option(help="pictures and a web page at the end")] = True,
    **overrides: Any,
) -> None:
    """Train, evaluate every subnet, and leave results, cocktail, log and plots in one folder."""
    from ..config import apply_preset, for_method, read_recipe
    from ..files import read_json

    if paper and parity:
        raise ValueError("train: --paper and --parity are two procedures; give one of them")
    fields = read_recipe(recipe)
    if resume and (out / "config.json").is_file():
        fields = read_json(out / "config.json")
    given = {name: value for name, value in overrides.items() if value is not None}
    fields = for_method(fields, given.get("method"))
    if paper or parity:
        apply_preset(fields, "parity" if parity else "paper", given)
    fields.update(given)
    _run(fields, out, resume, overwrite, plots)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="folder of the interrupted run")],
    plots: Annotated[
        bool | None,
        typer.Option(help="pictures and a web page (default: unless the run is finished already)"),
    ] = None,
) -> None:
    """Go on with an interrupted run from its last checkpoint, bit for bit."""
    from ..files import read_json

    if not (run / "config.json").is_file():
        raise ValueError(f"resume: {run} holds no run; give the folder that train was writing to")
    if (run / "results.json").is_file():
        console.print(f"{run} is finished already", soft_wrap=True)
        _show(read_json(run / "results.json"), run, bool(plots))
        return
    _run(read_json(run / "config.json"), run, True, False, plots is not False)


def _run(fields: dict[str, Any], out: Path, resume: bool, overwrite: bool, plots: bool) -> None:
    """Train with complete fields; rank 0 draws and prints what came out."""
    from ..distributed import process_group
    from ..engine import Interrupted, train

    model, data = fields.pop("model", "resnet8"), fields.pop("data", "digits")
    request = {"resume": resume, "overwrite": overwrite, "console": console}
    with process_group(str(fields.get("device", "auto"))) as rank:
        try:
            results = train(model, data, out, **request, **fields)
        except Interrupted as stop:
            if rank == 0:
                raise
            raise SystemExit(128 + stop.number) from stop  # rank 0 says it
    if rank == 0:
        _show(results, out, plots)


def _show(results: dict[str, Any], out: Path, plots: bool) -> None:
    """Print the table of a finished run and where its files are; draw if asked."""
    from ..page import write_page
    from ..plots import plot_run, results_table

    pictures = [*plot_run(out), write_page(out)] if plots else []
    console.print(results_table(results))
    seconds = results["seconds"]
    separate = not (out / "cocktail.safetensors").exists()
    weights = out / ("networks" if separate else "cocktail.safetensors")
    networks = len(results["subnets"])
    console.print(
        f"{networks} network{'s' * (networks != 1)} in {seconds['total']:.0f} s (mask steps "
        f"{seconds.get('mask', 0.0):.2f} s): "
        + ", ".join(map(str, [out / "results.json", weights, *pictures]))
    )


_METAVAR = {"bool": "true|false", "dict": "JSON", "int": "INT", "float": "NUMBER", "str": "TEXT"}


def _default(field: dataclasses.Field) -> str:
    """The field's default outside of a recipe, as one writes it."""
    default = field.default
    if default is dataclasses.MISSING:
        default = json.dumps(field.default_factory())
    return f"{default:.4g}" if isinstance(default, float) else str(default).lower()


def _field_help(takers: dict[str, dataclasses.Field], methods: list[str]) -> str:
    """A field's words and default, after the methods that take it where they are several.

    Words and default are those of most of them; defaults of others follow by name.
    """
    says = Counter(field.metadata.get("help", "") for field in takers.values())
    defaults = {name: _default(field) for name, field in takers.items()}
    usual = Counter(defaults.values()).most_common(1)[0][0]
    facts = [f"default {usual}"] if usual else []
    facts += [f"{name} {value}" for name, value in defaults.items() if value != usual]
    if len(takers) > 1:
        others = [name for name in methods if name not in takers]
        but = f"all methods but {', '.join(others)}" if others else "all methods"
        facts.insert(0, ", ".join(takers) if len(takers) < len(others) + 2 else but)
    return says.most_common(1)[0][0] + (f" ({'; '.join(facts)})" if facts else "")


def _recipe_fields() -> list[tuple[str, dict[str, dataclasses.Field]]]:
    """Every recipe field once: its panel of the help, and the field by the methods that take it.

    Those of the engine come first, then those of several methods, then each method's own.
    """
    from ..config import Config
    from ..methods import METHODS

    found: dict[str, dict[str, dataclasses.Field]] = {}
    for method, kind in METHODS.items():
        for field in dataclasses.fields(kind.Options):
            found.setdefault(field.name, {})[method] = field
    engine = [("Recipe", {"": field}) for field in dataclasses.fields(Config)]
    shared = [("Several methods", takers) for takers in found.values() if len(takers) > 1]
    own = [(f"Method {next(iter(t))}", t) for t in found.values() if len(t) == 1]
    return engine + shared + own


def _with_recipe_options(function: typing.Callable) -> typing.Callable:
    """Give `train` one option per recipe field, from the fields' own documentation."""
    from ..methods import METHODS

    parameters = [
        p
        for p in inspect.signature(function, eval_str=True).parameters.values()
        if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    for panel, takers in _recipe_fields():
        field = next(iter(takers.values()))
        option = typer.Option(
            f"--{field.name.replace('_', '-')}",
            help=_field_help(takers, list(METHODS)),
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


app.command("train")(_with_recipe_options(_train))
