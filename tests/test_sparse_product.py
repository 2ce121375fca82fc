"""Packed sparse weights times activations, against PyTorch in fp64, at every instruction set."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

from sparse_cocktail import ops
from sparse_cocktail.ops.sparse_product import (
    BLOCK_INPUTS,
    sparse_conv2d,
    sparse_linear,
    sparse_pack,
)

LEVELS = ("reference", *ops.cpu_levels())
each_level = pytest.mark.parametrize("level", LEVELS)
DENSITIES = (0.0, 0.05, 0.13, 1.0)

# x shape, weight shape, geometry of the convolution
CONVS = {
    "one_pixel": ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    "pointwise": ((2, 64, 14, 14), (33, 64, 1, 1), {}),
    "pointwise_many_inputs": (
        (1, 2 * BLOCK_INPUTS + 5, 7, 7),
        (20, 2 * BLOCK_INPUTS + 5, 1, 1),
        {},
    ),
    "pointwise_strided": ((3, 40, 15, 14), (17, 40, 1, 1), {"stride": 2}),
    "pointwise_padded": ((2, 3, 5, 6), (4, 3, 1, 1), {"padding": 1}),
    "3x3_wide": ((2, 32, 20, 56), (16, 32, 3, 3), {"padding": 1}),
    "3x3_batch_of_9": ((9, 5, 7, 7), (6, 5, 3, 3), {"padding": 1}),
    "3x3_many_inputs": ((1, 150, 9, 13), (19, 150, 3, 3), {"padding": 1}),
    "3x3_no_padding": ((4, 7, 11, 5), (13, 7, 3, 3), {}),
    "3x3_strided": ((5, 37, 14, 13), (19, 37, 3, 3), {"stride": 2, "padding": 1}),
    "3x3_stride_3_pad_4": ((2, 3, 5, 6), (4, 3, 3, 3), {"stride": 3, "padding": 4}),
    "3x3_dilated": ((2, 6, 12, 11), (5, 6, 3, 3), {"dilation": (2, 3), "padding": 2}),
    "3x3_dilated_strided": (
        (2, 4, 20, 17),
        (3, 4, 3, 3),
        {"dilation": 3, "stride": 2, "padding": 3},
    ),
    "5x5_stride_3": ((2, 4, 30, 31), (4, 4, 5, 5), {"stride": 3, "padding": 2, "dilation": 2}),
    "7x7": ((6, 3, 33, 30), (8, 3, 7, 7), {"stride": 2, "padding": 3}),
    "2x3": ((7, 3, 7, 8), (5, 3, 2, 3), {"stride": (3, 1), "padding": (0, 2)}),
}
each_conv = pytest.mark.parametrize(("x", "weight", "geometry"), CONVS.values(), ids=CONVS)


def at(level):
    """The level's C++ kernels, or the reference."""
    if level == "reference":
        return ops.backend("reference")
    stack = contextlib.ExitStack()
    stack.enter_context(ops.backend("cpp"))
    stack.enter_context(ops.cpu_level(level))
    return stack


def pruned(shape, density):
    """A weight of unit scale with zeros, and its packed form."""
    weight = torch.randn(shape) / math.sqrt(max(1, density * math.prod(shape[1:])))
    mask = torch.rand(shape) < density
    return torch.where(mask, weight, 0.0), sparse_pack(weight, ops.pack_mask(mask))


def check(got, exact, peer):
    """At most twice the error of the same product in torch."""
    assert got.shape == peer.shape and got.dtype == peer.dtype
    error, allowed = ((r.double() - exact).abs().max().item() for r in (got, peer))
    tiny = torch.finfo(torch.float32).eps * max(1.0, exact.abs().max().item())
    assert error <= 2 * allowed + tiny, f"error {error:.2g}, torch {allowed:.2g}"


@each_level
@each_conv
def test_conv_equals_torch(level, x, weight, geometry):
    x, bias = torch.randn(x), torch.randn(weight[0])
    for density in DENSITIES:
        dense, packed = pruned(weight, density)
        for b in (bias, None):
            wide = None if b is None else b.double()
            exact = F.conv2d(x.double(), dense.double(), wide, **geometry)
            peer = F.conv2d(x, dense, b, **geometry)
            with at(level):
                got = sparse_conv2d(x, *packed, b, weight, **geometry)
                last = sparse_conv2d(
                    x.to(memory_format=torch.channels_last), *packed, b, weight, **geometry
                )
            check(got, exact, peer)
            check(last, exact, peer)
            if level != "reference":
                assert torch.equal(got, last), "layouts differ"


