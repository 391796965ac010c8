// How the threadgroups of a launch are shared out among its leaves. The table has a row for each leaf: the first
// threadgroup, how many values, the number of axes, their lengths.

namespace distclip {

typedef VALUE Value; // float for complex64, which has PARTS of them

// The leaf of threadgroup `group`: the last that starts at it or before it.
INLINE uint32_t leaf_of(uint32_t group, const device int64_t* table) {
  uint32_t leaf = 0;
  for (uint32_t i = 1; i < LEAVES; i++)
    leaf = int64_t(group) >= table[i * ROW + FIRST_GROUP] ? i : leaf;
  return leaf;
}

} // namespace distclip
