"""Groups of `bench_nm.py`: products with an N:M weight by every route, and what competes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_cocktail import ops
from sparse_cocktail.nm_modules import NMLinear
from sparse_cocktail.ops import nm_routes
from sparse_cocktail.ops.nm_packed import SKINNY_ROWS, kernel_for

from gates import Verdict  # isort: skip - neighbours, not packages
from groups_masked import BOUND, Rounding  # isort: skip
from peers_nm import DENSE, NotHere, ways  # isort: skip
from shapes import Case, Layer, layers_of  # isort: skip
from timing import Bound, Group, Impl  # isort: skip

__all__ = ["LAYERS", "NMInputs", "host_us", "layers", "linear_group"]

LOOKED_AT = (64, 256)  # rows and outputs that the gate compares
MOST_SETS = 32  # small layers still stay in the last-level cache
MOST_TILES = 16  # numbers of tiles, and splits of the skinny kernel, that are tried
HOST_CALLS = 50


# ---- layers --------------------------------------------------------------------------------------

# (name, out, in). Dosovitskiy et al. 2021, Table 1: widths 768 and 1024, MLP four times as wide.
# Touvron et al. 2023, Table 2: width 4096, MLP 11008.
LAYERS = {
    "llama-7b": (("q k v o", 4096, 4096), ("gate up", 11008, 4096), ("down", 4096, 11008)),
    "vit-l16": tuple(
        (name, out * 1024, inputs * 1024)
        for name, out, inputs in (("qkv", 3, 1), ("proj", 1, 1), ("fc1", 4, 1), ("fc2", 1, 4))
    ),
    "vit-b16": tuple(
        (name, out * 768, inputs * 768)
        for name, out, inputs in (("qkv", 3, 1), ("proj", 1, 1), ("fc1", 4, 1), ("fc2", 1, 4))
    ),
    "resnet50": (),  # its 1x1 convolutions of stride 1, from the model
    "square": (("8192", 8192, 8192),),
    "small": (("", 48, 104),),
}
FEW = {  # on the CPU: a layer per size, or two
    "llama-7b": ("q k v o", "gate up"),
    "vit-b16": ("fc1", "fc2"),
    "resnet50": ("1x1 64 to 256", "1x1 256 to 1024", "1x1 1024 to 256"),
}


def _pointwise() -> list[tuple[str, int, int]]:
    found = layers_of("resnet50", gpu=False)
    sizes = [
        layer.weight[:2] for layer in found if layer.weight[2:] == (1, 1) and layer.stride == 1
    ]
    return [(f"1x1 {inputs} to {out}", out, inputs) for out, inputs in dict.fromkeys(sizes)]


def layers(network: str, gpu: bool) -> list[tuple[str, int, int]]:
    """(name, out, in) of the layers of a network of LAYERS; fewer on the CPU."""
    found = _pointwise() if network == "resnet50" else list(LAYERS[network])
    few = None if gpu else FEW.get(network)
    return [layer for layer in found if few is None or layer[0] in few]


@dataclass
class _Weight:
    """One set of a layer's weight: dense with its zeros, compressed, and packed where it can be."""

    shape: tuple[int, int]
    n: int
    m: int
    dtype: torch.dtype
    device: torch.device
    seed: int

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(self.seed)
        weight = torch.empty(self.shape, device=self.device).normal_(generator=generator)
        weight /= math.sqrt(self.shape[1])
        self.values, self.bits = ops.nm_compress(weight, self.n, self.m, None, self.dtype)
        self.dense = ops.nm_decompress(self.values, self.bits, self.n, self.m, self.shape)

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor]:
        return ops.nm_pack(self.values, self.bits, self.n, self.m)

    def module(self) -> NMLinear:
        plain = nn.Linear(self.shape[1], self.shape[0], False, device="meta")
        plain.weight = nn.Parameter(self.dense, requires_grad=False)
        return NMLinear.from_dense(plain, f"{self.n}:{self.m}")


class _Held:
    """A set of weights with an input."""

    def __init__(self, rows: int, weight: _Weight) -> None:
        self.rows, self.weight = rows, weight
        generator = torch.Generator(weight.device).manual_seed(100 + weight.seed)
        x = torch.empty(rows, weight.shape[1], device=weight.device).normal_(generator=generator)
        self.x = x.to(weight.dtype)

    @property
    def kind(self) -> tuple:
        """(device, dtype, n, m, in, out), as `nm_routes.available` takes it."""
        w = self.weight
        return (w.device, w.dtype, w.n, w.m, w.shape[1], w.shape[0])


