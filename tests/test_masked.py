"""Masked weight, linear and convolution: values and gradients against PyTorch in fp64."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from sparse_cocktail import ops

LINEAR_BACKENDS = ops.implementations("masked_linear")
CONV_BACKENDS = ops.implementations("masked_conv2d")
each_weight_backend = pytest.mark.parametrize("backend", ops.implementations("masked_weight"))
each_linear_backend = pytest.mark.parametrize("backend", LINEAR_BACKENDS)
each_conv_backend = pytest.mark.parametrize("backend", CONV_BACKENDS)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# x shape, weight shape, and the geometry of the convolution
CONVS = {
    "plain": ((2, 3, 6, 5), (4, 3, 3, 3), {}),
    "one_pixel": ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    "primes": ((3, 7, 11, 5), (13, 7, 1, 3), {}),
    "two_words": ((2, 37, 5, 5), (5, 37, 3, 3), {"padding": 1}),
    "strided": ((2, 3, 8, 7), (4, 3, 3, 2), {"stride": (2, 1), "padding": (1, 2)}),
    "dilated": ((2, 3, 9, 9), (4, 3, 3, 3), {"dilation": (1, 2), "padding": 2}),
    "grouped": ((2, 6, 5, 5), (4, 3, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((2, 4, 5, 5), (8, 1, 3, 3), {"groups": 4}),
}
each_conv = pytest.mark.parametrize(("x", "weight", "geometry"), CONVS.values(), ids=CONVS)


def masked_of(shape, device="cpu", density=0.5):
    """A mask and its bits."""
    mask = torch.rand(shape, device=device) < density
    return mask, ops.pack_mask(mask)


def double(*shape, device="cpu"):
    return torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)


# ---- masked weight -------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda w: w,
    "channels_last": lambda w: w.to(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
}


@each_weight_backend
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_masked_weight_is_where_and_cast(backend, device, layout, dtype):
    weight = layout(torch.randn(5, 37, 3, 3).to(dtype)).to(device)
    mask, bits = masked_of(weight.shape, device)
    for result in (None, *DTYPES):
        with ops.backend(backend):
            single = ops.masked_weight(weight, bits, result)
            (listed,) = ops.masked_weights([weight], [bits], result)
        expected = torch.where(mask, weight, 0.0).to(result or dtype)
        for got in (single, listed):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected), result
            assert got.stride() == weight.stride(), result


@each_weight_backend
def test_masked_weight_on_any_thread_count(backend, device, threads):
    # interpreted kernels have no threads: a count still must not reach them
    rows = 31 if backend == "triton" and device.type == "cpu" else 257
    weight = torch.randn(rows, 300, 3, 3, device=device)
    mask, bits = masked_of(weight.shape, device)
    for count in (1, 2, 5):
        threads(count)
        with ops.backend(backend):
            assert torch.equal(ops.masked_weight(weight, bits), weight * mask), f"{count} threads"


@each_weight_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_masked_weight_gradient(backend, device, dtype):
    for shape in ((3, 5), (2, 33), (2, 3, 2, 2), (2, 3, 5)):
        weight, (_, bits) = double(*shape, device=device), masked_of(shape, device)
        with ops.backend(backend):
            assert gradcheck(ops.masked_weight, (weight, bits), fast_mode=True)
            assert gradgradcheck(ops.masked_weight, (weight, bits), fast_mode=True)
            weight = weight.detach().to(dtype).requires_grad_()
            ops.masked_weight(weight, bits, torch.bfloat16).sum().backward()
        assert weight.grad.dtype == dtype
        assert torch.equal(weight.grad, ops.unpack_mask(bits, shape).to(dtype))


@each_weight_backend
def test_masked_weights_gradient(backend, device):
    # few elements: every one is moved alone, twice, which is a hundred calls of the kernels
    weights = [double(3, 2, device=device), double(1, 3, 2, 1, device=device)]
    masks, bits = zip(*(masked_of(w.shape, device) for w in weights), strict=True)
    assert all(mask.any() and not mask.all() for mask in masks)

    def both(*values):
        return tuple(ops.masked_weights(values, bits))

    with ops.backend(backend):
        assert gradcheck(both, weights)
        assert gradgradcheck(both, weights)


@each_weight_backend
def test_masked_weights_gradient_of_some(backend, device):
    used, unused, frozen = (torch.randn(4, 6, device=device) for _ in range(3))
    used.requires_grad_(), unused.requires_grad_()
    masks, bits = zip(*(masked_of((4, 6), device) for _ in range(3)), strict=True)
    with ops.backend(backend):
        first, _, last = ops.masked_weights([used, unused, frozen], bits)
        (first.sum() + last.sum()).backward()
    assert torch.equal(used.grad, masks[0].float())
    assert unused.grad is None or not unused.grad.any()
    assert frozen.grad is None


# ---- masked copy ---------------------------------------------------------------------------------

SLICES = {**LAYOUTS, "gaps": lambda w: torch.cat([w, w], 1)[:, : w.shape[1]]}


@pytest.mark.parametrize("backend", ops.implementations("masked_copy_"))
@pytest.mark.parametrize("level", ops.cpu_levels() or ("",))
@pytest.mark.parametrize("layout", SLICES.values(), ids=SLICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_masked_copy_is_where(backend, level, layout, dtype, threads):
    """Bits as they are, and only where the mask says so."""
    threads(2)
    weights, sources, bits, expected = [], [], [], []
    for shape in ((5, 37, 3, 3), (70, 64, 1, 1), (3, 300, 1, 2)):
        weight, source = (layout(torch.randn(shape).to(dtype)) for _ in range(2))
        source[0, 0], weight[1, 1] = torch.nan, torch.inf
        mask, words = masked_of(shape)
        weights.append(weight), sources.append(source), bits.append(words)
        expected.append(torch.where(mask, source, weight))
    kept = [weight.clone() for weight in sources]
    versions = [weight._version for weight in weights]
    with ops.backend(backend), ops.cpu_level(level) if level else contextlib.nullcontext():
        ops.masked_copy_(weights, sources, bits)
    for weight, wanted in zip([*weights, *sources], [*expected, *kept], strict=True):
        torch.testing.assert_close(weight, wanted, rtol=0, atol=0, equal_nan=True)
    assert all(w._version > before for w, before in zip(weights, versions, strict=True))


def test_masked_copy_refuses_what_does_not_fit():
    weight, (_, bits) = torch.randn(4, 6), masked_of((4, 6))
    for message, arguments in (
        (r"sources has 0 .* 1", ([weight], [], [bits])),
        (r"sources\[0\] has shape \(4, 5\)", ([weight], [weight[:, 1:]], [bits])),
        (r"sources\[0\] .* dtype torch.float64", ([weight], [weight.double()], [bits])),
        (r"bits\[0\] has shape", ([weight], [weight], [bits[1:]])),
    ):
        with pytest.raises(ValueError, match="masked_copy_: " + message):
            ops.masked_copy_(*arguments)


# ---- gradients -----------------------------------------------------------------------------------


@each_linear_backend
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("rows", [(), (1,), (4,), (2, 3)], ids=str)
def test_linear_gradient(backend, device, rows, bias):
    _, bits = masked_of((3, 5), device)
    x, weight = double(*rows, 5, device=device), double(3, 5, device=device)
    b = double(3, device=device) if bias else None
    fast = backend == "triton"  # an interpreted kernel takes 10 ms, and every element needs two
    with ops.backend(backend):
        assert gradcheck(ops.masked_linear, (x, weight, bits, b), fast_mode=fast)
        assert gradgradcheck(ops.masked_linear, (x, weight, bits, b), fast_mode=fast)


@each_conv_backend
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@each_conv
def test_conv_gradient(backend, device, x, weight, geometry, bias):
    _, bits = masked_of(weight, device)
    x, weight = double(*x, device=device), double(*weight, device=device)
    b = double(len(weight), device=device) if bias else None

    def conv(x, weight, bias):
        return ops.masked_conv2d(x, weight, bits, bias, **geometry)

    with ops.backend(backend):
        assert gradcheck(conv, (x, weight, b), fast_mode=True)
        assert gradgradcheck(conv, (x, weight, b), fast_mode=True)


@each_linear_backend
def test_linear_dense_gradient(backend, device):
    x, weight = double(4, 5, device=device), double(3, 5, device=device)
    mask, bits = masked_of((3, 5), device)
    with ops.backend(backend):
        y = ops.masked_linear(x, weight, bits, dense_grad=True)
        seen = torch.randn_like(y)
        grad_x, grad_weight = torch.autograd.grad(y, (x, weight), seen)
    torch.testing.assert_close(y, F.linear(x, weight * mask))
    torch.testing.assert_close(grad_weight, seen.t() @ x)
    torch.testing.assert_close(grad_x, seen @ (weight * mask))


@each_conv_backend
@each_conv
def test_conv_dense_gradient(backend, device, x, weight, geometry):
    mask, bits = masked_of(weight, device)
    x, weight = double(*x, device=device), double(*weight, device=device)
    with ops.backend(backend):
        y = ops.masked_conv2d(x, weight, bits, dense_grad=True, **geometry)
        seen = torch.randn_like(y)
        grad_x, grad_weight = torch.autograd.grad(y, (x, weight), seen)
    dense = torch.autograd.grad(F.conv2d(x, weight, **geometry), weight, seen)[0]
    masked = torch.autograd.grad(F.conv2d(x, weight * mask, **geometry), x, seen)[0]
    torch.testing.assert_close(grad_weight, dense)
    torch.testing.assert_close(grad_x, masked)
    assert mask.all() or grad_weight[~mask].any(), "pruned weights get no gradient"


@each_conv_backend
def test_only_wanted_gradients(backend, device):
    x, weight, b = (double(*s, device=device) for s in ((1, 2, 4, 4), (3, 2, 3, 3), (3,)))
    _, bits = masked_of(weight.shape, device)
    tensors = x, weight, b
    for wanted in itertools.product([False, True], repeat=3):
        for tensor, want in zip(tensors, wanted, strict=True):
            tensor.requires_grad_(want)
            tensor.grad = None
        with ops.backend(backend):
            y = ops.masked_conv2d(x, weight, bits, b)
            assert y.requires_grad == any(wanted)
            if y.requires_grad:
                y.sum().backward()
        assert tuple(t.grad is not None for t in tensors) == wanted


# ---- accuracy ------------------------------------------------------------------------------------


def results(function, x, weight, bias, seen):
    """Output and the gradients of x, weight and bias."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, seen.to(y.dtype))


