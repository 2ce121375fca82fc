// The soft top-k mask of Spartan: m = sigmoid(beta (v / c - threshold) + shift), whose costs add up
// to a budget, and its gradient.
//
//   1. A sample of the values gives a first root, unless the caller has one from the step before.
//   2. A pass over all values sums the mask and its derivatives by the shift; Halley's step, which
//      is Newton's with the curvature, cubes the error: two passes are the rule, inside a bracket.
//   3. One more pass writes the masks.
//
// Sums of chunks of fixed size are added in their order: results do not depend on the threads. With
// 25 million values and beta = 20 it takes 55 ms, and torch.sigmoid alone 36 (two Zen 4 cores).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "sequence.h"
#include "soft_topk_exact.h"
#include "soft_topk_solve.h"

#if defined(__x86_64__)
#define SOFT_X86 1
#endif

namespace sparse_cocktail {
namespace portable {
namespace {
constexpr int kBytes = 16;
#include "soft_topk_loops.h"
constexpr SoftKernels<float> soft_kernels{moments, masks, shares, grads};
}  // namespace
}  // namespace portable
}  // namespace sparse_cocktail

#ifdef SOFT_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace sparse_cocktail {
namespace avx2 {
namespace {
constexpr int kBytes = 32;
#include "soft_topk_loops.h"
constexpr SoftKernels<float> soft_kernels{moments, masks, shares, grads};
}  // namespace
}  // namespace avx2
}  // namespace sparse_cocktail
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#endif
namespace sparse_cocktail {
namespace avx512 {
namespace {
constexpr int kBytes = 64;
#include "soft_topk_loops.h"
constexpr SoftKernels<float> soft_kernels{moments, masks, shares, grads};
}  // namespace
}  // namespace avx512
}  // namespace sparse_cocktail
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // x86-64

namespace sparse_cocktail {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t kChunk = int64_t{1} << 15;   // 128 KB of fp32, in the L2 cache
constexpr int64_t kSampled = int64_t{1} << 14;  // leaves an error of about 0.05 in the shift
constexpr double kSlack = 1e-6;  // as SLACK of the reference

template <class T>
const SoftKernels<T>& soft_kernels() {
  if constexpr (std::is_same_v<T, double>) {
    return exact::kernels;
  } else {
#ifdef SOFT_X86
    switch (current_level()) {
      case Level::kAvx512: return avx512::soft_kernels;
      case Level::kAvx2: return avx2::soft_kernels;
      case Level::kPortable: break;
    }
#endif
    return portable::soft_kernels;
  }
}

template <class T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// A list of tensors as chunks in order. Memory order will do: no result depends on positions.
template <class T>
class Values {
 public:
  struct Chunk {
    size_t tensor;
    int64_t begin, count;
  };

  Values(const char* op, const Tensors& values, const Tensors& costs) : values_(values) {
    STD_TORCH_CHECK(costs.empty() || costs.size() == values.size(), op, ": costs has ",
                    costs.size(), " entries for ", values.size(), " tensors; pass one per tensor");
    for (size_t t = 0; t < values.size(); ++t) {
      const int64_t count = values[t].numel();
      bool each = false;
      if (!costs.empty()) {
        each = costs[t].numel() == count && costs[t].scalar_type() == values[t].scalar_type() &&
               costs[t].dim() == values[t].dim();
        STD_TORCH_CHECK(each || (costs[t].numel() == 1 &&
                                 costs[t].scalar_type() == ScalarType::Double),
                        op, ": costs[", t, "] has ", costs[t].numel(), " entries for ", count,
                        " values; pass one per value in their dtype, or one in float64");
      }
      each_.push_back(each ? data_of<T>(costs[t]) : nullptr);
      single_.push_back(costs.empty() || each ? 1.0 : *data_of<double>(costs[t]));
      for (int64_t i = 0; i < count; i += kChunk) {
        chunks_.push_back({t, i, std::min(kChunk, count - i)});
      }
      elements_ += count;
    }
  }

