// Exact top-k over a sequence of weights in about one read.
//
//   1. A sample of the keys gives a bracket [lo, hi] that the threshold lies in, very likely.
//   2. One pass writes the bits of all keys above hi and collects the keys inside, 1 or 2 %.
//   3. Histograms of these candidates give the threshold, and how many keys equal to it are kept.
//   4. The bits of the chosen candidates are set; of equal keys the first in position order win.
//
// Where the threshold lies outside the bracket, the pass is repeated with all keys of that side as
// candidates: there is room for as many as there are weights, in pages that are not touched before.
#pragma once

#include <cmath>

#include "sample.h"

namespace sparse_cocktail {

// How often selections of this process have read all of their weights; tests look at differences.
inline std::atomic<int64_t> weight_passes{0};

constexpr double kDeviations = 3.0;     // of the sampled rank, on either side
constexpr int64_t kSmall = int64_t{1} << 13;  // up to here every key is a candidate

// Channel scores that are summed on the way (unified masks); null pointers: not wanted.
struct ScoreSums {
  int64_t* unstructured = nullptr;
  int64_t* nm = nullptr;
  uint8_t* inexact = nullptr;  // channels that must be summed again, with saturation
  bool wanted() const { return unstructured != nullptr; }
};

// Memory for a selection, from one buffer of the size it asks for: room for every key of a slot,
// and for 32 more that a pass may write past the end or read there.
template <class F>
struct SelectionScratch {
  using Key = CandidateKey<F>;

  static int64_t slot_keys(int64_t slot_words) { return (slot_words + 2) * kWordBits; }
  static int64_t bytes(int64_t words) {
    const int64_t slots = Sequence<F>::slots_for(words), slot_words = (words + slots - 1) / slots;
    return slots * (slot_keys(slot_words) * static_cast<int64_t>(sizeof(Key)) +
                    (slot_words + 1) * static_cast<int64_t>(sizeof(CandidateWord)));
  }

  uint8_t* memory;
  int64_t slots, slot_words;

  Key* keys(int64_t slot) const {
    return reinterpret_cast<Key*>(memory) + slot * slot_keys(slot_words);
  }
  CandidateWord* words(int64_t slot) const {
    auto* first = reinterpret_cast<CandidateWord*>(keys(slots));
    return first + slot * (slot_words + 1);
  }
};

template <class F>
class Selection {
 public:
  using Raw = typename F::Raw;
  using Key = CandidateKey<F>;

  // Ranks the weights of the sequence and writes `kept` of every part; with `scores` also the fresh
  // N:M bits of parts that have a ratio, and the sums of every channel.
  Selection(const Sequence<F>& sequence, int64_t keep, uint8_t* scratch, ScoreSums scores = {})
      : sequence_(sequence), slots_(sequence.slots()), scores_(scores),
        scratch_{scratch, slots_, sequence.slot_words()}, found_(slots_) {
    eligible_ = count_eligible();
    keep_ = std::clamp<int64_t>(keep, 0, eligible_);
  }

  // Only the sums of every channel, over `kept` and `given`; nothing is selected.
  static void only_score(const Sequence<F>& sequence, ScoreSums scores) {
    const Selection self(sequence, 0, nullptr, scores);
    const Kernels<F>& kernel = kernels().of(F{});
    for_each_slot(self.slots_, [&](int64_t slot) {
      sequence.walk(slot, true, [&](const Part<F>& part, int64_t word, const Run& run) {
        RunSums sums;
        kernel.score(run, sums);
        self.add_scores(part, word, sums);
      });
    });
  }

  void run() {
    choose_bracket();
    read_once();
    const int64_t above = total(&Found::above), inside = total(&Found::inside);
    if (above > keep_) {
      lo_ = hi_ + 1, hi_ = F::kNaN;
      read_once();
    } else if (above + inside < keep_) {
      hi_ = lo_ - 1;
      lo_ = counts_below_ && above + inside + total(&Found::below) >= keep_ ? hi_ : Key{0};
      read_once();
    }
    needed_ = keep_ - total(&Found::above);
    if (needed_ == 0) return;
    find_threshold();
    set_candidates();
  }

 private:
  // What one slot found.
  struct Found {
    int64_t above = 0, inside = 0, below = 0;
    int64_t keys = 0, words = 0;
    int64_t ties = 0;  // candidates that equal the threshold
  };

