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

template <typename To, typename From>
INLINE To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the bits");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

} // namespace distclip
