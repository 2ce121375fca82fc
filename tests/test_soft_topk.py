"""The soft top-k mask against bisection in fp64, its budget, its gradient, and its limits.

Every test of a `level` runs on the reference and on the C++ of every instruction set. Between them
masks differ by the rounding of fp32, TOLERANCE, where beta is at most 1e3. A harder mask has few
elements in between, which carry the rounding of the whole sum.
"""

import contextlib
import math

import pytest
import torch

from sparse_cocktail import ops

LEVELS = ("reference", *ops.cpu_levels())
TOLERANCE = 1e-6
BUDGET = 1e-6  # relative
SIZES = (1, 2, 7, 1000, 40_009)  # below a vector, a sample and a chunk, and above
COSTS = ("none", "one", "each")

each_level = pytest.mark.parametrize("level", LEVELS)
each_cost = pytest.mark.parametrize("cost", COSTS)


def at(level):
    """The level's C++ kernels, or the reference."""
    stack = contextlib.ExitStack()
    stack.enter_context(ops.backend("reference" if level == "reference" else "cpp"))
    if level != "reference":
        stack.enter_context(ops.cpu_level(level))
    return stack


def costs_of(cost, shape, dtype=torch.float32):
    if cost == "none":
        return None
    return torch.tensor(3.0, dtype=dtype) if cost == "one" else torch.rand(shape, dtype=dtype) + 0.3


def spent(mask, costs):
    return float((mask.double() * (1 if costs is None else costs.double())).sum())


def total_of(values, costs):
    return spent(torch.ones_like(values, dtype=torch.float64), costs)


def bisected(values, costs, budget, beta):
    """The mask in fp64 by bisection alone, between masks of 0 and of 1."""
    ratios = values.double() / (1 if costs is None else costs.double())
    low, high = -beta * ratios.max() - 800, -beta * ratios.min() + 800
    for _ in range(200):
        shift = (low + high) / 2
        mask = (beta * ratios + shift).sigmoid()
        low, high = (shift, high) if spent(mask, costs) < budget else (low, shift)
    return mask


def assert_meets(mask, costs, budget):
    assert abs(spent(mask, costs) - budget) <= BUDGET * budget


# ---- the mask ------------------------------------------------------------------------------------


@each_level
@each_cost
@pytest.mark.parametrize("beta", [0, 0.1, 1, 20, 320, 1e3])
@pytest.mark.parametrize("size", SIZES)
def test_budget_and_bisection(level, cost, beta, size):
    values = torch.randn(size).abs()
    costs = costs_of(cost, size)
    for share in (0.001, 0.05, 0.5, 0.9, 0.999):
        budget = share * total_of(values, costs)
        with at(level):
            mask = ops.soft_topk(values, costs, budget, beta)
        assert (mask.shape, mask.dtype) == (values.shape, torch.float32)
        assert_meets(mask, costs, budget)
        expected = bisected(values, costs, budget, beta)
        torch.testing.assert_close(mask.double(), expected, rtol=0, atol=TOLERANCE)


@each_level
@each_cost
def test_float64_to_the_last_digits(level, cost):
    values = torch.randn(3001, dtype=torch.float64)
    costs = costs_of(cost, 3001, torch.float64)
    budget = 0.07 * total_of(values, costs)
    with at(level):
        mask = ops.soft_topk(values, costs, budget, 15)
    assert mask.dtype == torch.float64
    expected = bisected(values, costs, budget, 15)
    torch.testing.assert_close(mask, expected, rtol=0, atol=1e-12)


