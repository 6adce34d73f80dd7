// The CPU kernel for x86-64 with AVX2 and FMA.
#if defined(__x86_64__)
#define BCE_EXT_ISA avx2
#define BCE_EXT_VECTOR_BYTES 32
#define BCE_EXT_TARGET __attribute__((target("avx2,fma,f16c")))
#include "block_kernel_impl.h"
#endif
