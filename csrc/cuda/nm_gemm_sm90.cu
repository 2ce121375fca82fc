// y = act(x W^T + bias) on Hopper's sparse tensor cores, W packed 2:4 (csrc/common/nm_fragments.h).
//
// wgmma.sp takes its sparse operand first, so the kernel computes y^T = W x^T: "out" counts rows of
// W, "rows" counts rows of x. One CTA makes tiles of kOut x kRows:
//
//                   rows of x, kRows           one producer thread: TMA copies x tiles of kRows x
//                  +----------------+          64, 128-byte swizzled, into a ring of shared memory
//      warpgroup 0 |  64 kBlocks    |  kOut    with full and empty mbarriers
//      warpgroup 1 |  64 kBlocks    |          consumer warpgroups: W from L2 into registers,
//                  +----------------+          wgmma.sp, epilogue
//
// gemm_sm90_tiles.h says why W goes to registers, and which tiles there are.
#include <atomic>

#include "epilogue.h"
#include "gemm_sm90_tiles.h"
#include "ptx_sm90.h"

namespace sparse_cocktail {
namespace {

using namespace sm90;

// A product, and how it is cut.
struct Problem {
  const uint16_t* x;  // only the tensor map reads it
  const uint16_t* packed;
  const uint32_t* meta;
  uint16_t* y;
  int rows, in, out;
  Epilogue epilogue;
};
struct Plan {
  int steps;         // column blocks of 64
  int out_blocks;    // row blocks of 64
  int clusters_out;  // clusters along out
  int tiles_rows;    // tiles along rows
  int strip;         // clusters along out that take turns before rows move on
};

// ---- device -------------------------------------------------------------------------------------

#if SC_SM90A

// Two numbers as one register, the first in its low half.
template <class T>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  return from_float<T>(low) | static_cast<uint32_t>(from_float<T>(high)) << 16;
}

struct Place {
  int cluster_out, tile_rows;
};

// Tiles that run at the same time should share rows of W and of x in L2: they fill a strip of
// `strip` clusters along out before they move on to the next rows.
__device__ __forceinline__ Place place_of(int index, const Plan& plan) {
  const int first = index / (plan.strip * plan.tiles_rows) * plan.strip;
  const int wide = min(plan.strip, plan.clusters_out - first);
  const int inside = index - first * plan.tiles_rows;
  return {first + inside % wide, inside / wide};
}
__device__ __forceinline__ int tiles_of(const Plan& plan) {
  return plan.clusters_out * plan.tiles_rows;
}

// The matrix descriptor of a K-major tile with rows of 128 bytes and the 128-byte swizzle: address
// in units of 16 bytes, 1024 bytes from 8 rows to the next 8; the leading offset does not count.
__device__ __forceinline__ uint64_t swizzled_operand(const void* tile) {
  constexpr uint64_t kSwizzle128 = 1, kUnit = 16;
  return (shared_address(tile) & 0x3ffff) / kUnit | uint64_t{1} << 16 |
         kSwizzlePeriod / kUnit << 32 | kSwizzle128 << 62;
}

// A position in the ring; the parity flips with every round.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Shared memory, in order: the ring of x tiles, the output tile, full and empty barriers.
template <class Tile>
struct Shared {
  uint8_t* base;
  __device__ uint8_t* stage(int i) const { return base + i * Tile::kStageBytes; }
  __device__ uint8_t* output() const { return base + Tile::kStages * Tile::kStageBytes; }
  __device__ uint64_t* full(int i) const {
    return reinterpret_cast<uint64_t*>(output() + Tile::kOutputBytes) + i;
  }
  __device__ uint64_t* empty(int i) const { return full(Tile::kStages + i); }
};

// Copies x tiles for all tiles of this CTA. Rows and columns beyond x arrive as zeros, and count as
// bytes like any others.
template <class Tile>
__device__ __forceinline__ void produce(const CUtensorMap& map, const Plan& plan,
                                        const Shared<Tile>& shared, int first, int stride,
                                        int rank) {
  constexpr bool kCopiesToAll = Tile::kCluster > 1;
  Ring<Tile::kStages> ring;
  for (int index = first; index < tiles_of(plan); index += stride) {
    const int row = place_of(index, plan).tile_rows * Tile::kRows + rank * Tile::kBoxRows;
    for (int step = 0; step < plan.steps; ++step, ring.advance()) {
      uint64_t* full = shared.full(ring.stage);
      uint8_t* target = shared.stage(ring.stage) + rank * Tile::kBoxRows * kStepBytes;
      // The parity "before the first" passes at once: the ring starts out empty.
      barrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
      // All bytes of the stage are announced here, also those that other CTAs send. They may land
      // before this: the count of bytes goes below zero, the arrival still holds the phase.
      barrier_arrive_expecting(full, Tile::kStageBytes);
      if constexpr (kCopiesToAll) {
        constexpr uint16_t kAll = (1 << Tile::kCluster) - 1;
        copy_box_to_all(target, &map, full, step * kStepColumns, row, kAll);
      } else {
        copy_box(target, &map, full, step * kStepColumns, row);
      }
    }
  }
}

// One consumer warpgroup: its blocks of W in flight, its sums.
template <class T, class Tile>
struct Consumer {
  static constexpr int kBlocks = Tile::kBlocks, kDepth = Tile::kDepth, kSums = Tile::kSums;
  static constexpr uint32_t kStepLoads = kPackedOfBlock / kPartsOfLane;  // 16 bytes each: 64

