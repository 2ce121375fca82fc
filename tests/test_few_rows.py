"""Masked layers of few rows on the CPU: the mask is applied as the weight is read."""

import ctypes
import mmap

import pytest
import torch
import torch.nn.functional as F

from sparse_cocktail import MaskedConv2d, ops
from sparse_cocktail.ops import few_rows, layerwise, routes

pytestmark = pytest.mark.skipif(
    "cpp" not in ops.implementations("masked_linear"), reason="needs the C++ extension"
)
LAST = torch.channels_last
cpp = torch.ops.sparse_cocktail_cpp
each_level = pytest.mark.parametrize("level", ops.cpu_levels())

# x, weight, and the geometry of the convolution
CONVS = {
    "pointwise": ((3, 37, 3, 5), (13, 37, 1, 1), {}),
    "strided_pointwise": ((2, 64, 5, 4), (7, 64, 1, 1), {"stride": 2}),
    "padded_pointwise": ((1, 33, 2, 3), (5, 33, 1, 1), {"padding": (1, 0)}),
    "3x3": ((2, 32, 4, 4), (40, 32, 3, 3), {"padding": 1}),
    "strided": ((3, 64, 7, 6), (12, 64, 3, 3), {"stride": 2, "padding": 1}),
    "uneven": ((1, 32, 9, 8), (3, 32, 2, 3), {"stride": (3, 1), "padding": (0, 2)}),
    "dilated": ((1, 32, 7, 9), (5, 32, 3, 2), {"dilation": (2, 3), "padding": (2, 1)}),
    "one_position": ((1, 96, 3, 3), (25, 96, 3, 3), {}),
}
each_conv = pytest.mark.parametrize(("x", "weight", "how"), CONVS.values(), ids=CONVS)


def masked_of(shape, density=0.5):
    mask = torch.rand(shape) < density
    return mask, ops.pack_mask(mask)


def trained(layer, x, weight, bias, seen=None):
    """The output, and the gradients of x, the weight and the bias."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = layer(*leaves)
    seen = torch.ones_like(y).cumsum(-1) / y.shape[-1] if seen is None else seen.to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, leaves, seen)


def check(ours, torchs, exact):
    """At most twice PyTorch's error, in the maximum norm."""
    for mine, theirs, true in zip(ours, torchs, exact, strict=True):
        assert mine.shape == theirs.shape
        error = (mine.double() - true).abs().max()
        allowed = (theirs.double() - true).abs().max()
        assert error <= 2 * allowed + 1e-6 * true.abs().max(), (float(error), float(allowed))


def linear(x, weight, bits, bias=None, place=torch.clone):
    result = place(torch.empty(len(x), len(weight)))
    cpp.masked_linear_into(x, weight, bits, bias, result)
    return result


def input_grad(grad, weight, bits, place=torch.clone):
    result = place(torch.empty(len(grad), weight.shape[1]))
    cpp.masked_linear_input_grad_into(grad, weight, bits, result)
    return result


def weight_grad(grad, x, weight, bits, place=torch.clone):
    result = place(torch.empty(weight.shape))
    cpp.masked_linear_weight_grad_into(grad, x, weight, bits, result)
    return result


# ---- accuracy ------------------------------------------------------------------------------------


@each_level
@pytest.mark.parametrize("shape", [(5, 1), (13, 31), (1, 64), (12, 100), (53, 515), (300, 70)])
@pytest.mark.parametrize("rows", [(), (1,), (4,), (2, 9), (67,)], ids=str)
def test_linear(level, shape, rows):
    x, weight, bias = torch.randn(*rows, shape[1]), torch.randn(shape), torch.randn(shape[0])
    seen = torch.randn(*rows, shape[0])
    for density in (0.0, 0.3, 1.0):
        mask, bits = masked_of(shape, density)

        def theirs(x, w, b, mask=mask):
            return F.linear(x, torch.where(mask, w, 0), b)

        with ops.cpu_level(level), ops.backend("cpp"), ops.route("fused"):
            ours = trained(
                lambda x, w, b, bits=bits: ops.masked_linear(x, w, bits, b), x, weight, bias, seen
            )
        assert not ours[2][~mask].any(), "a pruned weight has a gradient"
        exact = trained(theirs, x.double(), weight.double(), bias.double(), seen)
        check(ours, trained(theirs, x, weight, bias, seen), exact)


