// What the gradient graphs of the operators share.
#pragma once

#include <torch/csrc/autograd/VariableTypeUtils.h>

#include "ops.h"

namespace bce_ext {

inline bool transform_is_active() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has_any(c10::DispatchKeySet(
      {c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::FuncTorchDynamicLayerBackMode}));
}

inline bool has_tangent(const Tensor& tensor) { return torch::autograd::isFwGradDefined(tensor); }
inline bool has_tangent(const OptionalTensor& tensor) { return torch::autograd::isFwGradDefined(tensor); }
inline bool requires_grad(const OptionalTensor& tensor) { return is_defined(tensor) && tensor->requires_grad(); }

inline OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// The gradients: by the kernel, or, where they are to be differentiated in turn or recorded, through the composite
// formula. The arguments have been checked.
std::tuple<Tensor, Tensor> differentiable_backward(const Arguments& arguments, const Tensor& given_grad_output,
                                                   c10::SymInt divisor, std::array<bool, 2> output_mask);

// A stored gradient, as backward hands it over.
Tensor scaled(Tensor grad, const Tensor& grad_output);

}  // namespace bce_ext
