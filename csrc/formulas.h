// The formulas of the losses and their gradients for one element: host and device. Terms that the caller does not use
// cost nothing.
#pragma once

#include "elementary.h"

namespace bce_ext {

// The loss of one element and its derivatives with respect to the input and the target.
template <typename T>
struct Terms {
  T loss;
  T linear;  // WithLogits: the loss without log1p(e), but NaN for an infinite logit that has no weight; else 0
  T grad_input;
  T grad_target;
};

// Stands for an operand that is 1 everywhere and is known to be so at compile time.
struct One {};

// A formula offers evaluate(x, y, w, p), the loss and its gradients, where p may be One, and the same with the
// gradients multiplied by `scale` and in two stages, evaluate(x, y, w, p, scale, first_stage(x)): on a CPU, a loop over
// each stage is faster than one loop over both, since it overlaps more elements.

// Binary cross entropy of a logit x against a target y, with weight w and pos_weight p:
//   loss       = w * [(1-y) * softplus(x) + p*y * softplus(-x)]
//   dloss/dx   = w * [(1-y) * sigmoid(x)  - p*y * sigmoid(-x)]
//   dloss/dy   = w * [p * softplus(-x) - softplus(x)]
// With `against` the weight of the class that the logit speaks against, w*(1-y) for a positive one and w*p*y for a
// negative one, `total` the sum of the two and e = exp(-|x|), that is
//   loss       = against * |x| + total * log1p(e)
//   dloss/dx   = sign(x) * [against - total * e / (1+e)]
// in which nothing cancels for a hard label: against is 0 or total.
struct WithLogits {
  template <typename T>
  static BCE_EXT_HOST_DEVICE T first_stage(T x) {
    return math::exp_of_negative(math::magnitude(x));
  }

  template <typename T, typename PosWeight>
  static BCE_EXT_HOST_DEVICE Terms<T> evaluate(T x, T y, T w, PosWeight p, T scale, T e) {
    constexpr bool kHasPosWeight = !std::is_same_v<PosWeight, One>;
    const T a = math::magnitude(x);
    const math::Condition<T> below = math::is_negative(x);
    const T negative = w * (T(1) - y);
    T positive, total;  // positive and negative: the weights of the two classes; total: their sum
    if constexpr (kHasPosWeight) {
      positive = w * p * y;
      total = negative + positive;
    } else {
      positive = w * y;
      total = w;
    }
    const T against = math::select(below, positive, negative);
    const T log_term = math::log1p_of_unit(e);

    Terms<T> terms;
    terms.grad_input = scale * math::with_sign_of(against - total * math::divide(e, T(1) + e), x);
    terms.linear = against * a;
    terms.loss = math::select(against == T(0), T(0), terms.linear) + log_term * total;  // a NaN comes in with log_term
    if constexpr (kHasPosWeight) {
      terms.grad_target = scale * (math::weighted(math::select(below, w * p, -w), a) + w * (p - T(1)) * log_term);
    } else {
      terms.grad_target = scale * -math::weighted(w, x);
    }
    return terms;
  }

  template <typename T, typename PosWeight>
  static BCE_EXT_HOST_DEVICE Terms<T> evaluate(T x, T y, T w, PosWeight p) {
    return evaluate(x, y, w, p, T(1), first_stage(x));
  }
};

// Binary cross entropy of a probability q in [0, 1] against a target y, with weight w, as torch.nn.BCELoss defines it:
// logarithms in the loss are at least -100, the denominator of the gradient is at least 1e-12, the derivative with
// respect to the target is not clamped.
//   loss       = -w * [y * max(log(q), -100) + (1-y) * max(log(1-q), -100)]
//   dloss/dq   = w * (q - y) / max(q * (1-q), 1e-12)
//   dloss/dy   = w * [log(1-q) - log(q)]
struct Probabilities {
  template <typename T>
  static BCE_EXT_HOST_DEVICE T first_stage(T q) {
    return math::log_of_unit(q);
  }

  template <typename T, typename PosWeight>
  static BCE_EXT_HOST_DEVICE Terms<T> evaluate(T q, T y, T w, PosWeight, T scale, T log_q) {
    const T log_rest = math::log1p_of_negative(q);
    const T bounded_log_q = math::select(log_q < T(-100), T(-100), log_q);
    const T bounded_log_rest = math::select(log_rest < T(-100), T(-100), log_rest);
    const T variance = (T(1) - q) * q;

    Terms<T> terms;
    terms.linear = T(0);
    terms.loss = -w * (y * bounded_log_q + (T(1) - y) * bounded_log_rest);
    terms.grad_input = scale * (w * (q - y) / math::select(variance < T(1e-12), T(1e-12), variance));
    terms.grad_target = scale * math::weighted(w, log_rest - log_q);
    return terms;
  }

  template <typename T, typename PosWeight>
  static BCE_EXT_HOST_DEVICE Terms<T> evaluate(T q, T y, T w, PosWeight p) {
    return evaluate(q, y, w, p, T(1), first_stage(q));
  }
};

}  // namespace bce_ext
