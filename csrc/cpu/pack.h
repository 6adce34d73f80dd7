// Several numbers in vector registers, with the operators that elementary.h and formulas are written in.
//
// A pack is wider than one register. Each operation is then that many independent instructions, one after another,
// which a processor can work on while it waits for results: it looks ahead over a limited number of instructions, and a
// formula for one register is longer than that.
//
// Vectors of one register's width are what GCC and Clang translate well; wider ones they split only in part.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../number.h"

namespace bce_ext {

#if defined(__x86_64__)
// The mask of all elements. Without a mask, AVX-512 intrinsics of GCC 12 begin with a register that is not initialised,
// and it warns of that; with this one the instruction is the same.
constexpr auto kAll = static_cast<__mmask16>(-1);
#endif

// Two registers of kBytes full of T.
template <typename T, int kBytes>
struct Pack {
  static constexpr int kPerRegister = kBytes / sizeof(T);
  static constexpr int kElements = 2 * kPerRegister;
  using Register __attribute__((vector_size(kBytes))) = T;
  using InMemory __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias)) = T;
  using Condition = Pack<std::conditional_t<sizeof(T) == 8, int64_t, int32_t>, kBytes>;

  Register low, high;

  Pack() = default;
  BCE_EXT_HOST_DEVICE Pack(Register low, Register high) : low(low), high(high) {}
  BCE_EXT_HOST_DEVICE Pack(T value) : low(value - Register{}), high(low) {}  // the value in all places

  template <typename Other>
  static BCE_EXT_HOST_DEVICE Pack from_bits_of(Other other) {
    return {(Register)other.low, (Register)other.high};
  }

  static BCE_EXT_HOST_DEVICE Pack load(const T* in) {
    return {*reinterpret_cast<const InMemory*>(in), *reinterpret_cast<const InMemory*>(in + kPerRegister)};
  }
  BCE_EXT_HOST_DEVICE void store(T* out) const {
    *reinterpret_cast<InMemory*>(out) = low;
    *reinterpret_cast<InMemory*>(out + kPerRegister) = high;
  }

  friend BCE_EXT_HOST_DEVICE Pack operator+(Pack a, Pack b) { return {a.low + b.low, a.high + b.high}; }
  friend BCE_EXT_HOST_DEVICE Pack operator-(Pack a, Pack b) { return {a.low - b.low, a.high - b.high}; }
  friend BCE_EXT_HOST_DEVICE Pack operator*(Pack a, Pack b) { return {a.low * b.low, a.high * b.high}; }
  friend BCE_EXT_HOST_DEVICE Pack operator/(Pack a, Pack b) { return {a.low / b.low, a.high / b.high}; }
  friend BCE_EXT_HOST_DEVICE Pack operator&(Pack a, Pack b) { return {a.low & b.low, a.high & b.high}; }
  friend BCE_EXT_HOST_DEVICE Pack operator|(Pack a, Pack b) { return {a.low | b.low, a.high | b.high}; }
  friend BCE_EXT_HOST_DEVICE Pack operator^(Pack a, Pack b) { return {a.low ^ b.low, a.high ^ b.high}; }
  friend BCE_EXT_HOST_DEVICE Pack operator-(Pack a) { return {-a.low, -a.high}; }
  friend BCE_EXT_HOST_DEVICE Pack operator<<(Pack a, int count) { return {a.low << count, a.high << count}; }
  friend BCE_EXT_HOST_DEVICE Pack operator>>(Pack a, int count) { return {a.low >> count, a.high >> count}; }
  friend BCE_EXT_HOST_DEVICE Condition operator==(Pack a, Pack b) { return {a.low == b.low, a.high == b.high}; }
  friend BCE_EXT_HOST_DEVICE Condition operator<(Pack a, Pack b) { return {a.low < b.low, a.high < b.high}; }
  friend BCE_EXT_HOST_DEVICE Condition operator>(Pack a, Pack b) { return {a.low > b.low, a.high > b.high}; }
};

// The same numbers, held in registers: GCC reads them from memory once for each use otherwise.
template <typename T, int kBytes>
BCE_EXT_HOST_DEVICE Pack<T, kBytes> in_registers(Pack<T, kBytes> numbers) {
#if defined(__x86_64__)
  asm("" : "+v"(numbers.low), "+v"(numbers.high));
#elif defined(__aarch64__)
  asm("" : "+w"(numbers.low), "+w"(numbers.high));
#endif
  return numbers;
}

// See number.h. A compiler cannot contract a product that went through in_registers.
template <typename T, int kBytes>
BCE_EXT_HOST_DEVICE Pack<T, kBytes> rounded(Pack<T, kBytes> numbers) {
  return in_registers(numbers);
}

namespace math {

template <typename T, int kBytes>
struct Number<Pack<T, kBytes> > {
  using Numbers = Pack<T, kBytes>;
  using Scalar = T;
  using Bits = Pack<typename FloatFormat<T>::Bits, kBytes>;
  using Condition = typename Numbers::Condition;
#if defined(__FP_FAST_FMAF)
  static constexpr bool kHasMultiplyAdd = true;
#else
  static constexpr bool kHasMultiplyAdd = kBytes > 16;  // x86-64 has it where it has such registers
#endif
  static constexpr bool kScalesByPower = kBytes == 64;
  static constexpr bool kLooksUp = kBytes == 64 && sizeof(T) == 4;

