// Few rows of x times a compressed N:M weight: what is read is the compressed weight, whose values
// are spread to their places in registers. (Many rows are a matter of arithmetic: ops/nm.py hands
// them to the dense product.)
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <optional>

#include "nm_groups.h"
#include "nm_kernels.h"

namespace sparse_cocktail {
namespace {

// Elements of the weight that outweigh handing a task to a thread.
constexpr int64_t kGrain = kGrainWords * kWordBits;

struct Linear {
  Ratio ratio;
  int64_t inputs, outputs, rows;
  const void* x;  // rows of whole words, zero past the inputs
  const uint32_t* bits;
  const float* bias;  // or null
  float* y;

  int64_t row_words() const { return words_of(inputs); }
};

// The streams of some outputs: values as they are, or a copy without padding, or one that has room
// to read past its end.
template <class Raw>
class Streams {
 public:
  Streams(const Linear& linear, const Raw* values)
      : linear_(linear), values_(values),
        row_values_(linear.inputs / linear.ratio.m * linear.ratio.n),
        copies_(kOutputsAtOnce * (row_values_ + kStreamSlack)) {}

  int64_t row_values() const { return row_values_; }

  // The stream of an output; `slot` says which of the copies it may take. Null: too many bits.
  const Raw* of(int64_t output, int slot) {
    const uint32_t* const words = linear_.bits + output * linear_.row_words();
    const Raw* const values = values_ + output * row_values_;
    Raw* const copy = copies_.data() + slot * (row_values_ + kStreamSlack);
    switch (groups_of(words, linear_.inputs, linear_.ratio)) {
      case Groups::kTooMany: return nullptr;
      case Groups::kPadded:
        drop_padding(words, linear_.inputs / linear_.ratio.m, linear_.ratio, values, copy);
        return copy;
      case Groups::kFull: break;
    }
    if ((linear_.outputs - output - 1) * row_values_ >= kStreamSlack) return values;
    memcpy(copy, values, row_values_ * sizeof(Raw));
    return copy;
  }

 private:
  const Linear& linear_;
  const Raw* values_;
  int64_t row_values_;
  std::vector<Raw> copies_;
};

template <class Raw>
void multiply(const char* op, const Linear& linear, void (*product_of)(const NmProduct<Raw>&),
              const Tensor& weight) {
  const auto* const values = static_cast<const Raw*>(weight.const_data_ptr());
  const int64_t row_words = linear.row_words();
  const int64_t blocks = (linear.outputs + kOutputsAtOnce - 1) / kOutputsAtOnce;
  const int64_t block = std::max<int64_t>(1, kOutputsAtOnce * linear.inputs * linear.rows);
  std::atomic<bool> too_many{false};
  const auto some_blocks = [&](int64_t begin, int64_t end) {
    Streams<Raw> streams(linear, values);
    std::vector<float> sums(kOutputsAtOnce * linear.rows);
    NmProduct<Raw> product{};
    product.row_words = row_words, product.rows = linear.rows;
    product.next_values = kOutputsAtOnce * streams.row_values();
    product.x = linear.x, product.x_pitch = row_words * kWordBits;
    product.sums = sums.data(), product.pitch = kOutputsAtOnce;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kOutputsAtOnce;
      const int64_t count = std::min<int64_t>(kOutputsAtOnce, linear.outputs - first);
      for (int o = 0; o < kOutputsAtOnce; ++o) {
        const int64_t output = first + std::min<int64_t>(o, count - 1);  // the last one, again
        product.words[o] = linear.bits + output * row_words;
        product.values[o] = streams.of(output, o);
        if (product.values[o] == nullptr) {
          too_many = true;
          return;
        }
      }
      product_of(product);
      for (int64_t r = 0; r < linear.rows; ++r) {
        for (int64_t o = 0; o < count; ++o) {
          const float start = linear.bias == nullptr ? 0.0f : linear.bias[first + o];
          linear.y[r * linear.outputs + first + o] = sums[r * kOutputsAtOnce + o] + start;
        }
      }
    }
  };
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kGrain / block), some_blocks);
  check_groups(op, too_many, linear.ratio);
}

// Whether products of bf16 with bf16 have instructions of their own.
bool nm_multiplies_bfloat16() { return nm_kernels().multiply_pairs != nullptr; }

// x: (rows, inputs rounded up to whole words), zero past the inputs, in fp32; or in bf16, where
// nm_multiplies_bfloat16 and the values are bf16 too. Gives fp32 sums.
Tensor nm_linear(const Tensor& x, const Tensor& values, const Tensor& bits, int64_t n, int64_t m,
                 std::optional<Tensor> bias) {
  const char* op = "nm_linear";
  Linear linear{};
  linear.ratio = nm_ratio(op, n, m);
  linear.outputs = values.size(0), linear.inputs = values.size(2) / n * m, linear.rows = x.size(0);
  const WeightView view{linear.outputs, 1, linear.inputs, linear.inputs, linear.inputs, 1};
  linear.bits = words_for(op, "bits", bits, view);
  STD_TORCH_CHECK(values.is_contiguous() && values.size(1) == 1 && values.size(2) % n == 0, op,
                  ": values have shape ", to_string(values.sizes()), " and strides ",
                  to_string(values.strides()), ", but contiguous (out, 1, in * n / m) are needed; "
                  "make them with nm_compress");
  const NmKernels& kernels = nm_kernels();
  const ScalarType own = values.scalar_type(), of_x = x.scalar_type();
  const bool pairs = of_x == ScalarType::BFloat16 && own == of_x && kernels.multiply_pairs;
  STD_TORCH_CHECK((of_x == ScalarType::Float || pairs) && x.is_contiguous() && x.dim() == 2 &&
                      x.size(1) == linear.row_words() * kWordBits,
                  op, ": x has dtype ", torch::headeronly::toString(of_x), " and shape ",
                  to_string(x.sizes()), ", but contiguous float32 rows of ",
                  linear.row_words() * kWordBits, " are needed; pad them with zeros");
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == ScalarType::Float && bias->is_contiguous() &&
                            bias->numel() == linear.outputs),
                  op, ": bias is not contiguous float32 of ", linear.outputs,
                  " elements; convert it");
  Tensor y = torch::stable::empty({linear.rows, linear.outputs}, ScalarType::Float);
  linear.x = x.const_data_ptr();
  linear.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  linear.y = static_cast<float*>(y.mutable_data_ptr());
  if (pairs) multiply(op, linear, kernels.multiply_pairs, values);
  else if (own == ScalarType::Float) multiply(op, linear, kernels.multiply_float32, values);
  else if (own == ScalarType::BFloat16) multiply(op, linear, kernels.multiply_bfloat16, values);
  else if (own == ScalarType::Half) multiply(op, linear, kernels.multiply_float16, values);
  else
    STD_TORCH_CHECK(false, op, ": values have dtype ", torch::headeronly::toString(own),
                    ", but float32, bfloat16 or float16 is needed; convert them");
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_cocktail_cpp, m) {
  m.def("nm_linear(Tensor x, Tensor values, Tensor bits, int n, int m, Tensor? bias) -> Tensor");
  m.def("nm_multiplies_bfloat16() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, CPU, m) {
  m.impl("nm_linear", TORCH_BOX(&nm_linear));
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, CompositeExplicitAutograd, m) {
  m.impl("nm_multiplies_bfloat16", TORCH_BOX(&nm_multiplies_bfloat16));
}

}  // namespace sparse_cocktail
