// Prune + compress + pack: a weight (out, in) to the packed 2:4 format of nm_fragments.h, with one
// read of the weight and nothing but registers in between.
//
//   weight  fp32 | bf16 | fp16  (out, in), any strides     bits  int32 (out, ceil(in / 32)) or none
//   packed  bf16 | fp16         (MB, KB, 2, 32, 8)         meta  int32 (MB, KB, 32)
//
// A warp makes whole blocks of 16 rows and 64 columns. Lane 4 g + t owns what its own A registers
// hold, so no value moves between lanes:
//
//                 columns of one half     t = 0     1     2     3  |  0     1     2     3
//     row g       registers 0 | 2         [0..3] [4..7]   ...      | [16..19] ...
//     row g + 8   registers 1 | 3         a group of four weights is one load of 16 or 8 bytes
//
// which is eight groups per lane and block. Only nibbles change lanes: two shuffles give the lanes
// of a quad their metadata words.
//
// Bytes in flight. 4.8 TB/s for some 800 ns are 3.8 MB on the way, 29 KB for each of an H200's 132
// SMs. A warp asks for all it needs before it looks at any: 4 KB, one block of fp32 or two of 16
// bits. Three CTAs of eight warps on an SM have up to 96 KB outstanding, three times the need: at
// any moment many warps compute or store.
//
// Instructions. A block takes a warp 364 of them (16 bits) or 576 (fp32), counted in the machine
// code for sm_90a, of the 620 or 1010 that the four schedulers of an SM issue while it passes.
#include "../common/nm_fragments.h"
#include "launch.h"
#include "ptx.h"

namespace sparse_cocktail {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kLanesOfWarp;
constexpr int kCtas = 3;  // on an SM at least: 80 registers, of which a lane's loads take 32
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kLaneGroups = 2 * kHalves * 2;  // of a lane in one block: [half][right 16][row]

// A group of four weights as it is loaded, and its weights as bits, zero-extended.
struct Group32 {
  using Bits = uint32_t;
  uint4 raw{0, 0, 0, 0};

  __device__ uint32_t at(int i) const {
    return i == 0 ? raw.x : i == 1 ? raw.y : i == 2 ? raw.z : raw.w;
  }
  __device__ void load(const Bits* p) { raw = __ldg(reinterpret_cast<const uint4*>(p)); }
  __device__ void load(const Bits* p, int64_t stride) {
    raw = make_uint4(__ldg(p), __ldg(p + stride), __ldg(p + 2 * stride), __ldg(p + 3 * stride));
  }
};
struct Group16 {
  using Bits = uint16_t;
  uint2 raw{0, 0};

