// Included once for each instruction set, inside a namespace of its own that has compiler flags of its own.
// LANES is how many float64 a register holds. No #pragma once: it is meant to be included again.

template <typename T>
using Vector [[gnu::vector_size(LANES * sizeof(T))]] = T;

using Doubles = Vector<double>;
using Floats = Vector<float>;
using Words = Vector<uint32_t>;

template <typename V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <typename V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

// std::bit_cast for vectors, which must not leave functions of this instruction set.
template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// For each type: the bits of one value, and how values become vectors of the type that arithmetic is done in: `count`
// vectors at once, in any order that narrow() undoes, or one value at a time.
struct F32 {
  using Bits = int32_t;
  using One = float;
  using Wide = Floats;
  static constexpr size_t count = 1;
  static constexpr Bits magnitude = 0x7fffffff, infinity = 0x7f800000;
  static void widen(const void* x, Wide* v) { v[0] = load<Floats>(x); }
  static void narrow(void* y, const Wide* v) { store(y, v[0]); }
  static float widen_one(Bits x) { return std::bit_cast<float>(x); }
  static Bits narrow_one(float x) { return std::bit_cast<Bits>(x); }
};

struct BF16 {
  using Bits = int16_t;
  using One = float;
  using Wide = Floats;
  static constexpr size_t count = 2;
  static constexpr Bits magnitude = 0x7fff, infinity = 0x7f80;
  static void widen(const void* x, Wide* v) { // every second value, and the others
    Words w = load<Words>(x);
    v[0] = bits<Floats>(w << 16);
    v[1] = bits<Floats>(w & 0xffff0000);
  }
  static void narrow(void* y, const Wide* v) { store(y, (rounded(v[0]) >> 16) | (rounded(v[1]) & 0xffff0000)); }
  static Words rounded(Wide v) { // in the upper half of each word
    Words w = bits<Words>(v);
    return bits<Words>(v != v) ? w | 0x400000 : w + 0x7fff + ((w >> 16) & 1); // a carry would make a NaN infinite
  }
  static float widen_one(Bits x) { return std::bit_cast<float>(static_cast<uint32_t>(static_cast<uint16_t>(x)) << 16); }
  static Bits narrow_one(float x) {
    uint32_t w = std::bit_cast<uint32_t>(x);
    return static_cast<Bits>(x != x ? (w >> 16) | 0x40 : (w + 0x7fff + ((w >> 16) & 1)) >> 16);
  }
};

