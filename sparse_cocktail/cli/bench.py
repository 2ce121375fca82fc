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


def _checkout(module: str):
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


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@bench.command()
def masks(
    out: Annotated[
        Path | None, typer.Option(help="folder of the results (default: benchmarks/results/masks)")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="small weights, few samples")] = False,
    threads: Annotated[
        int | None, typer.Option(help="threads on the CPU (default: torch's)", min=1)
    ] = None,
    cases: Annotated[
        str, typer.Option(help="weights, such as resnet50,vit-b16,1e8 (default: all)")
    ] = "",
    only: Annotated[str, typer.Option("--ops", help="ops, such as topk_masks,nm_mask")] = "",
    pictures: Annotated[bool, typer.Option(help="draw PNG files too")] = True,
    warm: Annotated[
        bool, typer.Option("--warm", help="the same weights again and again: NAME-warm.json")
    ] = False,
    redraw: Annotated[
        Path | None, typer.Option(help="only table and pictures again, from this JSON")
    ] = None,
) -> None:
    """Time the mask ops: pack, N:M, top-k, blocks, unified masks, masked weights.

    Every result is compared with its definition before it is timed. The exit code is 1 when one of
    ours is wrong.
    """
    program = _checkout("bench_masks")
    if redraw is not None:
        _say_files(program.redraw(redraw))
        return
    _check_device("masks", device)
    result, files = program.run(
        out, device, quick, threads, _names(cases), _names(only), pictures, _tell, warm
    )
    output = _checkout("output")
    _tell(output.aligned(output.overview(result["rows"], short=True)))
    _finish(program, result, files)


@bench.command()
def masked(
    out: Annotated[
        Path | None, typer.Option(help="folder of the results (default: benchmarks/results/masked)")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="small layers, few samples")] = False,
    threads: Annotated[
        int | None, typer.Option(help="threads on the CPU (default: torch's)", min=1)
    ] = None,
    cases: Annotated[
        str,
        typer.Option(help="of network,resnet50,vit-b16,llama-7b,small (default: all but small)"),
    ] = "",
    dtypes: Annotated[
        list[str] | None,
        typer.Option("--dtype", help="fp32, bf16 or 'bf16, fp32 weights'; may be given again"),
    ] = None,
    passes: Annotated[str, typer.Option(help="forward,train (default: both)")] = "",
    batch: Annotated[
        int | None, typer.Option(help="images of convolutions and of the network", min=1)
    ] = None,
    pictures: Annotated[bool, typer.Option(help="draw a PNG file too")] = True,
    redraw: Annotated[
        Path | None, typer.Option(help="only table and picture again, from this JSON")
    ] = None,
    save_choices: Annotated[
        bool,
        typer.Option("--save-choices", help="write the table that chooses between routes"),
    ] = False,
) -> None:
    """Time masked linear layers and convolutions, and a training step of a masked network.

    Every result is compared with float64 before it is timed. Times are given in units of the layer
    without a mask, in the same run. The exit code is 1 when one of ours is wrong.
    """
    program = _checkout("bench_masked")
    _check_choices("masked", save_choices, quick)
    if redraw is not None:
        _redraw(program, redraw, pictures, save_choices)
        return
    _check_device("masked", device)
    if save_choices and device == "cpu":
        raise ValueError(
            "bench masked: save_choices=True with device='cpu', where a masked layer has one "
            "route; add --device cuda, or use 'bench sparse --save-choices'"
        )
    result, files = program.run(
        out,
        device,
        quick,
        threads,
        _names(cases),
        dtypes or (),
        _names(passes),
        batch,
        pictures,
        _tell,
    )
    _tell(program.summary(result))
    _finish(program, result, files, save_choices)


@bench.command()
def sparse(
    out: Annotated[
        Path | None, typer.Option(help="folder of the results (default: benchmarks/results/sparse)")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="small layers, few samples")] = False,
    threads: Annotated[
        int | None, typer.Option(help="threads on the CPU (default: torch's)", min=1)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="images of convolutions and rows of linear layers", min=1)
    ] = None,
    pictures: Annotated[bool, typer.Option(help="draw a PNG file too")] = True,
    redraw: Annotated[
        Path | None, typer.Option(help="only table and picture again, from this JSON")
    ] = None,
    save_choices: Annotated[
        bool,
        typer.Option("--save-choices", help="write the table that chooses between routes"),
    ] = False,
) -> None:
    """Time inference with packed unstructured weights on the CPU, against dense layers.

    Every result is compared with float64 before it is timed. The exit code is 1 when one of ours
    is wrong.
    """
    program = _checkout("bench_sparse")
    _check_choices("sparse", save_choices, quick)
    if redraw is not None:
        _redraw(program, redraw, pictures, save_choices)
        return
    result, files = program.run(out, quick, threads, batch, pictures, _tell)
    _tell(program.summary(result))
    _finish(program, result, files, save_choices)


