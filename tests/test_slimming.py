"""Slim networks: zero channels cut out, the same outputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_cocktail import Cocktail, convert, load_slim, models, prune_, to_dense, to_slim
from sparse_cocktail.schedules import keep_count

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def trained(model):
    """With BatchNorm as a training leaves it: nothing is 0 or 1."""
    draws = torch.Generator().manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor in (norm.running_mean, norm.bias.data):
            tensor.copy_(torch.randn(tensor.shape, generator=draws))
        for tensor in (norm.running_var, norm.weight.data):
            tensor.copy_(torch.rand(tensor.shape, generator=draws) + 0.5)
    return model.eval()


def pruned(layer, *channels):
    """These output channels are zero, their bias too."""
    with torch.no_grad():
        for tensor in layer.parameters():
            tensor[list(channels)] = 0.0
    return layer


def shapes(model):
    return {n: tuple(p.shape) for n, p in model.named_parameters() if n.endswith("weight")}


def check_equal(one, other, *inputs):
    """In float64, where other orders of summation hardly round."""
    with torch.no_grad():
        expected, found = (
            copy.deepcopy(m).double()(*(x.double() for x in inputs)) for m in (one, other)
        )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("pattern", ["channel-0.5", "channel-0.9"])
@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet50", "vgg16"])
def test_a_channel_subnet_is_smaller_and_the_same(name, pattern):
    args = {"inputs": 3} | ({"large_images": False} if name == "resnet50" else {})
    cocktail = Cocktail(convert(trained(models.build(name, {"width": 8, **args}))))
    cocktail.add(pattern)
    x = X.repeat(1, 1, 2, 2)
    slim, whole = cocktail.export(pattern, example_input=x), cocktail.export(pattern)
    assert not slim.training
    check_equal(whole, slim, x)
    assert sum(p.numel() for p in slim.parameters()) < 0.75 * sum(
        p.numel() for p in whole.parameters()
    )


def test_inner_layers_of_a_block_lose_all_pruned_channels():
    model = prune_(trained(models.build("resnet50", {"width": 8})), "channel-0.5")
    slim = shapes(to_slim(model, torch.randn(1, 3, 64, 64)))
    kept = keep_count(0.5, 16)
    assert slim["blocks.3.conv2.weight"] == (kept, kept, 3, 3)
    assert slim["blocks.3.bn2.weight"] == (kept,)
    assert slim["blocks.3.conv3.weight"][1] == kept
    assert slim["fc.weight"][0] == 1000, "classes stay"


def test_added_tensors_keep_what_any_of_them_needs():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = pruned(nn.Conv2d(3, 6, 1), 0, 1, 2)
            self.b = pruned(nn.Conv2d(3, 6, 1), 0, 1, 5)
            self.last = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            y = self.a(x)
            y += self.b(x)
            return self.last(F.relu(y * 0.5).neg())

    slim = to_slim(Sum(), X)
    assert shapes(slim) == {
        "a.weight": (4, 3, 1, 1),
        "b.weight": (4, 3, 1, 1),
        "last.weight": (2, 4, 1, 1),
    }


class Wired(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between, inputs=6):
        super().__init__()
        self.first = pruned(nn.Conv2d(3, 6, 3, padding=1), 1, 4)
        self.between = between
        self.last = nn.Conv2d(inputs, 2, 1)

    def forward(self, x):
        return self.last(self.between(self.first(x)))


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def silent_norm():
    norm = trained(nn.BatchNorm2d(6))
    pruned(norm, 1, 4)
    return norm


def dead_depthwise():
    layer = nn.Conv2d(6, 6, 3, groups=6)
    with torch.no_grad():
        layer.bias[[1, 4]] = 0.0  # the weights may be anything: their inputs are zero
    return layer


@pytest.mark.parametrize(
    "between",
    [
        nn.Identity(),
        nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.AdaptiveAvgPool2d(3)),
        nn.Sequential(nn.GELU(), nn.Hardtanh(), nn.SiLU(), nn.Hardswish(), nn.ReLU6()),
        Call(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear").contiguous()),
        Call(lambda x: (x / 3 * torch.tensor(2.0)).mean((2, 3), keepdim=True)),
        Call(lambda x: x * torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(2))),
    ],
    ids=["nothing", "pools", "activations", "interpolate", "scaled", "by position"],
)
def test_zeros_pass_what_keeps_them(between):
    model = Wired(between).eval()
    slim = to_slim(model, X)
    assert slim.first.weight.shape[0] == 4 and slim.last.weight.shape[1] == 4
    check_equal(model, slim, X)


@pytest.mark.parametrize("make", [silent_norm, dead_depthwise])
def test_layers_of_single_channels_shrink_too(make):
    model = Wired(make()).eval()
    slim = to_slim(model, X)
    assert len(slim.between.weight) == slim.last.in_channels == slim.last.weight.shape[1] == 4
    check_equal(model, slim, X)


def unlike():
    class Unlike(nn.BatchNorm2d):
        pass

    return Unlike(6)


def written(x):
    """Channels that are zero in x are not in the result."""
    x[:, 1] = 3.0
    return x


@pytest.mark.parametrize(
    "between",
    [
        trained(nn.BatchNorm2d(6)),  # adds its shift
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.GroupNorm(2, 6),
        nn.Sigmoid(),
        nn.Conv2d(6, 6, 1, groups=2),
        nn.PixelShuffle(1),
        nn.Linear(16, 16),  # along the width
        nn.utils.spectral_norm(nn.Conv2d(6, 6, 1)),  # makes its weight in a hook
        unlike(),
        Call(lambda x: x + 1),
        Call(lambda x: x + torch.ones(6, 1, 1)),
        Call(lambda x: x * torch.ones(6, 1, 1)),
        Call(lambda x: x.transpose(1, 2).transpose(1, 2)),
        Call(lambda x: x.view(-1, 6, 256)[..., None]),
        Call(written),
        Call(lambda x: x * float(len(x.tolist()[0]))),
        Call(lambda x: x.max(1, keepdim=True).values.expand(-1, 6, -1, -1)),
    ],
    ids=lambda b: type(b).__name__,
)
def test_channels_stay_before_what_may_need_them(between):
    model = Wired(between).eval()
    slim = to_slim(model, X)
    assert slim.first.weight.shape[0] == 6 and slim.last.weight.shape[1] == 6
    check_equal(model, slim, X)


@pytest.mark.parametrize(
    "between",
    [lambda x: x * float("inf"), lambda x: x / 0, lambda x: x / x],
    ids=["times infinity", "by zero", "by itself"],
)
def test_channels_stay_before_what_makes_zeros_nan(between):
    slim = to_slim(Wired(Call(between)).eval(), X)
    assert slim.first.weight.shape[0] == 6 and slim.last.weight.shape[1] == 6


def test_concatenated_and_flattened_channels():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = pruned(nn.Conv2d(3, 4, 1), 0)
            self.b = pruned(nn.Conv2d(3, 5, 1), 2, 3)
            self.norm = trained(nn.BatchNorm2d(9))
            pruned(self.norm, 0, 6, 7)
            self.fc = nn.Linear(9 * 4, 7)

        def forward(self, x):
            y = self.norm(torch.cat([self.a(x), self.b(x)], 1))
            return self.fc(F.adaptive_avg_pool2d(y, 2).flatten(1))

    model = Joined().eval()
    slim = to_slim(model, X)
    assert shapes(slim) == {
        "a.weight": (3, 3, 1, 1),
        "b.weight": (3, 3, 1, 1),
        "norm.weight": (6,),
        "fc.weight": (7, 6 * 4),
    }
    check_equal(model, slim, X)


def test_hidden_units_of_linear_layers():
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.fc1 = pruned(nn.Linear(8, 32), *range(0, 20))
            self.fc2 = pruned(nn.Linear(32, 8), 3)

        def forward(self, x):
            return x + self.fc2(F.gelu(self.fc1(self.norm(x))))

    model, x = MLP().eval(), torch.randn(2, 5, 8)
    slim = to_slim(model, x)
    assert slim.fc1.out_features == slim.fc2.in_features == 12 and slim.fc2.out_features == 8
    check_equal(model, slim, x)


def test_a_layer_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 1)
            self.inner = pruned(nn.Conv2d(6, 6, 1), 0, 5)
            self.norm = trained(nn.BatchNorm2d(6))
            pruned(self.norm, 0, 5)
            self.last = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            x = self.norm(self.inner(self.stem(x)))
            return self.last(self.norm(self.inner(x)))

    model = Twice().eval()
    slim = to_slim(model, X)
    assert slim.inner.weight.shape == (6, 6, 1, 1), "its first inputs need all"
    check_equal(model, slim, X)
    pruned(model.stem, 0, 5)
    slim = to_slim(model, X)
    assert slim.inner.weight.shape == (4, 4, 1, 1)
    check_equal(model, slim, X)


def test_weights_that_several_read_stay():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = pruned(nn.Linear(4, 6, bias=False), 1, 2)
            self.last = nn.Linear(6, 3)

        def forward(self, x):
            y = self.first(x)
            return self.last(y) + F.linear(y, self.first.weight.t()).sum(-1, keepdim=True)

    slim = to_slim(Tied(), torch.randn(2, 4))
    assert slim.first.weight.shape == (6, 4) and slim.last.weight.shape == (3, 6)
    model = nn.Sequential(pruned(nn.Linear(4, 4), 1), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert to_slim(model, torch.randn(2, 4))[0].weight.shape == (4, 4)


@pytest.mark.parametrize("first", [False, True], ids=["after the layer", "before the layer"])
def test_inputs_of_a_weight_that_is_used_besides_stay(first):
    class Besides(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = pruned(nn.Linear(4, 6), 1, 2)
            self.last = nn.Linear(6, 3)

        def forward(self, x):
            if first:
                return self.last.weight.sum(1) + self.last(self.hidden(x).relu())
            return self.last(self.hidden(x).relu()) + self.last.weight.sum(1)

    model, x = Besides().eval(), torch.randn(2, 4)
    slim = to_slim(model, x)
    assert slim.hidden.weight.shape == (6, 4) and slim.last.weight.shape == (3, 6)
    check_equal(model, slim, x)


def test_one_channel_stays_of_none():
    model = nn.Sequential(
        pruned(nn.Conv2d(3, 4, 1), *range(4)), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=True)
    )
    slim = to_slim(model, X)
    assert slim[0].weight.shape == (1, 3, 1, 1)
    check_equal(model, slim, X)


def test_outputs_are_whole_wherever_they_are():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = pruned(nn.Conv2d(3, 4, 1), 0)
            self.b = pruned(nn.Conv2d(4, 4, 1), 0)
            self.c = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            features = self.a(x)
            y = self.b(features)
            return {"features": [features], "logits": self.c(y)}

    slim = to_slim(Several(), X)
    assert slim.a.out_channels == 4 and slim.b.weight.shape == (3, 4, 1, 1)


def test_memory_format_and_originals_stay():
    model = nn.Sequential(pruned(nn.Conv2d(3, 8, 3), 0, 1), nn.ReLU(), nn.Conv2d(8, 2, 3))
    model.to(memory_format=torch.channels_last)
    model[2].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    slim = to_slim(model.train(), X)
    assert slim[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert slim[0].weight.requires_grad and not slim[2].weight.requires_grad
    assert model.training and not model[0]._forward_hooks and not slim[0]._forward_hooks
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_forward_that_counts_on_the_number_of_channels_is_refused():
    def six(x):
        if x.shape[1] != 6:
            raise RuntimeError("expected 6 channels")
        return x.relu()

    with pytest.raises(ValueError, match="does not run without its zero channels .expected 6"):
        to_slim(Wired(Call(six)), X)
    counting = Call(lambda x: x.mul(x.shape[1]))
    with pytest.raises(ValueError, match="computes something else without its zero channels"):
        to_slim(Wired(counting), X)


@pytest.mark.parametrize("name", ["resnet8", "vgg16"])
def test_a_slim_state_dict_is_loaded_again(name):
    make = lambda: models.build(name, {"width": 8, "inputs": 3})  # noqa: E731
    x = X.repeat(1, 1, 2, 2)
    slim = to_slim(prune_(trained(make()), "channel-0.5"), x)
    assert shapes(slim) != shapes(make())
    again = load_slim(make(), slim.state_dict()).eval()
    assert shapes(again) == shapes(slim)
    assert torch.equal(again(x), slim(x))


def test_a_depthwise_slim_layer_is_loaded_again():
    model = Wired(dead_depthwise()).eval()
    slim = to_slim(model, X)
    again = load_slim(Wired(dead_depthwise()), slim.state_dict()).eval()
    assert again.between.groups == 4 and torch.equal(again(X), slim(X))


def test_foreign_state_dicts_are_refused():
    slim = to_slim(prune_(trained(models.build("resnet8", {"inputs": 3})), "channel-0.5"), X)
    with pytest.raises(ValueError, match="load_slim: .*cannot be cut from"):
        load_slim(models.build("resnet8", {"inputs": 1}), slim.state_dict())
    with pytest.raises(ValueError, match="load_slim: the state dict does not fit ResNet"):
        load_slim(models.build("resnet18", {"inputs": 3}), slim.state_dict())


def test_compressed_layers_are_not_cut():
    cocktail = Cocktail(convert(models.build("resnet8", {"inputs": 3})))
    cocktail.add("2:4")
    with pytest.raises(ValueError, match="2:4 with example_input, but compressed layers"):
        cocktail.export("2:4", example_input=X)
    whole = to_dense(cocktail.export("2:4", plain=True, example_input=X))
    assert shapes(whole) == shapes(models.build("resnet8", {"inputs": 3}))


def test_a_slim_copy_is_in_eval_mode_and_of_no_factory():
    model = prune_(models.build("resnet8", {"width": 4}), "channel-0.5").train()
    slim = to_slim(model, torch.randn(2, 1, 8, 8))
    assert not any(module.training for module in slim.modules())
    assert all(module.training for module in model.modules())
    assert hasattr(model, "factory") and not hasattr(slim, "factory")
