"""What a subnet prunes stays as it was, whatever an optimizer does."""

import copy

import pytest
import torch
from torch import nn

from sparse_cocktail import Cocktail, convert
from sparse_cocktail.freezing import Frozen, is_like

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "plain": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
}
SUBNETS = ("unstructured-0.8", "channel-0.5", "2:4")


def cocktail_of(channels_last=False):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 40, 3),
        nn.BatchNorm2d(40),
        nn.Conv2d(40, 12, 1, bias=False),
        nn.BatchNorm2d(12),
        nn.Flatten(),
        nn.Linear(48, 36),
        nn.Linear(36, 4),
    )
    cocktail = Cocktail(convert(model, channels_last=channels_last))
    for name in SUBNETS:
        cocktail.add(name)
    return cocktail


def step(cocktail, optimizer, seed):
    draws = torch.Generator().manual_seed(seed)
    for parameter in cocktail.model.parameters():
        grad = torch.randn(parameter.shape, generator=draws)
        parameter.grad = torch.empty_like(parameter).copy_(grad)
    optimizer.step()


def moments(optimizer, parameter):
    state = optimizer.state.get(parameter, {})
    return {"": parameter.detach(), **{k: v for k, v in state.items() if is_like(v, parameter)}}


@pytest.mark.parametrize("names", [("channel-0.5",), ("2:4",), SUBNETS[:2], SUBNETS])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_value_is_the_old_or_the_new_one(kind, at_once, channels_last, names):
    cocktail = cocktail_of(channels_last)
    optimizer = OPTIMIZERS[kind](cocktail.model.parameters())
    frozen = Frozen(cocktail)
    frozen.at_once = at_once  # as on a GPU
    for seed in range(3):  # moments are new in the first
        pairs = cocktail.kept_parameters(names)
        before = [copy.deepcopy(moments(optimizer, p)) for p, _ in pairs]
        frozen.hold(names, optimizer)
        step(cocktail, optimizer, seed)
        free = [copy.deepcopy(moments(optimizer, p)) for p, _ in pairs]
        frozen.restore()
        for (parameter, kept), old, new in zip(pairs, before, free, strict=True):
            for key, found in moments(optimizer, parameter).items():
                zero = torch.zeros_like(new[key])
                wanted = torch.where(kept, new[key], old.get(key, zero))
                assert torch.equal(found, wanted), (seed, key)
                assert found.stride() == new[key].stride()


def test_other_parameters_move_and_moments_may_be_left_out():
    cocktail = cocktail_of()
    optimizer = OPTIMIZERS["momentum"](cocktail.model.parameters())
    step(cocktail, optimizer, 0)
    masks = {p: mask for p, mask in cocktail.kept_parameters(["channel-0.5"])}
    before = {p: p.detach().clone() for p in cocktail.model.parameters()}
    frozen = Frozen(cocktail)
    frozen.hold(["channel-0.5"])
    step(cocktail, optimizer, 1)
    moved = [copy.deepcopy(moments(optimizer, p)) for p in before]
    frozen.restore()
    for (parameter, old), free in zip(before.items(), moved, strict=True):
        assert torch.equal(
            moments(optimizer, parameter)["momentum_buffer"], free["momentum_buffer"]
        )
        everything = torch.ones_like(old, dtype=torch.bool)
        wanted = torch.where(masks.get(parameter, everything), free[""], old)
        assert torch.equal(parameter, wanted)


def test_a_frozen_layer_without_a_channel_left_keeps_everything():
    cocktail = cocktail_of()
    masks = [torch.zeros_like(b) for b in cocktail.masks("2:4")]
    with pytest.warns(UserWarning, match="no weight is left"):
        cocktail.set_masks("2:4", masks)
    optimizer = OPTIMIZERS["adamw"](cocktail.model.parameters())
    before = {p: p.detach().clone() for p, _ in cocktail.kept_parameters(["2:4"])}
    frozen = Frozen(cocktail)
    frozen.hold(["2:4"], optimizer)
    step(cocktail, optimizer, 0)
    frozen.restore()
    for parameter, old in before.items():
        assert torch.equal(parameter, old)
        assert not any(v.any() for k, v in moments(optimizer, parameter).items() if k)


def test_memory_for_copies_follows_a_model_to_another_dtype():
    cocktail = cocktail_of()
    frozen, names = Frozen(cocktail), ["channel-0.5", "2:4"]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        cocktail.model.to(dtype)
        with torch.no_grad():
            for parameter in cocktail.model.parameters():
                parameter.add_(torch.randn(parameter.shape, dtype=dtype) / 3)
        before = {p: (p.detach().clone(), kept) for p, kept in cocktail.kept_parameters(names)}
        frozen.hold(names)
        step(cocktail, OPTIMIZERS["plain"](cocktail.model.parameters()), 0)
        frozen.restore()
        for parameter, (old, kept) in before.items():
            assert parameter.dtype == dtype and torch.equal(parameter[~kept], old[~kept])
