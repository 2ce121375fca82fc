"""`sparse-cocktail tune`: measure which way of computing N:M layers is the fastest here."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from .base import app
from .bench import Device, Threads, check_device, checkout, finish, names, numbers, tell


def _shapes(text: str) -> list[tuple[int, int]]:
    """(out, in) from a list such as 4096x1024,1024x1024."""
    found = []
    for name in names(text):
        sizes = re.fullmatch(r"(\d+)x(\d+)", name)
        if sizes is None:
            raise ValueError(
                f"tune: layers has {name!r}, which is not OUTxIN; for example 4096x1024,1024x4096"
            )
        found.append((int(sizes[1]), int(sizes[2])))
    return found


def _shapes_of(model: str) -> list[tuple[int, int]]:
    """(out, in) of a model's linear layers and 1x1 convolutions of stride 1, each once."""
    import torch

    from .. import models

    with torch.device("meta"):
        modules = list(models.build(model).modules())
    found = []
    for module in modules:
        if isinstance(module, torch.nn.Linear):
            found.append((module.out_features, module.in_features))
        pointwise = isinstance(module, torch.nn.Conv2d) and module.groups == 1
        if pointwise and module.kernel_size == module.stride == (1, 1):
            found.append((module.out_channels, module.in_channels))
    return list(dict.fromkeys(found))


@app.command()
def tune(
    device: Device = "cpu",
    layers: Annotated[
        str, typer.Option(help="OUTxIN of layers, such as 4096x1024,1024x4096 (default: a grid)")
    ] = "",
    model: Annotated[
        str, typer.Option(help="the layers of this model instead, such as resnet50")
    ] = "",
    rows: Annotated[str, typer.Option(help="of x, such as 1,16,256 (default: powers of 2)")] = "",
    patterns: Annotated[str, typer.Option(help="such as 2:4,4:8")] = "",
    dtypes: Annotated[str, typer.Option("--dtype", help="of fp32,bf16,fp16")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="few samples: less sure")] = False,
    threads: Threads = None,
) -> None:
    """Measure the routes of N:M layers on this machine and write the table that chooses them.

    Every result is compared with float64 before it is timed. Sizes that are not measured now keep
    what the table has. 'sparse-cocktail info --choices' prints it.
    """
    program = checkout("bench_nm")
    check_device("tune", device)
    if layers and model:
        raise ValueError("tune: layers and model are both given; use one of them")
    shapes = _shapes_of(model) if model else _shapes(layers)
    arguments = numbers("tune", "rows", rows), names(patterns), names(dtypes)
    result, path = program.tune(device, shapes, *arguments, quick, threads, tell)
    tell(program.summary(result))
    finish([path], program.failures(result))
