// The gradient graph of the public operators.
//
// mean and sum: forward computes the loss and the gradient in one pass and keeps the gradient; backward hands it over,
// scaled by grad_output where that is not 1. none: forward keeps nothing but the inputs, backward computes from them.
// Whatever asks for more than that (a transform, a forward-mode tangent, a weight that requires grad, a second
// derivative) gets the composite formula of composite.cpp.
#include "autograd.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/library.h>

#include "composite.h"
#include "ops.h"

namespace bce_ext {

Tensor scaled(Tensor grad, const Tensor& grad_output) {
  // In place where nobody else holds it: a node that compiled autograd calls keeps its copy.
  if (is_plain(grad) && is_plain(grad_output) && !transform_is_active() && grad.use_count() == 1) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    scale_grad_(grad, grad_output);
    return grad;
  }
  return (grad * grad_output).to(grad.scalar_type());
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What the operators have no kernel or graph for.
bool asks_for_more(const Arguments& arguments) {
  return !has_kernel(arguments.input) || has_tangent(arguments.input) || has_tangent(arguments.target) ||
         has_tangent(arguments.weight) || has_tangent(arguments.pos_weight) || has_tangent(arguments.normalizer) ||
         (at::GradMode::is_enabled() && (requires_grad(arguments.weight) || requires_grad(arguments.pos_weight) ||
                                         requires_grad(arguments.normalizer)));
}

bool needs_composite(const Arguments& arguments) { return transform_is_active() || asks_for_more(arguments); }

// Whether the node can be that of a transform: of torch.func.grad or vjp, since autograd sees nothing of a vmap, and a
// tangent asks for more. It keeps no gradient then, as backward is differentiated in turn.
bool has_node_in_transforms(const Arguments& arguments) {
  return !derives_gradients(arguments) && !arguments.ignore_index() && !is_defined(arguments.normalizer);
}

bool needs_graph(const Arguments& arguments) {
  return at::GradMode::is_enabled() && (arguments.input.requires_grad() || arguments.target.requires_grad());
}

// A float16 gradient of a mean would underflow before the factor of a gradient scaler reached it, so it is computed in
// backward with the factor known: that moves no more bytes than to store, load and scale it.
bool stores_gradient(const Arguments& arguments, int64_t reduction) {
  return reduction != at::Reduction::None && arguments.input.requires_grad() && !arguments.target.requires_grad() &&
         arguments.input.scalar_type() != at::kHalf && !transform_is_active();
}

// What the node keeps beside the inputs. Small losses are bound by the cost of the node: these flags share one entry,
// and options have one where there are any.
constexpr auto kGradient = "gradient";
constexpr auto kFlags = "flags";
constexpr auto kOptions = "options";

struct SavedFlags {
  int64_t formula;
  int64_t reduction;
  at::ScalarType dtype;
  bool counted;  // whether the normalizer is the number of elements that are not ignored

  int64_t pack() const {
    return (formula << 16) | (static_cast<int64_t>(counted) << 15) | (static_cast<int64_t>(dtype) << 2) | reduction;
  }
  static SavedFlags unpack(int64_t packed) {
    return {packed >> 16, packed & 3, static_cast<at::ScalarType>((packed >> 2) & 0x1fff), ((packed >> 15) & 1) != 0};
  }
};

}  // namespace

