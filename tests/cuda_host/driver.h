// What every driver library exports beside its kernels: errors, options, counters, known memory.
#pragma once

#include "cuda_host.h"

namespace cuda_host {

inline std::string& last_failure() {
  static std::string text;
  return text;
}

// 0, or 1 with the reason in last_error().
template <class Body>
int guarded(const Body& body) {
  try {
    const char* error = body();
    last_failure() = error ? error : "";
  } catch (const Failure& failure) {
    last_failure() = failure.what();
  }
  return last_failure().empty() ? 0 : 1;
}

}  // namespace cuda_host

extern "C" {
inline __attribute__((used)) const char* last_error() { return cuda_host::last_failure().c_str(); }
inline __attribute__((used)) void set_options(uint32_t order, int64_t shared_limit) {
  cuda_host::options().order = order;
  cuda_host::options().shared_limit =
      shared_limit > 0 ? static_cast<size_t>(shared_limit) : cuda_host::kSharedLimit;
}
inline __attribute__((used)) void run_only(int64_t block) {  // -1: the whole grid
  cuda_host::options().only_block = block;
}
inline __attribute__((used)) void register_array(const void* pointer, int64_t bytes) {
  cuda_host::register_global(pointer, static_cast<size_t>(bytes));
}
// Forgets arrays and counts.
inline __attribute__((used)) void reset() {
  cuda_host::forget_globals();
  cuda_host::statistics() = {};
}
// sparse MMAs, 8x8 matrices loaded, bank conflicts among them, asynchronous copies, bytes they read
inline __attribute__((used)) void read_statistics(int64_t* counts) {
  const auto& s = cuda_host::statistics();
  counts[0] = s.sparse_mmas, counts[1] = s.matrix_loads;
  counts[2] = s.matrix_conflicts, counts[3] = s.async_copies, counts[4] = s.async_bytes;
}
}
