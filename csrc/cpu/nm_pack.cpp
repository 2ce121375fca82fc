// 2:4 weights in the packed format of nm_fragments.h, on the CPU: from compressed values, or from
// the weight itself.
#include "../common/nm_fragments.h"

#include <atomic>
#include <optional>
#include <tuple>

#include "../common/view.h"

namespace sparse_cocktail {
namespace {

using MaybeTensor = std::optional<Tensor>;
using Packed = std::tuple<Tensor, Tensor>;

// Blocks that one task should cover at least: 1024 weights each, as many as kGrainWords covers.
constexpr int64_t kGrainBlocks = kGrainWords * kWordBits / (kFragmentRows * kFragmentColumns);

// One group of four: its mask, and its values at the two indices of the nibble.
struct Group {
  uint32_t mask;
  int16_t first, second;
};

// Writes all blocks. `group(row, g)` gives group g of a row, both inside of the weight.
template <class Fn>
void write_blocks(int64_t out, int64_t in, const Tensor& packed, const Tensor& meta,
                  const Fn& group) {
  auto* values = static_cast<int16_t*>(packed.mutable_data_ptr());
  auto* words = mutable_words(meta);
  const int64_t column_blocks = column_blocks_of(in), groups = in / kGroup;
  constexpr int64_t kGroups = kFragmentColumns / kGroup;
  const int64_t blocks = row_blocks_of(out) * column_blocks;
  torch::stable::parallel_for(0, blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first_row = block / column_blocks * kFragmentRows;
      const int64_t first_group = block % column_blocks * kGroups;
      const int64_t rows = std::clamp<int64_t>(out - first_row, 0, kFragmentRows);
      const int64_t count = std::min(groups - first_group, kGroups);
      int16_t* const block_values = values + block * kPackedOfBlock;
      uint32_t* const block_words = words + block * kLanesOfWarp;
      if (rows < kFragmentRows || count < kGroups) {
        std::fill_n(block_values, kPackedOfBlock, int16_t{0});
      }
      std::fill_n(block_words, kLanesOfWarp, 0u);
      for (int row = 0; row < kFragmentRows; ++row) {
        for (int g = 0; g < kGroups; ++g) {
          uint32_t nibble = kEmptyNibble;
          if (row < rows && g < count) {
            const Group kept = group(first_row + row, first_group + g);
            nibble = nibble_of_mask(kept.mask);
            int16_t* const pair = block_values + packed_index(place_of_value(row, 2 * g), 1);
            pair[0] = kept.first, pair[1] = kept.second;  // part 0 and part 1 of one register
          }
          const MetaPlace place = place_of_nibble(row, g);
          block_words[place.lane] |= nibble << place.shift;
        }
      }
    }
  });
}

Packed empty_packed(int64_t out, int64_t in, ScalarType dtype) {
  const int64_t row_blocks = row_blocks_of(out), column_blocks = column_blocks_of(in);
  return {torch::stable::empty(
              {row_blocks, column_blocks, kHalves, kLanesOfWarp, kPartsOfLane}, dtype),
          torch::stable::empty({row_blocks, column_blocks, kLanesOfWarp}, ScalarType::Int)};
}

void check_dtype(const char* op, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, ": ", name,
                  " is ", torch::headeronly::toString(dtype),
                  ", but packed weights are bfloat16 or float16; choose one of them");
}

// Mask bits of one group of four, which never straddle two words.
inline uint32_t mask_of_group(const uint32_t* row, int64_t group) {
  return row[group * kGroup / kWordBits] >> (group * kGroup % kWordBits) & 15;
}

// Finds masks with more than n bits in a group: threads only note one, the op stops at its end.
class TooFull {
 public:
  TooFull(const char* op, int64_t n, int64_t m, int64_t in)
      : op_(op), n_(n), m_(m), groups_(in / kGroup) {}

  void check(int64_t row, int64_t group, uint32_t mask) {
    // bit i: four bits of value i fit 2:4, or are two groups that fit 1:2
    const uint32_t fits = m_ == 4 ? 0x177f : 0x0777;
    if ((fits >> mask & 1) == 0) found_ = row * groups_ + group;
  }
  void stop() const {
    const int64_t found = found_;
    if (found < 0) return;
    const int64_t column = found % groups_ * kGroup;
    STD_TORCH_CHECK(false, op_, ": bits of row ", found / groups_, " keep more than n=", n_,
                    " of a group of m=", m_, " in columns ", column, " to ", column + 3,
                    "; make bits with nm_mask(weight, ", n_, ", ", m_, ")");
  }

 private:
  const char* op_;
  int64_t n_, m_, groups_;
  std::atomic<int64_t> found_{-1};
};

// ---- from compressed values ---------------------------------------------------------------------

