"""Triton kernels: compiled without a GPU, led astray on purpose, and captured in CUDA graphs."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_places import DEVICE, ON_GPU, can_run, needs_gpu, triton

from sparse_cocktail import ops

KERNEL_TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def parts():
    """The modules behind the ops, imported with Triton only when a test asks for them."""
    from sparse_cocktail.kernels import launch, plan, tiles

    from sparse_cocktail.ops import triton_masks

    return type("parts", (), {"launch": launch, "plan": plan, "tiles": tiles, "ops": triton_masks})


@pytest.fixture(scope="module", autouse=True)
def _quick(device_of):
    """What makes the interpreter quick, also where no test of another file has asked for it."""
    device_of("triton")


def astray(parts):
    """Ways to lead a selection astray, as arguments of the adapters."""
    trial = parts.launch.Trial
    return {
        "straight": (trial(), None),
        "known_miss": (trial(force_miss=True), None),
        "bracket_too_low": (trial(drift=1e9), None),
        "bracket_too_high": (trial(drift=-1e9), None),
        "overflow": (trial(), 3),
    }


WAYS = ("straight", "known_miss", "bracket_too_low", "bracket_too_high", "overflow")


def same(ours, theirs):
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, theirs, strict=True))


# ---- without a GPU: what the compiler makes of the kernels ---------------------------------------


@pytest.fixture(scope="module")
def compilers(tmp_path_factory):
    """A process per target, side by side: kernels imported for the interpreter do not compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    started = {}
    for target in ("sm_80", "sm_90"):
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
        command = [sys.executable, KERNEL_TESTS / "triton_compile.py", target]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started[target] = subprocess.Popen(command, env=dict(environment), **pipes)
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def kernels(request, compilers):
    """{name: report} of every kernel."""
    process = compilers[request.param]
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    rows = [json.loads(line) for line in output.splitlines()]
    return {row["name"]: row for row in rows}


def test_no_kernel_spills(kernels):
    # Triton 3.6 parks two scalars of a kernel that mostly works after a missed bracket.
    parked = 8 if triton.__version__.startswith("3.6") else 0
    allowed = {name: parked * name.startswith("digits") for name in kernels}
    assert len(kernels) > 35
    assert not {n: k["spills"] for n, k in kernels.items() if max(k["spills"]) > allowed[n]}


def test_passes_over_the_weights_load_16_bytes(kernels):
    families = ("sweep", "unified", "sum_channels", "digits", "nm_row", "masked_weights")
    passes = {n: k["wide_loads"] for n, k in kernels.items() if n.startswith(families)}
    narrow = [n for n, wide in passes.items() if not wide and "float64" not in n]
    assert not narrow