  int64_t elements() const { return elements_; }
  const Tensors& tensors() const { return values_; }
  const T* values(const Chunk& c) const { return data_of<T>(values_[c.tensor]) + c.begin; }
  const T* costs(const Chunk& c) const {
    return each_[c.tensor] ? each_[c.tensor] + c.begin : nullptr;
  }
  double single(const Chunk& c) const { return single_[c.tensor]; }

  template <class Fn>
  void in_order(const Fn& fn) const {
    for (const Chunk& chunk : chunks_) fn(chunk);
  }
  // fn(chunk, its number), by any thread.
  template <class Fn>
  void for_chunks(const Fn& fn) const {
    const auto all = static_cast<int64_t>(chunks_.size());
    const int64_t slots = std::clamp<int64_t>(all / 4, 1, 8 * torch::stable::get_num_threads());
    for_each_slot(slots, [&](int64_t slot) {
      for (int64_t i = all * slot / slots; i < all * (slot + 1) / slots; ++i) fn(chunks_[i], i);
    });
  }
  // fn(chunk) -> a partial sum; add(sum, chunk) in order.
  template <class Part, class Fn, class Add>
  void reduce(const Fn& fn, const Add& add) const {
    std::vector<Part> parts(chunks_.size());
    for_chunks([&](const Chunk& chunk, int64_t i) { fn(chunk, parts[i]); });
    for (size_t i = 0; i < parts.size(); ++i) add(parts[i], chunks_[i]);
  }

