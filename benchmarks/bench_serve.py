"""Serving a menu: latency and memory of every subnet of a network, against the dense one.

    sparse-cocktail bench serve                     the CPU; --device cuda for a GPU
    python benchmarks/bench_serve.py --quick        the same command, small and short

The menu is Sparse Cocktail's: ten unstructured, ten channel and three N:M subnets of ResNet-50,
magnitude masks of random weights. Each is exported (channel subnets slim, N:M compressed) and one
forward of a batch is timed, beside the dense network in the same run. On the CPU unstructured
subnets are also timed as plain networks with zeros.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cocktail import Cocktail, convert, models
from sparse_cocktail.costs import state_bytes
from sparse_cocktail.files import read_json
from sparse_cocktail.methods.menu import ladder
from sparse_cocktail.patterns import Channel, Unstructured, family, parse
from sparse_cocktail.plots import PATTERNS, save_figure

from gates import Verdict  # isort: skip - neighbours, not packages
from groups_masked import Rounding, exactly, peak_bytes  # isort: skip
from output import LIMIT, aligned  # isort: skip
from record import Record, failures, known, one_or_more, place_of, report, title  # isort: skip
from shapes import Case  # isort: skip
from timing import Group, Impl, Plan, broken, measure, runner  # isort: skip

__all__ = ["failures", "redraw", "run", "summary"]

NETWORKS = {"resnet50": (3, 224, 224), "resnet18": (3, 32, 32), "resnet8": (1, 8, 8)}
BATCHES = {"cuda": (1, 8, 64, 256), "cpu": (1, 8)}
MENU = tuple(map(str, ladder("unstructured+channel+n:m", 10)))
QUICK_MENU = ("unstructured-0.9", "channel-0.5", "2:4")
DENSE, CONTIGUOUS = "torch/dense", "torch/dense, contiguous"
LOOKED_AT = 2  # images that the gate compares
REMARKS = (
    "One forward of a batch in {dtype} and channels_last, random weights pruned by magnitude. "
    "Channel subnets are slim (`cocktail.export(name, example_input=x)`), N:M ones compressed, "
    "unstructured ones {unstructured}. BatchNorm is folded in none of them. All are "
    "timed in turn{modes}. A result is timed when its error against {exact} is at most twice that "
    "of the same network in plain torch.nn.",
    "",
    "Ratios: the dense network's time at the same batch over that of the subnet. `weights`: bytes "
    "of the network's state dict.{memory}",
    "",
)


class Outputs(list):
    """What a network returned, and which subnet it is."""

    def __init__(self, subnet: str, values: Sequence[Tensor]) -> None:
        super().__init__(values)
        self.subnet = subnet


class Menu:
    """The networks: exported subnets by implementation name, all on one device in one dtype."""

    def __init__(self, network: str, subnets: Sequence[str], device: torch.device) -> None:
        self.device, gpu = device, device.type == "cuda"
        self.dtype = torch.bfloat16 if gpu else torch.float32
        self.shape = NETWORKS[network]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            plain = models.build(network, {"inputs": self.shape[0]}).eval()
            for weight in plain.parameters():
                if weight.dim() > 1:  # with tails, as trained ones: no layer loses all of them
                    nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
            self.example = torch.randn(1, *self.shape)
        self.cocktail = Cocktail(convert(copy.deepcopy(plain), channels_last=True))
        for name in subnets:
            self.cocktail.add(name)
        self.rows = {row["name"]: row for row in self.cocktail.summary(self.example)}
        self.networks: dict[str, tuple[str, nn.Module]] = {DENSE: ("dense", self._plain("dense"))}
        if not gpu:
            made = copy.deepcopy(plain)
            self.networks[CONTIGUOUS] = "dense", made
        for name in self.cocktail.subnets:
            if name == "dense":
                continue
            pattern = parse(name)
            example = self.example if isinstance(pattern, Channel) else None
            unstructured = isinstance(pattern, Unstructured)
            made = self.cocktail.export(name, gpu and unstructured, example)
            self.networks[f"ours/{name}"] = name, self._moved(made)
            if unstructured and not gpu:
                self.networks[f"ours/{name}, zeros"] = name, self._plain(name)

    def _moved(self, network: nn.Module) -> nn.Module:
        return network.to(self.device, self.dtype, memory_format=torch.channels_last)

    def _plain(self, name: str) -> nn.Module:
        return self._moved(self.cocktail.export(name, plain=True))

    def images(self, batch: int) -> Tensor:
        draws = torch.Generator().manual_seed(batch)
        return torch.randn(batch, *self.shape, generator=draws).to(self.device, self.dtype)

    @torch.no_grad()
    def gate(self, x: Tensor) -> Callable[[list], Verdict]:
        """Compares the first images with the subnet in higher precision, by plain torch's error."""
        wide = torch.float32 if self.device.type == "cuda" else torch.float64
        some, gates = x[:LOOKED_AT].contiguous(memory_format=torch.channels_last), {}
        for name in self.cocktail.subnets:
            network = self._plain(name)
            found = network(some).float()
            with exactly():
                exact = network.to(wide)(some.to(wide))
            gates[name] = Rounding([found], [exact], self.dtype, norm=2)
        return lambda out: gates[out.subnet](out)


