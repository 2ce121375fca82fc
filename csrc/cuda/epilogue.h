// What happens to a finished fp32 sum before it is rounded once to the output's format.
#pragma once

#include "ptx.h"

namespace sparse_cocktail {

enum Activation { kNoActivation = 0, kRelu = 1, kGelu = 2 };  // as the ops number them

struct Epilogue {
  const void* bias;     // (out,) or null
  int bias_is_float32;  // else in the format of the product
  int activation;
};

template <class T>
__device__ __forceinline__ float bias_of(const Epilogue& epilogue, int64_t out) {
  if (epilogue.bias == nullptr) return 0.0f;
  if (epilogue.bias_is_float32) return load_global(static_cast<const float*>(epilogue.bias) + out);
  return to_float<T>(load_global(static_cast<const uint16_t*>(epilogue.bias) + out));
}

// The branch is uniform: every thread of a launch has the same activation.
__device__ __forceinline__ float activated(float value, int activation) {
  if (activation == kRelu) return value < 0.0f ? 0.0f : value;  // NaN stays NaN, as in torch
  if (activation == kGelu) return 0.5f * value * (1.0f + erff(value * 0.70710678118654752f));
  return value;
}

// A product whose `in` is split over CTAs leaves one set of sums per split. They are added in
// order, so that equal inputs give equal bits. A counter that tells the last CTA that it is the
// last would save this launch, but another launch would have to zero it, or it would be kept
// between calls, where graphs replayed side by side would share it.
struct SplitSums {
  const float* partial;  // (split, rows, out)
  uint16_t* y;           // (rows, out)
  int64_t rows, out;
  int split;
  Epilogue epilogue;
};

constexpr int kSplitThreads = 128;

namespace {  // a kernel per file that includes this: their device code is linked apart

// One thread per element of y.
template <class T>
__global__ void __launch_bounds__(kSplitThreads) nm_add_splits_kernel(const SplitSums s) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSplitThreads + threadIdx.x;
  const int64_t count = s.rows * s.out;
  if (i >= count) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int k = 0; k < s.split; ++k) sum += load_global(s.partial + k * count + i);
  sum = activated(sum + bias_of<T>(s.epilogue, i % s.out), s.epilogue.activation);
  store_global(s.y + i, from_float<T>(sum));
}

template <class T>
const char* add_splits(const SplitSums& s, void* stream) {
  const int64_t blocks = (s.rows * s.out + kSplitThreads - 1) / kSplitThreads;
  return launch<nm_add_splits_kernel<T>>({dim3(static_cast<unsigned>(blocks)), kSplitThreads},
                                         stream, s);
}

}  // namespace

}  // namespace sparse_cocktail
