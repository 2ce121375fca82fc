// The loops of the soft top-k for fp64, which gradcheck needs and nobody trains in: plain ones.
#pragma once

#include <algorithm>
#include <cmath>

#include "soft_topk.h"

namespace sparse_cocktail {
namespace exact {

inline double argument(const double* values, const double* costs, int64_t i, const Line& line) {
  const double v = values[i];
  const double kept = v < kLargestValue ? std::max(v, -kLargestValue) : kLargestValue;
  return line.steep * ((costs ? kept / costs[i] : kept) - line.threshold) + line.shift;
}
inline void moments(const double* values, const double* costs, int64_t count, const Line& line,
                    Moments& sums) {
  sums = {};
  for (int64_t i = 0; i < count; ++i) {
    const double e = std::exp(-argument(values, costs, i, line));
    const double m = 1 / (1 + e), rest = std::isinf(e) ? 1 : e * m;
    const double q = (costs ? costs[i] : 1) * m * rest;
    sums.mass += (costs ? costs[i] : 1) * m, sums.slope += q, sums.bend += q * (rest - m);
  }
}
inline void masks(const double* values, const double* costs, int64_t count, const Line& line,
                  double* m) {
  for (int64_t i = 0; i < count; ++i) m[i] = 1 / (1 + std::exp(-argument(values, costs, i, line)));
}
inline void shares(const double* g, const double* m, const double* costs, int64_t count,
                   Shares& sums) {
  sums = {};
  for (int64_t i = 0; i < count; ++i) {
    const double q = m[i] * (1 - m[i]);
    sums.earned += g[i] * q, sums.spent += (costs ? costs[i] : 1) * q;
  }
}
inline void grads(const double* g, const double* m, const double* costs, int64_t count,
                  double scale, double price, double* results) {
  for (int64_t i = 0; i < count; ++i) {
    results[i] = scale * m[i] * (1 - m[i]) * ((costs ? g[i] / costs[i] : g[i]) - price);
  }
}
constexpr SoftKernels<double> kernels{moments, masks, shares, grads};

}  // namespace exact
}  // namespace sparse_cocktail
