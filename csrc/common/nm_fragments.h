// The packed 2:4 format ("fragment order"): where each kept value and each index lies, so that a
// lane of a sparse tensor-core instruction finds its operands with one 16-byte and one 4-byte load.
//
// A weight (out, in) of 16-bit numbers is cut into blocks of 16 rows and 64 columns. Rows and
// columns are padded to multiples of 64 (64 rows are what one warp group of wgmma takes). With MB
// row blocks and KB column blocks:
//
//   packed  16 bit  (MB, KB, 2, 32, 8)   [row block][column block][half][lane][register * 2 + part]
//   meta    int32   (MB, KB, 32)         [row block][column block][lane]
//
// A half is 32 dense columns, the depth of one mma.sp.m16n8k32 and of one wgmma.sp.m64nNk32, whose
// warp w takes row block w of four exactly as mma.sp takes its one. lane = 4 * g + t:
//
//   register   0        1        2          3            part 0 | 1 = low | high 16 bits
//   row        g        g + 8    g          g + 8
//   values     2t + p   2t + p   2t + p + 8 2t + p + 8   of the 16 kept ones of this half
//   group      t        t        t + 4      t + 4        of the 8 groups of four of this half
//
//   meta lane 4 * g + q: dense columns 16 q .. 16 q + 15 of the block, row g in the low 16 bits and
//   row g + 8 in the high ones; the nibble of the lowest group is the lowest. The MMA of half h is
//   issued with selector h, which takes the lanes q = 2h and 2h + 1.
//
// A nibble is i0 | i1 << 2, the indices i0 < i1 of the two values of a group. Where fewer than two
// are kept, zeros take the lowest indices that are free: a padding zero may come before a value.
// Padding rows and columns hold zeros and nibble 0x4.
//
// Plain C++17 without torch headers: host and device code include this file.
#pragma once

#include "bits.h"

namespace sparse_cocktail {

constexpr int kFragmentRows = 16;     // of a block: M of mma.sp
constexpr int kFragmentColumns = 64;  // dense columns of a block: one metadata register per lane
constexpr int kHalfColumns = 32;      // dense columns of one instruction
constexpr int kHalves = kFragmentColumns / kHalfColumns;
constexpr int kLanesOfWarp = 32;
constexpr int kPartsOfLane = 8;  // 16-bit values of a lane in one instruction: 4 registers of 2
constexpr int kRowPadding = 64;  // M of wgmma: four row blocks
constexpr int kPackedOfBlock = kHalves * kLanesOfWarp * kPartsOfLane;  // 512 values
constexpr int kGroup = 4;                                              // of 2:4
constexpr int kGroupsOfHalf = kHalfColumns / kGroup;
constexpr uint32_t kEmptyNibble = 0x4;
constexpr uint32_t kEmptyMeta = 0x44444444u;

SC_HOST_DEVICE constexpr int64_t row_blocks_of(int64_t out) {
  return (out + kRowPadding - 1) / kRowPadding * (kRowPadding / kFragmentRows);
}
SC_HOST_DEVICE constexpr int64_t column_blocks_of(int64_t in) {
  return (in + kFragmentColumns - 1) / kFragmentColumns;
}

// ---- nibbles ------------------------------------------------------------------------------------

SC_HOST_DEVICE constexpr uint32_t nibble_of_indices(int i0, int i1) {
  return static_cast<uint32_t>(i0 | i1 << 2);
}

// The nibble of a group whose mask is `mask`, bit i for element i. Of more than two set bits the
// two lowest count: kernels cannot stop, and callers check before.
//
//   mask     0  1  2  3  4  5  6  7  8  9  a  b  c  d  e  f
//   nibble   4  4  4  4  8  8  9  4  c  c  d  4  e  8  9  4
SC_HOST_DEVICE constexpr uint32_t nibble_of_mask(uint32_t mask) {
  return static_cast<uint32_t>(0x498e4dcc49884444ull >> (4 * (mask & 15))) & 15;
}

SC_HOST_DEVICE constexpr int first_index(uint32_t nibble) { return static_cast<int>(nibble & 3); }
SC_HOST_DEVICE constexpr int second_index(uint32_t nibble) {
  return static_cast<int>(nibble >> 2 & 3);
}
SC_HOST_DEVICE constexpr bool is_legal_nibble(uint32_t nibble) {
  return nibble < 16 && first_index(nibble) < second_index(nibble);
}

// The two bits of the mask that a nibble stands for.
SC_HOST_DEVICE constexpr uint32_t mask_of_nibble(uint32_t nibble) {
  return 1u << first_index(nibble) | 1u << second_index(nibble);
}

// Whether the one kept value of a group comes second, behind a padding zero at index 0. Compressed
// values have their padding at the end of the group instead.
SC_HOST_DEVICE constexpr bool padding_comes_first(uint32_t mask) {
  return (0x0114u >> (mask & 15) & 1) != 0;  // masks 2, 4 and 8
}

// The two largest of four keys (see key_of); of equal keys the lower position wins. Both of a pair
// stay where the lesser of them beats the other pair, else the better of each.
struct LargestTwo {
  bool left_pair, right_pair;  // both of elements 0 and 1, or of 2 and 3
  bool first_odd, second_odd;  // else: 1 rather than 0, and 3 rather than 2

