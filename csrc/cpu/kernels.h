// The loops behind simd.h, written over a vector type `Block<F>`: 32 keys, one word's worth.
//
// A level includes this file inside its own namespace, after it has switched its instruction set on
// and defined Block<F> for the formats that it speeds up. A Block has
//
//   Block(const Raw* p)             the keys of 32 neighbours
//   above(bound)                    a word: keys > bound
//   beaten<M, S>()                  a word: elements that lose to the one S further on, cyclically,
//                                   in their group of M; of two equals the earlier one wins
//   append(mask, Key* target)       writes the masked keys one after the other, may write 32
//   largest(Top&)                   keeps a running maximum per lane
//
// and Sums<F> adds fixed-point values under two words (see PlainSums). A level also has
// fast_popcount, compare_keys and deposit (see plain_compare_keys, plain_deposit).
//
// Nothing here may call inline functions of the C++ library: the linker keeps one copy of those for
// the whole binary, and it must not be one that needs this level's instructions.

#include "plain.h"

// ---- N:M ----------------------------------------------------------------------------------------

// Every group of M bits turned left by S.
template <int M, int S>
inline uint32_t turn(uint32_t word) {
  uint32_t stays = 0;  // the low M - S bits of each group
  for (int first = 0; first < kWordBits; first += M) stays |= (low_bits(M - S)) << first;
  return ((word & stays) << S) | ((word >> (M - S)) & ~(stays << S));
}

// Elements with fewer than n others ahead of them, in all groups at once. Element j loses to j + S
// exactly when j + S does not lose to j, so only half of the distances are compared.
template <int M, class B>
inline uint32_t kept_of_groups(const B& block, int n) {
  const uint32_t n0 = -static_cast<uint32_t>(n & 1), n1 = -static_cast<uint32_t>(n >> 1 & 1),
                 n2 = -static_cast<uint32_t>(n >> 2 & 1);
  const uint32_t a = block.template beaten<M, 1>();
  if constexpr (M == 2) return ~a;  // n = 1
  if constexpr (M == 4) {
    const uint32_t b = block.template beaten<M, 2>(), c = ~turn<M, 1>(a);
    const uint32_t one = a ^ b ^ c, two = (a & b) | (c & (a | b));  // count = one + 2 two
    return (~two & n1) | (~(two ^ n1) & ~one & n0);
  }
  if constexpr (M == 8) {
    const uint32_t b = block.template beaten<M, 2>(), c = block.template beaten<M, 3>(),
                   d = block.template beaten<M, 4>();
    const uint32_t e = ~turn<M, 3>(c), f = ~turn<M, 2>(b), g = ~turn<M, 1>(a);
    const uint32_t s0 = a ^ b ^ c, c0 = (a & b) | (c & (a | b));
    const uint32_t s1 = d ^ e ^ f, c1 = (d & e) | (f & (d | e));
    const uint32_t one = s0 ^ s1 ^ g, c2 = (s0 & s1) | (g & (s0 | s1));
    const uint32_t two = c0 ^ c1 ^ c2, four = (c0 & c1) | (c2 & (c0 | c1));
    const uint32_t low = (~two & n1) | (~(two ^ n1) & ~one & n0);
    return (~four & n2) | (~(four ^ n2) & low);
  }
}

// ---- one pass over a run ------------------------------------------------------------------------

// How far ahead of its reads a pass prefetches. The hardware stops at pages of 4 KB: on a Xeon with
// AVX-512 and 102 MB of weights, one thread, a selection took 13.3 ms without and 4.8 ms with it.
constexpr int64_t kAheadBytes = 8192;

