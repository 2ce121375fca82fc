// A sample of the keys of a sequence, and the keys at given ranks of it.
#pragma once

#include <functional>

#include "sequence.h"

namespace sparse_cocktail {

constexpr int64_t kSample = int64_t{1} << 16;
constexpr int64_t kSampleRun = 16;  // neighbours that are sampled together: half a word
constexpr int kBins = 4096;  // of histograms that stay in the first-level cache

// The word at a share of the whole sequence; `part` is at or before the one that it lies in.
template <class F, class Start>
Start start_of(const Sequence<F>& sequence, double share, const Part<F>*& part) {
  const auto position = static_cast<int64_t>(share * sequence.words());
  while (position >= part->first_word + part->view.words()) ++part;
  const int64_t word = position - part->first_word;
  const WeightView& view = part->view;
  const int64_t row = word / view.row_words(), first = word % view.row_words() * kWordBits;
  return {part->data + view.row_offset(row) + first * view.in_stride, view.in_stride,
          std::min<int64_t>(view.in - first, kWordBits), part->within ? part->within[word] : ~0u};
}

// Runs of neighbours at even distances over the sequence, into `sample`, which has room for kSample
// keys; returns how many were drawn. Half of a word's elements are taken, also where a short row
// leaves it few, so that every element is as likely as any other.
template <class F>
int64_t draw_sample(const Sequence<F>& sequence, CandidateKey<F>* sample) {
  using Key = CandidateKey<F>;
  struct Start {
    const typename F::Raw* data;
    int64_t stride, count;
    uint32_t eligible;
  };
  const int64_t size = std::min(kSample, sequence.elements() / 8);
  const int64_t runs = std::max<int64_t>(1, size / kSampleRun);
  constexpr int64_t kThreads = 4, kAtOnce = 32;  // every run is a cache miss: many are under way
  int64_t drawn[kThreads] = {};
  for_each_slot(kThreads, [&](int64_t thread) {
    const int64_t begin = runs * thread / kThreads, end = runs * (thread + 1) / kThreads;
    const auto* part = sequence.parts().data();
    Key* const first = sample + begin * kSampleRun;
    Key* next = first;
    for (int64_t run = begin; run < end; run += kAtOnce) {
      Start starts[kAtOnce];
      const int64_t count = std::min(kAtOnce, end - run);
      for (int64_t i = 0; i < count; ++i) {
        starts[i] = start_of<F, Start>(sequence, (run + i + 0.5) / runs, part);
        starts[i].count = (starts[i].count + (run + i) % 2) / 2;
        __builtin_prefetch(starts[i].data);
      }
      for (const Start* start = starts; start < starts + count; ++start) {
        for (int64_t j = 0; j < start->count; ++j) {
          *next = key_of<F>(start->data[j * start->stride]);
          next += start->eligible >> j & 1;
        }
      }
    }
    drawn[thread] = next - first;
  });
  int64_t total = 0;
  for (int64_t thread = 0; thread < kThreads; ++thread) {
    const Key* first = sample + runs * thread / kThreads * kSampleRun;
    std::copy_n(first, drawn[thread], sample + total);
    total += drawn[thread];
  }
  return total;
}

// What leaves kBins digits of a key.
template <class F>
constexpr int kSampleShift = 8 * sizeof(typename F::Raw) - 1 - 12;

// The key of a rank, largest first, from 0: its bin, and its place among the keys of that bin.
template <class F>
CandidateKey<F> ranked(const CandidateKey<F>* sample, int64_t drawn,
                       const std::vector<uint32_t>& bins, int64_t rank) {
  using Key = CandidateKey<F>;
  int64_t bin = kBins - 1;
  for (; rank >= bins[bin]; --bin) rank -= bins[bin];
  std::vector<Key> same;
  same.reserve(bins[bin]);
  for (int64_t i = 0; i < drawn; ++i) {
    if (sample[i] >> kSampleShift<F> == bin) same.push_back(sample[i]);
  }
  std::nth_element(same.begin(), same.begin() + rank, same.end(), std::greater<Key>());
  return same[rank];
}

}  // namespace sparse_cocktail