  __device__ uint32_t at(int i) const {
    const uint32_t pair = i < 2 ? raw.x : raw.y;
    return i % 2 ? pair >> 16 : pair & 0xffffu;
  }
  __device__ void load(const Bits* p) { raw = __ldg(reinterpret_cast<const uint2*>(p)); }
  __device__ void load(const Bits* p, int64_t stride) {
    const uint32_t w1 = __ldg(p + stride), w3 = __ldg(p + 3 * stride);
    raw = make_uint2(__ldg(p) | w1 << 16, __ldg(p + 2 * stride) | w3 << 16);
  }
};
template <class F>
using GroupOf = std::conditional_t<sizeof(typename F::Raw) == 4, Group32, Group16>;

// How a kernel gets at a weight. The first two need a group to be one aligned load.
enum class Source { kPruned, kGiven, kStrided };

// Blocks that a warp loads at once: 4 KB of them, where the lanes' registers allow for it.
template <class F, class To, Source source>
constexpr int kBlocksOfWarp = std::is_same_v<F, To> && source != Source::kStrided ? 2 : 1;

struct PackArguments {
  const void* weight;
  const uint32_t* bits;  // null: keep the two largest of four
  int64_t row_stride, in_stride;
  int out, in, column_blocks, blocks;
  uint4* packed;
  uint32_t* meta;
};

// key_of<F> on zero-extended bits.
template <class F>
__device__ __forceinline__ int32_t wide_key(uint32_t raw) {
  return min(static_cast<int32_t>(raw & static_cast<uint32_t>(F::kMagnitude)),
             static_cast<int32_t>(F::kNaN));
}

// float32_of and packed_number on zero-extended bits. The hardware converts numbers; NaN keep their
// sign and payload, as on the host.
template <class F>
__device__ __forceinline__ uint32_t wide_float(uint32_t raw) {
  if constexpr (std::is_same_v<F, Float32>) return raw;
  if constexpr (std::is_same_v<F, BFloat16>) return raw << 16;
  const uint32_t nan = (raw & 0x8000u) << 16 | 0x7fc00000u | (raw & 0x3ffu) << 13;
  const uint32_t wide = __float_as_uint(to_float<Float16>(static_cast<uint16_t>(raw)));
  return (raw & 0x7fffu) > 0x7c00u ? nan : wide;
}
template <class F, class To>
__device__ __forceinline__ uint32_t wide_number(uint32_t raw) {
  if constexpr (std::is_same_v<F, To>) return raw;
  constexpr bool kToBf16 = std::is_same_v<To, BFloat16>;
  const uint32_t wide = wide_float<F>(raw);
  const uint32_t nan =
      kToBf16 ? wide >> 16 | 0x40u : (wide >> 16 & 0x8000u) | 0x7e00u | (wide >> 13 & 0x3ffu);
  const uint32_t rounded = from_float<To>(__uint_as_float(wide));
  return (wide & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
}

// The values of a group as one register, the first in its low half, and its nibble.
struct Kept {
  uint32_t values, nibble;
};

template <class F, class To, class Group>
__device__ __forceinline__ Kept keep_largest(const Group& group) {
  const LargestTwo two = largest_two(wide_key<F>(group.at(0)), wide_key<F>(group.at(1)),
                                     wide_key<F>(group.at(2)), wide_key<F>(group.at(3)));
  if constexpr (std::is_same_v<F, To>) {  // 16 bits stay as they are: two bytes each are picked
    const uint32_t one_each =
        (two.first_odd ? 0x5432u : 0x5410u) + (two.second_odd ? 0x2200u : 0u);
    const uint32_t bytes = two.left_pair ? 0x3210u : two.right_pair ? 0x7654u : one_each;
    return {__byte_perm(group.raw.x, group.raw.y, bytes), two.nibble()};
  } else {
    const bool odd0 = two.first_odd && !two.left_pair, odd1 = two.second_odd || two.right_pair;
    const uint32_t first = two.right_pair ? group.at(2) : odd0 ? group.at(1) : group.at(0);
    const uint32_t second = two.left_pair ? group.at(1) : odd1 ? group.at(3) : group.at(2);
    return {wide_number<F, To>(first) | wide_number<F, To>(second) << 16, two.nibble()};
  }
}

template <class F, class To, class Group>
__device__ __forceinline__ Kept keep_given(const Group& group, uint32_t mask) {
  const uint32_t nibble = nibble_of_mask(mask);
  const int i0 = first_index(nibble), i1 = second_index(nibble);
  // The first is never element 3, and the second never element 0.
  const uint32_t first = i0 == 0 ? group.at(0) : i0 == 1 ? group.at(1) : group.at(2);
  const uint32_t second = i1 == 1 ? group.at(1) : i1 == 2 ? group.at(2) : group.at(3);
  return {(mask >> i0 & 1 ? wide_number<F, To>(first) : 0u) |
              (mask >> i1 & 1 ? wide_number<F, To>(second) << 16 : 0u),
          nibble};
}

// Byte q of lane t of each quad goes to lane q, as its byte t.
__device__ __forceinline__ uint32_t transpose_quad(uint32_t bytes, int lane) {
  // of a pair of lanes the even one takes bytes 0 and 2 of both, the odd one 1 and 3
  uint32_t other = __shfl_xor_sync(kAllLanes, bytes, 1);
  bytes = __byte_perm(bytes, other, lane & 1 ? 0x3715 : 0x6240);
  // of lanes two apart the first takes the low halves, the second the high ones
  other = __shfl_xor_sync(kAllLanes, bytes, 2);
  return __byte_perm(bytes, other, lane & 2 ? 0x3276 : 0x5410);
}

// Loads the eight groups of a lane; what lies beyond the weight stays zero, and so is pruned.
template <Source source, class Group>
__device__ __forceinline__ void load_groups(const PackArguments& a, int64_t row, int column,
                                            Group (&groups)[kLaneGroups]) {
  const int64_t in_stride = source == Source::kStrided ? a.in_stride : 1;
  const auto* upper = static_cast<const typename Group::Bits*>(a.weight) + row * a.row_stride +
                      column * in_stride;
  const auto* lower = upper + 8 * a.row_stride;
#pragma unroll
  for (int i = 0; i < kLaneGroups; ++i) {
    const auto* p = (i % 2 ? lower : upper) + i / 2 * 16 * in_stride;
    if (row + i % 2 * 8 < a.out && column + i / 2 * 16 < a.in) {
      if constexpr (source == Source::kStrided) groups[i].load(p, in_stride);
      else groups[i].load(p);
    }
  }
}

// The mask bits of a lane's rows in one block, [half][row].
__device__ __forceinline__ void load_words(const PackArguments& a, int64_t row, int column_block,
                                           uint32_t (&words)[4]) {
  const int64_t row_words = words_of(a.in);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t r = row + i % 2 * 8, word = 2 * column_block + i / 2;
    if (r < a.out && word < row_words) words[i] = __ldg(a.bits + r * row_words + word);
  }
}

template <class F, class To, Source source>
__global__ void __launch_bounds__(kThreads, kCtas) nm_pack_weight_kernel(const PackArguments a) {
  using Group = GroupOf<F>;
  constexpr int kBlocks = kBlocksOfWarp<F, To, source>;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanesOfWarp;
  const int first = (static_cast<int>(blockIdx.x) * kWarps + thread / kLanesOfWarp) *
                    kBlocks;
  const bool given = source == Source::kGiven || (source == Source::kStrided && a.bits != nullptr);
  Group groups[kBlocks][kLaneGroups];
  uint32_t words[kBlocks][4] = {};
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    if (first + b >= a.blocks) break;
    const int64_t row = int64_t{(first + b) / a.column_blocks} * kFragmentRows + lane / 4;
    const int column_block = (first + b) % a.column_blocks;
    load_groups<source>(a, row, column_block * kFragmentColumns + lane % 4 * kGroup, groups[b]);
    if (given) load_words(a, row, column_block, words[b]);
  }
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    if (first + b >= a.blocks) return;  // the whole warp: no shuffle misses a lane
    uint32_t registers[kLaneGroups], bytes = 0;
#pragma unroll
    for (int i = 0; i < kLaneGroups; ++i) {
      // half i / 4; in it register i % 4, of row g or g + 8, and group t or t + 4
      const uint32_t mask = words[b][i / 4 * 2 + i % 2] >> (lane % 4 * kGroup + i / 2 % 2 * 16);
      const Kept kept = given ? keep_given<F, To>(groups[b][i], mask & 15)
                              : keep_largest<F, To>(groups[b][i]);
      registers[i] = kept.values;
      bytes |= i % 2 ? quad_nibbles(0, kept.nibble, i / 2) : quad_nibbles(kept.nibble, 0, i / 2);
    }
    const int64_t block = first + b;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const uint32_t* r = registers + 4 * half;
      const int64_t index = packed_index(block, 0, half, lane, 1) / kPartsOfLane;
      a.packed[index] = make_uint4(r[0], r[1], r[2], r[3]);
    }
    a.meta[meta_index(block, 0, lane, 1)] = meta_of_quad(transpose_quad(bytes, lane));
  }
}

