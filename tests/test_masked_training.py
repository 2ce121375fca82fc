"""Masked layers in training: dtypes, strides, saved tensors, changed bits, compilation."""

import gc
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sparse_cocktail import ops

LAYERS = {
    "linear": (ops.masked_linear, F.linear, (6, 33), (5, 33), "masked_linear"),
    "conv": (ops.masked_conv2d, F.conv2d, (2, 33, 6, 6), (5, 33, 3, 3), "masked_conv2d"),
}
each_layer = pytest.mark.parametrize(
    ("layer", "dense", "x_shape", "shape", "name", "backend"),
    [(*row, backend) for row in LAYERS.values() for backend in ops.implementations(row[-1])],
    ids=[f"{key}-{b}" for key, row in LAYERS.items() for b in ops.implementations(row[-1])],
)


@pytest.fixture(autouse=True)
def _forced(request):
    """Run the test on the backend it is parametrised with."""
    if "backend" not in request.fixturenames:
        yield
        return
    with ops.backend(request.getfixturevalue("backend")):
        yield


def make(x_shape, shape, device, dtype=torch.float32):
    x = torch.randn(x_shape, device=device).to(dtype).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(shape, device=device))
    mask = torch.rand(shape, device=device) < 0.5
    return x, weight, mask, ops.pack_mask(mask)


# ---- dtypes and strides --------------------------------------------------------------------------


@each_layer
@pytest.mark.parametrize("dense_grad", [False, True], ids=["masked", "dense_grad"])
def test_gradient_has_dtype_of_the_master_weight(
    layer, dense, x_shape, shape, name, backend, device, dense_grad
):
    x, weight, _, bits = make(x_shape, shape, device, torch.bfloat16)
    bias = torch.nn.Parameter(torch.randn(shape[0], device=device))
    y = layer(x, weight, bits, bias, dense_grad=dense_grad)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ops.implementations("masked_conv2d"))
@pytest.mark.parametrize("dense_grad", [False, True], ids=["masked", "dense_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("last_x", [False, True], ids=["x_first", "x_last"])
@pytest.mark.parametrize("last_weight", [False, True], ids=["weight_first", "weight_last"])
def test_conv_gradient_has_strides_of_the_weight(
    backend, device, dense_grad, dtype, last_x, last_weight
):
    x, weight, _, bits = make((2, 8, 6, 6), (4, 8, 3, 3), device, dtype)
    if last_x:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    if last_weight:
        weight.data = weight.data.to(memory_format=torch.channels_last)
    y = ops.masked_conv2d(x, weight, bits, padding=1, dense_grad=dense_grad)
    # not weight.grad: torch lays that out like the weight by itself
    (grad,) = torch.autograd.grad(y.float().square().sum(), weight)
    assert grad.stride() == weight.stride()
    same = F.conv2d(x, weight.to(dtype), padding=1)
    assert y.stride() == same.stride(), "the output's memory format is not PyTorch's"


@pytest.mark.parametrize("backend", ops.implementations("masked_linear"))
@pytest.mark.parametrize("dense_grad", [False, True], ids=["masked", "dense_grad"])
def test_linear_gradient_has_strides_of_the_weight(backend, device, dense_grad):
    x, weight, _, bits = make((6, 33), (5, 33), device)
    weight.data = weight.data.t().contiguous().t()
    y = ops.masked_linear(x, weight, bits, dense_grad=dense_grad)
    (grad,) = torch.autograd.grad(y.sum(), weight)
    assert grad.stride() == weight.stride() == (1, 5)


@each_layer
def test_autocast_casts_x_and_keeps_the_master(layer, dense, x_shape, shape, name, backend, device):
    x, weight, mask, bits = make(x_shape, shape, device)
    bias = torch.nn.Parameter(torch.randn(shape[0], device=device))
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x, weight, bits, bias)
        expected = dense(x, weight * mask, bias)
    y.sum().backward()
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    assert weight.dtype == weight.grad.dtype == x.grad.dtype == torch.float32


@each_layer
def test_autocast_leaves_fp64_alone(layer, dense, x_shape, shape, name, backend, device):
    x, weight, _, bits = make(x_shape, shape, device, torch.float64)
    with torch.autocast(device.type, torch.bfloat16):
        assert layer(x, weight, bits).dtype == torch.float64


# ---- pruned NaN, saved tensors -------------------------------------------------------------------


@each_layer
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_pruned_nan_and_infinity_do_not_leak(
    layer, dense, x_shape, shape, name, backend, device, poison
):
    x, weight, mask, bits = make(x_shape, shape, device)
    clean = weight.detach().clone().requires_grad_()
    weight.data[~mask] = poison
    y, expected = layer(x, weight, bits), layer(x, clean, bits)
    assert torch.equal(y, expected)
    ours = torch.autograd.grad(y.square().sum(), (x, weight))
    theirs = torch.autograd.grad(expected.square().sum(), (x, clean))
    assert all(map(torch.equal, ours, theirs))
    assert not ours[1][~mask].any()


def tensors_in_python(numel):
    """Addresses of all living tensors with so many elements; traced ones have no memory."""
    living = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    return {t.data_ptr() for t in living if t.numel() == numel}


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_masked_weight_is_kept(layer, dense, x_shape, shape, name, backend, device, dtype):
    x, weight, _, bits = make(x_shape, shape, device, dtype)
    layer(x, weight, bits).sum().backward()  # scratch memory, one for all layers, stays
    saved, before = [], tensors_in_python(weight.numel())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x, weight, bits)
    large = [t for t in saved if t.numel() >= weight.numel() and t.data_ptr() != x.data_ptr()]
    assert [t.data_ptr() for t in large] == [weight.data_ptr()]
    saved.clear()
    large.clear()
    assert tensors_in_python(weight.numel()) <= before, "a tensor of the weight's size is kept"
    y.sum().backward()
    assert weight.grad is not None


