// The instructions of Hopper (sm_90a) that a kernel cannot say in C++, one small function each: the
// barriers of shared memory (mbarrier), the tensor copy engine (TMA), sparse warpgroup products
// (wgmma.sp). Their meaning is that of the PTX ISA manual, sections 9.7.9, 9.7.13 and 9.7.15.
//
// With SC_EMULATE the same functions come from tests/cuda_host/sm90.h, which does on the host what
// the manual says. Code that calls these stands under SC_SM90A: elsewhere it would not assemble.
#pragma once

#include "ptx.h"

#if defined(SC_EMULATE)
#define SC_SM90A 1
#include "sm90.h"
#else
#include <cudaTypedefs.h>  // CUtensorMap; nothing of libcuda is linked
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SC_SM90A 1
#else
#define SC_SM90A 0
#endif
#endif

namespace sparse_cocktail {
namespace sm90 {

#if defined(SC_EMULATE)

using namespace cuda_host::sm90;

template <class T, int kSelector, int kCount>
struct SparseProduct {
  static void add(float (&sum)[kCount], const uint32_t (&a)[4], uint64_t b, const uint32_t& meta) {
    wgmma_sp(std::is_same_v<T, BFloat16>, sum, kCount, a, b, meta, kSelector);
  }
};

#elif SC_SM90A

// ---- mbarrier -----------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to the other CTAs of the cluster and to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}

// One arrival that also announces `bytes` of copies: the phase ends when those have landed too.
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// An arrival at the barrier of the same address in CTA `rank` of this cluster. It says that this
// warp has read, and carries no data, so CTA scope is enough; release at cluster scope would cost a
// memory barrier of the whole card each time.
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Waits until the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\nbra again;\nfinished:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- TMA ----------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of a 2-D tensor to shared memory; `column` and `row` are its first element.
__device__ __forceinline__ void copy_box(void* target, const CUtensorMap* map, uint64_t* barrier,
                                         int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}

// The same box to the same place of every CTA of the cluster whose bit is set in `ranks`; each gets
// its bytes counted at its own barrier.
__device__ __forceinline__ void copy_box_to_all(void* target, const CUtensorMap* map,
                                                uint64_t* barrier, int column, int row,
                                                uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(ranks)
      : "memory");
}

// ---- clusters, warpgroups -----------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all CTAs of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Barrier `id` (0 is __syncthreads()) among `threads` threads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- loads and stores ---------------------------------------------------------------------------

// Weights pass through registers once: no line of the first-level cache is kept for them.
__device__ __forceinline__ void load_weights(uint32_t (&registers)[4], const void* source) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "l"(source));
}
__device__ __forceinline__ void load_meta(uint32_t& word, const void* source) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(word) : "l"(source));
}

// Four 8x8 matrices of 16-bit numbers: register i of lane 4g + t holds row g, columns 2t, 2t + 1 of
// matrix i, which is stored transposed; lane 8i + r gives the address of its column r.
__device__ __forceinline__ void store_transposed(void* row, uint32_t m0, uint32_t m1, uint32_t m2,
                                                 uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(m0), "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

// ---- wgmma.sp -----------------------------------------------------------------------------------

// Orders this warpgroup's accesses to registers before the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending of the latest groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler sees a product's result as ready where wgmma stands. This ties every later use to a
// place behind the wait.
template <int kCount>
__device__ __forceinline__ void wgmma_settled(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// sum (64 x 2 kCount) += A (64 x 32, 2:4) * B (32 x 2 kCount). A and its metadata are registers, as
// in mma.sp.m16n8k32 with warp w at rows 16 w; the selector S takes the metadata of lanes 2S and
// 2S + 1 of each quad. B is K-major in shared memory. No register may change before wgmma_wait.
template <class T, int kSelector, int kCount>
struct SparseProduct;

#define SC_F8(d, i)                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), \
      "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SC_SUMS_32(d) SC_F8(d, 0), SC_F8(d, 8), SC_F8(d, 16), SC_F8(d, 24)
#define SC_SUMS_64(d) SC_SUMS_32(d), SC_F8(d, 32), SC_F8(d, 40), SC_F8(d, 48), SC_F8(d, 56)
#define SC_SUMS_80(d) SC_SUMS_64(d), SC_F8(d, 64), SC_F8(d, 72)
#define SC_SUMS_128(d)                                                                  \
  SC_SUMS_80(d), SC_F8(d, 80), SC_F8(d, 88), SC_F8(d, 96), SC_F8(d, 104), SC_F8(d, 112), \
      SC_F8(d, 120)

#define SC_NUMBERS_32                                                       \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19," \
  "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define SC_NUMBERS_64                                                                   \
  SC_NUMBERS_32                                                                         \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51," \
  "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define SC_NUMBERS_80 \
  SC_NUMBERS_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define SC_NUMBERS_128                                                                    \
  SC_NUMBERS_80 ",%80,%81,%82,%83,%84,"                                                   \
  "%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104," \
  "%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121," \
  "%122,%123,%124,%125,%126,%127"

// The operands after `b`: metadata, selector, scale-d (always add), scale-a, scale-b, no transpose.
#define SC_SPARSE_PRODUCT(TYPE, NAME, COUNT, N, OPERANDS)                                      \
  template <int kSelector>                                                                     \
  struct SparseProduct<TYPE, kSelector, COUNT> {                                               \
    static __device__ __forceinline__ void add(float (&sum)[COUNT], const uint32_t (&a)[4],    \
                                               uint64_t b, const uint32_t& meta) {             \
      asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 1, 1;\n"                              \
                   "wgmma.mma_async.sp.sync.aligned.m64n" #N "k32.f32." NAME "." NAME          \
                   " {" SC_NUMBERS_##COUNT "}, " OPERANDS ", add, 1, 1, 0;\n}"                 \
                   : SC_SUMS_##COUNT(sum)                                                      \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(meta),            \
                     "n"(kSelector));                                                          \
    }                                                                                          \
  };
#define SC_SPARSE_PRODUCTS(TYPE, NAME)                                                        \
  SC_SPARSE_PRODUCT(TYPE, NAME, 32, 64, "{%32, %33, %34, %35}, %36, %37, %38")                \
  SC_SPARSE_PRODUCT(TYPE, NAME, 64, 128, "{%64, %65, %66, %67}, %68, %69, %70")               \
  SC_SPARSE_PRODUCT(TYPE, NAME, 80, 160, "{%80, %81, %82, %83}, %84, %85, %86")               \
  SC_SPARSE_PRODUCT(TYPE, NAME, 128, 256, "{%128, %129, %130, %131}, %132, %133, %134")

SC_SPARSE_PRODUCTS(BFloat16, "bf16")
SC_SPARSE_PRODUCTS(Float16, "f16")

#undef SC_SPARSE_PRODUCTS
#undef SC_SPARSE_PRODUCT
#undef SC_NUMBERS_128
#undef SC_NUMBERS_80
#undef SC_NUMBERS_64
#undef SC_NUMBERS_32
#undef SC_SUMS_128
#undef SC_SUMS_80
#undef SC_SUMS_64
#undef SC_SUMS_32
#undef SC_F8

#endif

}  // namespace sm90
}  // namespace sparse_cocktail
