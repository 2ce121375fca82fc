// y = act(x W^T + bias) with a packed 2:4 weight on the sparse tensor cores of sm_80 and later.
//
//   x (rows, in) row-major    packed, meta: see common/nm_fragments.h    y (rows, out) row-major
//
// The sparse operand of mma.sp is the left one, so the product is y^T = W x^T: M = out, N = rows of
// x, K = in. x is then "column-major" as it lies, and a column of the result is a row of y.
//
// One CTA computes a tile of BM outputs x BN rows, in steps of 64 along `in`:
//
//          rows (BN)                          stage of shared memory, kStages of them in a ring
//        +------+------+                        values  BM/16 blocks x 1024 B  in fragment order
//   out  | warp | warp |  a warp has            x       BN rows x 128 B        swizzled
//   (BM) +------+------+  up to 64 x 64         meta    BM/16 blocks x 128 B
//        | warp | warp |  = 128 accumulators
//        +------+------+  per lane
//
// Why the weight goes through shared memory and not straight to registers: warps side by side share
// it. Loaded from global memory per warp, the same bytes would cross L1 as often (L1 and shared
// memory are one array with one 128-byte port), but a step ahead they would occupy 36 registers of
// a lane that already holds 128 accumulators, and one step is too little against 600 ns of latency.
// cp.async keeps kStages - 2 steps on their way at no register.
//
// Shared-memory traffic per step is the limit of this kernel: 128 B per clock and SM, while a
// sparse m16n8k32 takes one of the four tensor cores of an A100 for 8 clocks. For warps of 64 x 64:
//   tile        warps  values+meta  x      writes   bytes    clocks   of the MMAs
//   128 x 128   2 x 2   18 KiB      32 KiB  25 KiB   75 KiB   600      512
//   128 x 256   2 x 4   36 KiB      64 KiB  41 KiB  141 KiB  1128     1024
//   256 x 128   4 x 2   36 KiB      64 KiB  34 KiB  134 KiB  1072     1024
// A tile that is larger along `out` writes less, as the weight is the half-sized operand.
#include <algorithm>
#include <cmath>

#include "../common/nm_fragments.h"
#include "epilogue.h"

namespace sparse_cocktail {
namespace {

struct Tile {
  int out, rows;              // BM, BN
  int warps_out, warps_rows;  // how the warps share it
  int stages;
  int ctas;  // per SM that registers should allow: 2 of the 128-thread tiles

