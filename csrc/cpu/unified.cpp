// Masks of channels on the CPU, and unified mask generation of a whole stage.
#include "lists.h"
#include "sums.h"

namespace sparse_cocktail {
namespace {

// The importance of a channel from its two sums: shares of them, as integers.
struct Shares {
  int64_t unstructured, nm;
  int64_t score(int64_t by_unstructured, int64_t by_nm) const {
    const int64_t a = saturated(static_cast<__int128>(by_unstructured) * unstructured);
    const int64_t b = saturated(static_cast<__int128>(by_nm) * nm);
    return saturated(static_cast<__int128>(a) + b);
  }
};

// ---- channels -----------------------------------------------------------------------------------

// Sums of one channel again, with saturation; `kept` and `nm` as words, null keeps everything.
template <class F>
void sum_channel(const Part<F>& part, int64_t channel, const uint32_t* nm, int64_t& by_unstructured,
                 int64_t& by_nm) {
  const WeightView& view = part.view;
  __int128 a = 0, b = 0;
  const int64_t begin = channel * part.channel_words();
  for_each_word(view, begin, begin + part.channel_words(),
                [&](int64_t word, int64_t offset, int64_t count) {
                  for (int64_t j = 0; j < count; ++j) {
                    const int64_t value = fixed_point<F>(part.data[offset + j * view.in_stride]);
                    if (part.kept[word] >> j & 1) a += value;
                    if (nm == nullptr || nm[word] >> j & 1) b += value;
                  }
                });
  by_unstructured = saturated(a), by_nm = saturated(b);
}

// Zeroed sums for all channels.
ScoreSums take_sums(const char* op, Arena& arena, int64_t channels) {
  ScoreSums sums{arena.take<int64_t>(op, channels), arena.take<int64_t>(op, channels),
                 arena.take<uint8_t>(op, channels)};
  std::fill_n(sums.unstructured, channels, 0);
  std::fill_n(sums.nm, channels, 0);
  std::fill_n(sums.inexact, channels, 0);
  return sums;
}

int64_t sum_bytes(int64_t channels) { return channels * 17 + 3 * 64; }

// Turns sums into scores, in place: scores[channel of the sequence] lies in sums.unstructured.
template <class F>
void finish_scores(const Sequence<F>& sequence, const ScoreSums& sums, Shares shares) {
  for_each_slot(sequence.parts().size(), [&](int64_t index) {
    const Part<F>& part = sequence.parts()[index];
    const uint32_t* nm = part.ratio.m != 0 ? part.fresh : part.given;
    for (int64_t i = 0; i < part.view.out; ++i) {
      const int64_t channel = part.first_channel + i;
      int64_t &a = sums.unstructured[channel], b = sums.nm[channel];
      if (sums.inexact[channel]) sum_channel(part, i, nm, a, b);
      a = shares.score(a, b);
    }
  });
}

// Whole rows of ones or zeros.
void fill_channels(const WeightView& view, const uint8_t* chosen, uint32_t* bits) {
  const int64_t words = view.row_words(), rest = view.in % kWordBits;
  for (int64_t channel = 0; channel < view.out; ++channel) {
    const uint32_t full = chosen[channel] ? ~uint32_t{0} : 0;
    const uint32_t edge = rest ? full & low_bits(rest) : full;
    std::fill_n(bits, view.taps * words, full);
    for (int64_t tap = 0; rest && tap < view.taps; ++tap) bits[(tap + 1) * words - 1] = edge;
    bits += view.taps * words;
  }
}

Tensors channel_scores(Tensors weights, Tensors unstructured, Tensors nm, int64_t share,
                       int64_t other) {
  const char* op = "channel_scores";
  Tensors result;
  dispatch_list(op, weights, [&](auto format) {
    using F = decltype(format);
    auto parts = parts_of<F>(op, weights);
    const auto by_u = words_of_list(op, "unstructured", parts, unstructured);
    const auto by_n = words_of_list(op, "nm", parts, nm);
    for (size_t i = 0; i < parts.size(); ++i) {
      parts[i].kept = const_cast<uint32_t*>(by_u[i]);  // only read: nothing is selected
      parts[i].given = by_n[i];
    }
    const Sequence<F> sequence(std::move(parts));
    const OwnScratch scratch(sum_bytes(sequence.channels()));
    Arena arena = scratch.arena();
    const ScoreSums sums = take_sums(op, arena, sequence.channels());
    Selection<F>::only_score(sequence, sums);
    finish_scores(sequence, sums, {share, other});
    for (const Part<F>& part : sequence.parts()) {
      result.push_back(torch::stable::empty({part.view.out}, ScalarType::Long));
      std::copy_n(sums.unstructured + part.first_channel, part.view.out,
                  static_cast<int64_t*>(result.back().mutable_data_ptr()));
    }
  });
  return result;
}

Tensors channel_masks(Tensors scores, std::vector<int64_t> keep, std::vector<int64_t> taps,
                      std::vector<int64_t> inputs) {
  Tensors result;
  for (size_t i = 0; i < scores.size(); ++i) {
    const int64_t out = scores[i].numel();
    const WeightView view{out, taps[i], inputs[i]};
    std::vector<int64_t> copy(out);
    std::vector<uint8_t> chosen(out);
    choose_best(static_cast<const int64_t*>(scores[i].const_data_ptr()), out, keep[i],
                chosen.data(), copy.data());
    result.push_back(empty_bits(view));
    fill_channels(view, chosen.data(), mutable_words(result.back()));
  }
  return result;
}

// ---- unified mask generation --------------------------------------------------------------------

// Where the masks of a stage come from and go to; every list has one entry per weight.
struct Stage {
  std::vector<const uint32_t*> within, given;   // null: everything
  std::vector<uint32_t*> unstructured, nm, channel;  // nm null: not wanted
};

template <class F>
int64_t unified_bytes(const std::vector<Part<F>>& parts) {
  int64_t words = 0, channels = 0;
  for (const Part<F>& part : parts) words += part.view.words(), channels += part.view.out;
  // scores and their copies, the selection, one copy of an aliased row
  return sum_bytes(channels) + channels * 9 + 4 * words + SelectionScratch<F>::bytes(words) +
         10 * 64;  // alignment
}

template <class F>
void copy_or_fill(const Part<F>& part, const uint32_t* given, uint32_t* target) {
  if (given == target) return;
  if (given != nullptr) {
    memcpy(target, given, part.view.words() * sizeof(uint32_t));
  } else {
    const std::vector<uint8_t> all(part.view.out, 1);
    fill_channels(part.view, all.data(), target);
  }
}

template <class F>
void unified_into(const char* op, std::vector<Part<F>> parts, int64_t keep, Ratio ratio,
                  const int64_t* channel_keep, Shares shares, const Stage& stage, Arena arena) {
  for (size_t i = 0; i < parts.size(); ++i) {
    Part<F>& part = parts[i];
    part.within = stage.within[i], part.kept = stage.unstructured[i];
    if (ratio.m != 0 && part.view.in % ratio.m == 0) {
      part.ratio = ratio, part.fresh = stage.nm[i];
    } else {
      part.given = stage.given[i];
    }
  }
  if (ratio.m != 0 && !has_fast_groups(ratio)) {  // made first, and given from then on
    make_nm(Sequence<F>(parts));
    for (Part<F>& part : parts) {
      if (part.ratio.m != 0) part.given = part.fresh, part.ratio = {};
    }
  }
  const Sequence<F> sequence(std::move(parts));
  const ScoreSums sums = take_sums(op, arena, sequence.channels());
  const int64_t bytes = SelectionScratch<F>::bytes(sequence.words());
  Selection<F>(sequence, keep, arena.take<uint8_t>(op, bytes), sums).run();
  finish_scores(sequence, sums, shares);
  auto* copies = arena.take<int64_t>(op, sequence.channels());
  auto* chosen = arena.take<uint8_t>(op, sequence.channels());
  for_each_slot(sequence.parts().size(), [&](int64_t i) {
    const Part<F>& part = sequence.parts()[i];
    const int64_t channel = part.first_channel;
    choose_best(sums.unstructured + channel, part.view.out, channel_keep[i], chosen + channel,
                copies + channel);
    fill_channels(part.view, chosen + channel, stage.channel[i]);
    if (stage.nm[i] != nullptr && part.ratio.m == 0 && part.given != stage.nm[i]) {
      copy_or_fill(part, part.given, stage.nm[i]);
    }
  });
}

Ratio optional_ratio(const std::vector<int64_t>& nm) {
  return nm.empty() ? Ratio{} : Ratio{static_cast<int>(nm[0]), static_cast<int>(nm[1])};
}

// `nm` is (n, m) or empty; `shares` are the integer weights of the two sums.
Tensors unified_masks(Tensors weights, int64_t keep, std::vector<int64_t> nm,
                      std::vector<int64_t> channel_keep, std::vector<int64_t> shares,
                      MaybeTensors within, MaybeTensors nm_bits) {
  const char* op = "unified_masks";
  Tensors result;
  dispatch_list(op, weights, [&](auto format) {
    using F = decltype(format);
    auto parts = parts_of<F>(op, weights);
    Stage stage{words_of_list(op, "within", parts, within),
                words_of_list(op, "nm_bits", parts, nm_bits), {}, {}, {}};
    for (auto* list : {&stage.unstructured, &stage.nm, &stage.channel}) {
      for (Tensor& bits : empty_masks(parts)) {
        list->push_back(mutable_words(bits));
        result.push_back(bits);
      }
    }
    const OwnScratch scratch(unified_bytes(parts));
    unified_into(op, std::move(parts), keep, optional_ratio(nm), channel_keep.data(),
                 {shares[0], shares[1]}, stage, scratch.arena());
  });
  return result;
}

// The same into rows of a mask bank. `within` may be the unstructured row, `nm_from` the N:M row.
void unified_rows_(Tensors weights, const Tensor& keep, std::vector<int64_t> nm,
                   const Tensor& channel_keep, std::vector<int64_t> shares, MaybeTensor within,
                   MaybeTensor nm_from, const Tensor& unstructured, MaybeTensor nm_row,
                   const Tensor& channel, const Tensor& scratch) {
  const char* op = "unified_rows_";
  dispatch_list(op, weights, [&](auto format) {
    using F = decltype(format);
    auto parts = parts_of<F>(op, weights);
    Arena arena = arena_of(op, scratch);
    const auto eligible = words_of_row(op, "within", parts, within);
    const auto given = words_of_row(op, "nm_from", parts, nm_from);
    Stage stage{{eligible.begin(), eligible.end()},
                {given.begin(), given.end()},
                words_of_row(op, "unstructured", parts, unstructured),
                words_of_row(op, "nm_row", parts, nm_row),
                words_of_row(op, "channel", parts, channel)};
    STD_TORCH_CHECK(channel_keep.scalar_type() == ScalarType::Long &&
                        channel_keep.is_contiguous() &&
                        channel_keep.numel() == static_cast<int64_t>(parts.size()),
                    op, ": channel_keep has dtype ",
                    torch::headeronly::toString(channel_keep.scalar_type()), " and ",
                    channel_keep.numel(), " entries, but it is ", parts.size(),
                    " contiguous int64; make it with torch.tensor");
    STD_TORCH_CHECK(nm.empty() || nm_row, op, ": nm is given, but there is no row nm_row for its "
                    "masks; pass one");
    if (stage.within[0] == stage.unstructured[0] && unstructured.numel() > 0) {
      auto* copy = arena.take<uint32_t>(op, unstructured.numel());
      memcpy(copy, stage.within[0], unstructured.numel() * sizeof(uint32_t));
      for (const uint32_t*& words : stage.within) words = copy + (words - stage.unstructured[0]);
    }
    unified_into(op, std::move(parts), count_of(op, "keep", keep), optional_ratio(nm),
                 static_cast<const int64_t*>(channel_keep.const_data_ptr()),
                 {shares[0], shares[1]}, stage, arena);
  });
}

// Scratch that suits every selection over these weights with the present number of threads.
int64_t workspace_bytes(Tensors weights) {
  int64_t bytes = 0;
  dispatch_list("workspace", weights, [&](auto format) {
    bytes = unified_bytes(parts_of<decltype(format)>("workspace", weights));
  });
  return bytes;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_cocktail_cpp, m) {
  m.def("channel_scores(Tensor[] weights, Tensor[] unstructured, Tensor[] nm, int share, "
        "int other) -> Tensor[]");
  m.def("channel_masks(Tensor[] scores, int[] keep, int[] taps, int[] inputs) -> Tensor[]");
  m.def("unified_masks(Tensor[] weights, int keep, int[] nm, int[] channel_keep, int[] shares, "
        "Tensor[]? within, Tensor[]? nm_bits) -> Tensor[]");
  m.def("unified_rows_(Tensor[] weights, Tensor keep, int[] nm, Tensor channel_keep, "
        "int[] shares, Tensor? within, Tensor? nm_from, Tensor(a!) unstructured, "
        "Tensor(b!)? nm_row, Tensor(c!) channel, Tensor(d!) scratch) -> ()");
  m.def("workspace_bytes(Tensor[] weights) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, CPU, m) {
  m.impl("channel_scores", TORCH_BOX(&channel_scores));
  m.impl("channel_masks", TORCH_BOX(&channel_masks));
  m.impl("unified_masks", TORCH_BOX(&unified_masks));
  m.impl("unified_rows_", TORCH_BOX(&unified_rows_));
  m.impl("workspace_bytes", TORCH_BOX(&workspace_bytes));
}

// With an empty list no tensor's device chooses a kernel: the dispatcher's key is Undefined then.
STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, Undefined, m) {
  m.impl("channel_scores", TORCH_BOX(&channel_scores));
  m.impl("channel_masks", TORCH_BOX(&channel_masks));
  m.impl("unified_masks", TORCH_BOX(&unified_masks));
}

}  // namespace sparse_cocktail