  const Problem& problem;
  const Plan& plan;
  const Shared<Tile>& shared;
  const int group, warp, lane;  // warpgroup in the CTA, warp in the warpgroup
  Ring<Tile::kStages> ring;
  uint32_t next[kBlocks];  // this lane's next 16 bytes of each block, counted from `packed`
  uint32_t values[kDepth][kBlocks][kHalves][4];
  uint32_t indices[kDepth][kBlocks];
  float sums[kBlocks][kSums];

  __device__ __forceinline__ Consumer(const Problem& problem, const Plan& plan,
                                      const Shared<Tile>& shared, int warp, int lane)
      : problem(problem), plan(plan), shared(shared), group(warp / kWarpsOfGroup),
        warp(warp % kWarpsOfGroup), lane(lane) {}

  __device__ __forceinline__ int first_block(int cluster_out, int rank) const {
    return ((cluster_out * Tile::kCluster + rank) * Tile::kConsumers + group) * kBlocks;
  }

  // One 32-bit number per block says where a load goes: pointers would take registers that the sums
  // of the largest tile need.
  __device__ __forceinline__ void load(int slot) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        load_weights(values[slot][b][half],
                     problem.packed + size_t{next[b]} * kPartsOfLane + half * kPackedOfBlock / 2);
      }
      // a block has 64 loads of values and 32 words of metadata
      load_meta(indices[slot][b], problem.meta + (next[b] + lane) / 2);
      next[b] += kStepLoads;
    }
  }

  // Starts loading a tile. Blocks beyond W repeat the last one; their sums are never stored.
  __device__ __forceinline__ void start(int block) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int row_block = min(block + b, plan.out_blocks - 1) * kWarpsOfGroup + warp;
      next[b] = static_cast<uint32_t>(packed_index(row_block, 0, 0, lane, plan.steps) /
                                      kPartsOfLane);
    }
