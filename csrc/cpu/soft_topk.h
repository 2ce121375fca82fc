// What the levels of soft_topk.cpp compute: one pass over a chunk of fp32 values each.
//
//   x = steep (v - threshold) + shift          steep = beta / cost, one cost for the tensor
//   x = steep (v / c - threshold) + shift      steep = beta, a cost per value
//   m = 1 / (1 + exp(-x))
#pragma once

#include <cstdint>

namespace sparse_cocktail {

constexpr double kLargestValue = 0x1p100;  // infinities and NaN count as this much

struct Line {
  double threshold, steep, shift;
};

// Sums of m and of its derivatives by the shift: q = m (1 - m), and q (1 - 2 m).
struct Moments {
  double mass = 0, slope = 0, bend = 0;
  void add(const Moments& other, double cost) {
    mass += cost * other.mass, slope += cost * other.slope, bend += cost * other.bend;
  }
};

// Sums of g q and c q, for the gradient.
struct Shares {
  double earned = 0, spent = 0;
};

// `costs` is null where a tensor has one cost: that one stays outside.
template <class T>
struct SoftKernels {
  void (*moments)(const T* values, const T* costs, int64_t count, const Line& line, Moments& sums);
  void (*masks)(const T* values, const T* costs, int64_t count, const Line& line, T* masks);
  void (*shares)(const T* grads, const T* masks, const T* costs, int64_t count, Shares& sums);
  // scale q (g / c - price)
  void (*grads)(const T* grads, const T* masks, const T* costs, int64_t count, double scale,
                double price, T* results);
};

}  // namespace sparse_cocktail