class NMInputs:
    """Inputs of `measure` for one layer and one number of rows.

    On the CPU two to 32 sets, as far as twice `cache` bytes goes: weights come from memory, as in a
    network. On a GPU one, whose x changes
    its sign from sample to sample.

    Args:
        before: inputs whose weights are taken over where they are the same.
        warm: one set on the CPU too, of which the caches keep what they can.
    """

    def __init__(
        self,
        layer: Layer,
        pattern: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        cache: int,
        name: str,
        before: NMInputs | None = None,
        warm: bool = False,
    ) -> None:
        self.case, self.device = Case(name, (layer.weight,), dtype=dtype), device
        size = dtype.itemsize * (math.prod(layer.weight) + math.prod(layer.input))
        count = min(MOST_SETS, max(2, -(-2 * cache // size)))
        count = 1 if warm or device.type == "cuda" else count
        kind, known = (layer.weight, *pattern, dtype, device), []
        if before is not None and before.kind == kind:
            known = [held.weight for held in before.sets][:count]
        self.kind = kind
        known += [_Weight(*kind, seed) for seed in range(len(known), count)]
        self.sets = [_Held(layer.input[0], weight) for weight in known]
        self._turn, self._flipped = 0, False

    def first(self) -> int:
        """Place of the set with the values that results are checked on."""
        self._flip(False)
        return 0

    def next(self) -> int:
        """Place of the set for the next sample."""
        self._turn = (self._turn + 1) % len(self.sets)
        if len(self.sets) == 1:
            self._flip(not self._flipped)
        return self._turn

    def _flip(self, wanted: bool) -> None:
        if wanted != self._flipped:
            self.sets[0].x.neg_()
            self._flipped = wanted


# ---- products ------------------------------------------------------------------------------------


class _Gate:
    """Errors against float64, on rows and outputs spread over the layer, in units of dense torch's.

    All results are of the same weight.
    """

    def __init__(self, held: _Held) -> None:
        self.held, self.known = held, None
        counts = (held.rows, held.weight.shape[0])
        self.rows, self.outs = (
            torch.linspace(0, count - 1, min(count, most)).long().to(held.x.device)
            for count, most in zip(counts, LOOKED_AT, strict=True)
        )

    def __call__(self, result: list) -> Verdict:
        (y,) = result
        y = y.to_dense() if y.is_mkldnn else y
        held = self.held
        if tuple(y.shape) != (held.rows, held.weight.shape[0]) or y.dtype != held.x.dtype:
            return Verdict(math.inf, BOUND, "a result of another shape or dtype")
        if self.known is None:
            dense = held.weight.dense
            exact = held.x[self.rows].double() @ dense[self.outs].double().t()
            whole = self._part(F.linear(held.x, dense))
            self.known = Rounding([whole], [exact], held.x.dtype, math.inf)
        return self.known([self._part(y)])

    def _part(self, y: Tensor) -> Tensor:
        return y[self.rows][:, self.outs]


def _packed_route(name: str, held: _Held) -> Callable:
    w, x = held.weight, held.x
    packed, meta = w.packed
    return lambda: ops.nm_linear_packed(x, packed, meta, w.shape[0], kernel=name)


def _compressed(held: _Held) -> Callable:
    w, x = held.weight, held.x
    return lambda: ops.nm_linear(x, w.values, w.bits, w.n, w.m)


def _module(impl: list[Impl], held: _Held) -> Callable:
    module, x = held.weight.module(), held.x
    module.pack()
    impl[0].note = f"runs {module.plan.route(held.rows)}"
    return lambda: module(x)


def _tile(name: str, number: int, held: _Held) -> Callable:
    """A kernel with one of its tiles, or splits, past the dispatcher."""
    kernel, w = getattr(torch.ops.sparse_cocktail_cuda, name), held.weight
    x, (packed, meta) = held.x, w.packed
    return lambda: kernel(x, packed, meta, w.shape[0], None, 0, number)


def _tiles(held: _Held) -> list[Impl]:
    """Every tile of the GEMMs and every split of the skinny kernel that this card takes."""
    major = torch.cuda.get_device_capability(held.x.device)[0]
    here, found = nm_routes.available(*held.kind), []
    names = ["nm_gemm_sm80"] + ["nm_gemm_sm90"] * (major == 9) if "gemm" in here else []
    names += ["nm_skinny"] * ("skinny" in here and held.rows <= SKINNY_ROWS)
    for name in names:
        for number in range(1, MOST_TILES + 1):
            bind = partial(_tile, name, number)
            try:
                bind(held)()
            except RuntimeError:  # no such tile, or too much shared memory for this card
                continue
            what = "split" if name == "nm_skinny" else "tile"
            found.append(Impl(f"ours/{name}, {what} {number}", bind, lambda y: [y]))
    return found


def _absent(reason: str, _: _Held) -> Callable:
    raise NotHere(reason)


def _why_not(route: str, held: _Held) -> str:
    if route == "compressed":
        return "the extension is not built" if held.x.device.type == "cpu" else "no Triton here"
    major, minor = torch.cuda.get_device_capability(held.x.device)
    if major < 8:
        return f"sparse tensor cores need capability 8.0, and this is {major}.{minor}"
    return f"{kernel_for(route, 1, major)} is not built, or in={held.weight.shape[1]} % 8 != 0"


def linear_group(inputs: NMInputs, tiles: bool = False, every: bool = True) -> tuple[Group, dict]:
    """A layer's group, and by implementation the facts of it that rows carry besides.

    Args:
        tiles: also every tile of every kernel (GPU).
        every: not only the routes that `nm_routes` chooses between.
    """
    held, impls, facts = inputs.sets[0], [], {}
    w = held.weight
    here, gpu = nm_routes.available(*held.kind), held.x.device.type == "cuda"
    outputs = held.rows * w.shape[0]
    moved = w.dtype.itemsize * (held.x.numel() + outputs)
    full, kept = w.dtype.itemsize * w.dense.numel(), w.dtype.itemsize * w.values.numel()
    flops = 2 * outputs * w.shape[1]  # of a dense product, whatever is left out

    def add(impl: Impl, route: str | None, weight: int) -> None:
        impls.append(impl)
        facts[impl.name] = {"route": route, "bytes": moved + weight, "flops": flops}

    packs = w.dtype in nm_routes.PACKED_DTYPES and (w.n, w.m) in nm_routes.PACKED_PATTERNS
    wanted = ["gemm", *(["skinny"] if held.rows <= SKINNY_ROWS else [])] if gpu and packs else []
    for route in [*wanted, "compressed"]:
        bind = _compressed if route == "compressed" else partial(_packed_route, route)
        if route not in here:
            bind = partial(_absent, _why_not(route, held))
        impl = Impl(f"ours/{route}", bind, lambda y: [y], graph=route in here)
        add(impl, route, kept + w.dense.numel() // 8)
    if every:
        itself: list[Impl] = []
        itself.append(Impl("ours/NMLinear", partial(_module, itself), lambda y: [y]))
        add(itself[0], None, kept + w.dense.numel() // 8)
    for impl in _tiles(held) if tiles and gpu else ():
        add(impl, None, kept + w.dense.numel() // 8)
    routes = {DENSE: "dense", "torch/cuSPARSELt": "cusparselt"}
    for way in ways(held.x.device, w.dtype, w.n, w.m):
        if not every and way.name not in routes:
            continue
        run = lambda held, build=way.build: build(held.weight.dense, held.x)  # noqa: E731
        bind = partial(_absent, way.missing) if way.missing else run
        impl = Impl(way.name, bind, lambda y: [y], way.graph and not way.missing, way.note)
        size = full if way.name.startswith(DENSE) else kept + w.dense.numel() // 8
        add(impl, routes.get(way.name), size)
    group = Group("nm_linear", "", impls, _Gate(held), moved + kept, flops)
    return group, facts


def host_us(impl: Impl, held: _Held) -> float | None:
    """Microseconds that the host needs for a call on a GPU, which goes on meanwhile."""
    try:
        bound = impl.bind(held)
        call = bound.call if isinstance(bound, Bound) else bound
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        times = []
        for _ in range(HOST_CALLS):
            start = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - start)
            torch.cuda.synchronize()
        return round(sorted(times)[HOST_CALLS // 2] / 1e3, 2)
    except Exception:  # noqa: BLE001 - its row says why
        return None
