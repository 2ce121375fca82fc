// Sparse products with AVX-512: 16 lanes per vector.
#include "masked_linear.h"
#include "sparse_product.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx2,fma"))), \
                             apply_to = function)
#else
// GCC 12 warns of its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx2,fma")
#endif

namespace sparse_cocktail {
namespace avx512 {
namespace {

#include "sparse_product_x86.h"

struct Lanes {
  static constexpr int kCount = 16, kMostSums = kMostSteps, kSquare = 8;
  static constexpr int kRowTile = 4, kOutputTile = 6;
  static constexpr int kSumTile = 6, kVectorTile = 4;
  __m512 v;

  // Spelled out: constructors that the compiler makes up do not get this file's instruction set.
  Lanes() {}
  explicit Lanes(__m512 lanes) : v(lanes) {}
  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Lanes all(float value) { return Lanes(_mm512_set1_ps(value)); }
  static Lanes load(const float* p) { return Lanes(_mm512_loadu_ps(p)); }
  static Lanes load_first(const float* p, int n) {
    return Lanes(_mm512_maskz_loadu_ps(first(n), p));
  }
  static Lanes every_other(const float* p, int n) {
    const int floats = 2 * n - 1;  // to the last one wanted: what follows may not be mapped
    const __mmask16 low = first(floats < 16 ? floats : 16);
    const __mmask16 high = first(floats < 16 ? 0 : floats - 16);
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return Lanes(_mm512_permutex2var_ps(_mm512_maskz_loadu_ps(low, p), even,
                                        _mm512_maskz_loadu_ps(high, p + 16)));
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_first(float* p, int n) const {
    if (n == kCount) _mm512_storeu_ps(p, v);
    else _mm512_mask_storeu_ps(p, first(n), v);
  }
  void set_product(Lanes a, const float* p) { v = _mm512_mul_ps(a.v, _mm512_loadu_ps(p)); }
  void add(Lanes other) { v = _mm512_add_ps(v, other.v); }
  void add_product(Lanes a, const float* p) { v = _mm512_fmadd_ps(a.v, _mm512_loadu_ps(p), v); }
  void add_product(Lanes a, Lanes b) { v = _mm512_fmadd_ps(a.v, b.v, v); }
  void set_zero() { v = _mm512_setzero_ps(); }
  float sum() const { return _mm512_reduce_add_ps(v); }
  Lanes kept(uint32_t mask) const {
    return Lanes(_mm512_maskz_mov_ps(static_cast<__mmask16>(mask), v));
  }
  static Lanes load_kept(const float* p, uint32_t mask) {
    return Lanes(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p));
  }
  static void transpose(const float* source, int64_t source_pitch, float* target,
                        int64_t target_pitch) {
    transpose_eight(source, source_pitch, target, target_pitch);
  }
};

#include "sparse_product_loops.h"
#include "masked_linear_loops.h"

}  // namespace
}  // namespace avx512

const SparseKernels& avx512_sparse_kernels() {
  static constexpr SparseKernels all{avx512::multiply, avx512::gather, avx512::scatter};
  return all;
}

const MaskedLinearKernels& avx512_masked_linear() {
  using namespace avx512;
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
