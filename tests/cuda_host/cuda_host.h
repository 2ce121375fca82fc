// What a .cu file expects of the CUDA language, for g++ with -DSC_EMULATE: keywords, built-in
// variables, vector types, warp intrinsics, atomics. Included by csrc/cuda/launch.h.
#pragma once

#include <cmath>

#include "core.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
#define __align__(n) alignas(n)

#define threadIdx (::cuda_host::thread().index)
#define blockIdx (::cuda_host::thread().cta->index)
#define blockDim (::cuda_host::machine().block)
#define gridDim (::cuda_host::machine().grid)
#define warpSize 32

using dim3 = cuda_host::Dim3;
struct alignas(4) uchar4 { unsigned char x, y, z, w; };
struct alignas(4) ushort2 { unsigned short x, y; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- the CTA and the warp -----------------------------------------------------------------------

inline void __syncthreads() { cuda_host::sync_threads(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  int none = 0;
  cuda_host::collective("__syncwarp", none, [](int**) {}, mask);
}

namespace cuda_host {

template <class T>
struct ShuffleSlot {
  T value;
  int source;  // the lane to take from; the lane itself where it would leave its segment
};

// Every lane gets the value of its source lane. Reading a lane outside the mask is undefined.
template <class T>
T shuffle(const char* name, unsigned mask, T value, int source) {
  ShuffleSlot<T> slot{value, source};
  collective(name, slot, [&](ShuffleSlot<T>** lanes) {
    T before[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      if (lanes[i]) before[i] = lanes[i]->value;
    }
    for (int i = 0; i < kLanes; ++i) {
      if (!lanes[i]) continue;
      if (!lanes[lanes[i]->source]) fail("%s: lane %d reads a lane outside the mask", name, i);
      lanes[i]->value = before[lanes[i]->source];
    }
  }, mask);
  return slot.value;
}

inline unsigned ballot(const char* name, unsigned mask, bool predicate) {
  struct Slot { bool in; unsigned out; } slot{predicate, 0};
  collective(name, slot, [](Slot** lanes) {
    unsigned result = 0;
    for (int i = 0; i < kLanes; ++i) result |= (lanes[i] && lanes[i]->in ? 1u : 0u) << i;
    for (int i = 0; i < kLanes; ++i) {
      if (lanes[i]) lanes[i]->out = result;
    }
  }, mask);
  return slot.out;
}

}  // namespace cuda_host

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int base = cuda_host::thread().lane & ~(width - 1);
  return cuda_host::shuffle("__shfl_sync", mask, value, base + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = cuda_host::thread().lane, source = lane ^ lanes;
  const bool inside = (source & ~(width - 1)) <= (lane & ~(width - 1));
  return cuda_host::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cuda_host::thread().lane;
  const bool inside = static_cast<int>(lane & (width - 1)) + static_cast<int>(delta) < width;
  return cuda_host::shuffle("__shfl_down_sync", mask, value,
                            inside ? lane + static_cast<int>(delta) : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cuda_host::thread().lane;
  const bool inside = (lane & (width - 1)) >= static_cast<int>(delta);
  return cuda_host::shuffle("__shfl_up_sync", mask, value,
                            inside ? lane - static_cast<int>(delta) : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool p) {
  return cuda_host::ballot("__ballot_sync", mask, p);
}
inline int __any_sync(unsigned mask, bool p) {
  return cuda_host::ballot("__any_sync", mask, p) != 0;
}
inline int __all_sync(unsigned mask, bool p) {
  return cuda_host::ballot("__all_sync", mask, p) == mask;
}

// ---- memory and bits ----------------------------------------------------------------------------

inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
T __ldg(const T* p) {
  cuda_host::check_global(p, sizeof(T), "__ldg");
  return *p;
}
// Fibers switch only where they wait, so plain operations are atomic.
template <class T, class V>
T atomicAdd(T* p, V value) {
  const T before = *p;
  *p = static_cast<T>(before + value);
  return before;
}
template <class T, class V>
T atomicMax(T* p, V value) {
  const T before = *p;
  *p = std::max(before, static_cast<T>(value));
  return before;
}
template <class T, class V>
T atomicOr(T* p, V value) {
  const T before = *p;
  *p = before | static_cast<T>(value);
  return before;
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(unsigned v) { return v ? __builtin_clz(v) : 32; }
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (v >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> 4 * i & 0xf;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (s & 7) & 0xff);
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;  // replicates the sign
    r |= byte << 8 * i;
  }
  return r;
}
inline unsigned __float_as_uint(float f) {
  unsigned u;
  memcpy(&u, &f, sizeof u);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}
inline int __float_as_int(float f) { return static_cast<int>(__float_as_uint(f)); }
inline float __int_as_float(int i) { return __uint_as_float(static_cast<unsigned>(i)); }
template <class T>
T min(T a, T b) { return b < a ? b : a; }
template <class T>
T max(T a, T b) { return a < b ? b : a; }
