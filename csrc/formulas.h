// The formulas of the losses and their gradients for one element: host and device. Terms that the caller does not use
// cost nothing.
//
// A formula is a template over the scalar type, made from the parameters of a Problem. It offers first_stage(x) and
// evaluate(x, y, w, p, scale, first_stage(x)), the loss and its gradients, these multiplied by `scale`. It has two
// stages because a loop over each of them is faster on a CPU than one loop over both: it overlaps more elements. Where
// w or p is known to be 1 it may be One.
//
// A formula whose terms are simpler for targets that are 0 or 1 has a form of its own for them:
// first_stage_of_hard(x, y) and evaluate_hard(x, y, w, p, scale, first_stage_of_hard(x, y)), without the derivative
// with respect to the target. has_hard_form() says whether it serves.
//
// grad_input does not depend on the first stage where kGradInputIsOneStage says so. Losses of the same weight may then
// be added by lean(x, y), whose logarithms are joined.
#pragma once

#include "elementary.h"
#include "problem.h"
#include "terms.h"

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
      grad_input = math::with_sign_of(against - total * smaller, x);
      grad_target = math::select(below, math::weighted(p, magnitude), -magnitude) + (p - T(1)) * log_term;
    } else {
      loss = bounded + log_term;
      unguarded = linear + log_term;
      grad_input = math::with_sign_of(against - smaller, x);
      grad_target = -x;
    }
  }
};

// Binary cross entropy of a logit x against a target y, with weight w and pos_weight p:
//   loss = w * [(1-y) * softplus(x) + p*y * softplus(-x)]
template <typename Scalar>
struct WithLogits {
  static constexpr bool kJoinsLogarithms = true;  // losses without weights are their summand + log1p(first_stage)
  static constexpr bool kTakesProbabilities = false;
  static constexpr bool kHasHardForm = false;
  static constexpr bool kGradInputIsOneStage = false;

  BCE_EXT_HOST_DEVICE explicit WithLogits(const double*) {}

  template <bool kRough = false, typename T>
  BCE_EXT_HOST_DEVICE T first_stage(T x) const {
    return kRough ? math::rough_exp_of_negative(math::magnitude(x)) : math::exp_of_negative(math::magnitude(x));
  }

  template <typename T, typename Weight, typename PosWeight>
  BCE_EXT_HOST_DEVICE Terms<T> evaluate(T x, T y, Weight w, PosWeight p, T scale, T e) const {
    const CrossEntropy<T> entropy(x, y, p, e);
    constexpr bool kJoins = !kIsGiven<Weight> && !kIsGiven<PosWeight>;
    Terms<T> terms{entropy.loss, kJoins ? entropy.linear : entropy.unguarded, entropy.grad_input, entropy.grad_target};
    apply_weight(terms, w, scale);
    return terms;
  }
};

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
struct Probabilities {
  static constexpr bool kJoinsLogarithms = false;
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
    const T variance = (T(1) - q) * q;

    Terms<T> terms;
    terms.loss = -(y * bounded_log_q + (T(1) - y) * bounded_log_rest);
    terms.summand = terms.loss;
    terms.grad_input = math::divide(q - y, math::at_least(T(1e-12f), variance));
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

  template <typename T, typename Weight, typename PosWeight>
  BCE_EXT_HOST_DEVICE Terms<T> evaluate_hard(T q, T y, Weight w, PosWeight, T scale, T bounded_log) const {
    const T variance = (T(1) - q) * q;
    Terms<T> terms;
    terms.loss = -bounded_log;
    terms.summand = terms.loss;
    terms.grad_input = math::divide(q - y, math::at_least(T(1e-12f), variance));
    terms.grad_target = T(0);
    apply_weight(terms, w, scale);
    return terms;
  }
};

// The value of a hard label, times the pos_weight of a positive one.
template <typename T>
BCE_EXT_HOST_DEVICE T times_of_positive(One, math::Condition<T>, T value) {
  return value;
}

template <typename T>
BCE_EXT_HOST_DEVICE T times_of_positive(T pos_weight, math::Condition<T> is_positive, T value) {
  return math::select(is_positive, pos_weight * value, value);
}

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

