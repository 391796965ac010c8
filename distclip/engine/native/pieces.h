// Large work in pieces that stay in the cache, the same pieces whatever the threads.

#pragma once

#include <cmath>
#include <cstddef>

#include "loops.h"
#include "threads.h"

namespace distclip {

constexpr size_t PIECE = 1 << 16; // values
constexpr size_t SHARED = 1 << 17; // values from which several threads are faster

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
  double found = 0, bad = 0;

  void add(Measure kind, Type type, const void* values, size_t n) {
    double more = loops().measure(kind, type, values, n);
    if (!std::isfinite(more)) // else no value can be
      bad += static_cast<double>(loops().count_nonfinite(type, values, n));
    combine(kind, more);
  }
  void add(Measure kind, const Measured& other) {
    bad += other.bad;
    combine(kind, other.found);
  }

 private:
  void combine(Measure kind, double more) {
    if (kind != Measure::largest)
      found += more;
    else if (!(std::isnan(found) || found > more))
      found = more; // NaN too
  }
};

} // namespace distclip