struct F16 {
  using Bits = int16_t;
  using One = float;
  using Wide = Floats;
  static constexpr size_t count = 1;
  static constexpr Bits magnitude = 0x7fff, infinity = 0x7c00;
#if defined(__aarch64__)
  using Hardware = Vector<__fp16>;
  static void widen(const void* x, Wide* v) { v[0] = __builtin_convertvector(load<Hardware>(x), Floats); }
  static void narrow(void* y, const Wide* v) { store(y, __builtin_convertvector(v[0], Hardware)); }
  static float widen_one(Bits x) { return static_cast<float>(std::bit_cast<__fp16>(x)); }
  static Bits narrow_one(float x) { return std::bit_cast<Bits>(static_cast<__fp16>(x)); }
#else
#if defined(DISTCLIP_AVX512)
  static void widen(const void* x, Wide* v) { v[0] = bits<Floats>(_mm256_cvtph_ps(load<__m128i>(x))); }
  static void narrow(void* y, const Wide* v) {
    store(y, _mm256_cvtps_ph(bits<__m256>(v[0]), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif defined(DISTCLIP_AVX2)
  static void widen(const void* x, Wide* v) {
    v[0] = bits<Floats>(_mm_cvtph_ps(_mm_loadl_epi64(static_cast<const __m128i*>(x))));
  }
  static void narrow(void* y, const Wide* v) {
    _mm_storel_epi64(
        static_cast<__m128i*>(y), _mm_cvtps_ph(bits<__m128>(v[0]), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  static void widen(const void* x, Wide* v) {
    for (int i = 0; i < LANES; i++)
      v[0][i] = widen_one(load<Bits>(static_cast<const Bits*>(x) + i));
  }
  static void narrow(void* y, const Wide* v) {
    for (int i = 0; i < LANES; i++)
      store(static_cast<Bits*>(y) + i, narrow_one(v[0][i]));
  }
#endif
  static float widen_one(Bits x) {
    uint32_t h = static_cast<uint16_t>(x), sign = (h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) // infinite or NaN
      return std::bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude < 0x400) { // subnormal: a whole number of 2**-24
      float value = static_cast<float>(magnitude) * 0x1p-24f;
      return sign ? -value : value;
    }
    return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  }
  static Bits narrow_one(float x) {
    uint32_t w = std::bit_cast<uint32_t>(x), sign = (w >> 16) & 0x8000, m = w & 0x7fffffff;
    if (m > 0x7f800000)
      return static_cast<Bits>(sign | 0x7e00 | ((m >> 13) & 0x3ff));
    if (m >= 0x477ff000) // rounds beyond 65504
      return static_cast<Bits>(sign | 0x7c00);
    if (m < 0x38800000) { // subnormal: adding 0.5 leaves its multiple of 2**-24, rounded, in the last bits
      float shifted = std::bit_cast<float>(m) + 0.5f;
      return static_cast<Bits>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000));
    }
    return static_cast<Bits>(sign | ((m - (112u << 23) + 0xfff + ((m >> 13) & 1)) >> 13));
  }
#endif
};

struct F64 {
  using Bits = int64_t;
  using One = double;
  using Wide = Doubles;
  static constexpr size_t count = 1;
  static constexpr Bits magnitude = 0x7fffffffffffffff, infinity = 0x7ff0000000000000;
  static void widen(const void* x, Wide* v) { v[0] = load<Doubles>(x); }
  static void narrow(void* y, const Wide* v) { store(y, v[0]); }
  static double widen_one(Bits x) { return std::bit_cast<double>(x); }
  static Bits narrow_one(double x) { return std::bit_cast<Bits>(x); }
};

inline Doubles to_doubles(Floats v) {
  return __builtin_convertvector(v, Doubles);
}
inline Doubles to_doubles(Doubles v) {
  return v;
}

template <Measure M>
inline Doubles term(Doubles v) {
  if constexpr (M == Measure::squares)
    return v * v;
  else
    return bits<Doubles>(bits<Vector<int64_t>>(v) & F64::magnitude);
}

template <Measure M>
inline double term(double v) {
  return M == Measure::squares ? v * v : v < 0 ? -v : v;
}

template <Measure M, typename T>
double sum(const void* data, size_t n) {
  constexpr size_t parallel = 8; // sums that do not wait for each other
  constexpr size_t step = T::count * LANES;
  const auto* x = static_cast<const typename T::Bits*>(data);
  Doubles sums[parallel] = {};
  typename T::Wide v[T::count] = {};
  size_t i = 0;
  for (; i + parallel * LANES <= n; i += parallel * LANES)
    for (size_t j = 0; j < parallel; j += T::count) {
      T::widen(x + i + j * LANES, v);
      for (size_t k = 0; k < T::count; k++)
        sums[j + k] += term<M>(to_doubles(v[k]));
    }
  for (; i + step <= n; i += step) {
    T::widen(x + i, v);
    for (size_t k = 0; k < T::count; k++)
      sums[k] += term<M>(to_doubles(v[k]));
  }
  Doubles all = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  double total = 0;
  for (int lane = 0; lane < LANES; lane++)
    total += all[lane];
  for (; i < n; i++)
    total += term<M>(static_cast<double>(T::widen_one(load<typename T::Bits>(x + i))));
  return total;
}

// With the sign cleared, the bits of floating values are in the order of the values, and NaN comes last.
template <typename T>
double largest(const void* data, size_t n) {
  using Bits = typename T::Bits;
  constexpr size_t lanes = LANES * sizeof(double) / sizeof(Bits);
  using Many [[gnu::vector_size(LANES * sizeof(double))]] = Bits;
  const auto* x = static_cast<const Bits*>(data);
  Many most[4] = {};
  size_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes)
    for (size_t j = 0; j < 4; j++) {
      Many v = load<Many>(x + i + j * lanes) & T::magnitude;
      most[j] = v > most[j] ? v : most[j];
    }
  Bits top = 0;
  for (auto& some : most)
    for (size_t lane = 0; lane < lanes; lane++)
      top = some[lane] > top ? some[lane] : top;
  for (; i < n; i++) {
    Bits v = load<Bits>(x + i) & T::magnitude;
    top = v > top ? v : top;
  }
  return static_cast<double>(T::widen_one(top));
}

template <typename T>
size_t count(const void* data, size_t n) {
  using Bits = typename T::Bits;
  size_t nonfinite = 0;
  for (size_t i = 0; i < n; i++)
    nonfinite += (load<Bits>(static_cast<const Bits*>(data) + i) & T::infinity) == T::infinity;
  return nonfinite;
}

template <typename T>
void scale(const void* from, void* to, size_t n, float factor) {
  using Bits = typename T::Bits;
  const auto* x = static_cast<const Bits*>(from);
  auto* y = static_cast<Bits*>(to);
  constexpr size_t parallel = 4, step = T::count * LANES;
  typename T::One f = factor;
  typename T::Wide v[T::count] = {};
  size_t i = 0;
  for (; i + parallel * step <= n; i += parallel * step)
    for (size_t j = 0; j < parallel; j++) {
      T::widen(x + i + j * step, v);
      for (size_t k = 0; k < T::count; k++)
        v[k] *= f;
      T::narrow(y + i + j * step, v);
    }
  for (; i < n; i++)
    store(y + i, T::narrow_one(T::widen_one(load<Bits>(x + i)) * f));
}

template <typename From, typename To>
void convert(const void* from, void* to, size_t n, float factor) {
  const auto* x = static_cast<const typename From::Bits*>(from);
  auto* __restrict__ y = static_cast<typename To::Bits*>(to);
  const typename From::One f = factor;
  for (size_t i = 0; i < n; i++)
    y[i] = To::narrow_one(static_cast<typename To::One>(From::widen_one(load<typename From::Bits>(x + i)) * f));
}

template <typename Function>
inline auto by_type(Type type, Function function) {
  switch (type) {
    case Type::f32: return function(F32{});
    case Type::f16: return function(F16{});
    case Type::bf16: return function(BF16{});
    default: return function(F64{});
  }
}

double measure_(Measure measure, Type type, const void* x, size_t n) {
  return by_type(type, [=](auto t) {
    using T = decltype(t);
    switch (measure) {
      case Measure::squares: return sum<Measure::squares, T>(x, n);
      case Measure::magnitudes: return sum<Measure::magnitudes, T>(x, n);
      default: return largest<T>(x, n);
    }
  });
}

size_t count_(Type type, const void* x, size_t n) {
  return by_type(type, [=](auto t) { return count<decltype(t)>(x, n); });
}

void scale_(Type type, const void* x, void* y, size_t n, float factor) {
  by_type(type, [=](auto t) { scale<decltype(t)>(x, y, n, factor); });
}

void convert_(Type from, Type to, const void* x, void* y, size_t n, float factor) {
  by_type(from, [=](auto a) { by_type(to, [=](auto b) { convert<decltype(a), decltype(b)>(x, y, n, factor); }); });
}

const Loops table = {NAME, measure_, count_, scale_, convert_};
