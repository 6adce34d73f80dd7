// Several numbers in vector registers, with the operators that elementary.h is written in.
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

#include "../elementary.h"

namespace bce_ext {

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

  // To memory without a place in the caches, where the machine has a way to; `out` is aligned like a register. Other
  // threads see it after fence_past_caches().
  BCE_EXT_HOST_DEVICE void store_past_caches(T* out) const {
#if defined(__x86_64__)
    float* const to = reinterpret_cast<float*>(out);
    float* const to_high = reinterpret_cast<float*>(out + kPerRegister);
    if constexpr (kBytes == 16) {
      _mm_stream_ps(to, (__m128)low);
      _mm_stream_ps(to_high, (__m128)high);
    } else if constexpr (kBytes == 32) {
      _mm256_stream_ps(to, (__m256)low);
      _mm256_stream_ps(to_high, (__m256)high);
    } else {
      _mm512_stream_ps(to, (__m512)low);
      _mm512_stream_ps(to_high, (__m512)high);
    }
#else
    store(out);
#endif
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

BCE_EXT_HOST_DEVICE void fence_past_caches() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
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

  static BCE_EXT_HOST_DEVICE Bits to_bits(Numbers x) { return Bits::from_bits_of(x); }
  static BCE_EXT_HOST_DEVICE Numbers from_bits(Bits bits) { return Numbers::from_bits_of(bits); }
  static BCE_EXT_HOST_DEVICE Condition is_negative(Numbers x) { return Condition::from_bits_of(x) < 0; }
  static BCE_EXT_HOST_DEVICE Numbers with_sign_of(Numbers a, Numbers b) {
    return from_bits(to_bits(a) ^ (to_bits(b) & ~FloatFormat<T>::kMagnitudeMask));
  }
  static BCE_EXT_HOST_DEVICE Numbers select(Condition condition, Numbers a, Numbers b) {
    return {condition.low ? a.low : b.low, condition.high ? a.high : b.high};
  }
};

}  // namespace math
}  // namespace bce_ext
