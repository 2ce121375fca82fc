// A linear layer of few rows under a mask, forward and backward, in fp32: what the levels of
// sparse_product_*.cpp compute for masked_linear.cpp. The mask is applied to vectors of the weight
// as they are loaded: W*m is never written.
//
// The weight comes from memory once for all rows. Sums take the same order for any number of
// threads and of rows.
#pragma once

#include <cstdint>

#include "simd.h"

namespace sparse_cocktail {

// Threads get steps of outputs that are whole tiles at all levels. The sums of the widest tile are
// 6 vectors of 16 floats per row, in scratch memory.
constexpr int kOutputStep = 12, kRowScratch = 6 * 16;

// All matrices are contiguous: x (rows, inputs), grad (rows, outputs), the weight and its gradient
// (outputs, inputs), its bits (outputs, words_of(inputs)).
struct MaskedLinear {
  int64_t rows, inputs, outputs;
  const float *x, *grad, *weight;
  const uint32_t* bits;
  const float* bias;  // of forward, or null
  float* result;

  int64_t row_words() const { return words_of(inputs); }
};

struct MaskedLinearKernels {
  // result (rows, outputs) = x * (W*m)^T + bias, outputs [begin, end); scratch: kRowScratch floats
  // per row, aligned to a vector
  void (*forward)(const MaskedLinear&, int64_t begin, int64_t end, float* scratch);
  // result (rows, inputs) = grad * (W*m), words of columns [begin, end)
  void (*input_grad)(const MaskedLinear&, int64_t begin, int64_t end, float* scratch);
  // result (outputs, inputs) = m * (grad^T * x), outputs [begin, end)
  void (*weight_grad)(const MaskedLinear&, int64_t begin, int64_t end, float* scratch);
};

const MaskedLinearKernels& portable_masked_linear();
const MaskedLinearKernels& avx2_masked_linear();
const MaskedLinearKernels& avx512_masked_linear();

inline const MaskedLinearKernels& masked_linear_kernels() {
#if defined(__x86_64__)
  switch (current_level()) {
    case Level::kAvx512: return avx512_masked_linear();
    case Level::kAvx2: return avx2_masked_linear();
    case Level::kPortable: break;
  }
#endif
  return portable_masked_linear();
}

}  // namespace sparse_cocktail
