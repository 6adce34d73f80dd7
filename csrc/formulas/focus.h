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

// An exponent gamma. Where it is a small integer, powers are products of a few factors.
template <typename Scalar>
struct Exponent {
  static constexpr int kNone = -1;
  Scalar gamma;
  int factors;  // their number, or kNone

  BCE_EXT_HOST_DEVICE explicit Exponent(double number) : gamma(static_cast<Scalar>(number)), factors(kNone) {
    for (int count = 0; count <= 4; ++count) {
      if (gamma == Scalar(count)) factors = count;
    }
  }
};

// u^gamma and u^(gamma-1), the latter without a meaning at exponent 0.
template <typename T>
struct Focus {
  T power, previous;
};

template <typename T>
BCE_EXT_HOST_DEVICE Focus<T> focus_of_factors(T u, int factors) {
  if (factors == 0) return {T(1), T(0)};
  if (factors == 1) return {u, T(1)};
  const T square = u * u;
  if (factors == 2) return {square, u};
  if (factors == 3) return {square * u, square};
  return {square * square, square * u};
}

// For any exponent. u^(gamma-1) is 0 where u is.
template <typename T>
BCE_EXT_HOST_DEVICE Focus<T> focus_by_power(T u, T gamma) {
  const T power = math::power(u, gamma);
  return {power, math::divide(power, math::at_least(T(math::Format<T>::kSmallestNormal), u))};
}

// For one exponent.
template <typename T, typename Scalar>
BCE_EXT_HOST_DEVICE Focus<T> focus_of(T u, const Exponent<Scalar>& exponent) {
  if (exponent.factors == Exponent<Scalar>::kNone) [[unlikely]]
    return focus_by_power(u, T(exponent.gamma));
  return focus_of_factors(u, exponent.factors);
}

}  // namespace bce_ext