#pragma unroll
    for (int slot = 0; slot < kDepth - 1; ++slot) {
      if (slot < plan.steps) load(slot);
    }
  }

  // Every warp reports for itself, to every CTA that writes this stage.
  __device__ __forceinline__ void release(int stage) {
    if constexpr (Tile::kCluster > 1) {
      if (lane < Tile::kCluster) barrier_arrive_at(shared.empty(stage), lane);
    } else {
      if (lane == 0) barrier_arrive(shared.empty(stage));
    }
  }

  __device__ __forceinline__ void multiply(int slot, int stage) {
    const uint64_t x = swizzled_operand(shared.stage(stage));
    constexpr uint64_t kNextHalf = kHalfColumns * 2 >> 4;  // 64 bytes on in every row
    wgmma_fence();
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      SparseProduct<T, 0, kSums>::add(sums[b], values[slot][b][0], x, indices[slot][b]);
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      SparseProduct<T, 1, kSums>::add(sums[b], values[slot][b][1], x + kNextHalf,
                                      indices[slot][b]);
    }
    wgmma_commit();
  }

  // All steps of a tile. One step's products run while the next one is issued: only behind the wait
  // are the registers and the stage of the step before free again.
  __device__ __forceinline__ void run() {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[b][i] = 0.0f;
    }
    int last = 0;
    for (int step = 0; step < plan.steps; step += kDepth) {
#pragma unroll
      for (int slot = 0; slot < kDepth; ++slot) {
        if (step + slot < plan.steps) {
          barrier_wait(shared.full(ring.stage), ring.parity);
          multiply(slot, ring.stage);
          wgmma_wait<1>();
          if (step + slot > 0) release(last);
          last = ring.stage;
          ring.advance();
          if (step + slot + kDepth - 1 < plan.steps) load((slot + kDepth - 1) % kDepth);
        }
      }
    }
    wgmma_wait<0>();
    release(last);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) wgmma_settled(sums[b]);
  }

  // Writes the tile: sums (out x rows) become 16-bit numbers, go through shared memory transposed,
  // and leave as 128 contiguous bytes per row and block. The output tile is swizzled as x is, so
  // that neither side has bank conflicts. Only threads of this warpgroup touch it, and no copy
  // engine does: two barriers of 128 threads suffice, and no fence between proxies is needed.
  __device__ __forceinline__ void store(int block, int row) {
    constexpr int kBlockBytes = Tile::kRows * kStepBytes;
    uint8_t* output = shared.output() + group * kBlocks * kBlockBytes;
    named_barrier(1 + group, kWarpgroup);  // the last tile has been read
    // Lane 8i + r addresses row r + 8 (i / 2) of 16 and the 16 bytes of out 8 (i % 2) .. + 7.
    const int at_row = lane % 8 + lane / 16 * 8, at_chunk = 2 * warp + lane / 8 % 2;
    uint8_t* const at = output + at_row * kStepBytes + ((at_chunk ^ lane % 8) << 4);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      finish(sums[b], (block + b) * kRowPadding + warp * kFragmentRows + lane / 4);
#pragma unroll
      for (int i = 0; i < kSums; i += 8) {
        store_transposed(at + b * kBlockBytes + i / 8 * 16 * kStepBytes,
                         pair_of<T>(sums[b][i], sums[b][i + 1]),
                         pair_of<T>(sums[b][i + 2], sums[b][i + 3]),
                         pair_of<T>(sums[b][i + 4], sums[b][i + 5]),
                         pair_of<T>(sums[b][i + 6], sums[b][i + 7]));
      }
    }
    named_barrier(1 + group, kWarpgroup);
    const int thread = warp * kLanesOfWarp + lane, chunk = thread % 8, first = thread / 8;
    for (int b = 0; b < kBlocks; ++b) {
      const int out = (block + b) * kRowPadding + chunk * 8;
      const int count = min(8, problem.out - out);
      if (count <= 0) continue;
#pragma unroll 4
      for (int r = first; r < Tile::kRows && row + r < problem.rows; r += kWarpgroup / 8) {
        uint32_t eight[4];
        load_shared(eight, shared_address(output + b * kBlockBytes + r * kStepBytes) +
                               ((chunk ^ r % 8) << 4));
        store_eight(problem.y + static_cast<int64_t>(row + r) * problem.out + out, eight, count);
      }
    }
    __syncwarp();  // rows differ between lanes, and what follows wants the whole warp
  }

  // Bias and activation in fp32; the thread's sums are of rows `out` and `out` + 8 of W. One branch
  // per tile and not per sum: hence three loops.
  __device__ __forceinline__ void finish(float (&sum)[kSums], int out) const {
    const float low = out < problem.out ? bias_of<T>(problem.epilogue, out) : 0.0f;
    const float high = out + 8 < problem.out ? bias_of<T>(problem.epilogue, out + 8) : 0.0f;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] += i & 2 ? high : low;
    if (problem.epilogue.activation == kRelu) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum[i] = activated(sum[i], kRelu);
    } else if (problem.epilogue.activation == kGelu) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum[i] = activated(sum[i], kGelu);
    }
  }

  // 16 bytes where rows of y are multiples of 16 bytes, else number by number.
  __device__ __forceinline__ void store_eight(uint16_t* y, const uint32_t (&eight)[4], int count) {
    if (problem.out % 8 == 0) {
      store_global(y, eight);
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) store_global(y + i, static_cast<uint16_t>(eight[i / 2] >> 16 * (i % 2)));
    }
  }
};

