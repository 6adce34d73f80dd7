// The gradient graph of the linear layer and its loss.
//
// Blocks serve a reduced loss whose target and weights have no derivative: forward computes the loss and the gradients,
// and keeps them; backward hands them over, scaled by grad_output where that is not 1. Whatever asks for more than that
// gets the plain form, or the products of the loss's own differentiable gradient.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <utility>

#include "autograd.h"
#include "linear.h"

namespace bce_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The places of the gradients. An absent layer or bias has no edge, so that edges after it have smaller numbers. What
// needs_input_grad says of these three is right all the same: nothing after them requires grad here (needs_plain_form).
constexpr int kInput = 0, kWeight = 1, kBias = 2;

bool needs_plain_form(const LinearArguments& arguments) {
  const OptionalTensor operands[] = {arguments.input,  arguments.linear_weight, arguments.linear_bias, arguments.target,
                                     arguments.weight, arguments.pos_weight,    arguments.normalizer};
  for (const auto& operand : operands) {
    if (is_defined(operand) && has_tangent(*operand)) return true;
  }
  const bool differentiates_loss = arguments.target.requires_grad() || requires_grad(arguments.weight) ||
                                   requires_grad(arguments.pos_weight) || requires_grad(arguments.normalizer);
  return transform_is_active() || (at::GradMode::is_enabled() && differentiates_loss);
}

LinearMask wanted_gradients(const LinearArguments& arguments) {
  return {arguments.input.requires_grad(), requires_grad(arguments.linear_weight),
          requires_grad(arguments.linear_bias)};
}

bool any(const LinearMask& mask) { return mask[kInput] || mask[kWeight] || mask[kBias]; }

// As for the loss alone: a float16 gradient of a mean would underflow before the factor of a gradient scaler reached
// it.
bool stores_gradients(const LinearArguments& arguments) { return arguments.input.scalar_type() != at::kHalf; }

// The gradients by operations that have derivatives in turn.
variable_list differentiable_gradients(const LinearArguments& arguments, const Tensor& grad_output, c10::SymInt divisor,
                                       const LinearMask& mask) {
  const Tensor logits = logits_of(arguments);
  const Tensor target = dense_target(arguments);
  const Tensor gradient = std::get<0>(
      differentiable_backward(arguments.of_loss(logits, target), grad_output, std::move(divisor), {true, false}));
  if (!arguments.has_layer()) return {mask[kInput] ? gradient : Tensor(), Tensor(), Tensor()};
  return {mask[kInput] ? at::mm(gradient, *arguments.linear_weight) : Tensor(),
          mask[kWeight] ? at::mm(gradient.t(), arguments.input) : Tensor(), mask[kBias] ? gradient.sum(0) : Tensor()};
}

variable_list wanted(const LossAndGrads& results, const LinearMask& mask) {
  return {mask[kInput] ? std::get<1>(results) : Tensor(), mask[kWeight] ? std::get<2>(results) : Tensor(),
          mask[kBias] ? std::get<3>(results) : Tensor()};
}