def test_a_cpu_tensor_needs_the_interpreter():
    program = """
import torch
from sparse_cocktail import ops
with ops.backend("triton"):
    try:
        ops.nm_mask(torch.zeros(2, 4), 2, 4)
    except ValueError as error:
        print(error)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert "nm_mask: backend 'triton' got tensors on cpu" in result.stdout, result.stderr


# ---- plans ---------------------------------------------------------------------------------------


def test_tiles_never_span_two_weights(parts):
    block = parts.plan.tile_words(parts.launch.interpreted())
    shapes = [(1, 1), (block, 33), (0, 5), (3, 0), (7, 40, 3, 3)]
    layout = parts.plan.plan_of([torch.empty(s) for s in shapes])
    owners = layout.regions["tile_map"].of(layout.fixed).tolist()
    words = [math.prod(ops.pack_mask(torch.ones(s, dtype=torch.bool)).shape) for s in shapes]
    assert layout.words == sum(words)
    assert owners == [i for i, n in enumerate(words) for _ in range(-(-n // block))]


def test_pieces_of_the_scratch_memory_do_not_overlap(parts):
    layout = parts.plan.plan_of([torch.empty(70, 33, 3, 3), torch.empty(5, 7)])
    spans = [(r.start, r.start + r.size * r.dtype.itemsize) for r in layout.regions.values()]
    ordered = sorted(spans)
    assert all(a[1] <= b[0] for a, b in zip(ordered, ordered[1:], strict=False))
    assert all(start % 256 == 0 for start, _ in spans) and ordered[-1][1] <= layout.size


# ---- selections that are led astray --------------------------------------------------------------

POOL = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-40, 3e38, math.inf, -math.inf, math.nan])
FEW = settings(max_examples=6)  # a call takes 0.1 s where it is interpreted


@st.composite
def weight_lists(draw):
    weights = []
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(st.tuples(st.integers(1, 4), st.sampled_from([1, 5, 32, 40]), st.just(2)))
        size = math.prod(shape)
        kind = draw(st.sampled_from(["pool", "normal", "ties"]))
        if kind == "pool":
            values = torch.tensor(draw(st.lists(POOL, min_size=size, max_size=size)))
        else:
            values = torch.randn(size) if kind == "normal" else torch.randint(-3, 4, (size,)) / 2
        weights.append(values.view(shape))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return [w.to(DEVICE, dtype) for w in weights]


def drawn_bits(weights):
    return [ops.pack_mask(torch.rand(w.shape) < 0.6).to(DEVICE) for w in weights]


@can_run
@pytest.mark.parametrize("way", WAYS)
@FEW
@given(weights=weight_lists(), share=st.floats(0, 1), nested=st.booleans())
def test_topk_is_exact_however_the_bracket_falls(parts, way, weights, share, nested):
    trial, capacity = astray(parts)[way]
    keep = [round(share * sum(w.numel() for w in weights))]
    within = drawn_bits(weights) if nested else None
    got = parts.ops.topk_masks(weights, keep, within, trial, capacity)
    with ops.backend("reference"):
        assert same(got, ops.topk_masks(weights, keep[0], within))


@can_run
@pytest.mark.parametrize("way", WAYS)
@FEW
@given(weights=weight_lists(), share=st.floats(0, 1), nm=st.sampled_from([(2, 4), (3, 5), None]))
def test_unified_is_exact_however_the_bracket_falls(parts, way, weights, share, nm):
    trial, capacity = astray(parts)[way]
    keep = round(share * sum(w.numel() for w in weights))
    channels = [round(share * w.shape[0]) for w in weights]
    within = drawn_bits(weights)
    got = parts.ops.unified_masks(
        weights, keep, list(nm or ()), channels, 0.8, within, None, trial, capacity
    )
    with ops.backend("reference"):
        expected = ops.unified_masks(weights, keep, nm, channels, 0.8, within)
    assert same(got, [bits for masks in expected for bits in masks])


@can_run
@FEW
@given(n=st.integers(1, 31), m=st.integers(2, 32), out=st.integers(1, 3), data=st.data())
def test_nm_of_any_ratio(parts, n, m, out, data):
    shape = out, 2 * m, 2
    size = math.prod(shape)
    weight = torch.tensor(data.draw(st.lists(POOL, min_size=size, max_size=size))).view(shape)
    n = min(n, m - 1)
    with ops.backend("reference"):
        expected = ops.nm_mask(weight, n, m)
    for dense in (weight, weight.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(parts.ops.nm_mask(dense.to(DEVICE), n, m).cpu(), expected)


@can_run
@FEW
@given(out=st.integers(1, 4), inputs=st.integers(1, 70), taps=st.integers(1, 4))
def test_round_trip_of_any_mask(parts, out, inputs, taps):
    mask = torch.rand(out, inputs, taps) < 0.5
    bits = parts.ops.pack_mask(mask.to(DEVICE))
    assert torch.equal(parts.ops.unpack_mask(bits, mask.shape).cpu(), mask)
    assert int(parts.ops.mask_count(bits)) == int(mask.sum())


# ---- rows in place -------------------------------------------------------------------------------


def channels_last(weight):
    return weight.to(memory_format=torch.channels_last) if weight.dim() == 4 else weight


ROW_SHAPES = ((8, 32, 3, 3), (5, 7), (6, 40, 1, 2), (1, 1))


def row_weights(dtype=torch.float32):
    weights = [(torch.randn(s) * 4).round().to(DEVICE, dtype) for s in ROW_SHAPES]
    weights[0] = channels_last(weights[0])
    odd = torch.randn(8, 8, 6, 6).to(DEVICE, dtype)[::2, ::2, ::2, ::2]  # taps without one stride
    return [*weights, odd]


def row_of(bits):
    return torch.cat([b.reshape(-1) for b in bits])


def on_device(value):
    return torch.tensor(value, dtype=torch.int64, device=DEVICE)


@can_run
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("keep", [-5, 0, 300, 10**9])
def test_topk_row_may_be_its_own_candidates(dtype, keep):
    weights = row_weights(dtype)
    total = sum(w.numel() for w in weights)
    within = [ops.pack_mask(torch.rand(w.shape) < 0.6).to(DEVICE) for w in weights]
    with ops.backend("reference"):
        expected = ops.topk_masks(weights, min(max(keep, 0), total), within)
    row = row_of(within)
    with ops.backend("triton"):
        scratch = ops.workspace(weights)
        ops.topk_row_(weights, on_device(keep), row, row, scratch)
        again = row.clone()
        ops.topk_row_(weights, on_device(keep), None, again, scratch)
        ops.topk_row_(weights, on_device(keep), row, again, scratch)
    assert torch.equal(row, row_of(expected))
    assert torch.equal(again, row), "the scratch memory was left dirty"


@can_run
def test_unified_rows_in_place():
    weights = row_weights()
    channel_keep = [3, 2, 9, -1, 1]
    given_bits = [ops.pack_mask(torch.rand(w.shape) < 0.5).to(DEVICE) for w in weights]
    clamped = [min(max(c, 0), w.shape[0]) for c, w in zip(channel_keep, weights, strict=True)]
    for nm, bits in (((2, 4), None), (None, given_bits), (None, None)):
        with ops.backend("reference"):
            expected = ops.unified_masks(weights, 500, nm, clamped, 0.8, given_bits, bits)
        rows = [row_of(given_bits), row_of(given_bits), torch.empty_like(row_of(given_bits))]
        nm_from = rows[1] if bits is not None else None
        with ops.backend("triton"):
            scratch = ops.workspace(weights)
            arguments = weights, on_device(500), list(nm or ()), on_device(channel_keep), 0.8
            ops.unified_rows_(*arguments, rows[0], nm_from, *rows, scratch)
        assert same(rows, map(row_of, expected)), nm


@can_run
def test_nm_row_in_place():
    weights = [w for w in row_weights() if w.shape[1] % 4 == 0]
    with ops.backend("reference"):
        expected = row_of([ops.nm_mask(w, 2, 4) for w in weights])
    row = torch.empty_like(expected)
    with ops.backend("triton"):
        ops.nm_row_(weights, 2, 4, row, ops.workspace(weights))
    assert torch.equal(row, expected)


@can_run
def test_rows_refuse_foreign_scratch_memory():
    weights = row_weights()
    row = row_of([ops.pack_mask(torch.ones(w.shape, dtype=torch.bool)) for w in weights]).to(DEVICE)
    with ops.backend("triton"):
        other = ops.workspace(weights[:2])
        with pytest.raises(ValueError, match=r"topk_row_: scratch has .* bytes .*ops.workspace"):
            ops.topk_row_(weights, on_device(5), None, row, other)


@can_run
def test_rows_allocate_nothing(parts, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Allocations(TorchDispatchMode):
        """Names of torch operators that return memory of their own."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            known = {t.untyped_storage().data_ptr() for t in memory}
            if isinstance(result, torch.Tensor):
                new = result.untyped_storage().data_ptr() not in known
                if new and result.device.type == DEVICE.type:
                    names.append(str(function))
            return result

    weights, names = row_weights(), []
    rows = [row_of([ops.pack_mask(torch.ones(w.shape, dtype=torch.bool)) for w in weights])] * 3
    rows = [row.to(DEVICE, copy=True) for row in rows]
    keep, channel_keep = on_device(300), on_device([3, 2, 4, 1, 2])
    with ops.backend("triton"):
        scratch = ops.workspace(weights)
        scratch_of_two = ops.workspace([weights[0], weights[4]])
    memory = [scratch_of_two, *weights, *rows, keep, channel_keep, scratch]
    # what surrounds the kernels is looked at; the interpreter itself copies their arguments
    kernel = type(parts.launch.simple.nm_row)
    monkeypatch.setattr(kernel, "run", lambda *_, **__: None)
    with Allocations():
        parts.ops.topk_row_(weights, keep, rows[1], rows[0], scratch)
        arguments = weights, keep, [2, 4], channel_keep, 0.8, rows[0], None
        parts.ops.unified_rows_(*arguments, *rows, scratch)
        parts.ops.nm_row_([weights[0], weights[4]], 2, 4, rows[0], scratch_of_two)
    assert not names
    with Allocations():
        parts.ops.topk_masks(weights, [300])
    assert names, "the test sees no allocations"


