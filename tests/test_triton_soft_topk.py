"""Triton kernels of the soft top-k: budget, bisection in fp64, gradient, and what the compiler
makes of them.

The same tests run on a GPU, with more values, and interpreted on the CPU.
"""

import math

import pytest
import torch
from triton_compiling import processes, reports
from triton_places import BF16, DEVICE, F16, F32, F64, ON_GPU, can_run, needs_gpu

from sparse_cocktail import ops
from sparse_cocktail import reference_soft_topk as reference

pytestmark = can_run
BUDGET = TOLERANCE = 1e-6  # of the budget, and of an element of a mask
SIZE = 1_000_003 if ON_GPU else 9001  # more than a sample


@pytest.fixture(scope="module", autouse=True)
def soft(device_of, request):
    if not ON_GPU:  # the compilers run beside the tests
        request.getfixturevalue("compilers")
    device_of("triton")  # quickens the interpreter
    from sparse_cocktail.ops import triton_soft_topk

    with ops.backend("triton"):
        yield triton_soft_topk


@pytest.fixture(autouse=True)
def _poison():
    """Fill new tensors with NaN, so that an element that no kernel writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def random(*shape, dtype=F32):
    return torch.randn(shape, dtype=F64).to(dtype).to(DEVICE)


def costs_of(cost, shape, dtype=F32):
    if cost == "none":
        return None
    costs = torch.tensor(3.0) if cost == "one" else torch.rand(shape, dtype=F64) + 0.3
    return costs.to(dtype).to(DEVICE)


def spent(mask, costs):
    return float((mask.double() * (1 if costs is None else costs.double())).sum())


def bisected(values, costs, budget, beta):
    """The mask in fp64 by bisection alone, between masks of 0 and of 1."""
    ratios = values.double() / (1 if costs is None else costs.double())
    low, high = -beta * ratios.max() - 800, -beta * ratios.min() + 800
    for _ in range(120):
        shift = (low + high) / 2
        mask = (beta * ratios + shift).sigmoid()
        low, high = (shift, high) if spent(mask, costs) < budget else (low, shift)
    return mask


def assert_root(mask, values, costs, budget, beta, budget_off=BUDGET, tolerance=TOLERANCE):
    assert abs(spent(mask, costs) - budget) <= budget_off * budget
    expected = bisected(values, costs, budget, beta)
    torch.testing.assert_close(mask.double(), expected, rtol=0, atol=tolerance)


each_cost = pytest.mark.parametrize("cost", ["none", "one", "each"])


# ---- the mask ------------------------------------------------------------------------------------


@each_cost
@pytest.mark.parametrize("beta, share", [(0, 0.5), (1, 0.9), (20, 0.05), (1e3, 0.001)])
def test_budget_and_bisection(cost, beta, share):
    values = random(SIZE).abs()
    costs = costs_of(cost, SIZE)
    budget = share * spent(torch.ones_like(values), costs)
    mask = ops.soft_topk(values, costs, budget, beta)
    assert (mask.shape, mask.dtype) == (values.shape, F32)
    assert_root(mask, values, costs, budget, beta)


@pytest.mark.parametrize("size", [1, 2, 7, 2048, 2049])
def test_sizes_around_a_tile(size):
    values = random(size)
    assert_root(ops.soft_topk(values, None, 0.3 * size, 5), values, None, 0.3 * size, 5)


@pytest.mark.parametrize("dtype", [BF16, F16, F64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cost", ["none", "each"])
def test_dtypes(dtype, cost):
    values = random(5, 701, dtype=dtype)
    costs = costs_of(cost, values.shape, dtype)
    mask = ops.soft_topk(values, costs, 175.5, 20)
    assert mask.dtype == (F64 if dtype == F64 else F32)
    exact = {"budget_off": 1e-13, "tolerance": 1e-12} if dtype == F64 else {}
    assert_root(mask, values, costs, 175.5, 20, **exact)


@pytest.mark.parametrize("beta, cost", [(1e6, "none"), (1e12, "each")])
def test_hard_masks_keep_the_budget(beta, cost):
    """Newton's method is lost among thousands of hard steps: the trial points take over."""
    values = random(SIZE)
    costs = costs_of(cost, SIZE)
    budget = 0.3 * spent(torch.ones_like(values), costs)
    mask = ops.soft_topk(values, costs, budget, beta)
    assert abs(spent(mask, costs) - budget) <= BUDGET * budget
    assert ((mask > TOLERANCE) & (mask < 1 - TOLERANCE)).sum() < 300
    ratios = values if costs is None else values.double() / costs.double()
    assert ratios[mask > 0.5].min() >= ratios[mask < 0.5].max()


