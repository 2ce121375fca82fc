// N:M weights on the CPU: prune and compress in one read, and back.
//
// Chunks of a few KB go through the L1 cache in steps:
//
//     weights --> bits --> stream --> values          bits and stream: vectors of the level
//     values --> stream --> weights                   padded groups and casts: rare, on the way
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <optional>

#include "nm.h"
#include "nm_groups.h"
#include "nm_kernels.h"
#include "nm_memory.h"

namespace sparse_cocktail {
namespace {

// 64 words are 8 KB of fp32: with their stream and the values they fill half of an L1 cache.
constexpr int64_t kChunkWords = 64;
constexpr int64_t kMostChunk = (kChunkWords + kWordBits) * kWordBits;  // elements

// A weight as rows whose words and groups begin together, cut into chunks where words and groups
// end together. Rows that follow each other without padding bits are one.
struct Chunks {
  WeightView view;
  int64_t rows, length, words, chunk, per_row;

  Chunks(const WeightView& weight, int m) : view(weight) {
    const bool dense = view.in_stride == 1 && view.in % kWordBits == 0 &&
                       (view.taps == 1 || view.tap_stride == view.in) &&
                       (view.out == 1 || view.out_stride == view.taps * view.in);
    rows = dense ? 1 : view.rows();
    length = dense ? view.rows() * view.in : view.in;
    words = words_of(length);
    const int64_t unit = kWordBits % m == 0 ? 1 : m;  // words
    chunk = (kChunkWords + unit - 1) / unit * unit * kWordBits;
    per_row = (length + chunk - 1) / chunk;
  }

  // Calls fn(offset of the first element, its place in its row, row, elements) for all chunks.
  template <class Fn>
  void parallel(const Fn& fn) const {
    const int64_t elements = std::max<int64_t>(1, std::min(chunk, length));
    const int64_t grain = std::max<int64_t>(1, kGrainWords * kWordBits / elements);
    torch::stable::parallel_for(0, rows * per_row, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / per_row, first = i % per_row * chunk;
        const int64_t offset = rows == 1 ? 0 : view.row_offset(row);
        fn(offset + first * view.in_stride, first, row, std::min(chunk, length - first));
      }
      finish_streaming();
    });
  }
};

// ---- compress -----------------------------------------------------------------------------------

template <class F>
void fresh_words(const typename F::Raw* source, int64_t count, Ratio ratio, uint32_t* words) {
  if (has_fast_groups(ratio)) {
    Run run{};
    run.data = source, run.stride = 1, run.count = count, run.fresh = words;
    return kernels().of(F{}).nm(run, ratio);
  }
  for (int64_t groups = count / ratio.m; groups > 0; groups -= kLanes) {
    nm_block<F>(source, 1, std::min<int64_t>(groups, kLanes), ratio.n, ratio.m, words);
    source += kLanes * ratio.m, words += ratio.m;
  }
}

// Values in another format: the casts of masked weights, with nothing masked.
template <class From, class To>
void cast(const typename From::Raw* source, int64_t count, typename To::Raw* target) {
  static const auto ones = [] {
    std::array<uint32_t, kMostChunk / kWordBits> words;
    words.fill(~uint32_t{0});
    return words;
  }();
  const Casts& casts = kernels().casts;
  (std::is_same_v<To, Float16> ? casts.to_float16 : casts.to_bfloat16)(ones.data(), source, target,
                                                                       count);
}

template <class From, class To>
void compress(const char* op, const Tensor& weight, Ratio ratio, const uint32_t* given,
              uint32_t* bits, typename To::Raw* values, const WeightView& view) {
  using Raw = typename From::Raw;
  using Target = typename To::Raw;
  const auto* data = static_cast<const Raw*>(weight.const_data_ptr());
  const Chunks chunks(view, ratio.m);
  const int64_t row_values = chunks.length / ratio.m * ratio.n;
  const bool streams = worth_streaming(chunks.rows * row_values * sizeof(Target));
  const auto& to_stream = nm_kernels().compress(Raw{});
  std::atomic<bool> too_many{false};
  chunks.parallel([&](int64_t offset, int64_t first, int64_t row, int64_t count) {
    alignas(64) Raw gathered[kMostChunk], stream[kMostChunk + kStreamSlack], padded[kMostChunk];
    alignas(64) Target converted[kMostChunk];
    const int64_t word = row * chunks.words + first / kWordBits;
    uint32_t* const words = bits + word;
    const Raw* source = data + offset;
    if (view.in_stride != 1 || count % kWordBits != 0) {  // whole words are read
      for (int64_t j = 0; j < count; ++j) gathered[j] = source[j * view.in_stride];
      for (int64_t j = count; j < words_of(count) * kWordBits; ++j) gathered[j] = 0;
      source = gathered;
    }
    Groups groups = Groups::kFull;
    if (given == nullptr) {
      fresh_words<From>(source, count, ratio, words);
    } else {
      memcpy(words, given + word, words_of(count) * sizeof *words);
      groups = groups_of(words, count, ratio);
      if (groups == Groups::kTooMany) {
        too_many = true;
        return;
      }
    }
    to_stream(words, words_of(count), source, stream);
    const Raw* kept = stream;
    if (groups == Groups::kPadded) {
      add_padding(words, count / ratio.m, ratio, stream, padded);
      kept = padded;
    }
    const int64_t some = count / ratio.m * ratio.n;
    Target* const target = values + row * row_values + first / ratio.m * ratio.n;
    if constexpr (std::is_same_v<From, To>) {
      put(kept, some, target, streams);
    } else {
      cast<From, To>(kept, some, converted);
      put(converted, some, target, streams);
    }
  });
  check_groups(op, too_many, ratio);
}

