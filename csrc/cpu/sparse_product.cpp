// Sparse weights times dense activations, for inference: linear layers and convolutions in fp32.
//
// Weights come packed (ops/sparse_product.py): the kept ones of a block of input channels, row by
// row, then those of the next block. A block is what a panel holds at once, so that it stays in the
// L2 cache while the rows of the block stream by.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "simd.h"
#include "sparse_product_geometry.h"

namespace sparse_cocktail {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Pair = std::vector<int64_t>;

// Rows whose sums wait for their way out together: 32 rows of 96 lanes are 12 KB, in the L1 cache.
constexpr int64_t kRowsAtOnce = 32;

const SparseKernels& sparse_kernels() {
#if defined(__x86_64__)
  switch (current_level()) {
    case Level::kAvx512: return avx512_sparse_kernels();
    case Level::kAvx2: return avx2_sparse_kernels();
    case Level::kPortable: break;
  }
#endif
  return portable_sparse_kernels();
}

struct Packed {
  const float* values;
  const uint16_t* places;
  const int32_t* starts;  // (blocks, out + 1)
  int64_t blocks, out;

  const int32_t* row(int64_t block, int64_t r) const { return starts + block * (out + 1) + r; }
};

// Memory that stays with its thread, from a cache line on: fresh pages cost more than filling them.
template <class T>
T* scratch(int64_t count) {
  thread_local std::vector<T> memory;
  constexpr int64_t line = 64 / sizeof(T);
  if (static_cast<int64_t>(memory.size()) < count + line) memory.resize(count + line);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (-address / sizeof(T)) % line;
}

class SparseConv {
 public:
  SparseConv(const Packed& packed, const Geometry& geometry, int64_t in, const float* x,
             const float* bias, float* out)
      : packed_(packed), geometry_(geometry), in_(in), x_(x), bias_(bias), out_(out),
        kernels_(sparse_kernels()), steps_((geometry.lanes() + kStep - 1) / kStep),
        block_((in + packed.blocks - 1) / packed.blocks) {
    // Tiles of even size, a multiple of the threads; where there are too few, rows are split too.
    const int64_t threads = torch::stable::get_num_threads();
    tiles_ = (steps_ + kMostSteps - 1) / kMostSteps;
    groups_ = tiles_ < threads ? std::min((threads + tiles_ - 1) / tiles_, packed.out) : 1;
    if (groups_ == 1) tiles_ = std::min(steps_, (tiles_ + threads - 1) / threads * threads);
    const int64_t largest = (steps_ + tiles_ - 1) / tiles_ * kStep;
    window_ = (largest + geometry.halo() + kStep - 1) / kStep * kStep;
    pitch_ = window_ * geometry.phases();
    offsets_ = make_offsets(geometry.tap_offsets(window_));
  }

  void run() const {
    torch::stable::parallel_for(0, tiles_ * groups_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t tile = task / groups_, group = task % groups_;
        run_tile(steps_ * tile / tiles_ * kStep, steps_ * (tile + 1) / tiles_ * kStep,
                 packed_.out * group / groups_, packed_.out * (group + 1) / groups_);
      }
    });
  }

 private:
  // Where the inputs of each kept weight lie in a panel. Looked up once here, not once per tile in
  // the product: a third load per weight cost it 8 %.
  const int32_t* make_offsets(const std::vector<int64_t>& taps) const {
    std::vector<int32_t> of_place;
    of_place.reserve(block_ * taps.size());
    for (int64_t channel = 0; channel < block_; ++channel) {
      for (int64_t tap : taps) of_place.push_back(static_cast<int32_t>(channel * pitch_ + tap));
    }
    const int64_t kept = *packed_.row(packed_.blocks - 1, packed_.out);
    const uint16_t* const places = packed_.places;
    int32_t* const offsets = scratch<int32_t>(kept);
    constexpr int64_t grain = 16384;
    torch::stable::parallel_for(0, kept, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) offsets[i] = of_place[places[i]];
    });
    return offsets;
  }

  // Rows [row, last_row) of the lanes [lane, last_lane).
  void run_tile(int64_t lane, int64_t last_lane, int64_t row, int64_t last_row) const {
    const int64_t lanes = last_lane - lane, rows = last_row - row;
    const std::vector<Segment> inputs = geometry_.inputs(lane, window_);
    const int64_t wanted = std::min(lanes, geometry_.lanes() - lane);
    const std::vector<Segment> outputs = geometry_.outputs(lane, wanted);
    // Outputs that lie side by side are summed where they belong, others wait in `sums`.
    const bool direct = outputs.size() == 1 && geometry_.out().column == 1 &&
                        outputs[0].count == wanted;
    const int64_t waiting = packed_.blocks > 1 ? rows : std::min(rows, kRowsAtOnce);
    float* const panel = scratch<float>(block_ * pitch_ + kStep + (direct ? 0 : waiting * lanes));
    float* const sums = panel + block_ * pitch_ + kStep;

    const Layout from{inputs.data(), inputs.data() + inputs.size(), geometry_.in_lane_stride(),
                      geometry_.in().channel};
    const Layout to{outputs.data(), outputs.data() + outputs.size(), geometry_.out().column,
                    geometry_.out().channel};
    for (int64_t block = 0; block < packed_.blocks; ++block) {
      const int64_t channel = block * block_, channels = std::min(block_, in_ - channel);
      kernels_.gather(x_ + channel * from.channel_stride, from, channels, panel, pitch_);
      for (int64_t r = row; r < last_row; r += kRowsAtOnce) {
        const int64_t some = std::min(kRowsAtOnce, last_row - r);
        float* const target = out_ + r * to.channel_stride;
        Product product{packed_.values, offsets_, packed_.row(block, r), panel,
                        bias_ ? bias_ + r : nullptr, sums, lanes, some, lanes, block > 0};
        if (packed_.blocks > 1) product.target += (r - row) * lanes;
        if (direct) {
          product.target = target + outputs[0].offset;
          product.target_pitch = to.channel_stride, product.lanes = wanted;
        }
        kernels_.multiply(product);
        if (!direct && block == packed_.blocks - 1) {
          kernels_.scatter(product.target, lanes, some, to, target);
        }
      }
    }
  }

  Packed packed_;
  const Geometry& geometry_;
  int64_t in_;
  const float* x_;
  const float* bias_;
  float* out_;
  const SparseKernels& kernels_;
  int64_t steps_, block_, tiles_ = 1, groups_ = 1;
  int64_t window_, pitch_;  // lanes of a phase, and of a channel, in a panel
  const int32_t* offsets_;
};