@each_cost
def test_lists_of_any_layout(cost):
    x = random(6, 4, 3, 5)
    values = [
        x.to(memory_format=torch.channels_last),
        random(0, 4),
        x.transpose(0, 3),
        x[::2, 1:3],
        x[:, :1].expand(6, 4, 3, 5),
        random(64)[3:],  # not on 16 bytes
        random(),
    ]
    costs = None if cost == "none" else [costs_of(cost, v.shape) for v in values]
    if cost == "each":
        costs[0] = torch.tensor([2.0], device=DEVICE)
    flat = torch.cat([v.reshape(-1) for v in values])
    pairs = zip(costs or [], values, strict=bool(costs))
    together = torch.cat([c.expand(v.shape).reshape(-1) for c, v in pairs]) if costs else None
    masks = ops.soft_topk_multi(values, costs, 200.0, 9)
    for mask, value in zip(masks, values, strict=True):
        assert mask.shape == value.shape and mask.stride() == torch.empty_like(value).stride()
    assert_root(torch.cat([m.reshape(-1) for m in masks]), flat, together, 200.0, 9)


def test_a_cost_per_tensor():
    values, costs = [random(300), random(200)], [torch.tensor(1.0), torch.tensor([7.0])]
    costs = [c.to(DEVICE) for c in costs]
    masks = ops.soft_topk_multi(values, costs, 250.0, 30)
    together = torch.cat([c.expand(v.shape) for c, v in zip(costs, values, strict=True)])
    assert_root(torch.cat(masks), torch.cat(values), together, 250.0, 30)


def test_warm_start(soft):
    values, costs = random(SIZE), costs_of("each", SIZE)
    budget = 0.1 * spent(torch.ones_like(values), costs)
    _, root = ops.soft_topk(values, costs, budget, 20, return_root=True)
    assert root.dtype == F64 and root.shape == (2,)
    expected = bisected(values, costs, budget, 20)
    for start in (root.tolist(), [1e6, -3e4], [0, math.inf], [math.nan, 0]):
        mask = ops.soft_topk(values, costs, budget, 20, torch.tensor(start, dtype=F64).to(root))
        torch.testing.assert_close(mask.double(), expected, rtol=0, atol=TOLERANCE)
    once, _ = soft.soft_topk_multi([values], [costs], budget, 20.0, root, sweeps=(1,))
    torch.testing.assert_close(once.double(), expected, rtol=0, atol=TOLERANCE)


def test_a_sample_leaves_few_sweeps(soft):
    values = random(SIZE)
    mask, _ = soft.soft_topk_multi([values], None, 0.05 * SIZE, 20.0, sweeps=(1,) * 3)
    assert_root(mask, values, None, 0.05 * SIZE, 20)


def test_idle_sweeps_change_no_bit(soft):
    values = random(3000)
    few, many = (
        soft.soft_topk_multi([values], None, 150.0, 20.0, sweeps=sweeps)
        for sweeps in ((1,) * 4, (1,) * 5 + (15,) + (1,) * 2)
    )
    assert torch.equal(few[0], many[0]) and torch.equal(few[1], many[1])


@each_cost
def test_the_root_gives_the_mask(cost):
    values = random(200, dtype=F64)
    costs = costs_of(cost, 200, F64)
    mask, (threshold, shift) = ops.soft_topk(values, costs, 20.0, 8, return_root=True)
    ratios = values if costs is None else values / costs
    torch.testing.assert_close(mask, (8 * (ratios - threshold) + shift).sigmoid())


# ---- limits --------------------------------------------------------------------------------------


@each_cost
def test_nothing_and_everything(cost):
    values = random(40, 3).requires_grad_()
    costs = costs_of(cost, (40, 3))
    total = spent(torch.ones_like(values), costs)
    for budget, kept in ((0, 0.0), (total, 1.0)):
        mask, root = ops.soft_topk(values, costs, budget, 5, return_root=True)
        assert torch.equal(mask, torch.full_like(values, kept))
        assert root.tolist() == [0, math.inf if kept else -math.inf]
        (gradient,) = torch.autograd.grad(mask.sum(), values)
        assert torch.equal(gradient, torch.zeros_like(values))


@pytest.mark.parametrize("beta", [0, 1, 1e12])
@pytest.mark.parametrize("value", [-1.7, 1e30, math.inf])
def test_all_values_equal(beta, value):
    mask = ops.soft_topk(torch.full((999,), value, device=DEVICE), None, 33.3, beta)
    expected = torch.full((999,), 33.3 / 999, device=DEVICE)
    torch.testing.assert_close(mask, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [F32, F16, F64], ids=lambda d: str(d)[6:])
def test_infinity_and_nan_rank_on_top(dtype):
    values = [0.3, math.nan, -math.inf, 0.2, math.inf, 0.1]
    values = torch.tensor(values, dtype=dtype, device=DEVICE)
    mask = ops.soft_topk(values, None, 2.5, 10)
    assert abs(spent(mask, None) - 2.5) <= 2.5 * BUDGET
    assert mask[1] == mask[4] == 1 and mask[2] == 0
    few = ops.soft_topk(values, None, 1, 10)
    expected = torch.tensor([0, 0.5, 0, 0, 0.5, 0], dtype=few.dtype, device=DEVICE)
    torch.testing.assert_close(few, expected, rtol=0, atol=TOLERANCE)


