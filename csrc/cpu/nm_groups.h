// Groups of mask bits, and the zeros that pad groups which keep fewer than n. Kept values without
// this padding are a stream (nm_kernels.h).
#pragma once

#include <cstring>

#include "../common/view.h"
#include "simd.h"

namespace sparse_cocktail {

inline Ratio nm_ratio(const char* op, int64_t n, int64_t m) {
  STD_TORCH_CHECK(1 <= n && n < m && m <= kWordBits, op, ": pattern is ", n, ":", m,
                  ", but 1 <= n < m <= 32 is needed; pick another pattern");
  return {static_cast<int>(n), static_cast<int>(m)};
}

// Calls fn(bits) for the groups of m bits of neighbouring words; groups may straddle words.
template <class Fn>
inline void for_each_group(const uint32_t* words, int64_t groups, int m, const Fn& fn) {
  uint64_t queue = 0;
  int queued = 0;
  for (int64_t g = 0; g < groups; ++g) {
    if (queued < m) {
      queue |= uint64_t{*words++} << queued;
      queued += kWordBits;
    }
    fn(static_cast<uint32_t>(queue) & low_bits(m));
    queue >>= m, queued -= m;
  }
}

// Whether all groups keep n, some keep fewer, or one keeps more.
enum class Groups { kFull, kPadded, kTooMany };

// A word's counts of each group of M bits, in the low bits of the group.
template <int M>
inline uint32_t group_counts(uint32_t word) {
  word -= (word >> 1) & 0x55555555u;
  if constexpr (M >= 4) word = (word & 0x33333333u) + ((word >> 2) & 0x33333333u);
  if constexpr (M >= 8) word = (word + (word >> 4)) & 0x0f0f0f0fu;
  if constexpr (M >= 16) word = (word + (word >> 8)) & 0x00ff00ffu;
  if constexpr (M >= 32) word = (word + (word >> 16)) & 0x0000ffffu;
  return word;
}

template <int M>
inline bool all_groups_keep(const uint32_t* words, int64_t count, int n) {
  uint32_t expected = 0, different = 0;
  for (int first = 0; first < kWordBits; first += M) {
    expected |= static_cast<uint32_t>(n) << first;
  }
  for (int64_t w = 0; w < count; ++w) different |= group_counts<M>(words[w]) ^ expected;
  return different == 0;
}

// Of `elements` bits, a multiple of m, from the start of a group and of a word. Bits past them that
// the last word has set count as too many.
inline Groups groups_of(const uint32_t* words, int64_t elements, Ratio ratio) {
  const auto [n, m] = ratio;
  const int64_t full = elements / kWordBits, rest = elements % kWordBits;
  if (rest != 0 && (words[full] & ~low_bits(rest)) != 0) return Groups::kTooMany;
  bool all = false;
  switch (m) {
    case 2: all = all_groups_keep<2>(words, full, n); break;
    case 4: all = all_groups_keep<4>(words, full, n); break;
    case 8: all = all_groups_keep<8>(words, full, n); break;
    case 16: all = all_groups_keep<16>(words, full, n); break;
    case 32: all = all_groups_keep<32>(words, full, n); break;
  }
  int least = n, most = n;
  const int64_t done = all ? full : 0;  // words whose groups are full
  for_each_group(words + done, (elements - done * kWordBits) / m, m, [&](uint32_t bits) {
    const int kept = popcount(bits);
    least = std::min(least, kept), most = std::max(most, kept);
  });
  if (most > n) return Groups::kTooMany;
  return least < n ? Groups::kPadded : Groups::kFull;
}

// From a stream to values, and back.
template <class Raw>
void add_padding(const uint32_t* words, int64_t groups, Ratio ratio, const Raw* stream,
                 Raw* values) {
  for_each_group(words, groups, ratio.m, [&](uint32_t bits) {
    const int kept = popcount(bits);
    for (int j = 0; j < ratio.n; ++j) values[j] = j < kept ? stream[j] : Raw{0};
    stream += kept, values += ratio.n;
  });
}

template <class Raw>
void drop_padding(const uint32_t* words, int64_t groups, Ratio ratio, const Raw* values,
                  Raw* stream) {
  for_each_group(words, groups, ratio.m, [&](uint32_t bits) {
    const int kept = popcount(bits);
    for (int j = 0; j < kept; ++j) stream[j] = values[j];
    stream += kept, values += ratio.n;
  });
}

// Kernels note it and go on; the caller raises when all threads are done.
inline void check_groups(const char* op, bool too_many, Ratio ratio) {
  STD_TORCH_CHECK(!too_many, op, ": bits keep more than n=", ratio.n, " of a group of m=", ratio.m,
                  ", or elements past the last input; make them with nm_mask, or give the n and m "
                  "that they have");
}

}  // namespace sparse_cocktail
