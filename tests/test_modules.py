"""Masked layers: the manners of their torch.nn parents, and the arithmetic of their masks."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn

from sparse_cocktail import NM, MaskedBatchNorm2d, MaskedConv2d, MaskedLinear, ops

# name -> (masked layer, its plain form, shape of an input); out = 6, in = 40 (two words of bits)
LAYERS = {
    "linear": (lambda: MaskedLinear(40, 6), lambda: nn.Linear(40, 6), (5, 40)),
    "conv": (lambda: MaskedConv2d(40, 6, 3), lambda: nn.Conv2d(40, 6, 3), (2, 40, 5, 5)),
}
each_layer = pytest.mark.parametrize(("make", "plain", "shape"), LAYERS.values(), ids=LAYERS)


def half_mask(layer):
    return torch.rand_like(layer.weight) < 0.5


def masked(make):
    layer = make()
    layer.set_mask(half_mask(layer))
    return layer


def assert_same_layer(a, b, x):
    assert a.masked == b.masked
    assert (a.mask is None) == (b.mask is None)
    assert a.mask is None or torch.equal(a.mask, b.mask)
    assert torch.equal(a(x), b(x))


# ---- torch.nn's manners --------------------------------------------------------------------------


@each_layer
def test_is_its_parent_and_loads_its_checkpoint(make, plain, shape):
    layer, dense, x = make(), plain(), torch.randn(shape)
    assert isinstance(layer, type(dense))
    assert list(layer.state_dict()) == list(dense.state_dict())
    assert layer.load_state_dict(dense.state_dict(), strict=True)
    assert torch.equal(layer(x), dense(x)) and layer.mask is None and layer.density == 1.0
    dense.load_state_dict(layer.state_dict(), strict=True)


@each_layer
def test_mask_is_in_the_state_dict_exactly_while_it_is_set(make, plain, shape):
    layer = masked(make)
    assert list(layer.state_dict()) == ["weight", "bias", "mask_bits"]
    layer.set_mask(None)
    assert list(layer.state_dict()) == ["weight", "bias"]


@each_layer
@pytest.mark.parametrize("nested", [False, True], ids=["root", "child"])
def test_masked_state_dict_sets_the_mask_of_a_dense_layer(make, plain, shape, nested):
    source, target, x = masked(make), make(), torch.randn(shape)
    before = source.state_dict()
    if nested:
        nn.Sequential(target).load_state_dict(nn.Sequential(source).state_dict())
    else:
        target.load_state_dict(before)
    assert_same_layer(source, target, x)
    assert list(before) == ["weight", "bias", "mask_bits"], "the caller's state dict was changed"
    target.set_mask(~source.mask)
    assert torch.equal(before["mask_bits"], source.mask_bits), "the state dict aliases the buffer"
    source.set_mask(~source.mask)
    assert not torch.equal(before["mask_bits"], source.mask_bits), "it aliases the source's"


@each_layer
def test_no_mask_is_lost_silently(make, plain, shape):
    layer, dense = masked(make), plain()
    with pytest.raises(RuntimeError, match=r'Missing key.*"mask_bits"'):
        layer.load_state_dict(dense.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"mask_bits"'):
        dense.load_state_dict(layer.state_dict())
    mask = layer.mask
    layer.load_state_dict(dense.state_dict(), strict=False)
    assert torch.equal(layer.mask, mask) and torch.equal(layer.weight, dense.weight)


@each_layer
def test_wrong_mask_in_a_state_dict_is_named(make, plain, shape):
    state = masked(make).state_dict()
    for wrong in (state["mask_bits"][:-1], state["mask_bits"].to(torch.int64)):
        with pytest.raises(RuntimeError, match=r"0.mask_bits: set_mask: mask has (shape|dtype)"):
            nn.Sequential(make()).load_state_dict(
                {"0." + k: wrong if k == "mask_bits" else v for k, v in state.items()}
            )


@each_layer
def test_state_dict_is_assigned_to_a_layer_on_meta(make, plain, shape):
    source = masked(make)
    with torch.device("meta"):
        target = make()
    target.load_state_dict(source.state_dict(), assign=True)
    assert_same_layer(source, target, torch.randn(shape))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda layer: pickle.loads(pickle.dumps(layer))}


@each_layer
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after_backward"])
@pytest.mark.parametrize("dense", [False, True], ids=["masked", "dense"])
def test_copies(make, plain, shape, copied, used, dense):
    layer, x = masked(make), torch.randn(shape)
    if dense:
        layer.set_mask(None)
    if used:
        layer(x).square().sum().backward()
    twin = copied(layer)
    assert_same_layer(layer, twin, x)
    twin.set_mask(torch.zeros_like(layer.weight, dtype=torch.bool))
    assert layer.masked != dense and layer(x).count_nonzero(), "the copy shares its mask"


@each_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_of_the_module(make, plain, shape, dtype):
    layer = masked(make)
    mask, x = layer.mask, torch.randn(shape)
    expected = layer(x)
    layer = layer.half() if dtype == torch.float16 else layer.to(dtype)
    assert layer.mask_bits.dtype == torch.int32 and torch.equal(layer.mask, mask)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)


@each_layer
def test_functional_call_computes_with_the_given_weight(make, plain, shape):
    layer, other, x = masked(make), plain(), torch.randn(shape)
    y = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
    layer.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(y, layer(x))


# ---- the mask ------------------------------------------------------------------------------------


@each_layer
def test_set_mask_takes_bool_bits_pattern_and_name(make, plain, shape):
    layer = make()
    mask = half_mask(layer)
    for given in (mask, ops.pack_mask(mask)):
        layer.set_mask(given)
        assert torch.equal(layer.mask, mask)
    assert layer.density == int(mask.sum()) / mask.numel()
    for given in ("2:4", NM(2, 4)):
        layer.set_mask(given)
        assert torch.equal(layer.mask_bits, ops.nm_mask(layer.weight.detach(), 2, 4))
    assert layer.density == 0.5
    layer.set_mask("unstructured-0.9")
    assert layer.mask.sum() == round(0.1 * layer.weight.numel())


@each_layer
def test_address_of_the_mask_never_changes(make, plain, shape):
    layer = make()
    address = layer.mask_bits.data_ptr(), layer.live.data_ptr()
    other = masked(make).state_dict()
    for change in (
        lambda: layer.set_mask("2:4"),
        lambda: layer.set_mask(half_mask(layer)),
        lambda: layer.set_mask(None),
        lambda: layer.load_state_dict(other),
        lambda: layer.to(torch.bfloat16),
    ):
        change()
        assert (layer.mask_bits.data_ptr(), layer.live.data_ptr()) == address


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(6, 41, dtype=torch.bool), ValueError, r"shape \(6, 41\).*\(6, 40\)"),
        (torch.ones(6, 40), TypeError, "float32.*pack_mask"),
        (torch.ones(6, 1, 1, dtype=torch.int32), ValueError, r"\(6, 1, 2\)"),
        ("1:3", ValueError, "in=40 is not a multiple of 3"),
        ("block-4x4-0.5", ValueError, "out=6 is not a multiple of 4"),
        ("sparse", ValueError, "'sparse' is unknown"),
    ],
    ids=["shape", "dtype", "bits", "1:3", "block", "name"],
)
def test_set_mask_refuses(mask, error, message):
    layer = masked(LAYERS["linear"][0])
    before = layer.mask
    with pytest.raises(error, match=message):
        layer.set_mask(mask)
    assert torch.equal(layer.mask, before), "a refused mask changed the layer"


def test_bits_beyond_the_last_input_are_refused_or_dropped():
    layer = MaskedLinear(33, 2)
    with contextlib.suppress(ValueError):
        layer.set_mask(torch.full_like(layer.mask_bits, -1))
    assert layer.density == 1.0


@each_layer
def test_repr_tells_the_density(make, plain, shape):
    layer = make()
    assert "density" not in repr(layer) and layer.extra_repr() == plain().extra_repr()
    layer.set_mask("1:4")
    assert layer.extra_repr() == plain().extra_repr() + ", density=0.2500"


# ---- arithmetic ----------------------------------------------------------------------------------

CONVOLUTIONS = {
    "plain": {},
    "no_bias": {"bias": False},
    "stride": {"stride": 2, "padding": 1},
    "pairs": {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    "groups": {"groups": 2},
    "depthwise": {"groups": 6},
    "valid": {"padding": "valid"},
    "same": {"padding": "same"},
    "same_dilated": {"padding": "same", "dilation": 2},
    "same_even": {"padding": "same", "kernel_size": 4},
    "same_uneven": {"padding": "same", "kernel_size": (2, 5), "dilation": (3, 1)},
    "reflect": {"padding": (1, 2), "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "circular_same_even": {"padding": "same", "kernel_size": 2, "padding_mode": "circular"},
}


@pytest.mark.parametrize("batch", [(2,), ()], ids=["batched", "single"])
@pytest.mark.parametrize("arguments", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_conv_is_the_plain_one_on_the_masked_weight(arguments, batch):
    arguments = {"kernel_size": 3, **arguments}
    layer = MaskedConv2d(6, 12, **arguments, dtype=torch.float64)
    plain = nn.Conv2d(6, 12, **arguments, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    layer.set_mask(half_mask(layer).index_fill(0, torch.arange(4), True))  # every channel is live
    plain.weight.data *= layer.mask
    x = torch.randn(*batch, 6, 9, 8, dtype=torch.float64).requires_grad_()
    y, expected = layer(x), plain(x)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    ours = torch.autograd.grad(y.square().sum(), (x, layer.weight))
    theirs = torch.autograd.grad(expected.square().sum(), (x, plain.weight))
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(ours[1], theirs[1] * layer.mask, atol=1e-10, rtol=0)


@each_layer
def test_pruned_weights_get_gradient_only_on_request(make, plain, shape):
    layer, x = masked(make), torch.randn(shape)
    layer(x).square().sum().backward()
    assert not layer.weight.grad[~layer.mask].any() and layer.weight.grad[layer.mask].all()
    kept = layer.weight.grad.clone()
    layer.zero_grad()
    layer.dense_grad = True
    layer(x).square().sum().backward()
    assert layer.weight.grad.all(), "the straight-through gradient is dense"
    torch.testing.assert_close(layer.weight.grad * layer.mask, kept)


@each_layer
def test_wholly_pruned_output_is_exactly_zero(make, plain, shape):
    layer = make()
    mask = torch.ones_like(layer.weight, dtype=torch.bool)
    mask[[1, 4]] = False
    layer.set_mask(mask)
    y = layer(torch.randn(shape)).transpose(0, 1)
    assert layer.bias.all() and not y[[1, 4]].any() and y[[0, 2, 3, 5]].all()
    y.square().sum().backward()
    assert not layer.bias.grad[[1, 4]].any() and layer.bias.grad[[0, 2, 3, 5]].all()


@each_layer
def test_from_dense_shares_parameters(make, plain, shape):
    dense = plain().to(torch.float64).eval()
    layer = type(make()).from_dense(dense)
    assert layer.weight is dense.weight and layer.bias is dense.bias and not layer.training
    assert layer.extra_repr() == dense.extra_repr()
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(layer(x), dense(x))
    layer.set_mask("2:4")
    assert layer(x).dtype == torch.float64


@each_layer
def test_to_dense_bakes_the_mask_in(make, plain, shape):
    layer, x = masked(make).eval(), torch.randn(shape)
    layer.set_mask(layer.mask.index_fill(0, torch.tensor([2]), False))
    dense = layer.to_dense()
    assert type(dense) is type(plain()) and not dense.training
    torch.testing.assert_close(dense(x), layer(x))  # of which only the live rows were computed
    assert dense.bias[2] == 0
    assert torch.equal(dense.weight, layer.weight * layer.mask)
    with torch.no_grad():
        dense.weight.fill_(9), dense.bias.fill_(9)
    assert not (layer.weight == 9).any() and not (layer.bias == 9).any()


# ---- batch norm ----------------------------------------------------------------------------------

NORMS = {
    "default": {},
    "cumulative": {"momentum": None},
    "fast": {"momentum": 0.7, "eps": 0.1},
    "no_affine": {"affine": False},
    "no_statistics": {"track_running_stats": False},
    "nothing": {"affine": False, "track_running_stats": False},
}
each_norm = pytest.mark.parametrize("arguments", NORMS.values(), ids=NORMS)


def norm_pair(arguments):
    """A masked and a plain BatchNorm with the same scale and shift, away from 1 and 0."""
    plain = nn.BatchNorm2d(4, **arguments)
    for parameter in plain.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    layer = MaskedBatchNorm2d(4, **arguments)
    layer.load_state_dict(plain.state_dict(), strict=True)
    return layer, plain


@each_norm
@pytest.mark.parametrize("path", ["dense", "all_live", "statistics_off"])
def test_live_norm_is_the_plain_one(arguments, path):
    layer, plain = norm_pair(arguments)
    assert isinstance(layer, nn.BatchNorm2d) and list(layer.state_dict()) == list(
        plain.state_dict()
    )
    layer.set_live(None if path == "dense" else torch.ones(4, dtype=torch.bool))
    for training in (True, True, True, False):
        layer.track_running_stats = plain.track_running_stats and path != "statistics_off"
        plain.track_running_stats = layer.track_running_stats
        layer.train(training), plain.train(training)
        x = torch.randn(3, 4, 5, 5) * 3 + 2
        assert torch.equal(layer(x), plain(x))
        for name, value in plain.state_dict().items():
            assert torch.equal(layer.state_dict()[name], value), name


@each_norm
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_silenced_channels_are_exactly_zero(arguments, training):
    layer, plain = norm_pair(arguments)
    live = torch.tensor([True, False, True, False])
    layer.set_live(live)
    layer.train(training), plain.train(training)
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    x = torch.randn(3, 4, 5, 5) + 1
    y = layer(x)
    assert not y[:, ~live].any() and torch.equal(y[:, live], plain(x)[:, live])
    for name, buffer in plain.named_buffers():
        assert torch.equal(getattr(layer, name), buffer), name
    y.square().sum().backward() if before else None
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]), "a shared parameter was changed"
        assert not parameter.grad[~live].any() and parameter.grad[live].all()


@pytest.mark.parametrize("how", ["written", "copied", "moved", "activated"])
def test_norm_without_silent_channels_sees_the_next_mask(how):
    """Where no channel is silent it computes as its parent, and must notice when that ends."""
    layer, _ = norm_pair({})
    live, x = torch.tensor([True, False, True, False]), torch.randn(3, 4, 5, 5)
    layer.set_live(torch.ones(4, dtype=torch.bool))
    assert layer(x)[:, 1].any()
    if how == "copied":
        layer = copy.deepcopy(layer)
    if how == "moved":
        layer = layer.double().float()
    if how == "activated":
        layer.set_whole(True)
    layer.live.copy_(live)
    assert not layer(x)[:, ~live].any()


@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_from_and_to_dense(arguments, dtype):
    plain = norm_pair(arguments)[1].to(dtype).eval()
    layer = MaskedBatchNorm2d.from_dense(plain)
    state = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    for name, tensor in state.items():
        assert getattr(layer, name) is tensor, f"{name} is not shared"
    x = torch.randn(3, 4, 5, 5, dtype=dtype)
    for live in (None, torch.tensor([True, False, True, True]), None):
        layer.set_live(live)
        dense = layer.to_dense()
        for name, tensor in state.items():
            assert getattr(dense, name) is not tensor, f"{name} is shared with the copy"
        assert type(dense) is nn.BatchNorm2d and not dense.training
        if not state:  # a layer without any tensor has no dtype to keep
            dense.to(dtype)
        assert all(p.dtype == dtype for p in dense.parameters())
        torch.testing.assert_close(dense(x), layer(x))
        assert live is None or not dense(x)[:, 1].any()


def test_no_silent_channels_are_lost_silently():
    layer, plain = norm_pair({})
    live = torch.tensor([True, False, True, True])
    layer.set_live(live)
    with pytest.raises(RuntimeError, match=r'Missing key.*"live"'):
        layer.load_state_dict(plain.state_dict())
    state = layer.state_dict()
    layer.set_live(~live)
    assert torch.equal(state["live"], live), "the state dict aliases the buffer"
    layer.load_state_dict(state)
    assert torch.equal(layer.live, live)


def test_norm_copies():
    layer = norm_pair({})[0]
    layer.set_live(torch.tensor([True, False, True, True]))
    layer.source = "conv"
    x = torch.randn(3, 4, 5, 5)
    for copied in COPIES.values():
        twin = copied(layer)
        assert twin.source == "conv" and torch.equal(twin.eval()(x), layer.eval()(x))


def test_masked_layers_on_the_meta_device_know_their_shapes():
    with torch.device("meta"):
        layer, conv = MaskedLinear(16, 8), MaskedConv2d(16, 8, 3)
        layer.masked = conv.masked = True
        assert layer(torch.randn(3, 16)).shape == (3, 8)
        assert conv(torch.randn(3, 16, 5, 5)).shape == (3, 8, 3, 3)
