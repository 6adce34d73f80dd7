// The loss and its gradient as differentiable formulas in ATen operations. They serve every caller that the fused
// kernels do not: forward-mode AD, double backward, gradients inside of transforms, weights that require grad, and
// devices without a kernel.
#pragma once

#include "ops.h"

namespace bce_ext {

Tensor composite_loss(const Arguments& arguments, int64_t reduction, at::ScalarType dtype);
// With a divisor, as the internal operators have it.
Tensor composite_loss(const Arguments& arguments, bool reduce, const c10::SymInt& divisor, at::ScalarType dtype);

// The gradients with respect to input and target of sum(grad_output * loss) / (divisor * normalizer). What output_mask
// does not ask for is an empty tensor.
std::tuple<Tensor, Tensor> composite_backward(const Arguments& arguments, const Tensor& grad_output,
                                              const c10::SymInt& divisor, std::array<bool, 2> output_mask);

// Whether autograd derives those gradients from the loss: written out, they would be no shorter.
inline bool derives_gradients(const Arguments& arguments) {
  return arguments.kind() == Formula::Focal || arguments.kind() == Formula::Asymmetric;
}

Tensor composite_count_valid(const Tensor& target, double ignore_index);

}  // namespace bce_ext