class Served:
    """Inputs of `measure`: a batch of images, one set of them."""

    def __init__(self, network: str, x: Tensor) -> None:
        self.device, self.sets = x.device, [self]
        self.case = Case(f"{network}, batch {len(x)}", (tuple(x.shape),))

    def first(self) -> int:
        return 0

    next = first


def serve_group(menu: Menu, batch: int) -> tuple[Group, dict[str, dict[str, Any]]]:
    """All networks of a menu on one batch; and what the rows of each say besides."""
    images = menu.images(batch)
    laid = images.contiguous(memory_format=torch.channels_last)
    impls, facts = [], {}
    for impl, (name, network) in menu.networks.items():
        x = images if impl == CONTIGUOUS else laid

        @torch.no_grad()
        def call(network=network, x=x) -> Tensor:
            return network(x)

        def result(out: Tensor, name=name) -> Outputs:
            return Outputs(name, [out[:LOOKED_AT].float()])

        impls.append(Impl(impl, lambda _, call=call: call, result))
        row = menu.rows[name]
        peak = peak_bytes(call) if menu.device.type == "cuda" else None
        facts[impl] = {
            "subnet": name,
            "batch": batch,
            "sparsity": round(row["sparsity"], 4),
            "flops_kept": row["flops"],
            "weight_bytes": state_bytes(network),
            "peak_bytes": peak,
        }
    size = images.numel() * images.element_size()
    return Group("forward", "", impls, menu.gate(images), size), facts


def run(
    out: Path | None = None,
    device: str = "cpu",
    quick: bool = False,
    threads: int | None = None,
    network: str = "",
    subnets: Sequence[str] = (),
    batch: Sequence[int] = (),
    pictures: bool = True,
    tell: Callable[[str], None] = print,
) -> tuple[dict[str, Any], list[Path]]:
    """Measure; write NAME.json, NAME.md and a picture into a folder after each batch size.

    Args:
        out: folder (default: benchmarks/results/serve). NAME is cpu or that of the GPU.
        quick: a small network and menu, few samples.
        network: of NETWORKS (default: resnet50).
        subnets: patterns (default: the 23 of Sparse Cocktail).
        batch: images (default: 1, 8, 64 and 256 on a GPU, 1 and 8 on the CPU).

    Returns:
        The benchmark's content and the files written.
    """
    what = "bench serve"
    place = place_of(what, device, threads)
    (network,) = known(what, "network", [network or ("resnet8" if quick else "resnet50")], NETWORKS)
    batches = one_or_more(what, "batch", batch, "1,8") or ((2,) if quick else BATCHES[place.type])
    plan = Plan(seconds=0.5, few=5, many=8, most=30, fast=0.25)
    if quick:
        plan = Plan(seconds=0.05, few=3, many=5, most=10, rounds=3)
    summarize = {"ratios": lambda result: ratios(result["rows"])}
    record = Record("serve", place, out, **summarize, network=network)
    tell(f"{network}: exporting the menu")
    menu = Menu(network, subnets or (QUICK_MENU if quick else MENU), place)
    for size in batches:
        tell(f"{network}, batch {size}")
        try:
            group, facts = serve_group(menu, size)
        except Exception as error:  # noqa: BLE001 - such as no memory: the other sizes go on
            row = broken("forward", f"{network}, batch {size}", error)
            record.add([{**row, "subnet": None, "batch": size}])
            continue
        rows = measure(group, Served(network, menu.images(size)), plan, runner(place))
        record.add([{**row, **facts[row["impl"]]} for row in rows])
    record.save()
    return record.result, redraw(record.path, pictures)


# ---- ratios --------------------------------------------------------------------------------------


