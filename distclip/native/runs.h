// An array of any strides as runs of neighbouring values.

#pragma once

#include <algorithm>
#include <cstring>

#include "loops.h"
#include "mlx/array.h"

namespace distclip {

namespace mx = mlx::core;

// What is left to know of an array once its memory is known: complex64 counts as twice as many float32.
struct View {
  Type type;
  char* data;
  size_t size; // values
  bool dense; // one run of memory, in the order of memory
  mx::Shape shape; // else: without axes of length 1, neighbouring axes joined where memory allows it
  mx::Strides strides;

  explicit View(const mx::array& x);

  // Calls function(values, n, at) for runs that make up the values from `begin` to `end`: n values, the first of which
  // is number `at`. Dense arrays and long rows are given in place, others are gathered.
  template <typename Function>
  void for_runs(size_t begin, size_t end, Function function) const;
};

inline Type type_of(mx::Dtype dtype) {
  switch (dtype.val()) {
    case mx::Dtype::Val::float16: return Type::f16;
    case mx::Dtype::Val::bfloat16: return Type::bf16;
    case mx::Dtype::Val::float64: return Type::f64;
    default: return Type::f32;
  }
}

inline View::View(const mx::array& x)
    : type(type_of(x.dtype())),
      data(const_cast<char*>(x.data<char>())),
      size(x.size()),
      dense(x.size() <= 1 || (x.flags().contiguous && x.data_size() == x.size())) {
  bool complex = x.dtype() == mx::complex64;
  if (!dense) {
    mx::Shape lengths(x.shape());
    mx::Strides steps(x.strides());
    if (complex) {
      for (auto& step : steps)
        step *= 2;
      lengths.push_back(2);
      steps.push_back(1);
    }
    for (size_t axis = 0; axis < lengths.size(); axis++) {
      if (lengths[axis] == 1)
        continue;
      if (!shape.empty() && strides.back() == steps[axis] * lengths[axis]) {
        shape.back() *= lengths[axis];
        strides.back() = steps[axis];
      } else {
        shape.push_back(lengths[axis]);
        strides.push_back(steps[axis]);
      }
    }
  }
  size *= complex ? 2 : 1;
}

template <typename Function>
void View::for_runs(size_t begin, size_t end, Function function) const {
  const size_t bytes = bytes_of(type);
  if (dense) {
    if (end > begin)
      function(data + begin * bytes, end - begin, begin);
    return;
  }
  constexpr size_t LONG = 64, GATHERED = 1024;
  alignas(64) char gathered[GATHERED * sizeof(double)];
  size_t filled = 0;
  auto flush = [&](size_t at) {
    if (filled > 0)
      function(static_cast<const char*>(gathered), filled, at - filled);
    filled = 0;
  };
  const size_t axes = shape.size();
  const auto row = static_cast<size_t>(shape[axes - 1]);
  const int64_t step = strides[axes - 1] * static_cast<int64_t>(bytes);
  for (size_t at = begin; at < end;) {
    size_t rest = at / row;
    int64_t offset = 0;
    for (size_t axis = axes - 1; axis-- > 0;) {
      auto length = static_cast<size_t>(shape[axis]);
      offset += static_cast<int64_t>(rest % length) * strides[axis];
      rest /= length;
    }
    const char* first = data + offset * static_cast<int64_t>(bytes) + static_cast<int64_t>(at % row) * step;
    const size_t n = std::min(row - at % row, end - at);
    if (step == static_cast<int64_t>(bytes) && n >= LONG) {
      flush(at);
      function(first, n, at);
      at += n;
      continue;
    }
    for (size_t taken = 0; taken < n;) {
      size_t some = std::min(n - taken, GATHERED - filled);
      for (size_t i = 0; i < some; i++)
        std::memcpy(gathered + (filled + i) * bytes, first + static_cast<int64_t>(taken + i) * step, bytes);
      filled += some;
      taken += some;
      if (filled == GATHERED)
        flush(at + taken);
    }
    at += n;
  }
  flush(end);
}

} // namespace distclip
