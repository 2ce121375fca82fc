// Blocks, sums and small steps in plain C++: the portable level, fp64 at every level, and the
// meaning of what other levels do with vectors. Included by kernels.h, inside a level's namespace.

template <class F>
struct PlainBlock {
  using Raw = typename F::Raw;
  using Key = CandidateKey<F>;
  Raw keys[kWordBits];

  explicit PlainBlock(const Raw* p) {
    for (int j = 0; j < kWordBits; ++j) keys[j] = key_of<F>(p[j]);
  }
  uint32_t above(Key bound) const {
    const Raw limit = static_cast<Raw>(bound);
    return word_where(keys, [=](Raw key) { return key > limit; });
  }
  template <int M, int S>
  uint32_t beaten() const {
    Raw ahead[kWordBits];  // by how much the other one is larger, plus 1 if it is the earlier
    for (int first = 0; first < kWordBits; first += M) {
      for (int j = 0; j < M - S; ++j) ahead[first + j] = keys[first + j + S] - keys[first + j];
      for (int j = M - S; j < M; ++j) {
        ahead[first + j] = keys[first + j + S - M] - keys[first + j] + 1;
      }
    }
    return word_where(ahead, [](Raw value) { return value > 0; });
  }
  void append(uint32_t mask, Key* target) const {
    for (; mask != 0; mask &= mask - 1) *target++ = keys[__builtin_ctz(mask)];
  }
  using Top = Raw;
  void largest(Top& top) const {
    for (int j = 0; j < kWordBits; ++j) top = keys[j] > top ? keys[j] : top;
  }
};

// Fixed point without a conversion: adding 1.5 * 2^14 to a double below 8 rounds it to a multiple
// of 2^-38, to nearest even, and leaves the multiple in its low bits. Sums of such bit patterns are
// sums of the multiples plus a known constant per element.
constexpr double kMagic = 24576.0;
constexpr uint64_t kMagicBits = 0x40D8000000000000;  // unsigned: sums of them wrap around
constexpr int64_t kExactElements = int64_t{1} << 20;  // 2^20 * 8 * 2^38 fits an int64

inline uint64_t magic_bits(double value) {
  const double shifted = value + kMagic;
  uint64_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  return bits;
}

// The first key that is too large for it.
template <class F>
constexpr typename F::Raw first_inexact_key();
template <>
constexpr int64_t first_inexact_key<Float64>() { return 0x4020000000000000; }
template <>
constexpr int32_t first_inexact_key<Float32>() { return 0x41000000; }
template <>
constexpr int16_t first_inexact_key<Float16>() { return 0x4800; }
template <>
constexpr int16_t first_inexact_key<BFloat16>() { return 0x4100; }

inline double value_of_key(Float64, int64_t key) {
  double value;
  memcpy(&value, &key, sizeof value);
  return value;
}
inline float single_of_key(Float32, int32_t key) {
  float value;
  memcpy(&value, &key, sizeof value);
  return value;
}
template <class F>
inline float single_of_key(F, int16_t key) {
  return single_of_key(Float32{}, widen_key(F{}, key));
}
template <class F, class Raw>
inline double value_of_key(F, Raw key) {
  return single_of_key(F{}, key);
}

// For fp64, whose numbers do not fit two steps of single precision.
struct WideSums {
  uint64_t sum_a = 0, sum_b = 0, count_a = 0, count_b = 0;
  int64_t a = 0, b = 0;  // after finish()

  template <class B>
  void add(const B& block, const int64_t*, uint32_t in_a, uint32_t in_b) {
    for (int j = 0; j < kWordBits; ++j) {
      const uint64_t bits = magic_bits(value_of_key(Float64{}, block.keys[j]));
      sum_a += bits & -static_cast<uint64_t>(in_a >> j & 1);
      sum_b += bits & -static_cast<uint64_t>(in_b >> j & 1);
    }
    count_a += fast_popcount(in_a), count_b += fast_popcount(in_b);
  }
  void finish() {
    a = static_cast<int64_t>(sum_a - count_a * kMagicBits);
    b = static_cast<int64_t>(sum_b - count_b * kMagicBits);
  }
};

