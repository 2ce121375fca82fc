// Compressed N:M weights: the inner loops of nm_compress.cpp and nm_linear.cpp, compiled once per
// instruction set (nm_portable.cpp, nm_avx2.cpp, nm_avx512.cpp) and chosen at run time.
//
// A stream is kept values one after the other, as the set bits of neighbouring words name them. All
// levels move the same bits; sums differ by rounding.
#pragma once

#include "simd.h"

namespace sparse_cocktail {

// How many elements past its end a stream may be read, or be written by compress.
constexpr int64_t kStreamSlack = 32;

// Outputs that are summed side by side.
constexpr int kOutputsAtOnce = 4;

// Some outputs times some rows of x. Rows of x are whole words long, zero past the inputs.
template <class Raw>
struct NmProduct {
  const uint32_t* words[kOutputsAtOnce];  // of each output
  const Raw* values[kOutputsAtOnce];      // its stream
  int64_t next_values;  // how far ahead the streams of the next outputs lie, to fetch them early
  int64_t row_words;
  const void* x;  // fp32; bf16 for multiply_pairs
  int64_t x_pitch, rows;
  float* sums;  // sums[row * pitch + output]
  int64_t pitch;
};

struct NmKernels {
  // The elements of `count` words of source whose bits are set, as a stream.
  void (*compress32)(const uint32_t* words, int64_t count, const int32_t* source, int32_t* target);
  void (*compress16)(const uint32_t* words, int64_t count, const int16_t* source, int16_t* target);
  // The way back: the stream's values where bits are set, zeros elsewhere.
  void (*expand32)(const uint32_t* words, int64_t count, const int32_t* source, int32_t* target);
  void (*expand16)(const uint32_t* words, int64_t count, const int16_t* source, int16_t* target);
  // Products of kOutputsAtOnce outputs, in fp32.
  void (*multiply_float32)(const NmProduct<int32_t>&);
  void (*multiply_bfloat16)(const NmProduct<int16_t>&);
  void (*multiply_float16)(const NmProduct<int16_t>&);
  // The same of bf16 times bf16, by instructions that add two products at once. Null: there are
  // none. They take subnormal numbers as zero.
  void (*multiply_pairs)(const NmProduct<int16_t>&);

  const auto& compress(int32_t) const { return compress32; }
  const auto& compress(int16_t) const { return compress16; }
  const auto& expand(int32_t) const { return expand32; }
  const auto& expand(int16_t) const { return expand16; }
};

const NmKernels& portable_nm_kernels();
const NmKernels& avx2_nm_kernels();
const NmKernels& avx512_nm_kernels();
decltype(NmKernels::multiply_pairs) avx512_nm_pairs();  // null where the processor has none

inline const NmKernels& nm_kernels() {
#if defined(__x86_64__)
  switch (current_level()) {
    case Level::kAvx512: return avx512_nm_kernels();
    case Level::kAvx2: return avx2_nm_kernels();
    case Level::kPortable: break;
  }
#endif
  return portable_nm_kernels();
}

}  // namespace sparse_cocktail
