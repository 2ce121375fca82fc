// Sparse weights times dense activations, for inference: what the levels of sparse_product_*.cpp
// compute for sparse_product.cpp.
//
// A task works on a tile, up to kMostSteps * 16 neighbouring outputs of all channels or some:
//
//     gather            multiply                     scatter
//   x  ----->  panel  ----------->  rows x lanes  ----------->  out
//
// The panel holds the inputs of the tile, lanes side by side. A kept weight is then one broadcast
// and one fused multiply-add per vector of outputs, whose other operand comes from the panel. Loads
// are what limits it. On a Zen 4 core, of 114 GFLOP/s without loads, 87 to 92 are left with a panel
// in the L1 cache, 61 to 64 where vectors cross its lines, as in a 3x3 kernel, and 55 from L2. (One
// copy of the panel per kernel column would avoid crossings: three times the panel, 30 % slower.)
#pragma once

#include <cstdint>

namespace sparse_cocktail {

constexpr int kStep = 16;  // lanes come in steps of the widest vector
// 12 of the 16 registers of AVX2. With AVX-512, 4 and 8 steps took 9 and 12 % longer (ResNet-50).
constexpr int kMostSteps = 6;

// Neighbouring lanes that come from or go to memory at one stride. Lanes from `count` up to
// `length` are zero in a panel.
struct Segment {
  int32_t lane, count, length;
  int64_t offset;  // in memory, of the first lane and channel 0
};

// Kept weights of neighbouring rows times a panel.
struct Product {
  const float* values;
  const int32_t* offsets;  // where lane 0 of a weight's inputs lies in the panel
  const int32_t* starts;   // of each row's weights, and the end of the last row's
  const float* panel;
  const float* initial;  // one per row, null: zero, or what is in `target` (`adds`)
  float* target;
  int64_t target_pitch;  // from row to row
  int64_t rows, lanes;   // lanes to write; up to a whole step is computed
  bool adds;
};

// The memory side of a tile: segments at a stride within a channel, and from channel to channel.
struct Layout {
  const Segment *begin, *end;
  int64_t lane_stride, channel_stride;
};

struct SparseKernels {
  void (*multiply)(const Product&);
  // panel[c * pitch + lane] for c < channels; one of the layout's strides is 1. May write up to 15
  // lanes too many, in ascending order.
  void (*gather)(const float* source, const Layout&, int64_t channels, float* panel, int64_t pitch);
  // The way back, exactly.
  void (*scatter)(const float* rows, int64_t pitch, int64_t channels, const Layout&, float* target);
};

const SparseKernels& portable_sparse_kernels();
const SparseKernels& avx2_sparse_kernels();
const SparseKernels& avx512_sparse_kernels();

}  // namespace sparse_cocktail