@each_level
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_sixteen_bits_meet_the_budget_too(level, dtype):
    values = torch.randn(5, 701).abs().to(dtype)
    with at(level):
        mask = ops.soft_topk(values, None, 175.5, 20)
    assert mask.dtype == torch.float32
    assert_meets(mask, None, 175.5)
    expected = bisected(values, None, 175.5, 20)
    torch.testing.assert_close(mask.double(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.skipif(not ops.cpu_levels(), reason="the C++ extension is not built")
@pytest.mark.parametrize("level", ops.cpu_levels())
def test_budget_of_many_values(level, threads):
    threads(2)
    values = torch.randn(25_000_000) * 0.03
    with at(level):
        for beta in (10, 1e4):
            assert_meets(ops.soft_topk(values.abs(), None, 1.25e6, beta), None, 1.25e6)
        assert_meets(ops.soft_topk(torch.full_like(values, 0.3), None, 1.25e6, 10), None, 1.25e6)


@each_level
@each_cost
@pytest.mark.parametrize("beta", [1e6, 1e12])
def test_hard_masks_keep_the_budget(level, cost, beta):
    values = torch.randn(40_009)
    costs = costs_of(cost, values.shape)
    budget = 0.3 * total_of(values, costs)
    with at(level):
        mask = ops.soft_topk(values, costs, budget, beta)
    assert_meets(mask, costs, budget)
    assert ((mask > TOLERANCE) & (mask < 1 - TOLERANCE)).sum() < 300


@each_level
def test_hardens_to_the_exact_top_k(level):
    values = torch.randn(1000).abs()
    top = ops.unpack_mask(ops.topk_masks([values.view(1, -1)], 100)[0], (1, 1000)).float().view(-1)
    with at(level):
        masks = [ops.soft_topk(values, None, 100, beta) for beta in (1, 10, 100, 1e3, 1e8)]
    errors = [float((mask - top).abs().sum()) for mask in masks]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 100 and errors[-1] < 1e-4


@each_level
def test_costs_rank_by_value_per_cost(level):
    values, costs = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([4.0, 1.0, 1.0, 5.0])
    with at(level):
        mask = ops.soft_topk(values, costs, 4, 1e4)
    torch.testing.assert_close(mask, torch.tensor([0.5, 1, 1, 0]), rtol=0, atol=1e-5)


@each_level
@each_cost
def test_many_tensors_are_their_concatenation(level, cost):
    shapes = [(3,), (5, 7), (0, 4), (2, 3, 40, 50), ()]
    values = [torch.randn(s) for s in shapes]
    costs = None if cost == "none" else [costs_of(cost, s) for s in shapes]
    flat = torch.cat([v.reshape(-1) for v in values])
    pairs = zip(costs or [], values, strict=bool(costs))
    together = torch.cat([c.expand(v.shape).reshape(-1) for c, v in pairs]) if costs else None
    budget = 0.2 * total_of(flat, together)
    with at(level):
        masks = ops.soft_topk_multi(values, costs, budget, 9)
        expected = ops.soft_topk(flat, together, budget, 9)
    assert [m.shape for m in masks] == [v.shape for v in values]
    joined = torch.cat([m.reshape(-1) for m in masks])
    torch.testing.assert_close(joined, expected, rtol=0, atol=TOLERANCE)


@each_level
def test_a_cost_per_tensor(level):
    values = [torch.rand(300), torch.rand(200)]
    costs = [torch.tensor(1.0), torch.tensor([7.0])]
    with at(level):
        masks = ops.soft_topk_multi(values, costs, 250.0, 30)
    assert abs(float(masks[0].sum()) + 7 * float(masks[1].sum()) - 250) < 250 * BUDGET


@each_level
@pytest.mark.parametrize("like", ["channels_last", "transposed", "strided", "expanded"])
def test_layouts(level, like):
    x = torch.randn(6, 4, 3, 5)
    values = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3),
        "strided": x[::2, 1:3],
        "expanded": x[:, :1].expand(6, 4, 3, 5),
    }[like]
    costs = torch.rand(values.shape) + 0.5
    with at(level):
        mask = ops.soft_topk(values, costs, 30, 4)
        expected = ops.soft_topk(values.contiguous(), costs, 30, 4)
    assert mask.stride() == torch.empty_like(values).stride()
    torch.testing.assert_close(mask, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.skipif(not ops.cpu_levels(), reason="the C++ extension is not built")
def test_results_do_not_depend_on_threads(threads):
    values, grad = torch.randn(2, 300_001), torch.randn(2, 300_001)
    found = []
    for count in (1, 2, 3):
        threads(count)
        leaf = values.clone().requires_grad_()
        mask = ops.soft_topk(leaf, None, 5e4, 30)
        found.append((mask.detach(), *torch.autograd.grad(mask, leaf, grad)))
    for mask, gradient in found[1:]:
        assert torch.equal(mask, found[0][0]) and torch.equal(gradient, found[0][1])


@each_level
@each_cost
def test_warm_start(level, cost):
    values = torch.randn(40_009)
    costs = costs_of(cost, values.shape)
    budget = 0.1 * total_of(values, costs)
    with at(level):
        _, root = ops.soft_topk(values, costs, budget, 20, return_root=True)
        assert root.dtype == torch.float64 and root.shape == (2,)
        moved = values + 0.01 * torch.randn_like(values)
        expected = ops.soft_topk(moved, costs, 0.9 * budget, 21)
        wrong = torch.tensor([1e6, -3e4], dtype=torch.float64)
        infinite = torch.tensor([0, math.inf], dtype=torch.float64)
        for start in (root, wrong, infinite):
            mask = ops.soft_topk(moved, costs, 0.9 * budget, 21, start)
            torch.testing.assert_close(mask, expected, rtol=0, atol=TOLERANCE)


@each_level
@each_cost
def test_the_root_gives_the_mask(level, cost):
    values = torch.randn(200, dtype=torch.float64)
    costs = costs_of(cost, 200, torch.float64)
    with at(level):
        mask, (threshold, shift) = ops.soft_topk(values, costs, 20.0, 8, return_root=True)
    ratios = values if costs is None else values / costs
    torch.testing.assert_close(mask, (8 * (ratios - threshold) + shift).sigmoid())


# ---- limits --------------------------------------------------------------------------------------


@each_level
@each_cost
def test_nothing_and_everything(level, cost):
    values = torch.randn(40, 3, requires_grad=True)
    costs = costs_of(cost, (40, 3))
    total = total_of(values, costs)
    with at(level):
        for budget, kept in ((0, 0.0), (total, 1.0), (total * (1 + 1e-8), 1.0)):
            mask, root = ops.soft_topk(values, costs, budget, 5, return_root=True)
            torch.testing.assert_close(mask, torch.full_like(values, kept), rtol=0, atol=1e-12)
            (gradient,) = torch.autograd.grad(mask.sum(), values)
            assert torch.equal(gradient, torch.zeros_like(values))
        torch.testing.assert_close(mask, ops.soft_topk(values, costs, total, 5, root))


@each_level
@pytest.mark.parametrize("beta", [0, 1, 1e12])
@pytest.mark.parametrize("value", [0.0, -1.7, 1e30, math.inf])
def test_all_values_equal(level, beta, value):
    with at(level):
        mask = ops.soft_topk(torch.full((999,), value), None, 33.3, beta)
    torch.testing.assert_close(mask, torch.full((999,), 33.3 / 999), rtol=1e-5, atol=0)


@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_infinity_and_nan_rank_on_top(level, dtype):
    values = torch.tensor([0.3, math.nan, -math.inf, 0.2, math.inf, 0.1], dtype=dtype)
    with at(level):
        mask = ops.soft_topk(values, None, 2.5, 10)
        few = ops.soft_topk(values, None, 1, 10)
    assert_meets(mask, None, 2.5)
    assert mask[1] == mask[4] == 1 and mask[2] == 0
    expected = torch.tensor([0, 0.5, 0, 0, 0.5, 0], dtype=few.dtype)
    torch.testing.assert_close(few, expected, rtol=0, atol=1e-6)


@each_level
@pytest.mark.parametrize("costs", [None, []], ids=["none", "list"])
def test_empty_lists(level, costs):
    with at(level):
        assert ops.soft_topk_multi([], costs, 0, 1) == []
        assert ops.soft_topk(torch.empty(0, 3), None, 0, 1).shape == (0, 3)


# ---- gradient ------------------------------------------------------------------------------------


@each_level
@each_cost
@pytest.mark.parametrize("beta", [0, 1, 7])
def test_gradient(level, cost, beta):
    values = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (5,))]
    costs = None if cost == "none" else [costs_of(cost, v.shape, torch.float64) for v in values]

    def masks(*leaves):
        return tuple(ops.soft_topk_multi(leaves, costs, 2.7, beta))

    with at(level):
        assert torch.autograd.gradcheck(masks, values)
        assert torch.autograd.gradgradcheck(masks, values)


