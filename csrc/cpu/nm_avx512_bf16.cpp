// Compressed N:M weights in bf16 times x in bf16, with AVX-512 BF16 and VBMI2 (Zen 4, Sapphire
// Rapids): words are spread as they are, and an instruction multiplies 32 pairs.
#include "nm_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,popcnt"))), \
    apply_to = function)
#else
// GCC 12 warns of its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,popcnt")
#endif

namespace sparse_cocktail {
namespace avx512_bf16 {
namespace {

// 16 sums, or 32 factors.
struct Lanes {
  using Input = int16_t;
  static constexpr int kCount = 32, kRows = 6;
  __m512 v;

  // Spelled out: constructors that the compiler makes up do not get this file's instruction set.
  Lanes() {}
  explicit Lanes(__m512i lanes) : v(_mm512_castsi512_ps(lanes)) {}
  static Lanes load(const int16_t* p) { return Lanes(_mm512_loadu_si512(p)); }
  static Lanes spread(BFloat16, const int16_t* stream, uint32_t mask) {
    return Lanes(_mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(stream)));
  }
  static int count_bits(uint32_t mask) { return __builtin_popcount(mask); }
  void set_zero() { v = _mm512_setzero_ps(); }
  void add_product(Lanes a, Lanes b) { v = _mm512_dpbf16_ps(v, (__m512bh)a.v, (__m512bh)b.v); }
  float sum() const { return _mm512_reduce_add_ps(v); }
};

#include "nm_loops.h"

}  // namespace
}  // namespace avx512_bf16
}  // namespace sparse_cocktail

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace sparse_cocktail {

decltype(NmKernels::multiply_pairs) avx512_nm_pairs() {
  const bool has = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2");
  return has ? avx512_bf16::multiply<BFloat16> : nullptr;
}

}  // namespace sparse_cocktail
#endif  // x86-64