template <class F, int M, bool kSelect, bool kScore>
void pass(const Run& run, int n, Scan<CandidateKey<F>>* scan, RunSums* sums) {
  using Raw = typename F::Raw;
  using B = Block<F>;
  const Raw* data = static_cast<const Raw*>(run.data);
  const int64_t words = words_of(run.count);
  Sums<F> total;
  typename B::Top top{};
  const CandidateKey<F> below_lo = kSelect ? scan->lo - 1 : 0, hi = kSelect ? scan->hi : 0;
  auto* keys = kSelect ? scan->keys : nullptr;
  auto* found = kSelect ? scan->words : nullptr;
  const bool keyless = kSelect && scan->lo >= scan->hi;
  const bool counts_below = kSelect && scan->counts_below;
  // Copies: the compiler must assume that the words it writes could change the run.
  const uint32_t *const within = run.within, *const given = run.given;
  uint32_t *const kept = run.kept, *const fresh = run.fresh;
  uint32_t number = run.word;
  int64_t in_sure = 0, collected = 0, below = 0;

  const auto one_word = [&](int64_t w, const Raw* p,
                            uint32_t valid) __attribute__((always_inline)) {
    const B block(p);
    uint32_t sure = 0, nm = 0;
    if constexpr (kSelect) {
      const uint32_t eligible = within ? valid & within[w] : valid;
      sure = block.above(hi) & eligible;
      const uint32_t inside = block.above(below_lo) & eligible & ~sure;
      kept[w] = sure;
      const int count = fast_popcount(inside);
      // Written without a branch: whether a word has candidates is a coin toss.
      block.append(inside, keys);
      *found = {number++, inside};
      keys += keyless ? 0 : count;
      collected += count;
      if (counts_below) {
        below += fast_popcount(block.above(below_lo - 1) & eligible & ~(sure | inside));
      }
      found += inside != 0;
    } else if constexpr (kScore) {
      sure = kept[w] & valid;
    }
    if constexpr (M != 0) {
      nm = kept_of_groups<M>(block, n) & valid;
      fresh[w] = nm;
    } else if constexpr (kScore) {
      nm = given ? given[w] & valid : valid;
    }
    if constexpr (kSelect) in_sure += fast_popcount(sure);
    if constexpr (kScore) {
      block.largest(top);
      total.add(block, p, sure, nm);
    }
  };

  const int64_t full = run.stride == 1 ? run.count / kWordBits : 0;
  int64_t w = 0;
  for (; w < full; ++w) {
    const Raw* p = data + w * kWordBits;
    for (int64_t line = 0; line < kWordBits * static_cast<int64_t>(sizeof(Raw)); line += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(p) + kAheadBytes + line);
    }
    one_word(w, p, ~uint32_t{0});
  }
  for (; w < words; ++w) {
    const int64_t left = run.count - w * kWordBits;
    const int64_t lanes = left < kWordBits ? left : kWordBits;
    Raw buffer[kWordBits] = {};
    const Raw* p = data + w * kWordBits * run.stride;
    for (int64_t j = 0; j < lanes; ++j) buffer[j] = p[j * run.stride];
    one_word(w, buffer, low_bits(lanes));
  }
  if constexpr (kSelect) {
    scan->keys = keys, scan->words = found;
    scan->above += in_sure, scan->inside += collected, scan->below += below;
  }
  if constexpr (kScore) {
    total.finish();
    sums->unstructured += total.a;
    sums->nm += total.b;
    sums->exact &= B::top_key(top) < first_inexact_key<F>();
  }
}

// ---- candidates ---------------------------------------------------------------------------------

// Sets the bits of candidates up to the word `end` of the slot: keys above the threshold, and of
// those equal to it the first ones while they last. `kept` is where the slot's word 0 would be.
template <class F>
int64_t settle(Settling<CandidateKey<F>>& s, uint32_t end, uint32_t* kept) {
  using Key = CandidateKey<F>;
  const Key threshold = s.threshold;
  const Key* const first = s.keys;
  uint64_t ties_kept = 0;
  for (; s.words < s.words_end && s.words->word < end; ++s.words) {
    const uint32_t inside = s.words->inside;
    const int count = fast_popcount(inside);
    uint32_t winners;
    if (s.keyless) {
      winners = lowest_set_bits(inside, s.ties);
      s.ties -= fast_popcount(winners), ties_kept += fast_popcount(winners);
    } else {
      uint32_t equal;
      winners = compare_keys(s.keys, count, threshold, equal);
      if (equal != 0) {  // rare
        const uint32_t taken = lowest_set_bits(equal, s.ties);
        s.ties -= fast_popcount(taken), ties_kept += fast_popcount(taken);
        winners |= taken;
      }
      winners = deposit(winners, inside);
      s.keys += count;
    }
    kept[s.words->word] |= winners;
  }
  if (!s.score) return 0;
  uint64_t sum = 0;  // in fixed point, as in Sums
  uint64_t above = 0;
  for (const Key* key = first; key < s.keys; ++key) {
    const bool wins = *key > threshold;
    const uint64_t bits = magic_bits(value_of_key(F{}, static_cast<typename F::Raw>(*key)));
    sum += bits & -static_cast<uint64_t>(wins);
    above += wins;
  }
  const uint64_t tie = magic_bits(value_of_key(F{}, static_cast<typename F::Raw>(threshold)));
  return static_cast<int64_t>(sum - above * kMagicBits + ties_kept * (tie - kMagicBits));
}

