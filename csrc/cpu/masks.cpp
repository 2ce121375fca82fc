// Masks on the CPU: pack and unpack, N:M masks, and exact top-k over one or many weights.
#include <array>
#include <atomic>
#include <optional>

#include "../common/view.h"
#include "select.h"

namespace sparse_cocktail {
namespace {

// ---- pack, unpack, count ------------------------------------------------------------------------

Tensor pack_mask(const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "pack_mask: mask has dtype ",
                  torch::headeronly::toString(mask.scalar_type()),
                  ", but masks are bool; compare it with 0 first");
  const WeightView view = view_of("pack_mask", "mask", mask);
  Tensor bits = empty_bits(view);
  const auto* source = static_cast<const uint8_t*>(mask.const_data_ptr());
  uint32_t* target = mutable_words(bits);
  parallel_for_each_word(view, [&](int64_t word, int64_t offset, int64_t count) {
    std::array<uint8_t, kWordBits> lanes{};  // zeros, so padding bits are 0
    load_lanes(lanes.data(), source + offset, view.in_stride, count, [](uint8_t b) { return b; });
    target[word] = word_where(lanes.data(), [](uint8_t b) { return b != 0; });
  });
  return bits;
}

Tensor unpack_mask(const Tensor& bits, std::vector<int64_t> shape) {
  for (int64_t size : shape) {
    STD_TORCH_CHECK(size >= 0, "unpack_mask: shape is ", to_string(Sizes(shape)),
                    ", but sizes are not negative; pass the shape of the weight");
  }
  Tensor mask = torch::stable::empty(shape, ScalarType::Bool);
  const WeightView view = view_of("unpack_mask", "shape", mask);
  const uint32_t* source = words_for("unpack_mask", "bits", bits, view);
  auto* target = static_cast<uint8_t*>(mask.mutable_data_ptr());
  parallel_for_each_word(view, [&](int64_t word, int64_t offset, int64_t count) {
    const uint32_t value = source[word];
    uint8_t* p = target + offset;
    for_each_lane(count, [&](int j) { p[j * view.in_stride] = value >> j & 1; });
  });
  return mask;
}

Tensor mask_count(const Tensor& bits) {
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Int && bits.is_contiguous(),
                  "mask_count: bits have dtype ",
                  torch::headeronly::toString(bits.scalar_type()), " and strides ",
                  to_string(bits.strides()),
                  ", but mask bits are contiguous int32; make them with pack_mask");
  const auto* words = static_cast<const uint32_t*>(bits.const_data_ptr());
  std::atomic<int64_t> total{0};  // integers: the order of the threads does not matter
  torch::stable::parallel_for(0, bits.numel(), kGrainWords, [&](int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) count += popcount(words[i]);
    total += count;
  });
  Tensor result = torch::stable::empty({}, ScalarType::Long);
  *static_cast<int64_t*>(result.mutable_data_ptr()) = total;
  return result;
}

// ---- N:M ----------------------------------------------------------------------------------------

// Groups that are ranked side by side, one per vector lane. 32 groups of m elements fill exactly m
// words: groups may straddle words, these blocks never do.
constexpr int kLanes = kWordBits;

// Writes the words of up to 32 groups of m elements that start at `source`.
template <class F>
void nm_block(const typename F::Raw* source, int64_t stride, int64_t groups, int n, int m,
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

Tensor nm_mask(const Tensor& weight, int64_t n, int64_t m) {
  STD_TORCH_CHECK(1 <= n && n < m && m <= kWordBits, "nm_mask: pattern is ", n, ":", m,
                  ", but 1 <= n < m <= 32 is needed; pick another pattern");
  const WeightView view = view_of("nm_mask", "weight", weight);
  STD_TORCH_CHECK(view.in % m == 0, "nm_mask: weight has in=", view.in,
                  ", which is not a multiple of m=", m, "; pad the layer or leave it dense");
  Tensor bits = empty_bits(view);
  uint32_t* target = mutable_words(bits);
  // Rows are the unit here: a word at the edge of two groups must not be shared by two threads.
  const int64_t grain = std::max<int64_t>(1, kGrainWords / std::max<int64_t>(1, view.row_words()));
  dispatch_format("nm_mask", "weight", weight, [&](auto format) {
    using F = decltype(format);
    const auto* source = static_cast<const typename F::Raw*>(weight.const_data_ptr());
    torch::stable::parallel_for(0, view.rows(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const auto* p = source + view.row_offset(row);
        uint32_t* q = target + row * view.row_words();
        for (int64_t left = view.in / m; left > 0; left -= kLanes) {
          nm_block<F>(p, view.in_stride, std::min<int64_t>(left, kLanes), static_cast<int>(n),
                      static_cast<int>(m), q);
          p += kLanes * m * view.in_stride;
          q += m;
        }
      }
    });
  });
  return bits;
}

