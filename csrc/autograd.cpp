// The gradient graph of the public operators.
//
// mean and sum: forward computes the loss and the gradient in one pass and keeps the gradient; backward hands it over,
// scaled by grad_output where that is not 1. none: forward keeps nothing but the inputs, backward computes from them.
// Whatever asks for more than that (a transform, a forward-mode tangent, a weight that requires grad, a second
// derivative) gets the composite formula of composite.cpp.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "composite.h"
#include "ops.h"

namespace bce_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool transform_is_active() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has_any(c10::DispatchKeySet(
      {c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::FuncTorchDynamicLayerBackMode}));
}

bool has_tangent(const Tensor& tensor) { return torch::autograd::isFwGradDefined(tensor); }
bool has_tangent(const OptionalTensor& tensor) { return torch::autograd::isFwGradDefined(tensor); }
bool requires_grad(const OptionalTensor& tensor) { return is_defined(tensor) && tensor->requires_grad(); }

bool needs_composite(const Arguments& arguments) {
  return transform_is_active() || !has_kernel(arguments.input) || has_tangent(arguments.input) ||
         has_tangent(arguments.target) || has_tangent(arguments.weight) || has_tangent(arguments.pos_weight) ||
         (at::GradMode::is_enabled() && (requires_grad(arguments.weight) || requires_grad(arguments.pos_weight)));
}

bool needs_graph(const Arguments& arguments) {
  return at::GradMode::is_enabled() && (arguments.input.requires_grad() || arguments.target.requires_grad());
}

// Whether the tensor is memory and nothing else: no subclass, no tracer, no transform that would want to see every
// operation on it.
bool is_plain(const Tensor& tensor) {
  constexpr c10::DispatchKeySet wrapped({c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                         c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched,
                                         c10::DispatchKey::FuncTorchGradWrapper});
  return !tensor.key_set().has_any(wrapped) && !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !transform_is_active();
}

// `grad` belongs to the caller alone.
Tensor scaled(Tensor grad, const Tensor& grad_output) {
  if (is_plain(grad) && is_plain(grad_output)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    scale_grad_(grad, grad_output);
    return grad;
  }
  return (grad * grad_output).to(grad.scalar_type());
}

// A float16 gradient of a mean would underflow before the factor of a gradient scaler reached it, so it is computed in
// backward with the factor known: that moves no more bytes than to store, load and scale it.
bool stores_gradient(const Arguments& arguments, int64_t reduction) {
  return reduction != at::Reduction::None && arguments.input.requires_grad() && !arguments.target.requires_grad() &&
         arguments.input.scalar_type() != at::kHalf;
}

// What the node keeps beside the inputs. Small losses are bound by the cost of the node: the options share one entry.
constexpr auto kGradient = "gradient";
constexpr auto kOptions = "options";

struct Options {
  bool with_logits;
  int64_t reduction;
  at::ScalarType dtype;

  int64_t pack() const {
    return (static_cast<int64_t>(dtype) << 3) | (reduction << 1) | static_cast<int64_t>(with_logits);
  }
  static Options unpack(int64_t packed) {
    return {(packed & 1) != 0, (packed >> 1) & 3, static_cast<at::ScalarType>(packed >> 3)};
  }
};

// The gradients: by the kernel, or, where they are to be differentiated in turn, through the composite formula.
std::tuple<Tensor, Tensor> differentiable_backward(const Tensor& grad_output, const Arguments& arguments,
                                                   c10::SymInt divisor, std::array<bool, 2> output_mask) {
  const bool differentiable = needs_graph(arguments) || (at::GradMode::is_enabled() && grad_output.requires_grad());
  if (differentiable || has_tangent(grad_output) || needs_composite(arguments)) {
    return composite_backward(grad_output, arguments, divisor, output_mask);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return bce_backward(grad_output, arguments, std::move(divisor), output_mask);
}

struct BCEFunction {
  static constexpr bool is_traceable = true;  // by compiled autograd

  static Tensor forward(AutogradContext* ctx, const Arguments& arguments, int64_t reduction, at::ScalarType dtype) {
    const bool stored = stores_gradient(arguments, reduction);
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor loss;
    if (stored) {
      Tensor gradient;
      std::tie(loss, gradient) = bce_loss_and_grad(arguments, divisor_of(arguments.input, reduction), dtype);
      ctx->saved_data[kGradient] = std::move(gradient);
    } else {
      loss = loss_without_grad(arguments, reduction, dtype);
    }
    ctx->saved_data[kOptions] = Options{arguments.with_logits, reduction, dtype}.pack();
    ctx->save_for_backward({arguments.input, arguments.target, arguments.weight.value_or(Tensor()),
                            arguments.pos_weight.value_or(Tensor())});
    return loss;
  }

  // The gradients with respect to input and target.
  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Tensor& grad_output = grad_outputs[0];
    auto& saved_data = ctx->saved_data;
    const auto stored = saved_data.find(kGradient);
    if (stored != saved_data.end() && stored->second.isTensor() && !at::GradMode::is_enabled()) {
      // Handed over once and for all: nobody else may see the tensor scaled, or scale it again. A second backward
      // through a retained graph computes it anew.
      Tensor gradient = std::move(stored->second).toTensor();
      stored->second = c10::IValue();
      return {scaled(std::move(gradient), grad_output), Tensor()};
    }
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor weight = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    const OptionalTensor pos_weight = saved[3].defined() ? OptionalTensor(saved[3]) : std::nullopt;
    const auto options = Options::unpack(saved_data[kOptions].toInt());
    const Arguments arguments{saved[0], saved[1], weight, pos_weight, options.with_logits};
    const auto divisor = divisor_of(arguments.input, options.reduction);
    if (stored != saved_data.end() && !at::GradMode::is_enabled()) {
      // By the same steps as the first time, so that it has the same bits.
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      return {scaled(std::get<1>(bce_loss_and_grad(arguments, divisor, options.dtype)), grad_output), Tensor()};
    }
    const std::array<bool, 2> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
    auto [grad_input, grad_target] = differentiable_backward(grad_output, arguments, divisor, wanted);
    return {wanted[0] ? grad_input : Tensor(), wanted[1] ? grad_target : Tensor()};
  }
};

