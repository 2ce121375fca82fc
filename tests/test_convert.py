"""convert: what it swaps, what it leaves and says, and how a converted model behaves."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from sparse_cocktail import Cocktail, MaskedBatchNorm2d, MaskedConv2d, MaskedLinear, convert, models
from sparse_cocktail.modules import masked_layers


def conv_norm(inputs, outputs, **arguments):
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, **arguments)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def chain(widths=(8, 12, 6), **arguments):
    """conv-BN-ReLU for each width, then a linear layer; all BatchNorm entries are nontrivial."""
    layers, inputs = [], 3
    for index, width in enumerate(widths):
        layers += conv_norm(inputs, width, stride=1 + index % 2, **arguments)
        inputs = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 5))
    return shake(model).eval()


def shake(model):
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        for tensor, low in zip(tensors, (0.5, -0.2, -0.5, 0.5), strict=True):
            if tensor is not None:
                nn.init.uniform_(tensor, low, low + 1.0)
    return model


def images(count=4):
    return torch.randn(count, 3, 8, 8)


# ---- what is swapped -----------------------------------------------------------------------------


def test_layers_are_swapped_in_place_and_parameters_stay():
    model = chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters, keys, x = list(model.parameters()), list(model.state_dict()), images()
    before = model(x)
    assert convert(model) is model
    assert torch.equal(model(x), before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert list(masked_layers(model)) == model.conversion.masked == ["3", "6", "11"]
    kinds = {type(m) for m in model.modules() if not isinstance(m, nn.Sequential)}
    assert {MaskedConv2d, MaskedLinear, MaskedBatchNorm2d} < kinds
    model[3].set_mask("2:4")
    model(x).square().sum().backward()
    old = model[3].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[3].weight, old), "the optimizer lost its parameters"
    assert torch.equal(model[3].weight[~model[3].mask], old[~model[3].mask])


def test_first_convolution_is_left_and_said_so():
    model = convert(chain())
    assert type(model[0]) is nn.Conv2d
    assert model.conversion.left == {"0": "first convolution"}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_modes_survive(training):
    model = chain().train(training)
    model[4].train(not training)
    convert(model)
    assert [m.training for m in model] == [training] * 4 + [not training] + [training] * 7


@pytest.mark.parametrize("index", [3, 4, 11], ids=["conv", "norm", "linear"])
def test_hooks_survive_and_can_be_removed(index):
    model, calls = chain(), []

    def hook(kind):
        def note(*arguments):
            assert len(arguments) == {"pre": 2, "backward_pre": 2, "kwargs": 4}.get(kind, 3)
            calls.append(kind)

        return note

    layer = model[index]
    handles = [
        layer.register_forward_pre_hook(hook("pre")),
        layer.register_forward_hook(hook("kwargs"), with_kwargs=True),
        layer.register_forward_hook(hook("forward")),
        layer.register_full_backward_pre_hook(hook("backward_pre")),
        layer.register_full_backward_hook(hook("backward")),
    ]
    convert(model)
    model(images()).sum().backward()
    assert calls == ["pre", "kwargs", "forward", "backward_pre", "backward"]
    calls.clear()
    for handle in handles:
        handle.remove()
    model(images()).sum().backward()
    assert calls == [], "a removed hook is still called"


def test_converting_twice_is_harmless():
    model, x = convert(chain()), images()
    model[3].set_mask("2:4")
    before, layers, report = model(x), list(model), copy.deepcopy(model.conversion)
    convert(model)
    assert torch.equal(model(x), before)
    assert all(a is b for a, b in zip(model, layers, strict=True))
    assert model[4].source == "3" and model.conversion.masked == report.masked


def test_channels_last_lays_the_weights_anew_under_the_same_parameter():
    model = chain()
    parameters, x = list(model.parameters()), images()
    before = model(x)
    convert(model, channels_last=True)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for weight in (model[0].weight, model[3].weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), before)


# ---- what is left --------------------------------------------------------------------------------


class Odd(nn.Module):
    """Layers that cannot be masked, one of each kind."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.attention = nn.MultiheadAttention(8, 2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16)
        self.subclass = type("Special", (nn.Linear,), {})(8, 8)
        self.twin = nn.Linear(8, 8)
        self.alias = self.twin
        self.pruned = prune.l1_unstructured(nn.Linear(8, 8), "weight", amount=0.5)
        self.normal = nn.Linear(8, 8)


