// The half type of CUDA.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half half) {
  const int exponent = half.bits >> 10 & 31;
  const int mantissa = half.bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa != 0 ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  } else {
    magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
  }
  return (half.bits & 0x8000) != 0 ? -magnitude : magnitude;
}

inline __half __double2half(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return {0x7fff};
  if (std::fabs(value) >= 65536.0) return {static_cast<uint16_t>(sign | 0x7c00)};
  const int exponent = value == 0 ? -14 : std::max(std::ilogb(value), -14);
  const int mantissa =
      static_cast<int>(std::nearbyint(std::ldexp(std::fabs(value), 10 - exponent)));  // 2048 carries into the exponent
  return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + mantissa))};
}

inline __half __float2half_rn(float value) { return __double2half(value); }