// Focal loss of a logit x against a target y, with weight w and pos_weight p, as torchvision defines it:
//   c    = (1-y) * softplus(x) + p*y * softplus(-x)
//   u    = (1-y) * sigmoid(x) + y * sigmoid(-x)           the probability that the other class gets
//   A    = alpha * y + (1-alpha) * (1-y), or 1 where alpha is negative
//   loss = w * A * c * u^gamma
//   dloss/dx = w * A * [dc/dx * u^gamma + gamma * c * u^(gamma-1) * (1-2y) * sigmoid(x) * sigmoid(-x)]
//   dloss/dy = w * [(2*alpha-1) * c * u^gamma + A * (dc/dy * u^gamma + gamma * c * u^(gamma-1) * du/dy)]
//   du/dy    = sigmoid(-x) - sigmoid(x)
template <typename Scalar>
struct Focal {
  static constexpr bool kJoinsLogarithms = false;
  static constexpr bool kTakesProbabilities = false;
  static constexpr bool kHasHardForm = true;
  static constexpr bool kGradInputIsOneStage = false;

  BCE_EXT_HOST_DEVICE explicit Focal(const double* parameters)
      : gamma(static_cast<Scalar>(parameters[1])),
        alpha_positive(static_cast<Scalar>(parameters[0] < 0 ? 1.0 : parameters[0])),
        alpha_negative(static_cast<Scalar>(parameters[0] < 0 ? 1.0 : 1.0 - parameters[0])) {}

  template <bool kRough = false, typename T>
  BCE_EXT_HOST_DEVICE T first_stage(T x) const {
    return kRough ? math::rough_exp_of_negative(math::magnitude(x)) : math::exp_of_negative(math::magnitude(x));
  }

  template <typename T, typename Weight, typename PosWeight>
  BCE_EXT_HOST_DEVICE Terms<T> evaluate(T x, T y, Weight w, PosWeight p, T scale, T e) const {
    const CrossEntropy<T> entropy(x, y, p, e);
    const math::Condition<T> below = math::is_negative(x);
    const T larger = T(1) - entropy.smaller;
    const T negative = T(1) - y;
    const T u = math::select(below, negative, y) * entropy.smaller + math::select(below, y, negative) * larger;
    const Focus<T> focused = is_small_integer(gamma) ? focus_of_integer(u, gamma) : focus_by_power(u, T(gamma));
    const T alpha = y * T(alpha_positive) + negative * T(alpha_negative);
    const T slope_of_power = T(gamma) * focused.previous;
    const T product = entropy.smaller * larger;  // sigmoid(x) * sigmoid(-x); 0 where c is infinite
    // The powers of u come together before anything multiplies them: u^(gamma-1) * u may be large where u * c
    // underflows.
    const T by_input = math::weighted(slope_of_power * product * (T(1) - (y + y)), entropy.loss);
    const T by_share = slope_of_power * math::with_sign_of(entropy.smaller - larger, x);

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

  BCE_EXT_HOST_DEVICE bool has_hard_form() const { return true; }

  template <bool kRough = false, typename T>
  BCE_EXT_HOST_DEVICE T first_stage_of_hard(T x, T) const {
    return first_stage<kRough>(x);
  }

  // A label of 0 or 1, by the logit t that speaks against it, x or -x, with A its alpha. With u = sigmoid(t):
  //   loss = w * A * softplus(t) * u^gamma
  //   dloss/dt = w * A * u^gamma * (u + gamma * softplus(t) * (1-u))
  template <typename T, typename Weight, typename PosWeight>
  BCE_EXT_HOST_DEVICE Terms<T> evaluate_hard(T x, T y, Weight w, PosWeight p, T scale, T e) const {
    const math::Condition<T> is_positive = y == T(1);
    const T against = math::select(is_positive, -x, x);
    const math::Condition<T> below = math::is_negative(against);
    const T smaller = math::divide(e, T(1) + e);
    const T larger = T(1) - smaller;
    const T u = math::select(below, smaller, larger);
    const T rest = math::select(below, larger, smaller);
    const T entropy = math::at_least(T(0), against) + math::log1p_of_unit(e);
    const T alpha = math::select(is_positive, T(alpha_positive), T(alpha_negative));
    const T power = is_small_integer(gamma) ? focus_of_integer(u, gamma).power : focus_by_power(u, T(gamma)).power;
    const T weight = times_of_positive(p, is_positive, alpha) * power;
    // At an infinite logit u is 1, and the rest is 0.
    const T slope = weight * (u + T(gamma) * math::at_most(T(math::Format<T>::kLargest), entropy) * rest);

    Terms<T> terms;
    terms.loss = math::weighted(weight, entropy);
    terms.summand = weight * entropy;
    terms.grad_input = math::select(is_positive, -slope, slope);
    terms.grad_target = T(0);
    apply_weight(terms, w, scale);
    return terms;
  }

 private:
  Scalar gamma;
  Scalar alpha_positive, alpha_negative;
};

// Asymmetric loss of a logit x against a target y, with weight w and pos_weight p, as timm defines it:
//   P    = sigmoid(x),  Q = min(sigmoid(-x) + clip, 1)
//   L    = -[p*y * log(max(P, eps)) + (1-y) * log(max(Q, eps))]
//   u    = y * (1-P) + (1-y) * (1-Q)
//   loss = w * L * u^g  with  g = gamma_pos * y + gamma_neg * (1-y)
// Gradients have no part through u where focusing is detached; that of a bounded part is 0.
template <typename Scalar>
struct Asymmetric {
  static constexpr bool kJoinsLogarithms = false;
  static constexpr bool kTakesProbabilities = false;
  static constexpr bool kHasHardForm = true;
  static constexpr bool kGradInputIsOneStage = false;

