// What formulas compute with, a number or a pack of them (cpu/pack.h): its bits, its conditions, selections by these.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define BCE_EXT_HOST_DEVICE __host__ __device__ __forceinline__
#else
// BCE_EXT_TARGET selects the instructions that a file is compiled for (cpu/block_kernel_impl.h).
#if !defined(BCE_EXT_TARGET)
#define BCE_EXT_TARGET
#endif
#define BCE_EXT_HOST_DEVICE inline __attribute__((always_inline)) BCE_EXT_TARGET
#endif

namespace bce_ext {

namespace math {

template <typename T>
struct FloatFormat;

template <>
struct FloatFormat<float> {
  using Bits = uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr int kExponentBias = 127;
  static constexpr Bits kMagnitudeMask = 0x7fffffffu;
  static constexpr Bits kSqrtHalf = 0x3f3504f3u;      // the bits of sqrt(1/2)
  static constexpr Bits kHighHalfMask = 0xffffff00u;  // of 24 bits 16: times an exponent of 8 bits it is exact
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kLn2 = 0.693147181f;
  static constexpr float kLn2Rest = -1.90465421e-9f;  // of ln(2)
  static constexpr float kLn2High = 0.693145752f;     // few enough bits for n * kLn2High to be exact
  static constexpr float kLn2Low = 1.42860677e-6f;
  static constexpr float kSmallestNormal = std::numeric_limits<float>::min();
  static constexpr float kLargest = std::numeric_limits<float>::max();
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr float kExpCutoff = 110.0f;  // exp(-110) rounds to 0
};

template <>
struct FloatFormat<double> {
  using Bits = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr int kExponentBias = 1023;
  static constexpr Bits kMagnitudeMask = 0x7fffffffffffffffull;
  static constexpr Bits kSqrtHalf = 0x3fe6a09e667f3bcdull;
  static constexpr Bits kHighHalfMask = 0xfffffffffffff000ull;
  static constexpr double kLog2E = 1.4426950408889634;
  static constexpr double kLn2 = 0.69314718055994531;
  static constexpr double kLn2High = 0.69314718036912382;
  static constexpr double kLn2Low = 1.9082149292705877e-10;
  static constexpr double kSmallestNormal = std::numeric_limits<double>::min();
  static constexpr double kLargest = std::numeric_limits<double>::max();
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  static constexpr double kExpCutoff = 750.0;
};

// What the functions below compute with: float, double, or a pack of either (cpu/pack.h).
template <typename T>
struct Number {
  using Scalar = T;
  using Bits = typename FloatFormat<T>::Bits;
  using Condition = bool;
  static constexpr bool kHasMultiplyAdd = true;  // in one instruction
  static constexpr bool kScalesByPower = false;  // has times_power_of_two(value, n): value * 2^n, rounded once
  static constexpr bool kLooksUp = false;        // has look_up(table, bits): the entries that the low bits number

  static BCE_EXT_HOST_DEVICE Bits to_bits(T value) {
    Bits bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
  }
  static BCE_EXT_HOST_DEVICE T from_bits(Bits bits) {
    T value;
    memcpy(&value, &bits, sizeof(value));
    return value;
  }
  static BCE_EXT_HOST_DEVICE bool is_negative(T x) { return (to_bits(x) & ~FloatFormat<T>::kMagnitudeMask) != 0; }
  static BCE_EXT_HOST_DEVICE T times_sign_of(T a, T b) { return is_negative(b) ? -a : a; }
  static BCE_EXT_HOST_DEVICE T select(bool condition, T a, T b) { return condition ? a : b; }
  static BCE_EXT_HOST_DEVICE T at_most(T bound, T a) { return bound < a ? bound : a; }
  static BCE_EXT_HOST_DEVICE T at_least(T bound, T a) { return a < bound ? bound : a; }
  static BCE_EXT_HOST_DEVICE bool all(bool condition) { return condition; }
};

template <typename T>
using Scalar = typename Number<T>::Scalar;
template <typename T>
using Bits = typename Number<T>::Bits;
template <typename T>
using Condition = typename Number<T>::Condition;
template <typename T>
using Format = FloatFormat<Scalar<T>>;

template <typename T>
BCE_EXT_HOST_DEVICE Bits<T> to_bits(T value) {
  return Number<T>::to_bits(value);
}

template <typename T>
BCE_EXT_HOST_DEVICE T from_bits(Bits<T> bits) {
  return Number<T>::from_bits(bits);
}

// Whether the sign bit is set.
template <typename T>
BCE_EXT_HOST_DEVICE Condition<T> is_negative(T x) {
  return Number<T>::is_negative(x);
}

// a times the sign of b: -a where its sign bit is set. Unlike copysign, this keeps the sign of a.
template <typename T>
BCE_EXT_HOST_DEVICE T times_sign_of(T a, T b) {
  return Number<T>::times_sign_of(a, b);
}

// condition ? a : b
template <typename T>
BCE_EXT_HOST_DEVICE T select(Condition<T> condition, T a, T b) {
  return Number<T>::select(condition, a, b);
}

// The smaller of both; NaN where a is.
template <typename T>
BCE_EXT_HOST_DEVICE T at_most(T bound, T a) {
  return Number<T>::at_most(bound, a);
}

// The larger of both; NaN where a is.
template <typename T>
BCE_EXT_HOST_DEVICE T at_least(T bound, T a) {
  return Number<T>::at_least(bound, a);
}

// Whether a condition holds for every element.
template <typename T>
BCE_EXT_HOST_DEVICE bool all(Condition<T> condition) {
  return Number<T>::all(condition);
}

template <typename T>
BCE_EXT_HOST_DEVICE T magnitude(T x) {
  return from_bits<T>(to_bits(x) & Format<T>::kMagnitudeMask);
}

// 2^exponent for a normal result.
template <typename T>
BCE_EXT_HOST_DEVICE constexpr T power_of_two(int exponent) {
  T result = T(1);
  for (int i = 0; i < exponent; ++i) result *= T(2);
  for (int i = 0; i > exponent; --i) result *= T(0.5);
  return result;
}

// weight * value, where 0 * infinity is 0: a term that has no weight has no say.
template <typename T>
BCE_EXT_HOST_DEVICE T weighted(T weight, T value) {
  return select((weight == T(0)) & (magnitude(value) == T(Format<T>::kInfinity)), T(0), weight * value);
}

}  // namespace math

// The same number, which a compiler must have rounded. It may compute a * b + c with one rounding or with two, a * b +
// c * d with either product rounded, and does one or the other from kernel to kernel. Held to for packs (cpu/pack.h);
// for a single number, as on a GPU, this does nothing.
template <typename T>
BCE_EXT_HOST_DEVICE T rounded(T number) {
  return number;
}

}  // namespace bce_ext
