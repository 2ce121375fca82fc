// The loops of soft_topk.h for fp32 over vectors of kBytes, which the compiler lowers to the level
// whose namespace includes this file. No inline function of the C++ library may be called here.

constexpr int kFloats = kBytes / 4, kHalf = kFloats / 2;
constexpr int kFlush = 8;  // additions in fp32 before a sum moves on to fp64

typedef float Vector __attribute__((vector_size(kBytes)));
typedef int32_t Integers __attribute__((vector_size(kBytes)));
typedef float HalfVector __attribute__((vector_size(kBytes / 2)));
typedef double Doubles __attribute__((vector_size(kBytes)));

#define SOFT_INLINE inline __attribute__((always_inline))

// Vectors travel by reference: by value, their ABI would depend on the level.
SOFT_INLINE void load(const float* p, Vector& v) { __builtin_memcpy(&v, p, sizeof(Vector)); }
SOFT_INLINE void store(const Vector& v, float* p) { __builtin_memcpy(p, &v, sizeof(Vector)); }

SOFT_INLINE void halves(const Vector& v, Doubles& low, Doubles& high) {
  HalfVector half[2];
  __builtin_memcpy(half, &v, sizeof(Vector));
  low = __builtin_convertvector(half[0], Doubles);
  high = __builtin_convertvector(half[1], Doubles);
}

struct Sum {
  Vector recent{};
  Doubles total{};

  SOFT_INLINE void flush() {
    Doubles low, high;
    halves(recent, low, high);
    total += low + high;
    recent = Vector{};
  }
  SOFT_INLINE void add_product(const Vector& a, const Vector& b) {
    Doubles a2[2], b2[2];
    halves(a, a2[0], a2[1]), halves(b, b2[0], b2[1]);
    total += a2[0] * b2[0] + a2[1] * b2[1];
  }
  SOFT_INLINE double result() {
    flush();
    double sum = 0;
    for (int i = 0; i < kHalf; ++i) sum += total[i];
    return sum;
  }
};

// e = exp(-x), and m = 1 / (1 + e). 2^f on [-1/2, 1/2] is a polynomial through Chebyshev's nodes,
// 2.5e-9 off, less than fp32 rounds. Beyond 2^126 m stays a tiny normal number.
SOFT_INLINE void logistic(const Vector& x, Vector& e, Vector& m) {
  constexpr float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to whole numbers
  Vector y = x * -1.44269504f;
  y = y < 126.f ? y : Vector{} + 126.f;
  y = y > -126.f ? y : Vector{} - 126.f;
  const Vector shifted = y + magic;
  const Vector f = y - (shifted - magic);
  Vector p = f * 0.000154614447f + 0.00134004282f;
  p = p * f + 0.00961805668f;
  p = p * f + 0.0555032723f;
  p = p * f + 0.240226509f;
  p = p * f + 0.693147207f;
  p = p * f + 1.f;
  Integers bits, power;
  __builtin_memcpy(&bits, &p, sizeof p);
  __builtin_memcpy(&power, &shifted, sizeof power);
  bits += power << 23;  // the low bits of `shifted` are the whole number
  __builtin_memcpy(&e, &bits, sizeof e);
  m = 1.f / (1.f + e);
}

// x of one vector of values.
struct Argument {
  Line line;
  float threshold, steep, shift;

  SOFT_INLINE explicit Argument(const Line& l)
      : line(l), threshold(static_cast<float>(l.threshold)), steep(static_cast<float>(l.steep)),
        shift(static_cast<float>(l.shift)) {}

  template <bool kCosts>
  SOFT_INLINE void of(Vector v, const Vector& c, Vector& x) const {
    constexpr float largest = static_cast<float>(kLargestValue);
    v = v < largest ? v : Vector{} + largest;  // NaN too: it compares as false
    v = v > -largest ? v : Vector{} - largest;
    if constexpr (!kCosts) {
      x = steep * (v - threshold) + shift;  // near the threshold the difference is exact
    } else {  // a ratio rounded to fp32 would move by beta times as much
      Doubles v2[2], c2[2];
      halves(v, v2[0], v2[1]), halves(c, c2[0], c2[1]);
      HalfVector half[2];
      for (int i = 0; i < 2; ++i) {
        const Doubles exact = line.steep * (v2[i] / c2[i] - line.threshold) + line.shift;
        half[i] = __builtin_convertvector(exact, HalfVector);
      }
      __builtin_memcpy(&x, half, sizeof x);
    }
  }
};

// body(where, number of values): whole vectors, then what is left of a chunk.
template <class Body>
SOFT_INLINE void for_vectors(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) body(i, kFloats);
  if (i < count) body(i, static_cast<int>(count - i));
}

