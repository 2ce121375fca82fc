// The sm_80 instructions of csrc/cuda/ptx.h, per lane and register, written from the PTX ISA
// manual: its sections on cp.async, on ldmatrix, and on mma.sp and its matrix fragments.
#pragma once

#include "cuda_host.h"

namespace cuda_host::sm80 {

using cuda_host::shared_address;

// ---- numbers ------------------------------------------------------------------------------------

inline float bf16_to_float(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
inline uint16_t float_to_bf16(float value) {  // to nearest even
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float fp16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | fraction << 13);
  if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = static_cast<float>(fraction) * 0x1p-24f;  // exact
  return sign ? -small : small;
}
inline uint16_t float_to_fp16(float value) {  // to nearest even
  const uint16_t sign = static_cast<uint16_t>(__float_as_uint(value) >> 16 & 0x8000);
  const float magnitude = fabsf(value);
  if (value != value) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // half a step above the largest number
  if (magnitude < 0x1p-14f) {  // subnormal: steps of 2^-24; nearbyint rounds to even
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(nearbyintf(magnitude * 0x1p24f)));
  }
  const uint32_t bits = __float_as_uint(magnitude);
  const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112 << 10)));
}

// ---- cp.async -----------------------------------------------------------------------------------

// The target is poison from the issue to the wait: code that reads early, or that overwrites what
// another warp still reads, gets NaN. The source is read at the wait, the latest moment allowed.
inline void cp_async_16(uint32_t target, const void* source, uint32_t source_bytes = 16) {
  if (source_bytes > 16) fail("cp.async: %u source bytes for a copy of 16", source_bytes);
  if (reinterpret_cast<uintptr_t>(source) % 16) fail("cp.async: the source is not aligned to 16");
  check_global(source, source_bytes, "cp.async");
  memset(shared_pointer(target, 16, 16), kPoison, 16);
  thread().open_copies.push_back({target, source, source_bytes, 16});
  ++statistics().async_copies;
  statistics().async_bytes += source_bytes;
}

inline void cp_async_16_if(bool active, uint32_t target, const void* source,
                           uint32_t source_bytes = 16) {
  if (active) cp_async_16(target, source, source_bytes);
}

inline void cp_async_commit() {
  Thread& t = thread();
  t.copy_groups.push_back(std::move(t.open_copies));
  t.open_copies.clear();
}

template <int pending>
void cp_async_wait() {
  Thread& t = thread();
  while (t.copy_groups.size() > pending) {
    for (const Copy& copy : t.copy_groups.front()) {
      uint8_t* target = shared_pointer(copy.target, copy.bytes);
      memset(target, 0, copy.bytes);
      memcpy(target, copy.source, copy.source_bytes);
    }
    t.copy_groups.pop_front();
  }
}

// ---- shared memory ------------------------------------------------------------------------------

inline void load_shared(uint32_t (&r)[4], uint32_t address) {
  memcpy(r, shared_pointer(address, 16, 16), 16);
}
inline uint32_t load_shared(uint32_t address) {
  uint32_t r;
  memcpy(&r, shared_pointer(address, 4, 4), 4);
  return r;
}
inline float load_shared_float(uint32_t address) { return __uint_as_float(load_shared(address)); }
inline void store_shared(uint32_t address, uint16_t value) {
  memcpy(shared_pointer(address, 2, 2), &value, 2);
}
inline void store_shared(uint32_t address, float value) {
  memcpy(shared_pointer(address, 4, 4), &value, 4);
}

inline void store_global(void* target, const uint32_t (&r)[4]) {
  if (reinterpret_cast<uintptr_t>(target) % 16) fail("st.global.v4: not aligned to 16 bytes");
  check_global(target, 16, "st.global.v4");
  memcpy(target, r, 16);
}
template <class V>
void store_global(V* target, V value) {
  check_global(target, sizeof(V), "st.global");
  *target = value;
}
template <class V>
V load_global(const V* source) {
  check_global(source, sizeof(V), "ld.global");
  return *source;
}

