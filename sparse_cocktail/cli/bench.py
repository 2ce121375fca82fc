"""`sparse-cocktail bench`: how fast the ops are on this machine, against peers and its limits."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..files import read_json
from .base import app, console

bench = typer.Typer(
    help="Time ops on this machine, against peers and the speed of its memory.",
    no_args_is_help=True,
)
app.add_typer(bench, name="bench")


def checkout(module: str):
    """A module of the checkout's benchmarks/, which is not installed."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    if not (folder / f"{module}.py").is_file():
        raise ValueError(
            f"bench needs a checkout: benchmarks/{module}.py is not installed with the package; "
            "clone the repository and run pip install -e . in it"
        )
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(module)


def names(text: str) -> list[str]:
    """Names from a list such as 1e6,1e7."""
    return [name.strip() for name in text.split(",") if name.strip()]


Out = Annotated[
    Path | None, typer.Option(help="folder of the results (default: its own in benchmarks/results)")
]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Quick = Annotated[bool, typer.Option("--quick", help="small shapes, few samples")]
Threads = Annotated[int | None, typer.Option(help="threads on the CPU (default: torch's)", min=1)]
Pictures = Annotated[bool, typer.Option(help="draw PNG files too")]
Redraw = Annotated[
    Path | None, typer.Option(help="only table and pictures again, from this JSON of a result")
]
SaveChoices = Annotated[
    bool, typer.Option("--save-choices", help="write the table that chooses between routes")
]


@bench.command()
def masks(
    out: Out = None,
    device: Device = "cpu",
    quick: Quick = False,
    threads: Threads = None,
    cases: Annotated[
        str, typer.Option(help="weights, such as resnet50,vit-b16,1e8 (default: all)")
    ] = "",
    only: Annotated[str, typer.Option("--ops", help="ops, such as topk_masks,nm_mask")] = "",
    warm: Annotated[
        bool, typer.Option("--warm", help="the same weights again and again: NAME-warm.json")
    ] = False,
    pictures: Pictures = True,
    redraw: Redraw = None,
) -> None:
    """Time the mask ops: pack, N:M, top-k, blocks, unified masks, masked weights.

    Every result is compared with its definition before it is timed. The exit code is 1 when one of
    ours is wrong.
    """
    options = {"cases": names(cases), "only": names(only), "warm": warm, "device": device}
    _run("masks", out, quick, threads, pictures, redraw, **options)


@bench.command()
def masked(
    out: Out = None,
    device: Device = "cpu",
    quick: Quick = False,
    threads: Threads = None,
    cases: Annotated[
        str,
        typer.Option(
            help="of network,resnet50,resnet50-64,vit-b16,llama-7b,small (default: all but small)"
        ),
    ] = "",
    dtypes: Annotated[
        list[str] | None,
        typer.Option("--dtype", help="fp32, bf16 or 'bf16, fp32 weights'; may be given again"),
    ] = None,
    passes: Annotated[str, typer.Option(help="forward,train (default: both)")] = "",
    batch: Annotated[
        int | None, typer.Option(help="images of convolutions and of the network", min=1)
    ] = None,
    pictures: Pictures = True,
    redraw: Redraw = None,
    save_choices: SaveChoices = False,
) -> None:
    """Time masked linear layers and convolutions, and a training step of a masked network.

    Every result is compared with float64 before it is timed. Times are given in units of the layer
    without a mask, in the same run. The exit code is 1 when one of ours is wrong.
    """
    options = {"cases": names(cases), "dtypes": dtypes or (), "passes": names(passes)}
    options |= {"batch": batch, "device": device}
    _run("masked", out, quick, threads, pictures, redraw, save_choices, **options)


@bench.command()
def sparse(
    out: Out = None,
    quick: Quick = False,
    threads: Threads = None,
    batch: Annotated[
        int | None, typer.Option(help="images of convolutions and rows of linear layers", min=1)
    ] = None,
    pictures: Pictures = True,
    redraw: Redraw = None,
    save_choices: SaveChoices = False,
) -> None:
    """Time inference with packed unstructured weights on the CPU, against dense layers.

    Every result is compared with float64 before it is timed. The exit code is 1 when one of ours
    is wrong.
    """
    _run("sparse", out, quick, threads, pictures, redraw, save_choices, batch=batch)


