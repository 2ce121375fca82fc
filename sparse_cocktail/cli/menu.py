"""Commands over a finished run or a cocktail file: eval, export, info."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from .base import app, console
from .loading import FileArgument, ModelOption, data_of, files_of, load_cocktail, network_of


def _check_trained(cocktail, name: str, file: Path) -> None:
    """Refuse a dense network that nobody trained: its weights only serve the others."""
    if cocktail.subnet(name).name not in _shown(cocktail):
        raise ValueError(
            f"{file} holds no dense network of its own: its weights serve "
            f"{', '.join(_shown(cocktail)[:3])} alone; name one of these"
        )


def _shown(cocktail) -> list[str]:
    """The subnets of a file, less a dense network that is not a product of what was measured."""
    measured = [n for n, s in cocktail.subnets.items() if s.accuracy is not None]
    return [n for n in cocktail.subnets if n != "dense" or not measured or n in measured]


@app.command("eval")
def evaluate(
    file: FileArgument,
    subnet: Annotated[
        list[str] | None, typer.Option(help="only these; may be repeated (default: all)")
    ] = None,
    data: Annotated[str | None, typer.Option(help="data set (default: that of the run)")] = None,
    data_dir: Annotated[str | None, typer.Option(help="folder with the files of the data")] = None,
    split: Annotated[str, typer.Option(help="train, holdout or test")] = "test",
    model: ModelOption = "",
) -> None:
    """Measure the subnets of a saved cocktail."""
    import torch

    from ..tasks import Classification

    if split not in ("train", "holdout", "test"):
        raise ValueError(f"eval: split={split!r} is not one of train, holdout, test")
    table = Table("subnet", "sparsity", "accuracy", "parameters", title=f"{file} on {split}")
    data_set = None
    wanted: dict[Path, list[str]] = {} if subnet else {path: [] for path in files_of(file)}
    for path, name in (network_of(file, name) for name in subnet or []):
        wanted.setdefault(path, []).append(name)
    for path in wanted:
        cocktail = load_cocktail(path, model)
        data_set = data_set or data_of(cocktail, data, data_dir)
        samples = getattr(data_set, split)
        sizes = {row["name"]: row for row in cocktail.summary()}
        names = [cocktail.subnet(name).name for name in wanted[path] or _shown(cocktail)]
        for name in names:
            _check_trained(cocktail, name, path)
        for name in names:
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
    out: Annotated[Path, typer.Option(help="FILE.safetensors (weights) or FILE.pt2 (program)")],
    subnet: Annotated[str, typer.Argument(help="name, such as 2:4; or set limits")] = "",
    max_flops: Annotated[float | None, typer.Option(help="multiply-adds per sample")] = None,
    max_bytes: Annotated[
        float | None,
        typer.Option(help="bytes of its kept weights and mask, as in info; the file has zeros too"),
    ] = None,
    max_ms: Annotated[float | None, typer.Option(help="milliseconds for one sample, here")] = None,
    sample: Annotated[
        str, typer.Option(help="input shape without batch, 3,32,32 (default: that of the data)")
    ] = "",
    slim: Annotated[
        bool, typer.Option("--slim", help="cut wholly pruned channels out: smaller and faster")
    ] = False,
    compressed: Annotated[
        bool, typer.Option("--compressed", help="only what is kept, and a bit per weight")
    ] = False,
    model: ModelOption = "",
) -> None:
    """Write one subnet as a plain PyTorch network, its mask baked in.

    Instead of a name, limits pick the most accurate subnet that keeps to all of them, over all
    networks of a run. The weights of a slim network are loaded with
    sparse_cocktail.load_slim(model, state_dict), compressed ones with load_compressed.
    """
    import torch

    from ..files import write_atomic, write_tensors

    limits = {"flops": max_flops, "bytes": max_bytes, "ms": max_ms}
    if bool(subnet) == any(limit is not None for limit in limits.values()):
        raise ValueError(
            "export: give either the name of a subnet or limits (--max-flops, --max-bytes, "
            "--max-ms)"
        )
    if subnet:
        place, subnet = network_of(file, subnet)
    else:
        place, subnet = _picked(file, model, limits, sample)
    cocktail = load_cocktail(place, model)
    _check_trained(cocktail, subnet, file)
    if compressed:
        _check_compressed(cocktail, subnet, out, slim)
    samples = None
    if slim:
        draws = torch.Generator().manual_seed(0)
        samples = torch.randn(2, *_sample_shape(cocktail, sample), generator=draws)
    network = cocktail.export(subnet, not compressed, samples)
    if compressed and not any(hasattr(module, "bits") for module in network.modules()):
        raise ValueError(
            f"export: every layer of {subnet} keeps more than half of its weights, so that "
            "--compressed saves nothing; leave it out"
        )
    if out.suffix == ".safetensors":
        facts = {"factory": getattr(cocktail.model, "factory", None), "subnet": subnet}
        facts |= {"slim": True} if slim else {"compressed": True} if compressed else {}
        write_tensors(out, network.state_dict(), facts)
    elif out.suffix == ".pt2":
        inputs = torch.zeros(2, *_sample_shape(cocktail, sample))
        batch = torch.export.Dim("batch")
        program = torch.export.export(network, (inputs,), dynamic_shapes=({0: batch},))
        write_atomic(out, lambda stream: torch.export.save(program, stream))
    else:
        raise ValueError(f"export: out={out} must end in .safetensors or .pt2")
    (row,) = [r for r in cocktail.summary() if r["name"] == cocktail.subnet(subnet).name]
    parameters = sum(p.numel() for p in network.parameters())
    whole = f"zeros in place, {parameters:,} parameters in all"
    if compressed:
        plain = len(cocktail.layers) - sum(hasattr(m, "bits") for m in network.modules())
        whole = f"{plain} of {len(cocktail.layers)} layers whole" if plain else "nothing else"
    console.print(
        f"{row['name']} of {place} -> {out} ({row['nnz']:,} weights kept in the masked layers, "
        f"{whole})",
        soft_wrap=True,
    )
    timed = {"dense": "", "channel": "slim"}.get(row["pattern"], "compressed")  # as `latency` does
    fits = timed == "slim" or out.suffix == ".safetensors"
    if max_ms is not None and timed and fits and not (slim or compressed):
        console.print(f"Its milliseconds are those of the {timed} network: add --{timed}")


def _check_compressed(cocktail, name: str, out: Path, slim: bool) -> None:
    """Refuse what cannot be written as kept weights."""
    kind = cocktail.subnet(name).pattern.kind
    if kind in ("dense", "channel"):
        raise ValueError(
            f"export: --compressed is for subnets that keep single weights, but {name} is of kind "
            f"{kind}; leave it out" + (", or use --slim" if kind == "channel" else "")
        )
    if slim or out.suffix != ".safetensors":
        raise ValueError(
            f"export: --compressed writes a state dict, but "
            f"{'--slim is given too' if slim else f'out={out}'}; give FILE.safetensors alone"
        )


def _picked(
    file: Path, model: str, limits: dict[str, float | None], sample: str
) -> tuple[Path, str]:
    """File and name of the most accurate subnet within limits, over all networks of a run."""
    import torch

    from ..costs import best

    rows, places, files = [], {}, files_of(file)
    example = None
    for path in files:
        cocktail = load_cocktail(path, model)
        if example is None and (limits["flops"], limits["ms"]) != (None, None):
            example = torch.zeros(1, *_sample_shape(cocktail, sample))
        for row in cocktail.summary(example):
            if row["name"] in _shown(cocktail):
                label = f"{path.stem}: {row['name']}" if len(files) > 1 else row["name"]
                places[label] = path, row["name"]
                rows.append({**row, "name": label})

    def milliseconds(label: str) -> float:
        path, name = places[label]
        return load_cocktail(path, model).latency(name, example)

    return places[best(rows, limits, milliseconds)]


def _sample_shape(cocktail, sample: str) -> tuple[int, ...]:
    """Shape of one input: as given, else that of the run's data set."""
    if not sample:
        try:
            return data_of(cocktail).sample_shape
        except ValueError as error:
            raise ValueError(
                f"export: the shape of an input is not known ({error}); give --sample, such as "
                "3,32,32"
            ) from error
    if not re.fullmatch(r"\d+([x,]\d+)*", sample):
        raise ValueError(f"export: sample={sample!r} is no shape such as 3,32,32")
    return tuple(int(part) for part in re.split("[x,]", sample))