// Both return null, or what CUDA says went wrong.
template <class F, class To, Source source>
const char* nm_pack_weight_from(const PackArguments& a, void* stream) {
  constexpr int kBlocks = kWarps * kBlocksOfWarp<F, To, source>;
  const LaunchShape shape{dim3(static_cast<unsigned>((a.blocks + kBlocks - 1) / kBlocks)),
                          kThreads};
  return launch<nm_pack_weight_kernel<F, To, source>>(shape, stream, a);
}

template <class F, class To>
const char* nm_pack_weight_launch(const PackArguments& a, void* stream) {
  if (a.blocks == 0) return nullptr;
  constexpr uintptr_t kGroupBytes = kGroup * sizeof(typename F::Raw);
  const bool aligned = reinterpret_cast<uintptr_t>(a.weight) % kGroupBytes == 0 &&
                       a.in_stride == 1 && (a.row_stride % kGroup == 0 || a.out == 1);
  if (!aligned) return nm_pack_weight_from<F, To, Source::kStrided>(a, stream);
  if (a.bits != nullptr) return nm_pack_weight_from<F, To, Source::kGiven>(a, stream);
  return nm_pack_weight_from<F, To, Source::kPruned>(a, stream);
}

}  // namespace
}  // namespace sparse_cocktail

