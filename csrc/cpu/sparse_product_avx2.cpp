// Sparse products with AVX2: 8 lanes per vector.
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

struct Lanes {
  static constexpr int kCount = 8, kMostSums = 12, kSquare = 8;
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
  static void transpose(const float* source, int64_t source_pitch, float* target,
                        int64_t target_pitch) {
    transpose_eight(source, source_pitch, target, target_pitch);
  }
};

#include "sparse_product_loops.h"

}  // namespace
}  // namespace avx2

const SparseKernels& avx2_sparse_kernels() {
  static constexpr SparseKernels all{avx2::multiply, avx2::gather, avx2::scatter};
  return all;
}

}  // namespace sparse_cocktail

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // x86-64
