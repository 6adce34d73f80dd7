// Packs of numbers from and to memory that holds them in another type, and to memory past the caches.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "element_types.h"
#include "pack.h"

namespace bce_ext {

// Whether a pack with registers of kBytes is converted from and to float16 in an instruction.
template <int kBytes>
constexpr bool kConvertsHalf =
#if defined(__x86_64__)
    kBytes >= 32;
#else
    false;
#endif

// Whether a pack with registers of kBytes is made of 64-bit integers in a few instructions.
template <int kBytes>
constexpr bool kConvertsInt64 = kConvertsHalf<kBytes>;

// Bools beside numbers in bfloat16, in the order of their packs.
struct BoolPairs {
  uint8_t bits;
};

// Vectors as wide as a register, and as its numbers are in smaller types.
template <int kBytes>
struct Vectors {
  using Bits __attribute__((vector_size(kBytes))) = uint32_t;
  using BitsInMemory __attribute__((vector_size(kBytes), aligned(2), may_alias)) = uint32_t;
  using WordsInMemory __attribute__((vector_size(kBytes / 2), aligned(1), may_alias)) = uint16_t;
  using BytesInMemory __attribute__((vector_size(kBytes / 4), aligned(1), may_alias)) = uint8_t;
};

// A register of 32-bit integers from bytes, or from words. Compilers make more of these conversions than the single
// instructions that AVX2 and AVX-512 have for them.
template <int kBytes, typename InMemory>
BCE_EXT_HOST_DEVICE typename Vectors<kBytes>::Bits widen(const void* in) {
  using Bits = typename Vectors<kBytes>::Bits;
#if defined(__x86_64__)
  constexpr bool kOfWords = sizeof(InMemory) == kBytes / 2;
  if constexpr (kBytes == 64 && kOfWords) {
    return (Bits)_mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256((const __m256i*)in));
  } else if constexpr (kBytes == 64) {
    return (Bits)_mm512_maskz_cvtepu8_epi32(kAll, _mm_loadu_si128((const __m128i*)in));
  } else if constexpr (kBytes == 32 && kOfWords) {
    return (Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)in));
  } else if constexpr (kBytes == 32) {
    return (Bits)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)in));
  }
#endif
  return __builtin_convertvector(*static_cast<const InMemory*>(in), Bits);
}

template <typename Register, typename Bits>
BCE_EXT_HOST_DEVICE Register one_where(Bits bits) {
  const Register zero = {};
  return bits != 0 ? zero + 1 : zero;
}

// The low halves of 64-bit integers.
template <int kBytes>
BCE_EXT_HOST_DEVICE typename Vectors<kBytes>::Bits low_halves(const int64_t* in) {
#if defined(__x86_64__)
  using Bits = typename Vectors<kBytes>::Bits;
  if constexpr (kBytes == 64) {
    alignas(64) static constexpr int32_t kEven[16] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    return (Bits)_mm512_permutex2var_epi32(_mm512_loadu_si512(in), *reinterpret_cast<const __m512i*>(kEven),
                                           _mm512_loadu_si512(in + 8));
  } else {
    const __m256 first = _mm256_loadu_ps((const float*)in), second = _mm256_loadu_ps((const float*)(in + 4));
    return (Bits)_mm256_permute4x64_epi64((__m256i)_mm256_shuffle_ps(first, second, 0x88), 0xd8);
  }
#endif
}

template <typename Register>
BCE_EXT_HOST_DEVICE Register load_halves(const HalfBits* in) {
#if defined(__x86_64__)
  if constexpr (sizeof(Register) == 64) {
    return (Register)_mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256((const __m256i*)in));
  } else {
    return (Register)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)in));
  }
#endif
}

