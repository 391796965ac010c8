// CUDA: what Metal's words mean there.
#define INLINE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define device
#define constant
#define thread
#define threadgroup
#define threadgroup_barrier(flags) __syncthreads()
#define thread_position_in_threadgroup threadIdx
#define threadgroup_position_in_grid blockIdx
#define fma __fmaf_rn

namespace distclip {

typedef __half float16_t;
typedef __nv_bfloat16 bfloat16_t;

template <typename To, typename From>
INLINE To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the bits");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

} // namespace distclip
