// Sparse products on any machine: 4 lanes per vector of the compiler, SSE2 or NEON.
#include <cstring>

#include "masked_linear.h"
#include "sparse_product.h"

namespace sparse_cocktail {
namespace portable {
namespace {

struct Lanes {
  typedef float Four __attribute__((vector_size(16)));
  static constexpr int kCount = 4, kMostSums = 12, kSquare = 4;
  static constexpr int kRowTile = 2, kOutputTile = 4;
  static constexpr int kSumTile = 4, kVectorTile = 2;
  Four v;

  static Lanes all(float value) { return {Four{value, value, value, value}}; }
  static Lanes load(const float* p) { return load_first(p, kCount); }
  static Lanes load_first(const float* p, int n) {
    Lanes lanes{};
    memcpy(&lanes.v, p, n * sizeof(float));
    return lanes;
  }
  static Lanes every_other(const float* p, int n) {
    Lanes lanes{};
    for (int i = 0; i < n; ++i) lanes.v[i] = p[2 * i];
    return lanes;
  }
  void store(float* p) const { store_first(p, kCount); }
  void store_first(float* p, int n) const { memcpy(p, &v, n * sizeof(float)); }
  void set_product(Lanes a, const float* p) { v = a.v * load(p).v; }
  void add(Lanes other) { v += other.v; }
  void add_product(Lanes a, const float* p) { v += a.v * load(p).v; }
  void add_product(Lanes a, Lanes b) { v += a.v * b.v; }
  void set_zero() { v = Four{}; }
  float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
  Lanes kept(uint32_t mask) const {
    Lanes lanes;
    for (int i = 0; i < kCount; ++i) lanes.v[i] = mask >> i & 1 ? v[i] : 0.0f;
    return lanes;
  }
  static Lanes load_kept(const float* p, uint32_t mask) {
    Lanes lanes;
    for (int i = 0; i < kCount; ++i) lanes.v[i] = mask >> i & 1 ? p[i] : 0.0f;
    return lanes;
  }
  static void transpose(const float* source, int64_t source_pitch, float* target,
                        int64_t target_pitch) {
    for (int r = 0; r < kSquare; ++r) {
      for (int c = 0; c < kSquare; ++c) target[c * target_pitch + r] = source[r * source_pitch + c];
    }
  }
};

#include "sparse_product_loops.h"
#include "masked_linear_loops.h"

}  // namespace
}  // namespace portable

const SparseKernels& portable_sparse_kernels() {
  static constexpr SparseKernels all{portable::multiply, portable::gather, portable::scatter};
  return all;
}

const MaskedLinearKernels& portable_masked_linear() {
  using namespace portable;
  static constexpr MaskedLinearKernels all{forward, input_grad, weight_grad};
  return all;
}

}  // namespace sparse_cocktail
