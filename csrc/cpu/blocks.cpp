// Masks of blocks on the CPU: rows x cols tiles of the (out, in) plane, or whole rows.
#include "lists.h"
#include "sums.h"

namespace sparse_cocktail {
namespace {

// How a block tiles a weight: -1 stands for a whole dimension, and for cols takes every tap too.
struct Tiling {
  int64_t rows, cols, taps;                // of a block
  int64_t down, across, layers;            // blocks along out, in and taps
  Tiling(const WeightView& view, const std::vector<int64_t>& block)
      : rows(block[0] == -1 ? view.out : block[0]), cols(block[1] == -1 ? view.in : block[1]),
        taps(block[1] == -1 ? view.taps : 1), down(rows ? view.out / rows : 0),
        across(cols ? view.in / cols : 0), layers(taps ? view.taps / taps : 0) {}
  int64_t count() const { return down * layers * across; }
};

// Calls fn(row of the view, first element) for the pieces of rows that make up one block.
template <class Fn>
void for_each_piece(const WeightView& view, const Tiling& tiling, int64_t index, const Fn& fn) {
  const int64_t across = index % tiling.across, layer = index / tiling.across % tiling.layers;
  const int64_t down = index / tiling.across / tiling.layers;
  for (int64_t out = down * tiling.rows; out < (down + 1) * tiling.rows; ++out) {
    for (int64_t tap = layer * tiling.taps; tap < (layer + 1) * tiling.taps; ++tap) {
      fn(out * view.taps + tap, across * tiling.cols);
    }
  }
}

template <class F>
int64_t score_block(const Part<F>& part, const Tiling& tiling, int64_t index) {
  const WeightView& view = part.view;
  if (part.within != nullptr) {  // eligible where any of its elements is
    uint32_t any = 0;
    for_each_piece(view, tiling, index, [&](int64_t row, int64_t first) {
      const uint32_t* words = part.within + row * view.row_words();
      for (int64_t i = first; i < first + tiling.cols;) {
        const int64_t lanes = std::min(first + tiling.cols - i, kWordBits - i % kWordBits);
        any |= words[i / kWordBits] & (low_bits(lanes) << i % kWordBits);
        i += lanes;
      }
    });
    if (any == 0) return -1;
  }
  RunSums sums;
  if (view.in_stride == 1) {
    const Kernels<F>& kernel = kernels().of(F{});
    if (tiling.taps == 1) {
      const int64_t out = index / tiling.across / tiling.layers * tiling.rows;
      const int64_t row = out * view.taps + index / tiling.across % tiling.layers;
      const auto* p = part.data + view.row_offset(row) + index % tiling.across * tiling.cols;
      kernel.block(p, view.out_stride, tiling.rows, tiling.cols, sums);
    } else {
      for_each_piece(view, tiling, index, [&](int64_t row, int64_t first) {
        kernel.block(part.data + view.row_offset(row) + first, 0, 1, tiling.cols, sums);
      });
    }
    const int64_t elements = tiling.rows * tiling.cols * tiling.taps;
    if (sums.exact && elements < int64_t{1} << 21) return sums.unstructured;
  }
  __int128 total = 0;
  for_each_piece(view, tiling, index, [&](int64_t row, int64_t first) {
    const auto* p = part.data + view.row_offset(row) + first * view.in_stride;
    for (int64_t i = 0; i < tiling.cols; ++i) total += fixed_point<F>(p[i * view.in_stride]);
  });
  return saturated(total);
}

// Ones in the pieces of the chosen blocks, zeros elsewhere.
template <class F>
void fill_blocks(const Part<F>& part, const Tiling& tiling, const uint8_t* chosen) {
  const WeightView& view = part.view;
  const int64_t per_band = tiling.layers * tiling.across;
  const int64_t band = tiling.rows * part.channel_words();  // words of one row of blocks
  torch::stable::parallel_for(
      0, tiling.down, std::max<int64_t>(1, kGrainWords / std::max<int64_t>(1, band)),
      [&](int64_t first, int64_t last) {
        std::fill(part.kept + first * band, part.kept + last * band, 0);
        for (int64_t index = first * per_band; index < last * per_band; ++index) {
          if (!chosen[index]) continue;
          for_each_piece(view, tiling, index, [&](int64_t row, int64_t begin) {
            uint32_t* words = part.kept + row * view.row_words();
            for (int64_t i = begin; i < begin + tiling.cols;) {
              const int64_t lanes = std::min(begin + tiling.cols - i, kWordBits - i % kWordBits);
              words[i / kWordBits] |= low_bits(lanes) << i % kWordBits;
              i += lanes;
            }
          });
        }
      });
}

Tensors block_masks(Tensors weights, std::vector<int64_t> keep, std::vector<int64_t> block,
                    MaybeTensors within) {
  const char* op = "block_masks";
  Tensors result;
  dispatch_list(op, weights, [&](auto format) {
    using F = decltype(format);
    auto parts = parts_of<F>(op, weights);
    const auto eligible = words_of_list(op, "within", parts, within);
    result = empty_masks(parts);
    std::vector<Tiling> tilings;
    std::vector<int64_t> starts{0};
    for (size_t i = 0; i < parts.size(); ++i) {
      parts[i].within = eligible[i], parts[i].kept = mutable_words(result[i]);
      tilings.emplace_back(parts[i].view, block);
      starts.push_back(starts.back() + tilings[i].count());
    }
    const int64_t total = starts.back();
    std::vector<int64_t> scores(total), copy(total);
    std::vector<uint8_t> chosen(total);
    for (size_t i = 0; i < parts.size(); ++i) {
      const Tiling& tiling = tilings[i];
      const int64_t size = std::max<int64_t>(1, tiling.rows * tiling.cols * tiling.taps);
      torch::stable::parallel_for(
          0, tilings[i].count(), std::max<int64_t>(1, kGrainWords * kWordBits / size),
          [&](int64_t first, int64_t last) {
            for (; first < last; ++first) {
              scores[starts[i] + first] = score_block(parts[i], tilings[i], first);
            }
          });
    }
    if (keep.size() == 1) {
      choose_best(scores.data(), total, keep[0], chosen.data(), copy.data());
    } else {
      for (size_t i = 0; i < parts.size(); ++i) {
        choose_best(&scores[starts[i]], tilings[i].count(), keep[i], &chosen[starts[i]],
                    copy.data());
      }
    }
    for (size_t i = 0; i < parts.size(); ++i) fill_blocks(parts[i], tilings[i], &chosen[starts[i]]);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_cocktail_cpp, m) {
  m.def("block_masks(Tensor[] weights, int[] keep, int[] block, Tensor[]? within) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, CPU, m) {
  m.impl("block_masks", TORCH_BOX(&block_masks));
}

// With an empty list no tensor's device chooses a kernel: the dispatcher's key is Undefined then.
STABLE_TORCH_LIBRARY_IMPL(sparse_cocktail_cpp, Undefined, m) {
  m.impl("block_masks", TORCH_BOX(&block_masks));
}

}  // namespace sparse_cocktail
