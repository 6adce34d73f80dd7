// Sums over the threads of a block, always in the same order.
#pragma once

#include <c10/macros/Macros.h>

namespace bce_ext {
namespace cuda {

constexpr int kMaxWarps = 32;  // a block has at most 1024 threads, a warp at least 32

__device__ __forceinline__ double shuffle_down(double value, int offset) {
#if defined(USE_ROCM)
  return __shfl_down(value, offset);
#else
  return __shfl_down_sync(0xffffffffu, value, offset);
#endif
}

// The sum over the lanes of a warp, valid in lane 0. All lanes must call it.
__device__ __forceinline__ double warp_sum(double value) {
  for (int offset = C10_WARP_SIZE / 2; offset > 0; offset /= 2) {
    value += shuffle_down(value, offset);
  }
  return value;
}

// The sum over the threads of a block, valid in thread 0. All threads must call it, once per kernel (the shared memory
// is not handed back with a barrier), and the block must be whole warps in one dimension.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double warp_sums[kMaxWarps];
  const int lane = threadIdx.x % C10_WARP_SIZE;
  const int warp = threadIdx.x / C10_WARP_SIZE;
  value = warp_sum(value);
  if (lane == 0) {
    warp_sums[warp] = value;
  }
  __syncthreads();
  if (warp == 0) {
    const int num_warps = blockDim.x / C10_WARP_SIZE;
    value = warp_sum(lane < num_warps ? warp_sums[lane] : 0.0);
  }
  return value;
}

// Stores the sum over the threads of a block as one of `partials`, if these are wanted. The conditions of block_sum
// hold.
__device__ __forceinline__ void store_block_sum(double value, double* partials) {
  if (partials == nullptr) {
    return;
  }
  value = block_sum(value);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = value;
  }
}

}  // namespace cuda
}  // namespace bce_ext
