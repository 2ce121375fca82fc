// Runs CUDA kernels on the CPU: every thread of a CTA is a fiber, and a fiber runs until it waits.
//
//   launch -> clusters, one after another -> CTAs of a cluster together -> warps -> 32 fibers each
//
// What a machine would leave to chance is made visible here:
//   * shared memory starts as NaN, and so does the target of an asynchronous copy until its wait;
//   * the order in which fibers and CTAs run follows `options().order`, so a missing barrier shows;
//   * a rendezvous of a warp needs the very lanes it names, at the same instruction;
//   * when nothing can move any more, the launch fails and says what each fiber waits for.
//
// Instruction sets build on these (sm80.h; sm90.h for Hopper):
//   thread()                            the running fiber: .index .linear .lane .warp .cta
//   wait_until("what", predicate)       gives way until the predicate holds. The scheduler polls
//                                       it: it looks at captured state only, never at thread()
//   collective("name", slot, finish)    all lanes of a mask meet; the last one runs
//                                       finish(Slot* lanes[32])
//   later(action)                       an asynchronous engine: the scheduler runs it later
//   fail("format", ...)                 ends the launch; the caller of launch() gets a Failure
//   shared_pointer(address, bytes)      bounds-checked shared memory of the fiber's CTA
//   check_global(pointer, bytes, what)  inside one of the ranges given to register_global()
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

namespace cuda_host {

constexpr int kLanes = 32;
constexpr uint8_t kPoison = 0xff;  // NaN in bf16, fp16 and fp32, and -1 as an integer
constexpr size_t kSharedLimit = 227 * 1024;  // what one CTA may have on the largest card

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned count() const { return x * y * z; }
};

struct Options {
  // 0: threads and CTAs in order; 1: backwards; else shuffled with this seed, anew every round.
  // With 0 and 1 warps run far ahead of each other, else they keep in step.
  uint32_t order = 0;
  int64_t only_block = -1;  // run this CTA alone: a corner of a problem too large to run whole
  size_t shared_limit = kSharedLimit;  // 99 KiB on sm_86 and sm_89, 163 KiB on sm_80
};

// Counted while kernels run; tests read them to see what a kernel really did.
struct Statistics {
  int64_t sparse_mmas = 0;
  int64_t matrix_loads = 0;      // 8x8 matrices read by ldmatrix
  int64_t matrix_conflicts = 0;  // extra passes because two of their rows share banks
  int64_t async_copies = 0;
  int64_t async_bytes = 0;       // read from global memory by asynchronous copies
};

struct Cta;
struct Warp;

// One asynchronous copy that was issued and has not arrived.
struct Copy {
  uint32_t target;
  const void* source;
  uint32_t source_bytes, bytes;
};

struct Thread {
  enum State { kReady, kPolling, kParked, kDone };
  Fiber fiber;
  Dim3 index{0, 0, 0};
  int linear = 0, lane = 0;
  Warp* warp = nullptr;
  Cta* cta = nullptr;
  State state = kDone;
  const char* what = "";  // what it waits for
  bool (*poll)(const void*) = nullptr;
  const void* poll_argument = nullptr;
  std::vector<Copy> open_copies;                // of the group that is still being filled
  std::deque<std::vector<Copy>> copy_groups;    // committed, oldest first
};

// Lanes of one warp that have reached one collective instruction.
struct Meeting {
  const char* name;
  uint32_t mask, arrived;
  void* slots[kLanes];
};

struct Warp {
  Thread* lanes[kLanes] = {};
  uint32_t live = 0;
  std::vector<Meeting> meetings;
};

struct NamedBarrier {
  int arrived = 0, expected = 0;
  uint64_t generation = 0;
};

struct Cta {
  Dim3 index{0, 0, 0};
  int rank_in_cluster = 0;
  int live = 0;
  std::vector<uint8_t> storage;
  uint8_t* shared = nullptr;  // aligned; static arrays first, then the dynamic part
  size_t shared_bytes = 0, static_bytes = 0, dynamic_offset = 0;
  std::vector<std::pair<const void*, size_t>> static_arrays;  // tag -> offset
  NamedBarrier barriers[16];
  std::vector<Warp> warps;
  std::vector<Thread*> threads;
};

