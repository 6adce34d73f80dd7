#include "composite.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace bce_ext {
namespace {

// coefficient * term with 0 * infinity = 0, in the derivatives too: what has no weight has no say. The infinite term is
// taken out before the product, not after it.
Tensor limit_product(const Tensor& coefficient, const Tensor& term) {
  return coefficient * at::where((coefficient == 0).logical_and(term.isinf()), 0, term);
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
      ignored = arguments.target == *ignore_index;
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

Tensor elementwise_loss(const Arguments& arguments, const Operands& operands) {
  const Tensor& x = operands.input;
  const Tensor& y = operands.target;
  Tensor loss;
  if (arguments.takes_probabilities()) {
    // ATen's own function has the clamps of the definition in its derivatives of all orders.
    loss = at::binary_cross_entropy(x, y, {}, at::Reduction::None);
  } else {
    loss = limit_product(1 - y, log1p_exp(x)) + limit_product(operands.positive(), log1p_exp(-x));
  }
  return operands.cleared(operands.weighted(loss));
}

// Bool and integer targets are 0 or 1, as in the kernels; what is no memory cannot be looked at.
void check_labels(const Arguments& arguments) {
  const Tensor& target = arguments.target;
  if (!is_hard_label(target.scalar_type()) || target.scalar_type() == at::kBool || !is_plain(target)) return;
  Tensor is_valid = (target == 0).logical_or(target == 1);
  if (const auto ignore_index = arguments.ignore_index()) is_valid = is_valid.logical_or(target == *ignore_index);
  if (target.is_cpu()) {
    TORCH_CHECK(is_valid.all().item<bool>(), name_of(arguments),
                ": expected bool and integer targets to be 0 or 1, but one is ",
                at::masked_select(target, is_valid.logical_not())[0].item<int64_t>());
  } else {
    at::_assert_async(is_valid.all(), "expected bool and integer targets to be 0 or 1");
  }
}

Tensor divided(const Tensor& value, const Arguments& arguments, const c10::SymInt& divisor) {
  Tensor result = value / at::scalar_tensor(divisor, value.options());
  return is_defined(arguments.normalizer) ? result / arguments.normalizer->to(value.scalar_type()) : result;
}

}  // namespace

Tensor composite_loss(const Arguments& arguments, int64_t reduction, at::ScalarType dtype) {
  check_labels(arguments);
  const Tensor loss = elementwise_loss(arguments, Operands(arguments, dtype));
  if (reduction == at::Reduction::None) return loss.to(dtype);
  if (reduction == at::Reduction::Mean && !is_defined(arguments.normalizer)) return loss.mean().to(dtype);
  return divided(loss.sum(), arguments, 1).to(dtype);
}

std::tuple<Tensor, Tensor> composite_backward(const Arguments& arguments, const Tensor& grad_output,
                                              const c10::SymInt& divisor, std::array<bool, 2> output_mask) {
  const Operands operands(arguments, grad_output.scalar_type());
  const Tensor& x = operands.input;
  const Tensor& y = operands.target;
  const Tensor scale = divided(grad_output.to(operands.dtype), arguments, divisor);
  const auto gradient = [&](const Tensor& slope, at::ScalarType dtype) {
    return operands.cleared(scale * operands.weighted(slope)).to(dtype);
  };

  Tensor grad_input = at::empty({0}, arguments.input.options());
  Tensor grad_target = at::empty({0}, arguments.target.options());
  if (output_mask[0]) {
    const Tensor slope = arguments.takes_probabilities()
                             ? at::binary_cross_entropy_backward(at::ones_like(x), x, y, {}, at::Reduction::None)
                             : (1 - y) * x.sigmoid() - operands.positive() * (-x).sigmoid();
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

namespace {

Tensor bce_composite(const Arguments& arguments, int64_t reduction, std::optional<at::ScalarType> dtype) {
  check_arguments(arguments);
  check_reduction(arguments, reduction);
  const OptionalTensor normalizer = normalizer_of(arguments, reduction);
  return composite_loss(arguments.with_normalizer(normalizer), reduction, dtype.value_or(loss_dtype(arguments)));
}

std::tuple<Tensor, Tensor> backward_composite(const Arguments& arguments, const Tensor& grad_output,
                                              c10::SymInt divisor, std::array<bool, 2> output_mask) {
  check_arguments(arguments);
  return composite_backward(arguments, grad_output, divisor, output_mask);
}

Tensor count_valid_composite(const Tensor& target, double ignore_index) {
  return (target != ignore_index).sum(at::kDouble);
}

}  // namespace

// vmap: batching the formula is batching its ATen operations. The loss of each example is reduced by itself.
TORCH_LIBRARY_IMPL(bce_ext, FuncTorchBatched, m) {
  m.impl("_bce", Flat<bce_composite>::call);
  m.impl("_bce_backward", Flat<backward_composite>::call);
  m.impl("_count_valid", count_valid_composite);
}

TORCH_LIBRARY_IMPL(bce_ext, CompositeExplicitAutograd, m) { m.impl("_count_valid", count_valid_composite); }

}  // namespace bce_ext