template <class T, class Tile>
__device__ __forceinline__ void consume(const Problem& problem, const Plan& plan,
                                        const Shared<Tile>& shared, int first, int stride,
                                        int rank, int thread) {
  // The same number in every lane by construction: what depends on it can be uniform registers.
  const int warp = __shfl_sync(0xffffffffu, thread / kLanesOfWarp, 0);
  Consumer<T, Tile> consumer(problem, plan, shared, warp, thread % kLanesOfWarp);
  Place place = place_of(first, plan);
  int block = consumer.first_block(place.cluster_out, rank);
  consumer.start(block);
  for (int index = first; index < tiles_of(plan);) {
    consumer.run();
    const Place done = place;
    const int done_block = block;
    index += stride;
    if (index < tiles_of(plan)) {  // the weights of the next tile travel during the epilogue
      place = place_of(index, plan);
      block = consumer.first_block(place.cluster_out, rank);
      consumer.start(block);
    }
    consumer.store(done_block, done.tile_rows * Tile::kRows);
  }
}
#endif  // SC_SM90A

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident)
    nm_gemm_sm90_kernel(const __grid_constant__ CUtensorMap map,
                        const __grid_constant__ Problem problem,
                        const __grid_constant__ Plan plan) {
#if SC_SM90A
  SC_DYNAMIC_SHARED(memory);
  const Shared<Tile> shared{memory};
  const int thread = static_cast<int>(threadIdx.x);
  const int rank = Tile::kCluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int first = static_cast<int>(blockIdx.x) / Tile::kCluster;
  const int stride = static_cast<int>(gridDim.x) / Tile::kCluster;
  if (thread == 0) {
    prefetch_map(&map);
    for (int i = 0; i < Tile::kStages; ++i) {
      barrier_init(shared.full(i), 1);
      barrier_init(shared.empty(i), Tile::kCluster * Tile::kConsumers * kWarpsOfGroup);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if constexpr (Tile::kCluster > 1) cluster_sync();  // before anything arrives from other CTAs

  if (thread >= Tile::kConsumers * kWarpgroup) {
    if constexpr (Tile::kMovesRegisters) give_registers<24>();
    if (thread == Tile::kConsumers * kWarpgroup) {
      produce<Tile>(map, plan, shared, first, stride, rank);
    }
    __syncwarp();
  } else {
    if constexpr (Tile::kMovesRegisters) take_registers<240>();
    consume<T, Tile>(problem, plan, shared, first, stride, rank, thread);
  }
  // Other CTAs still arrive at barriers of this one: none may leave alone.
  if constexpr (Tile::kCluster > 1) cluster_sync();
#endif
}

// ---- host ---------------------------------------------------------------------------------------

// Clusters that run at the same time; 0 where the kernel was compiled for sm_90 and not sm_90a, and
// so is empty. A grid of more would leave some clusters to run alone at the end: SMs come in groups
// of 16 or 18, and 132 of them hold 66 clusters of two, but not always 33 of four.
template <class T, class Tile>
int resident_clusters(int multiprocessors) {
  const int most = std::max(multiprocessors * Tile::kResident / Tile::kCluster, 1);
#ifdef SC_EMULATE
  return most;
#else
  constexpr int kDevices = 64, kEmptyRegisters = 32;
  static std::atomic<int> known[kDevices];  // plus one; asking takes microseconds
  int device = 0;
  cudaGetDevice(&device);
  int found = known[device % kDevices] - 1;
  if (found >= 0) return std::min(found, most);
  const auto kernel = nm_gemm_sm90_kernel<T, Tile>;
  cudaFuncAttributes attributes{};
  cudaFuncGetAttributes(&attributes, kernel);
  found = attributes.numRegs < kEmptyRegisters ? 0 : most;
  if (found > 0 && Tile::kCluster > 1) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {Tile::kCluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(most * Tile::kCluster));
    config.blockDim = dim3(Tile::kThreads);
    config.dynamicSmemBytes = Tile::kSharedBytes;
    config.attrs = &attribute, config.numAttrs = 1;
    int fitting = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&fitting, kernel, &config);
    if (error == cudaSuccess && fitting > 0) found = std::min(fitting, most);
  }
  cudaGetLastError();  // what hinders the launch, the launch will report
  known[device % kDevices] = found + 1;
  return found;
#endif
}