@each_level
def test_long_sums_are_no_single_chain(level):
    """One chain of thousands of terms would have several times PyTorch's error."""
    x, weight = torch.randn(8, 3000), torch.randn(4000, 3000)
    grad = torch.randn(8, 4000)
    _, bits = masked_of(weight.shape, 0.9)
    masked = ops.masked_weight(weight, bits)
    wide = masked.double()
    with ops.cpu_level(level):
        ours = [
            linear(x, weight, bits),
            input_grad(grad, weight, bits),
        ]
    exact = [x.double() @ wide.t(), grad.double() @ wide]
    check(ours, [x @ masked.t(), grad @ masked], exact)
    # many numbers of few terms each: the largest error of PyTorch's is small
    x, grad = torch.randn(40, 2048), torch.randn(40, 512)
    bits = ops.pack_mask(torch.ones(512, 2048, dtype=torch.bool))
    with ops.cpu_level(level):
        ours = weight_grad(grad, x, torch.empty(512, 2048), bits)
    check([ours], [grad.t() @ x], [grad.double().t() @ x.double()])


@each_level
@each_conv
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=["last", "first"])
def test_conv(level, x, weight, how, layout):
    x = torch.randn(x).to(memory_format=layout)
    bias, weight = torch.randn(weight[0]), torch.randn(weight).to(memory_format=LAST)
    mask, bits = masked_of(weight.shape)

    def theirs(x, w, b):
        return F.conv2d(x, torch.where(mask, w, 0), b, **how)

    def mine(x, w, b):
        return ops.masked_conv2d(x, w, bits, b, **how)

    seen = torch.randn_like(theirs(x, weight, bias))
    with ops.cpu_level(level), ops.backend("cpp"):
        with ops.route("fused"):
            ours = trained(mine, x, weight, bias, seen)
        with ops.route("layer"):
            others = trained(mine, x, weight, bias, seen)
    for a, b in zip(ours, others, strict=True):
        assert 1 in a.shape or a.stride() == b.stride()
    assert not ours[2][~mask].any(), "a pruned weight has a gradient"
    exact = trained(theirs, x.double(), weight.double(), bias.double(), seen)
    check(ours, trained(theirs, x, weight, bias, seen), exact)


# ---- the same bits -------------------------------------------------------------------------------


def products(x, grad, weight, bits, bias, place=torch.clone):
    return [
        linear(x, weight, bits, bias, place),
        input_grad(grad, weight, bits, place),
        weight_grad(grad, x, weight, bits, place),
    ]


@each_level
def test_threads_and_other_rows_change_nothing(level, threads):
    x, grad = torch.randn(23, 1100), torch.randn(23, 203)
    weight, bias = torch.randn(203, 1100), torch.randn(203)
    _, bits = masked_of(weight.shape)
    with ops.cpu_level(level):
        threads(1)
        one = products(x, grad, weight, bits, bias)
        for count in (2, 3, 7):
            threads(count)
            assert all(map(torch.equal, products(x, grad, weight, bits, bias), one))
        for row in (slice(0, 1), slice(5, 12)):
            y, grad_x, _ = products(x[row], grad[row], weight, bits, bias)
            assert torch.equal(y, one[0][row]) and torch.equal(grad_x, one[1][row])