def test_layers_that_cannot_be_masked_are_left_with_a_reason():
    model = convert(Odd())
    assert model.conversion.masked == ["normal"]
    for name, reason in {
        "head": "tied between embedding, head",
        "attention.out_proj": "MultiheadAttention|subclass",
        "encoder.self_attn.out_proj": "MultiheadAttention|TransformerEncoderLayer|subclass",
        "encoder.linear1": "TransformerEncoderLayer reads its weight",
        "encoder.linear2": "TransformerEncoderLayer reads its weight",
        "subclass": "subclass Special",
        "twin": "tied between twin, alias",
        "pruned": "computed",
    }.items():
        assert name in model.conversion.left, f"{name} was left without a word"
        assert any(r in model.conversion.left[name] for r in reason.split("|")), name
    assert not isinstance(model.twin, MaskedLinear) and model.twin is model.alias
    assert model.head.weight is model.embedding.weight


def test_block_under_two_names_is_left():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8))
    assert convert(model.append(model[0])).conversion.left == {
        "0.0": "weight tied between 0.0, 2.0",
        "2.0": "weight tied between 0.0, 2.0",
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        lambda: nn.MultiheadAttention(8, 2),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
        lambda: nn.Sequential(nn.ReLU()),
        lambda: nn.Sequential(),
    ],
    ids=["root_reads_weight", "root_attention", "first_conv_only", "no_layers", "empty"],
)
def test_nothing_to_convert_is_an_error(make):
    with pytest.raises(ValueError, match="convert: no layer of .* was converted"):
        convert(make())


@pytest.mark.parametrize(
    ("skip", "masked"),
    [
        (["fc"], ["blocks.0.conv1", "blocks.1.conv1"]),
        (["blocks.1", "fc"], ["blocks.0.conv1"]),
        (lambda name, module: isinstance(module, nn.Conv2d), ["fc"]),
        (lambda name, module: name.startswith("blocks.1."), ["blocks.0.conv1", "fc"]),
        ([], ["blocks.0.conv1", "blocks.1.conv1", "fc"]),
    ],
    ids=["name", "prefix", "by_type", "by_name", "nothing"],
)
def test_skip(skip, masked):
    model = convert(models.build("resnet8"), skip=skip)
    found = model.conversion.masked
    assert [n for n in found if n in ("blocks.0.conv1", "blocks.1.conv1", "fc")] == masked
    assert set(found).isdisjoint(model.conversion.left)
    assert len(found) + len(model.conversion.left) == 10


def test_unknown_name_in_skip_is_an_error():
    with pytest.raises(ValueError, match=r"skip names \['block1', 'fx'\].*'blocks.0.conv1'"):
        convert(models.build("resnet8"), skip=["fx", "block1", "fc"])


# ---- pairs of convolution and BatchNorm ----------------------------------------------------------


