"""Masked layers in eval mode compute with packed weights where the table says so."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from sparse_cocktail import MaskedConv2d, MaskedLinear, ops, packing
from sparse_cocktail.ops import routes


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """The table says yes; what it was asked for."""
    questions = []

    def chosen(op, rows, weight, density):
        questions.append((op, rows, tuple(weight.shape), round(density, 2)))
        return True

    monkeypatch.setattr(routes, "chosen_sparse", chosen)
    return questions


LAYERS = {
    "linear": (lambda: MaskedLinear(33, 12), (5, 33)),
    "linear_no_bias": (lambda: MaskedLinear(33, 12, bias=False), (2, 3, 33)),
    "conv": (lambda: MaskedConv2d(5, 12, 3, stride=2, padding=1), (2, 5, 8, 8)),
    "conv_same": (lambda: MaskedConv2d(5, 12, 2, padding="same"), (2, 5, 8, 8)),
    "conv_reflect": (
        lambda: MaskedConv2d(5, 12, 3, padding=1, padding_mode="reflect"),
        (2, 5, 8, 8),
    ),
    "conv_image": (lambda: MaskedConv2d(5, 12, 1, bias=False), (5, 8, 8)),
}
each_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def packs_of(layer):
    pack = packing._packs.get(layer)
    return None if pack is None else pack.tensors


def plain(layer, x):
    """What the layer's parent computes with W*m."""
    dense = layer.to_dense()
    return dense(x)


@each_layer
@pytest.mark.parametrize("pattern", ["unstructured-0.87", "channel-0.5"])
def test_packed_at_the_second_call(make, shape, pattern):
    layer, x = make().eval(), torch.randn(shape)
    layer.set_mask(pattern)
    with torch.no_grad():
        expected = plain(layer, x)
        torch.testing.assert_close(layer(x), expected)
        assert packs_of(layer) is None
        for _ in range(2):
            y = layer(x)
            torch.testing.assert_close(y, expected)
            assert y.stride() == expected.stride()
    values, places, starts = packs_of(layer)
    assert values.numel() == places.numel() == int(ops.mask_count(layer.mask_bits))
    assert starts[-1, -1] == values.numel()


def ready():
    layer, x = MaskedLinear(33, 12).eval(), torch.randn(5, 33)
    layer.set_mask("unstructured-0.5")
    with torch.no_grad():
        layer(x), layer(x)
    assert packs_of(layer) is not None
    return layer, x


def test_the_table_is_asked(asked):
    ready()
    assert asked == [("sparse_linear", 5, (12, 33), 0.5)]
    conv = MaskedConv2d(4, 8, 3, stride=2, padding=1).eval()
    conv.set_mask("unstructured-0.75")
    with torch.no_grad():
        conv(torch.randn(3, 4, 10, 6)), conv(torch.randn(3, 4, 10, 6))
    assert asked[1:] == [("sparse_conv2d", 45, (8, 4, 3, 3), 0.25)]


def test_where_the_table_says_no(monkeypatch):
    monkeypatch.setattr(routes, "chosen_sparse", lambda *_: False)
    layer, x = MaskedLinear(33, 12).eval(), torch.randn(5, 33)
    layer.set_mask("unstructured-0.5")
    with torch.no_grad():
        layer(x), layer(x)
    assert packs_of(layer) is None


@pytest.mark.parametrize("change", ["weight", "mask", "bits", "new weight"])
def test_a_change_is_seen(change):
    layer, x = ready()
    with torch.no_grad():
        if change == "weight":
            layer.weight.mul_(2)
        elif change == "mask":
            layer.set_mask("unstructured-0.8")
        elif change == "bits":
            layer.mask_bits[:6] = 0
            layer.live[:6] = False
        else:
            layer.weight = torch.nn.Parameter(torch.randn(12, 33))
        expected = F.linear(x, layer.weight * layer.mask, layer.bias * layer.live)
        for _ in range(3):
            torch.testing.assert_close(layer(x), expected)


def test_moved_weights_are_packed_anew():
    layer, x = ready()
    layer.half().float()  # rounded, perhaps at the same address
    assert packs_of(layer) is None
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(layer(x), plain(layer, x))


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.data.mul_(2),
        lambda layer: layer.weight.detach().numpy().__imul__(2),
        lambda layer: layer.mask_bits.data.fill_(0),
    ],
    ids=["data", "numpy", "mask"],
)
def test_writes_without_a_version_are_seen(write):
    layer, x = ready()
    write(layer)
    with torch.no_grad():
        expected = F.linear(x, layer.weight * layer.mask, layer.bias * layer.live)
        for _ in range(3):
            torch.testing.assert_close(layer(x), expected)


def test_fused_optimizers():
    layer, x = ready()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, fused=True)
    for _ in range(3):
        layer.train()(x).square().sum().backward()
        optimizer.step()
        layer.eval()
        with torch.no_grad():
            expected = F.linear(x, layer.weight * layer.mask, layer.bias)
            for _ in range(3):
                torch.testing.assert_close(layer(x), expected)


def test_few_rows_stay_dense(asked):
    layer = MaskedLinear(33, 12).eval()
    layer.set_mask("unstructured-0.5")
    with torch.no_grad():
        for _ in range(3):
            layer(torch.randn(packing.LEAST_ROWS - 1, 33))
    assert packs_of(layer) is None and not asked


def test_training_and_gradients_go_on():
    layer, x = ready()
    expected = F.linear(x, layer.weight * layer.mask, layer.bias)
    y = layer(x)  # eval mode with gradients
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert layer.weight.grad is not None and torch.equal(layer.weight.grad == 0, ~layer.mask)
    torch.testing.assert_close(layer.train()(x), expected)
    layer.eval().requires_grad_(False)
    torch.testing.assert_close(layer(x.requires_grad_()), expected)


def test_other_dtypes_and_autocast_take_the_masked_op():
    layer, x = ready()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    double = copy.deepcopy(layer).double()
    with torch.no_grad():
        for _ in range(3):
            y = double(x.double())
    torch.testing.assert_close(y, F.linear(x, layer.weight * layer.mask, layer.bias).double())
    grouped = MaskedConv2d(4, 8, 3, groups=2).eval()
    grouped.set_mask("unstructured-0.5")
    with torch.no_grad():
        for _ in range(3):
            grouped(torch.randn(1, 4, 5, 5))
    assert packs_of(grouped) is None and packs_of(double) is None


def test_inference_mode():
    layer, x = ready()
    with torch.no_grad():
        expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
        fresh = MaskedLinear(33, 12).eval()
        fresh.set_mask("unstructured-0.5")
        for _ in range(3):
            fresh(x)
    assert packs_of(fresh) is None, "inference tensors have no version to tell changes by"


def test_copies_and_pickles_do_not_carry_it():
    layer, x = ready()
    with torch.no_grad():
        expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert packs_of(other) is None
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(other(x), expected)
    assert list(layer.state_dict()) == ["weight", "bias", "mask_bits"]
    before = len(packing._packs)
    del layer
    assert len(packing._packs) < before


def test_compiled_layers_take_the_masked_op():
    layer, x = ready()
    with torch.no_grad():
        expected = layer(x)
        got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, expected)