void check_packed(const char* op, const Tensor& values, const Tensor& places, const Tensor& starts,
                  int64_t out, int64_t inputs) {
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float &&
                      places.scalar_type() == ScalarType::Short &&
                      starts.scalar_type() == ScalarType::Int && values.is_contiguous() &&
                      places.is_contiguous() && starts.is_contiguous(),
                  op, ": values, places and starts are not contiguous float32, int16 and int32; "
                  "make them with sparse_pack");
  const auto* s = static_cast<const int32_t*>(starts.const_data_ptr());
  const auto* p = static_cast<const uint16_t*>(places.const_data_ptr());
  int32_t before = 0;
  for (int64_t b = 0; b < starts.size(0); ++b) {
    for (int64_t r = 0; r <= out; ++r, ++s) {
      const bool rising = r == 0 ? *s == before : *s >= before;
      // Places ascend within a row: its last one is the largest.
      STD_TORCH_CHECK(rising && *s <= places.size(0) && (*s == before || p[*s - 1] < inputs), op,
                      ": starts or places do not fit a weight of ", out, " outputs; make them "
                      "with sparse_pack from the weight of this layer");
      before = *s;
    }
  }
  STD_TORCH_CHECK(before == values.size(0) && before == places.size(0), op, ": starts end at ",
                  before, ", but there are ", values.size(0), " values and ", places.size(0),
                  " places; make them with sparse_pack");
}

// x and out are (batch, channels, height, width), both contiguous or both channels_last.
void sparse_conv2d_into(Tensor x, Tensor values, Tensor places, Tensor starts,
                        std::optional<Tensor> bias, Tensor out, bool channels_last, Pair kernel,
                        Pair stride, Pair padding, Pair dilation) {
  const char* op = "sparse_conv2d";
  const int64_t batch = x.size(0), in = x.size(1), height = out.size(2), width = out.size(3);
  if (out.numel() == 0) return;
  const int64_t blocks = starts.size(0), block = blocks == 0 ? 0 : (in + blocks - 1) / blocks;
  STD_TORCH_CHECK(blocks > 0 && starts.size(1) == out.size(1) + 1, op,
                  ": starts does not fit ", in, " inputs and ", out.size(1),
                  " outputs; make it with sparse_pack from the weight of this layer");
  check_packed(op, values, places, starts, out.size(1), block * kernel[0] * kernel[1]);
  const Packed packed{static_cast<const float*>(values.const_data_ptr()),
                      static_cast<const uint16_t*>(places.const_data_ptr()),
                      static_cast<const int32_t*>(starts.const_data_ptr()), blocks, out.size(1)};
  const Axis y(kernel[0], stride[0], padding[0], dilation[0], x.size(2), height);
  const Axis z(kernel[1], stride[1], padding[1], dilation[1], x.size(3), width);
  const Geometry geometry(batch, y, z, strides_of(channels_last, in, x.size(2), x.size(3)),
                          strides_of(channels_last, out.size(1), height, width));
  SparseConv(packed, geometry, in, static_cast<const float*>(x.const_data_ptr()),
             bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
             static_cast<float*>(out.mutable_data_ptr()))
      .run();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_cocktail_cpp, m) {
  m.def("sparse_conv2d_into(Tensor x, Tensor values, Tensor places, Tensor starts, Tensor? bias, "
        "Tensor(a!) out, bool channels_last, int[] kernel, int[] stride, int[] padding, "
        "int[] dilation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, CPU, m) {
  m.impl("sparse_conv2d_into", TORCH_BOX(&sparse_conv2d_into));
}

}  // namespace sparse_cocktail
