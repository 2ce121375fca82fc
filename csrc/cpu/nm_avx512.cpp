// Compressed N:M weights with AVX-512: vectors are compressed and expanded by mask registers.
#include "nm_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,popcnt,f16c,fma"))), \
    apply_to = function)
#else
// GCC 12 warns of its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,popcnt,f16c,fma")
#endif

namespace sparse_cocktail {
namespace avx512 {
namespace {

constexpr int64_t kAheadBytes = 8192;  // see kernels.h

inline __m512i load16(const int16_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Whole vectors are stored, and the next one overwrites what is too much: stores under a mask take
// over a hundred cycles on Zen 4. Where both halves of a word keep eight, as in 2:4, one store that
// crosses no line takes both.
void compress32(const uint32_t* words, int64_t count, const int32_t* source, int32_t* target) {
  for (int64_t w = 0; w < count; ++w, source += kWordBits) {
    const __mmask16 low = static_cast<__mmask16>(words[w]), high = words[w] >> 16;
    const int in_low = __builtin_popcount(low), in_high = __builtin_popcount(high);
    __builtin_prefetch(reinterpret_cast<const char*>(source) + kAheadBytes);
    __builtin_prefetch(reinterpret_cast<const char*>(source) + kAheadBytes + 64);
    const __m512i a = _mm512_maskz_compress_epi32(low, _mm512_loadu_si512(source));
    const __m512i b = _mm512_maskz_compress_epi32(high, _mm512_loadu_si512(source + 16));
    if (in_low == 8 && in_high == 8) {
      _mm512_storeu_si512(target, _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1));
    } else {
      _mm512_storeu_si512(target, a);
      _mm512_storeu_si512(target + in_low, b);
    }
    target += in_low + in_high;
  }
}

void expand32(const uint32_t* words, int64_t count, const int32_t* source, int32_t* target) {
  for (int64_t w = 0; w < count; ++w, target += kWordBits) {
    const __mmask16 low = static_cast<__mmask16>(words[w]), high = words[w] >> 16;
    __builtin_prefetch(reinterpret_cast<const char*>(source) + kAheadBytes);
    _mm512_storeu_si512(target, _mm512_maskz_expand_epi32(low, _mm512_loadu_si512(source)));
    source += __builtin_popcount(low);
    _mm512_storeu_si512(target + 16, _mm512_maskz_expand_epi32(high, _mm512_loadu_si512(source)));
    source += __builtin_popcount(high);
  }
}

struct Lanes {
  using Input = float;
  static constexpr int kCount = 16, kRows = 6;
  __m512 v;

  // Spelled out: constructors that the compiler makes up do not get this file's instruction set.
  Lanes() {}
  explicit Lanes(__m512 lanes) : v(lanes) {}
  static Lanes load(const float* p) { return Lanes(_mm512_loadu_ps(p)); }
  static Lanes spread(Float32, const int32_t* stream, uint32_t mask) {
    const __m512 next = _mm512_loadu_ps(reinterpret_cast<const float*>(stream));
    return Lanes(_mm512_maskz_expand_ps(static_cast<__mmask16>(mask), next));
  }
  static Lanes spread(BFloat16, const int16_t* stream, uint32_t mask) {
    const __m512 next = _mm512_castsi512_ps(_mm512_slli_epi32(load16(stream), 16));
    return Lanes(_mm512_maskz_expand_ps(static_cast<__mmask16>(mask), next));
  }
  static Lanes spread(Float16, const int16_t* stream, uint32_t mask) {
    const auto* next = reinterpret_cast<const __m256i*>(stream);
    return Lanes(_mm512_maskz_expand_ps(static_cast<__mmask16>(mask),
                                        _mm512_cvtph_ps(_mm256_loadu_si256(next))));
  }
  static int count_bits(uint32_t mask) { return __builtin_popcount(mask); }
  void set_zero() { v = _mm512_setzero_ps(); }
  void add_product(Lanes a, Lanes b) { v = _mm512_fmadd_ps(a.v, b.v, v); }
  float sum() const { return _mm512_reduce_add_ps(v); }
};

#include "nm_loops.h"

}  // namespace
}  // namespace avx512

}  // namespace sparse_cocktail

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// Vectors of 16 bits are compressed and expanded by AVX-512 VBMI2, which the first processors with
// AVX-512 lack: they do it as with AVX2.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vbmi2,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vbmi2,popcnt")
#endif

namespace sparse_cocktail {
namespace avx512 {
namespace {

void compress16(const uint32_t* words, int64_t count, const int16_t* source, int16_t* target) {
  for (int64_t w = 0; w < count; ++w, source += kWordBits) {
    __builtin_prefetch(reinterpret_cast<const char*>(source) + kAheadBytes);
    const __m512i kept = _mm512_maskz_compress_epi16(words[w], _mm512_loadu_si512(source));
    const int count = __builtin_popcount(words[w]);
    if (count <= 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_castsi512_si256(kept));
    } else {
      _mm512_storeu_si512(target, kept);
    }
    target += count;
  }
}

void expand16(const uint32_t* words, int64_t count, const int16_t* source, int16_t* target) {
  for (int64_t w = 0; w < count; ++w, target += kWordBits) {
    __builtin_prefetch(reinterpret_cast<const char*>(source) + kAheadBytes);
    _mm512_storeu_si512(target,
                        _mm512_maskz_expand_epi16(words[w], _mm512_loadu_si512(source)));
    source += __builtin_popcount(words[w]);
  }
}

}  // namespace
}  // namespace avx512
}  // namespace sparse_cocktail

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace sparse_cocktail {

const NmKernels& avx512_nm_kernels() {
  using namespace avx512;
  static const NmKernels all = [] {
    const bool vbmi2 = __builtin_cpu_supports("avx512vbmi2");
    const NmKernels& narrow = avx2_nm_kernels();
    return NmKernels{compress32, vbmi2 ? compress16 : narrow.compress16,
                     expand32,   vbmi2 ? expand16 : narrow.expand16,
                     multiply<Float32>, multiply<BFloat16>, multiply<Float16>,
                     avx512_nm_pairs()};
  }();
  return all;
}

}  // namespace sparse_cocktail
#endif  // x86-64
