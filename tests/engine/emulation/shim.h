// What the kernels use of Metal, or of CUDA, in C++: address spaces and barriers, types, and the bits of values.
#pragma once
#include <ucontext.h>
#include <xmmintrin.h>

#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};

template <typename To, typename From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

typedef _Float16 half;

struct bfloat {
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float x) {
    uint32_t w = bits_of<uint32_t>(x);
    bits = x != x ? (w >> 16) | 0x40 : (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  }
  operator float() const { return bits_of<float>(uint32_t(bits) << 16); }
};

struct complex64_t {
  float real, imag;
};

void wait_for_the_group();

// The memory of a threadgroup, poisoned before each: a share of it for each array.
constexpr size_t SHARE = 8192;
extern char threadgroup_memory[4 * SHARE]; // Metal has no more

template <typename Array>
std::remove_extent_t<Array>* shared_array(unsigned number) {
  static_assert(sizeof(Array) <= SHARE);
  return reinterpret_cast<std::remove_extent_t<Array>*>(threadgroup_memory + number * SHARE);
}

#if defined(EMULATE_CUDA)
extern uint3 threadIdx, blockIdx;
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
typedef half __half;
typedef bfloat __nv_bfloat16;
inline uint32_t __float_as_uint(float x) {
  return bits_of<uint32_t>(x);
}
inline float __uint_as_float(uint32_t bits) {
  return bits_of<float>(bits);
}
inline uint16_t __bfloat16_as_ushort(bfloat x) {
  return x.bits;
}
inline void __syncthreads() {
  wait_for_the_group();
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
struct Strides {
  int64_t values[10];
  const int64_t& operator[](int i) const { return values[i]; }
};
#else
#define device
#define constant
#define thread
#define threadgroup
typedef half float16_t;
typedef bfloat bfloat16_t;
using std::fma;
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline void threadgroup_barrier(mem_flags) {
  wait_for_the_group();
}
template <typename To, typename From>
inline To as_type(From from) {
  return bits_of<To>(from);
}
#endif
