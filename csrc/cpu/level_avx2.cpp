// The level of AVX2 (x86-64-v3): 8 keys of 32 bits or 16 keys of 16 bits per register.
#include <cstring>
#include <type_traits>

#include "simd.h"

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

inline int fast_popcount(uint32_t word) { return __builtin_popcount(word); }

template <class F>
struct Block;
template <class F>
struct Sums;

template <class Key>
uint32_t compare_keys(const Key* keys, int count, Key threshold, uint32_t& equal);
uint32_t deposit(uint32_t source, uint32_t places);

#include "kernels.h"

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(p), value); }

template <>
inline uint32_t compare_keys(const int64_t* keys, int count, int64_t threshold, uint32_t& equal) {
  return plain_compare_keys(keys, count, threshold, equal);
}
template <>
inline uint32_t compare_keys(const int32_t* keys, int count, int32_t threshold, uint32_t& equal) {
  const __m256i limit = _mm256_set1_epi32(threshold);
  uint32_t above = 0, same = 0;
  for (int i = 0; i < count; i += 8) {  // reads past the end, within the scratch of the candidates
    const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i));
    const auto bits = [](__m256i lanes) __attribute__((always_inline)) {
      return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
    };
    above |= bits(_mm256_cmpgt_epi32(eight, limit)) << i;
    same |= bits(_mm256_cmpeq_epi32(eight, limit)) << i;
  }
  equal = same & low_bits(count);
  return above & low_bits(count);
}
inline uint32_t deposit(uint32_t source, uint32_t places) { return _pdep_u32(source, places); }

// In a group of M, lane j takes the element S further on; `earlier` is 1 where that wraps around.
template <int M, int S, class Lane>
struct Rotation {
  static constexpr int kLanes = 32 / sizeof(Lane);
  alignas(32) Lane index[kLanes] = {};
  alignas(32) Lane earlier[kLanes] = {};
  alignas(32) uint8_t bytes[32] = {};  // the same within 128 bits, for the byte shuffle
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
inline __m256i rotated(__m256i keys) {
  constexpr const auto& r = kRotation<M, S, Lane>;
  if constexpr (M * sizeof(Lane) <= 16) {
    return _mm256_shuffle_epi8(keys, load(r.bytes));
  } else {
    return _mm256_permutevar8x32_epi32(keys, load(r.index));
  }
}

// All bits of lane j where bit first + j of the word is set, for eight lanes of 32 bits.
inline __m256i lanes_of(uint32_t word, int first) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i eight = _mm256_set1_epi32(static_cast<int>(word >> first));
  return _mm256_cmpeq_epi32(_mm256_and_si256(eight, bit), bit);
}

// Sums over eight numbers at a time, in two steps (see plain.h).
struct VectorSums {
  __m256i coarse_a, coarse_b, fine_a, fine_b;
  int64_t a = 0, b = 0;  // after finish()
  uint32_t count_a = 0, count_b = 0;
  int words = 0;

  // Spelled out: constructors that the compiler makes up do not get this file's instruction set.
  VectorSums() { clear(); }

