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

// Vectors as wide as a register, and as its numbers are in smaller types.
template <int kBytes>
struct Vectors {
  using Bits __attribute__((vector_size(kBytes))) = uint32_t;
  using Words __attribute__((vector_size(kBytes / 2))) = uint16_t;
  using WordsInMemory __attribute__((vector_size(kBytes / 2), aligned(2), may_alias)) = uint16_t;
  using BytesInMemory __attribute__((vector_size(kBytes / 4), aligned(1), may_alias)) = uint8_t;
};

// Compilers make more of these conversions than the single instructions that AVX2 and AVX-512 have for them.
template <int kBytes, typename S>
BCE_EXT_HOST_DEVICE typename Vectors<kBytes>::Bits widen(const S* in) {
  using Bits = typename Vectors<kBytes>::Bits;
#if defined(__x86_64__)
  if constexpr (kBytes == 64 && sizeof(S) == 2) {
    return (Bits)_mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
  } else if constexpr (kBytes == 64) {
    return (Bits)_mm512_maskz_cvtepu8_epi32(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
  } else if constexpr (kBytes == 32 && sizeof(S) == 2) {
    return (Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
  } else if constexpr (kBytes == 32) {
    return (Bits)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in)));
  }
#endif
  if constexpr (sizeof(S) == 2) {
    return __builtin_convertvector(*reinterpret_cast<const typename Vectors<kBytes>::WordsInMemory*>(in), Bits);
  } else {
    return __builtin_convertvector(*reinterpret_cast<const typename Vectors<kBytes>::BytesInMemory*>(in), Bits);
  }
}

// A register full of numbers, of memory that holds them as S.
template <typename Numbers, typename S>
BCE_EXT_HOST_DEVICE typename Numbers::Register load_register(const S* in) {
  using Register = typename Numbers::Register;
  constexpr int kBytes = sizeof(Register);
  if constexpr (std::is_same_v<S, BFloat16Bits>) {
    return (Register)(widen<kBytes>(in) << 16);
  } else if constexpr (std::is_same_v<S, BoolBits>) {
    const Register zero = {};
    return widen<kBytes>(in) != 0 ? zero + 1 : zero;
#if defined(__x86_64__)
  } else if constexpr (kBytes == 64) {
    return (Register)_mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
  } else {
    return (Register)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
#endif
  }
}

template <typename Numbers, typename S>
BCE_EXT_HOST_DEVICE Numbers load(const S* in) {
  if constexpr (std::is_floating_point_v<S>) {
    return Numbers::load(in);
  } else {
    return {load_register<Numbers>(in), load_register<Numbers>(in + Numbers::kPerRegister)};
  }
}

template <int kBytes, typename Register>
BCE_EXT_HOST_DEVICE typename Vectors<kBytes>::Bits rounded_to_bfloat16(Register numbers) {
  using Bits = typename Vectors<kBytes>::Bits;
  return bce_ext::rounded_to_bfloat16<Bits>((Bits)numbers, (Bits)(numbers != numbers));
}

// The numbers of a register, rounded to S: a vector of a register's width, or half of that.
template <typename Numbers, typename S>
BCE_EXT_HOST_DEVICE auto rounded_to(typename Numbers::Register numbers) {
  constexpr int kBytes = sizeof(numbers);
  if constexpr (std::is_same_v<S, BFloat16Bits>) {
    using Bits = typename Vectors<kBytes>::Bits;
    const Bits high = rounded_to_bfloat16<kBytes>(numbers) >> 16;
    return __builtin_convertvector(high, typename Vectors<kBytes>::Words);
#if defined(__x86_64__)
  } else if constexpr (std::is_same_v<S, HalfBits> && kBytes == 64) {
    return _mm512_maskz_cvtps_ph(kAll, (__m512)numbers, _MM_FROUND_TO_NEAREST_INT);
  } else if constexpr (std::is_same_v<S, HalfBits>) {
    return _mm256_cvtps_ph((__m256)numbers, _MM_FROUND_TO_NEAREST_INT);
#endif
  } else {
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

template <typename Numbers, typename S>
BCE_EXT_HOST_DEVICE void store(Numbers numbers, S* out, bool past_caches) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<S, BFloat16Bits> && sizeof(numbers.low) == 64) {
    // One instruction takes the high halves of both registers.
    const __m512i low = (__m512i)rounded_to_bfloat16<64>(numbers.low);
    const __m512i high = (__m512i)rounded_to_bfloat16<64>(numbers.high);
    alignas(64) static constexpr uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return store_vector(_mm512_permutex2var_epi16(low, *reinterpret_cast<const __m512i*>(kOdd), high), out,
                        past_caches);
  }
#endif
  store_vector(rounded_to<Numbers, S>(numbers.low), out, past_caches);
  store_vector(rounded_to<Numbers, S>(numbers.high), out + Numbers::kPerRegister, past_caches);
}

}  // namespace bce_ext
