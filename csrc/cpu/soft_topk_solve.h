// The root of the soft top-k's budget, by a safeguarded Newton method with curvature (Halley's).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "soft_topk.h"

namespace sparse_cocktail {

constexpr int kMostPasses = 100;  // a few are the rule: as STEPS of the reference
constexpr double kUnbounded = std::numeric_limits<double>::infinity();
constexpr double kFlat = 1e-6;    // below this sharpness thresholds would leave the range

// One unknown, a shift of beta v / c, as two numbers: neither loses digits when beta is large.
struct Root {
  double threshold = 0, shift = 0;
};

// The root with the shift moved into the threshold, where there is one.
inline Root moved(const Root& root, double beta) {
  const double to = std::clamp(root.threshold - root.shift / beta, -kLargestValue, kLargestValue);
  return {to, root.shift + beta * (to - root.threshold)};
}

// The same two numbers whichever way the search went.
inline Root settled(const Root& root, double beta) {
  return beta > kFlat ? moved(root, beta) : Root{0, root.shift - beta * root.threshold};
}

// The root of spent(root) = budget <= total / 2, rising with the shift; `beta` may be negative.
// Works on logit(spent / total), which is linear in the shift where the mask is flat.
template <class Spent>
Root solve(const Spent& spent, Root root, double beta, double budget, double total,
           double close_enough, double converged) {
  double low = -kUnbounded, high = kUnbounded, last = kUnbounded, before = kUnbounded, reach = 8;
  const double goal = std::log(budget) - std::log(total - budget);
  for (int pass = 0; pass < kMostPasses; ++pass) {
    if (std::abs(root.shift) > 1 && std::abs(beta) > kFlat) {  // a small shift keeps its digits
      const Root next = moved(root, beta);
      const double by = beta * (next.threshold - root.threshold);
      root = next, low += by, high += by;
    }
    const Moments sums = spent(root);
    (sums.mass > budget ? high : low) = root.shift;
    // No element of a mask is further from its true value than all of them together.
    if (std::abs(sums.mass - budget) <= close_enough) break;
    const double share = std::clamp(sums.mass / total, 1e-300, 1 - 1e-9);
    const double error = std::log(share) - std::log1p(-share) - goal;
    const double slope = sums.slope / total / (share * (1 - share));
    const double bend = sums.bend / total / (share * (1 - share)) - (1 - 2 * share) * slope * slope;
    const double newton = -error / slope, curve = 1 + newton * bend / (2 * slope);
    double step = curve > 0.5 ? newton / curve : newton;
    const bool inside = low < root.shift + step && root.shift + step < high;  // false for NaN
    const bool bracketed = low > -kUnbounded && high < kUnbounded;
    bool trusted = inside && std::abs(step) <= std::min(0.5 * before, bracketed ? before : reach);
    if (!trusted && bracketed) {
      step = (low + high) / 2 - root.shift;
      trusted = high - low < 1e-9;  // nothing is left to halve
    } else if (!trusted) {
      step = sums.mass > budget ? -reach : reach, reach *= 8;
    }
    root.shift += step;
    before = last, last = std::abs(step);
    if (trusted && std::abs(step) <= converged) break;
  }
  return root;
}

}  // namespace sparse_cocktail