@each_level
@each_cost
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_gradient_in_other_dtypes(level, cost, dtype):
    values = torch.randn(7, 5003).to(dtype).requires_grad_()
    costs = costs_of(cost, values.shape)
    exact = values.detach().double().requires_grad_()
    grad = torch.randn(7, 5003)
    with at(level):
        mask = ops.soft_topk(values, costs, 900.0, 12)
        (gradient,) = torch.autograd.grad(mask, values, grad)
    with ops.backend("reference"):
        wide = None if costs is None else costs.double()
        (expected,) = torch.autograd.grad(
            ops.soft_topk(exact, wide, 900.0, 12), exact, grad.double()
        )
    assert gradient.dtype == dtype
    scale = expected.abs().max() * (2**-8 if dtype == torch.bfloat16 else 3e-6)
    assert (gradient.double() - expected).abs().max() <= scale


@each_level
def test_gradient_of_some_masks_and_no_gradient_of_costs(level):
    values = [torch.randn(9, requires_grad=True), torch.randn(4, requires_grad=True)]
    costs = [torch.rand(9, requires_grad=True), torch.ones(4)]
    with at(level):
        masks = ops.soft_topk_multi(values, costs, 3, 2)
        masks[1].square().sum().backward()
    assert values[0].grad.abs().sum() > 0 and values[1].grad.abs().sum() > 0
    assert costs[0].grad is None
    earned = sum((v.grad).sum() for v in values)
    assert torch.isfinite(earned)


