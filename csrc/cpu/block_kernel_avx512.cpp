// The CPU kernel for x86-64 with AVX-512.
#if defined(__x86_64__)
#define BCE_EXT_ISA avx512
#define BCE_EXT_VECTOR_BYTES 64
#if defined(__clang__)
#define BCE_EXT_TARGET \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"), min_vector_width(512)))
#else
#define BCE_EXT_TARGET \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif
#include "block_kernel_impl.h"
#endif
