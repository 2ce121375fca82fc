#include "driver.h"
#include "nm_gemm_sm90.cu"

using namespace sparse_cocktail;

extern "C" int nm_gemm_sm90(int64_t bf16, const void* x, const void* packed, const void* meta,
                            void* y, int64_t rows, int64_t in, int64_t out, const void* bias,
                            int64_t bias_is_float32, int64_t activation, int64_t tile,
                            int64_t multiprocessors) {
  const Problem p{static_cast<const uint16_t*>(x),
                  static_cast<const uint16_t*>(packed),
                  static_cast<const uint32_t*>(meta),
                  static_cast<uint16_t*>(y),
                  static_cast<int>(rows),
                  static_cast<int>(in),
                  static_cast<int>(out),
                  {bias, static_cast<int>(bias_is_float32), static_cast<int>(activation)}};
  const int number = static_cast<int>(tile), sms = static_cast<int>(multiprocessors);
  cuda_host::sm90::forget_products();
  return cuda_host::guarded([&] {
    return bf16 ? launch_gemm_sm90<BFloat16>(p, number, sms, nullptr)
                : launch_gemm_sm90<Float16>(p, number, sms, nullptr);
  });
}

extern "C" int64_t gemm_sm90_tiles() { return kTiles; }
// out, rows, CTAs of a cluster
extern "C" void tile_size(int64_t tile, int64_t* size) {
  const TileSize& t = kTileSizes[tile - 1];
  size[0] = t.out, size[1] = t.rows, size[2] = t.cluster;
}
extern "C" int64_t choose_tile_sm90(int64_t out, int64_t rows, int64_t in,
                                    int64_t multiprocessors) {
  return choose_tile(out, rows, in, static_cast<int>(multiprocessors));
}
