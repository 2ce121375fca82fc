// Mask bits and the order of weights: the two facts that every backend must share to the last bit.
//
// A weight (out, in, *taps) is viewed as (out, taps, in). Its mask is int32 (out, taps, words) with
// words = ceil(in / 32); bit j of word w is the element in = 32 w + j, and padding bits are 0.
//
// Weights are ranked by an integer key of |w|. IEEE formats without their sign bit order like
// integers, so the key costs two instructions and -0.0 equals 0.0; all NaN become one key just
// above infinity. Equal keys rank by position, the lower one first.
//
// Plain C++17 without torch headers: host and device code include this file.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SC_HOST_DEVICE __host__ __device__
#else
#define SC_HOST_DEVICE
#endif

namespace sparse_cocktail {

constexpr int kWordBits = 32;

SC_HOST_DEVICE constexpr int64_t words_of(int64_t in) { return (in + kWordBits - 1) / kWordBits; }

// The lowest `count` bits, 0 <= count <= 32: the elements of a word that are not padding.
SC_HOST_DEVICE constexpr uint32_t low_bits(int64_t count) {
  return count >= kWordBits ? ~uint32_t{0} : (uint32_t{1} << count) - 1;
}

// Counts bits with adds and shifts only: it vectorises, and needs no popcnt instruction, which the
// x86-64 baseline lacks.
SC_HOST_DEVICE constexpr int popcount(uint32_t word) {
  word -= (word >> 1) & 0x55555555u;
  word = (word & 0x33333333u) + ((word >> 2) & 0x33333333u);
  word = (word + (word >> 4)) & 0x0f0f0f0fu;
  return static_cast<int>((word * 0x01010101u) >> 24);
}

// The `count` lowest set bits of a word: what a tie leaves when only `count` of it may stay.
SC_HOST_DEVICE constexpr uint32_t lowest_set_bits(uint32_t word, int64_t count) {
  if (count >= kWordBits) return word;
  uint32_t rest = word;
  for (; count > 0 && rest != 0; --count) rest &= rest - 1;
  return word ^ rest;
}

// Lane bits as constants of the lane's own width: baseline SSE2 can test or set a constant bit per
// lane, but has no shift by lane. Words fall into pieces of as many lanes as a lane has bits.
template <class Lane>
struct LaneBits {
  static constexpr int kPiece = sizeof(Lane) < 4 ? 8 * sizeof(Lane) : kWordBits;
  Lane bit[kPiece] = {};
  constexpr LaneBits() {
    for (int j = 0; j < kPiece; ++j) bit[j] = static_cast<Lane>(uint64_t{1} << j);
  }
};
template <class Lane>
constexpr LaneBits<Lane> kLaneBits{};

// The word whose bit j is test(lanes[j]). Lanes past the end of a row are masked by the caller.
template <class Lane, class Fn>
inline uint32_t word_where(const Lane* lanes, const Fn& test) {
  constexpr int piece = LaneBits<Lane>::kPiece;
  uint32_t word = 0;
  for (int first = 0; first < kWordBits; first += piece) {
    Lane bits = 0;
    for (int j = 0; j < piece; ++j) bits |= test(lanes[first + j]) ? kLaneBits<Lane>.bit[j] : 0;
    word |= (static_cast<uint32_t>(bits) & low_bits(piece)) << first;
  }
  return word;
}

// A number format: its bits as a signed integer, and the bits of infinity. Keys stay below
// the sign bit, so signed compares (the only ones SSE2 has) order them.
template <class RawType, RawType kInfinityBits>
struct Format {
  using Raw = RawType;
  static constexpr Raw kInfinity = kInfinityBits;
  static constexpr Raw kNaN = kInfinityBits + 1;
  static constexpr Raw kMagnitude = static_cast<Raw>(~(Raw{1} << (8 * sizeof(Raw) - 1)));
};
using Float64 = Format<int64_t, 0x7ff0000000000000>;
using Float32 = Format<int32_t, 0x7f800000>;
using Float16 = Format<int16_t, 0x7c00>;
using BFloat16 = Format<int16_t, 0x7f80>;

// The key of one weight, as wide as its format.
template <class F>
SC_HOST_DEVICE inline typename F::Raw key_of(typename F::Raw raw) {
  const typename F::Raw magnitude = raw & F::kMagnitude;
  return magnitude < F::kNaN ? magnitude : F::kNaN;
}

// A 16-bit key as the Float32 key of the same number, so that a list of mixed formats has one
// order. Written without float subnormals: flush-to-zero modes cannot change it.
SC_HOST_DEVICE inline int32_t widen_key(BFloat16, int16_t key) {
  return key == BFloat16::kNaN ? Float32::kNaN : int32_t{key} << 16;
}

SC_HOST_DEVICE inline int32_t widen_key(Float16, int16_t key) {
  if (key >= Float16::kInfinity) return Float32::kInfinity + (key - Float16::kInfinity);
  // 10 -> 23 fraction bits; the exponent bias grows from 15 to 127.
  if (key >= 0x0400) return (int32_t{key} << 13) + ((127 - 15) << 23);
  // Subnormal halves are multiples of 2^-24, which are normal numbers in fp32.
  const float value = static_cast<float>(key) * 0x1p-24f;
  int32_t wide;
  memcpy(&wide, &value, sizeof wide);
  return wide;
}

// An fp32 number as bf16, to nearest even, in integers: no rounding mode can change it.
SC_HOST_DEVICE inline int16_t bfloat16_of(int32_t raw) {
  const uint32_t bits = static_cast<uint32_t>(raw);
  const uint32_t nearest = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<int16_t>(nan ? (bits >> 16 | 0x40u) : nearest);
}

// The same to fp16.
SC_HOST_DEVICE inline int16_t float16_of(int32_t raw) {
  const uint32_t bits = static_cast<uint32_t>(raw), sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return static_cast<int16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
  }
  if (magnitude >= 0x477ff000u) return static_cast<int16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude >= 0x38800000u) {  // normal: drop 13 bits, to nearest even
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
    return static_cast<int16_t>(sign | (rounded - (112u << 23)) >> 13);
  }
  // Subnormal halves are multiples of 2^-24.
  const uint32_t exponent = magnitude >> 23;
  if (exponent < 102) return static_cast<int16_t>(sign);  // below half of the smallest
  const uint32_t fraction = (magnitude & 0x7fffffu) | 0x800000u, shift = 126 - exponent;
  const uint32_t half = 1u << (shift - 1), kept = fraction >> shift;
  const uint32_t rest = fraction & ((1u << shift) - 1);
  return static_cast<int16_t>(sign | (kept + (rest > half || (rest == half && (kept & 1)))));
}

}  // namespace sparse_cocktail
