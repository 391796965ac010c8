// The types of values as vectors, for loops_body.h, which includes it once for each instruction set.

template <typename T, size_t n>
using Vector [[gnu::vector_size(n * sizeof(T))]] = T;

// Floats are converted to Doubles: to one register, or where an instruction takes the upper half of a register, to two.
#if defined(__aarch64__)
constexpr size_t FLOATS = 2 * LANES;
#else
constexpr size_t FLOATS = LANES;
#endif

using Doubles = Vector<double, LANES>;
using Floats = Vector<float, FLOATS>;
using Words = Vector<uint32_t, FLOATS>;

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
// vectors at once, in the order of memory or in another that narrow() undoes, or one value at a time.
struct F32 {
  using Bits = int32_t;
  using One = float;
  using Wide = Floats;
  static constexpr size_t count = 1;
  static constexpr bool in_order = true;
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
#if defined(__aarch64__)
  static constexpr bool in_order = true;
  static void widen(const void* x, Wide* v) {
    auto h = load<uint16x8_t>(x);
    v[0] = bits<Floats>(vshll_n_u16(vget_low_u16(h), 16));
    v[1] = bits<Floats>(vshll_high_n_u16(h, 16));
  }
  static void narrow(void* y, const Wide* v) {
    store(y, vuzp2q_u16(bits<uint16x8_t>(rounded(v[0])), bits<uint16x8_t>(rounded(v[1]))));
  }
#else
  static constexpr bool in_order = false;
  static void widen(const void* x, Wide* v) { // every second value, and the others
    Words w = load<Words>(x);
    v[0] = bits<Floats>(w << 16);
    v[1] = bits<Floats>(w & 0xffff0000);
  }
  static void narrow(void* y, const Wide* v) { store(y, (rounded(v[0]) >> 16) | (rounded(v[1]) & 0xffff0000)); }
#endif
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
  static constexpr bool in_order = true;
  static constexpr Bits magnitude = 0x7fff, infinity = 0x7c00;
#if defined(__aarch64__)
  static constexpr size_t count = 2;
  static void widen(const void* x, Wide* v) {
    auto h = load<float16x8_t>(x);
    v[0] = bits<Floats>(vcvt_f32_f16(vget_low_f16(h)));
    v[1] = bits<Floats>(vcvt_high_f32_f16(h));
  }
  static void narrow(void* y, const Wide* v) {
    store(y, vcvt_high_f16_f32(vcvt_f16_f32(bits<float32x4_t>(v[0])), bits<float32x4_t>(v[1])));
  }
  static float widen_one(Bits x) { return static_cast<float>(std::bit_cast<__fp16>(x)); }
  static Bits narrow_one(float x) { return std::bit_cast<Bits>(static_cast<__fp16>(x)); }
#else
  static constexpr size_t count = 1;
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
  static constexpr bool in_order = true;
  static constexpr Bits magnitude = 0x7fffffffffffffff, infinity = 0x7ff0000000000000;
  static void widen(const void* x, Wide* v) { v[0] = load<Doubles>(x); }
  static void narrow(void* y, const Wide* v) { store(y, v[0]); }
  static double widen_one(Bits x) { return std::bit_cast<double>(x); }
  static Bits narrow_one(double x) { return std::bit_cast<Bits>(x); }
};
