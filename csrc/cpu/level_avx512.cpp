// The level of AVX-512 F, BW, DQ, VL: 16 keys of 32 bits or 32 keys of 16 bits per register, and
// compares that give words directly.
#include <cstring>
#include <type_traits>

#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,lzcnt,popcnt,f16c,fma"))), \
    apply_to = function)
#else
// GCC 12 warns of its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,lzcnt,popcnt,f16c,fma")
#endif

namespace sparse_cocktail {
namespace avx512 {
namespace {

inline int fast_popcount(uint32_t word) { return __builtin_popcount(word); }

template <class F>
struct Block;
template <class F>
struct Sums;

template <class Key>
uint32_t compare_keys(const Key* keys, int count, Key threshold, uint32_t& equal);
uint32_t deposit(uint32_t source, uint32_t places);

#include "kernels.h"

template <>
inline uint32_t compare_keys(const int64_t* keys, int count, int64_t threshold, uint32_t& equal) {
  return plain_compare_keys(keys, count, threshold, equal);
}
template <>
inline uint32_t compare_keys(const int32_t* keys, int count, int32_t threshold, uint32_t& equal) {
  const __m512i limit = _mm512_set1_epi32(threshold);
  // Reads past the end, within the scratch of the candidates.
  const __m512i low = _mm512_loadu_si512(keys);
  uint32_t above = _mm512_cmpgt_epi32_mask(low, limit), same = _mm512_cmpeq_epi32_mask(low, limit);
  if (count > 16) {
    const __m512i high = _mm512_loadu_si512(keys + 16);
    above |= static_cast<uint32_t>(_mm512_cmpgt_epi32_mask(high, limit)) << 16;
    same |= static_cast<uint32_t>(_mm512_cmpeq_epi32_mask(high, limit)) << 16;
  }
  equal = same & low_bits(count);
  return above & low_bits(count);
}
inline uint32_t deposit(uint32_t source, uint32_t places) { return _pdep_u32(source, places); }

// In a group of M, lane j takes the element S further on; `earlier` is 1 where that wraps around.
template <int M, int S, class Lane>
struct Rotation {
  static constexpr int kLanes = 64 / sizeof(Lane);
  alignas(64) Lane index[kLanes] = {};
  alignas(64) Lane earlier[kLanes] = {};
  alignas(64) uint8_t bytes[64] = {};  // the same within 128 bits, for the byte shuffle
  constexpr Rotation() {
    for (int j = 0; j < kLanes; ++j) {
      const int other = j / M * M + (j + S) % M;
      index[j] = static_cast<Lane>(other);
      earlier[j] = other < j;
      for (int b = 0; b < static_cast<int>(sizeof(Lane)); ++b) {
        bytes[j * sizeof(Lane) + b] = static_cast<uint8_t>((other * sizeof(Lane) + b) % 16);
      }
    }
  }
};
template <int M, int S, class Lane>
constexpr Rotation<M, S, Lane> kRotation{};

template <int M, int S, class Lane>
inline __m512i rotated(__m512i keys) {
  constexpr const auto& r = kRotation<M, S, Lane>;
  if constexpr (M * sizeof(Lane) <= 16) {
    return _mm512_shuffle_epi8(keys, _mm512_load_si512(r.bytes));
  } else {
    return _mm512_permutexvar_epi32(_mm512_load_si512(r.index), keys);
  }
}

inline __m512i masked_adds(__m512i sum, uint32_t word, int byte, __m512i value) {
  return _mm512_mask_add_epi64(sum, static_cast<__mmask8>(word >> 8 * byte), sum, value);
}

// Sums over eight doubles at a time.
struct VectorSums {
  __m512i a, b;
  int64_t count_a = 0, count_b = 0;

  // Spelled out: constructors that the compiler makes up do not get this file's instruction set.
  VectorSums() : a(_mm512_setzero_si512()), b(_mm512_setzero_si512()) {}

  void add_eight(__m512d values, int byte, uint32_t in_a, uint32_t in_b) {
    const __m512d magnitude = _mm512_abs_pd(values);
    const __m512i bits = _mm512_castpd_si512(_mm512_add_pd(magnitude, _mm512_set1_pd(kMagic)));
    a = masked_adds(a, in_a, byte, bits);
    b = masked_adds(b, in_b, byte, bits);
  }
  void count(uint32_t in_a, uint32_t in_b) {
    count_a += fast_popcount(in_a), count_b += fast_popcount(in_b);
  }
  int64_t sum_a() const { return _mm512_reduce_add_epi64(a) - count_a * kMagicBits; }
  int64_t sum_b() const { return _mm512_reduce_add_epi64(b) - count_b * kMagicBits; }
};

template <>
struct Block<Float32> {
  __m512i low, high;

