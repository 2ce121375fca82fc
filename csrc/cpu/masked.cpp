// Masked weights on the CPU: where(mask, w, 0) in one pass.
#include "../common/view.h"

namespace sparse_cocktail {
namespace {

// 32 neighbours. Weights move as integers, so a kept NaN keeps its payload and a pruned one becomes
// +0. Lane masks come from a constant table and a select by `&`, which is what vectorises.
template <class Raw>
inline void keep_full_word(uint32_t mask, const Raw* __restrict source, Raw* __restrict target) {
  constexpr int piece = LaneBits<Raw>::kPiece;
  for (int first = 0; first < kWordBits; first += piece) {
    const Raw part = static_cast<Raw>(mask >> first);
    for (int j = 0; j < piece; ++j) {
      const Raw kept = (part & kLaneBits<Raw>.bit[j]) != 0 ? -1 : 0;
      target[first + j] = source[first + j] & kept;
    }
  }
}

template <class Raw>
void keep_where(const WeightView& view, const uint32_t* bits, const Raw* source, Raw* target) {
  const int64_t stride = view.in_stride;
  parallel_for_each_word(view, [=](int64_t word, int64_t offset, int64_t count) {
    const uint32_t mask = bits[word];
    const Raw* p = source + offset;
    Raw* q = target + offset;
    if (stride == 1 && count == kWordBits) {
      keep_full_word(mask, p, q);
    } else {
      for (int j = 0; j < count; ++j) {
        q[j * stride] = p[j * stride] & -static_cast<Raw>(mask >> j & 1);  // no branch to guess
      }
    }
  });
}

Tensor masked_weight(const Tensor& weight, const Tensor& bits) {
  const WeightView of_bits = view_of("masked_weight", "weight", weight);
  const uint32_t* words = words_for("masked_weight", "bits", bits, of_bits);
  Tensor result = torch::stable::empty_like(weight);
  // empty_like keeps the strides of a dense weight; a slice with gaps is packed first, so that one
  // view describes source and result.
  Tensor source = weight;
  if (!(weight.strides() == result.strides())) {
    source = torch::stable::empty_like(weight);
    torch::stable::copy_(source, weight);
  }
  const WeightView view = view_of("masked_weight", "weight", result);
  dispatch_format("masked_weight", "weight", weight, [&](auto format) {
    using Raw = typename decltype(format)::Raw;
    keep_where(view, words, static_cast<const Raw*>(source.const_data_ptr()),
               static_cast<Raw*>(result.mutable_data_ptr()));
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_cocktail_cpp, m) {
  m.def("masked_weight(Tensor weight, Tensor bits) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, CPU, m) {
  m.impl("masked_weight", TORCH_BOX(&masked_weight));
}

}  // namespace sparse_cocktail
