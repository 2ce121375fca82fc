// The one place where kernels are launched and shared memory is declared. With SC_EMULATE the same
// source is compiled by a host compiler and runs on tests/cuda_host (threads of a CTA are fibers).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#ifdef SC_EMULATE
#include "cuda_host.h"
#else
#include <cuda_runtime.h>
#endif

// SC_SHARED(float, sums, 32): a static __shared__ array, aligned to 16 bytes.
// SC_DYNAMIC_SHARED(bytes): the dynamic one, as unsigned char*, aligned to 1024 bytes.
#ifdef SC_EMULATE
#define SC_SHARED(type, name, count)      \
  static const char name##_tag = 0;       \
  type* const name = static_cast<type*>(  \
      cuda_host::static_shared(&name##_tag, sizeof(type) * (count), 16))
#define SC_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(cuda_host::dynamic_shared())
#else
#define SC_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define SC_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

namespace sparse_cocktail {

struct LaunchShape {
  dim3 grid;
  int threads;
  int shared_bytes = 0;  // dynamic
  int cluster = 1;       // CTAs along x; more than 1 needs sm_90
};

#ifdef SC_EMULATE

// Null, as there is no error to report: a failure inside the emulator is thrown.
template <auto kernel, class... Arguments>
const char* launch(const LaunchShape& shape, void* /*stream*/, Arguments... arguments) {
  cuda_host::launch({shape.grid, dim3(static_cast<unsigned>(shape.threads)),
                     static_cast<size_t>(shape.shared_bytes), shape.cluster},
                    [&] { kernel(arguments...); });
  return nullptr;
}

#else

// A kernel has to ask for more than 48 KiB, once per device: asking takes a microsecond.
template <auto kernel>
cudaError_t allow_shared(int bytes) {
  constexpr int kDefault = 48 * 1024, kDevices = 64;
  static std::atomic<int> allowed[kDevices];
  if (bytes <= kDefault) return cudaSuccess;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const bool known = device < kDevices;
  if (known && allowed[device].load(std::memory_order_relaxed) >= bytes) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (known && error == cudaSuccess) allowed[device].store(bytes, std::memory_order_relaxed);
  return error;
}

// Null, or what CUDA says went wrong. Asynchronous, no allocation, so a graph can capture it.
template <auto kernel, class... Arguments>
const char* launch(const LaunchShape& shape, void* stream, Arguments... arguments) {
  cudaError_t error = allow_shared<kernel>(shape.shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // it is reported here, and is not the next kernel's
  return cudaGetErrorString(error);
}

#endif

}  // namespace sparse_cocktail
