// y = act(x W^T + bias) for 1..16 rows of x and a packed 2:4 weight, at the speed of memory.
//
//   x (rows, in) row-major    packed, meta: see common/nm_fragments.h    y (rows, out) row-major
//
// With so few rows the product only has to keep up with the weight's bytes: 1152 per block of
// 16 x 64 (9/16 of dense), against which x and y are small. A CTA of four warps takes kBlocks
// blocks of 16 outputs; its warps take turns along `in`, so that together they read one stretch:
//
//      in -->   64     64     64     64     64
//   out  16 | warp 0 | warp 1 | warp 2 | warp 3 | warp 0 | ...
//
// Each warp runs its own ring of kStages steps through cp.async and waits for none but its own
// lanes. At the end the four partial sums are added in the order of the warps. If there are more
// multiprocessors than CTAs, `in` is split over `split` CTAs as well, whose sums go through global
// memory and a second small kernel (epilogue.h).
//
// Bytes in flight: 4.8 TB/s x 600 ns / 132 multiprocessors = 22 KB per SM by Little's law; twice
// that is safe under load. Here it is (stages - 1) x 4 warps x kBlocks x 1152 B per CTA:
//   blocks  stages  shared (8 | 16 rows)  in flight per CTA  CTAs per SM of 228 KiB  per SM
//   1       6       51 | 75 KiB           23 KB              4 | 3                    92 | 69 KB
//   2       4       52 | 68 KiB           28 KB              4 | 3                   111 | 83 KB
//   4       3       66 | 78 KiB           37 KB              3 | 2                   111 | 74 KB
// All fit the 99 KiB of sm_86 and sm_89, which need less: 1 TB/s over more than 80 SMs.
//
// Larger blocks read x less often: a step of a warp reads rows x 128 B of x from L2.
#include <algorithm>

#include "../common/nm_fragments.h"
#include "epilogue.h"

