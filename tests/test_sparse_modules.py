"""Layers that hold what is kept of an unstructured weight: products, state, models of them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_cocktail import (
    Cocktail,
    MaskedConv2d,
    MaskedLinear,
    SparseConv2d,
    SparseLinear,
    convert,
    load_compressed,
    models,
    ops,
    prune_,
    to_compressed,
    to_dense,
)
from sparse_cocktail.costs import state_bytes

GEOMETRIES = {
    "plain": {"kernel_size": 3},
    "pointwise": {"kernel_size": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2},
    "uneven": {"kernel_size": (3, 5), "padding": "same", "bias": False},
    "reflected": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "grouped": {"kernel_size": 3, "groups": 4, "padding": 1},
}


def linear(out=48, inputs=37, pattern="unstructured-0.9", **how):
    layer = MaskedLinear(inputs, out, **how).eval()
    layer.set_mask(pattern)
    return layer


def conv(name, channels_last=False, pattern="unstructured-0.9"):
    layer = MaskedConv2d(32, 64, **GEOMETRIES[name]).eval()
    layer = layer.to(memory_format=torch.channels_last) if channels_last else layer
    layer.set_mask(pattern)
    return layer


# ---- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["sparse", "dense"])
@pytest.mark.parametrize("shape", [(37,), (1, 37), (9, 37), (2, 3, 37), (0, 37)], ids=str)
def test_linear_is_as_accurate_as_torch(way, shape):
    masked, x = linear(), torch.randn(shape)
    layer = SparseLinear.from_masked(masked)
    plain = masked.to_dense()
    with ops.route(way), torch.no_grad():
        y = layer(x)
    exact = F.linear(x.double(), plain.weight.double(), plain.bias.double())
    error = [(each.double() - exact).abs().sum() for each in (y, plain(x))]
    assert y.shape == exact.shape and error[0] <= 2 * error[1] + 1e-6
    assert list(layer._forms) == [{"sparse": "packed", "dense": "dense"}[way]]


@pytest.mark.parametrize("way", ["sparse", "dense"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv_is_as_accurate_as_torch(name, channels_last, way):
    masked = conv(name, channels_last)
    layer, plain = SparseConv2d.from_masked(masked), masked.to_dense()
    wide = copy.deepcopy(plain).double()
    for x in (torch.randn(3, 32, 9, 10), torch.randn(32, 9, 10)):
        if channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with ops.route(way), torch.no_grad():
            y, exact = layer(x), wide(x.double())
            error = [(each.double() - exact).abs().sum() for each in (y, plain(x))]
        assert y.shape == exact.shape and error[0] <= 2 * error[1] + 1e-6
    assert torch.equal(layer.weight, plain.weight)
    assert layer.weight.stride() == masked.weight.stride()


def test_layers_say_what_they_hold():
    layer = SparseLinear.from_masked(linear(64, 100))
    assert len(layer.values) == 640 and layer.density == pytest.approx(0.1)
    assert "density=0.1000, not run yet" in repr(layer)
    with ops.route("sparse"), torch.no_grad():
        layer(torch.randn(8, 100))
    assert "packed" in repr(layer)


def test_inputs_get_gradients_and_other_dtypes_run_dense():
    masked = linear()
    layer, plain = SparseLinear.from_masked(masked), masked.to_dense()
    x = torch.randn(5, 37, requires_grad=True)
    with ops.route("sparse"):
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x)
        (wanted,) = torch.autograd.grad(plain(x).square().sum(), x)
        assert torch.equal(grad, wanted)
        x = x.detach()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), plain(x))
        with pytest.raises(TypeError, match=r"x has dtype torch.float64.*convert one of them"):
            layer(x.double())
        half = copy.deepcopy(layer).to(torch.bfloat16)
        assert torch.equal(half(x.bfloat16()), plain.to(torch.bfloat16)(x.bfloat16()))


def test_new_values_are_seen():
    masked = linear()
    layer, x = SparseLinear.from_masked(masked), torch.randn(8, 37)
    with torch.no_grad():
        for way in ("sparse", "dense"):
            with ops.route(way):
                before = layer(x) - layer.bias
                layer.values.mul_(2)
                torch.testing.assert_close(layer(x) - layer.bias, 2 * before)
                with torch.inference_mode():
                    torch.testing.assert_close(layer(x) - layer.bias, 2 * before)


@pytest.mark.parametrize("way", ["sparse", "dense"])
def test_compiles_in_one_graph_after_a_first_run(way):
    layer, x = SparseLinear.from_masked(linear()), torch.randn(8, 37)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with ops.route(way), torch.no_grad():
        with pytest.raises(RuntimeError, match=r"run the model once before torch\.compile"):
            compiled(x)
        assert torch.equal(layer(x), compiled(x))


@pytest.mark.parametrize("way", ["sparse", "dense"])
def test_a_compiled_layer_follows_what_is_loaded_and_asked(way):
    layer, other = (
        SparseLinear.from_masked(linear(pattern=f"unstructured-{s}")) for s in (0.9, 0.8)
    )
    x = torch.randn(8, 37)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with ops.route(way):
        with torch.no_grad():
            layer(x), compiled(x)
            layer.load_state_dict(other.state_dict())
            assert torch.equal(compiled(x), other(x))
            with torch.autocast("cpu", torch.bfloat16):
                assert compiled(x).dtype == torch.bfloat16
        x.requires_grad_()
        (grad,) = torch.autograd.grad(compiled(x).sum(), x)
        torch.testing.assert_close(grad, layer.weight.sum(0).expand(8, -1))


def test_forward_mode_derivatives(threads):
    masked = MaskedLinear(64, 64).eval().requires_grad_(False)
    masked.set_mask("unstructured-0.9")
    x, v = torch.randn(2, 64, 64)
    with ops.route("sparse"):
        masked(x), masked(x)  # packed from now on
        for layer in (masked, SparseLinear.from_masked(masked)):
            _, tangent = torch.func.jvp(layer, (x,), (v,))
            torch.testing.assert_close(tangent, v @ masked.to_dense().weight.t())
        packed = ops.sparse_pack(masked.weight, masked.mask_bits)
        with pytest.raises(RuntimeError, match="this op is for inference only"):
            torch.func.jvp(lambda x: ops.sparse_linear(x, *packed, 64), (x,), (v,))


def test_traces():
    layer, x = SparseLinear.from_masked(linear()), torch.randn(8, 37)
    with torch.no_grad():
        layer(x)
        torch.testing.assert_close(torch.jit.trace(layer, x)(x), layer(x))


def test_writes_are_seen_in_layers_made_in_inference_mode():
    x = torch.randn(8, 37)
    with torch.inference_mode():
        layers = [SparseLinear.from_masked(linear()), SparseLinear.from_masked(linear())]
        layers[1].load_state_dict(layers[0].state_dict())
        for layer in layers:
            layer(x)
            layer.values.zero_()
            assert torch.equal(layer(x), layer.bias.expand(8, -1))


# ---- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(again):
    layer, x = SparseConv2d.from_masked(conv("strided", True)), torch.randn(2, 32, 9, 9)
    with torch.no_grad():
        y, made = layer(x), again(layer)
        assert torch.equal(made(x), y)
        layer.values.zero_()
        assert torch.equal(made(x), y)


def test_state_dicts_of_other_masks_load():
    first, second = (
        SparseLinear.from_masked(linear(pattern=f"unstructured-{s}")) for s in (0.9, 0.7)
    )
    x = torch.randn(8, 37)
    with torch.no_grad():
        first(x)
        first.load_state_dict(second.state_dict())
        assert torch.equal(first(x), second(x))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda s: {"values": s["values"][:-3]}, r"bits: .*shape \(175,\), but the bits keep 178"),
        (lambda s: {"bits": s["bits"].long()}, r"bits: SparseLinear: bits has dtype torch.int64"),
        (lambda s: {"bits": s["bits"][:-1]}, r"bits: SparseLinear: bits has shape"),
        (lambda s: {"bits": s["bits"] | -(2**31)}, r"bits: SparseLinear: .*beyond"),
    ],
    ids=["count", "dtype", "shape", "padding"],
)
def test_a_refused_state_leaves_the_layer_as_it_was(changed, message):
    layer, x = SparseLinear.from_masked(linear()), torch.randn(8, 37)
    state = layer.state_dict()
    with torch.no_grad():
        y = layer(x)
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict({**state, **changed(state)})
        assert torch.equal(layer(x), y)


def test_wrong_layers_are_refused():
    with pytest.raises(ValueError, match=r"SparseLinear\.from_masked: .* has no mask; use Spar"):
        SparseLinear.from_masked(MaskedLinear(8, 8))
    with pytest.raises(ValueError, match=r"SparseConv2d\.from_dense: .* has a mask; use Sparse"):
        SparseConv2d.from_dense(conv("plain"))
    with pytest.raises(TypeError, match=r"layer is a Conv2d, but it must be an nn\.Linear"):
        SparseLinear.from_dense(nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match="x has 5 inputs, but the layer has 37"):
        SparseLinear.from_masked(linear())(torch.zeros(2, 5))


# ---- models --------------------------------------------------------------------------------------


def pruned(pattern="unstructured-0.9"):
    return prune_(models.build("resnet18", {"inputs": 3}), pattern).eval()


@pytest.mark.parametrize("pattern", ["unstructured-0.9", "block-4x4-0.8", "2:4"])
def test_a_compressed_model_is_small_and_comes_back(pattern):
    model, x = pruned(pattern), torch.randn(2, 3, 32, 32)
    made = to_compressed(model, pattern)
    state = made.state_dict()
    share = {"unstructured-0.9": 0.15, "block-4x4-0.8": 0.25, "2:4": 0.55}[pattern]
    assert state_bytes(made) < share * state_bytes(to_dense(model))
    loaded = load_compressed(models.build("resnet18", {"inputs": 3}), state)
    with torch.no_grad():
        y = made(x)
        assert torch.equal(loaded(x), y)
        torch.testing.assert_close(y, to_dense(model)(x), rtol=1e-4, atol=1e-4)
    assert loaded.state_dict().keys() == state.keys()


def test_layers_that_keep_most_stay_plain():
    model = prune_(models.build("resnet8", {"width": 16}), "unstructured-0.4")
    made = to_compressed(model)
    kinds = {type(m) for m in made.modules() if isinstance(m, (nn.Conv2d, SparseConv2d))}
    shares = [m.density for m in model.modules() if isinstance(m, MaskedConv2d)]
    assert kinds == {nn.Conv2d} | ({SparseConv2d} if min(shares) <= 0.5 else set())
    with pytest.raises(ValueError, match=r"no layer of .* has a mask; prune it with prune_"):
        to_compressed(prune_(model, None))


def test_exports_hold_what_is_kept():
    model = models.build("resnet18", {"inputs": 3})
    for weight in model.parameters():
        if weight.dim() > 1:  # with tails: no layer loses all of its weights
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    cocktail = Cocktail(convert(model))
    cocktail.add("unstructured-0.9")
    small, plain = (cocktail.export("unstructured-0.9", plain=p) for p in (False, True))
    assert any(isinstance(m, SparseConv2d) for m in small.modules())
    assert all(type(m) is not SparseConv2d for m in plain.modules())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(small(x), plain(x), rtol=1e-4, atol=1e-4)
    stated = {row["name"]: row["bytes"] for row in cocktail.summary()}["unstructured-0.9000"]
    assert state_bytes(small) == pytest.approx(stated, rel=0.05)  # bits of silent channels


def test_a_loaded_model_keeps_its_dtype_and_its_layers_their_geometry():
    state = to_compressed(pruned()).state_dict()
    made = load_compressed(models.build("resnet18", {"inputs": 3}).bfloat16(), state)
    assert made(torch.randn(2, 3, 32, 32).bfloat16()).dtype == torch.bfloat16
    layer = next(m for m in made.modules() if isinstance(m, SparseConv2d))
    plain = layer.to_dense()
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups"):
        assert getattr(layer, name) == getattr(plain, name)
    with torch.device("meta"):
        empty = models.build("resnet18", {"inputs": 3})
    with pytest.raises(ValueError, match="is on the device meta, where nothing can be loaded"):
        load_compressed(empty, state)


def test_a_state_dict_of_another_network_is_refused():
    state = to_compressed(pruned()).state_dict()
    with pytest.raises(ValueError, match=r"load_compressed: the state dict does not fit ResNet"):
        load_compressed(models.build("resnet34", {"inputs": 3}), state)