def ratios(rows: Sequence[dict]) -> list[dict[str, Any]]:
    """Per network, batch and mode: milliseconds, and the dense network's time over it."""
    lines = []
    for row in rows:
        same = [
            r for r in rows if r["ok"] and (r["batch"], r["mode"]) == (row["batch"], row["mode"])
        ]
        dense = [r["median_us"] for r in same if r["subnet"] == "dense"]
        if row["ok"] and dense:
            line = {key: row[key] for key in ("impl", "subnet", "batch", "mode", "sparsity")}
            line |= {"ms": row["median_us"] / 1e3, "gain": min(dense) / row["median_us"]}
            line |= {key: row[key] for key in ("weight_bytes", "peak_bytes")}
            lines.append(line)
    return lines


def table_of_ratios(lines: Sequence[dict]) -> list[list[str]]:
    """Cells: a line per network, two columns per batch and mode, headed by a line."""
    columns = list(dict.fromkeys((e["batch"], e["mode"]) for e in lines))
    peaks = any(e["peak_bytes"] for e in lines)
    head = ["network", "zeros", "weights"]
    for batch, mode in columns:
        head += [f"batch {batch}, {mode}", "", *(["peak"] if peaks else [])]
    cells = [head]
    for impl in dict.fromkeys(e["impl"] for e in lines):
        mine = {(e["batch"], e["mode"]): e for e in lines if e["impl"] == impl}
        first = next(iter(mine.values()))
        row = [impl.removeprefix("ours/"), f"{100 * first['sparsity']:.0f} %"]
        row.append(f"{first['weight_bytes'] / 1e6:.3g} MB")
        for key in columns:
            e = mine.get(key)
            row += [f"{e['ms']:.3g} ms", f"{e['gain']:.2f}x"] if e else ["", ""]
            row += [f"{e['peak_bytes'] / 1e6:.4g} MB" if e and e["peak_bytes"] else ""] * peaks
        cells.append(row)
    return cells


def summary(result: dict[str, Any]) -> str:
    """The ratios as text in columns."""
    return aligned(table_of_ratios(ratios(result["rows"])))


def redraw(path: Path, pictures: bool = True) -> list[Path]:
    """Markdown and a picture beside a benchmark JSON, from its rows alone."""
    result = read_json(path)
    facts, lines = result["environment"], ratios(result["rows"])
    gpu = "gpu" in facts
    words = {
        "dtype": "bf16" if gpu else "fp32",
        "exact": "float32" if gpu else "float64",
        "modes": "; `graph`: replays of a CUDA graph" if gpu else "",
        "unstructured": "plain networks with zeros"
        if gpu
        else "layers that hold what is kept and multiply without the zeros where that is faster; "
        "*zeros*: the same as plain networks with zeros",
        "memory": " `peak`: what a forward needs on the GPU besides." if gpu else "",
    }
    remarks = [text.format(**words) for text in REMARKS]
    subject = f"Serving {result['network']}"
    made = report(path, result, subject, remarks, table_of_ratios(lines))
    if pictures and lines:
        made.append(_draw(path.with_suffix(".png"), title(subject, facts), lines))
    return made


def _draw(path: Path, head: str, lines: Sequence[dict]) -> Path:
    """Times faster than dense against the share of zeros, a panel per batch."""
    best = "graph" if any(e["mode"] == "graph" for e in lines) else "eager"
    lines = [e for e in lines if e["mode"] == best and e["subnet"] != "dense"]
    batches = list(dict.fromkeys(e["batch"] for e in lines))

    def draw(figure) -> None:
        figure.suptitle(head, fontsize=11)
        axes = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
        for ax, batch in zip(axes, batches, strict=True):
            some = [e for e in lines if e["batch"] == batch]
            for key, (label, colour, marker) in PATTERNS.items():
                for zeros, style in ((False, "-"), (True, ":")):
                    points = sorted(
                        (100 * e["sparsity"], e["gain"])
                        for e in some
                        if family(parse(e["subnet"]).kind) == key
                        and zeros == e["impl"].endswith("zeros")
                    )
                    if points:
                        name = f"{label}, zeros in place" if zeros else label
                        look = {"color": colour, "marker": marker, "ms": 4, "ls": style}
                        ax.plot(*zip(*points, strict=True), label=name, **look)
            ax.axhline(1, color=LIMIT, lw=1.0, label="dense")
            ax.set_title(f"batch {batch}", fontsize=9)
            ax.set_xlabel("zeros in masked layers (%)", fontsize=8)
            ax.grid(alpha=0.25)
        axes[0].set_ylabel("times faster than dense", fontsize=8)
        axes[0].legend(fontsize=7, frameon=False)

    return save_figure(path, draw, (3.6 * max(2, len(batches)), 3.8))


if __name__ == "__main__":
    from sparse_cocktail.cli import main

    sys.argv[1:1] = ["bench", "serve"]
    main()