  SC_HOST_DEVICE constexpr int threads() const { return 32 * warps_out * warps_rows; }
  SC_HOST_DEVICE constexpr int blocks() const { return out / kFragmentRows; }
  SC_HOST_DEVICE constexpr int values_bytes() const { return blocks() * 1024; }
  SC_HOST_DEVICE constexpr int x_bytes() const { return rows * 128; }
  SC_HOST_DEVICE constexpr int meta_bytes() const { return blocks() * 128; }
  SC_HOST_DEVICE constexpr int stage_bytes() const {
    return values_bytes() + x_bytes() + meta_bytes();
  }
  // The finished tile is staged as (rows, out + 8): the pad moves rows to other banks.
  SC_HOST_DEVICE constexpr int result_stride() const { return 2 * (out + 8); }
  SC_HOST_DEVICE constexpr int shared_bytes() const {
    const int ring = stages * stage_bytes(), result = rows * result_stride();
    return ring > result ? ring : result;
  }
};

// Argument `tile` is the position here, counted from 1. Stages: what fits 99 KiB (sm_86, sm_89) for
// tiles meant for every card; more where a step is short, as its copies need ~1000 clocks.
constexpr Tile kTiles[] = {
    {128, 128, 2, 2, 3, 2},  // 1: 75 KiB
    {128, 256, 2, 4, 3, 1},  // 2: 123 KiB
    {64, 64, 2, 2, 6, 2},    // 3: 75 KiB, small problems
    {256, 64, 4, 1, 3, 2},   // 4: 78 KiB, few rows
    {256, 128, 4, 2, 4, 1},  // 5: 136 KiB, the least shared-memory traffic per product
    {128, 64, 2, 2, 4, 2},   // 6: 68 KiB
    {128, 32, 4, 1, 6, 2},   // 7: 78 KiB, just above the rows of the skinny kernel
};
constexpr int kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);

// CTAs run in bands of this many row tiles, `out` inside: a wave of ~132 CTAs then reads about as
// many bytes of the weight (9/16 of dense) as of x, and both stay in L2.
constexpr int kBandRows = 8;

struct Problem {
  const uint16_t* x;
  const uint16_t* packed;
  const uint32_t* meta;
  uint16_t* y;
  float* partial;  // (split, rows, out) where split > 1
  int64_t rows, in, out;
  int split;  // CTAs along `in`, each with its own sums
  Epilogue epilogue;
};

// One thread's share of copying steps from global to shared memory, in pieces of 16 bytes.
template <int tile>
struct Copier {
  static constexpr Tile kTile = kTiles[tile];
  static constexpr int kThreads = kTile.threads();
  static constexpr int kRowStep = kThreads / 8;     // 8 pieces are the 128 B of a row
  static constexpr int kBlockStep = kThreads / 64;  // 64 pieces are a block of values
  static constexpr int kXCopies = kTile.rows / kRowStep;
  static constexpr int kValueCopies = kTile.blocks() / kBlockStep;
  static constexpr int kPieces = kValueCopies + 1 + kXCopies;
  static_assert(kRowStep % 8 == 0 && kTile.rows % kRowStep == 0, "rows of a thread swizzle alike");
  static_assert(kTile.blocks() % kBlockStep == 0 && kTile.blocks() * 8 <= kThreads, "even shares");

  // Of this thread: its first row and column of x, its place in the tile's first block.
  const uint16_t* x;
  const uint16_t* values;
  const uint32_t* meta;
  int64_t row_stride;
  uint32_t block_stride;  // between row blocks of `packed`, in values
  int columns;            // from this thread's first column to the end of a row
  int valid_rows;         // of this thread's kXCopies rows of x
  int last_block;
  uint32_t x_target, values_target, meta_target;

  // The step that is being copied.
  const uint16_t* step_x;
  const uint16_t* step_values;
  const uint32_t* step_meta;
  uint32_t stage;
  int step_rows;
  uint32_t step_bytes;

  __device__ __forceinline__ Copier(const Problem& p, int64_t first_out, int64_t first_row,
                                    int64_t first_step) {
    const int thread = static_cast<int>(threadIdx.x), chunk = thread % 8, row = thread / 8;
    const int64_t column_blocks = column_blocks_of(p.in), first = first_out / kFragmentRows;
    const int64_t column = first_step * kFragmentColumns + 8 * chunk;
    row_stride = kRowStep * p.in;
    x = p.x + (first_row + row) * p.in + column;
    columns = static_cast<int>(p.in - column);
    const int64_t rows_left = p.rows - first_row - row;  // the thread takes every kRowStep-th
    valid_rows = rows_left <= 0 ? 0
                                : static_cast<int>(min((rows_left + kRowStep - 1) / kRowStep,
                                                       static_cast<int64_t>(kXCopies)));
    // Blocks past the end of the weight repeat its last one: their metadata must be legal.
    last_block = static_cast<int>(row_blocks_of(p.out) - 1 - first);
    const int64_t block = first * column_blocks + first_step;
    values = p.packed + block * kPackedOfBlock + 8 * (thread % 64);
    meta = p.meta + block * kLanesOfWarp + 4 * chunk;
    block_stride = static_cast<uint32_t>(column_blocks * kPackedOfBlock);
    x_target = kTile.values_bytes() + row * 128 + (chunk ^ row % 8) * 16;
    values_target = thread * 16;
    meta_target = kTile.values_bytes() + kTile.x_bytes() + thread * 16;
  }

