// Sparse products with AVX2: 8 lanes per vector.
#include "masked_linear.h"
#include "sparse_product.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace sparse_cocktail {
namespace avx2 {
namespace {

#include "sparse_product_x86.h"

// For eight bits a byte each, all ones where the bit is set.
struct BytesOf {
  alignas(64) int8_t of[256][8] = {};
  constexpr BytesOf() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int j = 0; j < 8; ++j) of[mask][j] = mask >> j & 1 ? -1 : 0;
    }
  }
};
constexpr BytesOf kBytesOf{};

struct Lanes {
  static constexpr int kCount = 8, kMostSums = 12, kSquare = 8;
  static constexpr int kRowTile = 4, kOutputTile = 3;
  static constexpr int kSumTile = 6, kVectorTile = 2;
  __m256 v;

  // Spelled out: constructors that the compiler makes up do not get this file's instruction set.
  Lanes() {}
  explicit Lanes(__m256 lanes) : v(lanes) {}
  static __m256i first(int n) {
    const __m256i number = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), number);
  }
  static Lanes all(float value) { return Lanes(_mm256_set1_ps(value)); }
  static Lanes load(const float* p) { return Lanes(_mm256_loadu_ps(p)); }
  static Lanes load_first(const float* p, int n) { return Lanes(_mm256_maskload_ps(p, first(n))); }
  static Lanes every_other(const float* p, int n) {
    const int floats = 2 * n - 1;  // to the last one wanted: what follows may not be mapped
    const __m256 low = _mm256_maskload_ps(p, first(floats));
    const __m256 high = _mm256_maskload_ps(p + 8, first(floats - 8));
    const __m256d pairs = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88));
    return Lanes(_mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xd8)));
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_first(float* p, int n) const {
    if (n == kCount) _mm256_storeu_ps(p, v);
    else _mm256_maskstore_ps(p, first(n), v);
  }
  void set_product(Lanes a, const float* p) { v = _mm256_mul_ps(a.v, _mm256_loadu_ps(p)); }
  void add(Lanes other) { v = _mm256_add_ps(v, other.v); }
  void add_product(Lanes a, const float* p) { v = _mm256_fmadd_ps(a.v, _mm256_loadu_ps(p), v); }
  void add_product(Lanes a, Lanes b) { v = _mm256_fmadd_ps(a.v, b.v, v); }
  void set_zero() { v = _mm256_setzero_ps(); }
  float sum() const {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static __m256i lanes_of(uint32_t mask) {  // all ones where the bit is set
    const auto* bytes = reinterpret_cast<const __m128i*>(kBytesOf.of[mask & 0xff]);
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(bytes));
  }
  Lanes kept(uint32_t mask) const {
    return Lanes(_mm256_and_ps(v, _mm256_castsi256_ps(lanes_of(mask))));
  }
  static Lanes load_kept(const float* p, uint32_t mask) {
    return Lanes(_mm256_maskload_ps(p, lanes_of(mask)));
  }
  static void transpose(const float* source, int64_t source_pitch, float* target,
                        int64_t target_pitch) {
    transpose_eight(source, source_pitch, target, target_pitch);
  }
};

#include "sparse_product_loops.h"
#include "masked_linear_loops.h"

}  // namespace
}  // namespace avx2

const SparseKernels& avx2_sparse_kernels() {
  static constexpr SparseKernels all{avx2::multiply, avx2::gather, avx2::scatter};
  return all;
}

const MaskedLinearKernels& avx2_masked_linear() {
  using namespace avx2;
  static constexpr MaskedLinearKernels all{forward, input_grad, weight_grad};
  return all;
}

}  // namespace sparse_cocktail

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // x86-64