// Describes x (rows, in) for copies of `box_rows` rows of 64 columns. Null, or what went wrong.
#ifdef SC_EMULATE
inline const char* describe(CUtensorMap& map, const Problem& p, bool, int box_rows) {
  return encode_map(map, p.x, p.in, p.rows, 2 * static_cast<uint64_t>(p.in), kStepColumns,
                    box_rows);
}
#else
inline const char* describe(CUtensorMap& map, const Problem& p, bool bfloat16, int box_rows) {
  // The driver has this function and the runtime has not: asked for here, nothing links libcuda.
  static void* const encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr;
  }();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled; update it to CUDA 12";
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(p.in), static_cast<cuuint64_t>(p.rows)};
  const cuuint64_t stride[1] = {2 * static_cast<cuuint64_t>(p.in)};
  const cuuint32_t box[2] = {kStepColumns, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult result = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(encode)(
      &map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<uint16_t*>(p.x), size, stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);  // NONE fills with zeros
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused x";
}
#endif

// Null, or what went wrong. The tensor map travels in the launch by value, as graphs need it.
template <class T, class Tile>
const char* launch_tile(const Problem& p, int multiprocessors, void* stream) {
  const auto pieces = [](int64_t whole, int64_t part) {
    return static_cast<int>((whole + part - 1) / part);
  };
  constexpr int kStripRows = 2048;  // of W: a wave of 132 tiles reads it and about 2048 rows of x
  Plan plan{};
  plan.steps = static_cast<int>(column_blocks_of(p.in));
  plan.out_blocks = pieces(p.out, kRowPadding);
  plan.clusters_out = pieces(p.out, Tile::kOut * Tile::kCluster);
  plan.tiles_rows = pieces(p.rows, Tile::kRows);
  plan.strip = kStripRows / (Tile::kOut * Tile::kCluster);
  const int64_t tiles = int64_t{plan.clusters_out} * plan.tiles_rows;
  const int64_t clusters = std::min<int64_t>(tiles, resident_clusters<T, Tile>(multiprocessors));
  if (clusters == 0) return "this build has no code for sm_90a; add 90a to the architectures";
  CUtensorMap map;
  if (const char* error = describe(map, p, std::is_same_v<T, BFloat16>, Tile::kBoxRows)) {
    return error;
  }
  return launch<nm_gemm_sm90_kernel<T, Tile>>(
      {dim3(static_cast<unsigned>(clusters * Tile::kCluster)), Tile::kThreads, Tile::kSharedBytes,
       Tile::kCluster},
      stream, map, p, plan);
}

