"""The engine's parts that other methods stand on: given weights, separate networks, menus."""

from functools import partial
from math import inf, nan
from types import SimpleNamespace

import pytest
import torch
from test_engine import MODEL, one_subnet, same, toy, trained, weights  # noqa: F401

from sparse_cocktail import Cocktail, MaskedConv2d, MaskedLinear
from sparse_cocktail.config import for_method, split_fields
from sparse_cocktail.engine import train
from sparse_cocktail.files import read_tensors
from sparse_cocktail.methods import METHODS, Pass
from sparse_cocktail.methods.base import check_choices, check_range
from sparse_cocktail.methods.menu import MenuOptions, ladder
from sparse_cocktail.methods.separate import Separate
from sparse_cocktail.methods.updates import reset_momentum, zero_pruned
from sparse_cocktail.premask import given_weights
from sparse_cocktail.schedules import cubic, decay_at, linear, triangular

# ---- given weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, "1:2"], ids=["dense", "masked"])
@pytest.mark.parametrize(
    "layer", [MaskedLinear(6, 4), MaskedConv2d(6, 4, 3, padding=1)], ids=["linear", "conv"]
)
def test_a_layer_computes_with_what_it_is_given(layer, mask):
    layer.set_mask(mask)
    x = torch.randn(2, 6, 5, 5) if layer.weight.dim() == 4 else torch.randn(2, 6)
    source = torch.randn_like(layer.weight, requires_grad=True)
    with given_weights([layer], [source * 2]):
        y = layer(x)
    twin = type(layer).__mro__[2](*([6, 4, 3] if layer.weight.dim() == 4 else [6, 4]))
    twin.weight, twin.bias = torch.nn.Parameter(source.detach() * 2), layer.bias
    if layer.weight.dim() == 4:
        twin.padding = (1, 1)
        twin._reversed_padding_repeated_twice = [1, 1, 1, 1]
    assert torch.equal(y, twin(x))
    y.sum().backward()
    twin(x).sum().backward()
    assert torch.equal(source.grad, 2 * twin.weight.grad)
    assert layer.weight.grad is None
    assert not torch.equal(layer(x), y)


def test_given_weights_of_another_shape_are_refused():
    layer = MaskedLinear(6, 4)
    with pytest.raises(ValueError, match="given_weights"), given_weights([layer], [layer.weight.T]):
        pass


def test_given_weights_under_autocast():
    layer = MaskedLinear(6, 4)
    x = torch.randn(2, 6)
    with torch.autocast("cpu", torch.bfloat16), given_weights([layer], [layer.weight * 1]):
        y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(y, torch.nn.Linear.forward(layer, x))


def test_a_pass_with_the_layers_own_weights_is_a_plain_one(one_subnet, tmp_path):  # noqa: F811
    """Made anew for every part of the batch, gradients and all."""
    ends = {}
    for given in (False, True):
        calls = []

        def same_weights(calls=calls):
            calls.append(1)
            return [w * 1.0 for w in trainer_weights()]

        one_subnet(Pass("dense", weights=same_weights if given else None))
        layers = {}

        def trainer_weights(layers=layers):
            return [layer.weight for layer in layers["of"]]

        original = METHODS["one"].before_stage

        def keep(self, ctx, original=original, layers=layers):
            layers["of"] = list(ctx.cocktail.layers.values())
            original(self, ctx)

        METHODS["one"].before_stage = keep
        trained(tmp_path / str(given), accumulate=2)
        ends[given] = weights(tmp_path / str(given))
        assert len(calls) == (6 if given else 0)  # 3 steps of two parts
    assert same(ends[False], ends[True])


# ---- one network per pattern ---------------------------------------------------------------------

MENU = ("unstructured-0.5000", "2:4", "channel-0.5000", "block-4x4-0.5000")


class ByMagnitude(Separate):
    """Pruned at the start; what is pruned is zero."""

    starts = []

    def before_stage(self, ctx):
        super().before_stage(ctx)
        ctx.cocktail.add(self.present(ctx)[0], stage=ctx.stage)

    def step(self, ctx):
        if ctx.step == 0:
            self.starts.append([w.detach().clone() for w in ctx.cocktail.bank.weights])
        return [Pass(str(self.present(ctx)[0]))]

    def after_step(self, ctx):
        zero_pruned(ctx, str(self.present(ctx)[0]))


