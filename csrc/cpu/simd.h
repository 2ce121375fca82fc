// The inner loops of the mask ops, compiled once per instruction set and chosen at run time.
//
//   level_portable.cpp   plain C++, any machine
//   level_avx2.cpp       x86-64-v3
//   level_avx512.cpp     AVX-512 F, BW, DQ, VL (Skylake-X and later, Zen 4 and later)
//
// All levels run the templates of kernels.h on their own vector types and give the same bits.
#pragma once

#include <type_traits>

#include "../common/bits.h"

namespace sparse_cocktail {

enum class Level : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// Keys of candidates: as wide as the format, but 16-bit keys travel in 32 bits.
template <class F>
using CandidateKey = std::conditional_t<sizeof(typename F::Raw) == 8, int64_t, int32_t>;

// A word with candidates: `inside` are their bits, their keys follow each other in position order.
struct CandidateWord {
  uint32_t word;    // from the start of the slot
  uint32_t inside;
};

// What a slot finds while it reads its weights once.
//
//   key > hi          kept for sure                lo > hi: no candidates; hi = -1: all are kept
//   lo <= key <= hi   a candidate                  lo = hi: all candidates are equal, and their
//   key = lo - 1      only counted, if asked for            keys are not collected
template <class Key>
struct Scan {
  Key lo = 0, hi = 0;
  bool counts_below = false;
  int64_t above = 0, inside = 0, below = 0;  // how many lie where
  Key* keys = nullptr;                       // of the candidates, one after the other
  CandidateWord* words = nullptr;
};

// A stretch of words of one weight: `count` elements at `data`, `stride` apart. It is one row, part
// of one, or, where rows follow each other without padding bits, many.
struct Run {
  const void* data;
  int64_t stride;
  int64_t count;
  uint32_t word;                    // of the slot, where the run starts
  const uint32_t* within;           // null: all are eligible
  uint32_t* kept;                   // written by a selection, read by scores alone
  const uint32_t* given = nullptr;  // N:M bits to score by; null: all ones, or fresh ones
  uint32_t* fresh = nullptr;        // fresh N:M bits go here
};

// The candidates of a slot while their bits are settled.
template <class Key>
struct Settling {
  const CandidateWord *words, *words_end;
  const Key* keys;
  Key threshold;
  int64_t ties;   // how many more that equal the threshold are kept
  bool keyless;   // all equal it, and no keys were collected
  bool score;     // the sums of what is kept are wanted
};

// Sums of round(|w| * 2^38) over the elements that the masks keep. They are right (`exact`) unless
// a value is huge, infinite or NaN; then the caller sums again with saturation.
struct RunSums {
  int64_t unstructured = 0, nm = 0;
  bool exact = true;
};

// n of every m; m = 0: none.
struct Ratio {
  int n = 0, m = 0;
};

template <class F>
struct Kernels {
  using Key = CandidateKey<F>;
  // Selects by the bracket, and collects candidates.
  void (*select)(const Run&, Scan<Key>&);
  // The same with fresh N:M bits where ratio.m is 2, 4 or 8 (else by the given ones), and the sums
  // over the sure bits and the N:M bits.
  void (*unify)(const Run&, Ratio, Scan<Key>&, RunSums&);
  // Sets the bits of candidates up to a word of the slot, and returns their sum in fixed point.
  int64_t (*settle)(Settling<Key>&, uint32_t end, uint32_t* kept);
  // Only fresh N:M bits, m = 2, 4 or 8.
  void (*nm)(const Run&, Ratio);
  // Only the sums over `kept` and `given`.
  void (*score)(const Run&, RunSums&);
  // Sum over rows x cols elements, each row contiguous.
  void (*block)(const typename F::Raw*, int64_t row_stride, int64_t rows, int64_t cols, RunSums&);
  // target[i] = bit i ? source[i] : 0, for neighbours; count need not be a multiple of 32.
  void (*keep)(const uint32_t* bits, const typename F::Raw* source, typename F::Raw* target,
               int64_t count);
  // The same over what the target holds, whose elements stay where bits are not set.
  void (*copy)(const uint32_t* bits, const typename F::Raw* source, typename F::Raw* target,
               int64_t count);
};

// fp32 masters to 16 bits, rounded to nearest even.
struct Casts {
  void (*to_bfloat16)(const uint32_t* bits, const int32_t* source, int16_t* target, int64_t count);
  void (*to_float16)(const uint32_t* bits, const int32_t* source, int16_t* target, int64_t count);
};

struct KernelTable {
  Kernels<Float32> float32;
  Kernels<BFloat16> bfloat16;
  Kernels<Float16> float16;
  Kernels<Float64> float64;
  Casts casts;
  int64_t (*popcount)(const uint32_t* words, int64_t count);

  const Kernels<Float32>& of(Float32) const { return float32; }
  const Kernels<BFloat16>& of(BFloat16) const { return bfloat16; }
  const Kernels<Float16>& of(Float16) const { return float16; }
  const Kernels<Float64>& of(Float64) const { return float64; }
};

const KernelTable& portable_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();

Level best_level();          // that this machine can run
Level current_level();       // the best one, unless a lower one is forced
const KernelTable& kernels();  // of the current level

}  // namespace sparse_cocktail
