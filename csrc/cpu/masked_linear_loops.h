// The loops behind masked_linear.h, written over the vector type of sparse_product_loops.h, with
//
//   kRowTile, kOutputTile       products of so many rows and outputs sum up in registers
//   kSumTile, kVectorTile       so many sums of so many neighbouring vectors do, too
//   load_kept(p, mask)          neighbours whose bits are set, others are zero and are not read
//   kept(mask)                  the same of this
//   set_zero(), sum(), add_product(a, b)    of whole vectors
//
// Masks are given in the low kCount bits; higher bits are ignored. Bits past the inputs are zero:
// masked vectors may reach past them.

// Arrays of vectors stay in registers where every loop over them is unrolled: GCC does not, by
// itself, for loops that are long inside.
#define SC_UNROLL _Pragma("GCC unroll 8")

template <bool kWhole>
inline Lanes load_lanes(const float* p, int lanes) {
  return kWhole ? Lanes::load(p) : Lanes::load_first(p, lanes);
}

// The bits of a vector of a row; columns are multiples of kCount.
inline uint32_t bits_at(const uint32_t* words, uint64_t column) {
  return words[column / kWordBits] >> column % kWordBits;
}

// Calls fn(begin, end) for about equal parts of `count`, none larger than `most`.
template <class Fn>
inline __attribute__((always_inline)) void in_parts(int64_t count, int64_t most, const Fn& fn) {
  const int64_t parts = (count + most - 1) / most;
  for (int64_t part = 0; part < parts; ++part) {
    fn(count * part / parts, count * (part + 1) / parts);
  }
}

// ---- forward ------------------------------------------------------------------------------------

// Inputs whose weights and rows of x stay in the L1 cache while all rows pass.
constexpr int64_t kPanel = 512;

// Adds the products of whole vectors, or of the first lanes of one, to sums[row * kOutputTile +
// output]. The first rows fetch the weights of the next outputs.
template <int R, bool kWhole>
inline void forward_tile(const MaskedLinear& p, int64_t row, const float* const* weights,
                         const uint32_t* const* words, int64_t begin, int64_t end, Lanes* sums) {
  constexpr int O = Lanes::kOutputTile;
  const float* const x = p.x + row * p.inputs;
  const int64_t pitch = p.inputs, ahead = row == 0 ? O * pitch : 0;
  const int lanes = static_cast<int>(end - begin);
  Lanes sum[R][O];
  SC_UNROLL
  for (int r = 0; r < R; ++r) {
    SC_UNROLL
    for (int o = 0; o < O; ++o) sum[r][o] = sums[(row + r) * O + o];
  }
  for (int64_t column = begin; column < end; column += Lanes::kCount) {
    Lanes kept[O];
    SC_UNROLL
    for (int o = 0; o < O; ++o) {
      __builtin_prefetch(weights[o] + column + ahead, 0, 2);
      kept[o] = Lanes::load_kept(weights[o] + column, bits_at(words[o], column));
    }
    SC_UNROLL
    for (int r = 0; r < R; ++r) {
      const Lanes inputs = load_lanes<kWhole>(x + r * pitch + column, lanes);
      SC_UNROLL
      for (int o = 0; o < O; ++o) sum[r][o].add_product(kept[o], inputs);
    }
  }
  SC_UNROLL
  for (int r = 0; r < R; ++r) {
    SC_UNROLL
    for (int o = 0; o < O; ++o) sums[(row + r) * O + o] = sum[r][o];
  }
}

template <int R>
inline void forward_rows(const MaskedLinear& p, int64_t row, int64_t rows,
                         const float* const* weights, const uint32_t* const* words, int64_t begin,
                         int64_t end, Lanes* sums) {
  if constexpr (R > 1) {
    if (rows < R) return forward_rows<R - 1>(p, row, rows, weights, words, begin, end, sums);
  }
  const int64_t whole = begin + (end - begin) / Lanes::kCount * Lanes::kCount;
  forward_tile<R, true>(p, row, weights, words, begin, whole, sums);
  if (whole < end) forward_tile<R, false>(p, row, weights, words, whole, end, sums);
}