namespace sparse_cocktail {
namespace {

constexpr int kWarps = 4;
constexpr int kBlockBytes = 1024 + 128;  // values and metadata of 16 outputs x 64 inputs
constexpr int kMaxRows = 16;
constexpr int kMaxSplit = 64;

SC_HOST_DEVICE constexpr int stages_of(int blocks) { return blocks == 1 ? 6 : blocks == 2 ? 4 : 3; }
SC_HOST_DEVICE constexpr int stage_bytes_of(int blocks, int columns) {
  return blocks * kBlockBytes + columns * 8 * 128;
}
// Partial sums (warps, rows, outputs + 4) come after the ring and in its place.
SC_HOST_DEVICE constexpr int sums_stride_of(int blocks) { return blocks * kFragmentRows + 4; }
SC_HOST_DEVICE constexpr int shared_bytes_of(int blocks, int columns) {
  const int ring = kWarps * stages_of(blocks) * stage_bytes_of(blocks, columns);
  const int sums = kWarps * columns * 8 * sums_stride_of(blocks) * 4;
  return ring > sums ? ring : sums;
}

struct Problem {
  const uint16_t* x;
  const uint16_t* packed;
  const uint32_t* meta;
  uint16_t* y;
  float* partial;  // (split, rows, out) where split > 1
  int64_t rows, in, out;
  int split;
  Epilogue epilogue;
};

// kColumns: 1 for up to 8 rows of x, 2 for up to 16.
template <class T, int kBlocks, int kColumns>
__global__ void __launch_bounds__(32 * kWarps, 3) nm_skinny_kernel(const Problem p) {
  constexpr int kStages = stages_of(kBlocks), kStageBytes = stage_bytes_of(kBlocks, kColumns);
  constexpr int kMeta = kBlocks * 1024, kX = kBlocks * kBlockBytes;  // offsets in a stage
  SC_DYNAMIC_SHARED(shared);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const uint32_t base = shared_address(shared);
  const uint32_t ring = base + warp * kStages * kStageBytes;

  const int64_t column_blocks = column_blocks_of(p.in);
  const int64_t first_block = static_cast<int64_t>(blockIdx.x) * kBlocks;
  const int64_t share = (column_blocks + p.split - 1) / p.split;
  const int64_t begin = min(static_cast<int64_t>(blockIdx.y) * share, column_blocks);
  const int64_t end = min(begin + share, column_blocks);
  const int steps = static_cast<int>((end - begin - warp + kWarps - 1) / kWarps);  // of this warp

  // A lane copies the very 16 bytes that it will use as its fragment, and shares of x and meta.
  const uint16_t* values = p.packed + (first_block * column_blocks + begin + warp) * kPackedOfBlock;
  const uint32_t* meta = p.meta + ((first_block + lane / 8) * column_blocks + begin + warp) *
                                      kLanesOfWarp + lane % 8 * 4;
  const int64_t x_column = (begin + warp) * kFragmentColumns + lane % 8 * 8;
  const uint16_t* x = p.x + lane / 8 * p.in + x_column;

  const auto copy = [&](uint32_t stage, int step) {
    const int64_t block = static_cast<int64_t>(step) * kWarps;  // column blocks from the first
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const uint16_t* source = values + (i * column_blocks + block) * kPackedOfBlock + lane * 8;
      cp_async_16(stage + i * 1024 + lane * 16, source);
      cp_async_16(stage + i * 1024 + 512 + lane * 16, source + 256);
    }
    if (lane < kBlocks * 8) cp_async_16(stage + kMeta + lane * 16, meta + block * kLanesOfWarp);
    // Zeros past the last column: 0 * garbage could be NaN. Rows past the last one may hold
    // anything, since each column of the product depends on its own row of x alone.
    const uint32_t bytes = x_column + block * kFragmentColumns < p.in ? 16 : 0;
    const uint16_t* source = bytes ? x + block * kFragmentColumns : p.x;
#pragma unroll
    for (int i = 0; i < 2 * kColumns; ++i) {
      const int row = 4 * i + lane / 8;
      if (row < p.rows) {
        cp_async_16(stage + kX + row * 128 + (lane % 8 ^ row % 8) * 16,
                    bytes ? source + 4 * i * p.in : source, bytes);
      }
    }
  };

  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) copy(ring + s * kStageBytes, s);
    cp_async_commit();
  }

  float sums[kBlocks][kColumns][4] = {};
  uint32_t stage = ring, filled = ring + (kStages - 1) * kStageBytes;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncwarp();  // what the other lanes copied has landed, and what they read has been read
    if (step + kStages - 1 < steps) copy(filled, step + kStages - 1);
    cp_async_commit();
    uint32_t indices[kBlocks];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      indices[i] = load_shared(stage + kMeta + i * 128 + lane * 4);
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      uint32_t b[kColumns][4];
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        const int row = column * 8 + lane % 8, chunk = half * 4 + lane / 8;
        ldmatrix_x4(b[column], stage + kX + row * 128 + (chunk ^ lane % 8) * 16);
      }
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        uint32_t a[4];
        load_shared(a, stage + i * 1024 + half * 512 + lane * 16);
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
          if (half == 0) mma_sp<T, 0>(sums[i][column], a, b[column], indices[i]);
          else mma_sp<T, 1>(sums[i][column], a, b[column], indices[i]);
        }
      }
    }
    filled = stage;
    stage = stage + kStageBytes == ring + kStages * kStageBytes ? ring : stage + kStageBytes;
  }

  // The sums of the four warps meet where the rings were.
  cp_async_wait<0>();
  __syncthreads();
  constexpr int kOutputs = kBlocks * kFragmentRows, kStride = sums_stride_of(kBlocks);
  const auto place = [&](int of_warp, int row, int out) {
    return base + static_cast<uint32_t>((of_warp * kColumns * 8 + row) * kStride + out) * 4;
  };
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        store_shared(place(warp, column * 8 + lane % 4 * 2 + r % 2, i * 16 + lane / 4 + r / 2 * 8),
                     sums[i][column][r]);
      }
    }
  }
  __syncthreads();
  const int count = static_cast<int>(p.rows) * kOutputs;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 32 * kWarps) {
    const int row = i / kOutputs;
    const int64_t out = first_block * kFragmentRows + i % kOutputs;
    if (out >= p.out) continue;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += load_shared_float(place(w, row, i % kOutputs));
    if (p.split > 1) {
      store_global(p.partial + (blockIdx.y * p.rows + row) * p.out + out, sum);
      continue;
    }
    sum = activated(sum + bias_of<T>(p.epilogue, out), p.epilogue.activation);
    store_global(p.y + row * p.out + out, from_float<T>(sum));
  }
}

}  // namespace

// ---- host ---------------------------------------------------------------------------------------

struct SkinnyPlan {
  int blocks = 1, split = 1;
};

