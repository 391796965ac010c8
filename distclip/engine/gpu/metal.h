// The words of Metal. No fused products, and no other fast mathematics, where the compiler takes the word.
#if defined(__METAL_VERSION__) && __METAL_VERSION__ >= 320
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
#endif
#define INLINE inline
#define UNROLL _Pragma("clang loop unroll(full)")
#define DEVICE device
#define CONSTANT constant
#define SHARED threadgroup
#define THREAD thread
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
