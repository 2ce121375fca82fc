// Masks on the CPU: pack and unpack, N:M masks, and exact top-k over one or many weights.
#include "lists.h"

namespace sparse_cocktail {
namespace {

// ---- pack, unpack, count ------------------------------------------------------------------------

// Eight bools at a time as one number, the first in its lowest byte.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bytes of a word are taken in order");
constexpr uint64_t kOnes = 0x0101010101010101;

uint32_t word_of_bools(const uint8_t* bools) {
  uint32_t word = 0;
  for (int part = 0; part < 4; ++part) {
    uint64_t bytes;
    memcpy(&bytes, bools + 8 * part, sizeof bytes);
    bytes |= bytes >> 4, bytes |= bytes >> 2, bytes |= bytes >> 1;  // any bit counts as true
    word |= static_cast<uint32_t>((bytes & kOnes) * 0x0102040810204080 >> 56) << 8 * part;
  }
  return word;
}

void bools_of_word(uint32_t word, uint8_t* bools) {
  for (int part = 0; part < 4; ++part) {
    // byte i keeps bit i, and 127 more carries into its highest bit where that was set
    const uint64_t bits = (word >> 8 * part & 0xff) * kOnes & 0x8040201008040201;
    const uint64_t bytes = (bits + 127 * kOnes) >> 7 & kOnes;
    memcpy(bools + 8 * part, &bytes, sizeof bytes);
  }
}

Tensor pack_mask(const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "pack_mask: mask has dtype ",
                  torch::headeronly::toString(mask.scalar_type()),
                  ", but masks are bool; compare it with 0 first");
  const WeightView view = view_of("pack_mask", "mask", mask);
  Tensor bits = empty_bits(view);
  const auto* source = static_cast<const uint8_t*>(mask.const_data_ptr());
  uint32_t* target = mutable_words(bits);
  parallel_for_each_word(view, [&](int64_t word, int64_t offset, int64_t count) {
    if (count == kWordBits && view.in_stride == 1) {
      target[word] = word_of_bools(source + offset);
      return;
    }
    std::array<uint8_t, kWordBits> lanes{};  // zeros, so padding bits are 0
    load_lanes(lanes.data(), source + offset, view.in_stride, count, [](uint8_t b) { return b; });
    target[word] = word_where(lanes.data(), [](uint8_t b) { return b != 0; });
  });
  return bits;
}

Tensor unpack_mask(const Tensor& bits, std::vector<int64_t> shape) {
  for (int64_t size : shape) {
    STD_TORCH_CHECK(size >= 0, "unpack_mask: shape is ", to_string(Sizes(shape)),
                    ", but sizes are not negative; pass the shape of the weight");
  }
  Tensor mask = torch::stable::empty(shape, ScalarType::Bool);
  const WeightView view = view_of("unpack_mask", "shape", mask);
  const uint32_t* source = words_for("unpack_mask", "bits", bits, view);
  auto* target = static_cast<uint8_t*>(mask.mutable_data_ptr());
  parallel_for_each_word(view, [&](int64_t word, int64_t offset, int64_t count) {
    const uint32_t value = source[word];
    uint8_t* p = target + offset;
    if (count == kWordBits && view.in_stride == 1) return bools_of_word(value, p);
    for_each_lane(count, [&](int j) { p[j * view.in_stride] = value >> j & 1; });
  });
  return mask;
}

Tensor mask_count(const Tensor& bits) {
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Int && bits.is_contiguous(),
                  "mask_count: bits have dtype ",
                  torch::headeronly::toString(bits.scalar_type()), " and strides ",
                  to_string(bits.strides()),
                  ", but mask bits are contiguous int32; make them with pack_mask");
  const auto* words = static_cast<const uint32_t*>(bits.const_data_ptr());
  std::atomic<int64_t> total{0};  // integers: the order of the threads does not matter
  const auto popcounts = kernels().popcount;
  torch::stable::parallel_for(0, bits.numel(), kGrainWords, [&](int64_t begin, int64_t end) {
    total += popcounts(words + begin, end - begin);
  });
  Tensor result = torch::stable::empty({}, ScalarType::Long);
  *static_cast<int64_t*>(result.mutable_data_ptr()) = total;
  return result;
}

// ---- N:M ----------------------------------------------------------------------------------------

Ratio ratio_of(const char* op, int64_t n, int64_t m) {
  STD_TORCH_CHECK(1 <= n && n < m && m <= kWordBits, op, ": pattern is ", n, ":", m,
                  ", but 1 <= n < m <= 32 is needed; pick another pattern");
  return {static_cast<int>(n), static_cast<int>(m)};
}

template <class F>
void nm_into(const char* op, std::vector<Part<F>> parts, Ratio ratio,
             const std::vector<uint32_t*>& target) {
  for (size_t i = 0; i < parts.size(); ++i) {
    STD_TORCH_CHECK(parts[i].view.in % ratio.m == 0, op, ": ", parts[i].name, " has in=",
                    parts[i].view.in, ", which is not a multiple of m=", ratio.m,
                    "; pad the layer or leave it dense");
    parts[i].ratio = ratio, parts[i].fresh = target[i];
  }
  make_nm(Sequence<F>(std::move(parts)));
}

Tensor nm_mask(const Tensor& weight, int64_t n, int64_t m) {
  const char* op = "nm_mask";
  const Ratio ratio = ratio_of(op, n, m);
  Tensor bits = empty_bits(view_of(op, "weight", weight));
  dispatch_format(op, "weight", weight, [&](auto format) {
    using F = decltype(format);
    auto parts = parts_of<F>(op, {weight});
    parts[0].name = "weight";
    nm_into(op, std::move(parts), ratio, {mutable_words(bits)});
  });
  return bits;
}