 private:
  const Tensors& values_;
  std::vector<const T*> each_;
  std::vector<double> single_;
  std::vector<Chunk> chunks_;
  int64_t elements_ = 0;
};

// The line of a tensor: its threshold is a number of T, so that differences from it are exact.
template <class T>
Line line_of(const Root& root, double beta, double cost, bool each) {
  if (each) return {root.threshold, beta, root.shift};
  const double wanted = root.threshold * cost, rounded = static_cast<T>(wanted);
  return {rounded, beta / cost, root.shift + beta / cost * (rounded - wanted)};
}

template <class T>
Moments moments_at(const Values<T>& values, const Root& root, double beta) {
  const SoftKernels<T>& kernel = soft_kernels<T>();
  Moments all;
  values.template reduce<Moments>(
      [&](const auto& chunk, Moments& part) {
        const T* costs = values.costs(chunk);
        kernel.moments(values.values(chunk), costs, chunk.count,
                       line_of<T>(root, beta, values.single(chunk), costs != nullptr), part);
      },
      [&](const Moments& part, const auto& chunk) { all.add(part, values.single(chunk)); });
  return all;
}

// A root for about kSampled of the values, at even distances.
template <class T>
Root sample_root(const Values<T>& values, bool has_costs, double beta, double share) {
  const int64_t stride = std::max<int64_t>(1, values.elements() / kSampled) | 1;
  std::vector<float> sample, costs, ratios;
  int64_t next = 0;
  // The chunks know which cost is whose; one thread takes them in order.
  values.in_order([&](const auto& chunk) {
    const T *v = values.values(chunk), *c = values.costs(chunk);
    for (; next < chunk.count; next += stride) {
      const auto value = static_cast<float>(v[next]);
      const float cost = c ? static_cast<float>(c[next]) : static_cast<float>(values.single(chunk));
      const auto most = static_cast<float>(kLargestValue);
      sample.push_back(value < most ? std::max(value, -most) : most);
      costs.push_back(cost), ratios.push_back(sample.back() / cost);
    }
    next -= chunk.count;
  });
  const auto count = static_cast<int64_t>(sample.size());
  const double kept = beta > 0 ? share : 1 - share;  // on top, if the mask were hard
  const int64_t rank = std::clamp<int64_t>(std::llround((1 - kept) * count), 0, count - 1);
  std::nth_element(ratios.begin(), ratios.begin() + rank, ratios.end());
  double total = 0;
  for (float cost : costs) total += cost;
  const auto spent = [&](const Root& root) {
    Moments sums;
    const Line line = has_costs ? Line{root.threshold, beta, root.shift}
                                : line_of<float>(root, beta, 1, false);
    soft_kernels<float>().moments(sample.data(), has_costs ? costs.data() : nullptr, count, line,
                                  sums);
    return sums;
  };
  return solve(spent, {ratios[rank], 0}, beta, share * total, total, 1e-6, 1e-3);
}

template <class T>
void soft_topk(const Tensors& tensors, const Tensors& costs, double budget, double beta,
               const std::optional<Tensor>& start, const Tensors& masks, double* result) {
  const char* op = "soft_topk";
  const Values<T> values(op, tensors, costs);
  struct Costs {
    double sum = 0, least = kUnbounded;
    bool good = true;
  } all;
  values.template reduce<Costs>(
      [&](const auto& chunk, Costs& part) {
        const T* each = values.costs(chunk);
        for (int64_t i = 0; i < (each ? chunk.count : 1); ++i) {
          const double cost = each ? static_cast<double>(each[i]) : values.single(chunk);
          part.good &= cost > 0 && cost < kUnbounded;
          part.sum += each ? cost : cost * static_cast<double>(chunk.count);
          part.least = std::min(part.least, cost);
        }
      },
      [&](const Costs& part, const auto&) {
        all.sum += part.sum, all.least = std::min(all.least, part.least), all.good &= part.good;
      });
  STD_TORCH_CHECK(all.good, op, ": costs have entries that are not positive and finite; leave "
                  "values without a cost out of the selection");
  STD_TORCH_CHECK(budget <= all.sum * (1 + kSlack), op, ": budget=", budget, " is above ",
                  all.sum, ", the sum of the costs; give a share of that sum");
  Root root{0, budget > 0 ? kUnbounded : -kUnbounded};
  if (0 < budget && budget < all.sum) {
    // The smaller share has more digits: above a half, what is left is solved for.
    const bool flip = budget > all.sum / 2;
    const double sign = flip ? -1 : 1, goal = flip ? all.sum - budget : budget;
    const double* given = start ? data_of<double>(*start) : nullptr;
    root = given && std::isfinite(given[0]) && std::isfinite(given[1])
               ? Root{given[0], sign * given[1]}
               : sample_root(values, !costs.empty(), sign * beta, goal / all.sum);
    const bool is_float = std::is_same_v<T, float>;
    root = solve([&](const Root& r) { return moments_at(values, r, sign * beta); }, root,
                 sign * beta, goal, all.sum,
                 (is_float ? 1e-7 : 1e-13) * std::min(all.least, goal), is_float ? 5e-4 : 1e-5);
    root.shift *= sign;
    root = settled(root, beta);
  }
  result[0] = root.threshold, result[1] = root.shift;
  const bool hard = std::isinf(root.shift);
  const SoftKernels<T>& kernel = soft_kernels<T>();
  values.for_chunks([&](const auto& chunk, int64_t) {
    T* mask = static_cast<T*>(masks[chunk.tensor].mutable_data_ptr()) + chunk.begin;
    const T* each = values.costs(chunk);
    if (hard) {
      std::fill(mask, mask + chunk.count, static_cast<T>(root.shift > 0));
    } else {
      kernel.masks(values.values(chunk), each, chunk.count,
                   line_of<T>(root, beta, values.single(chunk), each != nullptr), mask);
    }
  });
}

template <class T>
void soft_topk_grad(const Tensors& grads, const Tensors& masks, const Tensors& costs, double beta,
                    const Tensors& results) {
  const Values<T> values("soft_topk_grad", masks, costs);
  const SoftKernels<T>& kernel = soft_kernels<T>();
  const auto grad_of = [&](const auto& chunk) {
    return data_of<T>(grads[chunk.tensor]) + chunk.begin;
  };
  Shares all;
  values.template reduce<Shares>(
      [&](const auto& chunk, Shares& part) {
        kernel.shares(grad_of(chunk), values.values(chunk), values.costs(chunk), chunk.count, part);
      },
      [&](const Shares& part, const auto& chunk) {
        all.earned += part.earned, all.spent += values.single(chunk) * part.spent;
      });
  const double price = all.earned / std::max(all.spent, std::numeric_limits<double>::min());
  values.for_chunks([&](const auto& chunk, int64_t) {
    const double cost = values.single(chunk);
    kernel.grads(grad_of(chunk), values.values(chunk), values.costs(chunk), chunk.count,
                 beta / cost, price * cost,
                 static_cast<T*>(results[chunk.tensor].mutable_data_ptr()) + chunk.begin);
  });
}

// All tensors of a list lie in memory as those of the first list do, without gaps.
void check_like(const char* op, const char* name, const Tensors& list, const Tensors& like) {
  STD_TORCH_CHECK(list.size() == like.size(), op, ": ", name, " has ", list.size(),
                  " entries for ", like.size(), " tensors; pass one per tensor");
  for (size_t i = 0; i < list.size(); ++i) {
    STD_TORCH_CHECK(list[i].numel() == like[i].numel() &&
                        list[i].scalar_type() == like[0].scalar_type(),
                    op, ": ", name, "[", i, "] has ", list[i].numel(), " entries of ",
                    torch::headeronly::toString(list[i].scalar_type()), ", and needs ",
                    like[i].numel(), " of ", torch::headeronly::toString(like[0].scalar_type()),
                    "; make it with torch.empty_like");
  }
}

template <class Fn>
void dispatch_real(const char* op, const Tensor& tensor, const Fn& fn) {
  if (tensor.scalar_type() == ScalarType::Float) return fn(float{});
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double, op, ": values have dtype ",
                  torch::headeronly::toString(tensor.scalar_type()),
                  ", which is not float32 or float64; convert them");
  fn(double{});
}