  // The next pieces are of column block `step`, for the stage at `to`. Behind the last step copies
  // go on, but read nothing and write zeros that nobody uses: no branch parts the products.
  __device__ __forceinline__ void begin(uint32_t to, int step, bool inside) {
    stage = to, step_bytes = inside ? 16 : 0;
    step_x = x + static_cast<int64_t>(step) * kFragmentColumns;
    step_values = values + static_cast<int64_t>(step) * kPackedOfBlock;
    step_meta = meta + static_cast<int64_t>(step) * kLanesOfWarp;
    step_rows = inside && step * kFragmentColumns < columns ? valid_rows : 0;
  }

  __device__ __forceinline__ void copy(int piece) {
    const int thread = static_cast<int>(threadIdx.x);
    if (piece < kValueCopies) {
      const int block = min(thread / 64 + piece * kBlockStep, last_block);
      cp_async_16(stage + values_target + piece * kThreads * 16,
                  step_values + static_cast<uint64_t>(block) * block_stride, step_bytes);
    } else if (piece == kValueCopies) {
      const int block = min(thread / 8, last_block);
      cp_async_16_if(thread < kTile.blocks() * 8, stage + meta_target,
                     step_meta + static_cast<uint64_t>(block) * (block_stride / 16), step_bytes);
    } else {
      // Past the last row or column zeros are written, and nothing is read: 0 * garbage could be
      // NaN.
      const int i = piece - kValueCopies - 1;
      cp_async_16(stage + x_target + i * kRowStep * 128, step_x + i * row_stride,
                  i < step_rows ? 16 : 0);
    }
  }
};

template <class T, int tile>
__global__ void __launch_bounds__(kTiles[tile].threads(), kTiles[tile].ctas)
    nm_gemm_sm80_kernel(const Problem p) {
  constexpr Tile kTile = kTiles[tile];
  constexpr int kBlocks = kTile.blocks() / kTile.warps_out;    // of 16 outputs, of a warp
  constexpr int kColumns = kTile.rows / 8 / kTile.warps_rows;  // of 8 rows of x, of a warp
  constexpr int kStages = kTile.stages;
  constexpr int kSteps = kHalves * kColumns;  // (half, column) pairs of one stage
  constexpr int kRing = 4, kAhead = 2;        // fragments of x: loaded kAhead columns early
  static_assert(kSteps % kRing == 0 && kColumns >= kAhead && kStages >= 3, "the ring must close");

  SC_DYNAMIC_SHARED(shared);
  const uint32_t base = shared_address(shared);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_out = warp % kTile.warps_out, warp_row = warp / kTile.warps_out;

  // The tile of this CTA: bands of kBandRows row tiles, all of `out` inside a band.
  const int64_t tiles_out = (p.out + kTile.out - 1) / kTile.out;
  const int64_t tiles_rows = (p.rows + kTile.rows - 1) / kTile.rows;
  const int64_t band = blockIdx.x / (kBandRows * tiles_out);
  const int64_t in_band = blockIdx.x % (kBandRows * tiles_out);
  const int64_t height = min(static_cast<int64_t>(kBandRows), tiles_rows - band * kBandRows);
  const int64_t first_row = (band * kBandRows + in_band % height) * kTile.rows;
  const int64_t first_out = in_band / height * kTile.out;

  const int64_t column_blocks = column_blocks_of(p.in);
  const int64_t share = (column_blocks + p.split - 1) / p.split;
  const int64_t begin = min(blockIdx.y * share, column_blocks);
  const int steps = static_cast<int>(min(share, column_blocks - begin));
  Copier<tile> copier(p, first_out, first_row, begin);
  for (int s = 0; s < kStages - 1; ++s) {
    copier.begin(base + s * kTile.stage_bytes(), s, s < steps);
#pragma unroll
    for (int piece = 0; piece < Copier<tile>::kPieces; ++piece) copier.copy(piece);
    cp_async_commit();
  }

  // Where this lane finds its operands inside a stage.
  const uint32_t a_offset = warp_out * kBlocks * 1024 + lane * 16;
  const uint32_t meta_offset =
      kTile.values_bytes() + kTile.x_bytes() + warp_out * kBlocks * 128 + lane * 4;
  // ldmatrix: lanes 8i..8i+7 name rows 0..7 of the chunk i of a half. Rows are 128 B apart, and
  // chunk c of row r lies at c ^ (r % 8): eight rows of one chunk touch all banks once.
  const uint32_t b_row = kTile.values_bytes() + (warp_row * kColumns * 8 + lane % 8) * 128;
  const uint32_t b_chunk[kHalves] = {static_cast<uint32_t>((lane / 8 ^ lane % 8) * 16),
                                     static_cast<uint32_t>(((4 + lane / 8) ^ lane % 8) * 16)};

  float sums[kBlocks][kColumns][4] = {};
  uint32_t a[kHalves][kBlocks][4], b[kRing][4], meta[kBlocks], next_meta[kBlocks];

  const auto load_a = [&](uint32_t stage, int half, int block) {
    load_shared(a[half][block], stage + a_offset + block * 1024 + half * 512);
  };
  const auto load_b = [&](uint32_t stage, int step) {
    ldmatrix_x4(b[step % kRing], stage + b_row + b_chunk[step / kColumns] +
                                     step % kColumns * 8 * 128);
  };

  cp_async_wait<kStages - 2>();
  __syncthreads();
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    load_a(base, 0, block);
    meta[block] = load_shared(base + meta_offset + block * 128);
  }
#pragma unroll
  for (int step = 0; step < kAhead; ++step) load_b(base, step);