  static __m512i keys_at(const int32_t* p) {
    const __m512i raw = _mm512_loadu_si512(p);
    const __m512i magnitude = _mm512_and_si512(raw, _mm512_set1_epi32(Float32::kMagnitude));
    return _mm512_min_epi32(magnitude, _mm512_set1_epi32(Float32::kNaN));
  }
  explicit Block(const int32_t* p) : low(keys_at(p)), high(keys_at(p + 16)) {}

  uint32_t above(int32_t bound) const {
    const __m512i limit = _mm512_set1_epi32(bound);
    return _mm512_cmpgt_epi32_mask(low, limit) |
           static_cast<uint32_t>(_mm512_cmpgt_epi32_mask(high, limit)) << 16;
  }
  template <int M, int S>
  uint32_t beaten() const {
    const __m512i earlier = _mm512_load_si512(kRotation<M, S, int32_t>.earlier);
    const auto half = [&](__m512i keys) __attribute__((always_inline)) -> uint32_t {
      const __m512i other = _mm512_add_epi32(rotated<M, S, int32_t>(keys), earlier);
      return _mm512_cmpgt_epi32_mask(other, keys);
    };
    return half(low) | half(high) << 16;
  }
  void append(uint32_t mask, int32_t* target) const {
    const __mmask16 first = static_cast<__mmask16>(mask), second = mask >> 16;
    _mm512_storeu_si512(target, _mm512_maskz_compress_epi32(first, low));
    _mm512_storeu_si512(target + fast_popcount(first), _mm512_maskz_compress_epi32(second, high));
  }
  using Top = __m512i;
  void largest(Top& top) const { top = _mm512_max_epi32(top, _mm512_max_epi32(low, high)); }
  static int32_t top_key(Top top) { return _mm512_reduce_max_epi32(top); }
};

template <>
struct Sums<Float32> : VectorSums {
  Sums() : VectorSums() {}
  void add(const Block<Float32>&, const int32_t* p, uint32_t in_a, uint32_t in_b) {
    for (int byte = 0; byte < 4; ++byte) {
      const __m256 values = _mm256_loadu_ps(reinterpret_cast<const float*>(p + 8 * byte));
      add_eight(_mm512_cvtps_pd(values), byte, in_a, in_b);
    }
    count(in_a, in_b);
  }
};

template <class F>
struct Block16 {
  __m512i keys;

  explicit Block16(const int16_t* p) {
    const __m512i magnitude =
        _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi16(F::kMagnitude));
    keys = _mm512_min_epi16(magnitude, _mm512_set1_epi16(F::kNaN));
  }
  uint32_t above(int32_t bound) const {
    return _mm512_cmpgt_epi16_mask(keys, _mm512_set1_epi16(static_cast<int16_t>(bound)));
  }
  template <int M, int S>
  uint32_t beaten() const {
    const __m512i earlier = _mm512_load_si512(kRotation<M, S, int16_t>.earlier);
    const __m512i other = _mm512_add_epi16(rotated<M, S, int16_t>(keys), earlier);
    return _mm512_cmpgt_epi16_mask(other, keys);
  }
  void append(uint32_t mask, int32_t* target) const {
    const __mmask16 first = static_cast<__mmask16>(mask), second = mask >> 16;
    const __m512i low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(keys));
    const __m512i high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(keys, 1));
    _mm512_storeu_si512(target, _mm512_maskz_compress_epi32(first, low));
    _mm512_storeu_si512(target + fast_popcount(first), _mm512_maskz_compress_epi32(second, high));
  }
  using Top = __m512i;
  void largest(Top& top) const { top = _mm512_max_epi16(top, keys); }
  static int16_t top_key(Top top) {
    const __m512i low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(top));
    const __m512i high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(top, 1));
    return static_cast<int16_t>(_mm512_reduce_max_epi32(_mm512_max_epi32(low, high)));
  }
};

template <>
struct Block<BFloat16> : Block16<BFloat16> {
  explicit Block(const int16_t* p) : Block16(p) {}
};
template <>
struct Block<Float16> : Block16<Float16> {
  explicit Block(const int16_t* p) : Block16(p) {}
};

template <>
struct Sums<BFloat16> : VectorSums {
  Sums() : VectorSums() {}
  void add(const Block<BFloat16>&, const int16_t* p, uint32_t in_a, uint32_t in_b) {
    for (int byte = 0; byte < 4; ++byte) {
      const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * byte));
      const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
      add_eight(_mm512_cvtps_pd(_mm256_castsi256_ps(wide)), byte, in_a, in_b);
    }
    count(in_a, in_b);
  }
};

