// Compressed N:M weights in plain C++, for any machine.
#include <cstring>

#include "nm_kernels.h"

namespace sparse_cocktail {
namespace portable {
namespace {

// Without a branch: which bits are set is a coin toss.
template <class Raw>
void compress(const uint32_t* words, int64_t count, const Raw* source, Raw* target) {
  for (int64_t w = 0; w < count; ++w, source += kWordBits) {
    uint32_t word = words[w];
    for (int j = 0; j < kWordBits; ++j, word >>= 1) {
      *target = source[j];
      target += word & 1;
    }
  }
}

template <class Raw>
void expand(const uint32_t* words, int64_t count, const Raw* source, Raw* target) {
  for (int64_t w = 0; w < count; ++w, target += kWordBits) {
    uint32_t word = words[w];
    for (int j = 0; j < kWordBits; ++j, word >>= 1) {
      target[j] = *source & -static_cast<Raw>(word & 1);
      source += word & 1;
    }
  }
}

inline float wide(Float32, int32_t raw) {
  float value;
  memcpy(&value, &raw, sizeof value);
  return value;
}
inline float wide(BFloat16, int16_t raw) { return wide(Float32{}, int32_t{raw} << 16); }
inline float wide(Float16, int16_t raw) {
  const int16_t key = raw & Float16::kMagnitude;
  const int32_t magnitude = key > Float16::kInfinity ? Float32::kNaN : widen_key(Float16{}, key);
  return wide(Float32{}, magnitude | (int32_t{raw} & INT32_MIN));
}

struct Lanes {
  using Input = float;
  static constexpr int kCount = 8, kRows = 1;
  float v[kCount];

  static Lanes load(const float* p) {
    Lanes lanes;
    memcpy(lanes.v, p, sizeof lanes.v);
    return lanes;
  }
  template <class F>
  static Lanes spread(F, const typename F::Raw* stream, uint32_t mask) {
    using Raw = typename F::Raw;
    Raw raw[kCount];
    for (int j = 0; j < kCount; ++j, mask >>= 1) {
      raw[j] = *stream & -static_cast<Raw>(mask & 1);
      stream += mask & 1;
    }
    Lanes lanes;
    for (int j = 0; j < kCount; ++j) lanes.v[j] = wide(F{}, raw[j]);
    return lanes;
  }
  static int count_bits(uint32_t mask) { return popcount(mask); }
  void set_zero() { *this = Lanes{}; }
  void add_product(const Lanes& a, const Lanes& b) {
    for (int j = 0; j < kCount; ++j) v[j] += a.v[j] * b.v[j];
  }
  float sum() const {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
  }
};

#include "nm_loops.h"

}  // namespace
}  // namespace portable

const NmKernels& portable_nm_kernels() {
  using namespace portable;
  static constexpr NmKernels all{compress<int32_t>,  compress<int16_t>,  expand<int32_t>,
                                 expand<int16_t>,    multiply<Float32>, multiply<BFloat16>,
                                 multiply<Float16>, nullptr};
  return all;
}

}  // namespace sparse_cocktail