  uint32_t stage = base;
  uint32_t filled = base + (kStages - 1) * kTile.stage_bytes();  // where the next step is copied to
  const uint32_t end = base + kStages * kTile.stage_bytes();
#pragma unroll 1
  for (int k = 0; k < steps; ++k) {
    const uint32_t next = stage + kTile.stage_bytes() == end ? base : stage + kTile.stage_bytes();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int half = step / kColumns, column = step % kColumns;
      if (step == kColumns) {
        // The one barrier of a step. Behind it the next stage has landed, and every warp is done
        // with the previous one, which can be filled again.
        cp_async_wait<kStages - 3>();
        __syncthreads();
        copier.begin(filled, k + kStages - 1, k + kStages - 1 < steps);
      }
      if (half == 1) {  // spread over the columns, so that the tensor cores never wait for them
        constexpr int kPieces = Copier<tile>::kPieces;
#pragma unroll
        for (int piece = column * kPieces / kColumns; piece < (column + 1) * kPieces / kColumns;
             ++piece) {
          copier.copy(piece);
        }
      }
      // Fragments are loaded while the tensor cores are busy with earlier ones. Those of the stage
      // behind the last are loaded and never used.
      if (step + kAhead < kSteps) load_b(stage, step + kAhead);
      else load_b(next, step + kAhead - kSteps);
#pragma unroll
      for (int block = column; block < kBlocks; block += kColumns) {
        if (half == 0) {
          load_a(stage, 1, block);
        } else {
          load_a(next, 0, block);
          next_meta[block] = load_shared(next + meta_offset + block * 128);
        }
      }
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        if (half == 0) {
          mma_sp<T, 0>(sums[block][column], a[0][block], b[step % kRing], meta[block]);
        } else {
          mma_sp<T, 1>(sums[block][column], a[1][block], b[step % kRing], meta[block]);
        }
      }
    }
    cp_async_commit();
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) meta[block] = next_meta[block];
    filled = stage;
    stage = next;
  }

  cp_async_wait<0>();
  if (p.split > 1) {
    // Eight lanes write 32 consecutive bytes, a whole sector.
    float* partial = p.partial + blockIdx.y * p.rows * p.out;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int64_t out = first_out + (warp_out * kBlocks + block) * kFragmentRows + lane / 4 +
                            r / 2 * 8;
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
          const int64_t row =
              first_row + (warp_row * kColumns + column) * 8 + lane % 4 * 2 + r % 2;
          if (out < p.out && row < p.rows) {
            store_global(partial + row * p.out + out, sums[block][column][r]);
          }
        }
      }
    }
    return;
  }

  // The finished tile goes through shared memory, so that y is written 16 bytes at a time.
  __syncthreads();
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const int out = (warp_out * kBlocks + block) * kFragmentRows + lane / 4 + 8 * upper;
      const float bias =
          first_out + out < p.out ? bias_of<T>(p.epilogue, first_out + out) : 0.0f;
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int row = (warp_row * kColumns + column) * 8 + lane % 4 * 2 + odd;
          const float sum = sums[block][column][2 * upper + odd] + bias;
          store_shared(base + row * kTile.result_stride() + out * 2,
                       from_float<T>(activated(sum, p.epilogue.activation)));
        }
      }
    }
  }
  __syncthreads();
  constexpr int kChunks = kTile.out / 8, kRowsAtOnce = kTile.threads() / kChunks;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  const int64_t out = first_out + chunk * 8;
  if (out >= p.out) return;
  const bool aligned = p.out % 8 == 0;  // then 16-byte pieces of y neither split nor end early
