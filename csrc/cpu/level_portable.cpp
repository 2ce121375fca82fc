// The level that runs anywhere: plain C++, which the compiler vectorises for its baseline.
#include <cstring>
#include <type_traits>

#include "simd.h"

namespace sparse_cocktail {
namespace portable {
namespace {

inline int fast_popcount(uint32_t word) { return popcount(word); }

template <class F>
struct Block;
template <class F>
struct PlainSums;
template <class F>
using Sums = PlainSums<F>;

template <class Key>
uint32_t compare_keys(const Key* keys, int count, Key threshold, uint32_t& equal);
uint32_t deposit(uint32_t source, uint32_t places);

#include "kernels.h"

template <class Key>
inline uint32_t compare_keys(const Key* keys, int count, Key threshold, uint32_t& equal) {
  return plain_compare_keys(keys, count, threshold, equal);
}
inline uint32_t deposit(uint32_t source, uint32_t places) { return plain_deposit(source, places); }

template <class F>
struct Block : PlainBlock<F> {
  using PlainBlock<F>::PlainBlock;
  static typename F::Raw top_key(typename F::Raw top) { return top; }
};

template <class F>
constexpr Kernels<F> table() {
  return {select_run<F>, unify_run<F>, settle<F>,    nm_run<F>,
          score_run<F>,  sum_block<F>, keep_plain<F>, copy_plain<F>};
}

}  // namespace
}  // namespace portable

const KernelTable& portable_kernels() {
  using namespace portable;
  static const KernelTable all{table<Float32>(), table<BFloat16>(), table<Float16>(),
                               table<Float64>(), {keep_as_bfloat16, keep_as_float16}, count_words};
  return all;
}

}  // namespace sparse_cocktail
