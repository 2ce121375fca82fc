"""Triton kernels of the masked layers: values, gradients, odd shapes, and what the compiler makes.

The same tests run on a GPU, with larger layers, and interpreted on the CPU.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from triton_compiling import SHARED, processes, reports
from triton_places import BF16, DEVICE, F16, F32, F64, ON_GPU, can_run, needs_gpu, triton

from sparse_cocktail import ops

PAIRS = {
    "fp32": (F32, F32),
    "bf16": (BF16, BF16),
    "bf16-master": (BF16, F32),
    "fp16": (F16, F16),
    "fp16-master": (F16, F32),
}


@pytest.fixture(scope="module")
def layers(device_of):
    device_of("triton")  # quickens the interpreter
    from sparse_cocktail.ops import triton_masked

    return triton_masked


@pytest.fixture(autouse=True)
def _fp32_without_tf32():
    flags = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [flag.fp32_precision for flag in flags]
    for flag in flags:
        flag.fp32_precision = "ieee"
    yield
    for flag, value in zip(flags, before, strict=True):
        flag.fp32_precision = value


@pytest.fixture
def _poison():
    """Fill new tensors with NaN, so that an element that no kernel writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def spread(cases):
    """pytest parameters (case, dtypes): all on a GPU; interpreted, fp32 and one more for each."""
    others = [name for name in PAIRS if name != "fp32"]
    return [
        pytest.param(case, dtypes, id=f"{name}-{pair}")
        for number, (name, case) in enumerate(cases.items())
        for pair, dtypes in PAIRS.items()
        if ON_GPU or pair in ("fp32", others[number % len(others)])
    ]


def random(*shape, dtype=F32):
    return torch.randn(shape, dtype=F64).to(dtype).to(DEVICE)


def masked(shape, density=0.5):
    """A mask and its bits."""
    mask = torch.rand(shape, device=DEVICE) < density
    return mask, ops.pack_mask(mask)


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last)


def turned(weight):
    """Columns before rows in memory: kernels cannot walk the taps with one stride."""
    return weight.transpose(2, 3).contiguous().transpose(2, 3)


# ---- a layer here, in PyTorch and in fp64 --------------------------------------------------------


def ours_linear(layers, x, weight, bits, bias, grad):
    return (
        layers.linear(x, weight, bits, bias),
        layers.linear_input_grad(grad, weight, bits, x.dtype),
        layers.linear_weight_grad(grad, x, weight, bits, False),
        layers.linear_weight_grad(grad, x, weight, bits, True),
    )


def ours_conv(layers, x, weight, bits, bias, grad, geometry):
    return (
        layers.conv2d(x, weight, bits, bias, *geometry),
        layers.conv2d_input_grad(grad, weight, bits, x.shape, *geometry, x.dtype),
        layers.conv2d_weight_grad(grad, x, weight, bits, *geometry, False),
        layers.conv2d_weight_grad(grad, x, weight, bits, *geometry, True),
    )


def by_autograd(layer, x, weight, mask, bias, grad):
    """(y, gx, gW masked, gW dense) of layer(x, weight * mask, bias), computed in the dtype of x."""
    x = x.clone().requires_grad_()
    leaf = torch.where(mask, weight, 0.0).requires_grad_()
    y = layer(x, leaf.to(x.dtype), None if bias is None else bias.to(x.dtype))
    y.backward(grad)
    return y.detach(), x.grad, torch.where(mask, leaf.grad, 0.0), leaf.grad


def error(value, exact):
    """Largest error, relative to the largest exact value."""
    assert value.shape == exact.shape
    if exact.numel() == 0:
        return 0.0
    return float((value.to(F64) - exact).abs().max() / exact.abs().max().clamp_min(1e-300))


def check(layer, ours, x, weight, mask, bias, grad):
    """At most twice the error of PyTorch's op in the same dtype, against fp64."""
    exact_weight = weight.to(x.dtype).to(F64)  # the numbers that are multiplied
    exact_bias = None if bias is None else bias.to(F64)
    exact = by_autograd(layer, x.to(F64), exact_weight, mask, exact_bias, grad.to(F64))
    theirs = by_autograd(layer, x, weight, mask, bias, grad)
    for name, got, other, truth in zip(
        ("y", "gx", "gW masked", "gW dense"), ours, theirs, exact, strict=True
    ):
        assert error(got, truth) <= 2 * error(other, truth) + 4 * torch.finfo(F32).eps, name
    assert ours[0].dtype == ours[1].dtype == x.dtype
    for got in ours[2:]:
        assert got.dtype == weight.dtype and got.stride() == weight.stride()
    assert not ours[2][~mask].any()


