// Exact top-k over one or many weights on the CPU, threaded and independent of the thread count.
//
// Keys are read once per 16-bit digit, top digit first. Each read counts the digits of the eligible
// keys that match the digits found so far; walking the counts from the top gives the next digit of
// the threshold, and how many keys below that point are still needed. A last read writes the bits:
// all keys above the threshold, and of those equal to it the first ones in position order.
//
//   thread        0              1              2
//   words    |------------|--------------|-------------|   one slot each, in position order
//   ties          5              2              4           counted by the last histogram
//   kept          5              1              0           when 6 ties are needed
#pragma once

#include <array>
#include <type_traits>
#include <utility>

#include "../common/view.h"

namespace sparse_cocktail {

// The threshold is found digit by digit, top digit first: 16 bits per digit mean two reads for
// fp32, and a histogram (512 KB) that still fits the second-level cache.
constexpr int kDigitBits = 16;
constexpr int64_t kDigits = int64_t{1} << kDigitBits;

// One weight of a selection. `load` writes the keys of the elements of one word.
template <class Key>
struct Part {
  using Load = void (*)(const void* data, int64_t offset, int64_t stride, int64_t count, Key* keys);
  WeightView view;
  const void* data;
  Load load;
  const uint32_t* within;  // null: every element is eligible
  uint32_t* bits;

  uint32_t eligible(int64_t word, int64_t count) const {
    return low_bits(count) & (within ? within[word] : ~uint32_t{0});
  }
};

// One format behind the `load` pointer: a call per 32 elements is cheap, and `select` is compiled
// per key width instead of per list of dtypes.
template <class F, class Key>
void load_keys(const void* data, int64_t offset, int64_t stride, int64_t count, Key* keys) {
  using Raw = typename F::Raw;
  load_lanes(keys, static_cast<const Raw*>(data) + offset, stride, count, [](Raw raw) -> Key {
    if constexpr (sizeof(Key) == sizeof(Raw)) {
      return key_of<F>(raw);
    } else {
      return widen_key(F{}, key_of<F>(raw));
    }
  });
}

// Several weights as one sequence of words, cut into one even slot per thread.
template <class Key>
class Sequence {
 public:
  explicit Sequence(std::vector<Part<Key>> parts) : parts_(std::move(parts)) {
    for (const auto& part : parts_) words_ += part.view.words();
    // A slot owns a histogram; it should have at least as many elements as the histogram has bins.
    const int64_t useful = words_ * kWordBits / kDigits;
    slots_ = std::clamp<int64_t>(useful, 1, torch::stable::get_num_threads());
  }

  int64_t slots() const { return slots_; }

  // Calls fn(slot, part, word, eligible bits, keys); slots run in parallel, words in order.
  template <class Fn>
  void for_each_word(const Fn& fn) const {
    torch::stable::parallel_for(0, slots_, 1, [&](int64_t first, int64_t last) {
      for (int64_t slot = first; slot < last; ++slot) walk(slot, fn);
    });
  }

 private:
  template <class Fn>
  void walk(int64_t slot, const Fn& fn) const {
    const int64_t begin = words_ / slots_ * slot + std::min(slot, words_ % slots_);
    const int64_t end = begin + words_ / slots_ + (slot < words_ % slots_);
    std::array<Key, kWordBits> keys{};
    int64_t base = 0;
    for (const auto& part : parts_) {
      const int64_t words = part.view.words();
      sparse_cocktail::for_each_word(
          part.view, std::clamp<int64_t>(begin - base, 0, words),
          std::clamp<int64_t>(end - base, 0, words),
          [&](int64_t word, int64_t offset, int64_t count) {
            const uint32_t eligible = part.eligible(word, count);
            part.load(part.data, offset, part.view.in_stride, count, keys.data());
            fn(slot, part, word, eligible, keys.data());
          });
      base += words;
    }
  }

  std::vector<Part<Key>> parts_;
  int64_t words_ = 0, slots_ = 1;
};

// Adds to `histogram` the digits at `shift` of the eligible keys that match the prefix above it.
template <class Key>
void count_digits(uint32_t eligible, const Key* keys, Key prefix, int shift, int64_t* histogram) {
  using Unsigned = std::make_unsigned_t<Key>;
  const auto count = [&](int j) {
    // The prefix is 0 from the digit down, so a match leaves just the digit.
    const auto digit = static_cast<uint64_t>(static_cast<Unsigned>(keys[j] ^ prefix) >> shift);
    if (digit < static_cast<uint64_t>(kDigits)) ++histogram[digit];
  };
  if (eligible == ~uint32_t{0}) {
    for (int j = 0; j < kWordBits; ++j) count(j);
  } else {
    for (; eligible != 0; eligible &= eligible - 1) count(__builtin_ctz(eligible));
  }
}

// Sets the bits of the `keep` largest keys of the sequence, or of all that are eligible.
template <class Key>
void select(const Sequence<Key>& sequence, int64_t keep) {
  const int64_t slots = sequence.slots();
  std::vector<int64_t> histograms;  // [slot][digit]
  std::vector<int64_t> ties(slots, 0);
  Key threshold = 0;      // the digits that are known, zeros below
  int64_t needed = keep;  // how many keys that match them are kept
  bool keep_all = false;

  for (int shift = 8 * sizeof(Key) - kDigitBits; shift >= 0 && keep > 0; shift -= kDigitBits) {
    histograms.assign(slots * kDigits, 0);
    sequence.for_each_word([&](int64_t slot, const auto&, int64_t, uint32_t eligible,
                               const Key* keys) {
      count_digits(eligible, keys, threshold, shift, &histograms[slot * kDigits]);
    });
    int64_t digit = kDigits - 1;
    for (; digit >= 0; --digit) {
      int64_t count = 0;
      for (int64_t slot = 0; slot < slots; ++slot) count += histograms[slot * kDigits + digit];
      if (count >= needed) break;
      needed -= count;
    }
    if (digit < 0) {  // only the first digit can run out: fewer are eligible than asked for
      keep_all = true;
      break;
    }
    // `needed` is now the rank of the threshold among the keys that share its digits so far.
    threshold |= static_cast<Key>(digit << shift);
    // After the last digit these are the keys of each slot that equal the threshold.
    for (int64_t slot = 0; slot < slots; ++slot) ties[slot] = histograms[slot * kDigits + digit];
  }

  // Ties go to the lower position: a slot may keep what the slots before it leave.
  std::vector<int64_t> ties_left(slots, 0);
  for (int64_t slot = 0, left = needed; slot < slots; ++slot) {
    ties_left[slot] = left;
    left = std::max<int64_t>(0, left - ties[slot]);
  }
  sequence.for_each_word([&](int64_t slot, const auto& part, int64_t word, uint32_t eligible,
                             const Key* keys) {
    if (keep == 0 || keep_all) {
      part.bits[word] = keep_all ? eligible : 0;
      return;
    }
    uint32_t kept = eligible & word_where(keys, [=](Key key) { return key > threshold; });
    if (ties_left[slot] > 0) {
      const uint32_t tied = eligible & word_where(keys, [=](Key k) { return k == threshold; });
      const uint32_t winners = lowest_set_bits(tied, ties_left[slot]);
      ties_left[slot] -= popcount(winners);
      kept |= winners;
    }
    part.bits[word] = kept;
  });
}

}  // namespace sparse_cocktail
