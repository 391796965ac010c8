// Measures leaves on a GPU: SQUARES (the sum of |x|^2), MAGNITUDES (of |x|) or LARGEST (the largest |x|).
//
// Metal's words that CUDA has not are in capitals: metal.h and cuda.h say what they mean. source.py defines the
// constants and writes the body, which selects the leaf and calls measure(). A threadgroup measures CHUNK neighbouring
// values of a leaf and writes COLUMNS float32: three sums hi + lo, of the values of usual size, of the large ones times
// 2^-77 and of the small ones times 2^88 (their largest values, for LARGEST), then how many values are not finite, and
// how many are NaN.

namespace distclip {

// hi + lo is the sum, to about 2^-48 of it. No product is an operand of + or -, so that a compiler can fuse none.
struct Sum {
  float hi, lo;
};

// The bits of magnitudes, which are in the order of the magnitudes.
struct Batch {
  uint32_t bits[BATCH];
};

struct Measured {
  Sum usual, large, small;
  float nonfinite, nans;
  uint32_t largest;
};

// Where the threads of a group share the axes of their leaf, and then what each has measured.
struct Shared {
  SHARED int64_t *length, *step; // AXES + 1 each
  SHARED int32_t* axes; // how many
  SHARED float* columns; // COLUMNS of THREADS each
};

#define INFINITE 0x7f800000u
#define LEAST_NORMAL 0x00800000u
#define USUAL 0x2b800000u // 2^-40
#define LARGE 0x58800000u // 2^50
#define SHRINK as_type<float>(0x19000000u) // 2^-77
#define ENLARGE as_type<float>(0x6b800000u) // 2^88
#define ENLARGE_SUBNORMAL as_type<float>(0x21000000u) // 2^-61, of a whole number of 2^-149

INLINE uint32_t magnitude(float x) {
  return as_type<uint32_t>(x) & 0x7fffffffu;
}
INLINE uint32_t magnitude(bfloat16_t x) {
  return (uint32_t(as_type<uint16_t>(x)) << 16) & 0x7fffffffu;
}
INLINE uint32_t magnitude(float16_t x) {
  return magnitude(float(x));
}

INLINE Sum add(Sum sum, float x, float rest) {
  const float hi = sum.hi + x, added = hi - sum.hi;
  const float lost = (sum.hi - (hi - added)) + (x - added);
  const Sum result = {hi, sum.lo + (lost + rest)};
  return result;
}

// Moves what has gathered in lo to hi: equal values lose alike, and a large lo would round away what they lose.
INLINE Sum settled(Sum sum) {
  const float hi = sum.hi + sum.lo;
  const Sum result = {hi, sum.lo - (hi - sum.hi)};
  return result;
}

INLINE Sum add_term(Sum sum, float x) {
  if (MEASURE == MAGNITUDES)
    return add(sum, x, 0.0f);
  const float square = fma(x, x, 0.0f); // not x * x, which a compiler could fuse
  const bool exact = sizeof(Value) == 2; // squares of 16 bits fit float32
  return add(sum, square, exact ? 0.0f : fma(x, x, -square));
}

// Times 2^88. GPUs may take subnormal floats for 0, so they are enlarged as whole numbers.
INLINE float enlarged(uint32_t bits) {
  return bits >= LEAST_NORMAL ? as_type<float>(bits) * ENLARGE : float(bits) * ENLARGE_SUBNORMAL;
}

// The leaf's axes by falling stride, joined where memory goes on: a dense leaf has one, transposed or not.
INLINE void find_axes(const DEVICE int64_t* row, const CONSTANT int64_t* strides, Shared shared) {
  int32_t axes = 0;
  for (int32_t d = 0; d < int32_t(row[NDIM]); d++) {
    const int64_t length = row[LENGTHS + d], step = strides[d] * PARTS, size = step < 0 ? -step : step;
    if (length == 1)
      continue;
    int32_t at = axes++;
    for (; at > 0 && size > (shared.step[at - 1] < 0 ? -shared.step[at - 1] : shared.step[at - 1]); at--) {
      shared.length[at] = shared.length[at - 1];
      shared.step[at] = shared.step[at - 1];
    }
    shared.length[at] = length;
    shared.step[at] = step;
  }
  if (PARTS == 2) { // complex64: two float32
    shared.length[axes] = 2;
    shared.step[axes++] = 1;
  }
  int32_t last = 0;
  for (int32_t d = 1; d < axes; d++) {
    const bool goes_on = shared.step[last] == shared.step[d] * shared.length[d];
    last += goes_on ? 0 : 1;
    shared.length[last] = goes_on ? shared.length[last] * shared.length[d] : shared.length[d];
    shared.step[last] = shared.step[d];
  }
  shared.axes[0] = axes == 0 ? 0 : last + 1;
}

// Where in memory the leaf's value is that has this index, counted along the axes.
INLINE int64_t place_of(int64_t index, Shared shared) {
  int64_t place = 0;
  for (int32_t d = shared.axes[0] - 1; d > 0; d--) {
    const int64_t length = shared.length[d];
    const bool wide = (index >> 32) != 0; // a division of 64 bits is slow
    const int64_t next = wide ? index / length : int64_t(uint32_t(index) / uint32_t(length));
    place += (index - next * length) * shared.step[d];
    index = next;
  }
  return place + index * shared.step[0];
}

INLINE uint32_t largest_of(Batch batch) {
  uint32_t largest = 0;
  UNROLL
  for (uint32_t i = 0; i < BATCH; i++)
    largest = batch.bits[i] > largest ? batch.bits[i] : largest;
  return largest;
}

INLINE Measured count_nonfinite(Measured sums, THREAD Batch& batch) {
  UNROLL
  for (uint32_t i = 0; i < BATCH; i++) {
    sums.nonfinite += batch.bits[i] >= INFINITE ? 1.0f : 0.0f;
    sums.nans += batch.bits[i] > INFINITE ? 1.0f : 0.0f;
    batch.bits[i] = batch.bits[i] >= INFINITE ? 0u : batch.bits[i];
  }
  return sums;
}

INLINE Measured add_batch(Measured sums, Batch batch) {
  uint32_t largest = largest_of(batch);
  if (largest >= INFINITE) {
    sums = count_nonfinite(sums, batch);
    largest = largest_of(batch);
  }
  if (MEASURE == LARGEST) {
    sums.largest = largest > sums.largest ? largest : sums.largest;
  } else if (ALL_USUAL || (largest >= USUAL && largest < LARGE)) { // one test for the batch
    UNROLL
    for (uint32_t i = 0; i < BATCH; i++)
      sums.usual = add_term(sums.usual, as_type<float>(batch.bits[i]));
    sums.usual = settled(sums.usual);
  } else if (largest >= LARGE) {
    UNROLL
    for (uint32_t i = 0; i < BATCH; i++)
      sums.large = add_term(sums.large, as_type<float>(batch.bits[i]) * SHRINK);
    sums.large = settled(sums.large);
  } else if (largest > 0) {
    UNROLL
    for (uint32_t i = 0; i < BATCH; i++)
      sums.small = add_term(sums.small, enlarged(batch.bits[i]));
    sums.small = settled(sums.small);
  }
  return sums;
}

// What thread t measures of the `count` values from `begin` on: every THREADS-th.
INLINE Measured measure_values(const DEVICE Value* x, int64_t begin, uint32_t count, uint32_t t, Shared shared) {
  const bool linear = shared.axes[0] == 0 || (shared.axes[0] == 1 && shared.step[0] == 1);
  const DEVICE Value* values = x + (linear ? begin : int64_t(0));
  Measured sums = {{0.0f, 0.0f}, {0.0f, 0.0f}, {0.0f, 0.0f}, 0.0f, 0.0f, 0u};
  for (uint32_t first = t; first < count; first += THREADS * BATCH) {
    Batch batch;
    if (linear && first + THREADS * (BATCH - 1) < count) { // loads that wait for nothing
      UNROLL
      for (uint32_t i = 0; i < BATCH; i++)
        batch.bits[i] = magnitude(values[first + i * THREADS]);
    } else {
      for (uint32_t i = 0; i < BATCH; i++) {
        const uint32_t index = first + i * THREADS;
        batch.bits[i] = 0u;
        if (index < count)
          batch.bits[i] = magnitude(values[linear ? int64_t(index) : place_of(begin + index, shared)]);
      }
    }
    sums = add_batch(sums, batch);
  }
  return sums;
}

INLINE void share(Measured sums, uint32_t t, Shared shared) {
  if (MEASURE == LARGEST) {
    const bool small = sums.largest < USUAL && !ALL_USUAL;
    sums.usual.hi = small ? 0.0f : as_type<float>(sums.largest);
    sums.small.hi = small ? enlarged(sums.largest) : 0.0f;
  }
  const float mine[COLUMNS] = {
      sums.usual.hi,
      sums.usual.lo,
      sums.large.hi,
      sums.large.lo,
      sums.small.hi,
      sums.small.lo,
      sums.nonfinite,
      sums.nans};
  UNROLL
  for (uint32_t i = 0; i < COLUMNS; i++)
    shared.columns[i * THREADS + t] = mine[i];
}

// A column of two threads, with the column to its right. Counts are whole numbers, and exact.
INLINE Sum both(Sum a, Sum b, bool count) {
  if (MEASURE == LARGEST && !count) {
    const Sum larger = {a.hi > b.hi ? a.hi : b.hi, 0.0f};
    return larger;
  }
  return add(a, b.hi, b.lo);
}

INLINE void join_threads(uint32_t t, Shared shared) {
  for (uint32_t gap = THREADS / 2; gap > 0; gap >>= 1) {
    if (t < gap)
      for (uint32_t i = 0; i < COLUMNS; i += 2) {
        const uint32_t hi = i * THREADS + t, lo = hi + THREADS;
        const Sum mine = {shared.columns[hi], shared.columns[lo]};
        const Sum other = {shared.columns[hi + gap], shared.columns[lo + gap]};
        const Sum sum = both(mine, other, i == COLUMNS - 2);
        shared.columns[hi] = sum.hi;
        shared.columns[lo] = sum.lo;
      }
    BARRIER;
  }
}

INLINE void measure(
    const DEVICE Value* x,
    const CONSTANT int64_t* strides,
    const DEVICE int64_t* row,
    uint32_t group,
    uint32_t t,
    Shared shared,
    DEVICE float* columns) {
  if (t == 0)
    find_axes(row, strides, shared);
  BARRIER;
  const int64_t begin = (int64_t(group) - row[FIRST_GROUP]) * CHUNK;
  const int64_t left = row[SIZE] * PARTS - begin;
  share(measure_values(x, begin, uint32_t(left < CHUNK ? left : CHUNK), t, shared), t, shared);
  BARRIER;
  join_threads(t, shared);
  if (t < COLUMNS)
    columns[group * COLUMNS + t] = shared.columns[t * THREADS];
}

} // namespace distclip
