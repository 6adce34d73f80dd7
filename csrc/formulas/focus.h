// What focal and asymmetric loss share: powers of the share of the other class.
#pragma once

#include "formula.h"

namespace bce_ext {

// A label of 0 or 1, seen from the logit that speaks against it, x or -x; `smaller` is sigmoid(-|x|).
template <typename T>
struct HardLabel {
  math::Condition<T> is_positive;
  T against;
  T share, rest;  // the probability that the other class gets, sigmoid(against), and 1 minus that

  BCE_EXT_HOST_DEVICE HardLabel(T x, T y, T smaller) : is_positive(y == T(1)) {
    against = math::select(is_positive, -x, x);
    const math::Condition<T> below = math::is_negative(against);
    const T larger = T(1) - smaller;
    share = math::select(below, smaller, larger);
    rest = math::select(below, larger, smaller);
  }
};

// u^gamma and u^(gamma-1).
template <typename T>
struct Focus {
  T power, previous;
};

// Whether powers of it are products of a few factors.
template <typename Scalar>
BCE_EXT_HOST_DEVICE bool is_small_integer(Scalar gamma) {
  return gamma == Scalar(0) || gamma == Scalar(1) || gamma == Scalar(2) || gamma == Scalar(3) || gamma == Scalar(4);
}

template <typename T, typename Scalar>
BCE_EXT_HOST_DEVICE Focus<T> focus_of_integer(T u, Scalar gamma) {
  if (gamma == Scalar(0)) return {T(1), T(0)};
  if (gamma == Scalar(1)) return {u, T(1)};
  if (gamma == Scalar(2)) return {u * u, u};
  const T square = u * u;
  if (gamma == Scalar(3)) return {square * u, square};
  return {square * square, square * u};
}

// For any exponent. u^(gamma-1) is 0 where u is.
template <typename T>
BCE_EXT_HOST_DEVICE Focus<T> focus_by_power(T u, T gamma) {
  const T power = math::power(u, gamma);
  return {power, math::divide(power, math::at_least(T(math::Format<T>::kSmallestNormal), u))};
}

}  // namespace bce_ext