# ---- bits that change ----------------------------------------------------------------------------


@each_layer
def test_changed_bits_raise_in_backward(layer, dense, x_shape, shape, name, backend, device):
    x, weight, _, bits = make(x_shape, shape, device)
    y = layer(x, weight, bits)
    bits.zero_()
    with pytest.raises(RuntimeError, match="inplace operation|changed in place"):
        y.sum().backward()


@each_layer
def test_changed_bits_raise_under_checkpointing(
    layer, dense, x_shape, shape, name, backend, device
):
    x, weight, _, bits = make(x_shape, shape, device)
    # as in a module the bits are no input of the checkpoint, which would watch its inputs itself
    y = checkpoint(lambda x: layer(x, weight, bits), x, use_reentrant=False)
    bits.zero_()
    with pytest.raises(RuntimeError, match=f"{name}: bits were changed in place"):
        y.sum().backward()


@each_layer
def test_checkpointing_gives_the_same_gradient(layer, dense, x_shape, shape, name, backend, device):
    x, weight, _, bits = make(x_shape, shape, device)
    plain = torch.autograd.grad(layer(x, weight, bits).square().sum(), (x, weight))
    y = checkpoint(layer, x, weight, bits, use_reentrant=False)
    assert all(map(torch.equal, plain, torch.autograd.grad(y.square().sum(), (x, weight))))


@pytest.mark.parametrize("backend", ops.implementations("masked_weight"))
@pytest.mark.parametrize("listed", [False, True], ids=["masked_weight", "masked_weights"])
def test_changed_bits_of_masked_weight_raise(backend, device, listed):
    _, weight, _, bits = make((1,), (5, 33), device)

    def masked(weight):
        return (
            ops.masked_weights([weight], [bits])[0] if listed else ops.masked_weight(weight, bits)
        )

    for result in (masked(weight), checkpoint(masked, weight, use_reentrant=False)):
        bits.zero_()
        with pytest.raises(RuntimeError, match="inplace operation|changed in place"):
            result.sum().backward()


# ---- compilation ---------------------------------------------------------------------------------


def step(x, weight, bits, bias, layer):
    """Mask, layer and loss as one graph."""
    (halved,) = ops.topk_masks([weight], weight.numel() // 2, [bits])
    return layer(x, weight, halved, bias).square().mean()


def gradients(function, x, weight, bits, bias, layer):
    return torch.autograd.grad(function(x, weight, bits, bias, layer), (x, weight, bias))


@each_layer
def test_compiled_equals_eager(layer, dense, x_shape, shape, name, backend, device):
    x, weight, _, bits = make(x_shape, shape, device)
    bias = torch.nn.Parameter(torch.randn(shape[0], device=device))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    arguments = x, weight, bits, bias, layer
    assert torch.equal(compiled(*arguments), step(*arguments))
    for mine, theirs in zip(
        gradients(compiled, *arguments), gradients(step, *arguments), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@each_layer
def test_compiled_under_autocast(layer, dense, x_shape, shape, name, backend, device):
    x, weight, _, bits = make(x_shape, shape, device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast(device.type, torch.bfloat16):
        got, expected = compiled(x, weight, bits), layer(x, weight, bits)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)


def test_switching_masks_recompiles_nothing():
    x, weight, _, bits = make((6, 33), (5, 33), "cpu")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.masked_linear, fullgraph=True, backend=counter)
    for density in (0.1, 0.5, 0.9):
        mask = torch.rand(weight.shape) < density
        bits.copy_(ops.pack_mask(mask))
        torch.testing.assert_close(compiled(x, weight, bits), F.linear(x, weight * mask))
    assert counter.frame_count == 1


def test_forced_backend_holds_in_a_compiled_graph():
    x, weight, mask, bits = make((6, 33), (5, 33), "cpu")
    compiled = torch.compile(ops.masked_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bits), F.linear(x, weight * mask))
    with ops.backend("cuda"), pytest.raises(ValueError, match="masked_linear: backend 'cuda'"):
        compiled(x, weight, bits)


def test_inductor_equals_eager():
    x, weight, _, bits = (t.detach() for t in make((6, 33), (5, 33), "cpu"))
    arguments = x, weight, bits, None, ops.masked_linear
    got = torch.compile(step, fullgraph=True)(*arguments)
    torch.testing.assert_close(got, step(*arguments))
