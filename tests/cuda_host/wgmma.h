// wgmma.mma_async.sp m64nNk32 with A in registers and B in shared memory, from the PTX ISA manual.
// The rows of D that a warp holds depend on that warp's part of A only, so each warp of a
// warpgroup is computed by itself. Included by sm90.h.
#pragma once

namespace cuda_host::sm90 {

// One instruction of one warp, on its way.
struct Product {
  bool bf16;
  int columns, selector;  // N
  uint64_t descriptor;
  float* sums[kLanes];            // N / 2 of each lane
  const uint32_t* a[kLanes];      // 4 of each lane
  const uint32_t* meta[kLanes];
  uint32_t a_then[kLanes][4], meta_then[kLanes];
  std::vector<uint16_t> b_then;  // N x 32
};

// The pipeline of one warp.
struct Pipeline {
  const Cta* cta = nullptr;
  bool fenced = false;
  std::vector<Product> open;               // not committed
  std::deque<std::vector<Product>> groups;  // committed, oldest first
  std::map<float*, std::pair<std::vector<float>, int>> hidden;  // true sums, products under way
};

inline std::map<const Warp*, Pipeline>& pipelines() {
  static std::map<const Warp*, Pipeline> all;
  return all;
}
inline Pipeline& pipeline() {
  Pipeline& mine = pipelines()[thread().warp];
  if (mine.cta != thread().cta) mine = {}, mine.cta = thread().cta;
  return mine;
}
// To be called before a launch: a failed one leaves products behind.
inline void forget_products() {
  pipelines().clear();
  barrier_of_cluster() = {};
}

// B (N x 32, K-major) as the descriptor says. 128-byte swizzle only: rows are 128 bytes apart in
// groups of eight, groups are the stride offset apart, and the leading offset is not used.
inline std::vector<uint16_t> read_operand(Cta& cta, uint64_t descriptor, int columns) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fail("wgmma: the descriptor has no 128-byte swizzle");
  if (descriptor >> 49 & 7) fail("wgmma: base offset %d", static_cast<int>(descriptor >> 49 & 7));
  if (start % 1024 > 64) fail("wgmma: 64 bytes of K at %u leave their 128 bytes", start);
  std::vector<uint16_t> b(static_cast<size_t>(columns) * 32);
  for (int n = 0; n < columns; ++n) {
    const uint32_t row = start + n / 8 * stride + n % 8 * 128;
    for (uint32_t chunk = 0; chunk < 64; chunk += 16) {
      memcpy(&b[n * 32 + chunk / 2], shared_pointer_of(cta, swizzle_128(row + chunk), 16, 16), 16);
    }
  }
  return b;
}

inline void check_unchanged(const Product& p, Cta& cta) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (memcmp(p.a[lane], p.a_then[lane], 16) || *p.meta[lane] != p.meta_then[lane]) {
      fail("wgmma: lane %d changed a register of A before the wait", lane);
    }
  }
  if (read_operand(cta, p.descriptor, p.columns) != p.b_then) {
    fail("wgmma: B changed in shared memory before the wait");
  }
}