struct Range {
  const uint8_t *begin, *end;
};

struct Machine {
  Options options;
  Statistics statistics;
  std::vector<Range> ranges;
  Thread* running = nullptr;
  Fiber scheduler;
  std::string failure;
  Dim3 grid, block;
  std::vector<Cta*> cluster;  // the CTAs that are resident together
  std::deque<std::function<void()>> events;
  const std::function<void()>* body = nullptr;
  uint32_t random_state = 1;
  uint64_t round = 0;  // turns that everyone had
  std::vector<std::unique_ptr<Thread>> pool;  // fibers and their stacks are used again
  uint32_t random() { return random_state = random_state * 1664525u + 1013904223u; }
};

inline Machine& machine() {
  static Machine one;
  return one;
}
inline Options& options() { return machine().options; }
inline Statistics& statistics() { return machine().statistics; }
inline Thread& thread() { return *machine().running; }

// ---- failing, waiting ---------------------------------------------------------------------------

// Ends the launch. Fibers are left where they are: their stacks are simply used again.
[[noreturn]] inline void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Machine& m = machine();
  if (m.running == nullptr) throw Failure(text);
  char place[160];
  const Thread& t = *m.running;
  const Dim3 block = t.cta->index;
  snprintf(place, sizeof place, " [block (%u, %u, %u), thread %d = warp %d lane %d]", block.x,
           block.y, block.z, t.linear, t.linear / kLanes, t.lane);
  m.failure = std::string(text) + place;
  switch_fiber(m.running->fiber, m.scheduler);
  abort();  // never resumed
}

inline void give_way() { switch_fiber(thread().fiber, machine().scheduler); }

// Waits until predicate() holds. `what` must outlive the wait; it is printed in a deadlock.
template <class Predicate>
void wait_until(const char* what, const Predicate& predicate) {
  if (predicate()) return;
  Thread& t = thread();
  t.what = what;
  t.poll = [](const void* p) { return (*static_cast<const Predicate*>(p))(); };
  t.poll_argument = &predicate;
  t.state = Thread::kPolling;
  give_way();
}

// Lets the others have a turn; for code that spins on memory.
inline void yield() {
  const uint64_t round = machine().round;
  wait_until("its next turn", [round] { return machine().round != round; });
}

inline void later(std::function<void()> action) { machine().events.push_back(std::move(action)); }

// All lanes of `mask` meet here, each with its own slot of inputs and outputs. The last to arrive
// runs finish(Slot* lanes[32]) (null for lanes outside the mask), which fills the outputs.
template <class Slot, class Finish>
void collective(const char* name, Slot& slot, const Finish& finish, uint32_t mask = 0xffffffffu) {
  Thread& t = thread();
  const uint32_t bit = 1u << t.lane;
  if (!(mask & bit)) fail("%s: lane %d is not in the mask %08x it gives", name, t.lane, mask);
  if (mask & ~t.warp->live) {
    fail("%s: mask %08x names lanes that are not there or have exited (live %08x)", name, mask,
         t.warp->live);
  }
  auto& meetings = t.warp->meetings;
  auto meeting = std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& m) {
    return m.mask == mask && !(m.arrived & bit) && strcmp(m.name, name) == 0;
  });
  if (meeting == meetings.end()) {
    meetings.push_back({name, mask, 0, {}});
    meeting = meetings.end() - 1;
  }
  meeting->arrived |= bit;
  meeting->slots[t.lane] = &slot;
  if (meeting->arrived != mask) {
    t.what = name;
    t.state = Thread::kParked;
    return give_way();
  }
  Slot* slots[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    slots[i] = static_cast<Slot*>(mask >> i & 1 ? meeting->slots[i] : nullptr);
  }
  meetings.erase(meeting);
  finish(slots);
  for (int i = 0; i < kLanes; ++i) {
    if (slots[i] && i != t.lane) t.warp->lanes[i]->state = Thread::kReady;
  }
}