def check_error(ours, torchs, exact):
    """Our error may be twice that of PyTorch in the same dtype, in the maximum norm."""
    for name, mine, theirs, true in zip(
        ("y", "grad_x", "grad_weight", "grad_bias"), ours, torchs, exact, strict=True
    ):
        assert mine.dtype == theirs.dtype, f"{name}: {mine.dtype} != {theirs.dtype}"
        error = (mine.double() - true).abs().max()
        bound = 2 * (theirs.double() - true).abs().max() + 1e-6 * true.abs().max()
        assert error <= bound, f"{name}: error {error:.3e} > {bound:.3e}"


PRECISIONS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16_x_fp32_master": (torch.bfloat16, torch.float32),
    "fp16_x_fp32_master": (torch.float16, torch.float32),
}
each_precision = pytest.mark.parametrize(
    ("x_dtype", "w_dtype"), PRECISIONS.values(), ids=PRECISIONS
)


@each_linear_backend
@each_precision
@pytest.mark.parametrize("rows", [(1,), (17,), (2, 64)], ids=str)
def test_linear_error(backend, device, x_dtype, w_dtype, rows):
    x = torch.randn(*rows, 131, device=device).to(x_dtype)
    weight, bias = (torch.randn(s, device=device).to(w_dtype) for s in ((53, 131), (53,)))
    mask, bits = masked_of(weight.shape, device)
    seen = torch.randn(*rows, 53, device=device).to(x_dtype)

    def theirs(x, w, b):
        return F.linear(x, torch.where(mask, w, 0).to(x.dtype), b.to(x.dtype))

    with ops.backend(backend):
        ours = results(lambda x, w, b: ops.masked_linear(x, w, bits, b), x, weight, bias, seen)
    exact = results(theirs, x.double(), weight.double(), bias.double(), seen)
    check_error(ours, results(theirs, x, weight, bias, seen), exact)


