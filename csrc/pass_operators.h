// The internal operators in terms of what a device offers: how it allocates outputs and how it runs a Problem. CPU and
// CUDA each register an instance.
//
// A Device has
//   Guard                              that makes the device of a tensor the current one
//   empty(sizes, strides, dtype, like) an uninitialised tensor on the device of `like`
//   run(problem)                       that writes the outputs of a problem
//   run_and_sum(problem, dtype, like)  that also returns the sum of the losses over the divisor
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "pass.h"

namespace bce_ext {

template <typename Device>
Tensor empty_output(const Pass& pass, at::ScalarType dtype, const Tensor& like) {
  return Device::empty(pass.sizes(), pass.strides(), dtype, like);
}

template <typename Device>
Tensor loss(const Arguments& arguments, bool reduce, int64_t divisor, at::ScalarType dtype) {
  const typename Device::Guard guard(arguments.input.device());
  Pass pass(arguments, dtype, divisor, reduce ? arguments.input : arguments.order_of_losses());
  pass.problem.reduce = reduce;
  if (reduce) return Device::run_and_sum(pass.problem, dtype, arguments.input);
  Tensor loss = empty_output<Device>(pass, dtype, arguments.input);
  pass.problem.loss = output_of(loss);
  Device::run(pass.problem);
  return loss;
}

template <typename Device>
std::tuple<Tensor, Tensor> loss_and_grad(const Arguments& arguments, int64_t divisor, at::ScalarType dtype) {
  const Tensor& input = arguments.input;
  const typename Device::Guard guard(input.device());
  Pass pass(arguments, dtype, divisor, input);
  Tensor grad_input = empty_output<Device>(pass, input.scalar_type(), input);
  pass.problem.reduce = true;
  pass.problem.grad_input = output_of(grad_input);
  return {Device::run_and_sum(pass.problem, dtype, input), std::move(grad_input)};
}

template <typename Device>
std::tuple<Tensor, Tensor> backward(const Arguments& arguments, const Tensor& grad_output, int64_t divisor,
                                    std::array<bool, 2> output_mask) {
  const Tensor& input = arguments.input;
  const Tensor& target = arguments.target;
  TORCH_CHECK(!output_mask[1] || is_arithmetic(target.scalar_type()), name_of(arguments),
              ": expected a target of float64, float32, bfloat16 or float16 where its gradient is wanted, but got ",
              target.scalar_type());
  const typename Device::Guard guard(input.device());
  Pass pass(arguments, grad_output.scalar_type(), divisor, input, &grad_output);
  const auto gradient = [&](bool is_wanted, at::ScalarType dtype, Output& output) {
    if (!is_wanted) return Device::empty({0}, {1}, dtype, input);
    Tensor grad = empty_output<Device>(pass, dtype, input);
    output = output_of(grad);
    return grad;
  };
  Tensor grad_input = gradient(output_mask[0], input.scalar_type(), pass.problem.grad_input);
  Tensor grad_target = gradient(output_mask[1], target.scalar_type(), pass.problem.grad_target);
  Device::run(pass.problem);
  return {std::move(grad_input), std::move(grad_target)};
}

inline void check_scale_grad(const Tensor& grad, const Tensor& grad_output) {
  TORCH_CHECK(is_arithmetic(grad.scalar_type()) && grad.layout() == at::kStrided,
              "_scale_grad_: expected a strided gradient of a floating dtype, but got ", grad.scalar_type(), ", ",
              grad.layout());
  TORCH_CHECK(
      grad_output.numel() == 1 && is_arithmetic(grad_output.scalar_type()) && grad_output.layout() == at::kStrided,
      "_scale_grad_: expected grad_output to be one floating number, but got ", grad_output.scalar_type(), " of size ",
      grad_output.sizes());
  TORCH_CHECK(grad_output.device() == grad.device(), "_scale_grad_: expected grad_output on the device of grad (",
              grad.device(), "), but got ", grad_output.device());
  check_storage(grad, "grad");
  check_storage(grad_output, "grad_output");
}

template <typename Device>
void scale_grad(Tensor& grad, const Tensor& grad_output) {
  check_scale_grad(grad, grad_output);
  Device::scale_grad(grad, grad_output);
}

template <typename Device>
Tensor count_valid(const Tensor& target, double ignore_index) {
  check_count(target, ignore_index);
  return Device::count_valid(target, ignore_index);
}

// The operators that an instance for a device registers.
template <typename Device>
void register_pass_operators(torch::Library& m) {
  m.impl("_bce_loss", Flat<loss<Device>>::call);
  m.impl("_bce_loss_and_grad", Flat<loss_and_grad<Device>>::call);
  m.impl("_bce_backward", Flat<backward<Device>>::call);
  m.impl("_scale_grad_", scale_grad<Device>);
  m.impl("_count_valid", count_valid<Device>);
}

}  // namespace bce_ext