std::tuple<Tensor, Tensor> differentiable_backward(const Arguments& arguments, const Tensor& given_grad_output,
                                                   c10::SymInt divisor, std::array<bool, 2> output_mask) {
  const Tensor grad_output = strided_grad_output(given_grad_output);
  check_grad_output(grad_output, arguments);
  const bool differentiable = needs_graph(arguments) || (at::GradMode::is_enabled() && grad_output.requires_grad());
  const bool is_stored_only = output_mask[1] && !is_arithmetic(arguments.target.scalar_type());  // an 8-bit float
  if (differentiable || is_stored_only || has_tangent(grad_output) || needs_composite(arguments)) {
    return composite_backward(arguments, grad_output, divisor, output_mask);
  }
  if (is_recorded()) {
    // A gradient that is derived by autograd is made of tensors that the record does not know. torch.jit.trace, in
    // turn, does not know lists of bools.
    return derives_gradients(arguments) && !torch::jit::tracer::isTracing()
               ? bce_backward(arguments, grad_output, std::move(divisor), output_mask)
               : composite_backward(arguments, grad_output, divisor, output_mask);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return bce_backward(arguments, grad_output, std::move(divisor), output_mask);
}

namespace {

// The loss and the gradient of a reduction, for which stores_gradient.
std::tuple<Tensor, Tensor> loss_and_grad(const Arguments& given, int64_t reduction, at::ScalarType dtype) {
  if (kernel_counts_valid(given, reduction)) return bce_mean_of_valid(given, dtype, /*wants_gradient=*/true);
  const OptionalTensor normalizer = normalizer_of(given, reduction);
  const Arguments arguments = given.with_normalizer(normalizer);
  return bce_loss_and_grad(arguments, divisor_of(arguments, reduction), dtype);
}

struct BCEFunction {
  static constexpr bool is_traceable = true;  // by compiled autograd

  static Tensor forward(AutogradContext* ctx, const Arguments& given, int64_t reduction, at::ScalarType dtype) {
    const bool stored = stores_gradient(given, reduction);
    // A number that was counted is kept where backward reads the target again, whoever counted it: the node has the
    // same tensors in a mode that sees every operation and outside of it.
    const OptionalTensor normalizer = stored ? given.normalizer : normalizer_of(given, reduction);
    const Arguments arguments = given.with_normalizer(normalizer);
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor loss;
    if (stored) {
      Tensor gradient;
      std::tie(loss, gradient) = loss_and_grad(arguments, reduction, dtype);
      ctx->saved_data[kGradient] = std::move(gradient);
    } else {
      loss = loss_without_grad(arguments, reduction, dtype);
    }
    const bool counted = is_defined(normalizer) && !is_defined(given.normalizer);
    ctx->saved_data[kFlags] = SavedFlags{arguments.formula, reduction, dtype, counted}.pack();
    if (!arguments.options.empty()) ctx->saved_data[kOptions] = arguments.options.vec();
    ctx->save_for_backward({arguments.input, arguments.target, arguments.weight.value_or(Tensor()),
                            arguments.pos_weight.value_or(Tensor()), arguments.normalizer.value_or(Tensor())});
    return loss;
  }

  // The gradients with respect to input and target.
  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Tensor& grad_output = grad_outputs[0];
    auto& saved_data = ctx->saved_data;
    const auto stored = saved_data.find(kGradient);
    const bool is_stored =
        stored != saved_data.end() && !at::GradMode::is_enabled() && !has_tangent(grad_output) && !is_recorded();
    if (is_stored && stored->second.isTensor()) {
      // Handed over once and for all: nobody else may see the tensor scaled, or scale it again. A second backward
      // through a retained graph computes it anew.
      Tensor gradient = std::move(stored->second).toTensor();
      stored->second = c10::IValue();
      return {scaled(std::move(gradient), grad_output), Tensor()};
    }
    if (stored != saved_data.end()) stored->second = c10::IValue();  // a graph that is freed has no answer left
    const auto saved = ctx->get_saved_variables();
    const auto flags = SavedFlags::unpack(saved_data[kFlags].toInt());
    // A record of this does not know the count.
    const OptionalTensor weight = optional(saved[2]), pos_weight = optional(saved[3]),
                         saved_normalizer = flags.counted && is_recorded() ? std::nullopt : optional(saved[4]);
    const auto saved_options = saved_data.find(kOptions);
    const auto options =
        saved_options == saved_data.end() ? std::vector<double>() : saved_options->second.toDoubleVector();
    const Arguments kept{saved[0], saved[1], weight, pos_weight, saved_normalizer, flags.formula, options};
    // Memory that was there in the forward pass may be gone. Before the dispatcher resolves a negated view of it.
    check_arguments(kept);
    if (is_stored) {
      // By the same steps as the first time, so that it has the same bits.
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      return {scaled(std::get<1>(loss_and_grad(kept, flags.reduction, flags.dtype)), grad_output), Tensor()};
    }
    const OptionalTensor normalizer = normalizer_of(kept, flags.reduction);
    const Arguments arguments = kept.with_normalizer(normalizer);
    const auto divisor = divisor_of(arguments, flags.reduction);
    const std::array<bool, 2> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1)};
    auto [grad_input, grad_target] = differentiable_backward(arguments, grad_output, divisor, wanted);
    return {wanted[0] ? grad_input : Tensor(), wanted[1] ? grad_target : Tensor()};
  }
};