@each_level
@pytest.mark.parametrize("shape", [(7,), (1, 70), (3, 70), (2, 17, 300), (64, 1025), (200, 33)])
def test_linear_equals_torch(level, shape):
    x, out = torch.randn(shape), 37
    for density in DENSITIES:
        dense, packed = pruned((out, shape[-1]), density)
        for bias in (torch.randn(out), None):
            wide = None if bias is None else bias.double()
            exact = F.linear(x.double(), dense.double(), wide)
            with at(level):
                got = sparse_linear(x, *packed, out, bias)
            check(got, exact, F.linear(x, dense, bias))


@each_level
def test_other_layouts_of_x_and_single_images(level):
    dense, packed = pruned((6, 5, 3, 3), 0.3)
    x = torch.randn(4, 11, 9, 5)
    with at(level):
        whole = sparse_conv2d(x.permute(0, 3, 1, 2).contiguous(), *packed, None, dense.shape)
        strided = sparse_conv2d(
            x.repeat(1, 1, 2, 1).permute(0, 3, 1, 2)[..., :9], *packed, None, dense.shape
        )
        single = sparse_conv2d(x[0].permute(2, 0, 1), *packed, None, dense.shape)
        last = sparse_conv2d(x.permute(0, 3, 1, 2), *packed, None, dense.shape)
        linear = sparse_linear(torch.randn(9, 8).t(), *pruned((4, 9), 0.5)[1], 4)
    assert torch.equal(whole, strided) and linear.shape == (8, 4)
    torch.testing.assert_close(single, whole[0])
    assert whole.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)


@each_level
def test_pruned_outputs_are_exactly_the_bias(level):
    weight = torch.randn(9, 40, 3, 3)
    mask = torch.rand(weight.shape) < 0.2
    mask[[0, 4, 8]] = False
    packed, bias = sparse_pack(weight, ops.pack_mask(mask)), torch.randn(9)
    with at(level):
        got = sparse_conv2d(torch.randn(2, 40, 8, 8), *packed, bias, weight.shape, padding=1)
    for channel in (0, 4, 8):
        assert (got[:, channel] == bias[channel]).all()


@pytest.mark.parametrize("level", ops.cpu_levels())
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_only_kept_weights_meet_nan_and_infinity(level, value):
    weight = torch.ones(3, 20)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1, 7] = False
    x = torch.ones(5, 20)
    x[:, 7] = value
    with at(level):
        got = sparse_linear(x, *sparse_pack(weight, ops.pack_mask(mask)), 3)
    assert (got[:, 1] == 19).all() and not got[:, [0, 2]].isfinite().any()


@each_level
def test_empty_sizes(level):
    bias = torch.tensor([1.0, 2.0])
    sizes = [((0, 4, 5, 5), (3, 4, 3, 3))]
    if level != "reference":  # torch has no convolution without inputs or outputs
        sizes += [((2, 4, 5, 5), (0, 4, 3, 3)), ((2, 0, 5, 5), (4, 0, 3, 3))]
    with at(level):
        for x, weight in sizes:
            got = sparse_conv2d(torch.randn(x), *pruned(weight, 0.5)[1], None, weight)
            assert torch.equal(got, torch.zeros(x[0], weight[0], 3, 3))
        got = sparse_linear(torch.empty(3, 0), *pruned((2, 0), 0.5)[1], 2, bias)
        assert torch.equal(got, bias.expand(3, 2))
        assert sparse_linear(torch.empty(0, 6), *pruned((2, 6), 0.5)[1], 2).shape == (0, 2)


