// Focal loss.
#pragma once

#include "cross_entropy.h"
#include "focus.h"

namespace bce_ext {

// Focal loss of a logit x against a target y, with weight w and pos_weight p, as torchvision defines it:
//   c    = (1-y) * softplus(x) + p*y * softplus(-x)
//   u    = (1-y) * sigmoid(x) + y * sigmoid(-x)           the probability that the other class gets
//   A    = alpha * y + (1-alpha) * (1-y), or 1 where alpha is negative
//   loss = w * A * c * u^gamma
//   dloss/dx = w * A * [dc/dx * u^gamma + gamma * c * u^(gamma-1) * (1-2y) * sigmoid(x) * sigmoid(-x)]
//   dloss/dy = w * [(2*alpha-1) * c * u^gamma + A * (dc/dy * u^gamma + gamma * c * u^(gamma-1) * du/dy)]
//   du/dy    = sigmoid(-x) - sigmoid(x)
template <typename Scalar>
struct Focal : FormulaOfLogit {
  static constexpr bool kHasHardForm = true;

  BCE_EXT_HOST_DEVICE explicit Focal(const double* parameters)
      : exponent(parameters[1]),
        alpha_positive(static_cast<Scalar>(parameters[0] < 0 ? 1.0 : parameters[0])),
        alpha_negative(static_cast<Scalar>(parameters[0] < 0 ? 1.0 : 1.0 - parameters[0])) {}

  template <typename T, typename Weight, typename PosWeight>
  BCE_EXT_HOST_DEVICE Terms<T> evaluate(T x, T y, Weight w, PosWeight p, T scale, T e) const {
    const CrossEntropy<T> entropy(x, y, p, e);
    const math::Condition<T> below = math::is_negative(x);
    const T larger = T(1) - entropy.smaller;
    const T negative = T(1) - y;
    const T u = math::select(below, negative, y) * entropy.smaller + math::select(below, y, negative) * larger;
    const Focus<T> focused = focus_of(u, exponent);
    const T alpha = y * T(alpha_positive) + negative * T(alpha_negative);
    const T slope_of_power = T(exponent.gamma) * focused.previous;
    const T product = entropy.smaller * larger;  // sigmoid(x) * sigmoid(-x); 0 where c is infinite
    // The powers of u come together before anything multiplies them: u^(gamma-1) * u may be large where u * c
    // underflows.
    const T by_input = math::weighted(slope_of_power * product * (T(1) - (y + y)), entropy.loss);
    const T by_share = slope_of_power * math::times_sign_of(entropy.smaller - larger, x);

    Terms<T> terms;
    terms.loss = math::weighted(alpha * focused.power, entropy.loss);
    // Of the guarded loss, as by_input is: without a gradient a compiler would round the other one in another place.
    terms.summand = alpha * focused.power * entropy.loss;
    terms.grad_input = alpha * (entropy.grad_input * focused.power + by_input);
    terms.grad_target =
        math::weighted(T(alpha_positive - alpha_negative) * focused.power + alpha * by_share, entropy.loss) +
        math::weighted(alpha * focused.power, entropy.grad_target);
    apply_weight(terms, w, scale);
    return terms;
  }

  BCE_EXT_HOST_DEVICE bool hard_form_serves() const { return true; }

  template <bool kRough = false, typename T>
  BCE_EXT_HOST_DEVICE T first_stage_of_hard(T x, T) const {
    return first_stage<kRough>(x);
  }

  // With t the logit that speaks against the label, u = sigmoid(t), and A the alpha of the label:
  //   loss = w * A * softplus(t) * u^gamma
  //   dloss/dt = w * A * u^gamma * (u + gamma * softplus(t) * (1-u))
  template <typename T, typename Weight>
  BCE_EXT_HOST_DEVICE Terms<T> evaluate_hard(T x, T y, Weight w, One, T scale, T e) const {
    const HardLabel<T> label(x, y, math::divide(e, T(1) + e));
    const T u = label.share;
    const T entropy = math::at_least(T(0), label.against) + math::log1p_of_unit(e);
    const T alpha = math::select(label.is_positive, T(alpha_positive), T(alpha_negative));
    const T weight = alpha * focus_of(u, exponent).power;
    // At an infinite logit u is 1, and the rest is 0.
    const T slope =
        weight * (u + T(exponent.gamma) * (math::at_most(T(math::Format<T>::kLargest), entropy) * label.rest));

    Terms<T> terms;
    terms.loss = math::weighted(weight, entropy);
    terms.summand = weight * entropy;
    terms.grad_input = math::select(label.is_positive, -slope, slope);
    terms.grad_target = T(0);
    apply_weight(terms, w, scale);
    return terms;
  }

 private:
  Exponent<Scalar> exponent;
  Scalar alpha_positive, alpha_negative;
};

}  // namespace bce_ext
