// The words of CUDA, which has no address spaces, for those of Metal.
#define INLINE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define DEVICE
#define CONSTANT
#define SHARED
#define THREAD
#define BARRIER __syncthreads()
#define thread_position_in_threadgroup threadIdx
#define threadgroup_position_in_grid blockIdx
#define fma __fmaf_rn

namespace distclip {

typedef __half float16_t;
typedef __nv_bfloat16 bfloat16_t;

template <typename To>
INLINE To as_type(float x) {
  return __float_as_uint(x);
}
template <typename To>
INLINE To as_type(uint32_t bits) {
  return __uint_as_float(bits);
}
template <typename To>
INLINE To as_type(bfloat16_t x) {
  return __bfloat16_as_ushort(x);
}

} // namespace distclip
