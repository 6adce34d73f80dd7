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

// A stored gradient, as backward hands it over.
Tensor scaled(Tensor grad, const Tensor& grad_output);

}  // namespace bce_ext