@each_level
def test_what_is_pruned_has_no_value(level):
    """Not even one that is no number; what meets a zero of the weight is as in a product."""
    x, grad, weight = torch.randn(5, 70), torch.randn(5, 9), torch.randn(9, 70)
    mask, bits = masked_of(weight.shape)
    spoilt = torch.where(mask, weight, torch.nan)
    with ops.cpu_level(level):
        right = products(x, grad, weight, bits, None)
        assert all(map(torch.equal, products(x, grad, spoilt, bits, None), right))
        x[2, 3] = torch.inf
        y, _, by_weight = products(x, grad, weight, bits, None)
    assert torch.equal(y.isfinite(), (x @ torch.where(mask, weight, 0.0).t()).isfinite())
    assert not by_weight[~mask].any()


def at_the_end_of_a_page(tensor):
    """A copy after which no memory may be touched, and what keeps it."""
    size, page = tensor.nbytes, mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + pages * page), page, 0) == 0
    view = torch.frombuffer(
        memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages * page - size
    )
    return view.view(tensor.shape).copy_(tensor)


@each_level
@pytest.mark.parametrize("inputs", [1, 7, 16, 33, 95])
def test_nothing_is_read_or_written_past_the_end(level, inputs):
    x, grad, weight = torch.randn(6, inputs), torch.randn(6, 11), torch.randn(11, inputs)
    _, bits = masked_of(weight.shape)
    with ops.cpu_level(level):
        right = products(x, grad, weight, bits, None)
        given = map(at_the_end_of_a_page, (x, grad, weight, bits))
        ours = products(*given, None, at_the_end_of_a_page)
    assert all(map(torch.equal, ours, right))


# ---- what goes the other way ---------------------------------------------------------------------


def test_small_or_empty():
    for rows, inputs, outputs in ((0, 5, 3), (4, 0, 3), (4, 5, 0)):
        x, grad, weight = (
            torch.randn(rows, inputs),
            torch.randn(rows, outputs),
            torch.randn(outputs, inputs),
        )
        bits = ops.pack_mask(torch.ones(outputs, inputs, dtype=torch.bool))
        bias = torch.randn(outputs)
        y, grad_x, grad_weight = products(x, grad, weight, bits, bias)
        assert torch.equal(y, F.linear(x, weight, bias))
        assert torch.equal(grad_x, grad @ weight) and torch.equal(grad_weight, grad.t() @ x)


LINEAR_OTHERS = {
    "fp64": lambda x, w: (x.double(), w.double()),
    "bf16": lambda x, w: (x.bfloat16(), w),
    "transposed": lambda x, w: (x, w.t().contiguous().t()),
    "many_rows": lambda x, w: (x.repeat(routes.MOST_ROWS, 1), w),
}


@pytest.mark.parametrize("change", LINEAR_OTHERS.values(), ids=LINEAR_OTHERS)
def test_other_linear_layers_are_computed_by_layer(change):
    x, weight = change(torch.randn(2, 40), torch.randn(6, 40))
    _, bits = masked_of(weight.shape)
    arguments = x, weight, bits, None, None, False
    ours = few_rows.linear(*arguments)
    assert torch.equal(ours, layerwise.linear(*arguments)) and ours.dtype == x.dtype


def test_a_dense_gradient_is_no_matter_of_the_mask():
    x, grad, weight = torch.randn(4, 40), torch.randn(4, 6), torch.randn(6, 40)
    _, bits = masked_of(weight.shape)
    ours = few_rows.linear_weight_grad(grad, x, weight, bits, None, True)
    torch.testing.assert_close(ours, grad.t() @ x)


CONV_OTHERS = {
    "grouped": ((2, 64, 4, 4), (8, 32, 3, 3), LAST, 2),
    "masks_of_half_a_word": ((2, 16, 4, 4), (8, 16, 3, 3), LAST, 1),
    "contiguous": ((2, 32, 4, 4), (8, 32, 3, 3), torch.contiguous_format, 1),
    "many_positions": ((2, 32, 24, 24), (8, 32, 3, 3), LAST, 1),
    "no_images": ((0, 32, 4, 4), (8, 32, 3, 3), LAST, 1),
}