  int64_t total(int64_t Found::*count) const {
    int64_t sum = 0;
    for (const Found& found : found_) sum += found.*count;
    return sum;
  }

  int64_t count_eligible() const {
    const auto popcounts = kernels().popcount;
    std::atomic<int64_t> total{0};
    bool masked = false;
    for (const Part<F>& part : sequence_.parts()) masked |= part.within != nullptr;
    if (!masked) return sequence_.elements();
    for_each_slot(slots_, [&](int64_t slot) {
      int64_t count = 0;
      sequence_.walk(slot, false, [&](const Part<F>&, int64_t, const Run& run) {
        const int64_t words = words_of(run.count), full = run.count / kWordBits;
        if (run.within == nullptr) {
          count += run.count;
        } else {
          count += popcounts(run.within, full);
          if (full < words) count += popcount(run.within[full] & low_bits(run.count % kWordBits));
        }
      });
      total += count;
    });
    return total;
  }

  // ---- the bracket ----

  void choose_bracket() {
    if (keep_ == 0) {
      lo_ = F::kNaN + Key{1}, hi_ = F::kNaN;  // nothing is above or inside
    } else if (keep_ == eligible_) {
      lo_ = 0, hi_ = -1;  // everything is above
    } else if (sequence_.elements() <= kSmall) {
      lo_ = 0, hi_ = F::kNaN;  // everything is inside
    } else {
      sample_bracket();
    }
  }

  void sample_bracket() {
    Key* const sample = scratch_.keys(0);  // the candidates need it only afterwards
    const int64_t drawn = draw_sample(sequence_, sample);
    lo_ = 0, hi_ = F::kNaN;
    if (drawn == 0) return;
    // The rank of the threshold among the drawn keys, largest first, and its binomial spread. What
    // is drawn together is alike to some degree: the spread counts it as half as many.
    const double share = static_cast<double>(keep_) / static_cast<double>(eligible_);
    const double spread = kDeviations * std::sqrt(2.0 * drawn * share * (1 - share)) + 2;
    const int64_t first = static_cast<int64_t>(share * drawn - spread);
    const int64_t last = static_cast<int64_t>(share * drawn + spread) + 1;
    std::vector<uint32_t> bins(kBins);
    for (int64_t i = 0; i < drawn; ++i) ++bins[sample[i] >> kSampleShift<F>];
    if (first > 0) hi_ = ranked<F>(sample, drawn, bins, first);
    if (last < drawn) lo_ = ranked<F>(sample, drawn, bins, last);
    // Very many keys may equal lo (zeros of a pruned network). They are only counted then, and if
    // the threshold is lo, a second pass takes their bits, without keys.
    if (lo_ < hi_ && std::count(sample, sample + drawn, lo_) > drawn / 16) {
      counts_below_ = true;
      ++lo_;
    }
  }

  // ---- the pass ----

  void read_once() {
    ++weight_passes;
    clear_scores();
    const Kernels<F>& kernel = kernels().of(F{});
    for_each_slot(slots_, [&](int64_t slot) {
      Scan<Key> scan;
      scan.lo = lo_, scan.hi = hi_, scan.counts_below = counts_below_;
      Key* keys = scan.keys = scratch_.keys(slot);
      CandidateWord* words = scan.words = scratch_.words(slot);
      const auto read = [&](const Part<F>& part, int64_t word, const Run& run) {
        if (!scores_.wanted()) return kernel.select(run, scan);
        RunSums sums;
        kernel.unify(run, part.ratio, scan, sums);
        add_scores(part, word, sums);
      };
      sequence_.walk(slot, scores_.wanted(), read);
      Found& found = found_[slot];
      found.above = scan.above;
      found.inside = scan.inside;
      found.below = scan.below;
      found.keys = scan.keys - keys;
      found.words = scan.words - words;
    });
  }

  void clear_scores() {
    if (!scores_.wanted()) return;
    std::fill_n(scores_.unstructured, sequence_.channels(), 0);
    std::fill_n(scores_.nm, sequence_.channels(), 0);
  }

