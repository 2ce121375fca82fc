// Sums of |w| in fixed point, round(|w| * 2^38), which are the same in any order, and the choice of
// the best of them. Ordinary weights (all |w| < 8) are summed by the fast loops of kernels.h; a
// channel or block with others is summed again with what is here, which saturates.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>

#include "../common/bits.h"

namespace sparse_cocktail {

constexpr int64_t kLargest = INT64_MAX;

inline int64_t saturated(__int128 value) {
  return value < kLargest ? static_cast<int64_t>(value) : kLargest;
}

template <class F>
inline int64_t fixed_point(typename F::Raw raw) {
  const auto key = key_of<F>(raw);
  double value;
  if constexpr (sizeof key == 8) {
    memcpy(&value, &key, sizeof value);
  } else {
    int32_t wide;
    if constexpr (sizeof key == 4) wide = key;
    else wide = widen_key(F{}, key);
    float single;
    memcpy(&single, &wide, sizeof single);
    value = single;
  }
  const double scaled = std::nearbyint(value * 0x1p38);
  return scaled < 0x1p63 ? static_cast<int64_t>(scaled) : kLargest;  // NaN is not smaller
}

// Marks the `keep` best of `count` scores; ties go to the lower index, negative ones never win.
inline void choose_best(const int64_t* scores, int64_t count, int64_t keep, uint8_t* chosen,
                        int64_t* scratch) {
  const int64_t eligible = std::count_if(scores, scores + count, [](int64_t s) { return s >= 0; });
  keep = std::clamp<int64_t>(keep, 0, eligible);
  std::fill_n(chosen, count, 0);
  if (keep == 0) return;
  std::copy_n(scores, count, scratch);
  std::nth_element(scratch, scratch + keep - 1, scratch + count, std::greater<int64_t>());
  const int64_t threshold = scratch[keep - 1];
  for (int64_t i = 0; i < count; ++i) {
    if (scores[i] > threshold) chosen[i] = 1, --keep;
  }
  for (int64_t i = 0; keep > 0; ++i) {
    if (scores[i] == threshold) chosen[i] = 1, --keep;
  }
}

}  // namespace sparse_cocktail