// A pack of what memory holds as S; integers are labels, 0 or 1. Numbers in bfloat16 lie in the two halves of 32 bits,
// of which one register gets the low ones, the other the high ones: an instruction each.
template <typename Numbers, typename S>
BCE_EXT_HOST_DEVICE Numbers load(const S* in) {
  using Register = typename Numbers::Register;
  constexpr int kBytes = sizeof(Register);
  if constexpr (std::is_floating_point_v<S>) {
    return Numbers::load(in);
  } else if constexpr (std::is_same_v<S, BFloat16Bits>) {
    const auto pairs = *reinterpret_cast<const typename Vectors<kBytes>::BitsInMemory*>(in);
    return {(Register)(pairs << 16), (Register)(pairs & kHighHalf)};
  } else if constexpr (std::is_same_v<S, BoolPairs>) {
    const auto pairs = widen<kBytes, typename Vectors<kBytes>::WordsInMemory>(in);
    return {one_where<Register>(pairs & 0x00ffu), one_where<Register>(pairs & 0xff00u)};
  } else if constexpr (std::is_same_v<S, BoolBits>) {
    using Bytes = typename Vectors<kBytes>::BytesInMemory;
    return {one_where<Register>(widen<kBytes, Bytes>(in)),
            one_where<Register>(widen<kBytes, Bytes>(in + Numbers::kPerRegister))};
  } else if constexpr (std::is_same_v<S, int64_t>) {
    return {one_where<Register>(low_halves<kBytes>(in)),
            one_where<Register>(low_halves<kBytes>(in + Numbers::kPerRegister))};
  } else {
    return {load_halves<Register>(in), load_halves<Register>(in + Numbers::kPerRegister)};
  }
}

// The numbers of a register, rounded to S: a vector of a register's width, or half of that.
template <typename Numbers, typename S>
BCE_EXT_HOST_DEVICE auto rounded_to(typename Numbers::Register numbers) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<S, HalfBits> && sizeof(numbers) == 64) {
    return _mm512_maskz_cvtps_ph(kAll, (__m512)numbers, _MM_FROUND_TO_NEAREST_INT);
  } else if constexpr (std::is_same_v<S, HalfBits>) {
    return _mm256_cvtps_ph((__m256)numbers, _MM_FROUND_TO_NEAREST_INT);
  } else
#endif
  {
    return numbers;
  }
}

// To memory without a place in the caches, where the machine has a way to; `out` is aligned like the vector. Other
// threads see it after fence_past_caches().
template <typename Vector>
BCE_EXT_HOST_DEVICE void store_past_caches(Vector vector, void* out) {
#if defined(__x86_64__)
  if constexpr (sizeof(Vector) == 16) return _mm_stream_si128(static_cast<__m128i*>(out), (__m128i)vector);
  if constexpr (sizeof(Vector) == 32) return _mm256_stream_si256(static_cast<__m256i*>(out), (__m256i)vector);
  if constexpr (sizeof(Vector) == 64) return _mm512_stream_si512(static_cast<__m512i*>(out), (__m512i)vector);
#endif
  memcpy(out, &vector, sizeof(vector));
}

BCE_EXT_HOST_DEVICE void fence_past_caches() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <typename Vector>
BCE_EXT_HOST_DEVICE void store_vector(Vector vector, void* out, bool past_caches) {
  if (past_caches) {
    store_past_caches(vector, out);
  } else {
    memcpy(out, &vector, sizeof(vector));
  }
}

// A pack to memory that holds it as S; in bfloat16 as load reads it, and with every NaN having 0 in its low half, as
// NaNs that come from memory or out of arithmetic do: then rounding leaves it a NaN.
template <typename Numbers, typename S>
BCE_EXT_HOST_DEVICE void store(Numbers numbers, S* out, bool past_caches) {
  if constexpr (std::is_same_v<S, BFloat16Bits>) {
    using Bits = typename Vectors<sizeof(numbers.low)>::Bits;
    const Bits low = rounded_to_bfloat16((Bits)numbers.low) >> 16;
    const Bits high = rounded_to_bfloat16((Bits)numbers.high) & kHighHalf;
    store_vector(low | high, out, past_caches);
  } else {
    store_vector(rounded_to<Numbers, S>(numbers.low), out, past_caches);
    store_vector(rounded_to<Numbers, S>(numbers.high), out + Numbers::kPerRegister, past_caches);
  }
}

}  // namespace bce_ext