// What torch::autograd::Function::apply sets up, without its general part (the arguments of any type, in-place and view
// outputs, a demangled name), which takes longer than a small loss. It takes no arguments but input and target: weights
// that require grad never come here.
struct BCENode : torch::autograd::CppNode<BCEFunction> {
  std::string name() const override { return "BCEBackward"; }

  // Where no gradient comes in, none goes out. CppNode makes zeros of it, which a NaN logit makes a NaN.
  variable_list apply(variable_list&& grad_outputs) override {
    return grad_outputs[0].defined() ? CppNode::apply(std::move(grad_outputs)) : variable_list(2);
  }
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

Tensor bce_autograd(const Arguments& given, int64_t reduction, std::optional<at::ScalarType> given_dtype) {
  check_arguments(given);
  check_reduction(given, reduction);
  const at::ScalarType dtype = given_dtype.value_or(loss_dtype(given));
  check_loss_dtype(dtype);
  if (asks_for_more(given) || (transform_is_active() && !has_node_in_transforms(given))) {
    const OptionalTensor normalizer = normalizer_of(given, reduction);
    return composite_loss(given.with_normalizer(normalizer), reduction, dtype);
  }
  if (!needs_graph(given)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return loss_without_grad(given, reduction, dtype);
  }
  return loss_with_node(given, reduction, dtype);
}

std::tuple<Tensor, Tensor> backward_autograd(const Arguments& arguments, const Tensor& grad_output, c10::SymInt divisor,
                                             std::array<bool, 2> output_mask) {
  check_arguments(arguments);
  return differentiable_backward(arguments, grad_output, std::move(divisor), output_mask);
}

// The remaining operators are called below autograd; who calls them by hand gets derivatives of the loss, and of the
// gradient beside it.
Tensor loss_autograd(const Arguments& arguments, bool reduce, c10::SymInt divisor, at::ScalarType dtype) {
  check_arguments(arguments);
  check_loss_dtype(dtype);
  if (needs_graph(arguments) || needs_composite(arguments)) return composite_loss(arguments, reduce, divisor, dtype);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return bce_loss(arguments, reduce, std::move(divisor), dtype);
}

std::tuple<Tensor, Tensor> loss_and_grad_autograd(const Arguments& arguments, c10::SymInt divisor,
                                                  at::ScalarType dtype) {
  check_arguments(arguments);
  check_loss_dtype(dtype);
  if (needs_graph(arguments) || needs_composite(arguments)) {
    Tensor loss = loss_autograd(arguments, /*reduce=*/true, divisor, dtype);
    return {loss, std::get<0>(composite_backward(arguments, at::ones_like(loss), divisor, {true, false}))};
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return bce_loss_and_grad(arguments, std::move(divisor), dtype);
}

std::tuple<Tensor, Tensor> mean_of_valid_autograd(const Arguments& given, at::ScalarType dtype, bool wants_gradient) {
  check_arguments(given);
  check_loss_dtype(dtype);
  check_mean_of_valid(given);
  if (!needs_graph(given) && !needs_composite(given)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return bce_mean_of_valid(given, dtype, wants_gradient);
  }
  const OptionalTensor normalizer = normalizer_of(given, at::Reduction::Mean);
  const Arguments arguments = given.with_normalizer(normalizer);
  if (wants_gradient) return loss_and_grad_autograd(arguments, 1, dtype);
  return {loss_autograd(arguments, /*reduce=*/true, 1, dtype), at::empty({0}, given.input.options())};
}

// A number of elements has no derivative.
Tensor count_valid_autograd(const Tensor& target, double ignore_index) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return count_valid(target.detach(), ignore_index);
}

}  // namespace

TORCH_LIBRARY_IMPL(bce_ext, Autograd, m) {
  m.impl("_bce", Flat<bce_autograd>::call);
  m.impl("_bce_loss", Flat<loss_autograd>::call);
  m.impl("_bce_loss_and_grad", Flat<loss_and_grad_autograd>::call);
  m.impl("_bce_backward", Flat<backward_autograd>::call);
  m.impl("_bce_mean_of_valid", Flat<mean_of_valid_autograd>::call);
  m.impl("_count_valid", count_valid_autograd);
}

}  // namespace bce_ext