  BCE_EXT_HOST_DEVICE explicit Asymmetric(const double* parameters)
      : gamma_neg(static_cast<Scalar>(parameters[0])),
        gamma_pos(static_cast<Scalar>(parameters[1])),
        clip(static_cast<Scalar>(parameters[2])),
        eps(static_cast<Scalar>(parameters[3])),
        attached(static_cast<Scalar>(parameters[4] == 0)),
        has_integers(is_small_integer(gamma_neg) && is_small_integer(gamma_pos)) {}

  template <bool kRough = false, typename T>
  BCE_EXT_HOST_DEVICE T first_stage(T x) const {
    return kRough ? math::rough_exp_of_negative(math::magnitude(x)) : math::exp_of_negative(math::magnitude(x));
  }

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

  template <typename T, typename Weight, typename PosWeight>
  BCE_EXT_HOST_DEVICE Terms<T> evaluate_hard(T x, T y, Weight w, PosWeight p, T scale, T smaller) const {
    const HardLabel<T> label(*this, x, y, smaller);
    const T log_own = math::log_by_complement(label.own, label.complement);
    const Focus<T> focused = focus_of_hard(label.u, label.is_positive);
    const T gamma = math::select(label.is_positive, T(attached * gamma_pos), T(attached * gamma_neg));
    const T by_entropy = math::select(label.is_bounded, T(0), math::divide(label.u_slope, label.own)) * focused.power;
    const T slope = by_entropy - log_own * (gamma * (focused.previous * label.u_slope));

    Terms<T> terms;
    terms.loss = -log_own * focused.power;
    terms.grad_input = math::select(label.is_positive, -slope, slope);
    terms.grad_target = T(0);
    terms.loss = times_of_positive(p, label.is_positive, terms.loss);
    terms.grad_input = times_of_positive(p, label.is_positive, terms.grad_input);
    terms.summand = terms.loss;
    apply_weight(terms, w, scale);
    return terms;
  }

 private:
  // A label of 0 or 1, by the logit t that speaks against it, x or -x. With v = sigmoid(t), and no clip for a 1:
  //   u = max(v - clip, 0)       loss = -log(max(1-u, eps)) * u^g
  template <typename T>
  struct HardLabel {
    T u, u_slope;       // and its derivative by t
    T own, complement;  // max(1-u, eps), and 1 minus that
    math::Condition<T> is_positive, is_bounded;

    BCE_EXT_HOST_DEVICE HardLabel(const Asymmetric& loss, T x, T y, T smaller) : is_positive(y == T(1)) {
      const T zero = T(0), one = T(1), bound = T(loss.eps);
      const T clip = math::select(is_positive, zero, T(loss.clip));
      const math::Condition<T> below = math::is_negative(math::select(is_positive, -x, x));
      const T larger = one - smaller;
      const T excess = math::select(below, smaller, larger) - clip;
      u = math::at_least(zero, excess);
      u_slope = math::select(excess < zero, zero, smaller * larger);
      const T rest = math::at_most(one, math::select(below, larger, smaller) + clip);
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
