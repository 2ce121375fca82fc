// The (out, taps, in) view of a weight tensor, and walks over it word by word. Host code only.
//
//   out --> tap --> in:   row = out * taps + tap,   word = row * ceil(in / 32) + in / 32
//
// A contiguous linear weight has in_stride 1; a convolution has in_stride 1 when channels_last and
// in_stride taps when contiguous. Everything works for both; the first is the fast one.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "bits.h"

namespace sparse_cocktail {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;  // == is newer than torch 2.10: equals

// Words that one task should cover at least: 32 K elements outweigh handing a task to a thread.
constexpr int64_t kGrainWords = 1024;

// A weight as (out, taps, in), with one stride per axis: contiguous and channels_last both fit.
struct WeightView {
  int64_t out = 0, taps = 1, in = 0;
  int64_t out_stride = 0, tap_stride = 0, in_stride = 0;

  int64_t rows() const { return out * taps; }
  int64_t row_words() const { return words_of(in); }
  int64_t words() const { return rows() * row_words(); }
  int64_t row_offset(int64_t row) const {
    return row / taps * out_stride + row % taps * tap_stride;
  }
};

inline std::string to_string(Sizes shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

// The only place that reads sizes and strides. `op` and `name` go into the messages.
inline WeightView view_of(const char* op, const char* name, const Tensor& weight) {
  const Sizes size = weight.sizes(), stride = weight.strides();
  STD_TORCH_CHECK(size.size() >= 2, op, ": ", name, " has shape ", to_string(size),
                  ", but a weight has at least 2 dimensions (out, in, *taps); unsqueeze it");
  WeightView view;
  view.out = size[0], view.in = size[1];
  view.out_stride = stride[0], view.in_stride = stride[1];
  const bool empty = weight.numel() == 0;  // strides of an empty tensor mean nothing
  for (size_t d = size.size(); d-- > 2;) {
    if (size[d] == 1) continue;  // nor does the stride of an axis of one element
    if (view.taps == 1) view.tap_stride = stride[d];
    STD_TORCH_CHECK(empty || stride[d] == view.tap_stride * view.taps, op, ": ", name,
                    " has shape ", to_string(size), " and strides ", to_string(stride),
                    ", whose trailing axes do not merge into one; make it contiguous or "
                    "channels_last");
    view.taps *= size[d];
  }
  return view;
}

// Calls fn(word index, offset of the word's first element, elements in the word) for a range of the
// mask's words in memory order. Words, not rows, are the unit of work: any shape splits evenly.
template <class Fn>
inline void for_each_word(const WeightView& view, int64_t begin, int64_t end, const Fn& fn) {
  if (begin >= end) return;
  const int64_t row_words = view.row_words();
  int64_t row = begin / row_words, in_row = begin % row_words;
  for (int64_t word = begin; word < end; ++row, in_row = 0) {
    const int64_t offset = view.row_offset(row);
    for (; in_row < row_words && word < end; ++in_row, ++word) {
      const int64_t first = in_row * kWordBits;
      const int64_t count = std::min<int64_t>(kWordBits, view.in - first);
      fn(word, offset + first * view.in_stride, count);
    }
  }
}

// The same over all words, threaded; fn may write the word it is called for, and nothing shared.
template <class Fn>
inline void parallel_for_each_word(const WeightView& view, const Fn& fn) {
  torch::stable::parallel_for(
      0, view.words(), kGrainWords,
      [&](int64_t begin, int64_t end) { for_each_word(view, begin, end, fn); });
}

// Calls fn(j) for the elements of one word. The usual full word has a constant trip count, which is
// what lets the compiler vectorise fn.
template <class Fn>
inline void for_each_lane(int64_t count, const Fn& fn) {
  if (count == kWordBits) {
    for (int j = 0; j < kWordBits; ++j) fn(j);
  } else {
    for (int j = 0; j < count; ++j) fn(j);
  }
}

// lanes[j] = convert(source[j * stride]) for the elements of one word.
template <class Lane, class Source, class Fn>
inline void load_lanes(Lane* lanes, const Source* source, int64_t stride, int64_t count,
                       const Fn& convert) {
  if (stride == 1) {
    for_each_lane(count, [&](int j) { lanes[j] = convert(source[j]); });
  } else {
    for_each_lane(count, [&](int j) { lanes[j] = convert(source[j * stride]); });
  }
}

// Uninitialised: whoever calls this writes every word, padding bits included.
inline Tensor empty_bits(const WeightView& view) {
  return torch::stable::empty({view.out, view.taps, view.row_words()}, ScalarType::Int);
}

// Bits are int32 tensors because torch has few ops on uint32; C++ shifts them as unsigned.
inline uint32_t* mutable_words(const Tensor& bits) {
  return static_cast<uint32_t*>(bits.mutable_data_ptr());
}

// The words of mask bits that belong to a weight of this view.
inline const uint32_t* words_for(const char* op, const char* name, const Tensor& bits,
                                 const WeightView& view) {
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Int, op, ": ", name, " has dtype ",
                  torch::headeronly::toString(bits.scalar_type()),
                  ", but mask bits are int32; make them with pack_mask");
  const std::vector<int64_t> shape{view.out, view.taps, view.row_words()};
  STD_TORCH_CHECK(bits.sizes().equals(Sizes(shape)) && bits.is_contiguous(), op, ": ", name,
                  " has shape ", to_string(bits.sizes()), " and strides ",
                  to_string(bits.strides()), ", but the mask bits of this weight are contiguous (",
                  "out, taps, ceil(in / 32)) = ", to_string(Sizes(shape)),
                  "; make them with pack_mask from a mask of the weight's shape");
  return static_cast<const uint32_t*>(bits.const_data_ptr());
}

// Calls fn(Format) for the weight's dtype. Kernels see formats, never C++ floating-point types:
// keys and masked copies are integer work, out of reach of rounding and flush-to-zero modes.
template <class Fn>
inline auto dispatch_format(const char* op, const char* name, const Tensor& weight, const Fn& fn) {
  const ScalarType dtype = weight.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half || dtype == ScalarType::Double,
                  op, ": ", name, " has dtype ", torch::headeronly::toString(dtype),
                  ", but weights are float32, bfloat16, float16 or float64; cast it");
  switch (dtype) {
    case ScalarType::Double: return fn(Float64{});
    case ScalarType::Half: return fn(Float16{});
    case ScalarType::BFloat16: return fn(BFloat16{});
    default: return fn(Float32{});
  }
}

}  // namespace sparse_cocktail
