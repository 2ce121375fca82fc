#include "driver.h"
#include "nm_gemm_sm80.cu"

using namespace sparse_cocktail;

extern "C" int nm_gemm_sm80(int64_t bf16, const void* x, const void* packed, const void* meta,
                            void* y, int64_t rows, int64_t in, int64_t out, const void* bias,
                            int64_t bias_is_float32, int64_t activation, int64_t tile,
                            int64_t split, void* partial) {
  const Problem p{static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(packed),
                  static_cast<const uint32_t*>(meta), static_cast<uint16_t*>(y),
                  static_cast<float*>(partial), rows, in, out, static_cast<int>(split),
                  {bias, static_cast<int>(bias_is_float32), static_cast<int>(activation)}};
  return cuda_host::guarded([&] {
    return bf16 ? launch_gemm_sm80<BFloat16>(p, static_cast<int>(tile), nullptr)
                : launch_gemm_sm80<Float16>(p, static_cast<int>(tile), nullptr);
  });
}

// Outputs, rows and shared memory of a tile, counted from 1.
extern "C" void tile_shape(int64_t tile, int64_t* shape) {
  const Tile& t = kTiles[tile - 1];
  shape[0] = t.out, shape[1] = t.rows, shape[2] = t.shared_bytes();
}
extern "C" int gemm_sm80_tiles() { return kTileCount; }
// The plan as the argument `tile` of the op.
extern "C" int choose_tile(int64_t out, int64_t rows, int64_t in, int64_t multiprocessors,
                           int64_t limit) {
  const GemmPlan plan = plan_gemm_sm80(out, rows, in, multiprocessors, limit);
  return plan.tile + kTileCodes * (plan.split - 1);
}