  SC_HOST_DEVICE constexpr uint32_t nibble() const {
    const uint32_t one_each = 8u + (first_odd ? 1u : 0u) + (second_odd ? 4u : 0u);
    return left_pair ? nibble_of_indices(0, 1) : right_pair ? nibble_of_indices(2, 3) : one_each;
  }
};
template <class Key>
SC_HOST_DEVICE inline LargestTwo largest_two(Key k0, Key k1, Key k2, Key k3) {
  const bool odd0 = k1 > k0, odd1 = k3 > k2;
  const Key best0 = odd0 ? k1 : k0, least0 = odd0 ? k0 : k1;
  const Key best1 = odd1 ? k3 : k2, least1 = odd1 ? k2 : k3;
  return {least0 >= best1, least1 > best0, odd0, odd1};
}

// ---- numbers ------------------------------------------------------------------------------------

// A 16-bit number as the same fp32 number, sign and NaN included.
SC_HOST_DEVICE inline int32_t float32_of(BFloat16, int16_t raw) { return int32_t{raw} << 16; }
SC_HOST_DEVICE inline int32_t float32_of(Float16, int16_t raw) {
  const int16_t magnitude = raw & Float16::kMagnitude;
  const uint32_t sign = (static_cast<uint32_t>(raw) & 0x8000u) << 16;
  const uint32_t wide =
      magnitude > Float16::kInfinity
          ? 0x7fc00000u | (static_cast<uint32_t>(magnitude) & 0x3ffu) << 13
          : static_cast<uint32_t>(widen_key(Float16{}, magnitude));
  return static_cast<int32_t>(sign | wide);
}
SC_HOST_DEVICE inline int32_t float32_of(Float32, int32_t raw) { return raw; }

// A weight as the 16-bit number that is packed, to nearest even; as it is where formats agree.
SC_HOST_DEVICE inline int16_t round_to(BFloat16, int32_t raw) { return bfloat16_of(raw); }
SC_HOST_DEVICE inline int16_t round_to(Float16, int32_t raw) { return float16_of(raw); }
template <class From, class To>
SC_HOST_DEVICE inline int16_t packed_number(From, To, typename From::Raw raw) {
  return round_to(To{}, float32_of(From{}, raw));
}
SC_HOST_DEVICE inline int16_t packed_number(BFloat16, BFloat16, int16_t raw) { return raw; }
SC_HOST_DEVICE inline int16_t packed_number(Float16, Float16, int16_t raw) { return raw; }

// ---- places -------------------------------------------------------------------------------------

// Where one kept value lies. `part` is 0 or 1 for the low or high 16 bits of a register.
struct FragmentPlace {
  int64_t row_block, column_block;
  int half, lane, reg, part;
};

// Of the value at compressed column `column` (in order of dense position) of a row.
SC_HOST_DEVICE constexpr FragmentPlace place_of_value(int64_t row, int64_t column) {
  constexpr int kValues = kFragmentColumns / 2;  // compressed columns of a block
  const int in_block = static_cast<int>(column % kValues), in_half = in_block % (kValues / 2);
  const int in_rows = static_cast<int>(row % kFragmentRows);
  FragmentPlace place{};
  place.row_block = row / kFragmentRows, place.column_block = column / kValues;
  place.half = in_block / (kValues / 2);
  place.lane = in_rows % 8 * 4 + in_half % 8 / 2;
  place.reg = in_half / 8 * 2 + in_rows / 8;
  place.part = in_half % 2;
  return place;
}

SC_HOST_DEVICE constexpr int64_t row_of(const FragmentPlace& place) {
  return place.row_block * kFragmentRows + place.lane / 4 + place.reg % 2 * 8;
}
// The compressed column.
SC_HOST_DEVICE constexpr int64_t column_of(const FragmentPlace& place) {
  const int in_half = place.lane % 4 * 2 + place.part + place.reg / 2 * 8;
  return place.column_block * (kFragmentColumns / 2) + place.half * (kHalfColumns / 2) + in_half;
}

// Index into `packed` of the first of the 8 values of a lane; 16-byte aligned.
SC_HOST_DEVICE constexpr int64_t packed_index(int64_t row_block, int64_t column_block, int half,
                                              int lane, int64_t column_blocks) {
  return (((row_block * column_blocks + column_block) * kHalves + half) * kLanesOfWarp + lane) *
         kPartsOfLane;
}
SC_HOST_DEVICE constexpr int64_t packed_index(const FragmentPlace& place, int64_t column_blocks) {
  return packed_index(place.row_block, place.column_block, place.half, place.lane,
                      column_blocks) + place.reg * 2 + place.part;
}
SC_HOST_DEVICE constexpr FragmentPlace place_of_packed(int64_t index, int64_t column_blocks) {
  const int64_t block = index / kPackedOfBlock;
  const int in_block = static_cast<int>(index % kPackedOfBlock);
  FragmentPlace place{};
  place.row_block = block / column_blocks, place.column_block = block % column_blocks;
  place.half = in_block / (kLanesOfWarp * kPartsOfLane);
  place.lane = in_block / kPartsOfLane % kLanesOfWarp;
  place.reg = in_block % kPartsOfLane / 2, place.part = in_block % 2;
  return place;
}

// Where the nibble of a group of four dense columns lies: bits shift .. shift + 3 of a word.
struct MetaPlace {
  int64_t row_block, column_block;
  int lane, shift;
};

SC_HOST_DEVICE constexpr MetaPlace place_of_nibble(int64_t row, int64_t group) {
  constexpr int kGroups = kFragmentColumns / kGroup;
  const int in_rows = static_cast<int>(row % kFragmentRows);
  const int in_block = static_cast<int>(group % kGroups);
  MetaPlace place{};
  place.row_block = row / kFragmentRows, place.column_block = group / kGroups;
  place.lane = in_rows % 8 * 4 + in_block / 4;
  place.shift = in_rows / 8 * 16 + in_block % 4 * 4;
  return place;
}
SC_HOST_DEVICE constexpr int64_t row_of(const MetaPlace& place) {
  return place.row_block * kFragmentRows + place.lane / 4 + place.shift / 16 * 8;
}
SC_HOST_DEVICE constexpr int64_t group_of(const MetaPlace& place) {
  return place.column_block * (kFragmentColumns / kGroup) + place.lane % 4 * 4 +
         place.shift % 16 / 4;
}

SC_HOST_DEVICE constexpr int64_t meta_index(int64_t row_block, int64_t column_block, int lane,
                                            int64_t column_blocks) {
  return (row_block * column_blocks + column_block) * kLanesOfWarp + lane;
}
SC_HOST_DEVICE constexpr int64_t meta_index(const MetaPlace& place, int64_t column_blocks) {
  return meta_index(place.row_block, place.column_block, place.lane, column_blocks);
}

// ---- a block from its quads ---------------------------------------------------------------------

// The four lanes of a quad (same g) own the groups t and t + 4 of each half, rows g and g + 8. Byte
// q of a word of such a lane is what it has for metadata lane q, the nibble of row g lowest.
SC_HOST_DEVICE constexpr uint32_t quad_nibbles(uint32_t low_row, uint32_t high_row, int q) {
  return (low_row | high_row << 4) << (8 * q);
}

// The metadata word of lane 4 * g + q from byte q of the four words of its quad, that of t = 0
// lowest. Each byte holds two nibbles: the one of row g, and above it the one of row g + 8.
SC_HOST_DEVICE constexpr uint32_t meta_of_quad(uint32_t bytes) {
  const uint32_t low = bytes & 0x0f0f0f0fu, high = bytes >> 4 & 0x0f0f0f0fu;
  // four nibbles that stand in four bytes move together: 0d0c0b0a -> dcba
  const uint32_t a = (low | low >> 4) & 0x00ff00ffu, b = (high | high >> 4) & 0x00ff00ffu;
  return ((a | a >> 8) & 0xffffu) | ((b | b >> 8) & 0xffffu) << 16;
}

}  // namespace sparse_cocktail
