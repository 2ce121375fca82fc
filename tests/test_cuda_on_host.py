"""The CUDA kernels of packed 2:4 products, executed on the CPU from their own source.

`tests/cuda_host` runs every thread of a CTA as a fiber and does what the PTX manual says of each
instruction, lane by lane. The packed form comes from `reference_nm`, which knows nothing of PTX.
"""

import mmap

import pytest
import torch
from cuda_host import build
from cuda_host.products import ACTIVATIONS, DTYPES, Product

DRIVERS = ("gemm_sm80_driver", "skinny_driver", "emulator_driver")
TILES = range(1, 8)
ORDERS = (0, 1, 7)  # of the fibers: in order, backwards, shuffled
SHARED_OF_SM89, SHARED_OF_SM80, SHARED_OF_SM90 = 99 << 10, 163 << 10, 227 << 10


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    if build.compiler() is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda_host")
    started = {name: build.compile_driver(name, folder) for name in DRIVERS}
    return {
        name: build.Driver(build.load_driver(name, folder, process))
        for name, process in started.items()
    }


@pytest.fixture
def gemm(drivers):
    return drivers["gemm_sm80_driver"]


@pytest.fixture
def skinny(drivers):
    return drivers["skinny_driver"]


@pytest.fixture
def emulator(drivers):
    return drivers["emulator_driver"]


# ---- the GEMM ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", ((1, 1, 8), (64, 64, 128), (137, 71, 200), (300, 140, 328)), ids=str
)
@pytest.mark.parametrize("tile", TILES)
def test_gemm_is_exact_for_integers(gemm, tile, shape, dtype):
    product = Product(*shape, dtype, integers=True)
    for order in ORDERS:
        y = product.run_gemm(gemm, tile, order=order)
        assert torch.equal(y, product.exact().to(dtype)), f"order {order}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_gemm_is_as_accurate_as_torch(gemm, tile, dtype, activation):
    bias = {"none": None, "relu": dtype, "gelu": torch.float32}[activation]
    product = Product(96, 83, 712, dtype, bias=bias, activation=activation)
    product.check(product.run_gemm(gemm, tile))


def test_gemm_covers_many_tiles_and_bands(gemm):
    # 9 row tiles are more than one band of 8, and the second band is one tile high
    product = Product(200, 9 * 32 - 5, 64, torch.bfloat16, integers=True)
    assert torch.equal(product.run_gemm(gemm, 7), product.exact().to(torch.bfloat16))


def tile_shape(gemm, tile):
    shape = torch.zeros(3, dtype=torch.int64)
    gemm("tile_shape", tile, shape)
    return shape.tolist()