  void add_scores(const Part<F>& part, int64_t word, const RunSums& sums) const {
    const int64_t channel = part.first_channel + word / part.channel_words();
    // Channels at the edge of two slots are summed by two threads; integers do not mind the order.
    add(scores_.unstructured[channel], sums.unstructured);
    add(scores_.nm[channel], sums.nm);
    const bool exact = sums.exact && part.view.taps * part.view.in < kExactChannel;
    if (!exact) __atomic_store_n(&scores_.inexact[channel], 1, __ATOMIC_RELAXED);
  }

  static constexpr int64_t kExactChannel = int64_t{1} << 21;  // elements below 8: sums below 2^62

  static void add(int64_t& sum, int64_t value) {
    __atomic_fetch_add(&sum, value, __ATOMIC_RELAXED);
  }

  // ---- the candidates ----

  // Narrows [lo, hi] to the threshold; needed_ becomes how many keys equal to it are kept.
  void find_threshold() {
    if (lo_ == hi_) {
      for (Found& found : found_) found.ties = found.inside;
    }
    std::vector<uint32_t> counts(slots_ * kBins);
    while (lo_ < hi_) {
      const auto width = static_cast<uint64_t>(hi_ - lo_);
      const int bits = 64 - __builtin_clzll(width), shift = std::max(0, bits - 12);
      std::fill(counts.begin(), counts.end(), 0);
      for_each_slot(slots_, [&](int64_t slot) {
        uint32_t* bins = &counts[slot * kBins];
        const Key* keys = scratch_.keys(slot);
        for (int64_t i = 0; i < found_[slot].keys; ++i) {
          const auto offset = static_cast<uint64_t>(keys[i] - lo_);  // huge for keys below lo
          if (offset <= width) ++bins[offset >> shift];
        }
      });
      int64_t bin = static_cast<int64_t>(width >> shift);
      for (;; --bin) {
        int64_t count = 0;
        for (int64_t slot = 0; slot < slots_; ++slot) count += counts[slot * kBins + bin];
        if (count >= needed_) break;
        needed_ -= count;
      }
      lo_ += static_cast<Key>(bin << shift);
      hi_ = std::min<Key>(hi_, lo_ + static_cast<Key>((uint64_t{1} << shift) - 1));
      for (int64_t slot = 0; slot < slots_; ++slot) found_[slot].ties = counts[slot * kBins + bin];
    }
  }

  // How many ties each slot keeps: the first ones in position order.
  std::vector<int64_t> share_ties() const {
    std::vector<int64_t> shares(slots_);
    int64_t left = needed_;
    for (int64_t slot = 0; slot < slots_; ++slot) {
      shares[slot] = std::min(left, found_[slot].ties);
      left -= shares[slot];
    }
    return shares;
  }

  void set_candidates() {
    const Kernels<F>& kernel = kernels().of(F{});
    const std::vector<int64_t> shares = share_ties();
    for_each_slot(slots_, [&](int64_t slot) {
      const Found& found = found_[slot];
      const CandidateWord* words = scratch_.words(slot);
      Settling<Key> settling{words, words + found.words, scratch_.keys(slot), lo_, shares[slot],
                             found.keys != found.inside, scores_.wanted()};
      const int64_t begin = sequence_.begin_of(slot);
      for (const Part<F>& part : sequence_.parts()) {
        const int64_t channel_words = part.channel_words(), words_in_part = part.view.words();
        uint32_t* kept = part.kept + (begin - part.first_word);  // where the slot's word 0 would be
        while (settling.words < settling.words_end) {
          const int64_t word = begin + settling.words->word - part.first_word;
          if (word >= words_in_part) break;
          const int64_t channel = word / channel_words;
          const int64_t end = scores_.wanted() ? (channel + 1) * channel_words : words_in_part;
          const int64_t stop = std::min(part.first_word + end, sequence_.begin_of(slot + 1));
          const int64_t sum = kernel.settle(settling, static_cast<uint32_t>(stop - begin), kept);
          if (scores_.wanted()) add(scores_.unstructured[part.first_channel + channel], sum);
        }
      }
    });
  }

  const Sequence<F>& sequence_;
  const int64_t slots_;
  const ScoreSums scores_;
  const SelectionScratch<F> scratch_;
  std::vector<Found> found_;
  int64_t eligible_ = 0, keep_ = 0, needed_ = 0;
  Key lo_ = 0, hi_ = 0;
  bool counts_below_ = false;  // keys just below lo are counted too
};

}  // namespace sparse_cocktail
