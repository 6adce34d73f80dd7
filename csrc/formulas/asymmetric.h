// Asymmetric loss.
#pragma once

#include "focus.h"

namespace bce_ext {

// Asymmetric loss of a logit x against a target y, with weight w and pos_weight p, as timm defines it:
//   P    = sigmoid(x),  Q = min(sigmoid(-x) + clip, 1)
//   L    = -[p*y * log(max(P, eps)) + (1-y) * log(max(Q, eps))]
//   u    = y * (1-P) + (1-y) * (1-Q)
//   loss = w * L * u^g  with  g = gamma_pos * y + gamma_neg * (1-y)
// Gradients have no part through u where focusing is detached; that of a bounded part is 0.
template <typename Scalar>
struct Asymmetric : FormulaOfLogit {
  static constexpr bool kHasHardForm = true;

  BCE_EXT_HOST_DEVICE explicit Asymmetric(const double* parameters)
      : gamma_neg(static_cast<Scalar>(parameters[0])),
        gamma_pos(static_cast<Scalar>(parameters[1])),
        clip(static_cast<Scalar>(parameters[2])),
        eps(static_cast<Scalar>(parameters[3])),
        attached(static_cast<Scalar>(parameters[4] == 0)),
        has_integers(is_small_integer(gamma_neg) && is_small_integer(gamma_pos)) {}

  template <typename T, typename Weight, typename PosWeight>
  BCE_EXT_HOST_DEVICE Terms<T> evaluate(T x, T y, Weight w, PosWeight p, T scale, T e) const {
    const T zero = T(0), one = T(1), bound = T(eps);
    const math::Condition<T> below = math::is_negative(x);
    const T smaller = math::divide(e, one + e);
    const T larger = one - smaller;
    const T positive = math::select(below, smaller, larger);  // P
    const T negative = math::select(below, larger, smaller);  // sigmoid(-x)
    const T product = smaller * larger;

    // The two logarithms and their derivatives.
    const T log_e = math::log1p_of_unit(e);
    const T log_of_bound = math::log_of_unit(bound);
    const math::Condition<T> positive_is_bounded = positive < bound;
    const T log_positive = math::select(positive_is_bounded, log_of_bound, math::select(below, x, zero) - log_e);
    const T slope_positive = math::select(positive_is_bounded, zero, negative);
    const T excess = positive - T(clip);
    const math::Condition<T> is_clipped = excess < zero;
    const T rest = math::select(is_clipped, zero, excess);  // 1 - Q
    const T unbounded = math::select(is_clipped, one, negative + T(clip));
    const math::Condition<T> negative_is_bounded = unbounded < bound;
    const T other = math::select(negative_is_bounded, bound, unbounded);  // max(Q, eps)
    const T log_other = math::select(negative_is_bounded, log_of_bound, math::log_by_complement(other, rest));
    const T slope_rest = math::select(is_clipped, zero, product);
    const T slope_other = math::select(negative_is_bounded, zero, -slope_rest / other);

    const T share = one - y;
    const T gamma = T(gamma_pos) * y + T(gamma_neg) * share;
    const T u = y * negative + share * rest;
    const Focus<T> focused = focus_of(u, y, gamma);
    const T entropy = -(times(p, y * log_positive) + share * log_other);
    const T entropy_by_input = -(times(p, y * slope_positive) + share * slope_other);
    const T u_by_input = share * slope_rest - y * product;
    const math::Condition<T> is_zero = u < T(math::Format<T>::kSmallestNormal);
    const T log_u = math::select(is_zero, zero, math::log_of_unit(math::select(is_zero, one, u)));

    Terms<T> terms;
    terms.loss = entropy * focused.power;
    terms.summand = terms.loss;
    terms.grad_input =
        entropy_by_input * focused.power + T(attached) * (entropy * (gamma * (focused.previous * u_by_input)));
    const T focus_by_target =
        focused.power * T(gamma_pos - gamma_neg) * log_u + gamma * focused.previous * (negative - rest);
    terms.grad_target = (log_other - times(p, log_positive)) * focused.power + T(attached) * entropy * focus_by_target;
    apply_weight(terms, w, scale);
    return terms;
  }

