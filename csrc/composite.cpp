#include "composite.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/library.h>

#include <cmath>

namespace bce_ext {
namespace {

// coefficient * term with 0 * infinity = 0, in the derivatives too: what has no weight has no say. The infinite term is
// taken out before the product, not after it.
Tensor limit_product(const Tensor& coefficient, const Tensor& term) {
  return coefficient * at::where((coefficient == 0).logical_and(term.isinf()), 0, term);
}

// Integers are compared as such, as far as ATen would round them to float32 first.
Tensor equals(const Tensor& target, double number) {
  const bool may_equal = number >= 0.0 || target.scalar_type() != at::kUInt64;
  if (may_equal && is_rounded_label(number, target.scalar_type()) && std::abs(number) < 0x1p63) {
    return target.to(at::kLong) == at::Scalar(static_cast<int64_t>(number));
  }
  return target == number;
}

// The operands in the dtype of the arithmetic: float64 where input, target or loss is, float32 otherwise. Ignored
// elements get operands that are finite, so that nothing of theirs comes through, and are cleared by cleared().
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
    if (const auto ignore_index = arguments.ignore_index()) {
      ignored = equals(arguments.target, *ignore_index);
      for (Tensor* operand : {&input, &target, &weight, &pos_weight}) {
        if (operand->defined()) *operand = at::where(ignored, 0.5, *operand);  // inside of every domain
      }
    }
    if (const double smoothing = arguments.label_smoothing(); smoothing != 0.0) {
      target = target * (1.0 - smoothing) + 0.5 * smoothing;
    }
  }

  // The weight of the positive class, p * y.
  Tensor positive() const { return pos_weight.defined() ? pos_weight * target : target; }

  Tensor weighted(const Tensor& value) const { return weight.defined() ? limit_product(weight, value) : value; }

  Tensor cleared(const Tensor& value) const { return ignored.defined() ? at::where(ignored, 0, value) : value; }

  at::ScalarType dtype;
  Tensor input, target, weight, pos_weight;
  Tensor ignored;  // undefined where there is no ignore_index
};

// softplus, exact in both tails: at::softplus switches to the identity at its threshold.
Tensor log1p_exp(const Tensor& x) { return -at::log_sigmoid(-x); }

// (1-y) * softplus(x) + p*y * softplus(-x).
Tensor cross_entropy(const Operands& operands) {
  const Tensor& x = operands.input;
  return limit_product(at::rsub(operands.target, 1), log1p_exp(x)) + limit_product(operands.positive(), log1p_exp(-x));
}

// Stands for log(0) where it is multiplied by an exponent that may be 0.
constexpr double kLogOf0 = -1e30;
Tensor bounded(const Tensor& logarithm) { return logarithm.clamp_min(kLogOf0); }

// u^gamma for u = (1-y) * a + y * b, with finite first and second derivatives where a or b underflow. For a hard label
// it is exp(gamma * log(u)), whose derivatives divide nothing by u; the logarithms of a and b have the places that a
// and b have lost. Near y = 0, log(u) is log(a) + log1p(y * (b/a - 1)), and so at 1.
Tensor focus(const Tensor& y, const Tensor& a, const Tensor& b, const Tensor& log_a, const Tensor& log_b,
             const Tensor& gamma) {
  // Of a smaller part of the other class, derivatives by the target take this one, so that no second one overflows.
  const double smallest = y.scalar_type() == at::kDouble ? 1e-150 : 1e-17;
  const Tensor is_0 = y == 0, is_1 = y == 1;
  const Tensor share_at_0 = at::where(is_0, y, 0), share_at_1 = at::where(is_1, at::rsub(y, 1), 0);
  const Tensor log_at_0 = log_a + at::log1p(share_at_0 * (b / a.clamp_min(smallest) - 1));
  const Tensor log_at_1 = log_b + at::log1p(share_at_1 * (a / b.clamp_min(smallest) - 1));
  const Tensor of_hard = at::exp(gamma * at::where(is_0, log_at_0, log_at_1));
  const Tensor is_hard = is_0.logical_or(is_1);
  return at::where(is_hard, of_hard, at::pow(at::where(is_hard, 1, at::rsub(y, 1) * a + y * b), gamma));
}

// The focal loss of formulas/focal.h.
Tensor focal(const Arguments& arguments, const Operands& operands) {
  const double alpha = arguments.parameter(0);
  const Tensor gamma = at::scalar_tensor(arguments.parameter(1), operands.input.options());
  const Tensor& x = operands.input;
  const Tensor& y = operands.target;
  // Infinite logits are constants of the factor: it has no slope there, and 0 times an infinite loss would be NaN.
  const Tensor finite = at::where(x.isinf(), x.detach(), x);
  const Tensor focused = focus(y, finite.sigmoid(), (-finite).sigmoid(), bounded(at::log_sigmoid(finite)),
                               bounded(at::log_sigmoid(-finite)), gamma);
  const Tensor factor = alpha < 0 ? focused : (alpha * y + (1 - alpha) * at::rsub(y, 1)) * focused;
  return limit_product(factor, cross_entropy(operands));
}

