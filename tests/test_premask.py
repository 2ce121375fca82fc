"""All masked weights in one call: the same results, and nothing kept for the backward pass."""

import copy

import pytest
import torch
from test_engine import OneSubnet, _quiet, toy
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from sparse_cocktail import Cocktail, MaskedLinear, convert, models, ops
from sparse_cocktail.config import split_fields
from sparse_cocktail.engine import Trainer
from sparse_cocktail.methods import METHODS, Pass
from sparse_cocktail.premask import premasked

SUBNETS = ("unstructured-0.5", "channel-0.5", "2:4", "dense")


@pytest.fixture(scope="module")
def cocktail():
    torch.manual_seed(0)
    made = Cocktail(convert(models.build("resnet8", {"width": 8})))
    for name in SUBNETS[:-1]:
        made.add(name)
    return made


def pass_of(model, x, inside, autocast=False):
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, autocast), inside(model):
        loss = model(x).float().square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def as_always(model):
    return premasked(nn.Sequential())  # no masked layer in it


def kept(model):
    return premasked((m for m in model.modules() if hasattr(m, "mask_bits")), keep=True)


@pytest.mark.parametrize("subnet", SUBNETS)
@pytest.mark.parametrize("mode", ["plain", "dense_grad", "autocast"])
@pytest.mark.parametrize("inside", [premasked, kept], ids=["made anew", "kept"])
def test_equals_layer_by_layer(cocktail, subnet, mode, inside):
    model, x = cocktail.model.train(), torch.randn(4, 1, 8, 8)
    cocktail.activate(subnet)
    for layer in cocktail.layers.values():
        layer.dense_grad = mode == "dense_grad"
    expected = pass_of(copy.deepcopy(model), x, as_always, mode == "autocast")
    got = pass_of(copy.deepcopy(model), x, inside, mode == "autocast")
    assert len(got) == len(expected) > 1
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_no_copy_is_kept_for_the_backward(cocktail):
    cocktail.activate("unstructured-0.5")
    model, layers = cocktail.model.train(), cocktail.layers.values()
    with premasked(model):
        assert all(m.premasked.requires_grad for m in layers)
        copies = [StorageWeakRef(m.premasked.untyped_storage()) for m in layers]
        loss = model(torch.randn(4, 1, 8, 8)).square().mean()
        assert not any(copy.expired() for copy in copies)
    assert all(m.premasked is None for m in layers) and all(copy.expired() for copy in copies)
    loss.backward()


def test_kept_copies_serve_the_backward_after_the_block(cocktail):
    """As in `F.linear(x, w * m)`, a later write to the weight does not matter to them."""
    model = copy.deepcopy(cocktail.model).train()
    layers = [m for m in model.modules() if hasattr(m, "mask_bits")]
    for layer in layers:
        layer.set_mask("unstructured-0.5")
    x = torch.randn(4, 1, 8, 8)
    expected = pass_of(model, x, as_always)
    model.zero_grad(set_to_none=True)
    with premasked(model, keep=True):
        loss = model(x).square().mean()
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(2)
    loss.backward()
    got = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(got, expected[1:])


def test_kept_copies_of_an_unused_layer_and_of_a_second_derivative():
    used, unused = (MaskedLinear(8, 6) for _ in range(2))
    for layer in (used, unused):
        layer.set_mask("2:4")
    x = torch.randn(5, 8, requires_grad=True)
    with premasked([used, unused], keep=True):
        y = used(x)
    (first,) = torch.autograd.grad(y.square().sum(), used.weight, create_graph=True)
    first.square().sum().backward()
    assert unused.weight.grad is None and unused.weight.requires_grad
    weight = used.weight.detach().clone().requires_grad_()
    plain = nn.functional.linear(x, weight * used.mask, used.bias)
    (expected,) = torch.autograd.grad(plain.square().sum(), weight, create_graph=True)
    torch.testing.assert_close(first, expected)
    expected.square().sum().backward()
    torch.testing.assert_close(used.weight.grad, weight.grad)


@pytest.mark.parametrize("change", ["bits", "weight"])
def test_changes_before_the_backward_raise(cocktail, change):
    model = copy.deepcopy(cocktail.model).train()
    other = [m for m in model.modules() if hasattr(m, "mask_bits")]
    for layer in other:
        layer.set_mask("unstructured-0.5")
    with premasked(model):
        loss = model(torch.randn(4, 1, 8, 8)).square().mean()
    with torch.no_grad():
        target = other[2].mask_bits if change == "bits" else other[2].weight
        target.copy_(target.clone())
    with pytest.raises(RuntimeError, match=f"premasked: (a )?{change} changed in place"):
        loss.backward()


def test_another_dtype_masks_its_own_weight():
    layer = nn.Sequential(nn.Linear(33, 8))
    convert(layer, skip=())
    layer[0].set_mask("unstructured-0.5")
    x = torch.randn(4, 33)
    with premasked(layer, torch.bfloat16):
        half, full = layer(x.bfloat16()), layer(x)
    assert half.dtype == torch.bfloat16 and full.dtype == torch.float32
    weight = layer[0].weight * layer[0].mask
    torch.testing.assert_close(full, nn.functional.linear(x, weight, layer[0].bias))
    expected = nn.functional.linear(x.bfloat16(), weight.bfloat16(), layer[0].bias.bfloat16())
    torch.testing.assert_close(half, expected)
    half.float().sum().backward()
    assert torch.equal(layer[0].weight.grad == 0, ~layer[0].mask)


# ---- gradient checkpointing ----------------------------------------------------------------------


class Blocks(nn.Module):
    """Convolutions whose activations may be computed anew in the backward pass."""

    def __init__(self, how: dict | None) -> None:
        super().__init__()
        self.how, self.stem, self.head = how, nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = (block(x) if self.how is None else checkpoint(block, x, **self.how)).relu()
        return self.head(x.mean((2, 3)))


class GivenTwice(OneSubnet):
    """Its second stage computes with twice the weights that are kept."""

    def step(self, ctx):
        layers, masks = ctx.cocktail.layers.values(), ctx.cocktail.masks  # of the second stage

        def twice():
            pairs = zip(layers, masks("unstructured-0.5000"), strict=True)
            return [2.0 * ops.masked_weight(m.weight, bits) for m, bits in pairs]

        return [Pass("dense")] if ctx.stage == 0 else [Pass("unstructured-0.5000", weights=twice)]


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
@pytest.mark.parametrize("method", [OneSubnet, GivenTwice], ids=["masked", "given"])
def test_training_with_gradient_checkpointing(method, reentrant, tmp_path, monkeypatch):
    passes = {"passes": [Pass("unstructured-0.5000")]}
    monkeypatch.setitem(METHODS, "one", type("One", (method,), passes))
    ends = []
    for how in (None, {"use_reentrant": reentrant}):
        torch.manual_seed(5)
        fields = {"method": "one", "threads": 1, "recalibrate_samples": 64}
        trainer = Trainer(*split_fields(fields), tmp_path / str(len(ends)), _quiet())
        trainer.prepare(Blocks(how), toy())
        trainer.run()
        ends.append(trainer.ctx.model.state_dict())
    torch.testing.assert_close(ends[1], ends[0])
