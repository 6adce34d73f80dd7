// Binary cross entropy of a logit.
#pragma once

#include "formula.h"

namespace bce_ext {

// What the formulas of a logit share. With e = exp(-|x|), `against` the weight of the class that the logit speaks
// against, 1-y for a positive one and p*y for a negative one, and `total` the sum of the weights of both classes:
//   loss       = against * |x| + total * log1p(e)           = (1-y) * softplus(x) + p*y * softplus(-x)
//   dloss/dx   = sign(x) * [against - total * e / (1+e)]    = (1-y) * sigmoid(x)  - p*y * sigmoid(-x)
//   dloss/dy   = p * softplus(-x) - softplus(x)
// in which nothing cancels for a hard label: against is 0 or total.
template <typename T>
struct CrossEntropy {
  T loss, grad_input, grad_target;
  T linear;     // against * |x|
  T unguarded;  // the loss, but NaN for an infinite logit of the right sign
  T magnitude;  // |x|
  T smaller;    // sigmoid(-|x|)

  template <typename PosWeight>
  BCE_EXT_HOST_DEVICE CrossEntropy(T x, T y, PosWeight p, T e)
      : magnitude(math::magnitude(x)), smaller(math::divide(e, T(1) + e)) {
    const math::Condition<T> below = math::is_negative(x);
    const T log_term = math::log1p_of_unit(e);
    const T negative = T(1) - y;
    const T positive = times(p, y);
    const T against = math::select(below, positive, negative);
    linear = against * magnitude;
    // Of the right sign, an infinite logit has no loss; a NaN comes in with log_term.
    const T bounded = math::select(against == T(0), T(0), linear);
    if constexpr (kIsGiven<PosWeight>) {
      const T total = negative + positive;
      loss = bounded + total * log_term;
      unguarded = linear + total * log_term;
      grad_input = math::times_sign_of(against - total * smaller, x);
      grad_target = math::select(below, math::weighted(p, magnitude), -magnitude) + (p - T(1)) * log_term;
    } else {
      loss = bounded + log_term;
      unguarded = linear + log_term;
      grad_input = math::times_sign_of(against - smaller, x);
      grad_target = -x;
    }
  }
};

// Binary cross entropy of a logit x against a target y, with weight w and pos_weight p:
//   loss = w * [(1-y) * softplus(x) + p*y * softplus(-x)]
template <typename Scalar>
struct WithLogits : FormulaOfLogit {
  static constexpr bool kJoinsLogarithms = true;

  BCE_EXT_HOST_DEVICE explicit WithLogits(const double*) {}

  template <typename T, typename Weight, typename PosWeight>
  BCE_EXT_HOST_DEVICE Terms<T> evaluate(T x, T y, Weight w, PosWeight p, T scale, T e) const {
    const CrossEntropy<T> entropy(x, y, p, e);
    constexpr bool kJoins = !kIsGiven<Weight> && !kIsGiven<PosWeight>;
    Terms<T> terms{entropy.loss, kJoins ? entropy.linear : entropy.unguarded, entropy.grad_input, entropy.grad_target};
    apply_weight(terms, w, scale);
    return terms;
  }
};

}  // namespace bce_ext