#pragma unroll 4
  for (int row = static_cast<int>(threadIdx.x) / kChunks; row < kTile.rows; row += kRowsAtOnce) {
    if (first_row + row >= p.rows) return;
    uint32_t piece[4];
    load_shared(piece, base + row * kTile.result_stride() + chunk * 16);
    uint16_t* target = p.y + (first_row + row) * p.out + out;
    if (aligned) {
      store_global(static_cast<void*>(target), piece);
      continue;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const auto bits = static_cast<uint16_t>(piece[i / 2] >> 16 * (i % 2));
      if (out + i < p.out) store_global(target + i, bits);
    }
  }
}

}  // namespace

// ---- host ---------------------------------------------------------------------------------------

// A tile of the table, counted from 1, and over how many CTAs `in` is split. As one argument, which
// a tuner can count through: tile + 16 * (split - 1).
struct GemmPlan {
  int tile = 0, split = 1;
};
constexpr int kTileCodes = 16, kMaxSplit = 16;
static_assert(kTileCount < kTileCodes, "a tile fits its part of the argument");

// The plan that should finish first, by the shared-memory traffic at the head of this file. It is a
// model, to be replaced by a measurement. In clocks: a CTA starts and ends in about 2000; a split
// costs another launch, about 2 us.
inline GemmPlan plan_gemm_sm80(int64_t out, int64_t rows, int64_t in, int64_t multiprocessors,
                               int64_t shared_limit) {
  constexpr double kStart = 2000, kSplit = 3500, kShortest = 8;  // steps of a split
  const auto column_blocks = static_cast<double>(column_blocks_of(in));
  GemmPlan best;
  double best_clocks = 0;
  for (int i = 0; i < kTileCount; ++i) {
    const Tile& t = kTiles[i];
    if (t.shared_bytes() > shared_limit) continue;
    const double blocks = t.out / 16.0, block_bytes = 1024 + 128;
    const double read = t.warps_rows * blocks * block_bytes + t.warps_out * t.rows * 128.0;
    const double shared = (read + t.stage_bytes()) / 128;  // 128 B per clock
    const double products = t.out * t.rows * 64.0 / 2048;  // of dense size, per clock
    const double fill = t.stage_bytes() / 40.0;            // L2 gives about 40 B per clock and SM
    const double step = std::max(std::max(shared, products), fill) + 40;  // and the barrier
    const int64_t tiles = ((out + t.out - 1) / t.out) * ((rows + t.rows - 1) / t.rows);
    for (int split = 1; split <= kMaxSplit; ++split) {
      const double steps = std::ceil(column_blocks / split);
      if (split > 1 && steps < kShortest) break;
      const int64_t waves = (tiles * split + multiprocessors - 1) / multiprocessors;
      const double clocks =
          static_cast<double>(waves) * (steps * step + kStart) + (split > 1 ? kSplit : 0.0);
      if (best.tile == 0 || clocks < best_clocks) best = {i + 1, split}, best_clocks = clocks;
    }
  }
  return best;
}

