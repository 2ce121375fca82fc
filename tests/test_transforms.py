"""torch.func on masked ops and layers, against the same transform of PyTorch with w * m."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from sparse_cocktail import MaskedConv2d, MaskedLinear, ops

LAYERS = {
    "linear": (lambda: MaskedLinear(33, 8), (5, 33)),
    "conv": (lambda: MaskedConv2d(4, 8, 3, padding=1, stride=2), (5, 4, 6, 6)),
}
each_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def pair(make):
    """A masked layer and a plain one that computes the same."""
    layer = make()
    layer.set_mask("unstructured-0.5")
    return layer, layer.to_dense()


@each_layer
def test_forward_mode(make, shape):
    layer, dense = pair(make)
    x, t = torch.randn(shape), torch.randn(shape)
    for mine, theirs in zip(jvp(layer, (x,), (t,)), jvp(dense, (x,), (t,)), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert jvp(layer, (x,), (t,))[1].any()


@each_layer
def test_grad_of_parameters(make, shape):
    layer, dense = pair(make)
    x = torch.randn(shape)

    def loss(module):
        return lambda p: functional_call(module, p, (x,)).square().sum()

    mine = grad(loss(layer))({n: p.detach() for n, p in layer.named_parameters()})
    theirs = grad(loss(dense))({n: p.detach() for n, p in dense.named_parameters()})
    torch.testing.assert_close(mine["weight"], theirs["weight"] * layer.mask)
    torch.testing.assert_close(mine["bias"], theirs["bias"])


@each_layer
def test_jacobian_and_per_sample(make, shape):
    layer, dense = pair(make)
    x = torch.randn(shape)
    torch.testing.assert_close(jacrev(layer)(x[:1]), jacrev(dense)(x[:1]))
    torch.testing.assert_close(vmap(layer)(x), dense(x))
    scalar = [lambda a, m=m: m(a[None]).square().sum() for m in (layer, dense)]
    torch.testing.assert_close(vmap(grad(scalar[0]))(x), vmap(grad(scalar[1]))(x))


def test_hessian():
    layer, dense = pair(lambda: MaskedLinear(5, 3))
    x = torch.randn(5)
    mine, theirs = (hessian(lambda a, m=m: m(a).pow(3).sum())(x) for m in (layer, dense))
    torch.testing.assert_close(mine, theirs)


def test_dense_gradient():
    x, weight = torch.randn(4, 33), torch.randn(8, 33)
    bits = ops.pack_mask(torch.rand(8, 33) < 0.5)
    mine = grad(lambda w: ops.masked_linear(x, w, bits, dense_grad=True).sum())(weight)
    torch.testing.assert_close(mine, grad(lambda w: F.linear(x, w).sum())(weight))


def test_masked_weight():
    weight, t = torch.randn(8, 33), torch.randn(8, 33)
    mask = torch.rand(8, 33) < 0.5
    bits = ops.pack_mask(mask)
    value, tangent = jvp(lambda w: ops.masked_weight(w, bits), (weight,), (t,))
    assert torch.equal(value, weight * mask) and torch.equal(tangent, t * mask)