template <class F>
void select_run(const Run& run, Scan<CandidateKey<F>>& scan) {
  pass<F, 0, true, false>(run, 0, &scan, nullptr);
}

template <class F>
void unify_run(const Run& run, Ratio ratio, Scan<CandidateKey<F>>& scan, RunSums& sums) {
  switch (ratio.m) {
    case 2: return pass<F, 2, true, true>(run, ratio.n, &scan, &sums);
    case 4: return pass<F, 4, true, true>(run, ratio.n, &scan, &sums);
    case 8: return pass<F, 8, true, true>(run, ratio.n, &scan, &sums);
    default: return pass<F, 0, true, true>(run, 0, &scan, &sums);
  }
}

template <class F>
void nm_run(const Run& run, Ratio ratio) {
  switch (ratio.m) {
    case 2: return pass<F, 2, false, false>(run, ratio.n, nullptr, nullptr);
    case 4: return pass<F, 4, false, false>(run, ratio.n, nullptr, nullptr);
    default: return pass<F, 8, false, false>(run, ratio.n, nullptr, nullptr);
  }
}

template <class F>
void score_run(const Run& run, RunSums& sums) {
  pass<F, 0, false, true>(run, 0, nullptr, &sums);
}

template <class F>
void sum_block(const typename F::Raw* data, int64_t row_stride, int64_t rows, int64_t cols,
               RunSums& sums) {
  typename F::Raw top = 0;
  uint64_t total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const typename F::Raw* p = data + r * row_stride;
    for (int64_t c = 0; c < cols; ++c) {
      const typename F::Raw key = key_of<F>(p[c]);
      top = key > top ? key : top;
      total += static_cast<uint64_t>(magic_bits(value_of_key(F{}, key)));
    }
  }
  total -= static_cast<uint64_t>(rows * cols) * kMagicBits;
  sums.unstructured += static_cast<int64_t>(total);
  sums.exact &= top < first_inexact_key<F>() && rows * cols <= kExactElements;
}

// ---- masked copies ------------------------------------------------------------------------------

template <class Source, class Target, class Cast>
inline void keep_cast(const uint32_t* bits, const Source* __restrict source,
                      Target* __restrict target, int64_t count, const Cast& cast) {
  for (int64_t first = 0; first < count; first += kWordBits) {
    const uint32_t word = bits[first / kWordBits];
    const int64_t lanes = count - first < kWordBits ? count - first : kWordBits;
    const auto keep = [&](int64_t j) __attribute__((always_inline)) {
      const Target kept = (word & uint32_t{1} << j) != 0 ? -1 : 0;
      target[first + j] = cast(source[first + j]) & kept;
    };
    // The usual full word has a constant trip count: its lane bits are constants then.
    if (lanes == kWordBits) {
      for (int64_t j = 0; j < kWordBits; ++j) keep(j);
    } else {
      for (int64_t j = 0; j < lanes; ++j) keep(j);
    }
  }
}

template <class F>
void keep_plain(const uint32_t* bits, const typename F::Raw* source, typename F::Raw* target,
                int64_t count) {
  using Raw = typename F::Raw;
  keep_cast(bits, source, target, count, [](Raw raw) { return raw; });
}

// Where bits are set, from the source; the target's other elements are written as they are.
template <class F>
void copy_plain(const uint32_t* bits, const typename F::Raw* __restrict source,
                typename F::Raw* __restrict target, int64_t count) {
  for (int64_t first = 0; first < count; first += kWordBits) {
    const uint32_t word = bits[first / kWordBits];
    const int64_t lanes = count - first < kWordBits ? count - first : kWordBits;
    const auto copy = [&](int64_t j) __attribute__((always_inline)) {
      const typename F::Raw set = (word & uint32_t{1} << j) != 0 ? -1 : 0;
      target[first + j] ^= (source[first + j] ^ target[first + j]) & set;
    };
    if (lanes == kWordBits) {
      for (int64_t j = 0; j < kWordBits; ++j) copy(j);
    } else {
      for (int64_t j = 0; j < lanes; ++j) copy(j);
    }
  }
}

inline void keep_as_bfloat16(const uint32_t* bits, const int32_t* source, int16_t* target,
                             int64_t count) {
  keep_cast(bits, source, target, count, bfloat16_of);
}

inline void keep_as_float16(const uint32_t* bits, const int32_t* source, int16_t* target,
                            int64_t count) {
  keep_cast(bits, source, target, count, float16_of);
}

inline int64_t count_words(const uint32_t* words, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += fast_popcount(words[i]);
  return total;
}
