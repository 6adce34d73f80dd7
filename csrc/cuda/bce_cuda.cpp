// The internal operators on CUDA tensors: allocation and launches. Nothing here waits for the device.
#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../pass_operators.h"
#include "launch.h"

namespace bce_ext {
namespace {

struct Cuda {
  using Guard = c10::cuda::CUDAGuard;

  static Tensor empty(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype, const Tensor& like) {
    return at::empty_strided(sizes, strides, like.options().dtype(dtype));
  }

  static void run(const Problem& problem) {
    cuda::solve(problem, nullptr, Output{}, c10::cuda::getCurrentCUDAStream());
  }

  static Tensor run_and_sum(const Problem& problem, at::ScalarType dtype, const Tensor& like) {
    Tensor total = at::empty({}, like.options().dtype(dtype));
    const Tensor partials = at::empty({cuda::partials_size(problem.numel)}, like.options().dtype(at::kDouble));
    cuda::solve(problem, partials.mutable_data_ptr<double>(), output_of(total), c10::cuda::getCurrentCUDAStream());
    return total;
  }

  static void scale_grad(Tensor& grad, const Tensor& grad_output) {
    if (!grad.is_non_overlapping_and_dense() || !is_aligned(grad) || !is_aligned(grad_output)) {
      grad.mul_(grad_output);
      return;
    }
    const c10::cuda::CUDAGuard guard(grad.device());
    const Operand factor = flat_operand(grad_output);
    cuda::scale_grad(output_of(grad), grad.numel(), factor.data, factor.dtype, c10::cuda::getCurrentCUDAStream());
  }

  // Read where it lies if it is dense; a view with gaps or repeats is copied first, as is a type that no kernel reads.
  static Tensor count_valid(const Tensor& target, double ignore_index) {
    const c10::cuda::CUDAGuard guard(target.device());
    const Tensor dense = readable(target.is_non_overlapping_and_dense() ? target : target.contiguous());
    const Tensor count = at::empty({}, target.options().dtype(at::kDouble));
    const Tensor partials = at::empty({cuda::count_partials_size(target.numel())}, count.options());
    const Operand operand = flat_operand(dense);
    cuda::count_valid(operand.data, operand.dtype, target.numel(), as_label(ignore_index, target.scalar_type()),
                      partials.mutable_data_ptr<double>(), output_of(count), c10::cuda::getCurrentCUDAStream());
    return count;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(bce_ext, CUDA, m) { register_pass_operators<Cuda>(m); }

}  // namespace bce_ext
