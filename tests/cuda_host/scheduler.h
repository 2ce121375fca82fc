// launch(): runs a grid cluster by cluster; the fibers of a cluster's CTAs take turns.
#pragma once

#include "core.h"

namespace cuda_host {

struct Shape {
  Dim3 grid, block;
  size_t dynamic_shared = 0;
  int cluster = 1;  // CTAs along x that are resident together
};

inline void run_body() {
  (*machine().body)();
  Thread& t = thread();
  t.state = Thread::kDone;
  t.warp->live &= ~(1u << t.lane);
  Cta& cta = *t.cta;
  --cta.live;
  // Threads that have exited no longer hold up __syncthreads().
  NamedBarrier& all = cta.barriers[0];
  if (all.expected > cta.live) all.expected = cta.live, check_barrier(all);
  give_way();
  abort();  // never resumed
}

inline void start_cta(Cta& cta, const Shape& shape, size_t& next_thread) {
  Machine& m = machine();
  // Static arrays below 48 KiB; 1024-byte alignment, as the swizzles of tensor maps want it.
  constexpr size_t kStatic = 48 * 1024, kAlign = 1024;
  cta.storage.assign(kStatic + shape.dynamic_shared + kAlign, kPoison);
  const auto base = reinterpret_cast<uintptr_t>(cta.storage.data());
  cta.shared = cta.storage.data() + ((base + kAlign - 1) / kAlign * kAlign - base);
  cta.dynamic_offset = kStatic;
  cta.shared_bytes = kStatic + shape.dynamic_shared;
  cta.live = static_cast<int>(shape.block.count());
  cta.warps.resize((cta.live + kLanes - 1) / kLanes);
  for (int i = 0; i < cta.live; ++i) {
    if (next_thread == m.pool.size()) m.pool.push_back(std::make_unique<Thread>());
    Thread& t = *m.pool[next_thread++];
    const Dim3 b = shape.block;
    t.index = Dim3(i % b.x, i / b.x % b.y, i / (b.x * b.y));
    t.linear = i, t.lane = i % kLanes;
    t.warp = &cta.warps[i / kLanes], t.cta = &cta;
    t.warp->lanes[t.lane] = &t;
    t.warp->live |= 1u << t.lane;
    t.state = Thread::kReady;
    t.open_copies.clear(), t.copy_groups.clear();
    start_fiber(t.fiber, run_body);
    cta.threads.push_back(&t);
  }
}

[[noreturn]] inline void report_deadlock(const std::vector<Thread*>& threads) {
  std::vector<std::pair<std::string, int>> reasons;  // what -> how many wait for it
  for (const Thread* t : threads) {
    if (t->state == Thread::kDone) continue;
    const std::string what =
        "warp " + std::to_string(t->linear / kLanes) + " of rank " +
        std::to_string(t->cta->rank_in_cluster) + " at " + t->what;
    auto known = std::find_if(reasons.begin(), reasons.end(),
                              [&](const auto& reason) { return reason.first == what; });
    if (known == reasons.end()) reasons.emplace_back(what, 1);
    else ++known->second;
  }
  const Dim3 at = threads[0]->cta->index;
  std::string text = "deadlock in block (" + std::to_string(at.x) + ", " + std::to_string(at.y) +
                     ", " + std::to_string(at.z) + "):";
  for (const auto& [what, count] : reasons) text += "\n  " + std::to_string(count) + " of " + what;
  throw Failure(text);
}

template <class T>
void arrange(std::vector<T>& items, Machine& m) {
  if (m.options.order < 2) return;
  for (size_t i = items.size(); i > 1; --i) {
    std::swap(items[i - 1], items[(m.random() >> 8) % i]);
  }
}

// Lets one fiber run until it waits. False where it still waits.
inline bool step(Machine& m, Thread& t) {
  if (t.state == Thread::kPolling && t.poll(t.poll_argument)) t.state = Thread::kReady;
  if (t.state != Thread::kReady) return false;
  m.running = &t;
  switch_fiber(m.scheduler, t.fiber);
  m.running = nullptr;
  if (!m.failure.empty()) throw Failure(m.failure);
  if (t.fiber.overflowed()) throw Failure("a kernel needs more stack than kStackBytes");
  return true;
}

// One turn for everyone. In order and backwards, a warp runs on until nothing but another warp can
// help it: the largest lead that warps can have over each other. Shuffled, they keep in step.
inline bool one_round(Machine& m, std::vector<Thread*>& threads) {
  bool moved = false;
  ++m.round;
  if (m.options.order >= 2) {
    arrange(threads, m);
    for (Thread* t : threads) moved |= step(m, *t);
    return moved;
  }
  for (size_t first = 0, next; first < threads.size(); first = next) {
    next = first + 1;
    while (next < threads.size() && threads[next]->warp == threads[first]->warp) ++next;
    for (bool again = true; again;) {
      again = false;
      for (size_t i = first; i < next; ++i) again |= step(m, *threads[i]);
      moved |= again;
    }
  }
  return moved;
}

// Runs the fibers of one cluster to their end.
inline void run_cluster(Machine& m, std::vector<Thread*> threads) {
  if (m.options.order == 1) std::reverse(threads.begin(), threads.end());
  const auto done = [](const Thread* t) { return t->state == Thread::kDone; };
  while (!std::all_of(threads.begin(), threads.end(), done)) {
    bool moved = one_round(m, threads);
    // Asynchronous engines: late when in order, as early as anything when backwards.
    const size_t ready = moved && m.options.order != 1 ? m.events.size() / 2 : m.events.size();
    for (size_t i = 0; i < ready; ++i) {
      auto action = std::move(m.events.front());
      m.events.pop_front();
      action();
      moved = true;
    }
    if (!moved) report_deadlock(threads);
  }
  while (!m.events.empty()) {  // the grid ends when its copies have landed
    auto action = std::move(m.events.front());
    m.events.pop_front();
    action();
  }
}

// kernel<<<grid, block, dynamic_shared>>>: `body` calls the kernel once per thread.
inline void launch(const Shape& shape, const std::function<void()>& body) {
  Machine& m = machine();
  m.grid = shape.grid, m.block = shape.block, m.body = &body;
  m.failure.clear(), m.events.clear();
  m.random_state = m.options.order;
  if (shape.block.count() == 0 || shape.block.count() > 1024 || shape.grid.count() == 0) {
    fail("launch: %u blocks of %u threads cannot be launched", shape.grid.count(),
         shape.block.count());
  }
  if (shape.dynamic_shared > m.options.shared_limit) {
    fail("launch: %zu bytes of shared memory exceed the %zu of this card", shape.dynamic_shared,
         m.options.shared_limit);
  }
  if (shape.grid.x % shape.cluster) fail("launch: grid.x is not a multiple of the cluster");
  std::vector<unsigned> clusters(shape.grid.count() / shape.cluster);
  for (size_t i = 0; i < clusters.size(); ++i) clusters[i] = static_cast<unsigned>(i);
  if (m.options.order == 1) std::reverse(clusters.begin(), clusters.end());
  arrange(clusters, m);
  for (const unsigned cluster : clusters) {
    if (m.options.only_block >= 0 && cluster != m.options.only_block / shape.cluster) continue;
    std::vector<Cta> ctas(shape.cluster);
    std::vector<Thread*> threads;
    m.cluster.clear();
    size_t next_thread = 0;
    for (int rank = 0; rank < shape.cluster; ++rank) {
      const unsigned i = cluster * shape.cluster + rank;
      Cta& cta = ctas[rank];
      cta.index = Dim3(i % shape.grid.x, i / shape.grid.x % shape.grid.y,
                       i / (shape.grid.x * shape.grid.y));
      cta.rank_in_cluster = rank;
      start_cta(cta, shape, next_thread);
      m.cluster.push_back(&cta);
      threads.insert(threads.end(), cta.threads.begin(), cta.threads.end());
    }
    run_cluster(m, threads);
  }
}

}  // namespace cuda_host
