// Compressed N:M weights with AVX2: eight elements at a time, moved by tables of permutations.
#include "nm_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,popcnt,f16c,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,popcnt,f16c,fma")
#endif

namespace sparse_cocktail {
namespace avx2 {
namespace {

constexpr int kEight = 8;
constexpr int64_t kAheadBytes = 8192;  // see kernels.h

// For the eight bits of a mask: which element goes where. -1: zero, or of no meaning.
struct Moves {
  alignas(64) int8_t compress[256][kEight] = {}, expand[256][kEight] = {};
  alignas(64) int8_t compress_bytes[256][16] = {}, expand_bytes[256][16] = {};  // of 16 bits each
  constexpr Moves() {
    for (int mask = 0; mask < 256; ++mask) {
      int kept = 0;
      for (int j = 0; j < kEight; ++j) compress[mask][j] = expand[mask][j] = -1;
      for (int j = 0; j < kEight; ++j) {
        if ((mask >> j & 1) == 0) continue;
        expand[mask][j] = static_cast<int8_t>(kept);
        compress[mask][kept++] = static_cast<int8_t>(j);
      }
      for (int b = 0; b < 16; ++b) {
        const int from = compress[mask][b / 2], to = expand[mask][b / 2];
        compress_bytes[mask][b] = static_cast<int8_t>(from < 0 ? -1 : 2 * from + b % 2);
        expand_bytes[mask][b] = static_cast<int8_t>(to < 0 ? -1 : 2 * to + b % 2);
      }
    }
  }
};
constexpr Moves kMoves{};

inline __m256i indices(const int8_t (&moves)[kEight]) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(moves)));
}
inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void store_half(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }

// Eight floats by the mask's bits, zeros elsewhere. The permutation reads three bits of an index,
// the blend its sign.
inline __m256 spread_eight(__m256 next, uint32_t mask) {
  const __m256i move = indices(kMoves.expand[mask]);
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(next, move), _mm256_setzero_ps(),
                          _mm256_castsi256_ps(move));
}

void compress32(const uint32_t* words, int64_t count, const int32_t* source, int32_t* target) {
  for (int64_t w = 0; w < count; ++w, source += kWordBits) {
    __builtin_prefetch(reinterpret_cast<const char*>(source) + kAheadBytes);
    __builtin_prefetch(reinterpret_cast<const char*>(source) + kAheadBytes + 64);
    for (int first = 0; first < kWordBits; first += kEight) {
      const uint32_t mask = words[w] >> first & 0xff;
      const __m256i move = indices(kMoves.compress[mask]);
      const __m256i kept = _mm256_permutevar8x32_epi32(load(source + first), move);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), kept);
      target += __builtin_popcount(mask);
    }
  }
}

void compress16(const uint32_t* words, int64_t count, const int16_t* source, int16_t* target) {
  for (int64_t w = 0; w < count; ++w, source += kWordBits) {
    __builtin_prefetch(reinterpret_cast<const char*>(source) + kAheadBytes);
    for (int first = 0; first < kWordBits; first += kEight) {
      const uint32_t mask = words[w] >> first & 0xff;
      const __m128i move = load_half(kMoves.compress_bytes[mask]);
      store_half(target, _mm_shuffle_epi8(load_half(source + first), move));
      target += __builtin_popcount(mask);
    }
  }
}

void expand32(const uint32_t* words, int64_t count, const int32_t* source, int32_t* target) {
  for (int64_t w = 0; w < count; ++w, target += kWordBits) {
    __builtin_prefetch(reinterpret_cast<const char*>(source) + kAheadBytes);
    for (int first = 0; first < kWordBits; first += kEight) {
      const uint32_t mask = words[w] >> first & 0xff;
      const __m256 next = _mm256_loadu_ps(reinterpret_cast<const float*>(source));
      _mm256_storeu_ps(reinterpret_cast<float*>(target + first), spread_eight(next, mask));
      source += __builtin_popcount(mask);
    }
  }
}

void expand16(const uint32_t* words, int64_t count, const int16_t* source, int16_t* target) {
  for (int64_t w = 0; w < count; ++w, target += kWordBits) {
    __builtin_prefetch(reinterpret_cast<const char*>(source) + kAheadBytes);
    for (int first = 0; first < kWordBits; first += kEight) {
      const uint32_t mask = words[w] >> first & 0xff;
      const __m128i move = load_half(kMoves.expand_bytes[mask]);
      store_half(target + first, _mm_shuffle_epi8(load_half(source), move));
      source += __builtin_popcount(mask);
    }
  }
}

struct Lanes {
  using Input = float;
  static constexpr int kCount = kEight, kRows = 2;
  __m256 v;

  // Spelled out: constructors that the compiler makes up do not get this file's instruction set.
  Lanes() {}
  explicit Lanes(__m256 lanes) : v(lanes) {}
  static Lanes load(const float* p) { return Lanes(_mm256_loadu_ps(p)); }
  static Lanes spread(Float32, const int32_t* stream, uint32_t mask) {
    return Lanes(spread_eight(_mm256_loadu_ps(reinterpret_cast<const float*>(stream)), mask));
  }
  static Lanes spread(BFloat16, const int16_t* stream, uint32_t mask) {
    const __m256i next = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(stream)), 16);
    return Lanes(spread_eight(_mm256_castsi256_ps(next), mask));
  }
  static Lanes spread(Float16, const int16_t* stream, uint32_t mask) {
    return Lanes(spread_eight(_mm256_cvtph_ps(load_half(stream)), mask));
  }
  static int count_bits(uint32_t mask) { return __builtin_popcount(mask); }
  void set_zero() { v = _mm256_setzero_ps(); }
  void add_product(Lanes a, Lanes b) { v = _mm256_fmadd_ps(a.v, b.v, v); }
  float sum() const {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
};

#include "nm_loops.h"

}  // namespace
}  // namespace avx2

const NmKernels& avx2_nm_kernels() {
  using namespace avx2;
  static constexpr NmKernels all{compress32, compress16, expand32, expand16, multiply<Float32>,
                                 multiply<BFloat16>, multiply<Float16>, nullptr};
  return all;
}

}  // namespace sparse_cocktail

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // x86-64
