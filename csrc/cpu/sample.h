// A sample of the keys of a sequence, and the keys at given ranks of it.
#pragma once

#include <functional>

#include "sequence.h"

namespace sparse_cocktail {

constexpr int64_t kSample = int64_t{1} << 16;
constexpr int64_t kSampleRun = 16;  // neighbours that are sampled together: half a word
constexpr int kBins = 4096;  // of histograms that stay in the first-level cache

// Runs of neighbours at even distances over the sequence. Half of a word's elements are taken, also
// where a short row leaves it few, so that every element is as likely as any other.
template <class F>
std::vector<CandidateKey<F>> draw_sample(const Sequence<F>& sequence) {
  using Raw = typename F::Raw;
  using Key = CandidateKey<F>;
  struct Start {
    const Raw* data;
    int64_t stride, count;
    uint32_t eligible;
  };
  const int64_t words = sequence.words();
  const int64_t size = std::min(kSample, sequence.elements() / 8);
  const int64_t runs = std::max<int64_t>(1, size / kSampleRun);
  std::vector<Start> starts;
  starts.reserve(runs);
  const auto* part = sequence.parts().data();
  for (int64_t i = 0; i < runs; ++i) {
    const auto position = static_cast<int64_t>((i + 0.5) / runs * words);
    while (position >= part->first_word + part->view.words()) ++part;
    const int64_t word = position - part->first_word;
    const WeightView& view = part->view;
    const int64_t row = word / view.row_words(), first = word % view.row_words() * kWordBits;
    starts.push_back({part->data + view.row_offset(row) + first * view.in_stride, view.in_stride,
                      (std::min<int64_t>(view.in - first, kWordBits) + i % 2) / 2,
                      part->within ? part->within[word] : ~uint32_t{0}});
  }
  std::vector<Key> sample;
  sample.reserve(runs * kSampleRun);
  constexpr int64_t ahead = 32;  // every run is a cache miss: have many under way
  for (int64_t i = 0; i < runs; ++i) {
    if (i + ahead < runs) __builtin_prefetch(starts[i + ahead].data);
    const Start& start = starts[i];
    for (int64_t j = 0; j < start.count; ++j) {
      if (start.eligible >> j & 1) sample.push_back(key_of<F>(start.data[j * start.stride]));
    }
  }
  return sample;
}

// What leaves kBins digits of a key.
template <class F>
constexpr int kSampleShift = 8 * sizeof(typename F::Raw) - 1 - 12;

// The key of a rank, largest first, from 0: its bin, and its place among the keys of that bin.
template <class F>
CandidateKey<F> ranked(const std::vector<CandidateKey<F>>& sample,
                       const std::vector<uint32_t>& bins, int64_t rank) {
  using Key = CandidateKey<F>;
  int64_t bin = kBins - 1;
  for (; rank >= bins[bin]; --bin) rank -= bins[bin];
  std::vector<Key> same;
  same.reserve(bins[bin]);
  for (const Key key : sample) {
    if (key >> kSampleShift<F> == bin) same.push_back(key);
  }
  std::nth_element(same.begin(), same.begin() + rank, same.end(), std::greater<Key>());
  return same[rank];
}

}  // namespace sparse_cocktail