# ---- passes over the weights ---------------------------------------------------------------------

SIZE = 937 * 64
ADVERSARIAL = {
    "normal": lambda: torch.randn(SIZE),
    "all_equal": lambda: torch.full((SIZE,), -1.5),
    "two_values": lambda: torch.randint(1, 3, (SIZE,)).float(),
    "denormals": lambda: torch.randint(0, 50, (SIZE,)) * 2.0**-149,
    "one_huge_bin": lambda: 1 + torch.rand(SIZE) * 2**-9,
    "mostly_zero": lambda: torch.randn(SIZE) * (torch.rand(SIZE) < 0.1),
    "nan": lambda: torch.where(torch.rand(SIZE) < 0.5, math.nan, torch.randn(SIZE)),
    "keys_between_samples": lambda: (
        torch.randint(0x3F800000, 0x40000000, (SIZE,)).int().view(torch.float32)
    ),
}


def selected(parts, weights, keep, trial, capacity):
    """(reads of the weights, candidates) of one selection, whose bits are checked."""
    layout = parts.plan.plan_of(weights, capacity)
    memory = parts.launch.new_scratch(layout, weights, keep)
    row = torch.empty(layout.words, dtype=torch.int32, device=DEVICE)
    scratch = parts.launch.Scratch(layout, memory)
    count = scratch.table[parts.plan.KEEP]
    parts.launch.select_row(weights, count, None, row, memory, None, trial, capacity)
    with ops.backend("reference"):
        assert torch.equal(row, row_of(ops.topk_masks(weights, keep)))
    assert not scratch.ties.any(), "the plane of ties was not cleared"
    state = scratch.state.tolist()
    return state[parts.tiles.S_READS.value], state[parts.tiles.S_CANDIDATES.value]


