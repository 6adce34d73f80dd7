#include "composite.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace bce_ext {
namespace {

// The operands in the dtype of the arithmetic: float64 where input, target or loss is, float32 otherwise.
struct Operands {
  Operands(const Arguments& arguments, at::ScalarType loss_dtype)
      : dtype(loss_dtype == at::kDouble || arguments.input.scalar_type() == at::kDouble ||
                      arguments.target.scalar_type() == at::kDouble
                  ? at::kDouble
                  : at::kFloat),
        input(arguments.input.to(dtype)),
        target(arguments.target.to(dtype)) {
    if (is_defined(arguments.weight)) weight = arguments.weight->to(dtype);
    if (is_defined(arguments.pos_weight)) pos_weight = arguments.pos_weight->to(dtype);
  }

  Tensor weighted(const Tensor& tensor) const { return weight.defined() ? tensor * weight : tensor; }
  Tensor negative() const { return weighted(1 - target); }  // w * (1-y), goes with softplus(x)
  Tensor positive() const {
    return weighted(pos_weight.defined() ? pos_weight * target : target);
  }  // w * p*y, goes with softplus(-x)

  at::ScalarType dtype;
  Tensor input, target, weight, pos_weight;
};

// softplus, exact in both tails: at::softplus switches to the identity at its threshold.
Tensor log1p_exp(const Tensor& x) { return -at::log_sigmoid(-x); }

// coefficient * term with 0 * inf = 0, in the derivatives too: the infinite term is taken out before the product, not
// after it.
Tensor limit_product(const Tensor& coefficient, const Tensor& term) {
  return coefficient * at::where((coefficient == 0).logical_and(term.isinf()), 0, term);
}

Tensor elementwise_loss(const Arguments& arguments, const Operands& operands) {
  if (arguments.with_logits) {
    return limit_product(operands.negative(), log1p_exp(operands.input)) +
           limit_product(operands.positive(), log1p_exp(-operands.input));
  }
  // ATen's own function has the clamps of the definition in its derivatives of all orders.
  return operands.weighted(at::binary_cross_entropy(operands.input, operands.target, {}, at::Reduction::None));
}

}  // namespace

Tensor composite_loss(const Arguments& arguments, int64_t reduction, at::ScalarType dtype) {
  const Tensor loss = elementwise_loss(arguments, Operands(arguments, dtype));
  switch (reduction) {
    case at::Reduction::Mean:
      return loss.mean().to(dtype);
    case at::Reduction::Sum:
      return loss.sum().to(dtype);
    default:
      return loss.to(dtype);
  }
}

std::tuple<Tensor, Tensor> composite_backward(const Tensor& grad_output, const Arguments& arguments,
                                              const c10::SymInt& divisor, std::array<bool, 2> output_mask) {
  const Operands operands(arguments, grad_output.scalar_type());
  const Tensor& x = operands.input;
  const Tensor& y = operands.target;
  const Tensor scale = grad_output.to(operands.dtype) / at::scalar_tensor(divisor, x.options());

  Tensor grad_input = at::empty({0}, arguments.input.options());
  Tensor grad_target = at::empty({0}, arguments.target.options());
  if (output_mask[0]) {
    const Tensor slope =
        arguments.with_logits
            ? operands.negative() * x.sigmoid() - operands.positive() * (-x).sigmoid()
            : operands.weighted(at::binary_cross_entropy_backward(at::ones_like(x), x, y, {}, at::Reduction::None));
    grad_input = (scale * slope).to(arguments.input.scalar_type());
  }
  if (output_mask[1]) {
    Tensor slope;
    if (arguments.with_logits) {
      const Tensor against_positive = log1p_exp(-x);
      slope =
          (operands.pos_weight.defined() ? operands.pos_weight * against_positive : against_positive) - log1p_exp(x);
    } else {
      slope = x.neg().log1p().clamp_min(-100) - x.log().clamp_min(-100);
    }
    grad_target = (scale * operands.weighted(slope)).to(arguments.target.scalar_type());
  }
  return {std::move(grad_input), std::move(grad_target)};
}

namespace {

Tensor with_logits_composite(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                             const OptionalTensor& pos_weight, int64_t reduction) {
  const Arguments arguments{input, target, weight, pos_weight, /*with_logits=*/true};
  check_arguments(arguments);
  check_reduction(reduction);
  return composite_loss(arguments, reduction, loss_dtype(arguments));
}

Tensor probabilities_composite(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                               int64_t reduction) {
  const Arguments arguments{input, target, weight, std::nullopt, /*with_logits=*/false};
  check_arguments(arguments);
  check_reduction(reduction);
  return composite_loss(arguments, reduction, loss_dtype(arguments));
}

Tensor bce_composite(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                     const OptionalTensor& pos_weight, bool with_logits, int64_t reduction, at::ScalarType dtype) {
  return composite_loss({input, target, weight, pos_weight, with_logits}, reduction, dtype);
}

std::tuple<Tensor, Tensor> backward_composite(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                              const OptionalTensor& weight, const OptionalTensor& pos_weight,
                                              bool with_logits, c10::SymInt divisor, std::array<bool, 2> output_mask) {
  return composite_backward(grad_output, {input, target, weight, pos_weight, with_logits}, divisor, output_mask);
}

}  // namespace

// vmap: batching the formula is batching its ATen operations. The loss of each example is reduced by itself.
TORCH_LIBRARY_IMPL(bce_ext, FuncTorchBatched, m) {
  m.impl("binary_cross_entropy_with_logits", with_logits_composite);
  m.impl("binary_cross_entropy", probabilities_composite);
  m.impl("_bce", bce_composite);
  m.impl("_bce_backward", backward_composite);
}

}  // namespace bce_ext