  static BCE_EXT_HOST_DEVICE Bits to_bits(Numbers x) { return Bits::from_bits_of(x); }
  static BCE_EXT_HOST_DEVICE Numbers from_bits(Bits bits) { return Numbers::from_bits_of(bits); }
  static BCE_EXT_HOST_DEVICE Condition is_negative(Numbers x) { return Condition::from_bits_of(x) < 0; }
  static BCE_EXT_HOST_DEVICE Numbers times_sign_of(Numbers a, Numbers b) {
    return from_bits(to_bits(a) ^ (to_bits(b) & ~FloatFormat<T>::kMagnitudeMask));
  }
  static BCE_EXT_HOST_DEVICE Numbers select(Condition condition, Numbers a, Numbers b) {
    return {condition.low ? a.low : b.low, condition.high ? a.high : b.high};
  }
  static BCE_EXT_HOST_DEVICE Numbers at_most(Numbers bound, Numbers a) {
    return {within<kAtMost>(bound.low, a.low), within<kAtMost>(bound.high, a.high)};
  }
  static BCE_EXT_HOST_DEVICE Numbers at_least(Numbers bound, Numbers a) {
    return {within<kAtLeast>(bound.low, a.low), within<kAtLeast>(bound.high, a.high)};
  }
  static BCE_EXT_HOST_DEVICE bool all(Condition condition) {
    const auto both = condition.low & condition.high;  // of -1 and 0
#if defined(__x86_64__)
    if constexpr (kBytes == 64) return _mm512_movepi8_mask((__m512i)both) == ~__mmask64(0);
    if constexpr (kBytes == 32) return _mm256_movemask_epi8((__m256i)both) == -1;
    if constexpr (kBytes == 16) return _mm_movemask_epi8((__m128i)both) == 0xffff;
#endif
    bool result = true;
    for (int i = 0; i < Numbers::kPerRegister; ++i) result &= both[i] != 0;
    return result;
  }
#if defined(__x86_64__)
  static BCE_EXT_HOST_DEVICE Numbers times_power_of_two(Numbers value, Numbers n) {
    return {times_power_of_two(value.low, n.low), times_power_of_two(value.high, n.high)};
  }
  static BCE_EXT_HOST_DEVICE Numbers look_up(const Table& table, Bits bits) {
    return {look_up(table, bits.low), look_up(table, bits.high)};
  }
#endif

 private:
  using Register = typename Numbers::Register;
  enum Bound { kAtMost, kAtLeast };

  template <Bound kBound>
  static BCE_EXT_HOST_DEVICE Register within(Register bound, Register a) {
    constexpr bool kMin = kBound == kAtMost;
#if defined(__x86_64__)
    // Compilers do not see that a choice by comparison is this instruction, which gives its second operand for NaN.
    constexpr bool kFloat = sizeof(T) == 4;
    if constexpr (kBytes == 16 && kFloat)
      return (Register)(kMin ? _mm_min_ps((__m128)bound, (__m128)a) : _mm_max_ps((__m128)bound, (__m128)a));
    if constexpr (kBytes == 16 && !kFloat)
      return (Register)(kMin ? _mm_min_pd((__m128d)bound, (__m128d)a) : _mm_max_pd((__m128d)bound, (__m128d)a));
    if constexpr (kBytes == 32 && kFloat)
      return (Register)(kMin ? _mm256_min_ps((__m256)bound, (__m256)a) : _mm256_max_ps((__m256)bound, (__m256)a));
    if constexpr (kBytes == 32 && !kFloat)
      return (Register)(kMin ? _mm256_min_pd((__m256d)bound, (__m256d)a) : _mm256_max_pd((__m256d)bound, (__m256d)a));
    if constexpr (kBytes == 64 && kFloat)
      return (Register)(kMin ? _mm512_maskz_min_ps(kAll, (__m512)bound, (__m512)a)
                             : _mm512_maskz_max_ps(kAll, (__m512)bound, (__m512)a));
    constexpr auto kAllDoubles = static_cast<__mmask8>(kAll);
    if constexpr (kBytes == 64 && !kFloat)
      return (Register)(kMin ? _mm512_maskz_min_pd(kAllDoubles, (__m512d)bound, (__m512d)a)
                             : _mm512_maskz_max_pd(kAllDoubles, (__m512d)bound, (__m512d)a));
#endif
    return kMin ? (bound < a ? bound : a) : (a < bound ? bound : a);
  }
#if defined(__x86_64__)
  static BCE_EXT_HOST_DEVICE Register times_power_of_two(Register value, Register n) {
    if constexpr (sizeof(T) == 4) return (Register)_mm512_maskz_scalef_ps(kAll, (__m512)value, (__m512)n);
    if constexpr (sizeof(T) == 8)
      return (Register)_mm512_maskz_scalef_pd(static_cast<__mmask8>(kAll), (__m512d)value, (__m512d)n);
  }
  static BCE_EXT_HOST_DEVICE Register look_up(const Table& table, typename Bits::Register bits) {
    return (Register)_mm512_permutex2var_ps(_mm512_load_ps(table), (__m512i)bits, _mm512_load_ps(table + 16));
  }
#endif
};

}  // namespace math
}  // namespace bce_ext
