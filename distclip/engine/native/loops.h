// The loops over one run of memory, in the widest instructions that this processor has.

#pragma once

#include <cstddef>
#include <cstdint>

namespace distclip {

enum class Type { f32, f16, bf16, f64 }; // complex64 is two float32
enum class Measure { squares, magnitudes, largest };

constexpr size_t bytes_of(Type type) {
  return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2;
}

struct Loops {
  const char* name; // of the instruction set
  // The sum of x*x, the sum of |x|, or the largest |x|, in float64. Not finite if and only if a value is not, but for
  // float64 values whose square or sum overflows. The largest of values with a NaN among them is NaN.
  double (*measure)(Measure, Type, const void* x, size_t n);
  // How many values are NaN or infinite.
  size_t (*count_nonfinite)(Type, const void* x, size_t n);
  // y = x * factor, computed in float32 (float64 for float64) and rounded to nearest even; y may be x.
  void (*scale)(Type, const void* x, void* y, size_t n, float factor);
  // The same from one type to another; y is not x.
  void (*convert)(Type from, Type to, const void* x, void* y, size_t n, float factor);
};

// The best of the instruction sets that were compiled and that this processor has; or the one that the environment
// variable DISTCLIP_ISA names (baseline, avx2, avx512), which the tests use.
const Loops& loops();

} // namespace distclip
