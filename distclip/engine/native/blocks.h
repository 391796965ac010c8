// Large work in blocks that stay in the cache, the same blocks whatever the threads.

#pragma once

#include <cmath>
#include <cstddef>

#include "loops.h"
#include "threads.h"

namespace distclip {

constexpr size_t BLOCK = 1 << 16; // values
constexpr size_t SHARED = 1 << 17; // values from which several threads are faster

constexpr size_t blocks_of(size_t values) {
  return (values + BLOCK - 1) / BLOCK;
}

// Calls work(0) ... work(n - 1), on several threads if there are many values.
template <typename Work>
void share_if(size_t values, size_t n, Work work) {
  if (values >= SHARED)
    share(n, work);
  else
    for (size_t i = 0; i < n; i++)
      work(i);
}

// A measure of some values, and how many of them are not finite.
struct Measured {
  double value = 0, nonfinite = 0;

  void add(Measure kind, Type type, const void* values, size_t n) {
    double more = loops().measure(kind, type, values, n);
    if (!std::isfinite(more)) // else no value can be
      nonfinite += static_cast<double>(loops().count_nonfinite(type, values, n));
    combine(kind, more);
  }
  void add(Measure kind, const Measured& other) {
    nonfinite += other.nonfinite;
    combine(kind, other.value);
  }

 private:
  void combine(Measure kind, double more) {
    if (kind != Measure::largest)
      value += more;
    else if (!(std::isnan(value) || value > more))
      value = more; // NaN too
  }
};

} // namespace distclip
