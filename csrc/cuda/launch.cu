#include "launch.h"
#include "stream_launcher.cuh"

namespace bce_ext {
namespace cuda {

int64_t partials_size(int64_t numel) { return max_partials(numel); }

void solve(const Problem& problem, double* partials, const Output& total, cudaStream_t stream) {
  solve(problem, partials, total, StreamLauncher{stream});
}

void scale_grad(const Output& grad, int64_t numel, const void* grad_output, Dtype grad_output_dtype,
                cudaStream_t stream) {
  scale_grad(grad, numel, grad_output, grad_output_dtype, StreamLauncher{stream});
}

int64_t count_partials_size(int64_t numel) { return max_count_partials(numel); }

void count_valid(const void* target, Dtype dtype, int64_t numel, double ignore_index, double* partials,
                 const Output& count, cudaStream_t stream) {
  count_valid(target, dtype, numel, ignore_index, partials, count, StreamLauncher{stream});
}

}  // namespace cuda
}  // namespace bce_ext