// Lane 8i + j gives the address of row j of matrix i. Lane 4j + c receives, in register i, elements
// 2c and 2c + 1 of row j of matrix i. A row is 16 bytes; a matrix takes one pass over the 32 banks
// unless two of its rows lie on the same banks.
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  struct Slot {
    uint32_t address;
    uint32_t* registers;
  } slot{address, r};
  collective("ldmatrix", slot, [](Slot** lanes) {
    for (int i = 0; i < 4; ++i) {
      int rows_at[8] = {};  // of the eight 16-byte columns of the banks
      for (int j = 0; j < 8; ++j) {
        const uint32_t row_address = lanes[8 * i + j]->address;
        const uint8_t* row = shared_pointer(row_address, 16, 16);
        for (int c = 0; c < 4; ++c) memcpy(&lanes[4 * j + c]->registers[i], row + 4 * c, 4);
        ++rows_at[row_address / 16 % 8];
      }
      ++statistics().matrix_loads;
      statistics().matrix_conflicts += *std::max_element(rows_at, rows_at + 8) - 1;
    }
  });
}

// ---- mma.sp::ordered_metadata m16n8k32, f32 += f16 x f16 or bf16 x bf16 -------------------------

struct SparseMmaSlot {
  float* d;
  const uint32_t *a, *b;
  uint32_t meta;
  int selector;
};

// With g = lane / 4 and t = lane % 4 (two 16-bit elements per register, the low half first):
//   A, compressed 16 x 16: register r holds row g + 8 (r % 2), columns 2t + 8 (r / 2) and the next
//   B, 32 x 8:             register r holds rows 2t + 8r and the next, column g
//   C and D, 16 x 8:       register r holds row g + 8 (r / 2), column 2t + r % 2
//   metadata, selector s:  lanes 4g + 2s + j, j = 0, 1, hold row g in bits 0..15 and row g + 8 in
//                          bits 16..31: two bits per kept element, dense columns 16j .. 16j + 15
template <bool bf16>
void multiply(SparseMmaSlot** lanes) {
  const auto number = [](uint32_t pair, int half) {
    const auto bits = static_cast<uint16_t>(pair >> 16 * half);
    return bf16 ? bf16_to_float(bits) : fp16_to_float(bits);
  };
  float b[32][8], d[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      for (int half = 0; half < 2; ++half) {
        b[2 * t + 8 * r + half][g] = number(lanes[lane]->b[r], half);
      }
      d[g + 8 * (r / 2)][2 * t + r % 2] = lanes[lane]->d[r];
    }
    if (lanes[lane]->selector != lanes[0]->selector) fail("mma.sp: lanes differ in the selector");
  }
  const int selector = lanes[0]->selector;
  for (int row = 0; row < 16; ++row) {
    const int g = row % 8, upper = row / 8;
    for (int group = 0; group < 8; ++group) {  // of four dense columns
      const uint32_t meta = lanes[4 * g + 2 * selector + group / 4]->meta >> 16 * upper;
      const int first = meta >> 4 * (group % 4) & 3, second = meta >> (4 * (group % 4) + 2) & 3;
      if (first >= second) {
        fail("mma.sp: row %d, group %d has the indices %d, %d; they must increase", row, group,
             first, second);
      }
      const int column = 2 * group;  // compressed: both elements are in one register of one lane
      const uint32_t pair = lanes[4 * g + column % 8 / 2]->a[upper + 2 * (column / 8)];
      const float a0 = number(pair, 0), a1 = number(pair, 1);
      const float *b0 = b[4 * group + first], *b1 = b[4 * group + second];
      for (int n = 0; n < 8; ++n) d[row][n] += a0 * b0[n];  // the product is exact in fp32
      for (int n = 0; n < 8; ++n) d[row][n] += a1 * b1[n];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int r = 0; r < 4; ++r) {
      lanes[lane]->d[r] = d[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + r % 2];
    }
  }
  ++statistics().sparse_mmas;
}

template <bool bf16>
void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta,
                     int selector) {
  SparseMmaSlot slot{d, a, b, meta, selector};
  collective(bf16 ? "mma.sp.bf16" : "mma.sp.f16", slot, multiply<bf16>);
}

}  // namespace cuda_host::sm80
