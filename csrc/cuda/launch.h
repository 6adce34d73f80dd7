// What the CUDA kernels offer to the host code: raw pointers and a stream, nothing of ATen.
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace bce_ext {
namespace cuda {

// The number of doubles of scratch memory that a summing problem of `numel` elements needs.
int64_t partials_size(int64_t numel);

// Solves a problem whose pointers are to memory of the current device. When it asks for a sum, total is it, divided.
void solve(const Problem& problem, double* partials, const Output& total, cudaStream_t stream);

// grad *= *grad_output, where grad_output is one value on the device. Returns without touching grad when that value
// is 1.
void scale_grad(const Output& grad, int64_t numel, const void* grad_output, Dtype grad_output_dtype,
                cudaStream_t stream);

// The number of doubles of scratch memory that counting in `numel` elements needs.
int64_t count_partials_size(int64_t numel);

// *count = the number of elements of a dense target that do not equal ignore_index.
void count_valid(const void* target, Dtype dtype, int64_t numel, double ignore_index, double* partials,
                 const Output& count, cudaStream_t stream);

}  // namespace cuda
}  // namespace bce_ext
