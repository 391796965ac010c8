// Multiplies many small leaves by their factors on a GPU: a threadgroup writes CHUNK neighbouring values of a leaf, in
// row-major order. Written in Metal, as measure.h is.

namespace distclip {

// Where in memory the value of a leaf is that has this row-major index. A complex64 value is two float32.
INLINE int64_t place_of(uint32_t index, const device int64_t* row, const constant int64_t* strides) {
  int64_t place = index % PARTS;
  index /= PARTS;
  for (int32_t d = int32_t(row[NDIM]) - 1; d >= 0; d--) {
    const uint32_t length = uint32_t(row[LENGTHS + d]);
    place += int64_t(index % length) * strides[d] * PARTS;
    index /= length;
  }
  return place;
}

INLINE void scale(
    const device Value* x,
    const constant int64_t* strides,
    const device int64_t* row,
    uint32_t group,
    uint32_t t,
    float factor,
    bool finite,
    device Value* scaled) {
  const uint32_t begin = (group - uint32_t(row[FIRST_GROUP])) * CHUNK, size = uint32_t(row[SIZE]) * PARTS;
  for (uint32_t i = begin + t; i < size && i < begin + CHUNK; i += THREADS)
    scaled[i] = finite ? Value(float(x[place_of(i, row, strides)]) * factor) : Value(0.0f);
}

} // namespace distclip
