// The terms of one element, and what is done to them whatever the formula: weights, smoothed and ignored targets.
#pragma once

#include "number.h"
#include "problem.h"

namespace bce_ext {

// The loss of one element and its derivatives with respect to the input and the target.
template <typename T>
struct Terms {
  T loss;
  T summand;  // what a sum adds: the loss. It may be NaN where something infinite has no weight; the sum is then
              // computed again from `loss`. Where logarithms are joined, it lacks log1p(e).
  T grad_input;
  T grad_target;
};

// Stands for an operand that is 1 everywhere and is known to be so at compile time.
struct One {};

template <typename Operand>
constexpr bool kIsGiven = !std::is_same_v<Operand, One>;

template <typename T>
BCE_EXT_HOST_DEVICE T times(One, T value) {
  return value;
}

template <typename T>
BCE_EXT_HOST_DEVICE T times(T weight, T value) {
  return weight * value;
}

// Multiplies terms by the weight of the element, where 0 * infinity is 0: an element without weight has no say.
// `scale` is that of the gradients. In place, as compilers leave copies of packs in memory.
template <typename T, typename Weight>
BCE_EXT_HOST_DEVICE void apply_weight(Terms<T>& terms, Weight w, T scale) {
  if constexpr (kIsGiven<Weight>) {
    terms.loss = math::weighted(w, terms.loss);
    terms.summand = w * terms.summand;
    terms.grad_target = math::weighted(w, terms.grad_target);
  }
  terms.grad_input = times(w, scale) * terms.grad_input;
  terms.grad_target = scale * terms.grad_target;
}

// What is done to a target as memory holds it: smoothing, and ignored elements.
template <typename Scalar>
struct TargetRule {
  BCE_EXT_HOST_DEVICE explicit TargetRule(const Problem& problem)
      : slope(static_cast<Scalar>(1.0 - problem.label_smoothing)),
        offset(static_cast<Scalar>(0.5 * problem.label_smoothing)),
        // No target equals a NaN.
        ignore_index(problem.ignores ? static_cast<Scalar>(problem.ignore_index)
                                     : std::numeric_limits<Scalar>::quiet_NaN()) {}

  BCE_EXT_HOST_DEVICE bool ignores() const { return ignore_index == ignore_index; }

  // Whether an element with target y is ignored.
  template <typename T>
  BCE_EXT_HOST_DEVICE auto is_ignored(T y) const {
    return y == T(ignore_index);
  }

  template <typename T>
  BCE_EXT_HOST_DEVICE T smoothed(T y) const {
    return y * slope + offset;
  }

  Scalar slope, offset, ignore_index;
};

// A term of an element: 0 where that is ignored.
template <typename T>
BCE_EXT_HOST_DEVICE T unless(math::Condition<T> ignored, T term) {
  return math::select(ignored, T(0), term);
}

// The terms of an element with target `y`, by `rule`: none where it is ignored.
template <typename Formula, typename T, typename Ignored, typename Weight, typename PosWeight, typename Scalar>
BCE_EXT_HOST_DEVICE Terms<T> evaluate_by_rule(const Formula& formula, const TargetRule<Scalar>& rule, T x, T y,
                                              Ignored ignored, Weight w, PosWeight p, T scale, T first) {
  Terms<T> terms = formula.evaluate(x, rule.smoothed(y), w, p, scale, first);
  terms.loss = unless(ignored, terms.loss);
  terms.summand = unless(ignored, terms.summand);
  terms.grad_input = unless(ignored, terms.grad_input);
  terms.grad_target = unless(ignored, terms.grad_target * rule.slope);
  return terms;
}

}  // namespace bce_ext