def test_empty_lists():
    assert ops.soft_topk_multi([], None, 0, 1) == []
    assert ops.soft_topk(torch.empty(0, 3, device=DEVICE), None, 0, 1).shape == (0, 3)


# ---- gradient ------------------------------------------------------------------------------------


@each_cost
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=lambda d: str(d)[6:])
def test_gradient(cost, dtype):
    """The op's gradient, for a gradient of another layout, against the reference in fp64."""
    values = random(7, 503, dtype=dtype).requires_grad_()
    costs = costs_of(cost, values.shape)
    grad = random(503, 7, dtype=F64 if dtype == F64 else F32).t()
    mask = ops.soft_topk(values, costs, 300.0, 12)
    (gradient,) = torch.autograd.grad(mask, values, grad)
    assert gradient.dtype == dtype and gradient.stride() == values.stride()
    exact = mask.detach().double()
    costs = None if costs is None else [costs]
    (expected,) = reference.soft_topk_grad([grad.double()], [exact], costs, 12, F64)
    off = {F32: 3e-6, BF16: 2**-8, F64: 1e-13}[dtype]
    assert (gradient.double() - expected).abs().max() <= off * expected.abs().max()


def test_gradients_of_lists():
    values = [random(9).requires_grad_(), random(0).requires_grad_(), random(2500).requires_grad_()]
    costs = [torch.tensor(c, device=DEVICE) for c in (1.0, 2.0, 3.0)]
    masks = ops.soft_topk_multi(values, costs, 700.0, 2)
    grads = [torch.randn_like(m) for m in masks]
    found = torch.autograd.grad(masks, values, grads)
    exact = [m.detach().double() for m in masks]
    expected = reference.soft_topk_grad([g.double() for g in grads], exact, costs, 2, F64)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


# ---- on the device -------------------------------------------------------------------------------


def test_a_table_of_arguments_is_the_copied_one(soft):
    numbers = [0, 1, -1, 2**40 + 1, -(2**62)] + list(range(60))
    copied, put = soft.upload(numbers, DEVICE), soft.put(numbers, DEVICE)
    assert put[: len(numbers)].tolist() == copied.tolist() == numbers


@needs_gpu
def test_in_a_cuda_graph_without_waiting():
    values, costs = [random(1000, 300), random(77)], [random(1000, 300).abs() + 1, random(77).exp()]
    start = torch.tensor([math.nan, 0], dtype=F64, device=DEVICE)
    grads = [torch.randn_like(v) for v in values]

    def run():
        masks, root = ops.soft_topk_multi(values, costs, 3e4, 20, start, return_root=True)
        made = torch.ops.sparse_cocktail.soft_topk_grad(grads, masks, costs, 20.0, F32)
        return [*masks, root, *made]

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    values[0].copy_(random(1000, 300))
    graph.replay()
    for got, expected in zip(results, run(), strict=True):
        assert torch.equal(got, expected)


@needs_gpu
@pytest.mark.parametrize("beta", [10, 1e4, 1e12])
def test_budget_of_many_values(beta):
    values = random(25_000_000).mul_(0.03).abs_()
    mask = ops.soft_topk(values, None, 1.25e6, beta)
    assert abs(spent(mask, None) - 1.25e6) <= BUDGET * 1.25e6
    mask = ops.soft_topk(torch.full_like(values, 0.3), None, 1.25e6, beta)
    assert abs(spent(mask, None) - 1.25e6) <= BUDGET * 1.25e6


# ---- the compiler --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compilers(tmp_path_factory):
    yield from processes("triton_compile_soft_topk.py", tmp_path_factory)


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def kernels(request, compilers):
    return reports(compilers[request.param])


def test_no_kernel_spills(kernels):
    assert len(kernels) > 7
    assert not {name: k["stack"] for name, k in kernels.items() if k["stack"]}


READS = {"sweep": 1, "trials": 1, "masks": 1, "shares": 2, "grads": 2}  # lists of tensors


def test_values_move_16_bytes_at_a_time(kernels):
    for name, k in kernels.items():
        kind = name.partition("-")[0]
        if kind in READS and "float64" not in name:
            assert k["wide_loads"] >= READS[kind] + name.endswith("each"), name
        if kind in ("masks", "grads") and "float32" in name:
            assert k["wide_stores"], name


def test_three_programs_share_a_multiprocessor(kernels):
    """65,536 registers for 256 threads each: 768 loads of 32 bytes keep the memory busy."""
    used = {n: k["registers"] for n, k in kernels.items() if n.startswith(("sweep", "masks"))}
    assert used and not {n: r for n, r in used.items() if r > 80 and "float64" not in n}