@pytest.fixture(scope="module")
def separate(tmp_path_factory):
    """(results, folder) of a run of four networks."""
    folder = tmp_path_factory.mktemp("separate")
    METHODS["by-magnitude"] = ByMagnitude
    fields = {"threads": 1, "recalibrate_samples": 64, "patterns": ",".join(MENU), **MODEL}
    yield train("resnet8", toy(), folder, method="by-magnitude", epochs=1, **fields), folder
    del METHODS["by-magnitude"]


def test_every_network_starts_from_the_same_weights(separate):
    assert len(ByMagnitude.starts) == len(MENU)
    assert all(
        torch.equal(a, b)
        for start in ByMagnitude.starts[1:]
        for a, b in zip(start, ByMagnitude.starts[0], strict=True)
    )


def test_results_name_the_weights_of_every_network(separate):
    results, folder = separate
    assert [s["name"] for s in results["subnets"]] == list(MENU)
    for row in results["subnets"]:
        assert row["weights"] == f"networks/{row['name']}.safetensors"
        cocktail = Cocktail.load(folder / row["weights"])
        assert list(cocktail.subnets) == ["dense", row["name"]]
        network = cocktail.export(row["name"], plain=True)
        test = toy().test
        right = (network(test.inputs).argmax(1) == test.targets).float().mean()
        assert row["accuracy"] == pytest.approx(100 * float(right))
    assert not (folder / "cocktail.safetensors").exists()


def test_statistics_of_every_network_are_estimated_at_the_end(separate):
    results, folder = separate
    for row in results["subnets"]:
        cocktail = Cocktail.load(folder / row["weights"])
        stored = [t.clone() for t in cocktail.subnets[row["name"]].statistics]
        cocktail.recalibrate(row["name"], toy().calibration(64, 256))
        torch.testing.assert_close(cocktail.subnets[row["name"]].statistics, stored)


def test_pruned_weights_and_their_momentum_are_zero(separate):
    _, folder = separate
    for name in MENU:
        cocktail = Cocktail.load(folder / f"networks/{name}.safetensors")
        cocktail.activate(name)
        for layer in cocktail.layers.values():
            assert not layer.weight[~layer.mask].any()
            assert layer.weight[layer.mask].all()
    tensors, _ = read_tensors(folder / "checkpoint.safetensors")
    momenta = [t for key, t in tensors.items() if "momentum_buffer" in key]
    assert any((m == 0).sum() >= m.numel() / 2 for m in momenta)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)])
def test_after_a_reset_the_optimizer_steps_like_a_new_one(kind):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([weight], 0.1)
    weight.grad = torch.full((3,), 0.2)
    for _ in range(50):
        optimizer.step()
    reset_momentum(SimpleNamespace(optimizer=optimizer))
    twin = torch.nn.Parameter(weight.detach().clone())
    other = kind([twin], 0.1)
    for gradient in (0.3, -0.1, 2.0):
        for parameter, its in ((weight, optimizer), (twin, other)):
            parameter.grad = torch.full((3,), gradient)
            its.step()
        assert torch.equal(weight, twin)


def test_an_overwritten_folder_keeps_no_old_network(separate, tmp_path):
    fields = {"threads": 1, "recalibrate_samples": 64, "epochs": 1, **MODEL}
    for pattern in ("unstructured-0.5", "2:4"):
        out = {"method": "by-magnitude", "patterns": pattern, "overwrite": True}
        train("resnet8", toy(), tmp_path, **out, **fields)
    assert [f.name for f in (tmp_path / "networks").iterdir()] == ["2:4.safetensors"]