Packed nm_pack(const Tensor& values, const Tensor& bits, int64_t n, int64_t m) {
  const char* op = "nm_pack";
  STD_TORCH_CHECK((n == 2 && m == 4) || (n == 1 && m == 2), op, ": pattern is ", n, ":", m,
                  ", but only 2:4 and 1:2 have a packed form; use nm_linear for others");
  check_dtype(op, "dtype of values", values.scalar_type());
  const Sizes shape = values.sizes();
  STD_TORCH_CHECK(shape.size() == 3 && shape[1] == 1 && shape[2] % 2 == 0 &&
                      values.is_contiguous(), op, ": values have shape ", to_string(shape),
                  ", but a packed weight has contiguous values (out, 1, in / 2) and in % 4 == 0; "
                  "compress a linear or 1x1 weight with nm_compress, padded where needed");
  const int64_t out = shape[0], in = 2 * shape[2];
  WeightView view;
  view.out = out, view.in = in;
  const uint32_t* words = words_for(op, "bits", bits, view);
  const auto* source = static_cast<const int16_t*>(values.const_data_ptr());
  const Packed result = empty_packed(out, in, values.scalar_type());
  TooFull full(op, n, m, in);
  write_blocks(out, in, std::get<0>(result), std::get<1>(result), [&](int64_t row, int64_t g) {
    const uint32_t mask = mask_of_group(words + row * words_of(in), g);
    full.check(row, g, mask);
    const uint32_t nibble = nibble_of_mask(mask);
    const int16_t* slots = source + row * (in / 2) + 2 * g;
    // of 1:2, each pair has its slot, kept or not; of 2:4, slots fill from the first
    const auto number = [&](int index) {
      const int slot = m == 2 ? index / 2 : (mask & low_bits(index)) != 0;
      return (mask >> index & 1) != 0 ? slots[slot] : int16_t{0};
    };
    return Group{mask, number(first_index(nibble)), number(second_index(nibble))};
  });
  full.stop();
  return result;
}

// ---- from the weight ----------------------------------------------------------------------------

template <class F, class To>
int16_t number_of(typename F::Raw raw) {
  if constexpr (std::is_same_v<F, Float64>) {
    double wide;
    memcpy(&wide, &raw, sizeof wide);
    const float single = static_cast<float>(wide);  // as torch converts to 16 bits
    int32_t bits;
    memcpy(&bits, &single, sizeof bits);
    return packed_number(Float32{}, To{}, bits);
  } else {
    return packed_number(F{}, To{}, raw);
  }
}

template <class F, class To>
void pack_weight(const WeightView& view, const typename F::Raw* data, const uint32_t* given,
                 const Packed& result) {
  using Raw = typename F::Raw;
  const int64_t stride = view.in_stride;
  TooFull full("nm_pack_weight", 2, 4, view.in);
  const auto group = [&](int64_t row, int64_t g) {
    const Raw* source = data + view.row_offset(row) + g * kGroup * stride;
    const Raw w[kGroup] = {source[0], source[stride], source[2 * stride], source[3 * stride]};
    const uint32_t mask = given != nullptr
                              ? mask_of_group(given + row * view.row_words(), g)
                              : mask_of_nibble(largest_two(key_of<F>(w[0]), key_of<F>(w[1]),
                                                           key_of<F>(w[2]), key_of<F>(w[3]))
                                                   .nibble());
    full.check(row, g, mask);
    const uint32_t nibble = nibble_of_mask(mask);
    const int first = first_index(nibble), second = second_index(nibble);
    return Group{mask, (mask >> first & 1) != 0 ? number_of<F, To>(w[first]) : int16_t{0},
                 (mask >> second & 1) != 0 ? number_of<F, To>(w[second]) : int16_t{0}};
  };
  write_blocks(view.out, view.in, std::get<0>(result), std::get<1>(result), group);
  full.stop();
}

Packed nm_pack_weight(const Tensor& weight, const MaybeTensor& bits, ScalarType dtype) {
  const char* op = "nm_pack_weight";
  check_dtype(op, "dtype", dtype);
  const WeightView view = view_of(op, "weight", weight);
  STD_TORCH_CHECK(view.taps == 1, op, ": weight has shape ", to_string(weight.sizes()),
                  ", but only (out, in) and (out, in, 1, 1) have a packed form; other convolutions "
                  "stay dense");
  STD_TORCH_CHECK(view.in % kGroup == 0, op, ": weight has in=", view.in,
                  ", which is not a multiple of m=4; pad the layer or leave it dense");
  const uint32_t* given = bits ? words_for(op, "bits", *bits, view) : nullptr;
  const Packed result = empty_packed(view.out, view.in, dtype);
  dispatch_format(op, "weight", weight, [&](auto format) {
    using F = decltype(format);
    const auto* data = static_cast<const typename F::Raw*>(weight.const_data_ptr());
    if (dtype == ScalarType::BFloat16) {
      pack_weight<F, BFloat16>(view, data, given, result);
    } else {
      pack_weight<F, Float16>(view, data, given, result);
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_cocktail_cpp, m) {
  m.def("nm_pack(Tensor values, Tensor bits, int n, int m) -> (Tensor, Tensor)");
  m.def("nm_pack_weight(Tensor weight, Tensor? bits, ScalarType dtype) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, CPU, m) {
  m.impl("nm_pack", TORCH_BOX(&nm_pack));
  m.impl("nm_pack_weight", TORCH_BOX(&nm_pack_weight));
}

}  // namespace sparse_cocktail