  // A subnormal share has too few places for its logarithm.
  BCE_EXT_HOST_DEVICE bool has_hard_form() const { return eps >= math::Format<Scalar>::kSmallestNormal; }

  template <bool kRough = false, typename T>
  BCE_EXT_HOST_DEVICE T first_stage_of_hard(T x, T) const {
    const T e = first_stage<kRough>(x);
    return math::divide(e, T(1) + e);
  }

  template <typename T, typename Weight>
  BCE_EXT_HOST_DEVICE Terms<T> evaluate_hard(T x, T y, Weight w, One, T scale, T smaller) const {
    const HardLabel<T> hard(x, y, smaller);
    const Clipped<T> label(*this, hard);
    const T log_own = math::log_by_complement(label.own, label.complement);
    const Focus<T> focused = focus_of_hard(label.u, hard.is_positive);
    const T gamma = math::select(hard.is_positive, T(attached * gamma_pos), T(attached * gamma_neg));
    const T by_entropy = math::select(label.is_bounded, T(0), math::divide(label.u_slope, label.own)) * focused.power;
    const T slope = by_entropy - log_own * (gamma * (focused.previous * label.u_slope));

    Terms<T> terms;
    terms.loss = -log_own * focused.power;
    terms.grad_input = math::select(hard.is_positive, -slope, slope);
    terms.grad_target = T(0);
    terms.summand = terms.loss;
    apply_weight(terms, w, scale);
    return terms;
  }

 private:
  // The share v that the other class gets of a hard label, with no clip for a 1:
  //   u = max(v - clip, 0)       loss = -log(max(1-u, eps)) * u^g
  template <typename T>
  struct Clipped {
    T u, u_slope;       // and its derivative by the logit that speaks against the label
    T own, complement;  // max(1-u, eps), and 1 minus that
    math::Condition<T> is_bounded;

    BCE_EXT_HOST_DEVICE Clipped(const Asymmetric& loss, const HardLabel<T>& label) {
      const T zero = T(0), one = T(1), bound = T(loss.eps);
      const T clip = math::select(label.is_positive, zero, T(loss.clip));
      const T excess = label.share - clip;
      u = math::at_least(zero, excess);
      u_slope = math::select(excess < zero, zero, label.share * label.rest);
      const T rest = math::at_most(one, label.rest + clip);
      is_bounded = rest < bound;
      own = math::at_least(bound, rest);
      complement = math::select(is_bounded, one - bound, u);
    }
  };

  // u^g for a target y. The exponent of a hard label is one of two, and mostly an integer.
  template <typename T>
  BCE_EXT_HOST_DEVICE Focus<T> focus_of(T u, T y, T gamma) const {
    const math::Condition<T> is_positive = y == T(1);
    if (has_integers && math::all<T>(is_positive | (y == T(0)))) return focus_of_hard(u, is_positive);
    return focus_by_power(u, gamma);
  }

  template <typename T>
  BCE_EXT_HOST_DEVICE Focus<T> focus_of_hard(T u, math::Condition<T> is_positive) const {
    if (!has_integers) return focus_by_power(u, math::select(is_positive, T(gamma_pos), T(gamma_neg)));
    const Focus<T> of_positive = focus_of_integer(u, gamma_pos), of_negative = focus_of_integer(u, gamma_neg);
    return {math::select(is_positive, of_positive.power, of_negative.power),
            math::select(is_positive, of_positive.previous, of_negative.previous)};
  }

  Scalar gamma_neg, gamma_pos, clip, eps;
  Scalar attached;    // 1, or 0 where no gradient goes through the focusing factor
  bool has_integers;  // for exponents
};

}  // namespace bce_ext