// ---- barriers of a CTA --------------------------------------------------------------------------

inline void check_barrier(NamedBarrier& barrier) {
  if (barrier.expected > 0 && barrier.arrived >= barrier.expected) {
    barrier.arrived = 0;
    barrier.expected = 0;
    ++barrier.generation;
  }
}

inline NamedBarrier& arrive_at(int id, int threads) {
  if (id < 0 || id > 15) fail("barrier %d does not exist: there are 0..15", id);
  NamedBarrier& barrier = thread().cta->barriers[id];
  if (barrier.expected && barrier.expected != threads) {
    fail("barrier %d: expected by one thread with %d threads, by another with %d", id,
         barrier.expected, threads);
  }
  barrier.expected = threads;
  ++barrier.arrived;
  return barrier;
}

// bar.sync id, threads: waits for that many threads, the caller among them.
inline void barrier_sync(int id, int threads) {
  NamedBarrier& barrier = arrive_at(id, threads);
  const uint64_t generation = barrier.generation;
  check_barrier(barrier);
  wait_until("a named barrier", [&] { return barrier.generation != generation; });
}

// bar.arrive id, threads: counts the caller and goes on.
inline void barrier_arrive(int id, int threads) { check_barrier(arrive_at(id, threads)); }

// __syncthreads(): all threads of the CTA that have not exited.
inline void sync_threads() { barrier_sync(0, thread().cta->live); }

// ---- memory -------------------------------------------------------------------------------------

inline uint32_t shared_address(const void* pointer) {
  const Cta& cta = *thread().cta;
  const auto offset = static_cast<const uint8_t*>(pointer) - cta.shared;
  if (offset < 0 || offset > static_cast<ptrdiff_t>(cta.shared_bytes)) {
    fail("a pointer that is not in shared memory was used as one");
  }
  return static_cast<uint32_t>(offset);
}

inline uint8_t* shared_pointer_of(Cta& cta, uint32_t address, uint32_t bytes, uint32_t align) {
  if (address % align) fail("shared address %u is not aligned to %u bytes", address, align);
  if (address + static_cast<size_t>(bytes) > cta.shared_bytes) {
    fail("shared address %u + %u bytes is beyond the %zu bytes of the CTA", address, bytes,
         cta.shared_bytes);
  }
  return cta.shared + address;
}
inline uint8_t* shared_pointer(uint32_t address, uint32_t bytes, uint32_t align = 1) {
  return shared_pointer_of(*thread().cta, address, bytes, align);
}

// A `__shared__` array: the same place for every thread of the CTA; `tag` names the declaration.
inline void* static_shared(const void* tag, size_t bytes, size_t align) {
  Cta& cta = *thread().cta;
  for (auto& [known, offset] : cta.static_arrays) {
    if (known == tag) return cta.shared + offset;
  }
  const size_t offset = (cta.static_bytes + align - 1) / align * align;
  if (offset + bytes > cta.dynamic_offset) fail("static shared arrays exceed their 48 KiB");
  cta.static_bytes = offset + bytes;
  cta.static_arrays.emplace_back(tag, offset);
  return cta.shared + offset;
}
inline void* dynamic_shared() { return thread().cta->shared + thread().cta->dynamic_offset; }

// Global memory that kernels may touch. With no range registered nothing is checked.
inline void register_global(const void* pointer, size_t bytes) {
  const auto* begin = static_cast<const uint8_t*>(pointer);
  machine().ranges.push_back({begin, begin + bytes});
}
inline void forget_globals() { machine().ranges.clear(); }

inline void check_global(const void* pointer, size_t bytes, const char* what) {
  const auto* p = static_cast<const uint8_t*>(pointer);
  const auto& ranges = machine().ranges;
  if (ranges.empty() || bytes == 0) return;
  for (const Range& range : ranges) {
    if (p >= range.begin && p + bytes <= range.end) return;
  }
  fail("%s: %zu bytes of global memory at %p are outside every array", what, bytes, pointer);
}

}  // namespace cuda_host

#include "scheduler.h"