# ---- checks of fields ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "rule"),
    [
        ("[0, 1]", [0, 0.5, 1], [-0.1, 1.1, nan, inf], r"in \[0, 1\]"),
        ("(0, 1)", [0.001], [0, 1, nan], r"in \(0, 1\)"),
        ("(0, 1]", [1], [0, 2], r"in \(0, 1\]"),
        ("[0, inf)", [0, 1e9], [-1, inf, nan], "0 or more"),
        ("(0, inf)", [1], [0, -inf], "positive"),
        ("[0, 1e+06]", [1e6], [1000001], r"in \[0, 1e\+06\]"),
    ],
)
def test_ranges_of_fields(interval, inside, outside, rule):
    for value in inside:
        check_range("rigl", SimpleNamespace(drop=value), interval, ["drop"], "give a share")
    for value in outside:
        message = rf"^rigl: drop={value} is not {rule}; give a share$"
        with pytest.raises(ValueError, match=message):
            check_range("rigl", SimpleNamespace(drop=value), interval, ["drop"], "give a share")


def test_choices_of_fields():
    options = SimpleNamespace(a="x", b="z")
    check_choices("set", options, {"a": ("x", "y"), "b": ("z",)})
    with pytest.raises(ValueError, match=r"^set: b='z' is not one of x, y$"):
        check_choices("set", options, {"a": ("x", "y"), "b": ("x", "y")})


# ---- menus and recipes ---------------------------------------------------------------------------


def test_ladders_are_those_of_sparse_cocktail():
    names = {kind: [str(p) for p in ladder(kind, 2)] for kind in ("unstructured", "channel", "n:m")}
    assert names == {
        "unstructured": ["unstructured-0.2000", "unstructured-0.3600"],
        "channel": ["channel-0.1000", "channel-0.1900"],
        "n:m": ["1:2", "2:4", "4:8"],
    }
    assert [str(p) for p in ladder("block-16x16", 1)] == ["block-16x16-0.2000"]
    both = [str(p) for p in ladder("unstructured+n:m", 2)]
    assert both == names["unstructured"] + names["n:m"]


@pytest.mark.parametrize("kind", ["blocks", "block", "block-4", "channel-2", "", "channel+"])
def test_unknown_ladders_are_refused(kind):
    with pytest.raises(ValueError, match="ladder: kind"):
        ladder(kind, 2)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"stages": 0}, "stages=0"),
        ({"patterns": "2:4,2:4"}, "twice"),
        ({"patterns": "dense"}, "dense"),
        ({"patterns": "2:5x"}, "unknown"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_bad_menus_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        MenuOptions(**fields).menu()


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"min_lr": -1.0}, "min_lr=-1.0 is not 0 or more"),
        ({"lr_schedule": "line"}, "lr_schedule='line' is not one of cosine, steps"),
        ({"lr_schedule": "steps", "milestones": "half"}, "milestones='half'"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_bad_schedules_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        MenuOptions(**fields).learning_rate(0.1, 10)


def test_learning_rates():
    cosine = MenuOptions(min_lr=0.0).learning_rate(0.2, 10)
    assert [round(cosine(step), 6) for step in (0, 5, 10)] == [0.2, 0.1, 0.0]
    steps = MenuOptions(lr_schedule="steps", milestones="0.3, 0.6").learning_rate(1.0, 10)
    assert [steps(step) for step in (0, 2, 3, 6)] == pytest.approx([1, 1, 0.1, 0.01])


def test_a_recipe_serves_other_methods(separate):
    recipe = {
        "data": "digits",
        "rewind": 1,
        "stages": 3,
        "paper": {"epochs": 9},
        "methods": {"by-magnitude": {"epochs": 7}, "cocktail": {"lr": 0.5}},
    }
    fields = for_method(recipe, "by-magnitude")
    assert fields == {"data": "digits", "stages": 3, "method": "by-magnitude", "epochs": 7}
    split_fields(fields)
    assert for_method(recipe)["lr"] == 0.5 and "methods" not in for_method(recipe)
    with pytest.raises(ValueError, match="not one of"):
        for_method(recipe, "nothing")


def test_schedules():
    assert [linear(1, 3, p) for p in (-1, 0, 0.5, 1, 2)] == [1, 1, 2, 3, 3]
    assert [cubic(1, 0, p) for p in (0, 0.5, 1)] == [1, 0.125, 0]
    assert [triangular(1, 3, p) for p in (0, 0.25, 0.5, 0.75, 1)] == [1, 2, 3, 2, 1]
    made = [decay_at(1.0, p, (0.5, 0.75), 0.1) for p in (0, 0.5, 0.74, 0.75)]
    assert made == pytest.approx([1, 0.1, 0.1, 0.01])