std::tuple<Tensor, Tensor> nm_compress(const Tensor& weight, int64_t n, int64_t m,
                                       std::optional<Tensor> given, ScalarType dtype) {
  const char* op = "nm_compress";
  const Ratio ratio = nm_ratio(op, n, m);
  const WeightView view = view_of(op, "weight", weight);
  STD_TORCH_CHECK(view.in % m == 0, op, ": weight has in=", view.in,
                  ", which is not a multiple of m=", m, "; pad the layer or leave it dense");
  const uint32_t* words = given ? words_for(op, "bits", *given, view) : nullptr;
  Tensor bits = empty_bits(view);
  Tensor values = torch::stable::empty({view.out, view.taps, view.in / m * n}, dtype);
  use_huge_pages(values);
  uint32_t* const target = mutable_words(bits);
  const auto run = [&](auto from, auto to) {
    using To = decltype(to);
    auto* into = static_cast<typename To::Raw*>(values.mutable_data_ptr());
    compress<decltype(from), To>(op, weight, ratio, words, target, into, view);
  };
  const ScalarType own = weight.scalar_type();
  if (own == ScalarType::Float && dtype == ScalarType::BFloat16) run(Float32{}, BFloat16{});
  else if (own == ScalarType::Float && dtype == ScalarType::Half) run(Float32{}, Float16{});
  else if (own == ScalarType::Float && dtype == own) run(Float32{}, Float32{});
  else if (own == ScalarType::BFloat16 && dtype == own) run(BFloat16{}, BFloat16{});
  else if (own == ScalarType::Half && dtype == own) run(Float16{}, Float16{});
  else
    STD_TORCH_CHECK(false, op, ": weights of dtype ", torch::headeronly::toString(own),
                    " cannot become values of dtype ", torch::headeronly::toString(dtype),
                    " on the way; compress to the weight's dtype, or float32 to 16 bits");
  return {values, bits};
}

// ---- decompress ---------------------------------------------------------------------------------

template <class Raw>
void decompress(const char* op, const Tensor& values, Ratio ratio, const uint32_t* bits,
                const Tensor& weight, const WeightView& view) {
  const auto* data = static_cast<const Raw*>(values.const_data_ptr());
  auto* const result = static_cast<Raw*>(weight.mutable_data_ptr());
  const Chunks chunks(view, ratio.m);
  const int64_t row_values = chunks.length / ratio.m * ratio.n, all = values.numel();
  const bool streams = worth_streaming(weight.numel() * sizeof(Raw));
  const auto& to_words = nm_kernels().expand(Raw{});
  std::atomic<bool> too_many{false};
  chunks.parallel([&](int64_t offset, int64_t first, int64_t row, int64_t count) {
    alignas(64) Raw stream[kMostChunk + kStreamSlack], dense[kMostChunk];
    const uint32_t* const words = bits + row * chunks.words + first / kWordBits;
    const int64_t begin = row * row_values + first / ratio.m * ratio.n;
    const int64_t some = count / ratio.m * ratio.n;
    const Raw* source = data + begin;
    switch (groups_of(words, count, ratio)) {
      case Groups::kTooMany:
        too_many = true;
        return;
      case Groups::kPadded:
        drop_padding(words, count / ratio.m, ratio, source, stream);
        source = stream;
        break;
      case Groups::kFull:
        if (all - begin - some >= kStreamSlack) break;
        memcpy(stream, source, some * sizeof(Raw));  // nothing may be read past the last value
        source = stream;
    }
    Raw* const target = result + offset;
    const bool direct = !streams && count % kWordBits == 0;
    to_words(words, words_of(count), source, direct ? target : dense);
    if (!direct) put(dense, count, target, streams);
  });
  check_groups(op, too_many, ratio);
}

// Into a weight whose view is memory order.
void nm_decompress_into(const Tensor& values, const Tensor& bits, int64_t n, int64_t m,
                        const Tensor& weight) {
  const char* op = "nm_decompress";
  const Ratio ratio = nm_ratio(op, n, m);
  const WeightView view = view_of(op, "weight", weight);
  const uint32_t* words = words_for(op, "bits", bits, view);
  STD_TORCH_CHECK(view.in % m == 0 && values.is_contiguous() &&
                      values.numel() == view.rows() * (view.in / m * n) &&
                      values.scalar_type() == weight.scalar_type(),
                  op, ": values of shape ", to_string(values.sizes()), " are not the contiguous ",
                  n, ":", m, " values of a weight of shape ", to_string(weight.sizes()),
                  " and dtype ", torch::headeronly::toString(weight.scalar_type()),
                  "; make them with nm_compress");
  STD_TORCH_CHECK(weight.numel() == 0 || view.in_stride == 1, op, ": weight has strides ",
                  to_string(weight.strides()), ", but its inputs must be neighbours; make it "
                  "contiguous, or channels_last where it has a kernel");
  use_huge_pages(weight);
  switch (weight.scalar_type()) {
    case ScalarType::Float: return decompress<int32_t>(op, values, ratio, words, weight, view);
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return decompress<int16_t>(op, values, ratio, words, weight, view);
    default:
      STD_TORCH_CHECK(false, op, ": values have dtype ",
                      torch::headeronly::toString(values.scalar_type()),
                      ", but float32, bfloat16 or float16 is needed; convert them");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_cocktail_cpp, m) {
  m.def("nm_compress(Tensor weight, int n, int m, Tensor? bits, ScalarType dtype) "
        "-> (Tensor, Tensor)");
  m.def("nm_decompress_into(Tensor values, Tensor bits, int n, int m, Tensor(a!) weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, CPU, m) {
  m.impl("nm_compress", TORCH_BOX(&nm_compress));
  m.impl("nm_decompress_into", TORCH_BOX(&nm_decompress_into));
}

}  // namespace sparse_cocktail
