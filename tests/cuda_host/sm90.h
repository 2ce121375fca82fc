// The Hopper instructions of csrc/cuda/ptx_sm90.h, written from the PTX ISA manual: "mbarrier",
// "cp.async.bulk.tensor", "Asynchronous warpgroup level matrix instructions", "stmatrix".
//
// Asynchronous means asynchronous here:
//   * a tensor copy poisons its target when it is issued and lands some time later;
//   * the sums of a wgmma are poison until the wait_group that covers it, and its operands, in
//     registers and in shared memory, must be the same at the issue and at that wait;
//   * neither a copy nor an arrival may reach a CTA of the cluster that has exited.
#pragma once

#include <deque>
#include <map>
#include <type_traits>
#include <vector>

#include "sm80.h"

// What cuTensorMapEncodeTiled writes, as far as 2-D tensors of 16-bit numbers need it.
struct CUtensorMap {
  const uint8_t* base;
  uint64_t columns, rows, row_bytes;
  uint32_t box_columns, box_rows;
};

namespace cuda_host::sm90 {

// ---- time ---------------------------------------------------------------------------------------

// With a seed for the order of threads, one in so many waits lasts much longer for one thread, and
// warps and CTAs drift apart as far as their barriers allow.
inline void dawdle(uint32_t one_in = 512) {
  if (options().order < 2 || (machine().random() >> 8) % one_in) return;
  for (uint32_t rounds = (machine().random() >> 8) % 128; rounds > 0; --rounds) {
    later([] {});  // nothing is stuck
    yield();
  }
}

// ---- addresses ----------------------------------------------------------------------------------

// 128-byte swizzle: the 16-byte column within 128 bytes is exclusive-or'ed with the row of eight.
inline uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// The same shared memory in another CTA of the cluster.
inline Cta& cta_of_rank(uint32_t rank, const char* what) {
  auto& cluster = machine().cluster;
  if (rank >= cluster.size()) fail("%s: rank %u in a cluster of %zu", what, rank, cluster.size());
  if (cluster[rank]->live == 0) fail("%s: the CTA of rank %u has exited", what, rank);
  return *cluster[rank];
}

// ---- mbarrier -----------------------------------------------------------------------------------

// The opaque 64 bits: pending arrivals, arrivals per phase, bytes still to come (signed), phase.
// Shared memory starts as ones, so `bad` is set in a barrier that was never initialised.
struct Barrier {
  uint64_t pending : 20, arrivals : 20;
  int64_t bytes : 22;
  uint64_t phase : 1, bad : 1;
};
static_assert(sizeof(Barrier) == 8);

inline Barrier& barrier_at(Cta& cta, uint32_t address, const char* what) {
  auto& barrier = *reinterpret_cast<Barrier*>(shared_pointer_of(cta, address, 8, 8));
  if (barrier.bad) fail("%s: the mbarrier at %u is not initialised", what, address);
  return barrier;
}
inline void end_phase_if_complete(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.phase ^= 1;
    barrier.pending = barrier.arrivals;
  }
}
inline void count_arrival(Barrier& barrier) {
  if (barrier.pending == 0) fail("mbarrier: more arrivals than the phase expects");
  --barrier.pending;
  end_phase_if_complete(barrier);
}
inline void count_bytes(Barrier& barrier, int64_t bytes) {
  const int64_t now = barrier.bytes + bytes;
  if (now >= 1 << 20 || now <= -(1 << 20)) fail("mbarrier: %lld bytes pending", (long long)now);
  barrier.bytes = now;
}

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  if (arrivals == 0 || arrivals >= 1u << 20) fail("mbarrier.init: %u arrivals", arrivals);
  dawdle(8);
  memset(barrier, 0, 8);
  auto& state = barrier_at(*thread().cta, shared_address(barrier), "mbarrier.init");
  state.pending = state.arrivals = arrivals;
}
inline void barrier_init_fence() {}
inline void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  auto& state = barrier_at(*thread().cta, shared_address(barrier), "mbarrier.arrive.expect_tx");
  count_bytes(state, bytes);
  count_arrival(state);
}
inline void barrier_arrive(uint64_t* barrier) {
  count_arrival(barrier_at(*thread().cta, shared_address(barrier), "mbarrier.arrive"));
}
inline void barrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  Cta& cta = cta_of_rank(rank, "mbarrier.arrive");
  count_arrival(barrier_at(cta, shared_address(barrier), "mbarrier.arrive"));
}
// True once the phase of this parity is over, that is while the present one has the other parity.
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  auto& state = barrier_at(*thread().cta, shared_address(barrier), "mbarrier.try_wait");
  wait_until("an mbarrier", [&] { return state.phase != (parity & 1); });
  dawdle();
}

// ---- tensor copies ------------------------------------------------------------------------------

// The rules of cuTensorMapEncodeTiled; null, or the one that is broken.
inline const char* encode_map(CUtensorMap& map, const void* base, uint64_t columns, uint64_t rows,
                              uint64_t row_bytes, uint32_t box_columns, uint32_t box_rows) {
  if (reinterpret_cast<uintptr_t>(base) % 16) return "globalAddress is not aligned to 16 bytes";
  if (row_bytes % 16 || row_bytes >= 1ull << 40) return "globalStrides is no multiple of 16";
  if (columns == 0 || rows == 0 || columns > 1ull << 32 || rows > 1ull << 32) return "globalDim";
  if (box_columns == 0 || box_rows == 0 || box_columns > 256 || box_rows > 256) return "boxDim";
  if (box_columns * 2 > 128) return "boxDim[0] exceeds the 128 bytes of the swizzle";
  map = {static_cast<const uint8_t*>(base), columns, rows, row_bytes, box_columns, box_rows};
  return nullptr;
}