struct LinearBCEFunction : torch::autograd::Function<LinearBCEFunction> {
  static constexpr bool is_traceable = true;  // by compiled autograd
  static constexpr int kArguments = 12;       // of forward
  // Each by itself, as compiled autograd traces tensors, but no lists of them.
  static constexpr std::array kStored = {"grad_input", "grad_weight", "grad_bias"};

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& linear_weight,
                        const OptionalTensor& linear_bias, const Tensor& target, const OptionalTensor& indices,
                        const OptionalTensor& weight, const OptionalTensor& pos_weight,
                        const OptionalTensor& normalizer, bool counted, const std::vector<double>& options,
                        int64_t reduction, at::ScalarType dtype) {
    const LinearArguments arguments{input,  linear_weight, linear_bias, target, indices,
                                    weight, pos_weight,    normalizer,  options};
    const LinearMask mask = stores_gradients(arguments) ? wanted_gradients(arguments) : LinearMask{};
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto results =
        linear_bce_loss_and_grads(arguments, divisor_of(arguments, reduction), dtype, std::nullopt, mask);
    const variable_list gradients = wanted(results, mask);
    for (int i = 0; i < 3; ++i) {
      if (mask[i]) ctx->saved_data[kStored[i]] = gradients[i];
    }
    ctx->saved_data["counted"] = counted;
    ctx->saved_data["options"] = options;
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["dtype"] = static_cast<int64_t>(dtype);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({input, linear_weight.value_or(Tensor()), linear_bias.value_or(Tensor()), target,
                            indices.value_or(Tensor()), weight.value_or(Tensor()), pos_weight.value_or(Tensor()),
                            normalizer.value_or(Tensor())});
    return std::get<0>(results);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const LinearMask mask{ctx->needs_input_grad(kInput), ctx->needs_input_grad(kWeight), ctx->needs_input_grad(kBias)};
    if (!grad_outputs[0].defined()) return variable_list(kArguments);
    variable_list gradients = gradients_of_layer(ctx, grad_outputs[0], mask);
    gradients.resize(kArguments);
    return gradients;
  }

 private:
  static variable_list gradients_of_layer(AutogradContext* ctx, const Tensor& given_grad_output,
                                          const LinearMask& mask) {
    auto& saved_data = ctx->saved_data;
    const Tensor grad_output = strided_grad_output(given_grad_output);
    const bool is_differentiated = at::GradMode::is_enabled() || has_tangent(grad_output) || is_recorded();
    // Handed over once and for all: nobody else may see the tensors scaled, or scale them again. A second backward
    // through a retained graph computes them anew. And a graph that is freed has no answer left.
    variable_list stored(3);
    for (int i = 0; i < 3; ++i) {
      const auto entry = saved_data.find(kStored[i]);
      if (entry != saved_data.end() && entry->second.isTensor())
        stored[i] = std::exchange(entry->second, {}).toTensor();
    }
    const auto is_stored = [&](int i) { return !mask[i] || stored[i].defined(); };
    if (!is_differentiated && any(mask) && is_stored(kInput) && is_stored(kWeight) && is_stored(kBias)) {
      for (int i = 0; i < 3; ++i) stored[i] = mask[i] ? scaled(std::move(stored[i]), grad_output) : Tensor();
      return stored;
    }
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor linear_weight = optional(saved[1]), linear_bias = optional(saved[2]),
                         indices = optional(saved[4]), weight = optional(saved[5]), pos_weight = optional(saved[6]);
    // A record of this does not know the count.
    const bool counts_again = saved_data["counted"].toBool() && is_recorded();
    const OptionalTensor saved_normalizer = counts_again ? std::nullopt : optional(saved[7]);
    const auto options = saved_data["options"].toDoubleVector();
    const LinearArguments kept{saved[0], linear_weight, linear_bias,      saved[3], indices,
                               weight,   pos_weight,    saved_normalizer, options};
    check_logits_and_target(kept);  // memory that was there in the forward pass may be gone
    const int64_t reduction = saved_data["reduction"].toInt();
    const OptionalTensor normalizer = counts_again ? normalizer_of(kept, reduction) : saved_normalizer;
    const LinearArguments arguments = kept.with_normalizer(normalizer);
    const c10::SymInt divisor = divisor_of(arguments, reduction);
    const auto dtype = static_cast<at::ScalarType>(saved_data["dtype"].toInt());
    if (is_differentiated || transform_is_active() || !grad_output.sym_sizes().empty() ||
        (!is_plain(grad_output) && !stores_gradients(arguments))) {
      return differentiable_gradients(arguments, grad_output, divisor, mask);
    }
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (!stores_gradients(arguments)) {
      return wanted(linear_bce_loss_and_grads(arguments, divisor, dtype, grad_output, mask), mask);
    }
    // By the same steps as the first time, so that they have the same bits.
    variable_list gradients = wanted(linear_bce_loss_and_grads(arguments, divisor, dtype, std::nullopt, mask), mask);
    for (Tensor& gradient : gradients) {
      if (gradient.defined()) gradient = scaled(std::move(gradient), grad_output);
    }
    return gradients;
  }
};