@pytest.mark.parametrize(("x", "weight", "layout", "groups"), CONV_OTHERS.values(), ids=CONV_OTHERS)
def test_other_convolutions_are_computed_by_layer(x, weight, layout, groups):
    x, weight = (torch.randn(t).to(memory_format=layout) for t in (x, weight))
    geometry = [1, 1, 1, 1, 1, 1, groups]
    assert not few_rows.takes(x, weight, geometry)
    _, bits = masked_of(weight.shape)
    ours = few_rows.conv2d(x, weight, bits, None, None, geometry, False)
    assert torch.equal(ours, layerwise.conv2d(x, weight, bits, None, None, geometry, False))


# ---- in a layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dense_grad", [False, True])
def test_a_module_trains_alike(monkeypatch, dense_grad):
    """Both gradients of a convolution of few positions come from here, of others from one call."""
    called = []
    together = layerwise.conv2d_grads
    monkeypatch.setattr(layerwise, "conv2d_grads", lambda *a: called.append(1) or together(*a))
    layer = MaskedConv2d(32, 24, 3, padding=1).to(memory_format=LAST)
    layer.set_mask(masked_of((24, 32, 3, 3))[1])
    layer.dense_grad = dense_grad
    x = torch.randn(2, 32, 4, 4).to(memory_format=LAST).requires_grad_()

    def step():
        layer.zero_grad()
        x.grad = None
        layer(x).square().sum().backward()
        return [x.grad, layer.weight.grad, layer.bias.grad]

    with ops.route("layer"):
        theirs = step()
    assert called == [1]
    with ops.route("fused"):
        ours = step()
    assert called == [1]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_results_may_be_changed_in_place():
    """As an activation does that follows the layer."""
    x, weight = torch.randn(2, 32, 4, 4).to(memory_format=LAST), torch.randn(8, 32, 3, 3)
    weight = weight.to(memory_format=LAST).requires_grad_()
    _, bits = masked_of(weight.shape)
    with ops.route("fused"):
        ops.masked_conv2d(x, weight, bits, padding=1).relu_().sum().backward()
        flat = torch.randn(8, 32).requires_grad_()
        y = ops.masked_linear(x.permute(0, 2, 3, 1), flat, masked_of(flat.shape)[1])
        y.relu_().sum().backward()
    assert weight.grad.any() and flat.grad.any()


def test_second_derivatives():
    weight = torch.randn(6, 32, 3, 3).to(memory_format=LAST).requires_grad_()
    x = torch.randn(1, 32, 3, 3).requires_grad_()
    _, bits = masked_of(weight.shape)

    def penalty():
        y = ops.masked_conv2d(x, weight, bits, padding=1)
        (by_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(by_x.square().sum(), (x, weight))

    with ops.route("layer"):
        theirs = penalty()
    with ops.route("fused"):
        ours = penalty()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)


# ---- errors --------------------------------------------------------------------------------------


def test_kernels_refuse_what_does_not_fit():
    x, grad, weight = torch.randn(2, 40), torch.randn(2, 6), torch.randn(6, 40)
    _, bits = masked_of(weight.shape)
    for message, op, *arguments in (
        ("masked_linear: x has dtype Double", linear, x.double(), weight, bits, None),
        ("x .* shape .2, 39. .* .2, 40. is needed", linear, x[:, 1:], weight, bits, None),
        ("bits has shape", linear, x, weight, bits[:5], None),
        ("weight has dtype BFloat16", linear, x, weight.bfloat16(), bits, None),
        ("bias is not contiguous float32 of 6", linear, x, weight, bits, x[0]),
        ("result has dtype Double", linear, x, weight, bits, None, torch.Tensor.double),
        ("1 and 2 dimensions", linear, x[0], weight, bits, None),
        ("input_grad: grad has dtype", input_grad, x, weight, bits),
        ("weight_grad: x has dtype", weight_grad, grad, grad, weight, bits),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