# ---- linear --------------------------------------------------------------------------------------

# x shape, out. Interpreted tiles are 64 x 32 x 64; the last parts have 4 steps of them.
LINEAR = {
    "one": ((1, 1), 1),
    "primes": ((37, 67), 71),
    "one_row": ((1, 130), 7),
    "vector": ((33,), 5),
    "batches": ((2, 3, 32), 16),
    "parts_of_weight_grad": ((530, 5), 9),
    "parts_of_forward": ((3, 600), 4),
    "parts_of_input_grad": ((2, 6), 515),
    "no_rows": ((0, 6), 5),
    "no_inputs": ((3, 0), 5),
}
if ON_GPU:  # every bucket, with several tiles and parts
    LINEAR |= {
        "wide": ((4096, 1024), 2048),
        "medium": ((1000, 1008), 528),
        "skinny": ((16, 4096), 1024),
        "small": ((257, 523), 301),
        "many_rows": ((20000, 64), 48),
    }


@can_run
@pytest.mark.parametrize(("case", "dtypes"), spread(LINEAR))
def test_linear(layers, case, dtypes, _poison):
    (shape, outputs), (x_dtype, weight_dtype) = case, dtypes
    x, weight = random(*shape, dtype=x_dtype), random(outputs, shape[-1], dtype=weight_dtype)
    bias, grad = random(outputs), random(*shape[:-1], outputs, dtype=x_dtype)
    mask, bits = masked(weight.shape)
    ours = ours_linear(layers, x, weight, bits, bias, grad)
    check(F.linear, ours, x, weight, mask, bias, grad)


@can_run
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_linear_of_slices_among_nan(layers, dtype):
    def slice_of(rows, columns):
        around = torch.full((rows + 2, columns + 5), float("nan"), dtype=dtype, device=DEVICE)
        around[1:-1, 2:-3] = random(rows, columns, dtype=dtype)
        return around[1:-1, 2:-3]

    x, weight, grad = slice_of(11, 37), slice_of(19, 37), slice_of(11, 19)
    mask, bits = masked(weight.shape)
    ours = ours_linear(layers, x, weight, bits, None, grad)
    check(F.linear, ours, x, weight.contiguous(), mask, None, grad)


@can_run
def test_linear_with_a_transposed_weight_and_an_expanded_grad(layers):
    x, weight = random(40, 9).t(), random(40, 21).t()
    mask, bits = masked(weight.shape)
    grad = torch.ones((), device=DEVICE).expand(9, 21)
    ours = ours_linear(layers, x, weight, bits, None, grad)
    check(F.linear, ours, x, weight, mask, None, grad)


# ---- convolution ---------------------------------------------------------------------------------

