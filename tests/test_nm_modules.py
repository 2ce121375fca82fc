"""NMLinear and NMConv2d: what they hold, what they compute, and models made of them."""

import copy
import io

import pytest
import torch
from torch import nn

from sparse_cocktail import (
    Cocktail,
    MaskedConv2d,
    MaskedLinear,
    NMConv2d,
    NMLinear,
    convert,
    models,
    prune_,
    to_compressed,
    to_dense,
)
from sparse_cocktail.ops import nm_routes

ROUTES = ("compressed", "dense")  # of the CPU
PATTERNS = ("2:4", "4:8", "1:4", "1:2")
CONVS = {
    "pointwise": {"kernel_size": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 1, "stride": 2},
    "groups": {"kernel_size": 3, "groups": 2},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "uneven": {"kernel_size": (2, 3), "padding": "same"},
    "no bias": {"kernel_size": 1, "bias": False},
}


def masked_linear(pattern="2:4", bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    layer = MaskedLinear(64, 24, bias, dtype=dtype)
    layer.set_mask(pattern)
    return layer


def masked_conv(pattern="2:4", **arguments):
    torch.manual_seed(0)
    layer = MaskedConv2d(32, 16, **arguments)
    layer.set_mask(pattern)
    return layer


# ---- what they compute ---------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 64), (2, 40, 64), (0, 64)], ids=str)
def test_linear_computes_as_the_masked_layer(pattern, shape, route):
    layer, x = masked_linear(pattern), torch.randn(shape)
    made = NMLinear.from_masked(layer, pattern)
    with nm_routes.forced(route):
        torch.testing.assert_close(made(x), layer(x))
    assert made(x).shape == (*shape[:-1], 24)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("arguments", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_conv_computes_as_the_masked_layer(arguments, memory, route):
    layer = masked_conv(**arguments).to(memory_format=memory)
    x = torch.randn(2, 32, 7, 9).to(memory_format=memory)
    with nm_routes.forced(route):
        made = NMConv2d.from_masked(layer, "2:4")
        torch.testing.assert_close(made(x), layer(x))
        torch.testing.assert_close(made(x[0]), layer(x[0]))


def test_a_silent_row_keeps_no_bias():
    layer = masked_linear()
    mask = layer.mask
    mask[3] = False
    layer.set_mask(mask)
    made = NMLinear.from_masked(layer, "2:4")
    y = made(torch.randn(4, 64))
    assert not y[:, 3].any() and y[:, 2].all()


@pytest.mark.parametrize("kind", [NMLinear, NMConv2d])
def test_from_a_plain_layer_prunes_by_magnitude(kind):
    linear = kind is NMLinear
    plain = nn.Linear(32, 8) if linear else nn.Conv2d(32, 8, 1)
    expected = (MaskedLinear if linear else MaskedConv2d).from_dense(plain)
    expected.set_mask("2:4")
    x = torch.randn(3, 32) if linear else torch.randn(3, 32, 4, 4)
    made = kind.from_dense(plain, "2:4")
    torch.testing.assert_close(made(x), expected(x))
    back = made.to_dense()
    assert type(back) is type(plain)
    assert torch.equal(back.weight, expected.weight * expected.mask)


@pytest.mark.parametrize("route", ROUTES)
def test_gradient_of_the_input(route):
    layer, x = masked_linear(), torch.randn(5, 64, requires_grad=True)
    made = NMLinear.from_masked(layer, "2:4")
    with nm_routes.forced(route):
        (got,) = torch.autograd.grad(made(x).square().sum(), x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    layer = masked_linear(dtype=dtype)
    made, x = NMLinear.from_masked(layer, "2:4"), torch.randn(7, 64, dtype=dtype)
    y = made(x)
    assert y.dtype == dtype
    exact = layer.double()(x.double())
    error = (y.double() - exact).abs().max()
    assert error <= 2 * (exact.to(dtype).double() - exact).abs().max() + 2**-9


def test_compiled_with_any_number_of_rows():
    torch._dynamo.reset()
    made = NMLinear.from_masked(masked_linear(), "2:4")
    made.pack()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (1, 3, 200):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(compiled(x), made(x))


# ---- what they hold ------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
def test_state_dict_is_the_same_however_it_runs(route):
    layer = masked_linear()
    made = NMLinear.from_masked(layer, "2:4")
    before = {k: v.clone() for k, v in made.state_dict().items()}
    assert list(before) == ["values", "bits", "bias"]
    assert before["values"].shape == (24, 1, 32) and before["bits"].shape == (24, 1, 2)
    with nm_routes.forced(route):
        made(torch.randn(2, 64))
        made.pack()
    after = made.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    other = NMLinear(64, 24, "2:4")
    other(torch.randn(2, 64))
    other.load_state_dict(after)
    x = torch.randn(3, 64)
    torch.testing.assert_close(other(x), made(x))


def test_only_the_form_that_is_used_is_held():
    made = NMLinear.from_masked(masked_linear(), "2:4")
    with nm_routes.forced("compressed"):
        made.pack()
    assert made.values is not None and made.dense is None and made.packed is None
    with nm_routes.forced("dense"):
        made.pack()
    assert made.values is None and made.dense is not None and "dense" in repr(made)
    made.to(torch.float64)
    assert made.values.dtype == torch.float64 and made.dense is None and made.plan is None
    assert torch.equal(made.weight, made.to_dense().weight)


def test_packed_form_gives_its_values_back():
    """On a card with sparse tensor cores it takes the place of the values."""
    layer = masked_linear(dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight[:, ::3] = 0  # kept zeros must stay kept
    layer.set_mask("2:4")
    made = NMLinear.from_masked(layer, "2:4")
    before, x = made.state_dict(), torch.randn(3, 64, dtype=torch.bfloat16)
    expected = made(x)
    made._unpack()
    made._hold({"gemm"})
    assert made.values is None and made.packed is not None
    after = made.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    clone = copy.deepcopy(made)
    assert torch.equal(clone.weight, layer.weight * layer.mask)
    assert torch.equal(clone.float().bfloat16()(x), expected)


def test_copies_pickles_and_moves():
    made = NMLinear.from_masked(masked_linear(), "2:4")
    x = torch.randn(3, 64)
    y = made(x)
    assert torch.equal(copy.deepcopy(made)(x), y)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)
    assert torch.equal(made.double().float()(x), y)


# ---- errors --------------------------------------------------------------------------------------


def test_errors_name_the_rule():
    with pytest.raises(ValueError, match="NMLinear: weight has in=30.*multiple of m=4"):
        NMLinear(30, 8, "2:4")
    with pytest.raises(ValueError, match="NMLinear: pattern='unstructured-0.5000' is not N:M"):
        NMLinear(32, 8, "unstructured-0.5")
    layer = masked_linear("unstructured-0.5")
    with pytest.raises(ValueError, match="NMLinear.from_masked: bits keep [34] of a group of m=4"):
        NMLinear.from_masked(layer, "2:4")


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["2:4", "1:4"])
def test_export_of_an_nm_subnet(name):
    torch.manual_seed(0)
    cocktail = Cocktail(convert(models.build("resnet8", {"width": 8}), channels_last=True))
    cocktail.add(name)
    x = torch.randn(4, 1, 8, 8)
    cocktail.recalibrate(name, [x])
    small = cocktail.export(name)
    found = [m for m in small.modules() if isinstance(m, (NMLinear, NMConv2d))]
    assert len(found) == len(cocktail.layers) and not small.training
    assert not any(isinstance(m, (MaskedLinear, MaskedConv2d)) for m in small.modules())
    with cocktail.using(name), torch.no_grad():
        torch.testing.assert_close(small(x), cocktail.model.eval()(x))
    again = cocktail.export(name)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))


def test_layers_that_cannot_take_the_pattern_become_plain():
    model = convert(nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 4)), skip=())
    prune_(model, "2:4")
    made = to_compressed(model, "2:4")
    assert [type(m) for m in made] == [nn.Linear, nn.ReLU, NMLinear]
    x = torch.randn(3, 10)
    torch.testing.assert_close(made(x), to_dense(model)(x))