Tensor linear_autograd(const LinearArguments& given, int64_t reduction, std::optional<at::ScalarType> given_dtype) {
  check_logits_and_target(given);
  const at::ScalarType dtype = given_dtype.value_or(loss_dtype(given));
  if (needs_plain_form(given) || !takes_blocks(given, reduction)) return plain_loss(given, reduction, dtype);
  check_linear_arguments(given);
  check_reduction(given, reduction);
  check_loss_dtype(dtype);
  const OptionalTensor normalizer = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return normalizer_of(given, reduction);
  }();
  const LinearArguments arguments = given.with_normalizer(normalizer);
  if (!at::GradMode::is_enabled() || !any(wanted_gradients(arguments))) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return std::get<0>(linear_bce_loss_and_grads(arguments, divisor_of(arguments, reduction), dtype, std::nullopt, {}));
  }
  return LinearBCEFunction::apply(arguments.input, arguments.linear_weight, arguments.linear_bias, arguments.target,
                                  arguments.indices, arguments.weight, arguments.pos_weight, normalizer,
                                  /*counted=*/!is_defined(given.normalizer) && is_defined(normalizer),
                                  arguments.options.vec(), reduction, dtype);
}

// Called below autograd; who calls it by hand gets derivatives of the loss, and of the gradients beside it.
LossAndGrads loss_and_grads_autograd(const LinearArguments& arguments, c10::SymInt divisor, at::ScalarType dtype,
                                     const OptionalTensor& grad_output, LinearMask mask) {
  check_loss_and_grads(arguments, dtype, grad_output);
  const bool differentiates =
      at::GradMode::is_enabled() &&
      (any(wanted_gradients(arguments)) || arguments.target.requires_grad() || requires_grad(grad_output));
  if (!differentiates && !needs_plain_form(arguments)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return linear_bce_loss_and_grads(arguments, std::move(divisor), dtype, grad_output, mask);
  }
  const Tensor logits = logits_of(arguments);
  const Tensor loss = bce_loss(arguments.of_loss(logits, dense_target(arguments)), /*reduce=*/true, divisor, dtype);
  const Tensor factor = is_defined(grad_output) ? *grad_output : at::ones_like(loss);
  variable_list gradients = differentiable_gradients(arguments, factor, std::move(divisor), mask);
  for (Tensor& gradient : gradients) {
    if (!gradient.defined()) gradient = at::empty({0}, arguments.input.options());
  }
  return {loss, gradients[0], gradients[1], gradients[2]};
}

// Autocast: the products in its low precision, as those of F.linear, and the loss in float32.
Tensor linear_autocast(const LinearArguments& given, int64_t reduction, std::optional<at::ScalarType> dtype) {
  check_layer(given);
  const auto device_type = given.input.device().type();
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(device_type));
  const auto low = [&](const Tensor& tensor) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device_type), tensor, device_type);
  };
  if (!given.has_layer()) {
    const auto usual = loss_dtype(given);
    return linear_bce(given, reduction, dtype.value_or(usual == at::kDouble ? usual : at::kFloat));
  }
  const Tensor input = low(given.input);
  const OptionalTensor linear_weight = low(*given.linear_weight);
  const OptionalTensor linear_bias =
      is_defined(given.linear_bias) ? OptionalTensor(low(*given.linear_bias)) : std::nullopt;
  const LinearArguments arguments{input,        linear_weight,    linear_bias,      given.target, given.indices,
                                  given.weight, given.pos_weight, given.normalizer, given.options};
  const at::ScalarType usual = loss_dtype(arguments);
  return linear_bce(arguments, reduction, dtype.value_or(usual == at::kDouble ? usual : at::kFloat));
}

}  // namespace

TORCH_LIBRARY_IMPL(bce_ext, Autograd, m) {
  m.impl("_linear_bce", LinearFlat<linear_autograd>::call);
  m.impl("_linear_bce_loss_and_grads", LinearFlat<loss_and_grads_autograd>::call);
}
TORCH_LIBRARY_IMPL(bce_ext, AutocastCPU, m) { m.impl("_linear_bce", LinearFlat<linear_autocast>::call); }
TORCH_LIBRARY_IMPL(bce_ext, AutocastCUDA, m) { m.impl("_linear_bce", LinearFlat<linear_autocast>::call); }

}  // namespace bce_ext