// What torch::autograd::Function::apply sets up, without its general part (the arguments of any type, in-place and view
// outputs, a demangled name), which takes longer than a small loss. It takes no arguments but input and target: weights
// that require grad never come here.
struct BCENode : torch::autograd::CppNode<BCEFunction> {
  std::string name() const override { return "BCEBackward"; }
};

template <typename T>
auto make_node() {
  using NodePointer = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<torch::autograd::Node>>) {  // torch 2.11
    return std::make_shared<T>();
  } else {
    return c10::make_intrusive<T>();
  }
}

Tensor loss_with_node(const Arguments& arguments, int64_t reduction, at::ScalarType dtype) {
  const auto node = make_node<BCENode>();
  node->set_ctx_grad_fn(node);
  node->set_next_edges(torch::autograd::collect_next_edges(arguments.input, arguments.target));
  node->is_variable_input_ = {true, true};
  node->input_info_.emplace_back(arguments.input);
  node->input_info_.emplace_back(arguments.target);
  Tensor loss = BCEFunction::forward(&node->ctx_, arguments, reduction, dtype);
  torch::autograd::set_history(loss, node);
  node->output_info_.emplace_back(loss);
  node->save_variables_to_ctx();
  return loss;
}

Tensor differentiable_loss(const Arguments& arguments, int64_t reduction, at::ScalarType dtype) {
  if (needs_composite(arguments)) return composite_loss(arguments, reduction, dtype);
  if (!needs_graph(arguments)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return loss_without_grad(arguments, reduction, dtype);
  }
  return loss_with_node(arguments, reduction, dtype);
}

Tensor with_logits_autograd(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                            const OptionalTensor& pos_weight, int64_t reduction) {
  const Arguments arguments{input, target, weight, pos_weight, /*with_logits=*/true};
  check_arguments(arguments);
  check_reduction(reduction);
  return differentiable_loss(arguments, reduction, loss_dtype(arguments));
}

Tensor probabilities_autograd(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                              int64_t reduction) {
  const Arguments arguments{input, target, weight, std::nullopt, /*with_logits=*/false};
  check_arguments(arguments);
  check_reduction(reduction);
  return differentiable_loss(arguments, reduction, loss_dtype(arguments));
}

Tensor bce_autograd(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                    const OptionalTensor& pos_weight, bool with_logits, int64_t reduction, at::ScalarType dtype) {
  return differentiable_loss({input, target, weight, pos_weight, with_logits}, reduction, dtype);
}

std::tuple<Tensor, Tensor> backward_autograd(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                             const OptionalTensor& weight, const OptionalTensor& pos_weight,
                                             bool with_logits, c10::SymInt divisor, std::array<bool, 2> output_mask) {
  const Arguments arguments{input, target, weight, pos_weight, with_logits};
  check_arguments(arguments);
  return differentiable_backward(grad_output, arguments, std::move(divisor), output_mask);
}

// The remaining operators are called below autograd; who calls them by hand gets derivatives of the loss, and of the
// gradient beside it.
Tensor loss_autograd(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                     const OptionalTensor& pos_weight, bool with_logits, bool reduce, c10::SymInt divisor,
                     at::ScalarType dtype) {
  const Arguments arguments{input, target, weight, pos_weight, with_logits};
  check_arguments(arguments);
  if (needs_graph(arguments) || needs_composite(arguments)) {
    if (!reduce) return composite_loss(arguments, at::Reduction::None, dtype);
    const Tensor sum = composite_loss(arguments, at::Reduction::Sum, dtype);
    return sum / at::scalar_tensor(divisor, sum.options());
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return bce_loss(arguments, reduce, std::move(divisor), dtype);
}

std::tuple<Tensor, Tensor> loss_and_grad_autograd(const Tensor& input, const Tensor& target,
                                                  const OptionalTensor& weight, const OptionalTensor& pos_weight,
                                                  bool with_logits, c10::SymInt divisor, at::ScalarType dtype) {
  const Arguments arguments{input, target, weight, pos_weight, with_logits};
  check_arguments(arguments);
  if (needs_graph(arguments) || needs_composite(arguments)) {
    Tensor loss = loss_autograd(input, target, weight, pos_weight, with_logits, /*reduce=*/true, divisor, dtype);
    return {loss, std::get<0>(composite_backward(at::ones_like(loss), arguments, divisor, {true, false}))};
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return bce_loss_and_grad(arguments, std::move(divisor), dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(bce_ext, Autograd, m) {
  m.impl("binary_cross_entropy_with_logits", with_logits_autograd);
  m.impl("binary_cross_entropy", probabilities_autograd);
  m.impl("_bce", bce_autograd);
  m.impl("_bce_loss", loss_autograd);
  m.impl("_bce_loss_and_grad", loss_and_grad_autograd);
  m.impl("_bce_backward", backward_autograd);
}

}  // namespace bce_ext