template <>
struct Sums<Float16> : VectorSums {
  Sums() : VectorSums() {}
  void add(const Block<Float16>&, const int16_t* p, uint32_t in_a, uint32_t in_b) {
    for (int byte = 0; byte < 4; ++byte) {
      const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * byte));
      add_eight(_mm512_cvtps_pd(_mm256_cvtph_ps(raw)), byte, in_a, in_b);
    }
    count(in_a, in_b);
  }
};

template <>
struct Block<Float64> : PlainBlock<Float64> {
  using PlainBlock::PlainBlock;
  static int64_t top_key(int64_t top) { return top; }
};
template <>
struct Sums<Float64> : PlainSums<Float64> {};

// ---- masked copies --------------------------------------------------------------------------------

void keep32(const uint32_t* bits, const int32_t* source, int32_t* target, int64_t count) {
  int64_t i = 0;
  for (; i + kWordBits <= count; i += kWordBits) {
    const uint32_t word = bits[i / kWordBits];
    const __mmask16 low = static_cast<__mmask16>(word), high = word >> 16;
    _mm512_storeu_si512(target + i, _mm512_maskz_loadu_epi32(low, source + i));
    _mm512_storeu_si512(target + i + 16, _mm512_maskz_loadu_epi32(high, source + i + 16));
  }
  keep_plain<Float32>(bits + i / kWordBits, source + i, target + i, count - i);
}

void keep16(const uint32_t* bits, const int16_t* source, int16_t* target, int64_t count) {
  int64_t i = 0;
  for (; i + kWordBits <= count; i += kWordBits) {
    _mm512_storeu_si512(target + i, _mm512_maskz_loadu_epi16(bits[i / kWordBits], source + i));
  }
  keep_plain<BFloat16>(bits + i / kWordBits, source + i, target + i, count - i);
}

inline __m256i bfloat16_of_16(__m512i raw) {
  const __m512i lowest = _mm512_and_si512(_mm512_srli_epi32(raw, 16), _mm512_set1_epi32(1));
  const __m512i rounding = _mm512_add_epi32(lowest, _mm512_set1_epi32(0x7fff));
  const __m512i nearest = _mm512_add_epi32(raw, rounding);
  const __m512i magnitude = _mm512_and_si512(raw, _mm512_set1_epi32(Float32::kMagnitude));
  const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(Float32::kInfinity));
  const __m512i quiet = _mm512_or_si512(raw, _mm512_set1_epi32(0x400000));
  const __m512i result = _mm512_mask_mov_epi32(nearest, nan, quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
}

void keep_bfloat16(const uint32_t* bits, const int32_t* source, int16_t* target, int64_t count) {
  int64_t i = 0;
  for (; i + kWordBits <= count; i += kWordBits) {
    const uint32_t word = bits[i / kWordBits];
    const __mmask16 low = static_cast<__mmask16>(word), high = word >> 16;
    const __m256i a = bfloat16_of_16(_mm512_maskz_loadu_epi32(low, source + i));
    const __m256i b = bfloat16_of_16(_mm512_maskz_loadu_epi32(high, source + i + 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i), a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i + 16), b);
  }
  keep_as_bfloat16(bits + i / kWordBits, source + i, target + i, count - i);
}

void keep_float16(const uint32_t* bits, const int32_t* source, int16_t* target, int64_t count) {
  int64_t i = 0;
  for (; i + kWordBits <= count; i += kWordBits) {
    const uint32_t word = bits[i / kWordBits];
    for (int half = 0; half < 2; ++half) {
      const __mmask16 mask = static_cast<__mmask16>(word >> 16 * half);
      const __m512 kept = _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(mask, source + i + 16 * half));
      const __m256i cast = _mm512_cvtps_ph(kept, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i + 16 * half), cast);
    }
  }
  keep_as_float16(bits + i / kWordBits, source + i, target + i, count - i);
}

template <class F>
constexpr Kernels<F> table(decltype(Kernels<F>::keep) keep) {
  return {select_run<F>, unify_run<F>, settle<F>, nm_run<F>, score_run<F>, sum_block<F>, keep};
}

}  // namespace
}  // namespace avx512

const KernelTable& avx512_kernels() {
  using namespace avx512;
  static const KernelTable all{table<Float32>(keep32), table<BFloat16>(keep16),
                               table<Float16>(keep16), table<Float64>(keep_plain<Float64>),
                               {keep_bfloat16, keep_float16}, count_words};
  return all;
}

}  // namespace sparse_cocktail

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // x86-64