@pytest.mark.parametrize("tile", TILES)
def test_gemm_does_the_work_of_its_tiles_without_bank_conflicts(gemm, tile):
    assert gemm.library.gemm_sm80_tiles() == len(TILES)
    out, rows, inputs = 264, 136, 192
    Product(out, rows, inputs, torch.float16).run_gemm(gemm, tile)
    tile_out, tile_rows, _ = tile_shape(gemm, tile)
    tiles = -(-out // tile_out) * -(-rows // tile_rows)
    counts = gemm.statistics()
    assert counts["sparse_mmas"] == tiles * (tile_out // 16) * (tile_rows // 8) * (inputs // 32)
    assert counts["matrix_conflicts"] == 0
    # a tile reads its blocks of the weight, and of x only what is there
    weight = tiles * (tile_out // 16) * (inputs // 64) * 1152
    assert counts["async_bytes"] == weight + -(-out // tile_out) * rows * inputs * 2


def test_gemm_reads_rows_beyond_two_to_the_31_elements(gemm):
    # 4 GiB of zero pages, of which only the rows of the last tile are ever written or read
    inputs, rows, out = 64, (1 << 25) + 40, 8
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    product = Product(out, 40, inputs, torch.bfloat16, integers=True)
    x = torch.frombuffer(mmap.mmap(-1, rows * inputs * 2, flags=flags), dtype=torch.bfloat16)
    y = torch.frombuffer(mmap.mmap(-1, rows * out * 2, flags=flags), dtype=torch.bfloat16)
    x.view(rows, inputs)[-40:] = product.x
    gemm.prepare(x, product.packed, product.meta, y)
    gemm("run_only", -(-rows // 64) - 1)
    try:
        operands = (x, product.packed, product.meta, y)
        gemm.run("nm_gemm_sm80", 1, *operands, rows, inputs, out, None, 0, 0, 3, 1, None)
    finally:
        gemm("run_only", -1)
    assert torch.equal(y.view(rows, out)[-40:], product.exact().bfloat16())


@pytest.mark.parametrize("split", (2, 3, 9))
@pytest.mark.parametrize("tile", TILES)
def test_gemm_adds_splits_in_order(gemm, tile, split):
    product = Product(75, 37, 456, torch.float16, bias=torch.float16, activation="relu")  # 8 steps
    y = product.run_gemm(gemm, tile, split)
    product.check(y)
    assert torch.equal(y, product.run_gemm(gemm, tile, split, order=7))


def test_padding_takes_nothing_from_an_infinite_weight(gemm, skinny):
    # columns past the last one are zeros on both sides; one that is not would be inf * 0 = NaN
    for dtype in DTYPES:
        product = Product(40, 9, 72, dtype, integers=True)
        product.packed[0, 0, :, :4] = float("inf")  # lanes 0..3: rows 0 and 8
        clean = torch.tensor([row not in (0, 8) for row in range(40)])
        exact = product.exact().to(dtype)[:, clean]
        for tile in TILES:
            assert torch.equal(product.run_gemm(gemm, tile)[:, clean], exact)
        for blocks in (1, 2, 4):
            assert torch.equal(product.run_skinny(skinny, blocks, 1)[:, clean], exact)


@pytest.mark.parametrize("limit", (SHARED_OF_SM89, SHARED_OF_SM80, SHARED_OF_SM90))
def test_the_plan_of_the_gemm_fits_card_and_shape(gemm, limit):
    def plan(out, rows, inputs=4096):
        code = gemm("choose_tile", out, rows, inputs, 132, limit)
        tile_out, tile_rows, shared = tile_shape(gemm, code % 16)
        assert 1 <= code % 16 <= len(TILES) and shared <= limit
        return tile_out, tile_rows, code // 16 + 1

    for out in (8, 64, 1000, 4096, 28672):
        for rows in (17, 64, 512, 4096, 1 << 20):
            for inputs in (8, 512, 28672):
                split = plan(out, rows, inputs)[2]
                assert split == 1 or -(-inputs // 64) / split > 7
    tile_out, tile_rows, split = plan(8192, 8192)
    assert tile_out * tile_rows >= 128 * 128 and split == 1
    # few rows: no tile that computes mostly padding, and every multiprocessor has a part
    tile_out, tile_rows, split = plan(1024, 32)
    assert tile_rows <= 64 and -(-1024 // tile_out) * split >= 64


# ---- the skinny kernel ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", range(1, 17))
def test_skinny_is_exact_for_integers(skinny, rows, dtype):
    product = Product(150, rows, 8 * (40 + 11 * rows), dtype, integers=True)
    for blocks, split, order in ((1, 1, 0), (2, 1, 1), (4, 3, 7), (1, 2, 1), (2, 40, 0)):
        y = product.run_skinny(skinny, blocks, split, order=order)
        assert torch.equal(y, product.exact().to(dtype)), f"blocks {blocks}, split {split}"
        assert skinny.statistics()["matrix_conflicts"] == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("blocks", (1, 2, 4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_skinny_is_as_accurate_as_torch(skinny, dtype, blocks, activation):
    bias = {"none": None, "relu": dtype, "gelu": torch.float32}[activation]
    for rows, split in ((1, 1), (11, 4)):
        product = Product(70, rows, 1544, dtype, bias=bias, activation=activation)
        y = product.run_skinny(skinny, blocks, split, shared_limit=SHARED_OF_SM89)
        product.check(y)
        again = product.run_skinny(skinny, blocks, split, order=7)
        assert torch.equal(y, again), "the order of the sums depends on the order of the threads"


@pytest.mark.parametrize("shape", ((1, 1, 8), (16, 2, 64), (17, 3, 72), (65, 5, 4096)), ids=str)
def test_skinny_takes_ragged_shapes(skinny, shape):
    product = Product(*shape, torch.float16, integers=True)
    for blocks in (1, 2, 4):
        assert torch.equal(product.run_skinny(skinny, blocks, 2), product.exact().half())


def test_the_plan_splits_only_where_every_warp_has_work(skinny):
    for out in (8, 1024, 4096, 28672):
        for inputs in (8, 256, 4096, 28672):
            for rows in (1, 8, 16):
                blocks, split = divmod(skinny("choose_plan", out, inputs, rows, 132, 0), 1000)
                assert blocks in (1, 2, 4) and 1 <= split <= 32
                assert split == 1 or -(-inputs // 64) // split >= 4
    # enough row blocks for every multiprocessor: nothing is gained by a second launch
    assert skinny("choose_plan", 28672, 8192, 1, 132, 0) % 1000 == 1
    assert skinny("choose_plan", 4096, 4096, 1, 132, 6) % 1000 == 6


# ---- the emulator --------------------------------------------------------------------------------


def test_data_arrive_at_the_wait_and_pass_a_barrier(emulator):
    line = torch.arange(256.0)
    for order in ORDERS:
        y = torch.zeros(256)
        emulator.prepare(line, y, order=order)
        emulator.run("run_copies", line, y, 1, 1)
        assert torch.equal(y, line.flip(0))
        emulator.run("run_copies", line, y, 0, 1)
        assert y.isnan().all(), "a copy arrived before its wait"
        emulator.run("run_copies", line, y, 1, 0)
        assert y.isnan().any(), "a missing barrier was not seen"


def test_named_barriers_and_shuffles(emulator):
    for order in ORDERS:
        y = torch.zeros(32)
        emulator.prepare(y, order=order)
        emulator.run("run_handover", y)
        assert torch.equal(y, torch.arange(31.0, -1, -1) + 100 * (torch.arange(32) % 2 == 0))


def test_a_deadlock_says_who_waits_where(emulator):
    emulator.prepare()
    assert emulator("run_split_warp") == 1
    assert "deadlock" in emulator.error()
    assert "1 of warp 0 of rank 0 at __syncwarp" in emulator.error()


def test_a_sparse_product_takes_two_of_four(emulator):
    y = torch.zeros(128)
    emulator.prepare(y)
    emulator.run("run_one_mma", y, 0x4E4E4E4E)
    assert (y == 32).all()  # 16 kept ones times two
    assert emulator("run_one_mma", y, 0x44445444) == 1
    assert "indices 1, 1; they must increase" in emulator.error()


def test_bank_conflicts_are_counted(emulator):
    for swizzled, conflicts in ((1, 0), (0, 4 * 7)):  # four matrices, eight rows on one column
        emulator.prepare()
        emulator.run("run_matrices", swizzled, 1024)
        assert emulator.statistics()["matrix_conflicts"] == conflicts


def test_memory_outside_every_array_is_refused(emulator):
    line, y = torch.zeros(256), torch.zeros(256)
    emulator.prepare(line[:128], y)
    assert emulator("run_copies", line, y, 1, 1) == 1
    assert "outside every array" in emulator.error()
    emulator.prepare()
    assert emulator("run_matrices", 1, 512) == 1
    assert "is beyond the" in emulator.error()
    emulator.prepare(shared_limit=1000)
    assert emulator("run_matrices", 1, 1024) == 1
    assert "exceed the 1000 of this card" in emulator.error()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_round_as_in_torch(emulator, dtype):
    bits = torch.arange(1 << 16).to(torch.int32).to(torch.int16)
    wide = torch.zeros(1 << 16)
    emulator("widen_bits", dtype == torch.bfloat16, bits, wide, bits.numel())
    expected = bits.view(dtype).float()
    assert torch.equal(wide.nan_to_num(nan=0.5), expected.nan_to_num(nan=0.5))
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-(1 << 31), 1 << 31, (1 << 16,), generator=generator).to(torch.int32)
    halfway = (wide[:-1] + wide[1:]) / 2  # ties, which go to even
    for numbers in (wide, halfway, steps.view(torch.float32)):
        found = torch.zeros(numbers.numel(), dtype=torch.int16)
        emulator("round_floats", dtype == torch.bfloat16, numbers, found, numbers.numel())
        found, expected = found.view(dtype), numbers.to(dtype)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found[~found.isnan()], expected[~found.isnan()])
