#include "driver.h"
#include "nm_skinny.cu"

using namespace sparse_cocktail;

extern "C" int nm_skinny(int64_t bf16, const void* x, const void* packed, const void* meta, void* y,
                         int64_t rows, int64_t in, int64_t out, const void* bias,
                         int64_t bias_is_float32, int64_t activation, int64_t blocks, int64_t split,
                         void* partial) {
  const Problem p{static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(packed),
                  static_cast<const uint32_t*>(meta), static_cast<uint16_t*>(y),
                  static_cast<float*>(partial), rows, in, out,
                  static_cast<int>(split),
                  {bias, static_cast<int>(bias_is_float32), static_cast<int>(activation)}};
  return cuda_host::guarded([&] {
    return bf16 ? launch_skinny<BFloat16>(p, static_cast<int>(blocks), nullptr)
                : launch_skinny<Float16>(p, static_cast<int>(blocks), nullptr);
  });
}

// The plan as blocks * 1000 + split.
extern "C" int choose_plan(int64_t out, int64_t in, int64_t rows, int64_t multiprocessors,
                           int64_t split) {
  const SkinnyPlan plan = plan_skinny(out, in, rows, multiprocessors, split);
  return plan.blocks * 1000 + plan.split;
}