@bench.command()
def nm(
    out: Annotated[
        Path | None, typer.Option(help="folder of the results (default: benchmarks/results/nm)")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="small layers, few samples")] = False,
    threads: Annotated[
        int | None, typer.Option(help="threads on the CPU (default: torch's)", min=1)
    ] = None,
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
    pictures: Annotated[bool, typer.Option(help="draw a PNG file too")] = True,
    redraw: Annotated[
        Path | None, typer.Option(help="only table and picture again, from this JSON")
    ] = None,
    save_choices: Annotated[
        bool,
        typer.Option("--save-choices", help="write the table that chooses between routes"),
    ] = False,
) -> None:
    """Time N:M weights: compressing them, and products by every route, against dense ones.

    Every result is compared with its definition before it is timed. The exit code is 1 when one of
    ours is wrong.
    """
    program = _checkout("bench_nm")
    _check_choices("nm", save_choices, quick)
    if redraw is not None:
        _redraw(program, redraw, pictures, save_choices)
        return
    _check_device("nm", device)
    result, files = program.run(
        out,
        device,
        quick,
        threads,
        _names(cases),
        numbers("bench nm", "rows", rows),
        _names(patterns),
        _names(dtypes),
        tiles,
        pictures,
        _tell,
    )
    _tell(program.summary(result))
    _finish(program, result, files, save_choices)


@bench.command()
def serve(
    out: Annotated[
        Path | None, typer.Option(help="folder of the results (default: benchmarks/results/serve)")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="small network, few samples")] = False,
    threads: Annotated[
        int | None, typer.Option(help="threads on the CPU (default: torch's)", min=1)
    ] = None,
    network: Annotated[str, typer.Option(help="resnet50 (the default), resnet18, resnet8")] = "",
    subnets: Annotated[
        str, typer.Option(help="such as 2:4,channel-0.5 (default: Sparse Cocktail's 23)")
    ] = "",
    batch: Annotated[
        str, typer.Option(help="images, such as 1,8 (default: also 64 and 256 on a GPU)")
    ] = "",
    pictures: Annotated[bool, typer.Option(help="draw a PNG file too")] = True,
    redraw: Annotated[
        Path | None, typer.Option(help="only table and picture again, from this JSON")
    ] = None,
) -> None:
    """Time the subnets of a network as they are exported, against the dense one.

    Every result is compared with higher precision before it is timed. The exit code is 1 when one
    of ours is wrong.
    """
    program = _checkout("bench_serve")
    if redraw is not None:
        _redraw(program, redraw, pictures, False)
        return
    _check_device("serve", device)
    result, files = program.run(
        out,
        device,
        quick,
        threads,
        network,
        _names(subnets),
        numbers("bench serve", "batch", batch),
        pictures,
        _tell,
    )
    _tell(program.summary(result))
    _finish(program, result, files)


@bench.command()
def train(
    out: Annotated[
        Path | None, typer.Option(help="folder of the results (default: benchmarks/results/train)")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="a tiny network, few samples")] = False,
    threads: Annotated[
        int | None, typer.Option(help="threads on the CPU (default: torch's)", min=1)
    ] = None,
    cases: Annotated[str, typer.Option(help="of resnet18,resnet50 (default: both)")] = "",
    batch: Annotated[int | None, typer.Option(help="images of a batch", min=2)] = None,
    pictures: Annotated[bool, typer.Option(help="draw a PNG file too")] = True,
    redraw: Annotated[
        Path | None, typer.Option(help="only table and picture again, from this JSON")
    ] = None,
) -> None:
    """Time the training engine in a pruning stage, against plain steps of the dense network.

    Losses and gradients are compared with those of float64 before a step is timed. The exit code
    is 1 when one of ours is wrong.
    """
    program = _checkout("bench_train")
    if redraw is not None:
        _say_files(program.redraw(redraw, pictures))
        return
    _check_device("train", device)
    result, files = program.run(out, device, quick, threads, _names(cases), batch, pictures, _tell)
    _tell(program.summary(result))
    _finish(program, result, files)


def numbers(what: str, argument: str, text: str) -> list[int]:
    """Whole numbers from a list such as 1,16,256."""
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise ValueError(
            f"{what}: {argument}={text!r} is not a list of whole numbers such as 1,16,256"
        ) from None


def _check_choices(what: str, save_choices: bool, quick: bool) -> None:
    if save_choices and quick:
        raise ValueError(
            f"bench {what}: save_choices=True with quick=True, but a few samples of small layers "
            "decide nothing; leave --quick out"
        )


def _redraw(program, path: Path, pictures: bool, save_choices: bool) -> None:
    """Table and picture, and what `ops.routes` reads, from a benchmark JSON."""
    files = program.redraw(path, pictures)
    if save_choices:
        files.append(program.save(read_json(path)))
    _say_files(files)


def _tell(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _say_files(files: list[Path]) -> None:
    _tell(", ".join(map(str, files)))


def _check_device(what: str, device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench {what}: device={device!r} is not one of cpu, cuda")


def _finish(program, result: dict, files: list[Path], save_choices: bool = False) -> None:
    """Name the files, and what failed: then the exit code is 1."""
    _say_files([*files, program.save(result)] if save_choices else files)
    wrong = program.failures(result)
    for row in wrong:
        _tell(f"FAILED: {row['op']}, {row['case']}, {row['impl']}: {row['note']}")
    if wrong:
        raise typer.Exit(1)
