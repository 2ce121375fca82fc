// Small kernels, right and wrong, that show what the emulator does and what it notices.
#include "driver.h"
#include "ptx.h"

using namespace sparse_cocktail;

namespace {

// 64 threads copy 16 bytes each and pass them on to their neighbours.
__global__ void copies(const float* in, float* out, int wait, int barrier) {
  SC_SHARED(float, line, 256);
  const int t = static_cast<int>(threadIdx.x);
  cp_async_16(shared_address(line + 4 * t), in + 4 * t);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  if (barrier) __syncthreads();
  for (int i = 0; i < 4; ++i) out[4 * t + i] = line[255 - 4 * t - i];
}

__global__ void split_warp() {
  if (threadIdx.x == 3) __syncwarp();
  else __syncthreads();
}

// One mma.sp on a 16 x 32 matrix of ones with metadata `meta`, B all twos.
__global__ void one_mma(float* out, uint32_t meta) {
  const uint32_t one = 0x3f803f80, two = 0x40004000;  // pairs of bf16
  float d[4] = {};
  const uint32_t a[4] = {one, one, one, one}, b[4] = {two, two, two, two};
  mma_sp<BFloat16, 1>(d, a, b, meta);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = d[i];
}

// Rows of 128 bytes, chunk 0 of each, with or without the XOR swizzle.
__global__ void matrices(int swizzled) {
  SC_DYNAMIC_SHARED(tile);
  const uint32_t lane = threadIdx.x, row = lane % 8, chunk = lane / 8;
  uint32_t r[4];
  ldmatrix_x4(r, shared_address(tile) + row * 128 + (swizzled ? chunk ^ row : chunk) * 16);
}

// Producers arrive at barrier 1, consumers wait for them there.
__global__ void handover(float* out) {
  SC_SHARED(float, line, 32);
  const int t = static_cast<int>(threadIdx.x);
  if (t < 32) {
    line[t] = static_cast<float>(t);
    cuda_host::barrier_arrive(1, 64);
  } else {
    cuda_host::barrier_sync(1, 64);
    out[t - 32] = line[63 - t] + __shfl_xor_sync(0xffffffffu, 100.0f * (t % 2), 1);
  }
}

}  // namespace

extern "C" int run_copies(const float* in, float* out, int64_t wait, int64_t barrier) {
  return cuda_host::guarded([&] {
    return launch<copies>({dim3(1), 64}, nullptr, in, out, static_cast<int>(wait),
                          static_cast<int>(barrier));
  });
}
extern "C" int run_split_warp() {
  return cuda_host::guarded([] { return launch<split_warp>({dim3(1), 64}, nullptr); });
}
extern "C" int run_one_mma(float* out, int64_t meta) {
  return cuda_host::guarded([&] {
    return launch<one_mma>({dim3(1), 32}, nullptr, out, static_cast<uint32_t>(meta));
  });
}
extern "C" int run_matrices(int64_t swizzled, int64_t bytes) {
  return cuda_host::guarded([&] {
    return launch<matrices>({dim3(1), 32, static_cast<int>(bytes)}, nullptr,
                            static_cast<int>(swizzled));
  });
}
extern "C" int run_handover(float* out) {
  return cuda_host::guarded([&] { return launch<handover>({dim3(1), 64}, nullptr, out); });
}

extern "C" void round_floats(int64_t bf16, const float* in, uint16_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = bf16 ? from_float<BFloat16>(in[i]) : from_float<Float16>(in[i]);
  }
}
extern "C" void widen_bits(int64_t bf16, const uint16_t* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = bf16 ? to_float<BFloat16>(in[i]) : to_float<Float16>(in[i]);
  }
}
