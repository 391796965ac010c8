// Metal: no fused products, and no other fast mathematics, where the compiler takes the word.
#if defined(__METAL_VERSION__) && __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
#endif
#define INLINE inline
#define UNROLL _Pragma("clang loop unroll(full)")