# x shape, weight shape, (stride, padding, dilation, groups)
CONVS = {
    "plain": ((2, 3, 6, 5), (4, 3, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
    "one_pixel": ((1, 1, 1, 1), (1, 1, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    "two_tiles": ((1, 37, 4, 5), (70, 37, 2, 2), ((1, 1), (1, 1), (1, 1), 1)),
    "two_steps_per_tap": ((1, 70, 3, 3), (66, 70, 2, 1), ((1, 1), (0, 0), (1, 1), 1)),
    "strided": ((2, 3, 8, 7), (4, 3, 3, 2), ((2, 1), (1, 2), (1, 1), 1)),
    "strided_and_dilated": ((1, 3, 9, 10), (4, 3, 3, 3), ((2, 3), (2, 1), (2, 2), 1)),
    "grouped": ((1, 40, 4, 4), (36, 20, 3, 3), ((1, 1), (1, 1), (1, 1), 2)),
    "depthwise": ((2, 5, 6, 5), (10, 1, 3, 3), ((2, 2), (1, 1), (1, 1), 5)),
    "small_groups": ((1, 6, 7, 5), (9, 2, 3, 3), ((1, 1), (2, 2), (2, 2), 3)),
    "pointwise": ((2, 33, 4, 3), (9, 33, 1, 1), ((1, 1), (0, 0), (1, 1), 1)),
    "pointwise_strided": ((2, 5, 4, 3), (9, 5, 1, 1), ((2, 2), (0, 0), (1, 1), 1)),
    "seven": ((1, 3, 5, 6), (4, 3, 7, 7), ((2, 2), (3, 3), (1, 1), 1)),
    "phases_without_pixels": ((1, 2, 1, 2), (3, 2, 3, 3), ((3, 3), (1, 1), (1, 1), 1)),
    "parts_of_weight_grad": ((1, 2, 23, 23), (3, 2, 1, 2), ((1, 1), (0, 0), (1, 1), 1)),
    "no_batch": ((0, 3, 4, 4), (2, 3, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
}
if ON_GPU:
    CONVS |= {
        "resnet": ((32, 64, 56, 56), (64, 64, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
        "resnet_strided": ((16, 128, 28, 28), (256, 128, 3, 3), ((2, 2), (1, 1), (1, 1), 1)),
        "resnet_late": ((2, 512, 7, 7), (512, 512, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
        "stem": ((4, 3, 64, 64), (64, 3, 7, 7), ((2, 2), (3, 3), (1, 1), 1)),
        "resnext": ((4, 128, 14, 14), (128, 4, 3, 3), ((1, 1), (1, 1), (1, 1), 32)),
        "mobilenet": ((4, 96, 28, 28), (96, 1, 3, 3), ((2, 2), (1, 1), (1, 1), 96)),
    }


def convolution(geometry):
    return lambda x, weight, bias: F.conv2d(x, weight, bias, *geometry)


def conv_tensors(x_shape, weight_shape, geometry, x_dtype=F32, weight_dtype=F32):
    """(x, weight, bias, grad) of a convolution."""
    x, weight = random(*x_shape, dtype=x_dtype), random(*weight_shape, dtype=weight_dtype)
    like = F.conv2d(x.to("meta"), weight.to("meta", x_dtype), None, *geometry)
    return x, weight, random(weight_shape[0]), random(*like.shape, dtype=x_dtype)


@can_run
@pytest.mark.parametrize(("case", "dtypes"), spread(CONVS))
def test_conv2d(layers, case, dtypes, _poison):
    geometry, memory = case[2], channels_last if dtypes == (F32, F32) else torch.Tensor.contiguous
    x, weight, bias, grad = conv_tensors(*case, *dtypes)
    x, weight = memory(x), memory(weight)
    mask, bits = masked(weight.shape)
    ours = ours_conv(layers, x, weight, bits, bias, grad, geometry)
    check(convolution(geometry), ours, x, weight, mask, bias, grad)
    for result in ours[:2]:
        assert result.is_contiguous(memory_format=torch.channels_last)


@can_run
@pytest.mark.parametrize("groups", [1, 3], ids=["product", "direct"])
def test_conv2d_with_turned_taps(layers, groups):
    geometry = (1, 1), (1, 0), (1, 1), groups
    x, weight, bias, grad = conv_tensors((1, 3, 4, 3), (6, 3 // groups, 3, 2), geometry)
    weight = turned(weight)
    mask, bits = masked(weight.shape)
    ours = ours_conv(layers, x, weight, bits, bias, grad, geometry)
    check(convolution(geometry), ours, x, weight, mask, bias, grad)


@can_run
def test_conv2d_without_output_names_the_rule(layers):
    x, weight = random(1, 2, 3, 3), random(4, 2, 5, 5)
    bits = ops.pack_mask(weight > 0)
    with pytest.raises(ValueError, match=r"masked_conv2d: stride=\[1, 1\].*kernel of \[5, 5\]"):
        layers.conv2d(x, weight, bits, None, [1, 1], [0, 0], [1, 1], 1)
    with pytest.raises(ValueError, match="groups=3 does not divide the 4 outputs"):
        layers.conv2d(x, weight, bits, None, [1, 1], [2, 2], [1, 1], 3)


# ---- masks and values that are special -----------------------------------------------------------

GEOMETRY = (1, 1), (1, 1), (1, 1)
LAYERS = {
    "linear": ((7, 35), (20, 35), None),
    "conv": ((1, 5, 4, 3), (20, 5, 3, 3), (*GEOMETRY, 1)),
    "direct": ((1, 5, 4, 3), (5, 1, 3, 3), (*GEOMETRY, 5)),
}
each_layer = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)


def any_layer(layers, case, x_dtype=F32):
    """(ours(x, weight, bits), PyTorch's layer, x, weight, bias, grad) of one of LAYERS."""
    x_shape, weight_shape, geometry = case
    if geometry is not None:
        tensors = x, weight, bias, grad = conv_tensors(x_shape, weight_shape, geometry, x_dtype)
        run = partial(ours_conv, layers, bias=bias, grad=grad, geometry=geometry)
        return run, convolution(geometry), *tensors
    x, weight, bias = (
        random(*x_shape, dtype=x_dtype),
        random(*weight_shape),
        random(weight_shape[0]),
    )
    grad = random(x_shape[0], weight_shape[0], dtype=x_dtype)
    run = partial(ours_linear, layers, bias=bias, grad=grad)
    return run, F.linear, x, weight, bias, grad


@can_run
@each_layer
@pytest.mark.parametrize("pruned", ["row", "everything"])
def test_pruned_rows_and_layers(layers, case, pruned):
    ours, layer, x, weight, bias, grad = any_layer(layers, case)
    mask, _ = masked(weight.shape, density=0.5 if pruned == "row" else 0.0)
    mask[3] = False
    check(layer, ours(x, weight, ops.pack_mask(mask)), x, weight, mask, bias, grad)


@can_run
@each_layer
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_nan_and_infinity_under_the_mask_count_as_zero(layers, case, dtype):
    ours, _, x, weight, _, _ = any_layer(layers, case, dtype)
    mask, bits = masked(weight.shape)
    special = torch.tensor([float("nan"), float("inf"), -float("inf")], device=DEVICE)
    poisoned = torch.where(mask, weight, special[torch.randint(3, weight.shape, device=DEVICE)])
    clean = torch.where(mask, weight, 0.0)
    for got, expected in zip(ours(x, poisoned, bits), ours(x, clean, bits), strict=True):
        assert torch.equal(got, expected)


@can_run
@each_layer
def test_nan_in_x_meets_pruned_weights_as_in_pytorch(layers, case):
    ours, layer, x, weight, bias, grad = any_layer(layers, case)
    x[0, 1] = float("nan")
    mask, bits = masked(weight.shape)
    # on the CPU: other algorithms of convolution would spread NaN over their tiles
    theirs = by_autograd(layer, *(t.cpu() for t in (x, weight, mask, bias, grad)))
    for got, other in zip(ours(x, weight, bits), theirs, strict=True):
        assert torch.equal(got.isnan().cpu(), other.isnan())


@can_run
def test_bf16_rounds_weights_to_nearest_even(layers):
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 3e38])
    weight = ties.to(DEVICE)[:, None]
    y = layers.linear(torch.ones(1, 1, dtype=BF16, device=DEVICE), weight, masked((5, 1), 2.0)[1])
    assert torch.equal(y[0], weight[:, 0].to(BF16))


@can_run
@pytest.mark.parametrize("name", ["parts_of_weight_grad", "depthwise"])
def test_two_runs_give_the_same_bits(layers, name):
    case = CONVS[name]
    x, weight, bias, grad = conv_tensors(*case)
    _, bits = masked(weight.shape)
    first, second = (ours_conv(layers, x, weight, bits, bias, grad, case[2]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@can_run
@each_layer
def test_fp64_goes_to_the_reference(layers, case):
    ours, layer, x, weight, bias, grad = any_layer(layers, case, F64)
    mask, bits = masked(weight.shape)
    expected = by_autograd(layer, x, weight.to(F64), mask, bias, grad)
    for got, value in zip(ours(x, weight.to(F64), bits), expected, strict=True):
        assert torch.allclose(got, value)


def test_supported_dtypes(layers):
    assert all(layers.supports(op, *pair) for op in layers.OPS for pair in PAIRS.values())
    for pair in ((F64, F64), (F32, BF16), (BF16, F16), (BF16, F64)):
        assert not layers.supports("linear", *pair)
    with pytest.raises(ValueError, match="supports: op='conv3d' is unknown"):
        layers.supports("conv3d", F32, F32)


# ---- choice of tiles -----------------------------------------------------------------------------


def test_every_layer_finds_a_tile(layers):
    from sparse_cocktail.kernels.masked_tiles import Product, tiling

    for capability in ((8, 0), (8, 6), (9, 0), (12, 0)):
        for op in layers.OPS:
            for size in (0, 1, 17, 300, 5000):
                for bits, precision in ((16, "tf32"), (32, "tf32"), (32, "ieee")):
                    for aligned in (False, True):
                        product = Product(op, (size, 4096, size), aligned=aligned)
                        tile, parts = tiling(product, capability, 132, bits, precision)
                        assert all(16 <= edge <= 256 for edge in tile[:3])
                        assert 1 <= parts <= 32


def test_tiles_follow_the_size_of_the_work(layers):
    from sparse_cocktail.kernels.masked_tiles import TILES, Product, tiling

    def chosen(*sizes, op="linear", **others):
        return tiling(Product(op, sizes, **others), (9, 0), 132, 16, "tf32")

    assert chosen(4096, 16384, 4096) == (TILES[90, None, "wide"], 1)
    assert chosen(256, 256, 4096, split=False)[0] == TILES[90, None, "narrow"]
    assert chosen(4096, 8, 4096)[0] == TILES[90, None, "skinny"]._replace(n=16)
    assert chosen(4096, 4096, 4096, aligned=False)[0] == TILES[90, None, "small"]
    assert chosen(64, 64, 10**6, op="conv2d_weight_grad")[1] == 32  # few outputs, many pixels


# ---- without a GPU: what the compiler makes of the kernels ---------------------------------------


@pytest.fixture(scope="module")
def compilers(tmp_path_factory):
    yield from processes("triton_compile_masked.py", tmp_path_factory)


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def kernels(request, compilers):
    return reports(compilers[request.param])


def test_no_kernel_spills(kernels):
    # Triton 3.6 parks two scalars of a direct kernel with a layer of which it knows nothing.
    parked = 8 if triton.__version__.startswith("3.6") else 0
    allowed = {name: parked * name.endswith("direct-forward-odd") for name in kernels}
    assert len(kernels) > 60
    assert not {n: k["stack"] for n, k in kernels.items() if k["stack"] > allowed[n]}


def test_tiles_fit_into_shared_memory(kernels):
    too_large = {n: r["shared"] for n, r in kernels.items() if r["shared"] > SHARED[n[:2]]}
    assert not too_large


def test_products_run_on_tensor_cores(kernels):
    without = ("direct", "sum_parts", "ieee")
    products = {n: row for n, row in kernels.items() if not any(word in n for word in without)}
    assert not [name for name, row in products.items() if not row["products"]]
    small = ("smallest", "ones")  # tiles below the 64 rows of a warpgroup
    hopper = {n: r for n, r in products.items() if n[:2] == "90" and not n.endswith(small)}
    assert not [name for name, row in hopper.items() if not row["wgmma"]]


def test_aligned_layers_are_copied_16_bytes_at_a_time(kernels):
    for name, row in kernels.items():
        if name.endswith(("wide", "medium", "narrow", "skinny", "wide-bf16")):
            words = 0 if "weight_grad" in name else row["copies"] - row["wide_copies"]
            assert row["wide_copies"] > 5 * words, name


# ---- with a GPU ----------------------------------------------------------------------------------


@needs_gpu
@each_layer
def test_in_a_cuda_graph_without_waiting(layers, case):
    ours, _, x, weight, _, _ = any_layer(layers, case, BF16)
    _, bits = masked(weight.shape)
    other = masked(weight.shape)[1]
    ours(x, weight, bits)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(x, weight, bits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(graph):
        results = ours(x, weight, bits)
    bits.copy_(other)
    x.copy_(torch.randn_like(x))
    graph.replay()
    for got, expected in zip(results, ours(x, weight, bits), strict=True):
        assert torch.equal(got, expected)


@needs_gpu
@each_layer
def test_tf32_where_pytorch_is_allowed_it(layers, case):
    ours, layer, x, weight, bias, grad = any_layer(layers, case)
    mask, bits = masked(weight.shape)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    exact_bias = bias.to(F64)
    exact = by_autograd(layer, x.to(F64), weight.to(F64), mask, exact_bias, grad.to(F64))
    for got, truth in zip(ours(x, weight, bits), exact, strict=True):
        assert error(got, truth) < 2**-8  # operands lose 13 of their 23 bits, cut off
