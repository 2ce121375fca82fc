"""Triton kernels of the N:M family: bit-exact compression, products, and what the compiler makes.

The same tests run on a GPU, with larger layers, and interpreted on the CPU.
"""

import pytest
import torch
import torch.nn.functional as F
from triton_compiling import SHARED, processes, reports
from triton_places import BF16, DEVICE, F16, F32, F64, ON_GPU, can_run, needs_gpu

from sparse_cocktail import reference, reference_nm

RAW = {F32: torch.int32, BF16: torch.int16, F16: torch.int16, F64: torch.int64}


@pytest.fixture(scope="module")
def nm(device_of):
    device_of("triton")  # quickens the interpreter
    from sparse_cocktail.ops import triton_nm

    return triton_nm


@pytest.fixture(autouse=True)
def _fp32_without_tf32():
    flag = torch.backends.cuda.matmul
    before, flag.fp32_precision = flag.fp32_precision, "ieee"
    yield
    flag.fp32_precision = before


@pytest.fixture
def _poison():
    """Fill new tensors with NaN, so that an element that no kernel writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def random(*shape, dtype=F32):
    return torch.randn(shape, dtype=F64).to(dtype).to(DEVICE)


def same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    raw = RAW.get(a.dtype, a.dtype)
    return torch.equal(a.contiguous().view(raw), b.contiguous().view(raw))


def channels_last(weight):
    return weight.to(memory_format=torch.channels_last) if weight.dim() == 4 else weight


# ---- compress and decompress ---------------------------------------------------------------------

PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 8), (5, 8), (2, 3), (7, 12), (8, 16)]
PATTERNS += [(13, 31), (1, 32), (31, 32)]
TYPES = {"fp32": (F32, F32), "bf16": (BF16, BF16), "fp16": (F16, F16)}
TYPES |= {"fp32-bf16": (F32, BF16), "fp32-fp16": (F32, F16), "bf16-fp32": (BF16, F32)}


def shapes_of(m):
    """A group, a row of odd length, rows that are one stretch of words, and convolutions."""
    few = m if m > 8 else 5 * m
    shapes = [(1, m), (5, few), (2, 33 * m), (2, few, 3, 1 + (m < 9)), (1, 32 * m, 1, 1), (2, m, 2)]
    return [*shapes, (70, 96 * m), (64, 16 * m, 3, 3)] if ON_GPU else shapes


def fewer(bits):
    """Bits of which some are taken away: groups with fewer than n, and rows with none."""
    gone = torch.randint(-(2**31), 2**31, bits.shape, dtype=torch.int64, device=bits.device)
    bits = bits & gone.to(torch.int32)
    bits[0] = 0
    return bits


@can_run
@pytest.mark.parametrize("n, m", PATTERNS, ids=[f"{n}:{m}" for n, m in PATTERNS])
def test_compress_and_decompress_as_the_reference(nm, n, m, _poison):
    types = list(TYPES.values())
    for number, shape in enumerate(shapes_of(m)):
        for turn in range(6 if ON_GPU else 2):
            dtype, target = types[(number + 3 * turn + n) % 6]
            weight = random(*shape, dtype=dtype)
            if (number + turn) % 2:
                weight = channels_last(weight)
            given = fewer(reference.nm_mask(random(*shape), n, m)) if turn % 2 else None
            wanted, mask = reference_nm.nm_compress(weight, n, m, given, target)
            values, bits = nm.nm_compress(weight, n, m, given, target)
            case = f"{shape} {dtype} to {target}, given={given is not None}"
            assert same_bits(bits, mask), case
            assert same_bits(values, wanted), case
            assert given is None or bits.data_ptr() != given.data_ptr()
            dense = nm.nm_decompress(values, bits, n, m, shape)
            assert same_bits(dense, reference_nm.nm_decompress(values, bits, n, m, shape)), case
            assert reference.weight_view(dense).is_contiguous()


@can_run
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (3, 4), (3, 8), (2, 6)])
def test_ties_zeros_infinities_and_nan(nm, n, m, dtype):
    some = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 1e-7, -2.0]
    weight = torch.tensor(some, device=DEVICE)[torch.randint(9, (40, 4 * m))].to(dtype)
    wanted, mask = reference_nm.nm_compress(weight, n, m)
    values, bits = nm.nm_compress(weight, n, m)
    assert same_bits(bits, mask) and same_bits(values, wanted)
    dense = nm.nm_decompress(values, bits, n, m, weight.shape)
    kept = reference.unpack_mask(mask, weight.shape)
    assert same_bits(dense, torch.where(kept, weight, 0.0))


@can_run
def test_the_payload_of_a_nan_survives(nm):
    raw = torch.tensor([[0x7F800001, 0, -1, 0x3F800000]], dtype=torch.int32, device=DEVICE)
    values, bits = nm.nm_compress(raw.view(F32), 2, 4)
    assert values.view(torch.int32).flatten().tolist() == [0x7F800001, -1]
    assert nm.nm_decompress(values, bits, 2, 4, (1, 4)).view(torch.int32)[0, 2] == -1


@can_run
@pytest.mark.parametrize("m", [4, 6])
def test_compress_of_slices_and_turned_taps(nm, m):
    around = random(9, 7 * m)
    around[:, -m:] = float("nan")
    turned = random(3, 2 * m, 3, 2).transpose(2, 3)  # no common stride of the taps
    for weight in (around[1:6, m:-m], around.t()[: 4 * m].t()[:, :m], turned):
        values, bits = nm.nm_compress(weight, 2, m)
        wanted, mask = reference_nm.nm_compress(weight, 2, m)
        assert same_bits(values, wanted) and same_bits(bits, mask)


@can_run
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 8, 0, 3)], ids=str)
@pytest.mark.parametrize("m", [4, 6], ids=["2:4", "2:6"])
def test_empty_weights(nm, shape, m):
    shape = tuple(size // 8 * 2 * m if size == 8 else size for size in shape)
    values, bits = nm.nm_compress(random(*shape), 2, m)
    assert values.shape == reference_nm.values_shape(shape, 2, m)
    assert nm.nm_decompress(values, bits, 2, m, shape).shape == shape


# ---- linear --------------------------------------------------------------------------------------

ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu}
PAIRS = {"fp32": (F32, F32), "bf16": (BF16, BF16), "fp16": (F16, F16), "bf16-fp32": (BF16, F32)}
PAIRS |= {"fp32-fp16": (F32, F16)}

# x shape, out, (n, m), activation, bias. Interpreted tiles are 64 x 32 x 64.
LINEAR = {
    "one": ((1, 4), 1, (2, 4), "none", True),
    "primes": ((37, 68), 71, (2, 4), "relu", True),
    "vector": ((32,), 5, (4, 8), "gelu", True),
    "batches": ((2, 3, 64), 16, (1, 4), "none", False),
    "parts": ((3, 600), 4, (4, 8), "gelu", True),
    "parts_plain": ((2, 520), 3, (1, 2), "none", False),
    "half": ((5, 70), 66, (1, 2), "relu", False),
    "quarter": ((9, 104), 7, (2, 8), "gelu", False),
    "wide_groups": ((4, 96), 3, (4, 16), "none", True),
    "widest_groups": ((4, 96), 3, (2, 32), "relu", True),
    "three_of_four": ((5, 36), 8, (3, 4), "gelu", True),
    "five_of_twelve": ((3, 36), 8, (5, 12), "relu", False),
    "one_of_three": ((3, 36), 8, (1, 3), "none", True),
    "many_rows": ((300, 32), 5, (2, 4), "gelu", True),
    "many_rows_plain": ((300, 32), 5, (2, 4), "relu", False),
    "no_rows": ((0, 8), 5, (2, 4), "none", True),
    "no_inputs": ((3, 0), 5, (2, 4), "relu", True),
    "no_outputs": ((3, 8), 0, (2, 4), "none", True),
}
if ON_GPU:
    LINEAR |= {
        "decode": ((1, 4096), 1024, (2, 4), "none", True),
        "skinny": ((16, 4096), 4096, (4, 8), "relu", True),
        "few": ((64, 1024), 3072, (1, 4), "gelu", True),
        "many": ((256, 1024), 1000, (2, 4), "gelu", True),
        "odd": ((200, 1036), 301, (2, 4), "none", True),
        "dense": ((1000, 1024), 768, (2, 8), "gelu", True),
    }


def spread(cases):
    """All pairs of dtypes on a GPU; interpreted, fp32 and one more for each case."""
    others = [name for name in PAIRS if name != "fp32"]
    return [
        pytest.param(case, dtypes, id=f"{name}-{pair}")
        for number, (name, case) in enumerate(cases.items())
        for pair, dtypes in PAIRS.items()
        if ON_GPU or pair in ("fp32", others[number % len(others)])
    ]


def error(value, exact):
    """Largest error, relative to the largest exact value."""
    assert value.shape == exact.shape
    if exact.numel() == 0:
        return 0.0
    return float((value.to(F64) - exact).abs().max() / exact.abs().max().clamp_min(1e-300))


def layer(case, dtypes, bits=None):
    """(x, values, bits, bias) of a case, and its weight in the dtype of x."""
    (shape, out, (n, m), _, biased), (x_dtype, dtype) = case, dtypes
    weight = random(out, shape[-1], dtype=dtype)
    values, bits = reference_nm.nm_compress(weight, n, m, bits)
    dense = reference_nm.nm_decompress(values, bits, n, m, weight.shape).to(x_dtype)
    return random(*shape, dtype=x_dtype), values, bits, random(out) if biased else None, dense


@can_run
@pytest.mark.parametrize(("case", "dtypes"), spread(LINEAR))
def test_linear(nm, case, dtypes, _poison):
    x, values, bits, bias, dense = layer(case, dtypes)
    _, _, ratio, activation, _ = case
    y = nm.nm_linear(x, values, bits, *ratio, bias, activation)
    after = ACTIVATIONS[activation]
    exact = after(F.linear(x.to(F64), dense.to(F64), None if bias is None else bias.to(F64)))
    theirs = after(F.linear(x, dense, None if bias is None else bias.to(x.dtype)))
    assert y.dtype == x.dtype
    assert error(y, exact) <= 2 * error(theirs, exact) + 4 * torch.finfo(F32).eps


@can_run
@pytest.mark.parametrize("name", ["primes", "parts", "quarter", "three_of_four"])
def test_linear_with_fewer_than_n_in_a_group(nm, name):
    case = LINEAR[name]
    shape, out, ratio, activation, _ = case
    mask = fewer(reference.nm_mask(random(out, shape[-1]), *ratio))
    x, values, bits, bias, dense = layer(case, (F32, F32), mask)
    y = nm.nm_linear(x, values, bits, *ratio, bias, "none")
    exact = F.linear(x.to(F64), dense.to(F64), None if bias is None else bias.to(F64))
    theirs = F.linear(x, dense, bias)
    assert error(y, exact) <= 2 * error(theirs, exact) + 4 * torch.finfo(F32).eps


@can_run
def test_linear_of_slices_among_nan(nm):
    around = torch.full((7, 77), float("nan"), device=DEVICE)
    around[1:-1, 5:69] = random(5, 64)
    _, values, bits, bias, dense = layer(((5, 64), 9, (2, 4), "none", True), (F32, F32))
    x = around[1:-1, 5:69]
    y = nm.nm_linear(x, values, bits, 2, 4, bias, "none")
    assert torch.allclose(y, F.linear(x, dense, bias), atol=1e-5)


@can_run
def test_nan_in_x_reaches_its_row_alone(nm):
    x, values, bits, _, _ = layer(((6, 64), 40, (2, 4), "none", False), (F32, F32))
    x[2, 7] = float("nan")
    for activation in ACTIVATIONS:
        y = nm.nm_linear(x, values, bits, 2, 4, None, activation)
        assert y[2].isnan().all() and not y[[0, 1, 3, 4, 5]].isnan().any()


@can_run
def test_nan_in_the_weight_reaches_its_output_alone(nm):
    weight, x = random(7, 68), random(3, 68)
    weight[4, 1] = float("nan")
    values, bits = nm.nm_compress(weight, 2, 4)
    y = nm.nm_linear(x, values, bits, 2, 4)
    assert y[:, 4].isnan().all() and not y[:, [0, 1, 2, 3, 5, 6]].isnan().any()


@can_run
@pytest.mark.parametrize("name", ["parts", "primes"])
def test_two_runs_give_the_same_bits(nm, name):
    case = LINEAR[name]
    x, values, bits, bias, _ = layer(case, (F32, F32))
    first, second = (nm.nm_linear(x, values, bits, *case[2], bias, case[3]) for _ in range(2))
    assert same_bits(first, second)


@can_run
def test_fp64_goes_to_the_reference(nm):
    weight, x = random(5, 16, dtype=F64), random(3, 16, dtype=F64)
    values, bits = nm.nm_compress(weight, 2, 4)
    assert same_bits(bits, reference.nm_mask(weight, 2, 4)) and values.dtype == F64
    dense = nm.nm_decompress(values, bits, 2, 4, (5, 16))
    assert torch.allclose(nm.nm_linear(x, values, bits, 2, 4), x @ dense.t())


# ---- choice of tiles -----------------------------------------------------------------------------


def test_every_layer_finds_a_tile(nm):
    from sparse_cocktail.kernels import nm_linear

    for capability in ((8, 0), (8, 6), (9, 0), (12, 0)):
        for rows in (1, 16, 17, 64, 65, 256):
            for bits, precision in ((16, "tf32"), (32, "tf32"), (32, "ieee")):
                for aligned in (False, True):
                    card = capability, 132, bits, precision, aligned
                    tile, parts = nm_linear.tiling((4096, rows, 4096), *card)
                    assert tile.k % 32 == 0 and 16 <= tile.n <= 128 and 1 <= parts <= 32
    tile, parts = nm_linear.tiling((4096, 1, 4096), (9, 0), 132, 16, "tf32", True)
    assert tile == nm_linear.TILES[90, "skinny"] and parts == 4


def test_patterns_that_are_spread_in_registers(nm):
    from sparse_cocktail.kernels.nm_linear import spreads

    assert all(spreads(*r) for r in ((1, 2), (2, 4), (1, 4), (4, 8), (2, 8), (4, 16), (2, 32)))
    assert not any(spreads(*r) for r in ((3, 4), (2, 6), (1, 3), (16, 32)))


# ---- without a GPU: what the compiler makes of the kernels ---------------------------------------


@pytest.fixture(scope="module")
def compilers(tmp_path_factory):
    yield from processes("triton_compile_nm.py", tmp_path_factory)


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def kernels(request, compilers):
    return reports(compilers[request.param])


def test_no_kernel_spills(kernels):
    assert len(kernels) > 20
    assert not {name: k["stack"] for name, k in kernels.items() if k["stack"]}


def test_tiles_fit_into_shared_memory(kernels):
    linear = {n: k for n, k in kernels.items() if n.startswith("linear")}
    assert not {n: k["shared"] for n, k in linear.items() if k["shared"] > SHARED[n[7:9]]}


def test_products_run_on_tensor_cores(kernels):
    linear = {n: k for n, k in kernels.items() if n.startswith("linear") and "ieee" not in n}
    assert not [name for name, k in linear.items() if not k["products"]]
    assert not [name for name, k in linear.items() if "-90-" in name and not k["wgmma"]]


def test_flat_weights_move_16_bytes_at_a_time(kernels):
    for name, k in kernels.items():
        if name.startswith("compress-") and "odd" not in name:
            assert k["loads"] - k["wide_loads"] <= ("given" in name), name  # given words
            # one store of words; KEEP = 3 stores each slot by itself
            assert k["stores"] - k["wide_stores"] <= 1 or "3:4" in name, name
        if name.startswith("decompress-") and "odd" not in name:
            assert k["stores"] == k["wide_stores"], name
            assert k["loads"] - k["wide_loads"] <= 1 or "3:4" in name, name


def test_aligned_products_copy_16_bytes_at_a_time(kernels):
    for name, k in kernels.items():
        if name.startswith("linear") and name.endswith((":4", ":8", "gelu", "master")):
            assert k["wide_copies"] >= 2 * (k["copies"] - k["wide_copies"]) > -1, name


# ---- with a GPU ----------------------------------------------------------------------------------


@needs_gpu
def test_in_a_cuda_graph_without_waiting(nm):
    weight, x, bias = random(300, 4096, dtype=BF16), random(7, 4096, dtype=BF16), random(300)

    def run():
        values, bits = nm.nm_compress(weight, 2, 4)
        again, _ = nm.nm_compress(weight, 2, 4, bits)
        dense = nm.nm_decompress(again, bits, 2, 4, weight.shape)
        return dense, nm.nm_linear(x, values, bits, 2, 4, bias, "gelu")

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(graph):
        results = run()
    weight.copy_(random(300, 4096, dtype=BF16))
    x.copy_(random(7, 4096, dtype=BF16))
    graph.replay()
    for got, expected in zip(results, run(), strict=True):
        assert same_bits(got, expected)


@needs_gpu
def test_a_weight_of_more_than_2_31_elements(nm):
    shape = (2**16, 2**15 + 32)
    weight = torch.empty(shape, dtype=BF16, device=DEVICE).normal_()
    values, bits = nm.nm_compress(weight, 2, 4)
    last = slice(-2, None)
    wanted, mask = reference_nm.nm_compress(weight[last], 2, 4)
    assert same_bits(values[last], wanted) and same_bits(bits[last], mask)
    dense = nm.nm_decompress(values, bits, 2, 4, shape)
    assert same_bits(dense[last], reference_nm.nm_decompress(wanted, mask, 2, 4, (2, shape[1])))
