"""prune_: one call prunes a model in place; to_dense bakes the masks in."""

import copy

import pytest
import torch
from torch import nn

from sparse_cocktail import Cocktail, MaskedLinear, convert, models, ops, prune_, to_dense
from sparse_cocktail.modules import masked_layers

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def resnet():
    """A resnet8 whose BatchNorms are nontrivial."""
    model = models.build("resnet8", {"width": 8})
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.uniform_(norm.bias, -0.5, 0.5)
    model.train()(torch.randn(32, 1, 8, 8))
    return model.eval()


def transformer():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.Linear(8, 16), layer, nn.Linear(16, 6)).eval()


@pytest.mark.parametrize("pattern", ["2:4", "unstructured-0.7", "channel-0.5", "block-4x1-0.5"])
def test_computes_as_the_cocktail_does(pattern):
    model = resnet()
    cocktail = Cocktail(convert(copy.deepcopy(model)))
    expected = cocktail.export(cocktail.add(pattern).name, plain=True)(X)
    dense = model(X)
    pruned = prune_(model, pattern)
    with ops.route("layer"):  # by PyTorch's products: the same bits
        assert pruned is model and torch.equal(pruned(X), expected)
    assert not torch.equal(dense, expected)
    assert torch.equal(to_dense(model)(X), expected)


def test_channels_of_the_last_linear_layer_stay_and_norms_are_silent():
    model = prune_(resnet(), "channel-0.5")
    assert model.fc.density == 1.0
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.masked]
    assert norms and all(2 * int(norm.live.sum()) == norm.num_features for norm in norms)


def test_example_input_finds_the_pairs_of_an_unusual_order():
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(1, 8, 3)
            self.bn_b, self.bn_a = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.bn_b(self.b(self.bn_a(self.a(self.stem(x)))))

    model = prune_(Swapped().eval(), "channel-0.5", example_input=X)
    assert model.bn_a.source == "a" and model.bn_b.source == "b"
    assert torch.equal(model.bn_a.live, model.a.live)
    y = model(X)
    assert (y[:, ~model.b.live] == 0).all() and (y[:, model.b.live] != 0).any()


def test_parameters_and_optimizer_stay_and_fine_tuning_keeps_the_mask():
    model = resnet()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    prune_(model, "2:4")
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    zeros = {name: layer.mask for name, layer in masked_layers(model).items() if layer.masked}
    weights = {name: model.get_submodule(name).weight.clone() for name in zeros}
    loss = nn.functional.cross_entropy(model.train()(X), torch.arange(4))
    loss.backward()
    optimizer.step()
    for name, mask in zeros.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight[~mask], weights[name][~mask]), "a pruned weight moved"
        assert not torch.equal(layer.weight[mask], weights[name][mask])
        assert torch.equal(layer.mask, mask)
    assert len(zeros) > 5


@pytest.mark.parametrize("pattern", ["2:4", "channel-0.5"])
def test_state_dict_loads_into_a_pruned_twin(pattern):
    model = prune_(resnet(), pattern)
    state = model.state_dict()
    assert any(key.endswith("mask_bits") for key in state)
    twin = convert(models.build("resnet8", {"width": 8})).eval()
    twin.load_state_dict(state)
    assert torch.equal(twin(X), model(X))


def test_none_takes_the_masks_off_and_another_call_makes_them_anew():
    model = resnet()
    dense, keys = model(X), list(model.state_dict())
    prune_(model, "channel-0.5")
    prune_(model, "2:4")
    again = model(X)
    assert torch.equal(again, prune_(copy.deepcopy(to_plain(model)), "2:4")(X))
    for undo in (None, "dense"):
        prune_(model, "channel-0.5")
        assert torch.equal(prune_(model, undo)(X), dense)
        assert list(model.state_dict()) == keys


def to_plain(model):
    """A dense copy: masks off, then plain layers."""
    return to_dense(prune_(copy.deepcopy(model), None))


def test_gradual_pruning_needs_skip_only_once():
    model = prune_(transformer(), "unstructured-0.5", skip=["2"])
    assert list(model.conversion.masked) == ["0"] and type(model[2]) is nn.Linear
    prune_(model, "unstructured-0.9")
    assert model[0].density == pytest.approx(0.1, abs=0.005)
    with pytest.raises(ValueError, match=r"skip=\['0'\] comes too late.*first call or to convert"):
        prune_(model, "2:4", skip=["0"])
    assert model[0].density == pytest.approx(0.1, abs=0.005), "a refused call changed the masks"


def test_layers_that_cannot_take_the_pattern_stay_dense():
    model = nn.Sequential(nn.Linear(8, 13), nn.ReLU(), nn.Linear(13, 8), nn.Linear(8, 4))
    prune_(model, "2:4")
    assert [m.masked for m in model if isinstance(m, MaskedLinear)] == [True, False, True]
    assert "2.mask_bits" not in model.state_dict()
    prune_(model, "unstructured-0.5")
    assert [m.masked for m in model if isinstance(m, MaskedLinear)] == [True] * 3


def test_a_single_masked_layer_and_a_meta_free_copy():
    layer = prune_(MaskedLinear(16, 8), "2:4")
    assert layer.density == 0.5
    plain = to_dense(layer)
    assert type(plain) is nn.Linear and (plain.weight == 0).sum() == 64
    assert plain.weight.data_ptr() != layer.weight.data_ptr() and layer.masked


def test_transformer_with_attention_is_pruned_around_it():
    model = prune_(transformer(), "2:4")
    x = torch.randn(2, 5, 8)
    assert model(x).shape == (2, 5, 6) and "1.linear1" in model.conversion.left
    plain = to_dense(model)
    with ops.route("layer"):
        assert torch.equal(plain(x), model(x))
    assert all(type(m).__module__.startswith("torch.nn") for m in plain.modules())
    assert not hasattr(plain, "conversion") and hasattr(model, "conversion")


def test_to_dense_of_a_layer_under_two_names():
    shared = nn.Linear(8, 8)
    model = prune_(nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(8, 8)}), "2:4")
    assert model["c"].density == 0.5
    plain = to_dense(model)
    assert type(plain["a"]) is nn.Linear and plain["a"] is plain["b"]
    body = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    body.again = body[2]
    plain = to_dense(prune_(body.eval(), "channel-0.5"))
    assert type(plain.again) is nn.BatchNorm2d and plain.again is plain[2]


@pytest.mark.parametrize(
    ("model", "pattern", "message"),
    [
        (transformer, "2to4", "'2to4' is unknown"),
        (transformer, "unstructured-1.0", r"not in \[0, 1\)"),
        (lambda: nn.Sequential(nn.ReLU()), "2:4", "no layer of Sequential was converted"),
        (lambda: nn.Sequential(nn.Linear(7, 3)), "2:4", r"prune_: no layer of Sequential can take "
         r"the pattern 2:4: \{'0': 'in=7 is not a multiple of 4'\}"),
    ],
    ids=["name", "range", "no_layers", "not_eligible"],
)  # fmt: skip
def test_errors(model, pattern, message):
    model = model()
    with pytest.raises(ValueError, match=message):
        prune_(model, pattern)
    assert not any(getattr(m, "masked", False) for m in model.modules())
    if message.startswith("'2to4'"):
        assert type(model[0]) is nn.Linear, "a refused call converted the model"


def test_skip_names_that_are_not_there():
    with pytest.raises(ValueError, match=r"convert: skip names \['head'\]"):
        prune_(transformer(), "2:4", skip=["head"])
