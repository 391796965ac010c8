// Included once for each instruction set, inside a namespace of its own that has compiler flags of its own.
// LANES is how many float64 a register holds. No #pragma once: it is meant to be included again.

#include "loops_types.h"

inline void to_doubles(Floats v, Doubles* to) {
#if defined(__aarch64__)
  auto floats = bits<float32x4_t>(v);
  to[0] = bits<Doubles>(vcvt_f64_f32(vget_low_f32(floats)));
  to[1] = bits<Doubles>(vcvt_high_f64_f32(floats));
#else
  to[0] = __builtin_convertvector(v, Doubles);
#endif
}
inline void to_doubles(Doubles v, Doubles* to) {
  to[0] = v;
}

template <Measure M>
inline Doubles term(Doubles v) {
  if constexpr (M == Measure::squares)
    return v * v;
  else
    return bits<Doubles>(bits<Vector<int64_t, LANES>>(v) & F64::magnitude);
}

template <Measure M>
inline double term(double v) {
  return M == Measure::squares ? v * v : v < 0 ? -v : v;
}

template <typename T>
constexpr size_t values = T::count * sizeof(typename T::Wide) / sizeof(typename T::One); // that widen() reads

template <typename T>
constexpr size_t registers = values<T> / LANES; // of float64, that they fill

template <typename T>
inline void widen_to_doubles(const void* x, Doubles* to) {
  typename T::Wide v[T::count];
  T::widen(x, v);
  for (size_t k = 0; k < T::count; k++)
    to_doubles(v[k], to + k * (registers<T> / T::count));
}

// Functions of their own, so that the assembly shows each loop under its name.
template <Measure M, typename T>
[[gnu::noinline]] double sum(const void* data, size_t n) {
  constexpr size_t parallel = 8; // sums that do not wait for each other
  const auto* x = static_cast<const typename T::Bits*>(data);
  Doubles sums[parallel] = {};
  Doubles v[registers<T>] = {};
  size_t i = 0;
  for (; i + parallel * LANES <= n; i += parallel * LANES)
#if defined(__aarch64__) // else g++ keeps the sums in memory
#pragma GCC unroll 8
#endif
    for (size_t j = 0; j < parallel; j += registers<T>) {
      widen_to_doubles<T>(x + i + j * LANES, v);
      for (size_t k = 0; k < registers<T>; k++)
        sums[j + k] += term<M>(v[k]);
    }
  for (; i + values<T> <= n; i += values<T>) {
    widen_to_doubles<T>(x + i, v);
    for (size_t k = 0; k < registers<T>; k++)
      sums[k] += term<M>(v[k]);
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
[[gnu::noinline]] double largest(const void* data, size_t n) {
  using Bits = typename T::Bits;
  constexpr size_t lanes = LANES * sizeof(double) / sizeof(Bits);
  using Many = Vector<Bits, lanes>;
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
[[gnu::noinline]] size_t count(const void* data, size_t n) {
  using Bits = typename T::Bits;
  size_t nonfinite = 0;
  for (size_t i = 0; i < n; i++)
    nonfinite += (load<Bits>(static_cast<const Bits*>(data) + i) & T::infinity) == T::infinity;
  return nonfinite;
}

template <typename T>
[[gnu::noinline]] void scale(const void* from, void* to, size_t n, float factor) {
  using Bits = typename T::Bits;
  const auto* x = static_cast<const Bits*>(from);
  auto* y = static_cast<Bits*>(to);
  constexpr size_t parallel = 4, step = values<T>;
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
[[gnu::noinline]] void convert(const void* from, void* to, size_t n, float factor) {
  const auto* x = static_cast<const typename From::Bits*>(from);
  auto* __restrict__ y = static_cast<typename To::Bits*>(to);
  const typename From::One f = factor;
  size_t i = 0;
  if constexpr (From::in_order && To::in_order && std::is_same_v<typename From::Wide, typename To::Wide>) {
    constexpr size_t count = std::max(From::count, To::count), lanes = values<From> / From::count;
    typename From::Wide v[count] = {};
    for (; i + count * lanes <= n; i += count * lanes) {
      for (size_t k = 0; k < count; k += From::count)
        From::widen(x + i + k * lanes, v + k);
      for (size_t k = 0; k < count; k++)
        v[k] *= f;
      for (size_t k = 0; k < count; k += To::count)
        To::narrow(y + i + k * lanes, v + k);
    }
  }
  for (; i < n; i++)
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