  void clear() {
    coarse_a = coarse_b = fine_a = fine_b = _mm256_setzero_si256();
    count_a = count_b = 0, words = 0;
  }
  void add_eight(__m256 magnitude, int first, uint32_t in_a, uint32_t in_b) {
    const __m256 step = _mm256_set1_ps(kCoarse), coarse = _mm256_add_ps(magnitude, step);
    const __m256 rest = _mm256_sub_ps(magnitude, _mm256_sub_ps(coarse, step));
    const __m256i high = _mm256_castps_si256(coarse);
    const __m256i low = _mm256_castps_si256(_mm256_add_ps(rest, _mm256_set1_ps(kFine)));
    const __m256i lanes_a = lanes_of(in_a, first), lanes_b = lanes_of(in_b, first);
    coarse_a = _mm256_add_epi32(coarse_a, _mm256_and_si256(high, lanes_a));
    coarse_b = _mm256_add_epi32(coarse_b, _mm256_and_si256(high, lanes_b));
    fine_a = _mm256_add_epi32(fine_a, _mm256_and_si256(low, lanes_a));
    fine_b = _mm256_add_epi32(fine_b, _mm256_and_si256(low, lanes_b));
  }
  void end_word(uint32_t in_a, uint32_t in_b) {
    count_a += fast_popcount(in_a), count_b += fast_popcount(in_b);
    if (++words == kWordsPerFlush) flush();
  }
  static uint32_t lanes_sum(__m256i sums) {
    uint32_t lanes[8], total = 0;
    store(lanes, sums);
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

// The keys of a mask, one after the other; few words have more than a handful.
template <class Raw>
inline void append_keys(const Raw* keys, uint32_t mask, int32_t* target) {
  for (; mask != 0; mask &= mask - 1) *target++ = keys[__builtin_ctz(mask)];
}

template <>
struct Block<Float32> {
  __m256i v[4];

  explicit Block(const int32_t* p) {
    for (int i = 0; i < 4; ++i) {
      const __m256i magnitude =
          _mm256_and_si256(load(p + 8 * i), _mm256_set1_epi32(Float32::kMagnitude));
      v[i] = _mm256_min_epi32(magnitude, _mm256_set1_epi32(Float32::kNaN));
    }
  }
  static uint32_t mask_of(__m256i lanes) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
  }
  uint32_t above(int32_t bound) const {
    const __m256i limit = _mm256_set1_epi32(bound);
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) word |= mask_of(_mm256_cmpgt_epi32(v[i], limit)) << 8 * i;
    return word;
  }
  template <int M, int S>
  uint32_t beaten() const {
    const __m256i earlier = load(kRotation<M, S, int32_t>.earlier);
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) {
      const __m256i other = _mm256_add_epi32(rotated<M, S, int32_t>(v[i]), earlier);
      word |= mask_of(_mm256_cmpgt_epi32(other, v[i])) << 8 * i;
    }
    return word;
  }
  void append(uint32_t mask, int32_t* target) const {
    if (mask == 0) return;
    int32_t keys[kWordBits];
    for (int i = 0; i < 4; ++i) store(keys + 8 * i, v[i]);
    append_keys(keys, mask, target);
  }
  struct Top {
    __m256i lanes;
    Top() : lanes(_mm256_setzero_si256()) {}
  };
  void largest(Top& top) const {
    for (int i = 0; i < 4; ++i) top.lanes = _mm256_max_epi32(top.lanes, v[i]);
  }
  static int32_t top_key(const Top& top) {
    int32_t lanes[8], most = 0;
    store(lanes, top.lanes);
    for (int32_t lane : lanes) most = lane > most ? lane : most;
    return most;
  }
};

template <>
struct Sums<Float32> : VectorSums {
  Sums() : VectorSums() {}
  void add(const Block<Float32>& block, const int32_t*, uint32_t in_a, uint32_t in_b) {
    for (int i = 0; i < 4; ++i) add_eight(_mm256_castsi256_ps(block.v[i]), 8 * i, in_a, in_b);
    end_word(in_a, in_b);
  }
};

template <class F>
struct Block16 {
  __m256i v[2];

