// The bfloat16 type of CUDA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline __nv_bfloat16 __float2bfloat16(float value) {
  if (std::isnan(value)) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits += 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
  return {static_cast<uint16_t>(bits >> 16)};
}

// By way of a float that is rounded to odd, which is no tie unless the double is one.
inline __nv_bfloat16 __double2bfloat16(double value) {
  float odd = static_cast<float>(value);
  if (std::isnan(value) || odd == value) return __float2bfloat16(odd);
  if (std::fabs(static_cast<double>(odd)) > std::fabs(value)) odd = std::nextafter(odd, 0.0f);
  uint32_t bits;
  std::memcpy(&bits, &odd, sizeof(bits));
  bits |= 1;
  std::memcpy(&odd, &bits, sizeof(bits));
  return __float2bfloat16(odd);
}