@bench.command()
def nm(
    out: Out = None,
    device: Device = "cpu",
    quick: Quick = False,
    threads: Threads = None,
    cases: Annotated[
        str,
        typer.Option(help="of compress,llama-7b,vit-l16,vit-b16,resnet50,square (default: all)"),
    ] = "",
    rows: Annotated[str, typer.Option(help="of x, such as 1,16,256 (default: powers of 2)")] = "",
    patterns: Annotated[str, typer.Option(help="such as 2:4,4:8")] = "",
    dtypes: Annotated[str, typer.Option("--dtype", help="of fp32,bf16,fp16")] = "",
    tiles: Annotated[
        bool, typer.Option("--tiles", help="also every tile of our kernels (GPU)")
    ] = False,
    pictures: Pictures = True,
    redraw: Redraw = None,
    save_choices: SaveChoices = False,
) -> None:
    """Time N:M weights: compressing them, and products by every route, against dense ones.

    Every result is compared with its definition before it is timed. The exit code is 1 when one of
    ours is wrong.
    """
    options = {"cases": names(cases), "rows": numbers("bench nm", "rows", rows), "tiles": tiles}
    options |= {"patterns": names(patterns), "dtypes": names(dtypes), "device": device}
    _run("nm", out, quick, threads, pictures, redraw, save_choices, **options)


@bench.command()
def serve(
    out: Out = None,
    device: Device = "cpu",
    quick: Quick = False,
    threads: Threads = None,
    network: Annotated[str, typer.Option(help="resnet50 (the default), resnet18, resnet8")] = "",
    subnets: Annotated[
        str, typer.Option(help="such as 2:4,channel-0.5 (default: Sparse Cocktail's 23)")
    ] = "",
    batch: Annotated[
        str, typer.Option(help="images, such as 1,8 (default: also 64 and 256 on a GPU)")
    ] = "",
    pictures: Pictures = True,
    redraw: Redraw = None,
) -> None:
    """Time the subnets of a network as they are exported, against the dense one.

    Every result is compared with higher precision before it is timed. The exit code is 1 when one
    of ours is wrong.
    """
    options = {"network": network, "subnets": names(subnets), "device": device}
    options["batch"] = numbers("bench serve", "batch", batch)
    _run("serve", out, quick, threads, pictures, redraw, **options)


@bench.command()
def train(
    out: Out = None,
    device: Device = "cpu",
    quick: Quick = False,
    threads: Threads = None,
    cases: Annotated[str, typer.Option(help="of resnet18,resnet50 (default: both)")] = "",
    batch: Annotated[int | None, typer.Option(help="images of a batch", min=2)] = None,
    pictures: Pictures = True,
    redraw: Redraw = None,
) -> None:
    """Time the training engine in a pruning stage, against plain steps of the dense network.

    Losses and gradients are compared with those of float64 before a step is timed. The exit code
    is 1 when one of ours is wrong.
    """
    options = {"cases": names(cases), "batch": batch, "device": device}
    _run("train", out, quick, threads, pictures, redraw, **options)


def _run(
    name: str,
    out: Path | None,
    quick: bool,
    threads: int | None,
    pictures: bool,
    redraw: Path | None,
    save_choices: bool = False,
    **options,
) -> None:
    """Run a program of benchmarks/, or draw again what it left; then name its files and failures.

    Where something of ours was wrong, the exit code is 1.
    """
    program = checkout(f"bench_{name}")
    if save_choices and quick:
        raise ValueError(
            f"bench {name}: save_choices=True with quick=True, but a few samples of small layers "
            "decide nothing; leave --quick out"
        )
    check_device(f"bench {name}", options.get("device", "cpu"))
    result, wrong = None, []
    if redraw is None:
        given = {"out": out, "quick": quick, "threads": threads, "pictures": pictures}
        result, files = program.run(**given, **options, tell=tell)
        tell(program.summary(result))
        wrong = program.failures(result)
    else:
        files = program.redraw(redraw, pictures)
    if save_choices:
        files.append(program.save(result or read_json(redraw)))
    finish(files, wrong)


def check_device(what: str, device: str) -> None:
    """Refuse what is not a device to measure on."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"{what}: device={device!r} is not one of cpu, cuda")


def finish(files: list[Path], wrong: list[dict]) -> None:
    """Name the files that were written, and what failed: then the exit code is 1."""
    tell(", ".join(map(str, files)))
    for row in wrong:
        tell(f"FAILED: {row['op']}, {row['case']}, {row['impl']}: {row['note']}")
    if wrong:
        raise typer.Exit(1)


def numbers(what: str, argument: str, text: str) -> list[int]:
    """Whole numbers from a list such as 1,16,256."""
    try:
        return [int(name) for name in names(text)]
    except ValueError:
        raise ValueError(
            f"{what}: {argument}={text!r} is not a list of whole numbers such as 1,16,256"
        ) from None


def tell(text: str) -> None:
    """Print a line as it is, however long."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
