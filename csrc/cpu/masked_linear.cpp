// A linear layer of few rows under a mask. (Many rows are a matter of arithmetic: ops/routes.py has
// W*m made for them, and PyTorch multiply.)
#include <torch/csrc/stable/library.h>

#include <optional>

#include "../common/view.h"
#include "masked_linear.h"

namespace sparse_cocktail {
namespace {

// Multiply-adds that outweigh handing a task to a thread.
constexpr int64_t kGrain = kGrainWords * kWordBits;

constexpr uintptr_t kAlignment = 64;  // bytes of the widest vector

const float* matrix(const char* op, const char* name, const Tensor& tensor, int64_t rows,
                    int64_t columns) {
  const std::vector<int64_t> shape{rows, columns};
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
                      tensor.sizes().equals(Sizes(shape)),
                  op, ": ", name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
                  ", shape ", to_string(tensor.sizes()), " and strides ",
                  to_string(tensor.strides()), ", but contiguous float32 ",
                  to_string(Sizes(shape)), " is needed; convert it");
  return static_cast<const float*>(tensor.const_data_ptr());
}

// What every op begins with: sizes, the weight and its bits.
MaskedLinear layer_of(const char* op, const Tensor& by_row, const Tensor& weight,
                      const Tensor& bits) {
  STD_TORCH_CHECK(by_row.dim() == 2 && weight.dim() == 2, op, ": ", by_row.dim(), " and ",
                  weight.dim(), " dimensions, but matrices are needed; flatten x");
  MaskedLinear p{};
  p.rows = by_row.size(0), p.outputs = weight.size(0), p.inputs = weight.size(1);
  p.weight = matrix(op, "weight", weight, p.outputs, p.inputs);
  p.bits = words_for(op, "bits", bits, {p.outputs, 1, p.inputs, p.inputs, p.inputs, 1});
  return p;
}

void set_result(const char* op, MaskedLinear& p, Tensor& result, int64_t rows, int64_t columns) {
  matrix(op, "result", result, rows, columns);
  p.result = static_cast<float*>(result.mutable_data_ptr());
}

// Runs a kernel over `count` outputs or words of `unit` products a row each, in steps that it takes
// at a time, with so much scratch memory in floats.
void run(const MaskedLinear& p, decltype(MaskedLinearKernels::forward) kernel, int64_t count,
         int64_t step, int64_t unit, int64_t scratch = 0) {
  const int64_t steps = (count + step - 1) / step;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, step * unit * p.rows));
  torch::stable::parallel_for(0, steps, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> room(scratch + kAlignment / sizeof(float));
    const auto start = reinterpret_cast<uintptr_t>(room.data());
    const uintptr_t aligned = (start + kAlignment - 1) / kAlignment * kAlignment;
    kernel(p, begin * step, std::min(end * step, count), reinterpret_cast<float*>(aligned));
  });
}

void masked_linear_into(const Tensor& x, const Tensor& weight, const Tensor& bits,
                        const std::optional<Tensor>& bias, Tensor result) {
  const char* op = "masked_linear";
  MaskedLinear p = layer_of(op, x, weight, bits);
  p.x = matrix(op, "x", x, p.rows, p.inputs);
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == ScalarType::Float && bias->is_contiguous() &&
                            bias->numel() == p.outputs),
                  op, ": bias is not contiguous float32 of ", p.outputs, " elements; convert it");
  p.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  set_result(op, p, result, p.rows, p.outputs);
  run(p, masked_linear_kernels().forward, p.outputs, kOutputStep, p.inputs, p.rows * kRowScratch);
}

void masked_linear_input_grad_into(const Tensor& grad, const Tensor& weight, const Tensor& bits,
                                   Tensor result) {
  const char* op = "masked_linear_input_grad";
  MaskedLinear p = layer_of(op, grad, weight, bits);
  p.grad = matrix(op, "grad", grad, p.rows, p.outputs);
  set_result(op, p, result, p.rows, p.inputs);
  if (p.outputs == 0 || p.rows == 0) {
    torch::stable::zero_(result);
    return;
  }
  run(p, masked_linear_kernels().input_grad, p.row_words(), 1, p.outputs * kWordBits);
}

void masked_linear_weight_grad_into(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                    const Tensor& bits, Tensor result) {
  const char* op = "masked_linear_weight_grad";
  MaskedLinear p = layer_of(op, grad, weight, bits);
  p.grad = matrix(op, "grad", grad, p.rows, p.outputs);
  p.x = matrix(op, "x", x, p.rows, p.inputs);
  set_result(op, p, result, p.outputs, p.inputs);
  if (p.rows == 0) {
    torch::stable::zero_(result);
    return;
  }
  run(p, masked_linear_kernels().weight_grad, p.outputs, kOutputStep, p.inputs);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_cocktail_cpp, m) {
  m.def("masked_linear_into(Tensor x, Tensor weight, Tensor bits, Tensor? bias, "
        "Tensor(a!) result) -> ()");
  m.def("masked_linear_input_grad_into(Tensor grad, Tensor weight, Tensor bits, "
        "Tensor(a!) result) -> ()");
  m.def("masked_linear_weight_grad_into(Tensor grad, Tensor x, Tensor weight, Tensor bits, "
        "Tensor(a!) result) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, CPU, m) {
  m.impl("masked_linear_into", TORCH_BOX(&masked_linear_into));
  m.impl("masked_linear_input_grad_into", TORCH_BOX(&masked_linear_input_grad_into));
  m.impl("masked_linear_weight_grad_into", TORCH_BOX(&masked_linear_weight_grad_into));
}

}  // namespace sparse_cocktail
