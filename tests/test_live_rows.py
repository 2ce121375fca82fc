"""Layers of which whole outputs are pruned compute only the others, with the same results."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from sparse_cocktail import Cocktail, MaskedConv2d, MaskedLinear, convert, models, modules, ops

OUT = 12
LAST = torch.channels_last
LAYERS = {
    "linear": (ops.masked_linear, (5, 33), (OUT, 33), {}),
    "linear_3d": (ops.masked_linear, (2, 3, 33), (OUT, 33), {}),
    "linear_vector": (ops.masked_linear, (33,), (OUT, 33), {}),
    "conv": (ops.masked_conv2d, (2, 5, 8, 7), (OUT, 5, 3, 3), {"padding": 1, "stride": 2}),
    "conv_1x1": (ops.masked_conv2d, (2, 33, 4, 4), (OUT, 33, 1, 1), {}),
    "grouped": (ops.masked_conv2d, (2, 6, 5, 5), (OUT, 3, 3, 3), {"groups": 2}),
}
each_layer = pytest.mark.parametrize(("layer", "x", "weight", "how"), LAYERS.values(), ids=LAYERS)
each_backend = pytest.mark.parametrize("backend", ops.implementations("masked_conv2d"))


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch):
    monkeypatch.setattr(modules, "FEW_PRODUCTS", {})


def bits_with(live, shape, device):
    mask = torch.rand(shape, device=device) < 0.5
    mask[live, 0] = True
    pruned = [i for i in range(shape[0]) if i not in live]
    mask[pruned] = False
    return ops.pack_mask(mask)


def results(layer, x, weight, bits, bias, how):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = layer(leaves[0], leaves[1], bits, leaves[2] if bias is not None else None, **how)
    seen = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    return y, *torch.autograd.grad(y, leaves, seen)


@each_layer
@each_backend
@pytest.mark.parametrize("live", [[1, 4, 5], [], [0], list(range(OUT))], ids=str)
@pytest.mark.parametrize("kind", ["plain", "no_bias", "channels_last", "dense_grad", "bf16"])
def test_rows_change_nothing_but_the_work(layer, x, weight, how, backend, device, live, kind):
    x, weight = torch.randn(x, device=device), torch.randn(weight, device=device)
    bias = None if kind == "no_bias" else torch.randn(OUT, device=device)
    bits = bits_with(live, weight.shape, device)
    if kind == "channels_last" and x.dim() == 4:
        x, weight = x.to(memory_format=LAST), weight.to(memory_format=LAST)
    if kind == "bf16":
        x = x.bfloat16()
    how = {**how, "dense_grad": kind == "dense_grad"}
    rows = ops.live_rows(bits)
    assert rows.tolist() == live
    with ops.backend(backend):
        whole = results(layer, x, weight, bits, bias, how)
        part = results(layer, x, weight, bits, bias, {**how, "rows": rows})
    for mine, theirs in zip(part, whole, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.stride() == theirs.stride()


def test_pruned_rows_are_not_read():
    """Their weights may hold anything, and their gradient is zero."""
    x, weight = torch.randn(4, 33), torch.randn(OUT, 33)
    bits = bits_with([2, 3], weight.shape, "cpu")
    weight[5] = torch.nan
    y, _, grad, _ = results(
        ops.masked_linear, x, weight, bits, torch.ones(OUT), {"rows": ops.live_rows(bits)}
    )
    assert torch.equal(y[:, 5], torch.ones(4)) and not grad[5].any() and grad[2].any()


def test_second_order():
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (4, 5)))
    bits = bits_with([0, 2], (4, 5), "cpu")
    rows = ops.live_rows(bits)

    def linear(x, weight):
        return ops.masked_linear(x, weight, bits, rows=rows)

    assert torch.autograd.gradcheck(linear, (x, weight))
    assert torch.autograd.gradgradcheck(linear, (x, weight))


@pytest.mark.parametrize(
    "rows",
    [torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([1], dtype=torch.int32)],
    ids=["float", "matrix", "int32"],
)
def test_wrong_rows(rows):
    bits = bits_with([1], (OUT, 33), "cpu")
    with pytest.raises(ValueError, match=r"masked_linear: rows has dtype .*ops\.live_rows"):
        ops.masked_linear(torch.randn(2, 33), torch.randn(OUT, 33), bits, rows=rows)


# ---- modules -------------------------------------------------------------------------------------


def narrow_linear():
    layer = MaskedLinear(33, OUT)
    layer.set_mask("channel-0.5")
    return layer


def test_a_layer_computes_its_live_rows():
    layer, x = narrow_linear(), torch.randn(4, 33)
    assert layer.rows.tolist() == layer.live.nonzero().flatten().tolist() and len(layer.rows) == 6
    expected = F.linear(x, layer.weight * layer.mask, layer.bias * layer.live)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        layer.weight[~layer.live] = torch.nan
    torch.testing.assert_close(layer(x), expected)
    torch.nn.init.ones_(layer.weight)
    layer.set_mask("unstructured-0.05")
    assert layer.rows is None
    layer.set_mask("channel-0.5")
    layer.set_mask(None)
    assert layer.rows is None


def test_a_mask_written_by_another_hand_is_seen():
    layer, x = narrow_linear(), torch.randn(4, 33)
    mask = torch.zeros(OUT, 33, dtype=torch.bool)
    mask[:3] = True
    layer.mask_bits.copy_(ops.pack_mask(mask))
    layer.live.copy_(mask.any(1))
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight * mask, layer.bias * layer.live))
    assert layer.rows.tolist() == [0, 1, 2]
    layer.mask_bits.fill_(-1).bitwise_and_(ops.pack_mask(torch.ones(OUT, 33, dtype=torch.bool)))
    layer.live.fill_(True)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def through_a_file(layer):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = MaskedLinear(33, OUT)
    other.load_state_dict(torch.load(file))
    return other


def test_small_layers_compute_all_rows(monkeypatch):
    monkeypatch.setattr(modules, "FEW_PRODUCTS", {"cpu": 4 * 33 * OUT})
    layer = narrow_linear()
    assert layer._live_rows(torch.randn(3, 33)) is None
    assert layer._live_rows(torch.randn(4, 33)) is layer.rows


def test_moved_and_copied_layers_look_again():
    """A copy's mask may be written as often as the original's was: counts alone would not tell."""
    mask = ops.pack_mask(torch.ones(OUT, 33, dtype=torch.bool))
    for moved in (copy.deepcopy, lambda m: m.double().float(), lambda m: m):
        layer = moved(narrow_linear())
        layer.mask_bits.copy_(mask), layer.live.fill_(True)
        x = torch.randn(4, 33)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, through_a_file, lambda m: copy.deepcopy(m).double().float()]
)
def test_rows_go_with_the_layer(copied):
    layer, x = narrow_linear(), torch.randn(4, 33)
    other = copied(layer)
    assert torch.equal(other(x), layer(x)) and torch.equal(other.rows, layer.rows)


def test_graphs_compute_all_rows():
    """A compiled graph holds for every mask, so it does not know the rows of one."""
    layer, x = narrow_linear(), torch.randn(4, 33)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    layer.set_mask(torch.ones(OUT, 33, dtype=torch.bool))
    torch.testing.assert_close(compiled(x), F.linear(x, layer.weight, layer.bias))


def test_subnets_bring_their_rows():
    cocktail = Cocktail(convert(models.build("resnet8")))
    cocktail.add("channel-0.5"), cocktail.add("unstructured-0.5")
    layers = cocktail.layers.values()
    cocktail.activate("channel-0.5")
    assert sum(layer.rows is not None for layer in layers) >= len(layers) - 1  # not the last one
    for layer in layers:
        if layer.rows is not None:
            assert torch.equal(layer.rows, ops.live_rows(layer.mask_bits))
    cocktail.activate("unstructured-0.5")
    assert all(layer.rows is None or len(layer.rows) < len(layer.live) for layer in layers)
    cocktail.activate("dense")
    cocktail.activate("channel-0.5")
    x, model = torch.randn(2, 1, 8, 8), cocktail.model.eval()
    narrow = model(x)
    for layer in layers:
        layer.set_rows(None)
    torch.testing.assert_close(model(x), narrow)


def test_conv_with_groups_computes_all_rows():
    layer, x = MaskedConv2d(6, OUT, 3, groups=2), torch.randn(2, 6, 5, 5)
    layer.set_mask("channel-0.5")
    weight = layer.weight * layer.mask
    expected = F.conv2d(x, weight, layer.bias * layer.live, groups=2)
    torch.testing.assert_close(layer(x), expected)
