"""`sparse-cocktail bench`: how fast the ops are on this machine, against peers and its limits."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer

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
        files = program.redraw(redraw)
        console.print(", ".join(map(str, files)), markup=False, highlight=False, soft_wrap=True)
        return
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench masks: device={device!r} is not one of cpu, cuda")

    def tell(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    result, files = program.run(
        out, device, quick, threads, _names(cases), _names(only), pictures, tell, warm
    )
    output = _checkout("output")
    tell(output.aligned(output.overview(result["rows"], short=True)))
    tell(", ".join(map(str, files)))
    wrong = program.failures(result)
    for row in wrong:
        tell(f"FAILED: {row['op']}, {row['case']}, {row['impl']}: {row['note']}")
    if wrong:
        raise typer.Exit(1)