// `scratch` has room for kOutputTile vectors per row.
inline void forward(const MaskedLinear& p, int64_t begin, int64_t end, float* scratch) {
  constexpr int O = Lanes::kOutputTile;
  Lanes* const sums = reinterpret_cast<Lanes*>(scratch);
  for (int64_t output = begin; output < end; output += O) {
    const int outputs = end - output < O ? static_cast<int>(end - output) : O;
    const float* weights[O];
    const uint32_t* words[O];
    for (int o = 0; o < O; ++o) {  // the last one again where there are fewer
      const int64_t of = output + (o < outputs ? o : outputs - 1);
      weights[o] = p.weight + of * p.inputs, words[o] = p.bits + of * p.row_words();
    }
    for (int64_t i = 0; i < p.rows * O; ++i) sums[i].set_zero();
    for (int64_t panel = 0; panel < p.inputs; panel += kPanel) {
      const int64_t stop = p.inputs - panel < kPanel ? p.inputs : panel + kPanel;
      in_parts(p.rows, Lanes::kRowTile, [&](int64_t row, int64_t next) {
        forward_rows<Lanes::kRowTile>(p, row, next - row, weights, words, panel, stop, sums);
      });
    }
    for (int64_t r = 0; r < p.rows; ++r) {
      for (int o = 0; o < outputs; ++o) {
        const float bias = p.bias ? p.bias[output + o] : 0.0f;
        p.result[r * p.outputs + output + o] = sums[r * O + o].sum() + bias;
      }
    }
  }
}

// ---- gradients ----------------------------------------------------------------------------------

// Terms that are added one by one, see sparse_product_loops.h. Rows are few, and what they are
// added to lies in the L1 cache: their chains may be shorter.
constexpr int64_t kOutputChain = 48, kRowChain = 16;

// Rows of vectors: those of `source`, each times a factor, add up to those of `target`.
//
//   target[sum][column] (+)= factors[sum, term] * source[term][column], terms [begin, end)
struct Mix {
  const float *source, *factors;
  float* target;
  int64_t columns;                    // of a row of source or target
  int64_t sum_factors, term_factors;  // from a factor to that of the next sum, or term
  const uint32_t* bits;               // of the source (kMaskSource), or else of the target
  int64_t row_words, begin, end;
  int64_t ahead;  // how far on in the source lies what is wanted next; the first sums fetch it
};

// S sums of V vectors from `column` on, or of the first lanes of a vector.
template <bool kMaskSource, int S, int V, bool kWhole>
inline void mix_tile(const Mix& p, int64_t sum, int64_t column, int lanes) {
  Lanes sums[S][V];
  SC_UNROLL
  for (int s = 0; s < S; ++s) {
    SC_UNROLL
    for (int v = 0; v < V; ++v) sums[s][v].set_zero();
  }
  const float* factors = p.factors + sum * p.sum_factors + p.begin * p.term_factors;
  const float* source = p.source + p.begin * p.columns + column;
  const uint32_t* words = p.bits + p.begin * p.row_words;
  const int64_t ahead = sum == 0 ? p.ahead : 0;
  for (int64_t term = p.begin; term < p.end; ++term) {
    Lanes vectors[V];
    SC_UNROLL
    for (int v = 0; v < V; ++v) {
      const float* const from = source + v * Lanes::kCount;
      if (kMaskSource) {
        __builtin_prefetch(from + ahead);
        vectors[v] = Lanes::load_kept(from, bits_at(words, column + v * Lanes::kCount));
      } else {
        vectors[v] = load_lanes<kWhole>(from, lanes);
      }
    }
    SC_UNROLL
    for (int s = 0; s < S; ++s) {
      const Lanes factor = Lanes::all(factors[s * p.sum_factors]);
      SC_UNROLL
      for (int v = 0; v < V; ++v) sums[s][v].add_product(factor, vectors[v]);
    }
    factors += p.term_factors, source += p.columns, words += p.row_words;
  }
  SC_UNROLL
  for (int s = 0; s < S; ++s) {
    SC_UNROLL
    for (int v = 0; v < V; ++v) {
      const int64_t first = column + v * Lanes::kCount;
      float* const target = p.target + (sum + s) * p.columns + first;
      Lanes result = sums[s][v];
      if (!kMaskSource) result = result.kept(bits_at(p.bits + (sum + s) * p.row_words, first));
      if (p.begin > 0) result.add(load_lanes<kWhole>(target, lanes));
      if (kWhole) result.store(target);
      else result.store_first(target, lanes);
    }
  }
}

