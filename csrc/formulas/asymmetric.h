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
      : of_negative(parameters[0]),
        of_positive(parameters[1]),
        clip(static_cast<Scalar>(parameters[2])),
        eps(static_cast<Scalar>(parameters[3])),
        attached(static_cast<Scalar>(parameters[4] == 0)),
        has_factors(of_negative.factors != Exponent<Scalar>::kNone && of_positive.factors != Exponent<Scalar>::kNone) {}

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
    const T gamma = T(of_positive.gamma) * y + T(of_negative.gamma) * share;
    const T u = y * negative + share * rest;
    const Focus<T> focused = focus_of_target(u, y, gamma);
    const T entropy = zero - (times(p, y * log_positive) + share * log_other);  // never -0
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
        focused.power * T(of_positive.gamma - of_negative.gamma) * log_u + gamma * focused.previous * (negative - rest);
    terms.grad_target = (log_other - times(p, log_positive)) * focused.power + T(attached) * entropy * focus_by_target;
    apply_weight(terms, w, scale);
    return terms;
  }

  // A subnormal share has too few places for its logarithm, and a bound of 1/2 needs the complement of the bound.
  BCE_EXT_HOST_DEVICE bool hard_form_serves() const {
    return eps >= math::Format<Scalar>::kSmallestNormal && eps < Scalar(0.5);
  }

  template <bool kRough = false, typename T>
  BCE_EXT_HOST_DEVICE T first_stage_of_hard(T x, T) const {
    const T e = first_stage<kRough>(x);
    return math::divide(e, T(1) + e);
  }

  // The share v that the other class gets of a hard label, with no clip for a 1:
  //   u = max(v - clip, 0)       loss = -log(max(1-u, eps)) * u^g
  // By the logit that speaks against the label:
  //   du = v * (1-v)             dloss = u^g * du / (1-u) - g * u^(g-1) * log(1-u) * du
  // where 1-u is not bounded, and nothing where v is clipped.
  template <typename T, typename Weight>
  BCE_EXT_HOST_DEVICE Terms<T> evaluate_hard(T x, T y, Weight w, One, T scale, T smaller) const {
    const T zero = T(0), bound = T(eps);
    const HardLabel<T> label(x, y, smaller);
    const T clipping = math::select(label.is_positive, zero, T(clip));
    const T u = math::at_least(zero, label.share - clipping);
    const T rest = math::at_most(T(1), label.rest + clipping);  // 1-u
    const T own = math::at_least(bound, rest);
    const T log_own = math::log_by_complement(own, u);
    const Focus<T> focused = focus_of_hard(u, label.is_positive);
    const T gamma = math::select(label.is_positive, T(attached * of_positive.gamma), T(attached * of_negative.gamma));
    T du = label.share * label.rest;
    // Any other power of a clipped share is 0, as its logarithm is.
    if (of_negative.gamma == Scalar(0)) du = math::select(label.share < clipping, zero, du);
    const T by_entropy = math::select(rest < bound, zero, math::divide(du, own)) * focused.power;
    const T slope = by_entropy - log_own * (gamma * (focused.previous * du));

    Terms<T> terms;
    terms.loss = (zero - log_own) * focused.power;  // never -0
    terms.grad_input = math::select(label.is_positive, -slope, slope);
    terms.grad_target = T(0);
    terms.summand = terms.loss;
    apply_weight(terms, w, scale);
    return terms;
  }

 private:
  // u^g for a target y. The exponent of a hard label is one of two, and mostly an integer.
  template <typename T>
  BCE_EXT_HOST_DEVICE Focus<T> focus_of_target(T u, T y, T gamma) const {
    const math::Condition<T> is_positive = y == T(1);
    if (has_factors && math::all<T>(is_positive | (y == T(0)))) return focus_of_hard(u, is_positive);
    return focus_by_power(u, gamma);
  }

  template <typename T>
  BCE_EXT_HOST_DEVICE Focus<T> focus_of_hard(T u, math::Condition<T> is_positive) const {
    if (!has_factors) [[unlikely]] {
      return focus_by_power(u, math::select(is_positive, T(of_positive.gamma), T(of_negative.gamma)));
    }
    const Focus<T> positive = focus_of_factors(u, of_positive.factors);
    const Focus<T> negative = focus_of_factors(u, of_negative.factors);
    return {math::select(is_positive, positive.power, negative.power),
            math::select(is_positive, positive.previous, negative.previous)};
  }

  Exponent<Scalar> of_negative, of_positive;
  Scalar clip, eps;
  Scalar attached;   // 1, or 0 where no gradient goes through the focusing factor
  bool has_factors;  // both exponents
};

}  // namespace bce_ext