// Lanes beyond `count` are 1: a value and a cost that disturb nothing.
SOFT_INLINE void load_first(const float* p, int count, Vector& v) {
  if (count == kFloats) return load(p, v);
  float lanes[kFloats];
  for (int i = 0; i < kFloats; ++i) lanes[i] = i < count ? p[i] : 1.f;
  load(lanes, v);
}
SOFT_INLINE void store_first(const Vector& v, int count, float* p) {
  if (count == kFloats) return store(v, p);
  for (int i = 0; i < count; ++i) p[i] = v[i];
}
SOFT_INLINE void clear_rest(int count, Vector& v) {
  for (int i = count; i < kFloats; ++i) v[i] = 0.f;
}

template <bool kCosts>
void moments_of(const float* values, const float* costs, int64_t count, const Line& line,
                Moments& sums) {
  const Argument argument(line);
  Sum mass, slope, bend;
  int waiting = 0;
  for_vectors(count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    Vector v, c{}, x, e, m;
    load_first(values + i, lanes, v);
    if constexpr (kCosts) load_first(costs + i, lanes, c);
    argument.of<kCosts>(v, c, x);
    logistic(x, e, m);
    const Vector rest = e * m, one_less = rest - m;  // 1 - m, and 1 - 2 m
    if (lanes != kFloats) clear_rest(lanes, m);
    Vector q = m * rest;
    if constexpr (kCosts) {  // products rounded to fp32 would blur the mask of a hard threshold
      q *= c;
      mass.add_product(m, c);
    } else {
      mass.recent += m;
    }
    slope.recent += q, bend.recent += q * one_less;
    if (++waiting == kFlush) mass.flush(), slope.flush(), bend.flush(), waiting = 0;
  });
  sums.mass = mass.result(), sums.slope = slope.result(), sums.bend = bend.result();
}

template <bool kCosts>
void masks_of(const float* values, const float* costs, int64_t count, const Line& line,
              float* masks) {
  const Argument argument(line);
  for_vectors(count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    Vector v, c{}, x, e, m;
    load_first(values + i, lanes, v);
    if constexpr (kCosts) load_first(costs + i, lanes, c);
    argument.of<kCosts>(v, c, x);
    logistic(x, e, m);
    m = x > -87.f ? m : Vector{};
    store_first(m, lanes, masks + i);
  });
}

template <bool kCosts>
void shares_of(const float* grads, const float* masks, const float* costs, int64_t count,
               Shares& sums) {
  Sum earned, spent;
  int waiting = 0;
  for_vectors(count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    Vector g, m, c{};
    load_first(grads + i, lanes, g);
    load_first(masks + i, lanes, m);  // lanes beyond the last have m = 1, q = 0
    Vector q = m * (1.f - m);
    earned.recent += g * q;
    if constexpr (kCosts) load_first(costs + i, lanes, c), q *= c;
    spent.recent += q;
    if (++waiting == kFlush) earned.flush(), spent.flush(), waiting = 0;
  });
  sums.earned = earned.result(), sums.spent = spent.result();
}

template <bool kCosts>
void grads_of(const float* grads, const float* masks, const float* costs, int64_t count,
              double scale, double price, float* results) {
  const float by = static_cast<float>(scale), less = static_cast<float>(price);
  for_vectors(count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    Vector g, m, c{};
    load_first(grads + i, lanes, g);
    load_first(masks + i, lanes, m);
    if constexpr (kCosts) load_first(costs + i, lanes, c), g /= c;
    const Vector result = m * (1.f - m) * by * (g - less);
    store_first(result, lanes, results + i);
  });
}

void moments(const float* values, const float* costs, int64_t count, const Line& line,
             Moments& sums) {
  costs ? moments_of<true>(values, costs, count, line, sums)
        : moments_of<false>(values, costs, count, line, sums);
}
void masks(const float* values, const float* costs, int64_t count, const Line& line, float* m) {
  costs ? masks_of<true>(values, costs, count, line, m)
        : masks_of<false>(values, costs, count, line, m);
}
void shares(const float* g, const float* m, const float* costs, int64_t count, Shares& sums) {
  costs ? shares_of<true>(g, m, costs, count, sums) : shares_of<false>(g, m, costs, count, sums);
}
void grads(const float* g, const float* m, const float* costs, int64_t count, double scale,
           double price, float* results) {
  costs ? grads_of<true>(g, m, costs, count, scale, price, results)
        : grads_of<false>(g, m, costs, count, scale, price, results);
}

#undef SOFT_INLINE
