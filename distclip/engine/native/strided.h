// An array of any strides as runs of neighbouring values.

#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "loops.h"
#include "mlx/array.h"

namespace distclip {

namespace mx = mlx::core;

// n values of 2, 4 or 8 bytes from one place to another, each with a distance between values.
inline void copy_steps(size_t bytes, const char* from, int64_t from_step, char* to, int64_t to_step, size_t n) {
  auto copy = [=](auto size) {
    for (size_t i = 0; i < n; i++)
      std::memcpy(to + static_cast<int64_t>(i) * to_step, from + static_cast<int64_t>(i) * from_step, size());
  };
  if (bytes == 2)
    copy(std::integral_constant<size_t, 2>());
  else if (bytes == 4)
    copy(std::integral_constant<size_t, 4>());
  else
    copy(std::integral_constant<size_t, 8>());
}

// What is left to know of an array once its memory is known: complex64 counts as twice as many float32.
struct View {
  Type type;
  char* data;
  size_t size; // values
  bool dense; // one run of memory: its values are taken in the order of memory
  mx::Shape shape; // without axes of length 1, neighbouring axes joined where memory allows it
  mx::Strides strides;

  explicit View(const mx::array& x);

  // The same array, with its values in the order of its indices.
  View in_order_of_indices() const {
    View other = *this;
    other.dense = dense && shape.size() <= 1;
    return other;
  }

  // Calls function(first, n, step, at) for the rows that make up the values from `begin` to `end`: n values that are
  // `step` bytes apart, the first of which is number `at`.
  template <typename Function>
  void for_rows(size_t begin, size_t end, Function function) const;

  // Calls function(values, n, at) for runs of neighbours that make up the values from `begin` to `end`. Dense arrays
  // and long rows are given in place, others are gathered.
  template <typename Function>
  void for_runs(size_t begin, size_t end, Function function) const;

  // Puts neighbours in the places of the values from `begin` to `end`.
  void scatter(size_t begin, size_t end, const char* values) const;
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
  mx::Shape lengths(x.shape());
  mx::Strides steps(x.strides());
  if (x.dtype() == mx::complex64) {
    size *= 2;
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

template <typename Function>
void View::for_rows(size_t begin, size_t end, Function function) const {
  const auto bytes = static_cast<int64_t>(bytes_of(type));
  if (dense || shape.empty()) {
    if (end > begin)
      function(data + static_cast<int64_t>(begin) * bytes, end - begin, bytes, begin);
    return;
  }
  const size_t axes = shape.size();
  const auto row = static_cast<size_t>(shape[axes - 1]);
  const int64_t step = strides[axes - 1] * bytes;
  for (size_t at = begin; at < end;) {
    size_t rest = at / row;
    int64_t offset = 0;
    for (size_t axis = axes - 1; axis-- > 0;) {
      auto length = static_cast<size_t>(shape[axis]);
      offset += static_cast<int64_t>(rest % length) * strides[axis];
      rest /= length;
    }
    const size_t n = std::min(row - at % row, end - at);
    function(data + offset * bytes + static_cast<int64_t>(at % row) * step, n, step, at);
    at += n;
  }
}

template <typename Function>
void View::for_runs(size_t begin, size_t end, Function function) const {
  constexpr size_t LONG = 64, GATHERED = 1024;
  alignas(64) char gathered[GATHERED * sizeof(double)];
  const size_t bytes = bytes_of(type);
  size_t filled = 0;
  auto flush = [&](size_t at) {
    if (filled > 0)
      function(static_cast<const char*>(gathered), filled, at - filled);
    filled = 0;
  };
  for_rows(begin, end, [&](const char* first, size_t n, int64_t step, size_t at) {
    if (step == static_cast<int64_t>(bytes) && (n >= LONG || n == end - begin)) {
      flush(at);
      function(first, n, at);
      return;
    }
    for (size_t taken = 0; taken < n;) {
      size_t some = std::min(n - taken, GATHERED - filled);
      copy_steps(bytes, first + static_cast<int64_t>(taken) * step, step, gathered + filled * bytes, bytes, some);
      filled += some;
      taken += some;
      if (filled == GATHERED)
        flush(at + taken);
    }
  });
  flush(end);
}

inline void View::scatter(size_t begin, size_t end, const char* values) const {
  const size_t bytes = bytes_of(type);
  for_rows(begin, end, [&](char* first, size_t n, int64_t step, size_t at) {
    const char* from = values + (at - begin) * bytes;
    if (step == static_cast<int64_t>(bytes))
      std::memcpy(first, from, n * bytes);
    else
      copy_steps(bytes, from, static_cast<int64_t>(bytes), first, step, n);
  });
}

} // namespace distclip
