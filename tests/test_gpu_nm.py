"""The CUDA kernels of packed 2:4 products on a card: every tile and split, past the dispatcher.

test_cuda_on_host*.py executes the same sources on the CPU. What an emulator cannot show is here:
what nvcc makes of them, and what the card does. `benchmarks/gpu.py proof` runs this file under
compute-sanitizer too.
"""

import faulthandler
import functools

import pytest
import torch
from cuda_host.products import ACTIVATIONS, DTYPES, Product, framed

from sparse_cocktail.ops.nm_packed import SKINNY_ROWS, built

KERNELS = torch.ops.sparse_cocktail_cuda
SECONDS = 120  # after which a kernel that does not return ends the process, and says where
SM80_SPLIT = 16  # of `tile`: t + 16 (split - 1)
# By kernel, the plans that can be asked for, 0 for its own choice, and whether sums are split.
PLANS = {
    "nm_gemm_sm80": (0, *range(1, 8), 1 + SM80_SPLIT, 4 + 2 * SM80_SPLIT),
    "nm_gemm_sm90": tuple(range(9)),
    "nm_skinny": (0, 1, 2, 5, 32),
}
EACH = [(name, plan) for name, plans in PLANS.items() for plan in plans]
each_plan = pytest.mark.parametrize(("name", "plan"), EACH, ids=str)
each_kernel = pytest.mark.parametrize("name", PLANS)

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)


# A product is made on the CPU, for a second: every plan of a kernel takes the same one.
product_of = functools.cache(Product)


@pytest.fixture(autouse=True)
def _ends():
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def kernel_of(name):
    """The kernel, where it is built and made for this card."""
    major, minor = torch.cuda.get_device_capability()
    if major < 8 or (name == "nm_gemm_sm90" and (major, minor) != (9, 0)):
        pytest.skip(f"{name} does not run on compute capability {major}.{minor}")
    assert built(KERNELS, name), f"{name} is not built: nvcc, or a torch with CUDA, is missing"
    return getattr(KERNELS, name)


def operands(product):
    """x with NaN around it, packed weight, metadata, out and bias on the card."""
    bias = None if product.bias is None else product.bias.cuda()
    x = framed(product.x.cuda())
    return x, product.packed.cuda(), product.meta.cuda(), product.out, bias


def run(name, plan, product):
    kernel, activation = kernel_of(name), ACTIVATIONS.index(product.activation)
    try:
        y = kernel(*operands(product), activation, plan)
    except RuntimeError as error:
        if "bytes of shared memory, and this card has" in str(error):
            pytest.skip(str(error))
        raise
    assert y.shape == (product.rows, product.out) and y.dtype == product.dtype
    return y.cpu()


def rows_for(name, rows):
    return min(rows, SKINNY_ROWS) if name == "nm_skinny" else rows


@each_plan
@pytest.mark.parametrize(
    "shape",
    ((1, 1, 8), (64, 64, 128), (137, 71, 200), (300, 290, 328), (1031, 5, 4104), (4096, 530, 712)),
    ids=str,
)
def test_exact_for_integers(name, plan, shape):
    out, rows, inputs = shape
    for dtype in DTYPES:
        product = product_of(out, rows_for(name, rows), inputs, dtype, integers=True)
        assert torch.equal(run(name, plan, product), product.exact().to(dtype)), dtype


@each_plan
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_as_accurate_as_torch(name, plan, activation):
    for dtype in DTYPES:
        bias = {"none": None, "relu": dtype, "gelu": torch.float32}[activation]
        rows = rows_for(name, 339)
        product = product_of(1096, rows, 2056, dtype, bias=bias, activation=activation)
        y = run(name, plan, product)
        product.check(y)
        assert torch.equal(y, run(name, plan, product)), "not the same bits again"


@each_kernel
def test_every_count_of_rows_near_the_edges_of_tiles(name):
    kernel_of(name)
    counts = range(1, SKINNY_ROWS + 1) if name == "nm_skinny" else (7, 17, 63, 65, 129, 161, 257)
    for rows in counts:
        product = Product(200, rows, 456, torch.bfloat16, integers=True)
        assert torch.equal(run(name, 0, product), product.exact().bfloat16()), rows


@each_kernel
def test_padding_takes_nothing_from_an_infinite_weight(name):
    product = Product(40, 9, 72, torch.float16, integers=True)
    product.packed[0, 0, :, :4] = float("inf")  # lanes 0..3: rows 0 and 8
    clean = torch.tensor([row not in (0, 8) for row in range(40)])
    assert torch.equal(run(name, 0, product)[:, clean], product.exact().half()[:, clean])


@each_kernel
def test_graphs_and_other_streams(name):
    kernel = kernel_of(name)
    product = Product(520, 16, 1032, torch.bfloat16, integers=True)
    given, expected = operands(product), product.exact().bfloat16()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = kernel(*given, 0, 0)
    stream.synchronize()
    assert torch.equal(beside.cpu(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel(*given, 0, 0)
    given[0].neg_()
    for _ in range(2):
        captured.fill_(7.0)
        graph.replay()
        assert torch.equal(captured.cpu(), -expected)


@pytest.mark.parametrize("name", ["nm_gemm_sm80", "nm_gemm_sm90"])
def test_more_than_two_to_the_31_elements(name):
    kernel = kernel_of(name)
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free memory")
    inputs, rows, out = 64, (1 << 25) + 40, 8
    product = Product(out, 40, inputs, torch.bfloat16, integers=True)
    x = torch.zeros(rows, inputs, dtype=torch.bfloat16, device="cuda")
    x[-40:] = product.x.cuda()
    y = kernel(x, *operands(product)[1:], 0, 0)
    assert torch.equal(y[-40:].cpu(), product.exact().bfloat16())
    assert not y[:-40].any()


@each_kernel
def test_wrong_arguments_are_named(name):
    kernel = kernel_of(name)
    x, packed, meta, out, bias = operands(Product(64, 8, 64, torch.float16))
    with pytest.raises(RuntimeError, match=rf"{name}: x has dtype .*cast it"):
        kernel(x.float(), packed, meta, out, bias, 0, 0)
    with pytest.raises(RuntimeError, match=rf"{name}: packed has shape .*make it with nm_pack"):
        kernel(x, packed[:2].contiguous(), meta, out, bias, 0, 0)
    shifted = packed.new_empty(packed.numel() + 1)[1:].view(packed.shape)
    with pytest.raises(RuntimeError, match=rf"{name}: packed starts at .*call \.clone"):
        kernel(x, shifted, meta, out, bias, 0, 0)
    with pytest.raises(RuntimeError, match=rf"{name}: (tile|split) is 999"):
        kernel(x, packed, meta, out, bias, 0, 999)