// `tile` is 1 ... kTiles, or 0 for the one that is estimated to be fastest.
template <class T>
const char* launch_gemm_sm90(const Problem& p, int tile, int multiprocessors, void* stream) {
  switch (tile == 0 ? choose_tile(p.out, p.rows, p.in, multiprocessors) : tile) {
    case 1: return launch_tile<T, Tile1>(p, multiprocessors, stream);
    case 2: return launch_tile<T, Tile2>(p, multiprocessors, stream);
    case 3: return launch_tile<T, Tile3>(p, multiprocessors, stream);
    case 4: return launch_tile<T, Tile4>(p, multiprocessors, stream);
    case 5: return launch_tile<T, Tile5>(p, multiprocessors, stream);
    case 6: return launch_tile<T, Tile6>(p, multiprocessors, stream);
    case 7: return launch_tile<T, Tile7>(p, multiprocessors, stream);
    case 8: return launch_tile<T, Tile8>(p, multiprocessors, stream);
  }
  return "no such tile";
}

}  // namespace
}  // namespace sparse_cocktail

#ifndef SC_EMULATE

#include "linear_arguments.h"

namespace sparse_cocktail {
namespace {

Tensor nm_gemm_sm90(const Tensor& x, const Tensor& packed, const Tensor& meta, int64_t out,
                    const std::optional<Tensor>& bias, int64_t activation, int64_t tile) {
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  LinearArguments a =
      check_linear_arguments("nm_gemm_sm90", x, packed, meta, out, bias, activation);
  const int minor = device_attribute(a.op, cudaDevAttrComputeCapabilityMinor, device);
  STD_TORCH_CHECK(a.major == 9 && minor == 0, a.op, ": cuda:", device,
                  " has compute capability ", a.major, ".", minor,
                  ", but wgmma.sp exists on 9.0 alone (H100, H200); use nm_gemm_sm80");
  STD_TORCH_CHECK(tile >= 0 && tile <= kTiles, a.op, ": tile is ", tile, ", but it is 1..", kTiles,
                  ", or 0 for a choice by shape");
  constexpr int64_t kMost = int64_t{1} << 30;  // leaves room to round up to tiles
  constexpr int64_t kMostBlocks = int64_t{1} << 26;  // 64 GiB: loads are counted in 32 bits
  STD_TORCH_CHECK(a.rows <= kMost && out <= kMost &&
                      row_blocks_of(out) * column_blocks_of(a.in) < kMostBlocks,
                  a.op, ": x has shape ", to_string(x.sizes()), " and out=", out,
                  ", but rows and out stay within 2^30 and the packed weight below 64 GiB; split "
                  "the product");
  if (a.empty()) return a.y;
  STD_TORCH_CHECK(a.in > 0, a.op, ": x has in=0, but a tensor map needs a column; use nm_linear");
  const Problem p{a.x_data(), a.packed, a.meta, a.y_data(), static_cast<int>(a.rows),
                  static_cast<int>(a.in), static_cast<int>(out), a.epilogue};
  const int number = static_cast<int>(tile);
  check_launched(a, a.is_bfloat16
                        ? launch_gemm_sm90<BFloat16>(p, number, a.multiprocessors, a.stream)
                        : launch_gemm_sm90<Float16>(p, number, a.multiprocessors, a.stream));
  return a.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_cocktail_cuda, m) {
  m.def(
      "nm_gemm_sm90(Tensor x, Tensor packed, Tensor meta, int out, Tensor? bias, int activation, "
      "int tile) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cuda, CUDA, m) {
  m.impl("nm_gemm_sm90", TORCH_BOX(&nm_gemm_sm90));
}

}  // namespace sparse_cocktail

#endif  // SC_EMULATE