def passes_cases():
    """Every product on a GPU; interpreted, every pair of the three: the dtypes change places."""
    ways, dtypes = ("straight", "bracket_too_low"), {"fp32": torch.float32, "bf16": torch.bfloat16}
    axes = itertools.product(enumerate(ways), enumerate(dtypes), enumerate(ADVERSARIAL))
    for (i, way), (j, dtype), (k, values) in axes:
        if ON_GPU or (i + j + k) % 2 == 0:
            yield pytest.param(values, dtypes[dtype], way, id=f"{way}-{dtype}-{values}")


@can_run
@pytest.mark.parametrize(("values", "dtype", "way"), passes_cases())
def test_at_most_four_passes_over_the_weights(parts, values, dtype, way):
    weights = [ADVERSARIAL[values]().to(DEVICE, dtype).view(-1, 64)]
    reads, _ = selected(parts, weights, weights[0].numel() // 3, *astray(parts)[way])
    # 65,536 samples see every element here, so that a straight bracket always holds
    assert reads == 1 if way == "straight" else reads <= 4 - (dtype != torch.float32)


@can_run
def test_every_way_to_miss_misses(parts):
    weights = [ADVERSARIAL["normal"]().to(DEVICE).view(-1, 64)]
    keep = weights[0].numel() // 3
    reads = {w: selected(parts, weights, keep, *astray(parts)[w])[0] for w in WAYS}
    # a bracket that is known to fail saves its own read
    assert reads == {
        "straight": 1,
        "known_miss": 3,
        "bracket_too_low": 4,
        "bracket_too_high": 4,
        "overflow": 3,
    }
    straight = astray(parts)["straight"][0]
    _, candidates = selected(parts, weights, keep, straight, None)
    assert candidates > 0
    assert selected(parts, weights, keep, straight, candidates)[0] == 1
    assert selected(parts, weights, keep, straight, candidates - 1)[0] == 4


# ---- with a GPU ----------------------------------------------------------------------------------


def graph_case():
    weights = [channels_last(torch.randn(64, 64, 3, 3)), torch.randn(100, 1001)]
    weights = [w.cuda() for w in weights]
    words = sum(math.prod(ops.pack_mask(w > 0).shape) for w in weights)
    rows = [torch.zeros(words, dtype=torch.int32, device="cuda") for _ in range(4)]
    with ops.backend("triton"):
        scratch = ops.workspace(weights)
    return weights, rows, scratch


def run_rows(weights, rows, keep, channel_keep, scratch):
    with ops.backend("triton"):
        ops.topk_row_(weights, keep, None, rows[0], scratch)
        arguments = weights, keep, [2, 4], channel_keep, 0.8, None, None
        ops.unified_rows_(*arguments, *rows[1:], scratch)


@needs_gpu
def test_rows_in_a_cuda_graph_follow_weights_and_counts():
    weights, rows, scratch = graph_case()
    keep, channel_keep = on_device(1000), on_device([10, 20])
    arguments = weights, rows, keep, channel_keep, scratch
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run_rows(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_rows(*arguments)
    for values in ("normal", "ties", "normal"):
        for weight in weights:
            new = torch.randn_like(weight)
            weight.copy_(new if values == "normal" else new.round())
        count, channels = int(torch.randint(50_000, ())), [7, 55]
        keep.fill_(count)
        channel_keep.copy_(on_device(channels))
        graph.replay()
        with ops.backend("reference"):
            expected = ops.unified_masks(weights, count, (2, 4), channels)
        assert same(rows, map(row_of, (expected[0], *expected)))


@needs_gpu
def test_rows_never_wait_for_the_device():
    weights, rows, scratch = graph_case()
    keep, channel_keep = on_device(1000), on_device([10, 20])
    run_rows(weights, rows, keep, channel_keep, scratch)  # compiles
    ops.topk_masks(weights, 1000)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_rows(weights, rows, keep, channel_keep, scratch)
        with ops.backend("triton"):
            ops.topk_masks(weights, 1000)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_rows_allocate_nothing_on_the_gpu():
    weights, rows, scratch = graph_case()
    keep, channel_keep = on_device(1000), on_device([10, 20])
    run_rows(weights, rows, keep, channel_keep, scratch)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    run_rows(weights, rows, keep, channel_keep, scratch)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