@each_conv_backend
@each_precision
@each_conv
def test_conv_error(backend, device, x_dtype, w_dtype, x, weight, geometry):
    x = torch.randn(x, device=device).to(x_dtype)
    bias = torch.randn(weight[0], device=device).to(w_dtype)
    weight = torch.randn(weight, device=device).to(w_dtype)
    mask, bits = masked_of(weight.shape, device)

    def theirs(x, w, b):
        return F.conv2d(x, torch.where(mask, w, 0).to(x.dtype), b.to(x.dtype), **geometry)

    seen = torch.randn_like(theirs(x, weight, bias))
    with ops.backend(backend):
        ours = results(
            lambda x, w, b: ops.masked_conv2d(x, w, bits, b, **geometry), x, weight, bias, seen
        )
    exact = results(theirs, x.double(), weight.double(), bias.double(), seen)
    check_error(ours, results(theirs, x, weight, bias, seen), exact)


@each_conv_backend
def test_unbatched_image_and_ints(backend, device):
    x, weight = torch.randn(3, 6, 6, device=device), torch.randn(4, 3, 3, 3, device=device)
    mask, bits = masked_of(weight.shape, device)
    with ops.backend(backend):
        single = ops.masked_conv2d(x, weight, bits, padding=1, stride=2)
        batch = ops.masked_conv2d(x[None], weight, bits, padding=[1, 1], stride=(2, 2))
    expected = F.conv2d(x, weight * mask, padding=1, stride=2)
    torch.testing.assert_close(single, expected)
    torch.testing.assert_close(batch[0], expected)


@each_conv_backend
@pytest.mark.parametrize("density", [0.0, 1.0], ids=["empty_mask", "full_mask"])
def test_extreme_masks(backend, device, density):
    x = torch.randn(2, 33, 5, 5, device=device)
    weight, bias = torch.randn(7, 33, 3, 3, device=device), torch.randn(7, device=device)
    _, bits = masked_of(weight.shape, device, density)
    with ops.backend(backend):
        got = ops.masked_conv2d(x, weight, bits, bias)
    expected = F.conv2d(x, weight * density, bias)
    torch.testing.assert_close(got, expected)