// The plan whose busiest multiprocessor is done first, in bytes of HBM. A model, not a measurement:
// x comes from L2 at half the cost, starting a CTA costs as much as 16 KB, a split another launch
// (2 us, 72 KB of an H200's multiprocessor), and memory is slow while fewer than 44 KB per
// multiprocessor are on their way. `split` > 0 is kept as it is given.
inline SkinnyPlan plan_skinny(int64_t out, int64_t in, int64_t rows, int64_t multiprocessors,
                              int64_t split) {
  constexpr double kStart = 16e3, kSplit = 72e3, kFlight = 44e3;
  const int64_t column_blocks = column_blocks_of(in);
  // Every warp of a split should have a step.
  const int64_t most = std::min<int64_t>(kMaxSplit / 2, column_blocks / kWarps);
  const int64_t first = split > 0 ? split : 1, last = std::max(first, split > 0 ? split : most);
  SkinnyPlan best;
  double best_bytes = 0;
  for (const int blocks : {4, 2, 1}) {
    const int64_t groups = (out + blocks * kFragmentRows - 1) / (blocks * kFragmentRows);
    for (int64_t ways = first; ways <= last; ++ways) {
      const double steps = static_cast<double>((column_blocks + ways - 1) / ways);
      const double cta = kStart + steps * (blocks * kBlockBytes + 0.5 * rows * 128.0);
      const int64_t count = groups * ways;
      const auto ctas = static_cast<double>((count + multiprocessors - 1) / multiprocessors);
      const double flight =
          std::min(ctas, 3.0) * kWarps * (stages_of(blocks) - 1) * blocks * kBlockBytes;
      const double bytes =
          ctas * cta / std::min(1.0, flight / kFlight) + (ways > 1 ? kSplit : 0.0);
      if (best_bytes == 0 || bytes < best_bytes) {
        best = {blocks, static_cast<int>(ways)}, best_bytes = bytes;
      }
    }
  }
  return best;
}

template <class T, int blocks, int columns>
const char* launch_skinny_as(const Problem& p, void* stream) {
  constexpr int kTile = blocks * kFragmentRows;
  const dim3 grid(static_cast<unsigned>((p.out + kTile - 1) / kTile),
                  static_cast<unsigned>(p.split));
  const char* error = launch<nm_skinny_kernel<T, blocks, columns>>(
      {grid, 32 * kWarps, shared_bytes_of(blocks, columns)}, stream, p);
  if (error != nullptr || p.split == 1) return error;
  return add_splits<T>({p.partial, p.y, p.rows, p.out, p.split, p.epilogue}, stream);
}

// `p.split` and `blocks` as planned; p.partial has room for split x rows x out where split > 1.
template <class T>
const char* launch_skinny(const Problem& p, int blocks, void* stream) {
  const bool wide = p.rows > 8;
  if (blocks == 1) {
    return wide ? launch_skinny_as<T, 1, 2>(p, stream) : launch_skinny_as<T, 1, 1>(p, stream);
  }
  if (blocks == 2) {
    return wide ? launch_skinny_as<T, 2, 2>(p, stream) : launch_skinny_as<T, 2, 1>(p, stream);
  }
  return wide ? launch_skinny_as<T, 4, 2>(p, stream) : launch_skinny_as<T, 4, 1>(p, stream);
}

}  // namespace sparse_cocktail

#ifndef SC_EMULATE

#include "linear_arguments.h"

namespace sparse_cocktail {
namespace {

Tensor nm_skinny(const Tensor& x, const Tensor& packed, const Tensor& meta, int64_t out,
                 const std::optional<Tensor>& bias, int64_t activation, int64_t split) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  LinearArguments a = check_linear_arguments("nm_skinny", x, packed, meta, out, bias, activation);
  STD_TORCH_CHECK(a.rows <= kMaxRows, a.op, ": x has ", a.rows, " rows, but it has at most ",
                  kMaxRows, "; use nm_gemm_sm80");
  STD_TORCH_CHECK(split >= 0 && split <= kMaxSplit, a.op, ": split is ", split, ", but it is 1..",
                  kMaxSplit, ", or 0 for a choice by shape");
  if (a.empty()) return a.y;
  const SkinnyPlan plan = plan_skinny(out, a.in, a.rows, a.multiprocessors, split);
  std::optional<Tensor> partial;
  if (plan.split > 1) {
    partial = torch::stable::new_empty(a.x, {plan.split, a.rows, out}, ScalarType::Float);
  }
  const Problem p{a.x_data(), a.packed, a.meta, a.y_data(),
                  partial ? static_cast<float*>(partial->mutable_data_ptr()) : nullptr,
                  a.rows, a.in, a.out, plan.split, a.epilogue};
  check_launched(a, a.is_bfloat16 ? launch_skinny<BFloat16>(p, plan.blocks, a.stream)
                                  : launch_skinny<Float16>(p, plan.blocks, a.stream));
  return a.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_cocktail_cuda, m) {
  m.def(
      "nm_skinny(Tensor x, Tensor packed, Tensor meta, int out, Tensor? bias, int activation, "
      "int split) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cuda, CUDA, m) {
  m.impl("nm_skinny", TORCH_BOX(&nm_skinny));
}

}  // namespace sparse_cocktail

#endif  // SC_EMULATE