// The asymmetric loss of formulas/asymmetric.h.
Tensor asymmetric(const Arguments& arguments, const Operands& operands) {
  const double gamma_neg = arguments.parameter(0), gamma_pos = arguments.parameter(1);
  const double clip = arguments.parameter(2), eps = arguments.parameter(3);
  const Tensor& x = operands.input;
  const Tensor& y = operands.target;
  // The derivative of exp(log_sigmoid(x)) keeps its places where that of sigmoid(x) loses them.
  const Tensor positive = at::log_sigmoid(x).exp(), negative = at::log_sigmoid(-x).exp();
  const Tensor log_positive = at::where(positive < eps, std::log(eps), at::log_sigmoid(x));
  const Tensor rest = at::where(positive < clip, 0, positive - clip);  // 1 - Q; it has a slope at the clip
  const Tensor other = at::where(positive < clip, 1, negative + clip);
  const Tensor is_near_1 = rest < 0.5, is_bounded = other < eps;
  const Tensor by_rest = at::log1p(-at::where(is_near_1, rest, 0));
  const Tensor by_other = at::log(at::where(is_near_1.logical_or(is_bounded), 1, other));
  const Tensor log_other = at::where(is_bounded, std::log(eps), at::where(is_near_1, by_rest, by_other));
  const Tensor entropy = -(operands.positive() * log_positive + at::rsub(y, 1) * log_other);
  const Tensor gamma = gamma_pos * y + gamma_neg * at::rsub(y, 1);
  const Tensor log_rest =
      clip > 0 ? at::log(at::where(rest > 0, rest, 1)).masked_fill(rest <= 0, kLogOf0) : bounded(at::log_sigmoid(x));
  const Tensor focused = focus(y, rest, negative, log_rest, bounded(at::log_sigmoid(-x)), gamma);
  return entropy * (arguments.parameter(4) != 0 ? focused.detach() : focused);
}

Tensor elementwise_loss(const Arguments& arguments, const Operands& operands) {
  Tensor loss;
  switch (arguments.kind()) {
    case Formula::WithLogits:
      loss = cross_entropy(operands);
      break;
    case Formula::Probabilities:
      // ATen's own function has the clamps of the definition in its derivatives of all orders.
      loss = at::binary_cross_entropy(operands.input, operands.target, {}, at::Reduction::None);
      break;
    case Formula::Focal:
      loss = focal(arguments, operands);
      break;
    case Formula::Asymmetric:
      loss = asymmetric(arguments, operands);
      break;
  }
  return operands.cleared(operands.weighted(loss));
}

// Whether a transform of torch.func has wrapped the tensor.
bool is_transformed(const Tensor& tensor) {
  return tensor.key_set().has_any(
      c10::DispatchKeySet({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper}));
}

// Bool and integer targets are 0 or 1, as in the kernels. Where a transform hides their values, a look-up in a table of
// two refuses others; in a graph that is traced nothing does.
void check_labels(const Arguments& arguments) {
  const Tensor& target = arguments.target;
  if (!is_label_type(target.scalar_type()) || target.scalar_type() == at::kBool) return;
  if (!is_plain(target)) {
    if (!is_transformed(target)) return;
    const auto ignore_index = arguments.ignore_index();
    const Tensor labels = ignore_index ? at::where(equals(target, *ignore_index), 0, target) : target;
    at::embedding(at::zeros({2, 1}, target.options().dtype(at::kBool)), labels.to(at::kLong));
    return;
  }
  Tensor is_valid = (target == 0).logical_or(target == 1);
  if (const auto ignore_index = arguments.ignore_index()) is_valid = is_valid.logical_or(equals(target, *ignore_index));
  if (target.is_cpu()) {
    if (is_valid.all().item<bool>()) return;
    const Tensor first = at::masked_select(target.to(at::kDouble), is_valid.logical_not())[0];
    refuse_element(arguments.kind(), arguments.ignore_index(), /*is_target=*/true, first.item<double>());
  } else {
    at::_assert_async(is_valid.all(), "expected bool and integer targets to be 0 or 1");
  }
}

Tensor divided(const Tensor& value, const Arguments& arguments, const c10::SymInt& divisor) {
  const OptionalTensor& normalizer = arguments.normalizer;
  // One dimension at least: of numbers in a batch of none, vmap looks at the first to find their dtype.
  const bool may_be_batched = is_transformed(value) || (is_defined(normalizer) && is_transformed(*normalizer));
  const bool is_number = value.dim() == 0 && may_be_batched;
  Tensor result = (is_number ? value.unsqueeze(0) : value) / at::Scalar(divisor);
  if (is_defined(normalizer)) {
    const Tensor number = normalizer->to(value.scalar_type());
    result = result / (may_be_batched ? number.unsqueeze(0) : number);
  }
  return is_number ? result.squeeze(0) : result;
}