// The same in two steps of single precision, which vectors do twice as many of: adding 48 rounds a
// number below 8 to a multiple of 2^-18, and adding 1.5 * 2^-15 rounds what is left of it, which is
// exact, to a multiple of 2^-38, to nearest even. Both multiples are small: 1024 numbers sum to
// less than 2^32 and 2^30, so sums of the bit patterns may stay in 32 bits for so many, modulo
// 2^32.
constexpr float kCoarse = 48.0f, kFine = 0x1.8p-15f;
constexpr uint32_t kCoarseBits = 0x42400000, kFineBits = 0x38400000;
constexpr int kWordsPerFlush = 32;

inline int64_t two_step_sum(uint32_t coarse, uint32_t fine, uint32_t count) {
  const uint32_t high = coarse - count * kCoarseBits;
  const int32_t low = static_cast<int32_t>(fine - count * kFineBits);
  return (static_cast<int64_t>(high) << 20) + low;
}

template <class F>
struct PlainSums {
  uint32_t coarse_a[kWordBits] = {}, coarse_b[kWordBits] = {};
  uint32_t fine_a[kWordBits] = {}, fine_b[kWordBits] = {};
  uint32_t count_a = 0, count_b = 0;
  int64_t a = 0, b = 0;  // after finish()
  int words = 0;

  template <class B>
  void add(const B& block, const typename F::Raw*, uint32_t in_a, uint32_t in_b) {
    for (int j = 0; j < kWordBits; ++j) {
      const float value = single_of_key(F{}, block.keys[j]);
      const float coarse = value + kCoarse, fine = value - (coarse - kCoarse) + kFine;
      uint32_t high, low;
      memcpy(&high, &coarse, sizeof high);
      memcpy(&low, &fine, sizeof low);
      const auto bit = static_cast<uint32_t>(kLaneBits<int32_t>.bit[j]);
      const uint32_t lane_a = (in_a & bit) != 0 ? ~uint32_t{0} : 0;
      const uint32_t lane_b = (in_b & bit) != 0 ? ~uint32_t{0} : 0;
      coarse_a[j] += high & lane_a, coarse_b[j] += high & lane_b;
      fine_a[j] += low & lane_a, fine_b[j] += low & lane_b;
    }
    count_a += fast_popcount(in_a), count_b += fast_popcount(in_b);
    if (++words == kWordsPerFlush) flush();
  }
  static uint32_t take(uint32_t* lanes) {
    uint32_t total = 0;
    for (int j = 0; j < kWordBits; ++j) total += lanes[j], lanes[j] = 0;
    return total;
  }
  void flush() {
    const uint32_t high_a = take(coarse_a), high_b = take(coarse_b);
    a += two_step_sum(high_a, take(fine_a), count_a);
    b += two_step_sum(high_b, take(fine_b), count_b);
    count_a = count_b = 0, words = 0;
  }
  void finish() { flush(); }
};
template <>
struct PlainSums<Float64> : WideSums {};

// ---- candidates ---------------------------------------------------------------------------------

// Plain forms of what settle() needs: bit i of the result is keys[i] > threshold, and equal to it.
template <class Key>
inline uint32_t plain_compare_keys(const Key* keys, int count, Key threshold, uint32_t& equal) {
  uint32_t above = 0;
  equal = 0;
  for (int i = 0; i < count; ++i) {
    above |= static_cast<uint32_t>(keys[i] > threshold) << i;
    equal |= static_cast<uint32_t>(keys[i] == threshold) << i;
  }
  return above;
}

// The bits of `source` at the places of the set bits of `places`.
inline uint32_t plain_deposit(uint32_t source, uint32_t places) {
  uint32_t result = 0;
  for (; places != 0; places &= places - 1, source >>= 1) {
    result |= (source & 1) != 0 ? places & -places : 0;
  }
  return result;
}