@pytest.mark.parametrize("level", ops.cpu_levels())
def test_any_thread_count_gives_the_same_bits(level, threads):
    weight = (70, 120, 3, 3)
    _, packed = pruned(weight, 0.1)
    for shape in ((1, 120, 7, 7), (3, 120, 14, 14), (1, 120, 40, 41)):
        x, results = torch.randn(shape), []
        for count in (1, 2, 3, 8, 1):
            threads(count)
            with at(level):
                results.append(sparse_conv2d(x, *packed, None, weight, padding=1))
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_packed_format():
    weight = torch.arange(1.0, 25.0).view(2, 3, 2, 2)
    mask = torch.zeros(2, 3, 2, 2, dtype=torch.bool)
    mask[0, 0, 1, 0] = mask[0, 2, 0, 1] = mask[1, 1, 1, 1] = True
    values, places, starts = sparse_pack(weight, ops.pack_mask(mask))
    assert values.tolist() == [3.0, 10.0, 20.0]
    assert places.tolist() == [2, 9, 7]
    assert starts.tolist() == [[0, 2, 3]]
    last = weight.to(memory_format=torch.channels_last)
    assert torch.equal(sparse_pack(last, ops.pack_mask(mask))[0], values)
    _, _, starts = pruned((5, BLOCK_INPUTS + 1), 0.5)[1]
    assert starts.shape == (2, 6) and starts.dtype == torch.int32


def test_opcheck():
    weight, mask = torch.randn(4, 5, 3, 3), torch.rand(4, 5, 3, 3) < 0.5
    bits = ops.pack_mask(mask)
    packed, x = sparse_pack(weight, bits), torch.randn(2, 5, 6, 6)
    raw = torch.ops.sparse_cocktail
    torch.library.opcheck(raw.sparse_pack.default, (weight, bits))
    geometry = ([4, 5, 3, 3], [1, 1], [1, 1], [1, 1])
    torch.library.opcheck(raw.sparse_conv2d.default, (x, *packed, torch.randn(4), *geometry))
    packed = sparse_pack(weight.view(4, 45), ops.pack_mask(mask.view(4, 45)))
    torch.library.opcheck(raw.sparse_linear.default, (torch.randn(3, 45), *packed, 4, None))


def test_errors_name_the_argument():
    weight = torch.randn(4, 6, 3, 3)
    bits = ops.pack_mask(weight > 0)
    packed, x = sparse_pack(weight, bits), torch.randn(2, 6, 5, 5)
    values, places, starts = packed
    bad = (
        (TypeError, "x has dtype torch.bfloat16", (x.bfloat16(), *packed, None, weight.shape)),
        (ValueError, "groups=1", (x, *packed, None, (4, 3, 3, 3))),
        (ValueError, "bias has shape", (x, *packed, torch.zeros(5), weight.shape)),
        (ValueError, "starts have shapes", (x, *packed, None, (5, 6, 3, 3))),
        (TypeError, "places has dtype", (x, values, places.int(), starts, None, weight.shape)),
        (ValueError, "smaller than the kernel", (x[..., :2], *packed, None, weight.shape)),
        (ValueError, "stride", (x, *packed, None, weight.shape, 0)),
    )
    for error, text, arguments in bad:
        with pytest.raises(error, match=text):
            sparse_conv2d(*arguments)
    with pytest.raises(TypeError, match="weight has dtype torch.float64"):
        sparse_pack(weight.double(), bits)
    with pytest.raises(RuntimeError, match="inference only"):
        sparse_conv2d(x.requires_grad_(), *packed, None, weight.shape)
    with pytest.raises(ValueError, match="neither an int nor a pair"):
        sparse_conv2d(x.detach(), *packed, None, weight.shape, (1, 1, 1))


@pytest.mark.skipif(not ops.cpu_levels(), reason="the C++ extension is not built")
def test_packed_tensors_of_another_layer_are_refused():
    _, packed = pruned((4, 6, 3, 3), 1.0)
    with pytest.raises(RuntimeError, match="do not fit"):  # places beyond 6 channels of 4 taps
        sparse_conv2d(torch.randn(1, 6, 5, 5), *packed, None, (4, 6, 2, 2))
    values, places, starts = packed
    with pytest.raises(RuntimeError, match="sparse_pack"):
        broken = starts + 1
        sparse_conv2d(torch.randn(1, 6, 5, 5), values, places, broken, None, (4, 6, 3, 3))