void soft_topk_into(Tensors values, Tensors costs, double budget, double beta,
                    std::optional<Tensor> start, Tensors masks, Tensor root) {
  const char* op = "soft_topk";
  check_like(op, "masks", masks, values);
  STD_TORCH_CHECK(root.scalar_type() == ScalarType::Double && root.numel() == 2, op,
                  ": root is not two numbers of float64; make it with torch.empty");
  if (values.empty()) return;
  check_like(op, "values", values, masks);
  dispatch_real(op, values[0], [&](auto real) {
    soft_topk<decltype(real)>(values, costs, budget, beta, start, masks,
                              static_cast<double*>(root.mutable_data_ptr()));
  });
}

void soft_topk_grad_into(Tensors grads, Tensors masks, Tensors costs, double beta,
                         Tensors results) {
  const char* op = "soft_topk_grad";
  check_like(op, "grads", grads, masks);
  check_like(op, "results", results, masks);
  if (masks.empty()) return;
  dispatch_real(op, masks[0], [&](auto real) {
    soft_topk_grad<decltype(real)>(grads, masks, costs, beta, results);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_cocktail_cpp, m) {
  m.def("soft_topk_into(Tensor[] values, Tensor[] costs, float budget, float beta, Tensor? start, "
        "Tensor(a!)[] masks, Tensor(b!) root) -> ()");
  m.def("soft_topk_grad_into(Tensor[] grads, Tensor[] masks, Tensor[] costs, float beta, "
        "Tensor(a!)[] results) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, CPU, m) {
  m.impl("soft_topk_into", TORCH_BOX(&soft_topk_into));
  m.impl("soft_topk_grad_into", TORCH_BOX(&soft_topk_grad_into));
}

}  // namespace sparse_cocktail
