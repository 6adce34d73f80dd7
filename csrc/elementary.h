// Elementary functions for one element: host and device, no ATen, no call into a math library.
//
// Everything here is branch-free and inlined: the CPU kernel calls it with several elements at once (cpu/pack.h).
// Polynomials are minimax fits of the relative error, with the first coefficient fixed so that the tails are exact.
#pragma once

#include "number.h"
#include "tables.h"

namespace bce_ext {

namespace math {

template <typename T, typename Coefficient>
BCE_EXT_HOST_DEVICE T horner(T, Coefficient c0) {
  return c0;
}

template <typename T, typename Coefficient, typename... Rest>
BCE_EXT_HOST_DEVICE T horner(T x, Coefficient c0, Rest... rest) {
  return horner(x, rest...) * x + c0;
}

template <typename T, typename Coefficient>
BCE_EXT_HOST_DEVICE T horner_of_pairs(T, T, Coefficient c0) {
  return c0;
}

template <typename T, typename Coefficient>
BCE_EXT_HOST_DEVICE T horner_of_pairs(T x, T, Coefficient c0, Coefficient c1) {
  return c1 * x + c0;
}

template <typename T, typename Coefficient, typename... Rest>
BCE_EXT_HOST_DEVICE T horner_of_pairs(T x, T square, Coefficient c0, Coefficient c1, Coefficient c2, Rest... rest) {
  return horner_of_pairs(x, square, c2, rest...) * square + (c1 * x + c0);
}

// c0 + c1 x + c2 x^2 + ..., by Horner's scheme. Where each of its steps takes two instructions, pairs of terms halve
// the number of steps that wait for one another, for one multiplication more.
template <typename T, typename... Coefficients>
BCE_EXT_HOST_DEVICE T polynomial(T x, Coefficients... coefficients) {
  if constexpr (Number<T>::kHasMultiplyAdd) {
    return horner(x, coefficients...);
  } else {
    return horner_of_pairs(x, x * x, coefficients...);
  }
}

// unit * expm1(r) / r for |r| <= ln(2)/2: relative error of exp(r) 2^-28 (float; 2^-23 where it may be rough), 2^-56
// (double).
template <bool kRough = false, typename T>
BCE_EXT_HOST_DEVICE T expm1_quotient(T r, float unit) {
  if constexpr (kRough) {
    return polynomial(r, unit, unit * 0.499992315f, unit * 0.166671147f, unit * 0.0418901568f, unit * 0.00831252014f);
  } else {
    return polynomial(r, unit, unit * 0.49999994f, unit * 0.166665211f, unit * 0.0416681655f, unit * 0.00836866535f,
                      unit * 0.00138294569f);
  }
}

template <bool = false, typename T>
BCE_EXT_HOST_DEVICE T expm1_quotient(T r, double unit) {
  return polynomial(r, unit, unit * 0.5000000000000011, unit * 0.1666666666666641, unit * 0.041666666666529725,
                    unit * 0.00833333333349498, unit * 0.0013888888943760233, unit * 0.00019841269505770564,
                    unit * 2.480149294936181e-05, unit * 2.7557586805904078e-06, unit * 2.763030634462171e-07,
                    unit * 2.500001837640453e-08);
}

// The last argument tells float from double: packs of them have the same coefficients.

// (log1p(e) - e) / e^2 for e in [0, 1]: relative error of log1p(e) 2^-27 (float), 2^-55 (double).
template <typename T>
BCE_EXT_HOST_DEVICE T log1p_rest(T e, float) {
  return polynomial(e, -0.499999315f, 0.333304644f, -0.24958019f, 0.196921021f, -0.153448805f, 0.106611282f,
                    -0.057457231f, 0.0200862419f, -0.00329046859f);
}

template <typename T>
BCE_EXT_HOST_DEVICE T log1p_rest(T e, double) {
  return polynomial(e, -0.4999999999999946, 0.33333333333235043, -0.24999999993676444, 0.1999999979131836,
                    -0.16666662498409648, 0.1428565889596427, -0.12499479601292564, 0.11107505922994218,
                    -0.09981014591829193, 0.09013152574692633, -0.08081208985701993, 0.07035538011545206,
                    -0.057501968405873474, 0.04230007670450599, -0.026743936391728538, 0.013838573305882281,
                    -0.005543100774996444, 0.0015957382684543746, -0.00029176061554624387, 2.5329880843114147e-05);
}

// (log1p(f) - f) / f^2 for 1 + f in [sqrt(1/2), sqrt(2)]: relative error of log1p(f) 2^-26 (float), 2^-56 (double).
template <typename T>
BCE_EXT_HOST_DEVICE T centred_log1p_rest(T f, float) {
  return polynomial(f, -0.5f, 0.333333313f, -0.250008196f, 0.20001258f, -0.166234419f, 0.142010748f, -0.131585345f,
                    0.127657726f, -0.0764338672f);
}

template <typename T>
BCE_EXT_HOST_DEVICE T centred_log1p_rest(T f, double) {
  return polynomial(f, -0.5, 0.3333333333333314, -0.24999999999987976, 0.20000000000066606, -0.16666666669825844,
                    0.14285714280093778, -0.12499999691446902, 0.11111111147432927, -0.10000015206070528,
                    0.09090923932809215, -0.08332913545452823, 0.07691529803826647, -0.07149439441502926,
                    0.06684589257883691, -0.061966790588658054, 0.05668377027761832, -0.056777807194395076,
                    0.0650349110863701, -0.059817120572803945, 0.02615101329728167);
}

// -a - n * ln(2), where that is small. Rough, it is off by n * 2^-29.
template <bool kRough, typename T>
BCE_EXT_HOST_DEVICE T without_powers_of_two(T a, T n) {
  if constexpr (kRough && Number<T>::kHasMultiplyAdd) {
    return -a - n * Format<T>::kLn2;
  } else {
    return (-a - n * Format<T>::kLn2High) - n * Format<T>::kLn2Low;
  }
}

// exp(-a) for 0 <= a <= kExpCutoff, by the table of powers.
template <typename T>
BCE_EXT_HOST_DEVICE T rough_exp_by_table(T a) {
  // A sum with this number is rounded to a multiple of 1/32, whose low bits number the power of its fraction.
  constexpr Scalar<T> kRound = Scalar<T>(1.5) * power_of_two<Scalar<T>>(Format<T>::kMantissaBits - kTableBits);
  const T rounded = kRound - a * Format<T>::kLog2E;
  const T n = rounded - kRound;
  const T r = without_powers_of_two<true>(a, n);
  const T expm1 = polynomial(r, 1.00001467f, 0.49999998f) * r;  // off by 2^-24
  const T power = Number<T>::look_up(kPowers, to_bits(rounded));
  return Number<T>::times_power_of_two(expm1 * power + power, n);  // times 2^floor(n)
}

// exp(-a) for a >= 0, down to the smallest subnormal; NaN for NaN. Inputs of half precision may take a rougher form,
// off by up to 3 ULP of float32 for a below 8, and 6 beyond. It saves two to four of eleven instructions.
template <bool kMayBeRough = false, typename T>
BCE_EXT_HOST_DEVICE T exp_of_negative(T a) {
  constexpr bool kRough = kMayBeRough && std::is_same_v<Scalar<T>, float>;
  a = at_most(T(Format<T>::kExpCutoff), a);
#if defined(__CUDA_ARCH__)
  if constexpr (kRough) {
    using Constants = FloatFormat<float>;
    const float h = a * -Constants::kLog2E;
    // exp(-a) / 2^h - 1, as h is rounded
    const float lost = fmaf(h, -Constants::kLn2Rest, fmaf(h, -Constants::kLn2, -a));
    float power;
    asm("ex2.approx.f32 %0, %1;" : "=f"(power) : "f"(h));
    return fmaf(power, lost, power);
  }
#endif
  if constexpr (kRough && Number<T>::kLooksUp) return rough_exp_by_table(a);
  // 2^kLift keeps the exponent of every intermediate in the normal range; 2^-kLift, in the polynomial, takes it back,
  // so that a subnormal result is rounded once, by the last multiplication.
  constexpr int kLift = Number<T>::kScalesByPower ? 0 : 64;
  // A sum with this number is rounded to an integer, which then stands in its low bits as the biased exponent of a
  // power of two.
  constexpr Scalar<T> kRound =
      Scalar<T>(1.5) * power_of_two<Scalar<T>>(Format<T>::kMantissaBits) + Scalar<T>(Format<T>::kExponentBias + kLift);
  const T rounded = kRound - a * Format<T>::kLog2E;
  const T n = rounded - kRound;
  const T r = without_powers_of_two<kRough>(a, n);
  constexpr Scalar<T> kUnit = power_of_two<Scalar<T>>(-kLift);
  const T lowered = expm1_quotient<kRough>(r, kUnit) * r + kUnit;
  if constexpr (Number<T>::kScalesByPower) {
    return Number<T>::times_power_of_two(lowered, n);
  } else {
    return lowered * from_bits<T>(to_bits(rounded) << Format<T>::kMantissaBits);
  }
}

// log1p(e) for e in [0, 1].
template <typename T>
BCE_EXT_HOST_DEVICE T log1p_of_unit(T e) {
  return (e * e) * log1p_rest(e, Scalar<T>()) + e;
}

// u = 2^(n + kLift) * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)].
template <typename T>
struct Split {
  T n;
  T scale;  // 2^-(n + kLift)
};

template <int kLift = 0, typename T>
BCE_EXT_HOST_DEVICE Split<T> split(T u) {
  constexpr Bits<Scalar<T>> kBias = Format<T>::kExponentBias;
  constexpr Scalar<T> kRound = Scalar<T>(1.5) * power_of_two<Scalar<T>>(Format<T>::kMantissaBits);
  const Bits<T> biased =
      (to_bits(u) + ((kBias << Format<T>::kMantissaBits) - Format<T>::kSqrtHalf)) >> Format<T>::kMantissaBits;
  return {from_bits<T>(to_bits(kRound) + biased) - (kRound + Scalar<T>(Format<T>::kExponentBias + kLift)),
          from_bits<T>((2 * kBias - biased) << Format<T>::kMantissaBits)};
}

// The same with u = 2^(n + kLift) * c * (1 + f) for a number c of the table, and 1 + f in [1 - 1/64, 1 + 1/64].
template <typename T>
struct SplitByTable {
  T n;
  T scale;  // 2^-(n + kLift) / c
  T log_of_c;
};

template <int kLift, typename T>
BCE_EXT_HOST_DEVICE SplitByTable<T> split_by_table(T u) {
  constexpr int kBitsOfRest = Format<T>::kMantissaBits - kTableBits;
  constexpr Bits<Scalar<T>> kBias = Format<T>::kExponentBias;
  constexpr Scalar<T> kRound = Scalar<T>(1.5) * power_of_two<Scalar<T>>(Format<T>::kMantissaBits);
  // Takes a normal u past the end of its interval, and on to the next exponent where c is half of 1 + j/32.
  constexpr Bits<Scalar<T>> kUp = ((kPlaceOfOne + 1) << kBitsOfRest) - 1;
  const Bits<T> raised = to_bits(u) + kUp;
  const Bits<T> place = raised >> kBitsOfRest, biased = raised >> Format<T>::kMantissaBits;
  const Bits<T> reciprocal = to_bits(Number<T>::look_up(kReciprocals, place));
  return {from_bits<T>(to_bits(kRound) + biased) - (kRound + Scalar<T>(Format<T>::kExponentBias + kLift)),
          from_bits<T>((reciprocal + (kBias << Format<T>::kMantissaBits)) - (biased << Format<T>::kMantissaBits)),
          Number<T>::look_up(kLogs, place)};
}

// As log_of_split takes it.
template <int kLift = 0, typename T>
BCE_EXT_HOST_DEVICE auto split_for_log(T u) {
  if constexpr (Number<T>::kLooksUp) {
    return split_by_table<kLift>(u);
  } else {
    return split<kLift>(u);
  }
}

// log(2^n * (1 + f)). n times the high part of ln(2) is exact, so that it does not matter whether a compiler rounds it.
template <typename T>
BCE_EXT_HOST_DEVICE T log_of_split(Split<T> parts, T f) {
  const T rest = rounded((f * f) * centred_log1p_rest(f, Scalar<T>()));
  return parts.n * Format<T>::kLn2High + ((rest + parts.n * Format<T>::kLn2Low) + f);
}

// log(2^n * c * (1 + f)): relative error of log1p(f) 2^-28. The sum of the logarithms of 2^n and c is exact, too.
template <typename T>
BCE_EXT_HOST_DEVICE T log_of_split(SplitByTable<T> parts, T f) {
  const T rest = rounded((f * f) * polynomial(f, -0.5f, 0.33337384f, -0.25003657f));
  return (parts.n * Format<T>::kLn2High + parts.log_of_c) + ((rest + parts.n * Format<T>::kLn2Low) + f);
}

// log1p(p) for p >= 0, below the largest power of two. No rounding of 1 + p is felt, as f is not computed from it.
template <typename T>
BCE_EXT_HOST_DEVICE T log1p_of_nonnegative(T p) {
  const Split<T> parts = split(T(1) + p);
  return log_of_split(parts, p * parts.scale + (parts.scale - T(1)));
}

// (1 + a) * (1 + b) - 1, so that log1p of it is log1p(a) + log1p(b); exact to the last places for small a and b, too.
template <typename T>
BCE_EXT_HOST_DEVICE T product_of_excesses(T a, T b) {
  return a * b + (a + b);
}

// 2^n for an integral n in [-126, 127], or [-1022, 1023].
template <typename T>
BCE_EXT_HOST_DEVICE T exp2_of_integer(T n) {
  constexpr Scalar<T> kRound =
      Scalar<T>(1.5) * power_of_two<Scalar<T>>(Format<T>::kMantissaBits) + Scalar<T>(Format<T>::kExponentBias);
  return from_bits<T>(to_bits(n + kRound) << Format<T>::kMantissaBits);
}

// u^g for u >= 0 and g >= 0, with 0^0 = 1. A subnormal u counts as 0.
template <typename T>
BCE_EXT_HOST_DEVICE T power(T u, T g) {
  constexpr Scalar<T> kRound = Scalar<T>(1.5) * power_of_two<Scalar<T>>(Format<T>::kMantissaBits);
  // Beyond these, two factors of 2^(k/2) give 0 or infinity anyway.
  constexpr Scalar<T> kLimit = 2 * Format<T>::kExponentBias - 2;
  const Split<T> parts = split(u);
  const T f = u * parts.scale - T(1);
  const T log2_of_rest = ((f * f) * centred_log1p_rest(f, Scalar<T>()) + f) * Format<T>::kLog2E;
  // The exponent g * log2(u) in two parts, so that a large one costs no places of the result: the high half of g times
  // the integer n is exact.
  const T g_high = from_bits<T>(to_bits(g) & Format<T>::kHighHalfMask);
  const T whole = g_high * parts.n;
  const T rest = (g - g_high) * parts.n + g * log2_of_rest;
  const T exponent = whole + rest;
  const T bounded = select(exponent < T(-kLimit), T(-kLimit), select(exponent > T(kLimit), T(kLimit), exponent));
  const T k = (bounded + kRound) - kRound;
  const T half = (bounded * T(0.5) + kRound) - kRound;
  const T r = ((whole - k) + rest) * Format<T>::kLn2;
  const T fraction = expm1_quotient(r, Scalar<T>(1)) * r + T(1);
  const T result = fraction * exp2_of_integer(half) * exp2_of_integer(k - half);
  const T of_zero = select(g == T(0), T(1), T(0));
  // A bounded exponent has an r without meaning, and its result is 0 or infinity.
  const T beyond = select(exponent > T(kLimit), T(Format<T>::kInfinity), T(0));
  const Condition<T> is_bounded = (exponent < T(-kLimit)) | (exponent > T(kLimit));
  return select(u < T(Format<T>::kSmallestNormal), of_zero, select(is_bounded, beyond, result));
}

// log(2^-kLift * u) for a normal u > 0. Of 0, a number below that of the smallest normal u.
template <int kLift, typename T>
BCE_EXT_HOST_DEVICE T log_of_lifted(T u) {
  const auto parts = split_for_log<kLift>(u);
  return log_of_split(parts, u * parts.scale - T(1));
}

// With this, numbers in (0, 1] are normal.
constexpr int kUnitLift = 64;

// The sum makes 0 of -0.
template <typename T>
BCE_EXT_HOST_DEVICE T lifted(T q) {
  return q * power_of_two<Scalar<T>>(kUnitLift) + T(0);
}

// log(q) for q in [0, 1]; of 0, a number below -100.
template <typename T>
BCE_EXT_HOST_DEVICE T log_of_unit(T q) {
  return log_of_lifted<kUnitLift>(lifted(q));
}

// log(q) for a normal q in (0, 1] whose complement 1 - q is known to its last places: near 1 the logarithm comes from
// that.
template <typename T>
BCE_EXT_HOST_DEVICE T log_by_complement(T q, T complement) {
  const auto parts = split_for_log(q);
  const T direct = q * parts.scale - T(1);
  const T by_complement = (parts.scale - T(1)) - complement * parts.scale;
  return log_of_split(parts, select(q < T(0.5), direct, by_complement));
}

// log(1 - q) for q in [0, 1]. No rounding of 1 - q is felt: where it is inexact, f is not computed from it.
template <typename T>
BCE_EXT_HOST_DEVICE T log1p_of_negative(T q) {
  const auto parts = split_for_log(T(1) - q);
  const T f = (parts.scale - T(1)) - q * parts.scale;
  return select(q == T(1), T(-Format<T>::kInfinity), log_of_split(parts, f));
}

// log(q) where `first` holds, log(1 - q) elsewhere, for q in [0, 1]; of 0, a number below -100.
template <typename T>
BCE_EXT_HOST_DEVICE T log_of_either(Condition<T> first, T q) {
  const T u = lifted(select(first, q, T(1) - q));
  const auto parts = split_for_log<kUnitLift>(u);
  const T f_of_first = u * parts.scale - T(1);
  // 1 / (1 - q) is 2^53 at most, or infinite, which must not become NaN here.
  const T scale = at_most(T(power_of_two<Scalar<T>>(kUnitLift)), parts.scale * power_of_two<Scalar<T>>(kUnitLift));
  const T f_of_second = (scale - T(1)) - q * scale;
  return log_of_split(parts, select(first, f_of_first, f_of_second));
}

// numerator / d for a normal d > 0 whose reciprocal is normal.
template <typename T>
BCE_EXT_HOST_DEVICE T divide(T numerator, T d) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, float>) {
    // At most 2 ULP: the reciprocal has at most 1, the product rounds once more. Nothing subnormal is flushed; what
    // __fdividef does about such a d is left out.
    float reciprocal;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(d));
    return numerator * reciprocal;
  }
#endif
  return numerator / d;
}

}  // namespace math

}  // namespace bce_ext