void nm_row_(Tensors weights, int64_t n, int64_t m, const Tensor& row) {
  const char* op = "nm_row_";
  const Ratio ratio = ratio_of(op, n, m);
  dispatch_list(op, weights, [&](auto format) {
    auto parts = parts_of<decltype(format)>(op, weights);
    const auto target = words_of_row(op, "row", parts, row);
    nm_into(op, std::move(parts), ratio, target);
  });
}

// ---- top-k --------------------------------------------------------------------------------------

template <class F>
void topk_into(const char* op, std::vector<Part<F>> parts, int64_t keep, Arena scratch) {
  const Sequence<F> sequence(std::move(parts));
  const int64_t bytes = SelectionScratch<F>::bytes(sequence.words());
  Selection<F>(sequence, keep, scratch.take<uint8_t>(op, bytes)).run();
}

Tensors topk_masks(Tensors weights, std::vector<int64_t> keep, MaybeTensors within) {
  const char* op = "topk_masks";
  STD_TORCH_CHECK(keep.size() == 1 || keep.size() == weights.size(), op, ": keep has ",
                  keep.size(), " entries for ", weights.size(),
                  " weights; pass one for all weights together, or one per weight");
  STD_TORCH_CHECK(!within || within->size() == weights.size(), op, ": within has ",
                  within ? within->size() : 0, " masks for ", weights.size(),
                  " weights; pass one per weight");
  Tensors result;
  dispatch_list(op, weights, [&](auto format) {
    using F = decltype(format);
    auto parts = parts_of<F>(op, weights);
    const auto eligible = words_of_list(op, "within", parts, within);
    result = empty_masks(parts);
    int64_t elements = 0, words = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
      parts[i].within = eligible[i], parts[i].kept = mutable_words(result[i]);
      elements += weights[i].numel(), words += parts[i].view.words();
    }
    const OwnScratch scratch(SelectionScratch<F>::bytes(words));
    const auto select = [&](std::vector<Part<F>> list, int64_t count, int64_t limit) {
      STD_TORCH_CHECK(0 <= count && count <= limit, op, ": keep is ", count, " of ", limit,
                      " elements (", list[0].name, list.size() > 1 ? " and those after it" : "",
                      "), but 0 <= keep <= elements is needed; lower it");
      topk_into(op, std::move(list), count, scratch.arena());
    };
    if (keep.size() == 1) return select(parts, keep[0], elements);
    for (size_t i = 0; i < parts.size(); ++i) select({parts[i]}, keep[i], weights[i].numel());
  });
  return result;
}

// `within` may be the row itself, which a second pass would find overwritten: it is copied.
void topk_row_(Tensors weights, const Tensor& keep, MaybeTensor within, const Tensor& row,
               const Tensor& scratch) {
  const char* op = "topk_row_";
  dispatch_list(op, weights, [&](auto format) {
    using F = decltype(format);
    auto parts = parts_of<F>(op, weights);
    auto eligible = words_of_row(op, "within", parts, within);
    const auto target = words_of_row(op, "row", parts, row);
    Arena arena = arena_of(op, scratch);
    if (eligible[0] == target[0] && row.numel() > 0) {
      auto* copy = arena.take<uint32_t>(op, row.numel());
      memcpy(copy, eligible[0], row.numel() * sizeof(uint32_t));
      for (uint32_t*& words : eligible) words = copy + (words - target[0]);
    }
    for (size_t i = 0; i < parts.size(); ++i) {
      parts[i].within = eligible[i], parts[i].kept = target[i];
    }
    topk_into(op, std::move(parts), count_of(op, "keep", keep), arena);
  });
}

int64_t read_weight_passes() { return weight_passes; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_cocktail_cpp, m) {
  m.def("pack_mask(Tensor mask) -> Tensor");
  m.def("unpack_mask(Tensor bits, int[] shape) -> Tensor");
  m.def("mask_count(Tensor bits) -> Tensor");
  m.def("nm_mask(Tensor weight, int n, int m) -> Tensor");
  m.def("nm_row_(Tensor[] weights, int n, int m, Tensor(a!) row) -> ()");
  m.def("topk_masks(Tensor[] weights, int[] keep, Tensor[]? within) -> Tensor[]");
  m.def("topk_row_(Tensor[] weights, Tensor keep, Tensor? within, Tensor(a!) row, "
        "Tensor(b!) scratch) -> ()");
  m.def("weight_passes() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, CPU, m) {
  m.impl("pack_mask", TORCH_BOX(&pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&unpack_mask));
  m.impl("mask_count", TORCH_BOX(&mask_count));
  m.impl("nm_mask", TORCH_BOX(&nm_mask));
  m.impl("nm_row_", TORCH_BOX(&nm_row_));
  m.impl("topk_masks", TORCH_BOX(&topk_masks));
  m.impl("topk_row_", TORCH_BOX(&topk_row_));
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, CompositeExplicitAutograd, m) {
  m.impl("weight_passes", TORCH_BOX(&read_weight_passes));
}

// With an empty list no tensor's device chooses a kernel: the dispatcher's key is Undefined then.
STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, Undefined, m) {
  m.impl("topk_masks", TORCH_BOX(&topk_masks));
}

}  // namespace sparse_cocktail
