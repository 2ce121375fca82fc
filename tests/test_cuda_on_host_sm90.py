"""The Hopper kernel of packed 2:4 products, executed on the CPU from its own source.

See test_cuda_on_host.py. Here copies land late, products settle at their wait, CTAs of a cluster
run side by side, and with a seed for their order warps and CTAs drift as far apart as they can.
"""

import pytest
import torch
from cuda_host import build
from cuda_host.products import ACTIVATIONS, DTYPES, Product

TILES = range(1, 9)
ORDERS = (0, 1, 7, 8)  # of the fibers: in order, backwards, shuffled


@pytest.fixture(scope="module")
def gemm(tmp_path_factory):
    if build.compiler() is None:
        pytest.skip("there is no C++ compiler")
    folder, name = tmp_path_factory.mktemp("cuda_host"), "gemm_sm90_driver"
    return build.Driver(build.load_driver(name, folder, build.compile_driver(name, folder)))


def run(gemm, product, tile, order=0, multiprocessors=4):
    """Few multiprocessors, so that a CTA makes several tiles one after another."""
    return product.run(gemm, "nm_gemm_sm90", tile, multiprocessors, order=order)


def tile_size(gemm, tile):
    size = torch.zeros(3, dtype=torch.int64)
    gemm("tile_size", tile, size)
    return size.tolist()


@pytest.mark.parametrize(
    "shape", ((1, 1, 8), (64, 64, 128), (137, 71, 200), (300, 290, 328)), ids=str
)
@pytest.mark.parametrize("tile", TILES)
def test_gemm_is_exact_for_integers(gemm, tile, shape):
    for dtype, orders in ((torch.bfloat16, ORDERS), (torch.float16, (9,))):
        product = Product(*shape, dtype, integers=True)
        for order in orders:
            y = run(gemm, product, tile, order)
            assert torch.equal(y, product.exact().to(dtype)), f"{dtype}, order {order}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_gemm_is_as_accurate_as_torch(gemm, tile, dtype, activation):
    # 12 steps: the ring and the registers go round more than once
    bias = {"none": None, "relu": dtype, "gelu": torch.float32}[activation]
    product = Product(96, 83, 712, dtype, bias=bias, activation=activation)
    product.check(run(gemm, product, tile))


@pytest.mark.parametrize("multiprocessors", (1, 2, 3, 132))
@pytest.mark.parametrize("tile", TILES)
def test_any_number_of_multiprocessors_makes_every_tile(gemm, tile, multiprocessors):
    # an odd number of tiles along out leaves the second CTA of a cluster with nothing to store
    out, rows, cluster = tile_size(gemm, tile)
    product = Product(2 * cluster * out + 8, rows + 1, 72, torch.bfloat16, integers=True)
    y = run(gemm, product, tile, 7, multiprocessors)
    assert torch.equal(y, product.exact().bfloat16())


def test_strips_cover_every_tile(gemm):
    # 2112 outputs are one strip of 2048 and the narrow rest
    product = Product(2112, 130, 8, torch.float16, integers=True)
    for tile in (2, 8):
        y = run(gemm, product, tile, multiprocessors=3)
        assert torch.equal(y, product.exact().half())


@pytest.mark.parametrize("tile", TILES)
def test_gemm_does_the_work_of_its_tiles_without_bank_conflicts(gemm, tile):
    assert gemm("gemm_sm90_tiles") == len(TILES)
    out, rows, inputs = 520, 264, 192
    run(gemm, Product(out, rows, inputs, torch.bfloat16), tile)
    tile_out, tile_rows, cluster = tile_size(gemm, tile)
    tiles = -(-out // (tile_out * cluster)) * cluster * -(-rows // tile_rows)
    counts = gemm.statistics()
    assert counts["sparse_mmas"] == tiles * (tile_out // 16) * (inputs // 32)  # per warp
    assert counts["async_copies"] == tiles * (inputs // 64)
    assert counts["matrix_conflicts"] == 0


def test_the_chosen_tile_suits_the_shape(gemm):
    for out in (8, 64, 1000, 4096, 28672):
        for rows in (17, 64, 512, 4096, 1 << 20):
            assert 1 <= gemm("choose_tile_sm90", out, rows, 4096, 132) <= len(TILES)
    # a large product shares x between the CTAs of a cluster; few rows want narrow tiles
    assert gemm("choose_tile_sm90", 8192, 8192, 8192, 132) in (1, 2, 3, 4)
    assert tile_size(gemm, gemm("choose_tile_sm90", 4096, 64, 4096, 132))[1] == 64
    assert gemm("choose_tile_sm90", 1024, 512, 1024, 132) == 8


def test_rules_of_the_copy_engine_are_reported(gemm):
    product = Product(64, 8, 12, torch.bfloat16)
    product_arguments = (product.x, product.packed, product.meta, product.x)
    gemm.prepare(*product_arguments)
    assert gemm("nm_gemm_sm90", 1, *product_arguments, 8, 12, 64, None, 0, 0, 8, 132) == 1
    assert "globalStrides is no multiple of 16" in gemm.error()
    assert gemm("nm_gemm_sm90", 1, *product_arguments, 8, 8, 64, None, 0, 0, 9, 132) == 1
    assert gemm.error() == "no such tile"
