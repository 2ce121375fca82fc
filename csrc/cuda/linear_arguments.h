// What the ops of packed 2:4 products check and prepare alike: nm_gemm_sm80, nm_gemm_sm90 and
// nm_skinny share their arguments. Host code, not for the emulator.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>

#include "../common/nm_fragments.h"
#include "../common/view.h"
#include "epilogue.h"

namespace sparse_cocktail {

// Checked arguments, the output, and what the kernels need to know of the card.
struct LinearArguments {
  const char* op;
  Tensor x, y;  // x may be a copy that is aligned to 16 bytes
  const uint16_t* packed;
  const uint32_t* meta;
  int64_t rows, in, out;
  bool is_bfloat16;
  Epilogue epilogue;
  void* stream = nullptr;
  int major = 0, multiprocessors = 0, shared_limit = 0;

  const uint16_t* x_data() const { return static_cast<const uint16_t*>(x.const_data_ptr()); }
  uint16_t* y_data() { return static_cast<uint16_t*>(y.mutable_data_ptr()); }
  bool empty() const { return rows == 0 || out == 0; }
};

inline const char* name_of(ScalarType dtype) { return torch::headeronly::toString(dtype); }

inline int device_attribute(const char* op, cudaDeviceAttr attribute, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, device);
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA device ", device, " does not answer (",
                  cudaGetErrorString(error), "); look at it with nvidia-smi");
  return value;
}

// An operand must lie on x's device and be contiguous, as kernels address it flat.
inline void check_operand(const char* op, const char* name, const Tensor& operand,
                          const Tensor& x) {
  STD_TORCH_CHECK(operand.is_cuda() && operand.get_device_index() == x.get_device_index(), op, ": ",
                  name, " is not on the device of x, cuda:", x.get_device_index(),
                  "; move it there");
  STD_TORCH_CHECK(operand.is_contiguous(), op, ": ", name, " has strides ",
                  to_string(operand.strides()), ", but it must be contiguous; call .contiguous()");
}

// Kernels read packed weights 16 bytes at a time, and a view may start anywhere.
inline void check_start(const char* op, const char* name, const Tensor& operand) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(operand.const_data_ptr()) % 16 == 0, op, ": ", name,
                  " starts at an address that is no multiple of 16 bytes; call .clone()");
}

inline LinearArguments check_linear_arguments(const char* op, const Tensor& x,
                                              const Tensor& packed, const Tensor& meta,
                                              int64_t out, const std::optional<Tensor>& bias,
                                              int64_t activation) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
                  ": x has dtype ", name_of(dtype),
                  ", but sparse tensor cores take bfloat16 or float16; cast it");
  STD_TORCH_CHECK(x.dim() == 2, op, ": x has shape ", to_string(x.sizes()),
                  ", but it is (rows, in); flatten its leading dimensions");
  check_operand(op, "x", x, x);
  check_operand(op, "packed", packed, x);
  check_operand(op, "meta", meta, x);
  const int64_t rows = x.size(0), in = x.size(1);
  STD_TORCH_CHECK(in % 8 == 0, op, ": x has in=", in,
                  ", which is not a multiple of 8, and rows are read 16 bytes at a time; pad the "
                  "layer or leave it dense");
  constexpr int64_t kMostColumns = int64_t{1} << 28;
  STD_TORCH_CHECK(in < kMostColumns && rows <= std::numeric_limits<int32_t>::max() &&
                      out <= std::numeric_limits<int32_t>::max() && out >= 0,
                  op, ": x has shape ", to_string(x.sizes()), " and out=", out,
                  ", but in stays below 2^28, rows and out below 2^31; split the product");
  STD_TORCH_CHECK(packed.scalar_type() == dtype, op, ": packed has dtype ",
                  name_of(packed.scalar_type()), " and x ", name_of(dtype),
                  ", but they must agree; cast x, or pack the weight in its dtype");
  const int64_t row_blocks = row_blocks_of(out), column_blocks = column_blocks_of(in);
  const int64_t packed_shape[] = {row_blocks, column_blocks, kHalves, kLanesOfWarp, kPartsOfLane};
  const Sizes expected(packed_shape, 5), expected_meta(packed_shape, 2);
  STD_TORCH_CHECK(packed.sizes().equals(expected), op, ": packed has shape ",
                  to_string(packed.sizes()), ", but a weight of (", out, ", ", in, ") packs to ",
                  to_string(expected), "; make it with nm_pack or nm_pack_weight");
  STD_TORCH_CHECK(meta.scalar_type() == ScalarType::Int && meta.dim() == 3 &&
                      meta.size(0) == row_blocks && meta.size(1) == column_blocks &&
                      meta.size(2) == kLanesOfWarp,
                  op, ": meta has dtype ", name_of(meta.scalar_type()), " and shape ",
                  to_string(meta.sizes()), ", but a weight of (", out, ", ", in,
                  ") has int32 metadata (", row_blocks, ", ", column_blocks,
                  ", 32); take it from the same nm_pack");
  check_start(op, "packed", packed);
  check_start(op, "meta", meta);
  STD_TORCH_CHECK(activation >= kNoActivation && activation <= kGelu, op, ": activation is ",
                  activation, ", but it is 0 (none), 1 (relu) or 2 (gelu)");
  Epilogue epilogue{nullptr, 0, static_cast<int>(activation)};
  if (bias) {
    check_operand(op, "bias", *bias, x);
    STD_TORCH_CHECK(bias->scalar_type() == dtype || bias->scalar_type() == ScalarType::Float, op,
                    ": bias has dtype ", name_of(bias->scalar_type()),
                    ", but it has that of x, ", name_of(dtype), ", or float32; cast it");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out, op, ": bias has shape ",
                    to_string(bias->sizes()), ", but it is (out,) with out=", out);
    epilogue.bias = bias->const_data_ptr();
    epilogue.bias_is_float32 = bias->scalar_type() == ScalarType::Float;
  }
  const int device = x.get_device_index();
  LinearArguments a{op,
                    x,
                    torch::stable::new_empty(x, {rows, out}),
                    static_cast<const uint16_t*>(packed.const_data_ptr()),
                    static_cast<const uint32_t*>(meta.const_data_ptr()),
                    rows,
                    in,
                    out,
                    dtype == ScalarType::BFloat16,
                    epilogue};
  // A view into a larger tensor may start anywhere; copies of 16 bytes may not.
  if (reinterpret_cast<uintptr_t>(a.x_data()) % 16) a.x = torch::stable::clone(x);
  a.major = device_attribute(op, cudaDevAttrComputeCapabilityMajor, device);
  a.multiprocessors = device_attribute(op, cudaDevAttrMultiProcessorCount, device);
  a.shared_limit = device_attribute(op, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  STD_TORCH_CHECK(a.major >= 8, op, ": cuda:", device, " has compute capability ", a.major,
                  ".x, but sparse tensor cores need 8.0 or later; use nm_linear, which runs "
                  "everywhere");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &a.stream));
  return a;
}

inline void check_launched(const LinearArguments& a, const char* error) {
  STD_TORCH_CHECK(error == nullptr, a.op, ": the kernel did not start on x ",
                  to_string(a.x.sizes()), " and out=", a.out, ": ", error);
}

}  // namespace sparse_cocktail
