"""NMLinear and NMConv2d: what they hold, what they compute, and models made of them."""

import copy
import io
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

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
    ops,
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
    "padded": {"kernel_size": 1, "padding": 1},
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


def test_no_outputs_and_no_rows():
    for route in ROUTES:
        with nm_routes.forced(route):
            assert NMLinear(8, 0, "2:4")(torch.randn(3, 8)).shape == (3, 0)
            assert NMLinear(8, 4, "2:4")(torch.randn(0, 8)).shape == (0, 4)


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
    with pytest.raises(Exception, match=r"NMLinear: call pack\(\) before torch.compile"):
        torch.compile(made, fullgraph=True, backend="aot_eager")(torch.randn(2, 64))
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
    assert list(before) == ["values", "bits", "bias", "nm"]
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


def held(layer):
    form = layer._form
    names = ("values", "packed", "dense")
    return {name for name in names if getattr(form, name) is not None}


def test_pack_holds_what_is_read_and_nothing_else():
    made = NMLinear.from_masked(masked_linear(), "2:4")
    with nm_routes.forced("dense"):
        made(torch.randn(2, 64))
        assert held(made) == {"dense"} and made.values is not None
        made.pack()
        assert held(made) == {"dense"} and made.values is None and "runs dense" in repr(made)
    fresh = NMLinear.from_masked(masked_linear(), "2:4")
    values = weakref.ref(fresh.values)
    with nm_routes.forced("dense"):
        fresh.pack()
    assert values() is None, "the dense form keeps the values"
    assert all(map(torch.equal, fresh.compressed(), made.compressed()))
    with nm_routes.forced("compressed"):
        made.pack((1, 8))
        assert held(made) == {"values"} and made.values is None
    moved = made.double()  # packed again, for as many rows as before
    assert moved.values is None and moved._told == ((1, 8), "eager")
    assert moved.weight.dtype == torch.float64
    assert torch.equal(made.weight, made.to_dense().weight)