def test_the_budget_takes_back_a_common_gain():
    values = torch.randn(50, requires_grad=True)
    ops.soft_topk(values, None, 5, 3).sum().backward()
    torch.testing.assert_close(values.grad, torch.zeros(50), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ops.implementations("soft_topk_multi"))
def test_compiles_without_a_break(backend):
    def loss(first, second, cost):
        masks = ops.soft_topk_multi([first, second], [cost, cost.new_ones(())], 6.0, 4.0)
        return (masks[0] * first).sum() + (masks[1] * second).square().sum()

    arguments = [torch.randn(4, 5, requires_grad=True), torch.randn(9, requires_grad=True)]
    cost = torch.rand(4, 5) + 0.5
    with ops.backend(backend):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        results = [f(*arguments, cost) for f in (loss, compiled)]
        torch.testing.assert_close(*results)
        grads = [torch.autograd.grad(r, arguments) for r in results]
    torch.testing.assert_close(*grads)


# ---- errors --------------------------------------------------------------------------------------

V = torch.rand(2, 3)
ONES = torch.ones(2, 3)
ERRORS = {
    "budget": ((V, None, 6.1, 1), ValueError, r"soft_topk: budget=6.1 is above 6, the number"),
    "negative": ((V, None, -1, 1), ValueError, r"budget=-1.0 is not in \[0, sum of the costs\]"),
    "nan": ((V, None, math.nan, 1), ValueError, r"budget=nan is not in"),
    "beta": ((V, None, 1, -2), ValueError, r"soft_topk: beta=-2.0 is not in \[0, 1e\+12\]"),
    "hard": ((V, None, 1, math.inf), ValueError, r"beta=inf is not in .*topk_masks"),
    "shape": ((V, ONES.t(), 1, 1), ValueError, r"costs\[0\] has shape \(3, 2\).*\(2, 3\); give"),
    "integers": ((V, ONES.int(), 1, 1), TypeError, r"costs\[0\] has dtype torch.int32.*float"),
    "values": ((V.int(), None, 1, 1), TypeError, r"values\[0\] has dtype torch.int32.*convert"),
    "start": ((V, None, 1, 1, V[0, :2]), ValueError, r"start has shape \(2,\) and dtype.*float32"),
    "empty": ((V[:0], None, 1, 1), ValueError, r"budget=1.0 is above 0"),
}


@pytest.mark.parametrize("arguments,error,message", ERRORS.values(), ids=ERRORS)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.soft_topk(*arguments)


def test_errors_of_lists():
    with pytest.raises(ValueError, match=r"costs has 1 entries for 2 weights|costs has 1 entries"):
        ops.soft_topk_multi([V, V], [ONES], 1, 1)
    with pytest.raises(ValueError, match=r"values\[1\] has dtype torch.float64, but values\[0\]"):
        ops.soft_topk_multi([V, V.double()], None, 1, 1)


@each_level
def test_errors_in_the_data(level):
    error = ValueError if level == "reference" else RuntimeError
    with at(level):
        with pytest.raises(error, match=r"soft_topk: budget=7 is above 6, the sum of the costs"):
            ops.soft_topk(V, ONES, 7, 1)
        for wrong in (0.0, -1.0, math.nan, math.inf):
            costs = ONES.clone()
            costs[1, 1] = wrong
            with pytest.raises(error, match="costs have entries that are not positive and finite"):
                ops.soft_topk(V, costs, 1, 1)