template <class T, int tile = 0>
const char* launch_gemm_sm80(const Problem& p, int which, void* stream) {
  if constexpr (tile == kTileCount) {
    return "no such tile";
  } else {
    if (which != tile + 1) return launch_gemm_sm80<T, tile + 1>(p, which, stream);
    constexpr Tile t = kTiles[tile];
    const int64_t tiles = ((p.out + t.out - 1) / t.out) * ((p.rows + t.rows - 1) / t.rows);
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(p.split));
    const char* error = launch<nm_gemm_sm80_kernel<T, tile>>(
        {grid, t.threads(), t.shared_bytes()}, stream, p);
    if (error != nullptr || p.split == 1) return error;
    return add_splits<T>({p.partial, p.y, p.rows, p.out, p.split, p.epilogue}, stream);
  }
}

}  // namespace sparse_cocktail

#ifndef SC_EMULATE

#include "linear_arguments.h"

namespace sparse_cocktail {
namespace {

Tensor nm_gemm_sm80(const Tensor& x, const Tensor& packed, const Tensor& meta, int64_t out,
                    const std::optional<Tensor>& bias, int64_t activation, int64_t tile) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  LinearArguments a =
      check_linear_arguments("nm_gemm_sm80", x, packed, meta, out, bias, activation);
  GemmPlan plan{static_cast<int>(tile % kTileCodes), static_cast<int>(tile / kTileCodes) + 1};
  STD_TORCH_CHECK(tile == 0 || (tile > 0 && plan.tile >= 1 && plan.tile <= kTileCount &&
                                plan.split <= kMaxSplit),
                  a.op, ": tile is ", tile, ", but it is t + 16 * (split - 1) with t of 1..",
                  kTileCount, " and split of 1..", kMaxSplit, ", or 0 for a choice by shape");
  if (a.empty()) return a.y;
  if (tile == 0) plan = plan_gemm_sm80(out, a.rows, a.in, a.multiprocessors, a.shared_limit);
  const int needed = kTiles[plan.tile - 1].shared_bytes();
  STD_TORCH_CHECK(needed <= a.shared_limit, a.op, ": tile ", plan.tile, " needs ", needed,
                  " bytes of shared memory, and this card has ", a.shared_limit,
                  "; pass tile=0");
  std::optional<Tensor> partial;
  if (plan.split > 1) {
    partial = torch::stable::new_empty(a.x, {plan.split, a.rows, out}, ScalarType::Float);
  }
  const Problem p{a.x_data(), a.packed, a.meta, a.y_data(),
                  partial ? static_cast<float*>(partial->mutable_data_ptr()) : nullptr,
                  a.rows, a.in, a.out, plan.split, a.epilogue};
  check_launched(a, a.is_bfloat16
                        ? launch_gemm_sm80<BFloat16>(p, plan.tile, a.stream)
                        : launch_gemm_sm80<Float16>(p, plan.tile, a.stream));
  return a.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_cocktail_cuda, m) {
  m.def(
      "nm_gemm_sm80(Tensor x, Tensor packed, Tensor meta, int out, Tensor? bias, int activation, "
      "int tile) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cuda, CUDA, m) {
  m.impl("nm_gemm_sm80", TORCH_BOX(&nm_gemm_sm80));
}

}  // namespace sparse_cocktail

#endif  // SC_EMULATE