  explicit Block16(const int16_t* p) {
    for (int i = 0; i < 2; ++i) {
      const __m256i magnitude =
          _mm256_and_si256(load(p + 16 * i), _mm256_set1_epi16(F::kMagnitude));
      v[i] = _mm256_min_epi16(magnitude, _mm256_set1_epi16(F::kNaN));
    }
  }
  __m128i eight(int i) const {
    const __m256i half = v[i / 2];
    return i % 2 == 0 ? _mm256_castsi256_si128(half) : _mm256_extracti128_si256(half, 1);
  }
  // One bit per lane of 16 bits: packed to bytes, which interleaves halves, and put in order again.
  static uint32_t mask_of(__m256i low, __m256i high) {
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);
    return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
  }
  uint32_t above(int32_t bound) const {
    const __m256i limit = _mm256_set1_epi16(static_cast<int16_t>(bound));
    return mask_of(_mm256_cmpgt_epi16(v[0], limit), _mm256_cmpgt_epi16(v[1], limit));
  }
  template <int M, int S>
  uint32_t beaten() const {
    const __m256i earlier = load(kRotation<M, S, int16_t>.earlier);
    const __m256i low = _mm256_add_epi16(rotated<M, S, int16_t>(v[0]), earlier);
    const __m256i high = _mm256_add_epi16(rotated<M, S, int16_t>(v[1]), earlier);
    return mask_of(_mm256_cmpgt_epi16(low, v[0]), _mm256_cmpgt_epi16(high, v[1]));
  }
  void append(uint32_t mask, int32_t* target) const {
    if (mask == 0) return;
    int16_t keys[kWordBits];
    for (int i = 0; i < 2; ++i) store(keys + 16 * i, v[i]);
    append_keys(keys, mask, target);
  }
  struct Top {
    __m256i lanes;
    Top() : lanes(_mm256_setzero_si256()) {}
  };
  void largest(Top& top) const {
    top.lanes = _mm256_max_epi16(top.lanes, _mm256_max_epi16(v[0], v[1]));
  }
  static int16_t top_key(const Top& top) {
    int16_t lanes[16], most = 0;
    store(lanes, top.lanes);
    for (int16_t lane : lanes) most = lane > most ? lane : most;
    return most;
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
    for (int i = 0; i < 4; ++i) {
      const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(block.eight(i)), 16);
      add_eight(_mm256_castsi256_ps(wide), 8 * i, in_a, in_b);
    }
    end_word(in_a, in_b);
  }
};

template <>
struct Sums<Float16> : VectorSums {
  Sums() : VectorSums() {}
  void add(const Block<Float16>& block, const int16_t*, uint32_t in_a, uint32_t in_b) {
    for (int i = 0; i < 4; ++i) add_eight(_mm256_cvtph_ps(block.eight(i)), 8 * i, in_a, in_b);
    end_word(in_a, in_b);
  }
};

template <>
struct Block<Float64> : PlainBlock<Float64> {
  explicit Block(const int64_t* p) : PlainBlock(p) {}
  static int64_t top_key(int64_t top) { return top; }
};
template <>
struct Sums<Float64> : PlainSums<Float64> {};

// ---- masked copies ------------------------------------------------------------------------------

void keep_float16(const uint32_t* bits, const int32_t* source, int16_t* target, int64_t count) {
  int64_t i = 0;
  for (; i + kWordBits <= count; i += kWordBits) {
    for (int first = 0; first < kWordBits; first += 8) {
      const __m256i lanes = lanes_of(bits[i / kWordBits], first);
      const __m256 kept = _mm256_castsi256_ps(_mm256_and_si256(load(source + i + first), lanes));
      const __m128i cast = _mm256_cvtps_ph(kept, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i + first), cast);
    }
  }
  keep_as_float16(bits + i / kWordBits, source + i, target + i, count - i);
}

template <class F>
constexpr Kernels<F> table() {
  return {select_run<F>, unify_run<F>, settle<F>,    nm_run<F>,
          score_run<F>,  sum_block<F>, keep_plain<F>, copy_plain<F>};
}

}  // namespace
}  // namespace avx2

const KernelTable& avx2_kernels() {
  using namespace avx2;
  static const KernelTable all{table<Float32>(), table<BFloat16>(), table<Float16>(),
                               table<Float64>(), {keep_as_bfloat16, keep_float16}, count_words};
  return all;
}

}  // namespace sparse_cocktail

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // x86-64
