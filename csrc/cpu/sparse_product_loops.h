// The loops behind sparse_product.h, written over a vector type `Lanes` of a level:
//
//   kCount, kMostSums           lanes per vector, and how many sums the registers hold
//   all(value), load(p)         the same number in all lanes; neighbours from any address
//   load_first(p, n), store, store_first(p, n)    n >= 1 lanes, the others are zero or left alone
//   every_other(p, n)           n lanes from p[0], p[2], ..., the others zero
//   set_product, add_product(a, p)    this = or += a * neighbours at p
//   add(other)                  this += other
//   transpose(source, source_pitch, target, target_pitch)    a square of kSquare x kSquare
//
// Nothing here may call inline functions of the C++ library, see kernels.h.

// ---- product ------------------------------------------------------------------------------------

// Terms that are added one by one. The sums of such chains are added in turn: the error of n terms
// in one chain grows with n, and was up to 3.6 times oneDNN's, whose sums are no such chains. It
// costs no time, as the multiply-adds wait for their loads.
constexpr int32_t kChain = 16;

// How many rows or channels ahead of their use lines are fetched: planes are pages apart, where the
// hardware does not look ahead. Batch 8, 56 x 56: up to 30 % less time with 10 than with 4.
constexpr int kAhead = 10;

inline void prefetch(const float* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(p + i);
}

// R vectors of every row, from `lane` on; `tail` lanes of the last vector are written.
template <int R>
inline void multiply_vectors(const Product& p, int64_t lane, int tail) {
  const float* const panel = p.panel + lane;
  const float* const values = p.values;
  const int32_t* const offsets = p.offsets;
  float* target = p.target + lane;
  for (int64_t row = 0; row < p.rows; ++row, target += p.target_pitch) {
    prefetch(target + kAhead * p.target_pitch, R * Lanes::kCount + 1);
    Lanes sums[R];
    if (p.adds) {
      for (int r = 0; r < R - 1; ++r) sums[r] = Lanes::load(target + r * Lanes::kCount);
      sums[R - 1] = Lanes::load_first(target + (R - 1) * Lanes::kCount, tail);
    } else {
      const Lanes initial = Lanes::all(p.initial ? p.initial[row] : 0.0f);
      for (int r = 0; r < R; ++r) sums[r] = initial;
    }
    const int32_t end = p.starts[row + 1];
    for (int32_t i = p.starts[row]; i < end;) {
      const int32_t stop = end - i < kChain ? end : i + kChain;
      const Lanes first = Lanes::all(values[i]);
      const float* const start = panel + offsets[i];
      Lanes chain[R];
      for (int r = 0; r < R; ++r) chain[r].set_product(first, start + r * Lanes::kCount);
      for (++i; i < stop; ++i) {
        const Lanes value = Lanes::all(values[i]);
        const float* const inputs = panel + offsets[i];
        for (int r = 0; r < R; ++r) chain[r].add_product(value, inputs + r * Lanes::kCount);
      }
      for (int r = 0; r < R; ++r) sums[r].add(chain[r]);
    }
    for (int r = 0; r < R - 1; ++r) sums[r].store(target + r * Lanes::kCount);
    sums[R - 1].store_first(target + (R - 1) * Lanes::kCount, tail);
  }
}

template <int R>
inline void multiply_some(const Product& p, int64_t lane, int64_t vectors, int tail) {
  if constexpr (R > 1) {
    if (vectors < R) return multiply_some<R - 1>(p, lane, vectors, tail);
  }
  multiply_vectors<R>(p, lane, tail);
}

inline void multiply(const Product& p) {
  constexpr int64_t most = Lanes::kMostSums * Lanes::kCount;
  for (int64_t lane = 0; lane < p.lanes; lane += most) {
    const int64_t left = p.lanes - lane < most ? p.lanes - lane : most;
    const int64_t vectors = (left + Lanes::kCount - 1) / Lanes::kCount;
    const int tail = static_cast<int>(left - (vectors - 1) * Lanes::kCount);
    multiply_some<Lanes::kMostSums>(p, lane, vectors, tail);
  }
}

// ---- layouts ------------------------------------------------------------------------------------

// target[c * target_pitch + r] = source[r * source_pitch + c]
inline void transpose(const float* source, int64_t source_pitch, int64_t rows, int64_t columns,
                      float* target, int64_t target_pitch) {
  constexpr int64_t square = Lanes::kSquare;
  int64_t r = 0;
  for (; r + square <= rows; r += square) {
    int64_t c = 0;
    for (; c + square <= columns; c += square) {
      Lanes::transpose(source + r * source_pitch + c, source_pitch,
                       target + c * target_pitch + r, target_pitch);
    }
    for (; c < columns; ++c) {
      for (int64_t i = r; i < r + square; ++i) {
        target[c * target_pitch + i] = source[i * source_pitch + c];
      }
    }
  }
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      target[c * target_pitch + r] = source[r * source_pitch + c];
    }
  }
}

inline void fill(const float* source, int64_t stride, int64_t count, int64_t length,
                 float* target) {
  constexpr int64_t step = Lanes::kCount;
  int64_t j = 0;
  if (stride == 1) {
    for (; j + step <= count; j += step) Lanes::load(source + j).store(target + j);
    if (j < count) {
      Lanes::load_first(source + j, static_cast<int>(count - j)).store(target + j);
      j += step;
    }
  } else if (stride == 2) {
    for (; j < count; j += step) {
      const int64_t left = count - j < step ? count - j : step;
      Lanes::every_other(source + 2 * j, static_cast<int>(left)).store(target + j);
    }
  } else {
    for (; j < count; ++j) target[j] = source[j * stride];
  }
  for (; j < length; j += step) Lanes::all(0.0f).store(target + j);
}

inline void gather(const float* source, const Layout& layout, int64_t channels, float* panel,
                   int64_t pitch) {
  if (layout.channel_stride == 1) {
    for (const Segment* s = layout.begin; s < layout.end; ++s) {
      transpose(source + s->offset, layout.lane_stride, s->count, channels, panel + s->lane, pitch);
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t j = s->count; j < s->length; ++j) panel[c * pitch + s->lane + j] = 0.0f;
      }
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const float* const plane = source + c * layout.channel_stride;
    float* const row = panel + c * pitch;
    for (const Segment* s = layout.begin; s < layout.end; ++s) {
      prefetch(plane + kAhead * layout.channel_stride + s->offset, s->count * layout.lane_stride);
      fill(plane + s->offset, layout.lane_stride, s->count, s->length, row + s->lane);
    }
  }
}

inline void scatter(const float* rows, int64_t pitch, int64_t channels, const Layout& layout,
                    float* target) {
  if (layout.channel_stride == 1) {
    for (const Segment* s = layout.begin; s < layout.end; ++s) {
      transpose(rows + s->lane, pitch, channels, s->count, target + s->offset, layout.lane_stride);
    }
    return;
  }
  constexpr int64_t step = Lanes::kCount;
  for (int64_t c = 0; c < channels; ++c) {
    for (const Segment* s = layout.begin; s < layout.end; ++s) {
      const float* const from = rows + c * pitch + s->lane;
      float* const to = target + c * layout.channel_stride + s->offset;
      int64_t j = 0;
      for (; j + step <= s->count; j += step) Lanes::load(from + j).store(to + j);
      if (j < s->count) {
        const int left = static_cast<int>(s->count - j);
        Lanes::load_first(from + j, left).store_first(to + j, left);
      }
    }
  }
}
