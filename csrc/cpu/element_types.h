// The element types that memory holds, and their conversion from and to the types that the kernel computes in.
#pragma once

#include <cstdint>

#include "../number.h"
#include "../problem.h"

namespace bce_ext {

struct BoolBits {
  uint8_t bits;
};
struct HalfBits {
  uint16_t bits;
};
struct BFloat16Bits {
  uint16_t bits;
};

template <typename T, typename S>
BCE_EXT_HOST_DEVICE T load_as(S value) {
  return static_cast<T>(value);
}

template <typename T>
BCE_EXT_HOST_DEVICE T load_as(BoolBits value) {
  // Without a choice, which compilers make a jump of that no processor foresees.
  const math::Bits<T> ones = 0 - static_cast<math::Bits<T>>(value.bits != 0);
  return math::from_bits<T>(ones & math::to_bits(T(1)));
}

template <typename T>
BCE_EXT_HOST_DEVICE T load_as(BFloat16Bits value) {
  return static_cast<T>(math::from_bits<float>(static_cast<uint32_t>(value.bits) << 16));
}

template <typename T>
BCE_EXT_HOST_DEVICE T load_as(HalfBits value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t shifted = (value.bits & 0x7fffu) << 13;
  // The multiplication corrects the exponent's bias, and makes normal numbers of subnormal ones.
  const uint32_t finite = math::to_bits(math::from_bits<float>(shifted) * math::power_of_two<float>(112));
  const uint32_t magnitude = shifted >= 0x0f800000u ? (shifted | 0x7f800000u) : finite;
  return static_cast<T>(math::from_bits<float>(magnitude | sign));
}

constexpr uint32_t kHighHalf = 0xffff0000u;

// The bits of a float, or a vector of such, so rounded that bfloat16 has the high half: to nearest, ties to even. Adds
// 0x7fff, or 0x8000 to an odd high half, by subtracting the negative, whose bits are one ternary operation of AVX-512.
template <typename Bits>
BCE_EXT_HOST_DEVICE Bits rounded_to_bfloat16(Bits bits) {
  return bits - ((~(bits >> 16) & 1u) | 0xffff8000u);
}

// Stores round to nearest, ties to even; too large becomes infinite; NaN stays NaN.
BCE_EXT_HOST_DEVICE void store_as(float value, BFloat16Bits& out) {
  const uint32_t ones_if_nan = 0u - static_cast<uint32_t>(value != value);
  out.bits = static_cast<uint16_t>((rounded_to_bfloat16(math::to_bits(value)) | ones_if_nan) >> 16);
}

BCE_EXT_HOST_DEVICE void store_as(float value, HalfBits& out) {
  constexpr uint32_t kTooLarge = 143u << 23;        // 2^16
  constexpr uint32_t kSmallestNormal = 113u << 23;  // 2^-14
  constexpr uint32_t kHalfUnit = 126u << 23;        // 0.5: its last place is the smallest subnormal of half
  const uint32_t bits = math::to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal =
      math::to_bits(math::from_bits<float>(magnitude) + math::from_bits<float>(kHalfUnit)) - kHalfUnit;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < kSmallestNormal ? subnormal : normal;
  out.bits = static_cast<uint16_t>((magnitude >= kTooLarge ? special : finite) | ((bits >> 16) & 0x8000u));
}

BCE_EXT_HOST_DEVICE void store_as(float value, float& out) { out = value; }
BCE_EXT_HOST_DEVICE void store_as(float value, double& out) { out = value; }

// Rounded to odd: a float that is rounded to fewer places next gives what the double would have given, where the
// nearest float may be a tie that the double is not.
BCE_EXT_HOST_DEVICE float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  const double back = static_cast<double>(nearest);
  const uint32_t is_beyond = static_cast<uint32_t>(math::magnitude(back) > math::magnitude(value));
  const uint32_t is_inexact = static_cast<uint32_t>(back != value);
  return math::from_bits<float>((math::to_bits(nearest) - is_beyond) | is_inexact);
}

BCE_EXT_HOST_DEVICE void store_as(double value, BFloat16Bits& out) { store_as(round_to_odd(value), out); }
BCE_EXT_HOST_DEVICE void store_as(double value, HalfBits& out) { store_as(round_to_odd(value), out); }
BCE_EXT_HOST_DEVICE void store_as(double value, float& out) { out = static_cast<float>(value); }
BCE_EXT_HOST_DEVICE void store_as(double value, double& out) { out = value; }

template <typename T>
constexpr Dtype dtype_of() {
  return sizeof(T) == sizeof(double) ? Dtype::Double : Dtype::Float;
}

BCE_EXT_HOST_DEVICE int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::Bool:
    case Dtype::UInt8:
    case Dtype::Int8:
      return 1;
    case Dtype::Int16:
    case Dtype::UInt16:
    case Dtype::Half:
    case Dtype::BFloat16:
      return 2;
    case Dtype::Int32:
    case Dtype::UInt32:
    case Dtype::Float:
      return 4;
    case Dtype::Int64:
    case Dtype::UInt64:
    case Dtype::Double:
      return 8;
  }
  return 0;
}

}  // namespace bce_ext