inline void prefetch_map(const CUtensorMap*) {}

inline void land_box(Cta& cta, uint32_t target, const CUtensorMap& map, uint32_t barrier,
                     int64_t column, int64_t row) {
  for (uint32_t r = 0; r < map.box_rows; ++r) {
    for (uint32_t c = 0; c < map.box_columns; ++c) {
      uint16_t number = 0;  // outside the tensor
      const int64_t at_row = row + r, at_column = column + c;
      if (at_row >= 0 && at_row < static_cast<int64_t>(map.rows) && at_column >= 0 &&
          at_column < static_cast<int64_t>(map.columns)) {
        const uint8_t* source = map.base + at_row * map.row_bytes + at_column * 2;
        check_global(source, 2, "cp.async.bulk.tensor");
        memcpy(&number, source, 2);
      }
      const uint32_t address = target + (r * map.box_columns + c) * 2;
      memcpy(shared_pointer_of(cta, swizzle_128(address), 2, 2), &number, 2);
    }
  }
  Barrier& state = barrier_at(cta, barrier, "cp.async.bulk.tensor");
  count_bytes(state, -static_cast<int64_t>(map.box_rows * map.box_columns * 2));
  end_phase_if_complete(state);
}

inline void copy_box_to_all(void* target, const CUtensorMap* map, uint64_t* barrier, int column,
                            int row, uint16_t ranks) {
  const char* const what = "cp.async.bulk.tensor";
  const uint32_t address = shared_address(target), bytes = map->box_rows * map->box_columns * 2;
  if (address % 128) fail("%s: the target at %u is not aligned to 128 bytes", what, address);
  for (uint32_t rank = 0; rank < 16; ++rank) {
    if (!(ranks >> rank & 1)) continue;
    memset(shared_pointer_of(cta_of_rank(rank, what), address, bytes, 1), kPoison, bytes);
    later([=, map = *map, at = shared_address(barrier)] {
      land_box(cta_of_rank(rank, what), address, map, at, column, row);
    });
  }
  ++statistics().async_copies;
}
inline void copy_box(void* target, const CUtensorMap* map, uint64_t* barrier, int column, int row) {
  copy_box_to_all(target, map, barrier, column, row,
                  static_cast<uint16_t>(1u << thread().cta->rank_in_cluster));
}

// ---- clusters, warpgroups -----------------------------------------------------------------------

inline uint32_t cluster_rank() { return static_cast<uint32_t>(thread().cta->rank_in_cluster); }

inline NamedBarrier& barrier_of_cluster() {
  static NamedBarrier barrier;
  return barrier;
}
inline void cluster_sync() {
  NamedBarrier& barrier = barrier_of_cluster();
  barrier.expected = 0;
  for (const Cta* cta : machine().cluster) barrier.expected += cta->live;
  ++barrier.arrived;
  const uint64_t generation = barrier.generation;
  check_barrier(barrier);
  wait_until("barrier.cluster", [&] { return barrier.generation != generation; });
}

inline void named_barrier(int id, int threads) {
  barrier_sync(id, threads);
  dawdle();
}
template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

// ---- loads and stores ---------------------------------------------------------------------------

inline void load_weights(uint32_t (&registers)[4], const void* source) {
  if (reinterpret_cast<uintptr_t>(source) % 16) fail("ld.global.v4: not aligned to 16 bytes");
  check_global(source, 16, "ld.global.v4");
  memcpy(registers, source, 16);
}
inline void load_meta(uint32_t& word, const void* source) {
  if (reinterpret_cast<uintptr_t>(source) % 4) fail("ld.global: not aligned to 4 bytes");
  check_global(source, 4, "ld.global");
  memcpy(&word, source, 4);
}

// stmatrix.x4.trans: lane 4j + c holds elements (j, 2c) and (j, 2c + 1) of matrix i in register i;
// the address of lane 8i + r receives (0, r), (1, r) ... (7, r).
inline void store_transposed(void* row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  struct Slot {
    uint32_t address, registers[4];
  } slot{shared_address(row), {m0, m1, m2, m3}};
  collective("stmatrix", slot, [](Slot** lanes) {
    for (int i = 0; i < 4; ++i) {
      int rows_at[8] = {};  // of the eight 16-byte columns of the banks
      for (int r = 0; r < 8; ++r) {
        const Slot& target = *lanes[8 * i + r];
        uint8_t* bytes = shared_pointer(target.address, 16, 16);
        for (int k = 0; k < 8; ++k) {
          const uint32_t pair = lanes[4 * k + r / 2]->registers[i];
          const auto number = static_cast<uint16_t>(pair >> 16 * (r % 2));
          memcpy(bytes + 2 * k, &number, 2);
        }
        ++rows_at[target.address / 16 % 8];
      }
      statistics().matrix_conflicts += *std::max_element(rows_at, rows_at + 8) - 1;
    }
  });
}
}  // namespace cuda_host::sm90

#include "wgmma.h"
