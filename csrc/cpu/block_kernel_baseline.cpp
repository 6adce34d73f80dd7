// The CPU kernel for any machine that this architecture has.
#define BCE_EXT_ISA baseline
#define BCE_EXT_VECTOR_BYTES 16
#define BCE_EXT_TARGET
#include "block_kernel_impl.h"
