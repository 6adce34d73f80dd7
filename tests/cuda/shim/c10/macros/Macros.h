// What c10 says of a device.
#pragma once

#define CUDA_KERNEL_ASSERT(condition) shim::machine.check(condition)
#define C10_WARP_SIZE warpSize
