// N:M bits: fast for m = 2, 4, 8, where groups lie within a word, and by counting for any other m.
#pragma once

#include "sequence.h"

namespace sparse_cocktail {

inline bool has_fast_groups(Ratio ratio) { return ratio.m == 2 || ratio.m == 4 || ratio.m == 8; }

// Groups that are ranked side by side, one per vector lane. 32 groups of m elements fill exactly m
// words: groups may straddle words, these blocks never do.
constexpr int kLanes = kWordBits;

// Writes the words of up to 32 groups of m elements that start at `source`.
template <class F>
inline void nm_block(const typename F::Raw* source, int64_t stride, int64_t groups, int n, int m,
              uint32_t* target) {
  using Key = typename F::Raw;
  // keys[j][g], ranks[j][g]: element j of group g. Lanes past `groups` are computed and dropped.
  Key keys[kWordBits][kLanes], ranks[kWordBits][kLanes];
  for (int j = 0; j < m; ++j) {
    for (int g = 0; g < kLanes; ++g) {
      keys[j][g] = g < groups ? key_of<F>(source[(g * m + j) * stride]) : 0;
      ranks[j][g] = 0;
    }
  }
  // Counting pairs is m / 2 compares per element without a branch; a sort would not vectorise.
  // An element's rank is the number of elements that beat it; of two equals the earlier one wins.
  for (int a = 0; a < m; ++a) {
    for (int b = a + 1; b < m; ++b) {
      for (int g = 0; g < kLanes; ++g) {
        const Key later_wins = keys[b][g] > keys[a][g];
        ranks[a][g] += later_wins;
        ranks[b][g] += 1 - later_wins;
      }
    }
  }
  uint32_t kept[kLanes] = {};  // the m bits of each group
  for (int j = 0; j < m; ++j) {
    for (int g = 0; g < kLanes; ++g) kept[g] |= uint32_t{ranks[j][g] < n} << j;
  }
  uint64_t queue = 0;  // bits that wait for a full word
  int queued = 0;
  for (int64_t g = 0; g < groups; ++g) {
    queue |= uint64_t{kept[g]} << queued;
    queued += m;
    if (queued >= kWordBits) {
      *target++ = static_cast<uint32_t>(queue);
      queue >>= kWordBits;
      queued -= kWordBits;
    }
  }
  if (queued > 0) *target = static_cast<uint32_t>(queue);
}

// The fresh bits of all parts that have a ratio.
template <class F>
void make_nm(const Sequence<F>& sequence) {
  const Kernels<F>& kernel = kernels().of(F{});
  for_each_slot(sequence.slots(), [&](int64_t slot) {
    sequence.walk(slot, false, [&](const Part<F>& part, int64_t, const Run& run) {
      if (has_fast_groups(part.ratio)) kernel.nm(run, part.ratio);
    });
  });
  for (const Part<F>& part : sequence.parts()) {
    const auto [n, m] = part.ratio;
    if (m == 0 || has_fast_groups(part.ratio)) continue;
    // Rows are the unit here: a word at the edge of two groups must not be shared by two threads.
    const WeightView& view = part.view;
    const int64_t row_words = std::max<int64_t>(1, view.row_words());
    const int64_t grain = std::max<int64_t>(1, kGrainWords / row_words);
    const auto rows = [&, n = n, m = m](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto* p = part.data + view.row_offset(row);
        uint32_t* q = part.fresh + row * view.row_words();
        for (int64_t left = view.in / m; left > 0; left -= kLanes) {
          nm_block<F>(p, view.in_stride, std::min<int64_t>(left, kLanes), n, m, q);
          p += kLanes * m * view.in_stride;
          q += m;
        }
      }
    };
    torch::stable::parallel_for(0, view.rows(), grain, rows);
  }
}

}  // namespace sparse_cocktail