@app.command()
def info(
    file: Annotated[
        Path | None,
        typer.Argument(help="a cocktail or the folder of a run (default: this machine)"),
    ] = None,
    model: ModelOption = "",
    choices: Annotated[
        bool, typer.Option("--choices", help="the measured tables that choose between kernels")
    ] = False,
) -> None:
    """Say what is active on this machine, or what a cocktail file holds."""
    if choices:
        _choices()
        return
    if file is None:
        _machine()
        return
    columns = ("subnet", "sparsity", "nnz", "parameters", "bytes", "accuracy")
    table = Table(*columns, title=str(file))
    for path in files_of(file):
        cocktail = load_cocktail(path, model)
        shown = _shown(cocktail)
        for row in cocktail.summary():
            if row["name"] not in shown:
                continue
            accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.2f}"
            table.add_row(
                row["name"],
                f"{100 * row['sparsity']:.1f} %",
                f"{row['nnz']:,}",
                f"{row['parameters']:,}",
                f"{row['bytes']:,}",
                accuracy,
            )
    console.print(table)


def _machine() -> None:
    import torch

    from .. import __version__, ops

    table = Table("what", "value", title="sparse-cocktail")
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    for what, value in {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "GPU": cuda,
        "C++ extension": ops.extension_path or "not built: plain PyTorch is used",
        "C++ kernels for": ops.cpu_level() or "-",
    }.items():
        table.add_row(what, str(value))
    console.print(table)
    kernels = Table("op", "implementations (reference = plain PyTorch)", title="ops")
    for op in ops.defined():
        kernels.add_row(op, ", ".join(ops.implementations(op)))
    console.print(kernels)


def _choices() -> None:
    from ..ops import nm_routes, routes

    here = routes.this_card()
    for card in sorted({*routes.cards(), *nm_routes.cards(), here}):
        title = f"{card} (this machine)" if card == here else card
        what = Column("op / dtype / sizes / density", overflow="fold")  # never cut: it is a key
        table = Table(what, "route", "faster by", title=title, pad_edge=False)
        for bucket, row in {**routes.table(card), **nm_routes.table(card)}.items():
            table.add_row(bucket, row["route"], f"{row['ratio']:.2f}x")
        if not table.rows:
            route = "dense" if card.startswith("cpu-") else "layer"
            table.add_row("not measured: every masked layer goes by way of W*m", route, "")
        console.print(table)
    console.print(
        "Measured by 'sparse-cocktail bench masked --save-choices' (GPU: fused, layer) and "
        "'sparse-cocktail bench sparse --save-choices' (CPU: sparse, dense). Layers with N:M "
        "weights: 'sparse-cocktail tune'; what it does not list is dense.",
        soft_wrap=True,
    )