def as_packed(layer):
    """As a card with sparse tensor cores holds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nm_routes, "plan", lambda *_: nm_routes.Plan(((2**14, "gemm"),)))
        layer.pack()
    return layer


def packed_layer():
    layer = masked_linear(dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight[:, ::3] = 0  # kept zeros must stay kept
    layer.set_mask("2:4")
    made = NMLinear.from_masked(layer, "2:4")
    before = {k: v.clone() for k, v in made.state_dict().items()}
    return layer, as_packed(made), before


def test_packed_form_gives_its_values_back():
    layer, made, before = packed_layer()
    assert held(made) == {"packed"} and made.values is None
    after = made.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(made.weight, layer.weight * layer.mask)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "moved"])
def test_a_packed_layer_goes_to_a_machine_without_tensor_cores(how):
    layer, made, _ = packed_layer()
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    if how == "deepcopy":
        made = copy.deepcopy(made)
    elif how == "moved":
        made = made.float().bfloat16()
    else:
        file = io.BytesIO()
        torch.save(made, file)
        file.seek(0)
        made = torch.load(file, weights_only=False, map_location="cpu")
    torch.testing.assert_close(made(x), layer(x))
    assert "gemm" not in repr(made) and made.values is None


def test_threads_share_a_fresh_layer():
    made = NMLinear.from_masked(masked_linear(), "2:4")
    x = torch.randn(3, 64)
    expected = copy.deepcopy(made)(x)
    for _ in range(20):
        fresh = copy.deepcopy(made)
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _, layer=fresh: layer(x), range(8)))
        assert all(torch.equal(y, expected) for y in results)


@pytest.mark.parametrize("packed", [False, True], ids=["fresh", "packed"])
def test_functional_call_uses_the_lent_weight_and_gives_it_back(packed):
    ours, theirs = (NMLinear.from_dense(nn.Linear(64, 24), "2:4") for _ in range(2))
    x = torch.randn(3, 64)
    expected = copy.deepcopy(ours)(x), copy.deepcopy(theirs)(x)
    if packed:
        ours.pack()
    lent = torch.func.functional_call(ours, dict(theirs.named_buffers()), x)
    assert torch.equal(lent, expected[1]) and torch.equal(ours(x), expected[0])


@pytest.mark.parametrize("route", ROUTES)
def test_written_values_count(route):
    made, x = NMLinear.from_masked(masked_linear(), "2:4"), torch.randn(3, 64)
    with nm_routes.forced(route):
        before = made(x) - made.bias
        made.values.mul_(2)
        torch.testing.assert_close(made(x) - made.bias, 2 * before)


@pytest.mark.parametrize("route", ROUTES)
def test_written_bits_count(route):
    made, x = NMLinear.from_masked(masked_linear(), "2:4"), torch.randn(3, 64)
    with nm_routes.forced(route):
        before = made(x)
        made.bits.copy_(ops.nm_mask(torch.randn(24, 64), 2, 4))
        assert not torch.equal(made(x), before)
        torch.testing.assert_close(made(x), nn.functional.linear(x, made.weight, made.bias))


def test_a_form_is_no_part_of_a_pickle():
    layer = NMLinear.from_masked(masked_linear(), "2:4")
    size = len(pickle.dumps(layer))
    layer(torch.randn(5, 64))
    assert layer.plan is not None and len(pickle.dumps(layer)) == size


def test_a_weight_lies_as_that_of_the_masked_layer():
    layer = masked_conv(kernel_size=3).to(memory_format=torch.channels_last)
    made = NMConv2d.from_masked(layer, "2:4")
    for conv in (made, made.to_dense()):
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert not conv.weight.is_contiguous()


@pytest.mark.parametrize("route", ROUTES)
def test_first_call_in_inference_mode(route):
    made, x = NMLinear.from_masked(masked_linear(), "2:4"), torch.randn(3, 64)
    with nm_routes.forced(route):
        with torch.inference_mode():
            y = made(x)
        again = made(x.requires_grad_())
    again.sum().backward()
    assert torch.equal(y, again) and x.grad.any()


@pytest.mark.parametrize("strict", [False, True])
def test_exported_program(strict):
    made, x = NMLinear.from_masked(masked_linear(), "2:4"), torch.randn(3, 64)
    made.pack()
    program = torch.export.export(made, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), made(x))


def test_memory_format_follows_the_input():
    for size in (1, 3):
        plain = nn.Conv2d(8, 16, size, padding=size // 2)
        made = NMConv2d.from_dense(plain, "2:4")
        for memory in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 8, 5, 5).to(memory_format=memory)
            for route in ROUTES:
                with nm_routes.forced(route):
                    y = copy.deepcopy(made)(x)
                assert y.stride() == plain(x).stride(), (size, memory, route)
        assert made.to_dense().weight.is_contiguous()


def test_meta_layers():
    made = NMLinear.from_masked(masked_linear(), "2:4").to("meta")
    assert made(torch.randn(3, 64, device="meta")).shape == (3, 24)
    made.pack()
    model = prune_(nn.Sequential(nn.Linear(64, 8, device="meta")), "2:4")
    assert to_compressed(model, "2:4")[0].bits.is_meta


# ---- errors --------------------------------------------------------------------------------------


def test_errors_name_the_rule():
    with pytest.raises(ValueError, match="NMLinear: weight has in=30.*multiple of m=4"):
        NMLinear(30, 8, "2:4")
    with pytest.raises(ValueError, match="NMLinear: pattern='unstructured-0.5000' is not N:M"):
        NMLinear(32, 8, "unstructured-0.5")
    layer = masked_linear("unstructured-0.5")
    with pytest.raises(ValueError, match="NMLinear.from_masked: bits keep [34] of a group of m=4"):
        NMLinear.from_masked(layer, "2:4")
    with pytest.raises(
        ValueError, match="from_dense: layer=MaskedLinear has a mask; use NML.*masked"
    ):
        NMLinear.from_dense(layer, "2:4")
    with pytest.raises(ValueError, match="from_masked: layer=Linear has no mask; use .*from_dense"):
        NMLinear.from_masked(nn.Linear(8, 8), "2:4")
    with pytest.raises(TypeError, match="NMConv2d: layer is a Conv1d, but it must be an nn.Conv2d"):
        NMConv2d.from_dense(nn.Conv1d(8, 8, 1), "2:4")
    with pytest.raises(TypeError, match="NMLinear: dtype=torch.int8 is not one of"):
        NMLinear(8, 8, "2:4", dtype=torch.int8)
    made = NMLinear(8, 8, "2:4")
    with pytest.raises(ValueError, match=r"NMLinear.pack: rows=5 is no pair"):
        made.pack(5)
    with pytest.raises(TypeError, match="NMLinear: x has dtype torch.float16, but the layer has"):
        made(torch.randn(2, 8).half())
    with pytest.raises(ValueError, match="NMLinear: x has 9 inputs, but the layer has 8"):
        made(torch.randn(2, 9))
    with pytest.raises(RuntimeError, match="Expected 3D.*or 4D"):
        NMConv2d.from_dense(nn.Conv2d(8, 8, 1), "2:4")(torch.randn(1, 1, 8, 2, 2))


@pytest.mark.parametrize(("ours", "theirs"), [("2:4", "1:2"), ("4:8", "2:4"), ("1:2", "2:4")])
def test_a_weight_of_another_pattern_is_refused(ours, theirs):
    state = NMLinear.from_dense(nn.Linear(8, 4), theirs).state_dict()
    with pytest.raises(RuntimeError, match=f"nm: the weight is {theirs}, but this layer is {ours}"):
        NMLinear(8, 4, ours).load_state_dict(state)


def test_nothing_to_compress_is_an_error():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with pytest.raises(
        ValueError, match=r"to_compressed: no layer of Sequential has a mask of 2:4"
    ):
        to_compressed(model, "2:4")
    with pytest.raises(ValueError, match=r"to_compressed: layer '0': .*bits keep 2 of a group"):
        to_compressed(prune_(model, "2:4"), "1:4")


def test_a_layer_whose_mask_was_taken_off_is_not_compressed():
    model = prune_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), "2:4")
    model[0].set_mask(None)
    made, x = to_compressed(model, "2:4"), torch.randn(3, 8)
    assert [type(layer) for layer in made] == [nn.Linear, NMLinear]
    assert torch.allclose(made(x), model(x), atol=1e-6)


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
    assert [type(m) for m in to_dense(made)] == [nn.Linear, nn.ReLU, nn.Linear]


def test_writes_are_seen_in_a_layer_made_in_inference_mode():
    with torch.inference_mode():
        layer, x = NMLinear.from_dense(nn.Linear(16, 8), "2:4"), torch.randn(3, 16)
        layer(x)
        layer.values.zero_()
        assert torch.equal(layer(x), layer.bias.expand(3, -1))
