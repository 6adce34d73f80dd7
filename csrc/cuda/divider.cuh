// Division by a number that the host knows before the launch.
#pragma once

#include <cstdint>

namespace bce_ext {
namespace cuda {

// Quotients of n in [0, 2^63) by a divisor d in [1, 2^63), by one multiplication: a 64-bit division is some hundred
// instructions. With 2^s >= d and m = ceil(2^(63+s) / d), floor(n * m / 2^(63+s)) is exact for these n (Granlund and
// Montgomery, 1994).
class Divider {
 public:
  Divider() : Divider(1) {}

  explicit Divider(int64_t divisor) : divisor_(divisor) {
    const uint64_t d = divisor;
    while ((uint64_t(1) << shift_) < d) {
      ++shift_;
    }
    uint64_t quotient = (uint64_t(1) << 63) / d;
    uint64_t remainder = (uint64_t(1) << 63) % d;
    for (int step = 0; step < shift_; ++step) {  // long division of 2^(63+s), one more bit a step
      remainder *= 2;
      quotient *= 2;
      if (remainder >= d) {
        remainder -= d;
        quotient += 1;
      }
    }
    multiplier_ = quotient + (remainder != 0);
  }

  __host__ __device__ __forceinline__ int64_t divisor() const { return divisor_; }

  __device__ __forceinline__ int64_t divide(int64_t n) const {
    return static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(n) << 1, multiplier_) >> shift_);
  }

 private:
  int64_t divisor_;
  uint64_t multiplier_ = 0;
  int shift_ = 0;
};

}  // namespace cuda
}  // namespace bce_ext
