// Which instruction set the inner loops use: asked once, and forced to a lower one by tests.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>

#include "simd.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sparse_cocktail {
namespace {

std::atomic<int> forced{-1};

Level detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("popcnt") && f16c;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Level::kAvx512;
  if (avx2) return Level::kAvx2;
#endif
  return Level::kPortable;
}

int64_t best_cpu_level() { return static_cast<int64_t>(best_level()); }
int64_t cpu_level() { return static_cast<int64_t>(current_level()); }

void force_cpu_level(int64_t level) {
  STD_TORCH_CHECK(-1 <= level && level <= best_cpu_level(), "force_cpu_level: level is ", level,
                  ", but this machine has levels 0 to ", best_cpu_level(),
                  " (-1: the best); pick one of them");
  forced = static_cast<int>(level);
}

}  // namespace

Level best_level() {
  static const Level level = detect();
  return level;
}

Level current_level() {
  const int level = forced;
  return level < 0 ? best_level() : static_cast<Level>(level);
}

const KernelTable& kernels() {
#if defined(__x86_64__)
  switch (current_level()) {
    case Level::kAvx512: return avx512_kernels();
    case Level::kAvx2: return avx2_kernels();
    case Level::kPortable: break;
  }
#endif
  return portable_kernels();
}

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_cocktail_cpp, m) {
  m.def("best_cpu_level() -> int");
  m.def("cpu_level() -> int");
  m.def("force_cpu_level(int level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, CompositeExplicitAutograd, m) {
  m.impl("best_cpu_level", TORCH_BOX(&best_cpu_level));
  m.impl("cpu_level", TORCH_BOX(&cpu_level));
  m.impl("force_cpu_level", TORCH_BOX(&force_cpu_level));
}

}  // namespace sparse_cocktail
