// One function per PTX instruction of sm_80. Under SC_EMULATE the functions of the same names in
// tests/cuda_host/sm80.h do what the PTX manual says, lane by lane.
//
// 16-bit numbers are carried as bits (uint16_t, two in a uint32_t); the tags BFloat16 and Float16
// of common/bits.h choose conversions and instructions.
#pragma once

#include <type_traits>

#include "../common/bits.h"
#include "launch.h"

#ifdef SC_EMULATE
#include "sm80.h"
#endif

namespace sparse_cocktail {

#ifdef SC_EMULATE

using namespace cuda_host::sm80;

template <class T>
float to_float(uint16_t bits) {
  return std::is_same_v<T, BFloat16> ? bf16_to_float(bits) : fp16_to_float(bits);
}
template <class T>
uint16_t from_float(float value) {
  return std::is_same_v<T, BFloat16> ? float_to_bf16(value) : float_to_fp16(value);
}
template <class T, int selector>
void mma_sp(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta) {
  mma_sp_m16n8k32<std::is_same_v<T, BFloat16>>(d, a, b, meta, selector);
}

#else

// The address within shared memory that PTX instructions take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory past L1; source_bytes 0 writes zeros and reads nothing. L2
// fetches 128-byte lines: a row of x is one line per step, and half a line would be fetched twice.
__device__ __forceinline__ void cp_async_16(uint32_t target, const void* source,
                                            uint32_t source_bytes = 16) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(source_bytes)
               : "memory");
}
// The same where `active`, without a branch, so that it can lie between products.
__device__ __forceinline__ void cp_async_16_if(bool active, uint32_t target, const void* source,
                                               uint32_t source_bytes = 16) {
  asm volatile(
      "{ .reg .pred active; setp.ne.b32 active, %3, 0;"
      " @active cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2; }" ::"r"(target),
      "l"(source), "r"(source_bytes), "r"(static_cast<uint32_t>(active))
      : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `pending` of this thread's newest groups are still on their way.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 16 bits; lanes 8i..8i+7 give the rows of matrix i, r[i] receives it.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_shared(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t r;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(address) : "memory");
  return r;
}
__device__ __forceinline__ float load_shared_float(uint32_t address) {
  return __uint_as_float(load_shared(address));
}
__device__ __forceinline__ void store_shared(uint32_t address, uint16_t value) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(value) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void store_global(void* target, const uint32_t (&r)[4]) {
  *static_cast<uint4*>(target) = make_uint4(r[0], r[1], r[2], r[3]);
}
template <class V>
__device__ __forceinline__ void store_global(V* target, V value) {
  *target = value;
}
// Read-only data, through the texture path.
template <class V>
__device__ __forceinline__ V load_global(const V* source) {
  return __ldg(source);
}

// d += A B with A 2:4 sparse, m16n8k32; `selector` says which two lanes of each quad supply `meta`.
template <class T, int selector>
__device__ __forceinline__ void mma_sp(float (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[4], uint32_t meta);

// The ordered form is the same instruction up to sm_90 and avoids an emulation on later cards.
#define SC_MMA_SP(type, name, selector)                                                        \
  template <>                                                                                  \
  __device__ __forceinline__ void mma_sp<type, selector>(                                      \
      float(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[4], uint32_t meta) {             \
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." name "." name   \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "               \
                 "{%0, %1, %2, %3}, %12, " #selector ";"                                       \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]),           \
                   "r"(b[2]), "r"(b[3]), "r"(meta));                                           \
  }
SC_MMA_SP(BFloat16, "bf16", 0x0)
SC_MMA_SP(BFloat16, "bf16", 0x1)
SC_MMA_SP(Float16, "f16", 0x0)
SC_MMA_SP(Float16, "f16", 0x1)
#undef SC_MMA_SP

template <class T>
__device__ __forceinline__ float to_float(uint16_t bits) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  } else {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
}
// To nearest even.
template <class T>
__device__ __forceinline__ uint16_t from_float(float value) {
  uint16_t bits;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  } else {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  }
  return bits;
}

#endif

}  // namespace sparse_cocktail
