// The operators on tensors without memory: what shape, dtype and layout comes out. torch.compile, export and fake
// tensors ask this.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "ops.h"

namespace bce_ext {
namespace {

// As Pass lays outputs out: dense, in the memory order of another tensor.
Tensor empty_output(const Tensor& like, at::ScalarType dtype) {
  return at::empty_like(like, like.options().dtype(dtype));
}

Tensor loss_meta(const Arguments& arguments, bool reduce, c10::SymInt /*divisor*/, at::ScalarType dtype) {
  check_arguments(arguments);
  check_loss_dtype(dtype);
  const Tensor& input = arguments.input;
  return reduce ? at::empty({}, input.options().dtype(dtype)) : empty_output(arguments.order_of_losses(), dtype);
}

std::tuple<Tensor, Tensor> loss_and_grad_meta(const Arguments& arguments, c10::SymInt /*divisor*/,
                                              at::ScalarType dtype) {
  check_arguments(arguments);
  check_loss_dtype(dtype);
  const Tensor& input = arguments.input;
  return {at::empty({}, input.options().dtype(dtype)), empty_output(input, input.scalar_type())};
}

std::tuple<Tensor, Tensor> backward_meta(const Arguments& arguments, const Tensor& grad_output, c10::SymInt /*divisor*/,
                                         std::array<bool, 2> output_mask) {
  check_arguments(arguments);
  check_grad_output(grad_output, arguments);
  const Tensor& input = arguments.input;
  const Tensor& target = arguments.target;
  return {output_mask[0] ? empty_output(input, input.scalar_type()) : at::empty({0}, input.options()),
          output_mask[1] ? empty_output(input, target.scalar_type()) : at::empty({0}, target.options())};
}

std::tuple<Tensor, Tensor> mean_of_valid_meta(const Arguments& arguments, at::ScalarType dtype, bool wants_gradient) {
  auto [loss, grad_input] = loss_and_grad_meta(arguments, 1, dtype);
  check_mean_of_valid(arguments);
  return {loss, wants_gradient ? grad_input : at::empty({0}, arguments.input.options())};
}

void scale_grad_meta(Tensor& grad, const Tensor& /*grad_output*/) {
  TORCH_CHECK(grad.is_meta(), "_scale_grad_: expected grad_output on the device of grad (", grad.device(),
              "), but got meta");
}

Tensor count_valid_meta(const Tensor& target, double ignore_index) {
  check_count(target, ignore_index);
  return at::empty({}, target.options().dtype(at::kDouble));
}

}  // namespace

TORCH_LIBRARY_IMPL(bce_ext, Meta, m) {
  m.impl("_bce_loss", Flat<loss_meta>::call);
  m.impl("_bce_loss_and_grad", Flat<loss_and_grad_meta>::call);
  m.impl("_bce_backward", Flat<backward_meta>::call);
  m.impl("_scale_grad_", scale_grad_meta);
  m.impl("_bce_mean_of_valid", Flat<mean_of_valid_meta>::call);
  m.impl("_count_valid", count_valid_meta);
}

}  // namespace bce_ext
