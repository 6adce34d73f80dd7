// Division by a number that the host knows before the launch.
#pragma once

#include <cstdint>
#include <type_traits>

namespace bce_ext {
namespace cuda {

// Quotients of n in [0, 2^b) by a divisor d in [1, 2^b), where Int has b bits beside its sign, by one multiplication: a
// 64-bit division is some hundred instructions. With 2^s >= d and m = ceil(2^(b+s) / d), floor(n * m / 2^(b+s)) is
// exact for these n (Granlund and Montgomery, 1994).
template <typename Int>
class Divider {
 public:
  using Unsigned = std::make_unsigned_t<Int>;

  Divider() : Divider(1) {}

  explicit Divider(Int divisor) : divisor_(divisor) {
    const Unsigned d = divisor;
    while ((Unsigned(1) << shift_) < d) {
      ++shift_;
    }
    constexpr Unsigned kPower = Unsigned(1) << (8 * sizeof(Int) - 1);
    Unsigned quotient = kPower / d;
    Unsigned remainder = kPower % d;
    for (int step = 0; step < shift_; ++step) {  // long division of 2^(b+s), one more bit a step
      remainder *= 2;
      quotient *= 2;
      if (remainder >= d) {
        remainder -= d;
        quotient += 1;
      }
    }
    multiplier_ = quotient + (remainder != 0);
  }

  __host__ __device__ __forceinline__ Int divisor() const { return divisor_; }

  __device__ __forceinline__ Int divide(Int n) const {
    const Unsigned twice = static_cast<Unsigned>(n) << 1;
    if constexpr (sizeof(Int) == 4) {
      return static_cast<Int>(__umulhi(twice, multiplier_) >> shift_);
    } else {
      return static_cast<Int>(__umul64hi(twice, multiplier_) >> shift_);
    }
  }

 private:
  Int divisor_;
  Unsigned multiplier_ = 0;
  int shift_ = 0;
};

}  // namespace cuda
}  // namespace bce_ext
