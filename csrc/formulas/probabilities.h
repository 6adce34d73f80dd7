// Binary cross entropy of a probability.
#pragma once

#include "formula.h"

namespace bce_ext {

// How a probability divides 1 between the two labels: `own` is for the label that the target is nearer to, `complement`
// for the other. The smaller of both is exact to its last places. With minor = min(y, 1-y), 0 for a hard label,
//   loss = -log(own) - minor * max(log(complement / own), -100)
// unless log(own) is below -100, too. (A complement so small has an own share of 1.) The first logarithm can be joined
// with those of other elements.
template <typename T>
struct Share {
  T own, complement;

  // The share of a share.
  BCE_EXT_HOST_DEVICE Share of(Share other) const {
    return {own * other.own, (complement + other.complement) - complement * other.complement};
  }
};

// The product of N shares, in pairs.
template <int N, typename T>
BCE_EXT_HOST_DEVICE Share<T> product_of(const Share<T>* shares) {
  if constexpr (N == 1) {
    return *shares;
  } else {
    return product_of<N / 2>(shares).of(product_of<N - N / 2>(shares + N / 2));
  }
}

// -log(own), added over N shares: one logarithm for their product, by which few places are lost. Not valid where one of
// theirs may be bounded.
template <typename T, int N>
BCE_EXT_HOST_DEVICE math::Condition<T> join_logarithms(const Share<T> (&shares)[N], T& sum) {
  const Share<T> product = product_of<N>(shares);
  sum = -math::log_by_complement(product.own, product.complement);
  // Of what is larger, no logarithm is bounded, not even where it is the product of N.
  return product.own > T(math::power_of_two<math::Scalar<T>>(-90));
}

// The odds of the other label, complement / own, times 2^kOddsLift, where own is above 2^-90. The least subnormal
// float, 2^-149, becomes normal by that, and nothing infinite; a double that is subnormal then has a logarithm below
// -100.
constexpr int kOddsLift = 30;

template <typename T>
BCE_EXT_HOST_DEVICE T lifted_odds(Share<T> share) {
  // The sum makes 0 of -0.
  return math::divide(share.complement * math::power_of_two<math::Scalar<T>>(kOddsLift) + T(0), share.own);
}

// minor * max(log(complement / own), -100), which is subtracted in a loss; from lifted odds.
template <typename T>
BCE_EXT_HOST_DEVICE T minor_term(T odds, T y) {
  return math::at_most(T(1) - y, y) * math::at_least(T(-100), math::log_of_lifted<kOddsLift>(odds));
}

// Binary cross entropy of a probability q in [0, 1] against a target y, with weight w, as torch.nn.BCELoss defines it:
// logarithms in the loss are at least -100, the denominator of the gradient is at least 1e-12 as a float32, for float64
// too, the derivative with respect to the target is not clamped.
//   loss       = -w * [y * max(log(q), -100) + (1-y) * max(log(1-q), -100)]
//   dloss/dq   = w * (q - y) / max(q * (1-q), 1e-12)
//   dloss/dy   = w * [log(1-q) - log(q)]
template <typename Scalar>
struct Probabilities : FormulaDefaults {
  static constexpr bool kTakesProbabilities = true;
  static constexpr bool kHasHardForm = true;
  static constexpr bool kGradInputNeedsFirstStage = false;

  BCE_EXT_HOST_DEVICE explicit Probabilities(const double*) {}

  template <bool kRough = false, typename T>
  BCE_EXT_HOST_DEVICE T first_stage(T q) const {
    return math::log_of_unit(q);
  }

  template <typename T, typename Weight, typename PosWeight>
  BCE_EXT_HOST_DEVICE Terms<T> evaluate(T q, T y, Weight w, PosWeight, T scale, T log_q) const {
    const T log_rest = math::log1p_of_negative(q);
    const T bounded_log_q = math::at_least(T(-100), log_q);
    const T bounded_log_rest = math::at_least(T(-100), log_rest);

    Terms<T> terms;
    // A loss has the same bits with a gradient and without.
    terms.loss = -(rounded(y * bounded_log_q) + (T(1) - y) * bounded_log_rest);
    terms.summand = terms.loss;
    terms.grad_input = slope_of(q, y);
    terms.grad_target = log_rest - math::select(q == T(0), T(-math::Format<T>::kInfinity), log_q);
    apply_weight(terms, w, scale);
    return terms;
  }

  BCE_EXT_HOST_DEVICE bool hard_form_serves() const { return true; }

  template <bool kRough = false, typename T>
  BCE_EXT_HOST_DEVICE T first_stage_of_hard(T q, T y) const {
    return math::at_least(T(-100), math::log_of_either(y == T(1), q));
  }

  // The share of the label that the target is nearer to.
  template <typename T>
  BCE_EXT_HOST_DEVICE Share<T> share_of_nearer(T q, T y) const {
    const math::Condition<T> is_positive = y > T(0.5);
    const T rest = T(1) - q;
    return {math::select(is_positive, q, rest), math::select(is_positive, rest, q)};
  }

  template <typename T, typename Weight>
  BCE_EXT_HOST_DEVICE Terms<T> evaluate_hard(T q, T y, Weight w, One, T scale, T bounded_log) const {
    Terms<T> terms;
    terms.loss = -bounded_log;
    terms.summand = terms.loss;
    terms.grad_input = slope_of(q, y);
    terms.grad_target = T(0);
    apply_weight(terms, w, scale);
    return terms;
  }

 private:
  template <typename T>
  static BCE_EXT_HOST_DEVICE T slope_of(T q, T y) {
    return math::divide(q - y, math::at_least(T(1e-12f), (T(1) - q) * q));
  }
};

}  // namespace bce_ext