// The columns [begin, end) of some sums, at most S.
template <bool kMaskSource, int S>
inline void mix_columns(const Mix& p, int64_t sum, int64_t sums, int64_t begin, int64_t end) {
  if constexpr (S > 1) {
    if (sums < S) return mix_columns<kMaskSource, S - 1>(p, sum, sums, begin, end);
  }
  constexpr int V = Lanes::kVectorTile;
  constexpr int64_t step = Lanes::kCount;
  int64_t column = begin;
  for (; column + V * step <= end; column += V * step) {
    mix_tile<kMaskSource, S, V, true>(p, sum, column, Lanes::kCount);
  }
  for (; column + step <= end; column += step) {
    mix_tile<kMaskSource, S, 1, true>(p, sum, column, Lanes::kCount);
  }
  if (column < end) {
    mix_tile<kMaskSource, S, 1, false>(p, sum, column, static_cast<int>(end - column));
  }
}

// Columns, whole words of them, of which so many rows fit into half of an L1 cache.
inline int64_t strip_of(int64_t rows) {
  const int64_t columns = 16384 / (4 * rows) / kWordBits * kWordBits;
  return columns < kWordBits ? kWordBits : columns;
}

inline void input_grad(const MaskedLinear& p, int64_t begin, int64_t end, float*) {
  constexpr int64_t tile = Lanes::kVectorTile * Lanes::kCount;
  Mix mix{p.weight, p.grad, p.result, p.inputs, p.outputs, 1, p.bits, p.row_words(), 0, 0, 0};
  const int64_t last = end * kWordBits < p.inputs ? end * kWordBits : p.inputs;
  const int64_t strip = strip_of(p.rows);
  for (int64_t first = begin * kWordBits; first < last; first += strip) {
    const int64_t stop = last - first < strip ? last : first + strip;
    for (mix.begin = 0; mix.begin < p.outputs; mix.begin = mix.end) {
      mix.end = p.outputs - mix.begin < kOutputChain ? p.outputs : mix.begin + kOutputChain;
      for (int64_t column = first; column < stop; column += tile) {
        const int64_t next = stop - column < tile ? stop : column + tile;
        mix.ahead = next < stop ? tile : first - column + kOutputChain * p.inputs;
        in_parts(p.rows, Lanes::kSumTile, [&](int64_t row, int64_t end_row) {
          mix_columns<true, Lanes::kSumTile>(mix, row, end_row - row, column, next);
        });
      }
    }
  }
}

inline void weight_grad(const MaskedLinear& p, int64_t begin, int64_t end, float*) {
  Mix mix{p.x, p.grad, p.result, p.inputs, 1, p.outputs, p.bits, p.row_words(), 0, 0, 0};
  const int64_t strip = strip_of(p.rows);
  for (int64_t first = 0; first < p.inputs; first += strip) {
    const int64_t stop = p.inputs - first < strip ? p.inputs : first + strip;
    in_parts(end - begin, Lanes::kSumTile, [&](int64_t part, int64_t next) {
      for (mix.begin = 0; mix.begin < p.rows; mix.begin = mix.end) {
        mix.end = p.rows - mix.begin < kRowChain ? p.rows : mix.begin + kRowChain;
        mix_columns<false, Lanes::kSumTile>(mix, begin + part, next - part, first, stop);
      }
    });
  }
}

#undef SC_UNROLL
