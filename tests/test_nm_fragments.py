"""The packed 2:4 format against the PTX ISA's own words.

Multiplies as a tensor core does: lane by lane and register by register, from the tables of the PTX
ISA manual ("Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types", "Sparse matrix
storage", "Register fragments for wgmma.mma_async.sp.m64nNk32"). It shares no index arithmetic with
csrc/common/nm_fragments.h or reference_nm.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from nm_cases import CPP, SHAPES, bits_of, masked, named, raw, weight_of

from sparse_cocktail import ops, reference_nm

ROOT = Path(__file__).resolve().parent.parent


def packers(weight, bits, dtype):
    """(packed, meta) by every route that this machine has."""
    yield reference_nm.nm_pack_weight(weight, bits, dtype)
    if ops.extension_path is not None:
        yield CPP.nm_pack_weight(weight, bits, dtype)
        given = ops.nm_mask(weight, 2, 4) if bits is None else bits
        values = reference_nm.nm_compress(weight, 2, 4, given, dtype)[0]
        yield CPP.nm_pack(values.contiguous(), given, 2, 4)


# ---- the instructions, from the manual -----------------------------------------------------------


def row_of_a(lane, i):
    """Row of element a_i, i = 0 ... 7: groupID for i in 0, 1, 4, 5 and groupID + 8 otherwise."""
    return lane // 4 + (0 if i in (0, 1, 4, 5) else 8)


def columns_of_a(lane, i):
    """The four dense columns that a_i is chosen from."""
    first = lane % 4 * 4 + (0 if i < 4 else 16)
    return range(first, first + 4)


def index_of_a(metadata, selector, row, chunk):
    """The two indices of four columns `chunk`: two bits each in the registers of a pair of lanes.

    Selector 0 takes the first two lanes of each group of four, 1 the other two. Each of them holds
    16 columns: of row groupID in the lower 16 bits, and of row groupID + 8 in the upper ones.
    """
    lane = row % 8 * 4 + 2 * selector + chunk // 4
    half = metadata[lane] >> (0 if row < 8 else 16) & 0xFFFF
    four = half >> 4 * (chunk % 4) & 0xF
    return four & 3, four >> 2


def sparse_a(registers, metadata, selector):
    """The dense 16 x 32 matrix that one warp's A registers and metadata stand for."""
    dense = torch.zeros(16, 32, dtype=torch.float64)
    for lane in range(32):
        for i in range(0, 8, 2):  # a pair of elements in one 32-bit register
            row, columns = row_of_a(lane, i), columns_of_a(lane, i)
            low, high = index_of_a(metadata, selector, row, columns[0] // 4)
            assert low < high, "the manual leaves other indices undefined"
            dense[row, columns[low]] = registers[lane][i]
            dense[row, columns[high]] = registers[lane][i + 1]
    return dense


def b_fragment(matrix):
    """Registers b_0 ... b_7 of each lane for a 32 x 8 matrix."""
    return [
        [matrix[lane % 4 * 2 + i % 2 + i // 2 * 8, lane // 4] for i in range(8)]
        for lane in range(32)
    ]


def b_matrix(fragment):
    matrix = torch.full((32, 8), float("nan"), dtype=torch.float64)
    for lane in range(32):
        for i in range(8):
            matrix[lane % 4 * 2 + i % 2 + i // 2 * 8, lane // 4] = fragment[lane][i]
    return matrix


def mma_sp(accumulator, a, b, metadata, selector):
    """mma.sp::ordered_metadata.m16n8k32: adds into c_0 ... c_3 of each lane."""
    product = sparse_a(a, metadata, selector) @ b_matrix(b)
    for lane in range(32):
        for i in range(4):
            row, column = lane // 4 + (0 if i < 2 else 8), lane % 4 * 2 + i % 2
            accumulator[lane][i] += float(product[row, column])


def wgmma_sp(accumulator, a, b, metadata, selector):
    """wgmma.mma_async.sp.m64nNk32, A in registers: d_i of 128 lanes, B = (32, N) as in memory."""
    for warp in range(4):
        lanes = range(32 * warp, 32 * warp + 32)
        dense = sparse_a([a[x] for x in lanes], [metadata[x] for x in lanes], selector)
        product = dense @ b
        for lane in range(32):
            for i in range(b.shape[1] // 2):
                row = lane // 4 + (8 if i // 2 % 2 else 0)
                column = i // 4 * 8 + lane % 4 * 2 + i % 2
                accumulator[32 * warp + lane][i] += float(product[row, column])


def operands(packed, meta, row_block, column_block, half):
    """What each lane of a warp loads: 8 values by 16 bytes, and one metadata register."""
    values = packed[row_block, column_block, half].to(torch.float64).tolist()
    return values, [word & 0xFFFFFFFF for word in meta[row_block, column_block].tolist()]


@pytest.mark.parametrize("given_bits", (False, True), ids=("pruned", "given"))
@pytest.mark.parametrize("shape", SHAPES, ids=named)
def test_mma_sp_multiplies_the_masked_weight(shape, given_bits):
    out, inputs = shape
    weight = weight_of(out, inputs)
    bits = bits_of(out, inputs) if given_bits else None
    dense = masked(weight, ops.nm_mask(weight, 2, 4) if bits is None else bits).double()
    x = torch.randint(-8, 9, (8, inputs), generator=torch.Generator().manual_seed(1)).double()
    padded = torch.nn.functional.pad(x, (0, -inputs % 64))
    first, *others = packers(weight, bits, torch.bfloat16)
    for packed, meta in others:
        assert torch.equal(raw(packed), raw(first[0])) and torch.equal(meta, first[1])
    packed, meta = first
    assert packed.shape[0] % 4 == 0, "whole blocks of 64 rows"
    y = torch.zeros(16 * packed.shape[0], 8, dtype=torch.float64)
    for row_block in range(packed.shape[0]):
        accumulator = [[0.0] * 4 for _ in range(32)]
        for column_block in range(packed.shape[1]):
            for half in range(2):
                a, metadata = operands(packed, meta, row_block, column_block, half)
                k = 64 * column_block + 32 * half
                mma_sp(accumulator, a, b_fragment(padded.T[k : k + 32]), metadata, half)
        for lane in range(32):
            for i in range(4):
                row = 16 * row_block + lane // 4 + (0 if i < 2 else 8)
                y[row, lane % 4 * 2 + i % 2] = accumulator[lane][i]
    assert torch.equal(y[:out], dense @ x.T)
    assert not y[out:].any(), "padding rows are zero"


@pytest.mark.parametrize("shape", ((64, 64), (65, 132)), ids=named)
def test_wgmma_sp_takes_the_same_registers(shape):
    out, inputs = shape
    weight, columns = weight_of(out, inputs), 16
    bits = bits_of(out, inputs)
    x = torch.randint(-8, 9, (columns, inputs), generator=torch.Generator().manual_seed(2)).double()
    padded = torch.nn.functional.pad(x, (0, -inputs % 64))
    packed, meta = reference_nm.nm_pack_weight(weight, bits, torch.float16)
    for tile in range(packed.shape[0] // 4):
        accumulator = [[0.0] * (columns // 2) for _ in range(128)]
        for column_block in range(packed.shape[1]):
            for half in range(2):
                parts = [operands(packed, meta, 4 * tile + w, column_block, half) for w in range(4)]
                a, metadata = ([x for part in parts for x in part[i]] for i in (0, 1))
                k = 64 * column_block + 32 * half
                wgmma_sp(accumulator, a, padded.T[k : k + 32], metadata, half)
        expected = torch.zeros(64, columns, dtype=torch.float64)
        rows = masked(weight, bits).double()[64 * tile : 64 * tile + 64]
        expected[: len(rows)] = rows @ x.T
        for thread in range(128):
            for i in range(columns // 2):
                row = 16 * (thread // 32) + thread % 32 // 4 + (8 if i // 2 % 2 else 0)
                column = i // 4 * 8 + thread % 4 * 2 + i % 2
                assert accumulator[thread][i] == expected[row, column]


MAPS = r"""
#include "csrc/common/nm_fragments.h"

#include <cstdio>
#include <set>

using namespace sparse_cocktail;

#define CHECK(what) if (!(what)) return printf("line %d: %s\n", __LINE__, #what), 1

// Indices of a group by their definition: kept ones, then the lowest that are free, in order.
static uint32_t defined_nibble(int mask) {
  std::set<int> chosen;
  for (int i = 0; i < 4 && chosen.size() < 2; ++i) if (mask >> i & 1) chosen.insert(i);
  for (int i = 0; i < 4 && chosen.size() < 2; ++i) chosen.insert(i);
  return *chosen.begin() | *chosen.rbegin() << 2;
}

int main() {
  for (int mask = 0; mask < 16; ++mask) {
    const uint32_t nibble = nibble_of_mask(mask);
    CHECK(nibble == defined_nibble(mask) && is_legal_nibble(nibble));
    CHECK(popcount(mask) != 2 || mask_of_nibble(nibble) == uint32_t(mask));
    CHECK(nibble == nibble_of_indices(first_index(nibble), second_index(nibble)));
    const bool zero_first = popcount(mask) == 1 && (mask >> second_index(nibble) & 1);
    CHECK(padding_comes_first(mask) == zero_first);
  }
  for (int nibble = 0; nibble < 32; ++nibble) {
    bool found = false;
    for (int i = 0; i < 4; ++i) for (int j = i + 1; j < 4; ++j) found |= nibble == (i | j << 2);
    CHECK(is_legal_nibble(nibble) == found);
  }
  const int64_t out = 130, in = 200, rows = 16 * row_blocks_of(out);
  const int64_t blocks = column_blocks_of(in), columns = 32 * blocks;
  CHECK(rows == 192 && blocks == 4 && row_blocks_of(128) == 8 && column_blocks_of(1) == 1);
  std::set<int64_t> packed, meta;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const FragmentPlace place = place_of_value(row, column);
      CHECK(row_of(place) == row && column_of(place) == column);
      const int64_t index = packed_index(place, blocks);
      const FragmentPlace back = place_of_packed(index, blocks);
      CHECK(row_of(back) == row && column_of(back) == column && packed.insert(index).second);
    }
    for (int64_t group = 0; group < columns / 2; ++group) {
      const MetaPlace place = place_of_nibble(row, group);
      CHECK(row_of(place) == row && group_of(place) == group);
      CHECK(meta.insert(meta_index(place, blocks) * 32 + place.shift).second);
    }
  }
  CHECK(*packed.rbegin() == rows * columns - 1 && *meta.rbegin() == rows * columns * 2 - 4);
  // A quad puts its nibbles together: lane t owns groups t and t + 4 of each half.
  for (int q = 0; q < 4; ++q) {
    uint32_t bytes = 0, expected = 0;
    for (int t = 0; t < 4; ++t) {
      const uint32_t low = 1 + t + q, high = 8 + t + q;
      bytes |= (quad_nibbles(low, high, q) >> 8 * q & 0xff) << 8 * t;
      for (int r = 0; r < 2; ++r) {
        const MetaPlace place = place_of_nibble(8 * r + 3, q * 4 + t);
        CHECK(place.lane == 4 * 3 + q);
        expected |= (r ? high : low) << place.shift;
      }
    }
    CHECK(meta_of_quad(bytes) == expected);
  }
  return 0;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_maps_and_their_inverses_in_cpp(tmp_path):
    (tmp_path / "maps.cpp").write_text(MAPS)
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}"]
    command = ["g++", *flags, "maps.cpp", "-o", "maps"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "maps"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