// With g = lane / 4 and t = lane % 4, in the 16 rows of this warp (two numbers per register of A):
//   A, compressed 16 x 16: register r holds row g + 8 (r % 2), columns 2t + 8 (r / 2) and the next
//   D, 16 x N:             sum i holds row g + 8 (i / 2 % 2), column 8 (i / 4) + 2t + i % 2
//   metadata, selector s:  lanes 4g + 2s + j, j = 0, 1, hold row g in bits 0..15 and row g + 8 in
//                          bits 16..31: two bits per kept element, dense columns 16j .. 16j + 15
inline void compute(const Product& p, Pipeline& warp) {
  const auto number = [&](uint16_t bits) {
    return p.bf16 ? sm80::bf16_to_float(bits) : sm80::fp16_to_float(bits);
  };
  std::vector<float> b(static_cast<size_t>(p.columns) * 32), row(p.columns);  // b as (k, n)
  for (int n = 0; n < p.columns; ++n) {
    for (int k = 0; k < 32; ++k) b[k * p.columns + n] = number(p.b_then[n * 32 + k]);
  }
  std::vector<float>* sums[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) sums[lane] = &warp.hidden.at(p.sums[lane]).first;
  for (int r = 0; r < 16; ++r) {
    const int g = r % 8, upper = r / 8;
    const auto sum_of = [&](int n) -> float& {
      return (*sums[4 * g + n % 8 / 2])[n / 8 * 4 + upper * 2 + n % 2];
    };
    for (int n = 0; n < p.columns; ++n) row[n] = sum_of(n);
    for (int group = 0; group < 8; ++group) {
      const uint32_t meta = p.meta_then[4 * g + 2 * p.selector + group / 4] >> 16 * upper;
      const uint32_t pair = p.a_then[4 * g + group % 4][upper + 2 * (group / 4)];
      const int first = meta >> 4 * (group % 4) & 3, second = meta >> (4 * (group % 4) + 2) & 3;
      if (first >= second) {
        fail("wgmma: row %d, group %d has the indices %d, %d; they must increase", r, group, first,
             second);
      }
      const float a0 = number(static_cast<uint16_t>(pair)),
                  a1 = number(static_cast<uint16_t>(pair >> 16));
      const float *b0 = &b[(4 * group + first) * p.columns],
                  *b1 = &b[(4 * group + second) * p.columns];
      for (int n = 0; n < p.columns; ++n) row[n] += a0 * b0[n] + a1 * b1[n];
    }
    for (int n = 0; n < p.columns; ++n) sum_of(n) = row[n];
  }
  ++statistics().sparse_mmas;
}

inline void wgmma_fence() {
  int none = 0;
  collective("wgmma.fence", none, [](int**) { pipeline().fenced = true; });
}

inline void wgmma_sp(bool bf16, float* sum, int count, const uint32_t (&a)[4], uint64_t descriptor,
                     const uint32_t& meta, int selector) {
  struct Slot {
    float* sum;
    const uint32_t *a, *meta;
    uint64_t descriptor;
  } slot{sum, a, &meta, descriptor};
  collective("wgmma", slot, [&](Slot** lanes) {
    Pipeline& warp = pipeline();
    // The manual wants the fence before the first wgmma and after any other access to registers.
    if (!warp.fenced) fail("wgmma: no wgmma.fence since the last group");
    Product p{bf16, 2 * count, selector, descriptor, {}, {}, {}, {}, {}, {}};
    for (int i = 0; i < kLanes; ++i) {
      if (lanes[i]->descriptor != descriptor) fail("wgmma: lanes differ in the descriptor");
      p.sums[i] = lanes[i]->sum, p.a[i] = lanes[i]->a, p.meta[i] = lanes[i]->meta;
      memcpy(p.a_then[i], p.a[i], 16), p.meta_then[i] = *p.meta[i];
      auto& [values, under_way] = warp.hidden[p.sums[i]];
      if (under_way++ == 0) values.assign(p.sums[i], p.sums[i] + count);
      else if (*reinterpret_cast<const uint32_t*>(p.sums[i]) != 0xffffffffu) {
        fail("wgmma: lane %d changed a sum before the wait", i);
      }
      memset(p.sums[i], kPoison, sizeof(float) * count);
    }
    p.b_then = read_operand(*thread().cta, descriptor, 2 * count);
    warp.open.push_back(std::move(p));
  });
}

inline void wgmma_commit() {
  int none = 0;
  collective("wgmma.commit_group", none, [](int**) {
    Pipeline& warp = pipeline();
    warp.groups.push_back(std::move(warp.open));
    warp.open.clear();
    warp.fenced = false;
  });
}

template <int kPending>
void wgmma_wait() {
  int none = 0;
  collective("wgmma.wait_group", none, [](int**) {
    Pipeline& warp = pipeline();
    while (warp.groups.size() > kPending) {
      for (const Product& p : warp.groups.front()) {
        check_unchanged(p, *thread().cta);
        compute(p, warp);
        for (float* sums : p.sums) {
          auto& [values, under_way] = warp.hidden.at(sums);
          if (--under_way) continue;
          memcpy(sums, values.data(), sizeof(float) * values.size());
          warp.hidden.erase(sums);
        }
      }
      warp.groups.pop_front();
    }
  });
}

template <int kCount>
void wgmma_settled(float (&)[kCount]) {}

}  // namespace cuda_host::sm90