// composite_backward for formulas whose gradient is no shorter than its derivation by autograd.
std::tuple<Tensor, Tensor> backward_by_autograd(const Arguments& arguments, const Tensor& grad_output,
                                                const c10::SymInt& divisor, std::array<bool, 2> output_mask) {
  const bool create_graph = at::GradMode::is_enabled();
  const at::AutoGradMode with_graph(true);
  // Aliases: a target that was computed from the input, or is the input, does not depend on them. What flows from one
  // to the other belongs to the caller's graph.
  const auto leaf = [](const Tensor& tensor, bool is_wanted) {
    const Tensor alias = tensor.alias();
    return is_wanted && !alias.requires_grad() ? alias.requires_grad_() : alias;
  };
  const Tensor input = leaf(arguments.input, output_mask[0]), target = leaf(arguments.target, output_mask[1]);
  std::vector<Tensor> wanted;
  if (output_mask[0]) wanted.push_back(input);
  if (output_mask[1]) wanted.push_back(target);
  Tensor grad_input = at::empty({0}, arguments.input.options());
  Tensor grad_target = at::empty({0}, arguments.target.options());
  if (wanted.empty()) return {std::move(grad_input), std::move(grad_target)};

  const Arguments of_leaves{input,
                            target,
                            arguments.weight,
                            arguments.pos_weight,
                            arguments.normalizer,
                            arguments.formula,
                            arguments.options};
  const Operands operands(of_leaves, grad_output.scalar_type());
  const Tensor loss = elementwise_loss(of_leaves, operands);
  const Tensor scale = divided(grad_output.to(operands.dtype), arguments, divisor).expand_as(loss);
  const auto gradients = torch::autograd::grad({loss}, wanted, {scale}, /*retain_graph=*/create_graph, create_graph);
  if (output_mask[0]) grad_input = gradients.front();
  if (output_mask[1]) grad_target = gradients.back();
  return {std::move(grad_input), std::move(grad_target)};
}

}  // namespace

Tensor composite_loss(const Arguments& arguments, int64_t reduction, at::ScalarType dtype) {
  return composite_loss(arguments, reduction != at::Reduction::None, divisor_of(arguments, reduction), dtype);
}

Tensor composite_loss(const Arguments& arguments, bool reduce, const c10::SymInt& divisor, at::ScalarType dtype) {
  check_labels(arguments);
  const Tensor loss = elementwise_loss(arguments, Operands(arguments, dtype));
  if (!reduce) return loss.to(dtype);
  // Sums are taken in float64, as in the kernels; not every device without kernels has it.
  const Tensor sum = has_kernel(arguments.input) ? loss.sum(at::kDouble) : loss.sum();
  return divided(sum, arguments, divisor).to(dtype);
}

std::tuple<Tensor, Tensor> composite_backward(const Arguments& arguments, const Tensor& grad_output,
                                              const c10::SymInt& divisor, std::array<bool, 2> output_mask) {
  if (derives_gradients(arguments)) return backward_by_autograd(arguments, grad_output, divisor, output_mask);
  const Operands operands(arguments, grad_output.scalar_type());
  const Tensor& x = operands.input;
  const Tensor& y = operands.target;
  const Tensor scale = divided(grad_output.to(operands.dtype), arguments, divisor).expand_as(x);
  const auto gradient = [&](const Tensor& slope, at::ScalarType dtype) {
    return operands.cleared(scale * operands.weighted(slope)).to(dtype);
  };

  Tensor grad_input = at::empty({0}, arguments.input.options());
  Tensor grad_target = at::empty({0}, arguments.target.options());
  if (output_mask[0]) {
    const Tensor slope = arguments.takes_probabilities()
                             ? at::binary_cross_entropy_backward(at::ones_like(x), x, y, {}, at::Reduction::None)
                             : at::rsub(y, 1) * x.sigmoid() - operands.positive() * (-x).sigmoid();
    grad_input = gradient(slope, arguments.input.scalar_type());
  }
  if (output_mask[1]) {
    Tensor slope;
    if (arguments.takes_probabilities()) {
      slope = x.neg().log1p() - x.log();
    } else {
      const Tensor against = log1p_exp(-x);
      slope = (operands.pos_weight.defined() ? limit_product(operands.pos_weight, against) : against) - log1p_exp(x);
    }
    if (const double smoothing = arguments.label_smoothing(); smoothing != 0.0) slope = slope * (1.0 - smoothing);
    grad_target = gradient(slope, arguments.target.scalar_type());
  }
  return {std::move(grad_input), std::move(grad_target)};
}

Tensor composite_count_valid(const Tensor& target, double ignore_index) {
  check_count(target, ignore_index);
  return equals(target, ignore_index).logical_not().sum(at::kDouble);
}

TORCH_LIBRARY_IMPL(bce_ext, CompositeExplicitAutograd, m) { m.impl("_count_valid", composite_count_valid); }

}  // namespace bce_ext
