// Binary cross entropy of a probability.
#pragma once

#include "formula.h"

namespace bce_ext {

// A share of 1 and its complement. The smaller of both is known to the last places.
template <typename T>
struct Share {
  T own, complement;

  // The share of a share.
  BCE_EXT_HOST_DEVICE Share of(Share other) const {
    return {own * other.own, (complement + other.complement) - complement * other.complement};
  }
};

// A target between two labels, seen from the one it is nearer to, which a probability gives `share`; `minor` is what it
// says for the other label. As long as nothing is bounded,
//   loss = -log(share.own) - minor * log(share.complement / share.own)
// where `minor` is 0 for a hard label, and the first logarithm can be joined with others.
template <typename T>
struct Leaning {
  Share<T> share;
  T minor;
};

// The product of N shares, in pairs.
template <int N, typename T>
BCE_EXT_HOST_DEVICE Share<T> product_of_shares(const Leaning<T>* leaning) {
  if constexpr (N == 1) {
    return leaning->share;
  } else {
    return product_of_shares<N / 2>(leaning).of(product_of_shares<N - N / 2>(leaning + N / 2));
  }
}

// The sum of the losses of N such targets: one logarithm for the product of the shares, by which few places are lost,
// and one for each soft label, of which there are none where kHard says so. Not valid where a logarithm may be bounded.
template <bool kHard, typename T, int N>
BCE_EXT_HOST_DEVICE math::Condition<T> sum_leaning(const Leaning<T> (&leaning)[N], T& sum) {
  // Of what is larger, no logarithm is bounded, not even where it is the product of N.
  const T none = T(0), least = math::power_of_two<math::Scalar<T>>(-90);
  const Share<T> product = product_of_shares<N>(leaning);
  math::Condition<T> is_unbounded = product.own > least;
  sum = -math::log_by_complement(product.own, product.complement);
  for (const auto& [share, minor] : leaning) {
    if constexpr (kHard) break;
    const math::Condition<T> is_hard = minor == none;
    is_unbounded = is_unbounded & (is_hard | (share.complement > least));
    sum = sum - math::select(is_hard, none, minor * math::log_of_normal(math::divide(share.complement, share.own)));
  }
  return is_unbounded;
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
  static constexpr bool kGradInputIsOneStage = true;

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
    terms.grad_target = log_rest - log_q;
    apply_weight(terms, w, scale);
    return terms;
  }

  BCE_EXT_HOST_DEVICE bool has_hard_form() const { return true; }

  template <bool kRough = false, typename T>
  BCE_EXT_HOST_DEVICE T first_stage_of_hard(T q, T y) const {
    return math::at_least(T(-100), math::log_of_either(y == T(1), q));
  }

  template <typename T>
  BCE_EXT_HOST_DEVICE Leaning<T> lean(T q, T y) const {
    const math::Condition<T> is_positive = y > T(0.5);
    const T rest = T(1) - q;
    return {{math::select(is_positive, q, rest), math::select(is_positive, rest, q)},
            math::select(is_positive, T(1) - y, y)};
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
