// Several weights as one sequence of mask words, cut into slots that threads take in turn.
//
//   weights   |---- 0 ----|-- 1 --|------- 2 -------|
//   slots     |----- 0 -----|----- 1 -----|---- 2 ---|      in position order
//
// What a slot finds does not depend on which thread takes it, nor on how many there are.
#pragma once

#include <atomic>
#include <utility>

#include "../common/view.h"
#include "simd.h"

namespace sparse_cocktail {

// One weight of a list. Pointers to words are at the weight's first word; null where not wanted.
template <class F>
struct Part {
  std::string name;  // in messages
  WeightView view;
  const typename F::Raw* data = nullptr;
  const uint32_t* within = nullptr;
  uint32_t* kept = nullptr;
  const uint32_t* given = nullptr;
  uint32_t* fresh = nullptr;
  Ratio ratio;                // of the fresh bits that are made on the way
  int64_t first_word = 0;     // in the sequence
  int64_t first_channel = 0;
  size_t index = 0;           // of the weight in the caller's list

  // Rows follow each other in memory and in the mask, with no padding bits between them.
  bool dense() const {
    return view.in_stride == 1 && view.in % kWordBits == 0 &&
           (view.taps == 1 || view.tap_stride == view.in) &&
           (view.out == 1 || view.out_stride == view.taps * view.in);
  }
  int64_t channel_words() const { return view.taps * view.row_words(); }
};

// The stretches of one weight between two of its words: whole where it is dense, else row by row,
// and cut at channels if asked. fn(first word in the weight, run without the masks).
template <class F, class Fn>
void for_each_run(const Part<F>& part, int64_t begin, int64_t end, bool by_channel, const Fn& fn) {
  const WeightView& view = part.view;
  const bool dense = part.dense();
  const int64_t unit = !dense ? view.row_words() : by_channel ? part.channel_words() : view.words();
  for (int64_t word = begin; word < end;) {
    const int64_t last = std::min(end, (word / unit + 1) * unit);
    Run run{};
    run.stride = view.in_stride;
    if (dense) {
      run.data = part.data + word * kWordBits;
      run.count = (last - word) * kWordBits;
    } else {
      const int64_t row = word / unit, first = (word - row * unit) * kWordBits;
      run.data = part.data + view.row_offset(row) + first * view.in_stride;
      run.count = std::min((last - word) * kWordBits, view.in - first);
    }
    fn(word, run);
    word = last;
  }
}

// Calls fn(slot) for all slots; threads take the next one when they are done with theirs.
template <class Fn>
void for_each_slot(int64_t slots, const Fn& fn) {
  const int64_t threads = std::min<int64_t>(slots, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t slot = 0; slot < slots; ++slot) fn(slot);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (; first < last; ++first) {
      for (int64_t slot = next++; slot < slots; slot = next++) fn(slot);
    }
  });
}

template <class F>
class Sequence {
 public:
  explicit Sequence(std::vector<Part<F>> parts) : parts_(std::move(parts)) {
    for (Part<F>& part : parts_) {
      part.first_word = words_, part.first_channel = channels_;
      words_ += part.view.words(), channels_ += part.view.out;
      elements_ += part.view.out * part.view.taps * part.view.in;
    }
    slots_ = slots_for(words_);
  }

  // 64 K elements outweigh what a slot costs; four slots a thread even out a thread that is late.
  static int64_t slots_for(int64_t words) {
    return std::clamp<int64_t>(words / 2048, 1, 4 * torch::stable::get_num_threads());
  }

  const std::vector<Part<F>>& parts() const { return parts_; }
  int64_t words() const { return words_; }
  int64_t elements() const { return elements_; }
  int64_t channels() const { return channels_; }
  int64_t slots() const { return slots_; }
  int64_t begin_of(int64_t slot) const {
    return words_ / slots_ * slot + std::min(slot, words_ % slots_);
  }
  // Where a slot of any number of slots can begin, at most: sizes scratch.
  int64_t slot_words() const { return (words_ + slots_ - 1) / slots_; }

  // The runs of one slot, in order: fn(part, first word in the part, run with its masks).
  template <class Fn>
  void walk(int64_t slot, bool by_channel, const Fn& fn) const {
    const int64_t begin = begin_of(slot), end = begin_of(slot + 1);
    for (const Part<F>& part : parts_) {
      const int64_t words = part.view.words();
      const int64_t first = std::clamp<int64_t>(begin - part.first_word, 0, words);
      const int64_t last = std::clamp<int64_t>(end - part.first_word, 0, words);
      for_each_run(part, first, last, by_channel, [&](int64_t word, Run run) {
        run.word = static_cast<uint32_t>(part.first_word + word - begin);
        if (part.within) run.within = part.within + word;
        if (part.kept) run.kept = part.kept + word;
        if (part.given) run.given = part.given + word;
        if (part.fresh) run.fresh = part.fresh + word;
        fn(part, word, run);
      });
    }
  }

 private:
  std::vector<Part<F>> parts_;
  int64_t words_ = 0, elements_ = 0, channels_ = 0, slots_ = 1;
};

}  // namespace sparse_cocktail