// ---- top-k --------------------------------------------------------------------------------------

// A weight of topk_masks, its name in messages, its eligible positions and its result.
struct Candidate {
  std::string name;
  Tensor weight;
  WeightView view;
  const uint32_t* within;
  Tensor bits;
};

template <class Key>
Sequence<Key> sequence_of(const std::vector<Candidate>& list) {
  std::vector<Part<Key>> parts;
  for (const Candidate& c : list) {
    typename Part<Key>::Load load = nullptr;
    dispatch_format("topk_masks", c.name.c_str(), c.weight, [&](auto format) {
      using F = decltype(format);
      // Other pairs are never asked for: select_together picks a Key that holds every format.
      constexpr bool same = sizeof(Key) == sizeof(typename F::Raw);
      constexpr bool widens = sizeof(Key) == 4 && sizeof(typename F::Raw) == 2;
      if constexpr (same || widens) load = load_keys<F, Key>;
    });
    parts.push_back({c.view, c.weight.const_data_ptr(), load, c.within, mutable_words(c.bits)});
  }
  return Sequence<Key>(std::move(parts));
}

// Selects over a list of weights together, with keys as narrow as their dtypes allow.
void select_together(const std::vector<Candidate>& list, int64_t keep) {
  int64_t elements = 0;
  bool wide = false, uniform = true;
  for (const Candidate& c : list) {
    elements += c.weight.numel();
    wide |= c.weight.scalar_type() == ScalarType::Double;
    uniform &= c.weight.scalar_type() == list[0].weight.scalar_type();
  }
  STD_TORCH_CHECK(0 <= keep && keep <= elements, "topk_masks: keep is ", keep, " of ", elements,
                  " elements (", list[0].name, list.size() > 1 ? " and those after it" : "",
                  "), but 0 <= keep <= elements is needed; lower it");
  STD_TORCH_CHECK(!wide || uniform, "topk_masks: weights mix float64 with narrower dtypes, which "
                  "have no common key; cast them to float64, or pass one keep per weight");
  // A 16-bit key needs one histogram read where a 32-bit key needs two.
  if (wide) {
    select(sequence_of<int64_t>(list), keep);
  } else if (uniform && list[0].weight.element_size() == 2) {
    select(sequence_of<int16_t>(list), keep);
  } else {
    select(sequence_of<int32_t>(list), keep);
  }
}

std::vector<Tensor> topk_masks(std::vector<Tensor> weights, std::vector<int64_t> keep,
                               std::optional<std::vector<Tensor>> within) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(keep.size() == 1 || keep.size() == count, "topk_masks: keep has ", keep.size(),
                  " entries for ", count,
                  " weights; pass one for all weights together, or one per weight");
  STD_TORCH_CHECK(!within || within->size() == count, "topk_masks: within has ",
                  within ? within->size() : 0, " masks for ", count,
                  " weights; pass one per weight");
  std::vector<Candidate> all;
  std::vector<Tensor> result;
  for (size_t i = 0; i < count; ++i) {
    const std::string index = "[" + std::to_string(i) + "]", name = "weights" + index;
    const WeightView view = view_of("topk_masks", name.c_str(), weights[i]);
    const uint32_t* mask = nullptr;
    if (within) mask = words_for("topk_masks", ("within" + index).c_str(), (*within)[i], view);
    result.push_back(empty_bits(view));
    all.push_back({name, weights[i], view, mask, result.back()});
  }
  if (count == 0) return result;
  if (keep.size() == 1) {
    select_together(all, keep[0]);
  } else {
    for (size_t i = 0; i < count; ++i) select_together({all[i]}, keep[i]);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_cocktail_cpp, m) {
  m.def("pack_mask(Tensor mask) -> Tensor");
  m.def("unpack_mask(Tensor bits, int[] shape) -> Tensor");
  m.def("mask_count(Tensor bits) -> Tensor");
  m.def("nm_mask(Tensor weight, int n, int m) -> Tensor");
  m.def("topk_masks(Tensor[] weights, int[] keep, Tensor[]? within) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, CPU, m) {
  m.impl("pack_mask", TORCH_BOX(&pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&unpack_mask));
  m.impl("mask_count", TORCH_BOX(&mask_count));
  m.impl("nm_mask", TORCH_BOX(&nm_mask));
  m.impl("topk_masks", TORCH_BOX(&topk_masks));
}

// With an empty list no tensor's device chooses a kernel: the dispatcher's key is Undefined then.
STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, Undefined, m) {
  m.impl("topk_masks", TORCH_BOX(&topk_masks));
}

}  // namespace sparse_cocktail