class Crossed(nn.Module):
    """BatchNorms registered before, and in another order than, the convolutions they follow."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.norm_b, self.norm_a = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm_c = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.norm_a(self.a(self.norm_c(self.first(x))))
        return self.norm_b(self.b(torch.relu(x)))


def sources(model):
    norms = {n: m for n, m in model.named_modules() if isinstance(m, MaskedBatchNorm2d)}
    return {name: norm.source for name, norm in norms.items() if norm.source}


def test_pairs_by_registration():
    model = convert(models.build("resnet8"))
    expected = {f"blocks.{i}.bn{j}": f"blocks.{i}.conv{j}" for i in range(3) for j in (1, 2)}
    expected |= {f"blocks.{i}.downsample.1": f"blocks.{i}.downsample.0" for i in (1, 2)}
    assert sources(model) == expected  # bn1 follows the first convolution, which stays dense
    recorded = convert(models.build("resnet8"), example_input=torch.randn(1, 1, 8, 8))
    assert sources(recorded) == expected


def test_widths_must_agree_in_a_pair():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.PixelShuffle(2))
    assert sources(convert(model.append(nn.BatchNorm2d(2)))) == {}


def test_pairs_by_a_recorded_forward():
    model = Crossed().train()
    statistics = model.norm_c.running_mean.clone()
    convert(model, example_input=images())
    assert sources(model) == {"norm_a": "a", "norm_b": "b"}
    assert model.training and torch.equal(model.norm_c.running_mean, statistics)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_norm_behind_two_convolutions_has_no_single_source():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = self.first(x)
            return self.norm(self.a(x)) + self.norm(self.b(x))

    assert sources(convert(Shared(), example_input=images())) == {}


# ---- a channel subnet is the slimmed network -----------------------------------------------------


def slimmed(model, live):
    """The plain chain without the dead output channels, and without the inputs they fed."""
    model, inputs = copy.deepcopy(model), None
    for name, layer in model.named_children():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weight = layer.weight.data if inputs is None else layer.weight.data[:, inputs]
            outputs = live.get(name, torch.ones(len(weight), dtype=torch.bool))
            layer.weight = nn.Parameter(weight[outputs])
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.data[outputs])
            inputs = outputs
        elif isinstance(layer, nn.BatchNorm2d):
            for attribute in ("weight", "bias", "running_mean", "running_var"):
                if (tensor := getattr(layer, attribute)) is not None:
                    tensor.data = tensor.data[inputs]
            layer.num_features = int(inputs.sum())
    return model


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("tracked", [True, False], ids=["statistics", "no_statistics"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("sparsity", [0.3, 0.75])
def test_channel_subnet_equals_the_slimmed_network(bias, tracked, training, sparsity):
    plain = chain((8, 12, 6, 10), bias=bias)
    if not tracked:
        for norm in (m for m in plain if isinstance(m, nn.BatchNorm2d)):
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
            norm.num_batches_tracked = None
    model = convert(copy.deepcopy(plain), skip=["14"])
    cocktail = Cocktail(model)
    name = cocktail.add(f"channel-{sparsity}").name
    cocktail.activate(name)
    live = dict(zip(cocktail.layers, cocktail.subnets[name].live, strict=True))
    assert all(0 < int(each.sum()) < len(each) for each in live.values())
    small, x = slimmed(plain, live).train(training), images()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in plain.parameters())
    torch.testing.assert_close(model.train(training)(x), small(x), atol=1e-5, rtol=0)


# ---- compiled, checkpointed ----------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_switching_subnets_recompiles_nothing(training):
    torch._dynamo.reset()
    model = convert(chain()).train(training)
    cocktail, x = Cocktail(model), images()
    for pattern in ("2:4", "channel-0.5", "unstructured-0.8", "block-2x2-0.5"):
        cocktail.add(pattern)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    graphs = []
    for name in [*cocktail.subnets, *cocktail.subnets]:
        cocktail.activate(name)
        ours = torch.autograd.grad(compiled(x).square().sum(), tuple(model.parameters()))
        eager = torch.autograd.grad(model(x).square().sum(), tuple(model.parameters()))
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(ours, eager)
        graphs.append(counter.frame_count)
    assert graphs == [1] + [2] * 9, "one graph while dense, one while masked, none after"


def test_compiled_backward_after_a_switch_raises():
    torch._dynamo.reset()
    model = convert(chain())
    cocktail = Cocktail(model)
    names = [cocktail.add(p).name for p in ("2:4", "1:4")]
    cocktail.activate(names[0])
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(images()).sum()
    cocktail.activate(names[1])
    with pytest.raises(RuntimeError, match="in-?place"):
        loss.backward()


def gradients(model, x, checkpointed):
    for parameter in model.parameters():
        parameter.grad = None
    y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
    y.square().sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("pattern", ["2:4", "channel-0.5"])
def test_gradient_checkpointing_changes_nothing(pattern):
    model = convert(chain()).train()
    cocktail, x = Cocktail(model), images()
    cocktail.activate(cocktail.add(pattern).name)
    expected = gradients(model, x, checkpointed=False)
    assert all(map(torch.equal, gradients(model, x, checkpointed=True), expected))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_switch_between_forward_and_backward_raises(checkpointed, training):
    model = convert(chain()).train(training)
    cocktail, x = Cocktail(model), images()
    first, second = (cocktail.add(p).name for p in ("2:4", "channel-0.5"))
    cocktail.activate(first)
    y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
    cocktail.activate(second)
    with pytest.raises(RuntimeError, match="between forward and backward|in-?place"):
        y.sum().backward()


@pytest.mark.parametrize(("first", "second"), [("dense", "2:4"), ("2:4", "dense")])
def test_switch_to_or_from_dense_under_checkpointing_raises(first, second):
    model = convert(chain()).train()
    cocktail = Cocktail(model)
    cocktail.add("2:4")
    cocktail.activate(first)
    y = checkpoint(model, images(), use_reentrant=False)
    cocktail.activate(second)
    with pytest.raises(RuntimeError):
        y.sum().backward()
