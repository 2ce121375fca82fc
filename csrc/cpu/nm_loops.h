// The products behind nm_kernels.h, written over a vector type `Lanes` of a level:
//
//   kCount                      floats per vector, a divisor of 32
//   kRows                       rows of x whose sums, with kOutputsAtOnce outputs, fit in registers
//   Input                       type of the elements of x
//   load(p)                     neighbours from any address
//   spread<F>(stream, mask)     the stream's next values where the mask's kCount bits are set, as
//                               floats, zeros elsewhere; may read kCount values
//   set_zero(), add_product(a, b), sum()
//   count_bits(mask)            how many bits are set
//
// Nothing here may call inline functions of the C++ library, see kernels.h.

// R rows of x. A spread value meets all of them, and inputs meet all outputs, in registers. The
// first rows fetch what the next outputs read: the hardware follows neither so many streams nor
// from one page to the next.
template <class F, int R, bool kFetch>
inline void multiply_rows(const NmProduct<typename F::Raw>& p, int64_t row) {
  constexpr int O = kOutputsAtOnce;
  const typename F::Raw* streams[O];
  for (int o = 0; o < O; ++o) streams[o] = p.values[o];
  const auto* const x = static_cast<const Lanes::Input*>(p.x) + row * p.x_pitch;
  Lanes sums[O][R];
  for (int o = 0; o < O; ++o) {
    for (int r = 0; r < R; ++r) sums[o][r].set_zero();
  }
  for (int64_t w = 0; w < p.row_words; ++w) {
    uint32_t words[O];
    for (int o = 0; o < O; ++o) {
      words[o] = p.words[o][w];
      if constexpr (kFetch) {
        __builtin_prefetch(streams[o] + p.next_values, 0, 2);
        if (w % 16 == 0) __builtin_prefetch(p.words[o] + O * p.row_words + w, 0, 2);
      }
    }
    for (int first = 0; first < kWordBits; first += Lanes::kCount) {
      Lanes inputs[R];
      for (int r = 0; r < R; ++r) {
        inputs[r] = Lanes::load(x + r * p.x_pitch + w * kWordBits + first);
      }
      for (int o = 0; o < O; ++o) {
        const uint32_t mask = words[o] >> first & low_bits(Lanes::kCount);
        const Lanes weights = Lanes::spread(F{}, streams[o], mask);
        streams[o] += Lanes::count_bits(mask);
        for (int r = 0; r < R; ++r) sums[o][r].add_product(weights, inputs[r]);
      }
    }
  }
  for (int o = 0; o < O; ++o) {
    for (int r = 0; r < R; ++r) p.sums[(row + r) * p.pitch + o] = sums[o][r].sum();
  }
}

template <class F, int R>
inline void multiply_last(const NmProduct<typename F::Raw>& p, int64_t row) {
  if constexpr (R > 0) {
    if (p.rows - row == R) {
      return row == 0 ? multiply_rows<F, R, true>(p, row) : multiply_rows<F, R, false>(p, row);
    }
    multiply_last<F, R - 1>(p, row);
  }
}

template <class F>
void multiply(const NmProduct<typename F::Raw>& p) {
  constexpr int R = Lanes::kRows;
  int64_t row = 0;
  if (p.rows >= R) {
    multiply_rows<F, R, true>(p, row);
    for (row += R; row + R <= p.rows; row += R) multiply_rows<F, R, false>(p, row);
  }
  multiply_last<F, R - 1>(p, row);
}