#ifndef SC_EMULATE

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <limits>
#include <optional>
#include <tuple>

#include "../common/view.h"

namespace sparse_cocktail {
namespace {

template <class To>
const char* nm_pack_weight_to(ScalarType from, const PackArguments& a, void* stream) {
  switch (from) {
    case ScalarType::Float: return nm_pack_weight_launch<Float32, To>(a, stream);
    case ScalarType::BFloat16: return nm_pack_weight_launch<BFloat16, To>(a, stream);
    default: return nm_pack_weight_launch<Float16, To>(a, stream);
  }
}

std::tuple<Tensor, Tensor> nm_pack_weight(const Tensor& weight, const std::optional<Tensor>& bits,
                                          ScalarType dtype) {
  const char* op = "nm_pack_weight";
  const ScalarType from = weight.scalar_type();
  STD_TORCH_CHECK(from == ScalarType::Float || from == ScalarType::BFloat16 ||
                      from == ScalarType::Half, op, ": weight has dtype ",
                  torch::headeronly::toString(from),
                  ", but on a GPU it is float32, bfloat16 or float16; cast it");
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, ": dtype is ",
                  torch::headeronly::toString(dtype),
                  ", but packed weights are bfloat16 or float16; choose one of them");
  const WeightView view = view_of(op, "weight", weight);
  STD_TORCH_CHECK(view.taps == 1, op, ": weight has shape ", to_string(weight.sizes()),
                  ", but only (out, in) and (out, in, 1, 1) have a packed form; other convolutions "
                  "stay dense");
  STD_TORCH_CHECK(view.in % kGroup == 0, op, ": weight has in=", view.in,
                  ", which is not a multiple of m=4; pad the layer or leave it dense");
  const int64_t row_blocks = row_blocks_of(view.out), column_blocks = column_blocks_of(view.in);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 256;  // indices may pass the end
  STD_TORCH_CHECK(row_blocks * column_blocks < kMost && view.out < kMost && view.in < kMost, op,
                  ": weight has shape ", to_string(weight.sizes()),
                  ", but sizes and the number of blocks of 16 x 64 are below 2^31; split it");
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  Tensor packed = torch::stable::new_empty(
      weight, {row_blocks, column_blocks, kHalves, kLanesOfWarp, kPartsOfLane}, dtype);
  Tensor meta =
      torch::stable::new_empty(weight, {row_blocks, column_blocks, kLanesOfWarp}, ScalarType::Int);
  PackArguments a{};
  a.weight = weight.const_data_ptr();
  a.bits = bits ? words_for(op, "bits", *bits, view) : nullptr;
  a.row_stride = view.out_stride, a.in_stride = view.in_stride;
  a.out = static_cast<int>(view.out), a.in = static_cast<int>(view.in);
  a.column_blocks = static_cast<int>(column_blocks);
  a.blocks = static_cast<int>(row_blocks * column_blocks);
  a.packed = static_cast<uint4*>(packed.mutable_data_ptr());
  a.meta = static_cast<uint32_t*>(meta.mutable_data_ptr());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(weight.get_device_index(), &stream));
  const char* error = dtype == ScalarType::BFloat16 ? nm_pack_weight_to<BFloat16>(from, a, stream)
                                                    : nm_pack_weight_to<Float16>(from, a, stream);
  STD_TORCH_CHECK(error == nullptr, op, ": the kernel did not start on weight ",
                  to_string(weight.sizes()), ": ", error);
  return {packed, meta};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_cocktail_cuda, m) {
  m.def("nm_pack_weight(Tensor weight, Tensor? bits, ScalarType dtype) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cuda, CUDA, m) {
  m.impl("nm_pack_weight", TORCH_BOX(&nm_pack_weight));
}

}  // namespace sparse_cocktail

#endif  // SC_EMULATE
