#include "loops.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Vectors wider than the build's own processor never leave a function, so their calling convention does not matter.
#if defined(__clang__)
#pragma clang diagnostic ignored "-Wpsabi"
#else
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace distclip {

namespace baseline { // what every processor of this architecture has: SSE2, NEON
namespace {
#define LANES 2
#define NAME "baseline"
#include "loops_body.h"
#undef LANES
#undef NAME
} // namespace
} // namespace baseline

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
namespace {
#define LANES 4
#define NAME "avx2"
#define DISTCLIP_AVX2
#include "loops_body.h"
#undef LANES
#undef NAME
#undef DISTCLIP_AVX2
} // namespace
} // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif
namespace avx512 {
namespace {
#define LANES 8
#define NAME "avx512"
#define DISTCLIP_AVX512
#include "loops_body.h"
#undef LANES
#undef NAME
#undef DISTCLIP_AVX512
} // namespace
} // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace {

const Loops& best() {
  const char* wanted = std::getenv("DISTCLIP_ISA");
  std::string_view limit = wanted ? wanted : "avx512";
  __builtin_cpu_init();
  bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (limit == "avx512" && has_avx512)
    return avx512::table;
  if (limit != "baseline" && has_avx2)
    return avx2::table;
  return baseline::table;
}

} // namespace

#else

namespace {

const Loops& best() {
  return baseline::table;
}

} // namespace

#endif

const Loops& loops() {
  static const Loops& chosen = best();
  return chosen;
}

} // namespace distclip
