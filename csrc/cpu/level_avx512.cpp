// The level of AVX-512 F, BW, DQ, VL: 16 keys of 32 bits or 32 keys of 16 bits per register, and
// compares that give words directly.
#include <cstring>
#include <type_traits>

#include "simd.h"

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

// Sums over sixteen numbers at a time, in two steps (see plain.h).
struct VectorSums {
  __m512i coarse_a, coarse_b, fine_a, fine_b;
  int64_t a = 0, b = 0;  // after finish()
  uint32_t count_a = 0, count_b = 0;
  int words = 0;

  // Spelled out: constructors that the compiler makes up do not get this file's instruction set.
  VectorSums() { clear(); }

  void clear() {
    coarse_a = coarse_b = fine_a = fine_b = _mm512_setzero_si512();
    count_a = count_b = 0, words = 0;
  }
  void add_half(__m512 magnitude, __mmask16 in_a, __mmask16 in_b) {
    const __m512 coarse = _mm512_add_ps(magnitude, _mm512_set1_ps(kCoarse));
    const __m512 rest = _mm512_sub_ps(magnitude, _mm512_sub_ps(coarse, _mm512_set1_ps(kCoarse)));
    const __m512i high = _mm512_castps_si512(coarse);
    const __m512i low = _mm512_castps_si512(_mm512_add_ps(rest, _mm512_set1_ps(kFine)));
    coarse_a = _mm512_mask_add_epi32(coarse_a, in_a, coarse_a, high);
    coarse_b = _mm512_mask_add_epi32(coarse_b, in_b, coarse_b, high);
    fine_a = _mm512_mask_add_epi32(fine_a, in_a, fine_a, low);
    fine_b = _mm512_mask_add_epi32(fine_b, in_b, fine_b, low);
  }
  void add_word(__m512 first, __m512 second, uint32_t in_a, uint32_t in_b) {
    add_half(first, static_cast<__mmask16>(in_a), static_cast<__mmask16>(in_b));
    add_half(second, in_a >> 16, in_b >> 16);
    count_a += fast_popcount(in_a), count_b += fast_popcount(in_b);
    if (++words == kWordsPerFlush) flush();
  }
  static uint32_t lanes_sum(__m512i sums) {
    uint32_t lanes[16], total = 0;
    _mm512_storeu_si512(lanes, sums);
    for (uint32_t lane : lanes) total += lane;
    return total;
  }
  void flush() {
    a += two_step_sum(lanes_sum(coarse_a), lanes_sum(fine_a), count_a);
    b += two_step_sum(lanes_sum(coarse_b), lanes_sum(fine_b), count_b);
    clear();
  }
  void finish() { flush(); }
};

// The masked lanes of two vectors, one after the other. Few lanes are the rule, and stores of 64
// bytes would cross a line nearly every time: 7.1 against 4.6 ns a word.
inline void append_lanes(__mmask16 first, __m512i low, __mmask16 second, __m512i high,
                         int32_t* target) {
  const __m512i a = _mm512_maskz_compress_epi32(first, low);
  const __m512i b = _mm512_maskz_compress_epi32(second, high);
  const int count = fast_popcount(first);
  if (__builtin_expect(fast_popcount(first | static_cast<uint32_t>(second) << 16) <= 4, true)) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_castsi512_si128(a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + count), _mm512_castsi512_si128(b));
  } else {
    _mm512_storeu_si512(target, a);
    _mm512_storeu_si512(target + count, b);
  }
}

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
    append_lanes(first, low, second, high, target);
  }
  using Top = __m512i;
  void largest(Top& top) const { top = _mm512_max_epi32(top, _mm512_max_epi32(low, high)); }
  static int32_t top_key(Top top) { return _mm512_reduce_max_epi32(top); }
};

template <>
struct Sums<Float32> : VectorSums {
  Sums() : VectorSums() {}
  void add(const Block<Float32>& block, const int32_t*, uint32_t in_a, uint32_t in_b) {
    add_word(_mm512_castsi512_ps(block.low), _mm512_castsi512_ps(block.high), in_a, in_b);
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
  __m256i half(int i) const {
    return i == 0 ? _mm512_castsi512_si256(keys) : _mm512_extracti64x4_epi64(keys, 1);
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
    const __m512i low = _mm512_cvtepi16_epi32(half(0)), high = _mm512_cvtepi16_epi32(half(1));
    append_lanes(first, low, second, high, target);
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
  void add(const Block<BFloat16>& block, const int16_t*, uint32_t in_a, uint32_t in_b) {
    add_word(wide(block.half(0)), wide(block.half(1)), in_a, in_b);
  }
  static __m512 wide(__m256i keys) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(keys), 16));
  }
};

template <>
struct Sums<Float16> : VectorSums {
  Sums() : VectorSums() {}
  void add(const Block<Float16>& block, const int16_t*, uint32_t in_a, uint32_t in_b) {
    add_word(_mm512_cvtph_ps(block.half(0)), _mm512_cvtph_ps(block.half(1)), in_a, in_b);
  }
};

template <>
struct Block<Float64> : PlainBlock<Float64> {
  using PlainBlock::PlainBlock;
  static int64_t top_key(int64_t top) { return top; }
};
template <>
struct Sums<Float64> : PlainSums<Float64> {};

// ---- masked copies ------------------------------------------------------------------------------

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

void copy32(const uint32_t* bits, const int32_t* source, int32_t* target, int64_t count) {
  int64_t i = 0;
  for (; i + kWordBits <= count; i += kWordBits) {
    const uint32_t word = bits[i / kWordBits];
    for (int half = 0; half < kWordBits; half += 16) {
      const __mmask16 mask = static_cast<__mmask16>(word >> half);
      const __m512i own = _mm512_loadu_si512(target + i + half);  // no masked store, see nm_avx512
      _mm512_storeu_si512(target + i + half, _mm512_mask_loadu_epi32(own, mask, source + i + half));
    }
  }
  copy_plain<Float32>(bits + i / kWordBits, source + i, target + i, count - i);
}

// Both 16-bit formats: bits are moved, never read.
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
      const __m512i kept = _mm512_maskz_loadu_epi32(mask, source + i + 16 * half);
      const __m256i cast = _mm512_cvtps_ph(_mm512_castsi512_ps(kept),
                                           _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i + 16 * half), cast);
    }
  }
  keep_as_float16(bits + i / kWordBits, source + i, target + i, count - i);
}

template <class F>
constexpr Kernels<F> table(decltype(Kernels<F>::keep) keep,
                           decltype(Kernels<F>::copy) copy = copy_plain<F>) {
  return {select_run<F>, unify_run<F>, settle<F>, nm_run<F>,
          score_run<F>,  sum_block<F>, keep,      copy};
}

}  // namespace
}  // namespace avx512

const KernelTable& avx512_kernels() {
  using namespace avx512;
  static const KernelTable all{table<Float32>(keep32, copy32), table<BFloat16>(keep16),
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
