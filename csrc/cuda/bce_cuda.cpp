// The internal operators on CUDA tensors: allocation and launches. Nothing here waits for the device.
#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../pass.h"
#include "launch.h"

namespace bce_ext {
namespace {

Tensor empty_output(const Pass& pass, const Tensor& like, at::ScalarType dtype) {
  return at::empty_strided(pass.sizes(), pass.strides(), like.options().dtype(dtype));
}

void run(const Problem& problem) { cuda::solve(problem, nullptr, 1.0, Output{}, c10::cuda::getCurrentCUDAStream()); }

// Runs a summing pass and returns the sum of the losses over the divisor.
Tensor run_and_sum(const Problem& problem, int64_t divisor, const Tensor& input, at::ScalarType dtype) {
  Tensor total = at::empty({}, input.options().dtype(dtype));
  const Tensor partials = at::empty({cuda::partials_size(problem.numel)}, input.options().dtype(at::kDouble));
  cuda::solve(problem, partials.mutable_data_ptr<double>(), static_cast<double>(divisor), output_of(total),
              c10::cuda::getCurrentCUDAStream());
  return total;
}

Tensor loss_cuda(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                 const OptionalTensor& pos_weight, bool with_logits, bool reduce, int64_t divisor,
                 at::ScalarType dtype) {
  const c10::cuda::CUDAGuard guard(input.device());
  Pass pass({input, target, weight, pos_weight, with_logits}, dtype);
  pass.problem.reduce = reduce;
  if (reduce) return run_and_sum(pass.problem, divisor, input, dtype);
  Tensor loss = empty_output(pass, input, dtype);
  pass.problem.loss = output_of(loss);
  run(pass.problem);
  return loss;
}

std::tuple<Tensor, Tensor> loss_and_grad_cuda(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                              const OptionalTensor& pos_weight, bool with_logits, int64_t divisor,
                                              at::ScalarType dtype) {
  const c10::cuda::CUDAGuard guard(input.device());
  Pass pass({input, target, weight, pos_weight, with_logits}, dtype);
  Tensor grad_input = empty_output(pass, input, input.scalar_type());
  pass.problem.reduce = true;
  pass.problem.scale = 1.0 / static_cast<double>(divisor);
  pass.problem.grad_input = output_of(grad_input);
  return {run_and_sum(pass.problem, divisor, input, dtype), std::move(grad_input)};
}

std::tuple<Tensor, Tensor> backward_cuda(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                         const OptionalTensor& weight, const OptionalTensor& pos_weight,
                                         bool with_logits, int64_t divisor, std::array<bool, 2> output_mask) {
  const c10::cuda::CUDAGuard guard(input.device());
  Pass pass({input, target, weight, pos_weight, with_logits}, grad_output.scalar_type(), &grad_output);
  pass.problem.scale = 1.0 / static_cast<double>(divisor);
  Tensor grad_input = output_mask[0] ? empty_output(pass, input, input.scalar_type()) : at::empty({0}, input.options());
  Tensor grad_target =
      output_mask[1] ? empty_output(pass, target, target.scalar_type()) : at::empty({0}, target.options());
  if (output_mask[0]) pass.problem.grad_input = output_of(grad_input);
  if (output_mask[1]) pass.problem.grad_target = output_of(grad_target);
  run(pass.problem);
  return {std::move(grad_input), std::move(grad_target)};
}

void scale_grad_cuda(Tensor& grad, const Tensor& grad_output) {
  const bool is_supported = grad.is_non_overlapping_and_dense() && at::isFloatingType(grad.scalar_type()) &&
                            grad_output.numel() == 1 && grad_output.device() == grad.device() &&
                            at::isFloatingType(grad_output.scalar_type());
  if (!is_supported) {
    grad.mul_(grad_output);
    return;
  }
  const c10::cuda::CUDAGuard guard(grad.device());
  const Output factor = output_of(grad_output);
  cuda::scale_grad(output_of(grad), grad.numel(), factor.data, factor.dtype, c10::cuda::getCurrentCUDAStream());
}

}  // namespace

TORCH_LIBRARY_IMPL(bce_ext, CUDA, m) {
  m.impl("_bce_loss", loss_cuda);
  m.impl("_bce_loss_and_grad", loss_and_grad_cuda);
  m.impl("_bce_backward", backward_cuda);
  m.impl("_scale_grad_", scale_grad_cuda);
}

}  // namespace bce_ext
