// The last step of the CPU kernel: sums of losses, in an order that depends on their number alone.
#pragma once

#include "../elementary.h"
#include "block.h"

namespace bce_ext {
namespace BCE_EXT_ISA {
namespace {

// Adds element i to lane i % kLanes, in an order that depends on n alone. Four at a time are added in T first, which
// costs at most two roundings of T and halves the time; should that overflow, the block is added again in float64.
template <typename T>
BCE_EXT_TARGET void accumulate(const T* in, int64_t n, double* __restrict lanes) {
  double sums[kLanes<T>];
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) sums[lane] = lanes[lane];
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= n; i += 4 * kLanes<T>) {
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
      const T* at = in + i + lane;
      sums[lane] += static_cast<double>((at[0] + at[kLanes<T>]) + (at[2 * kLanes<T>] + at[3 * kLanes<T>]));
    }
  }
  uint64_t overflown = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
    overflown |= math::to_bits(math::magnitude(sums[lane])) >= math::to_bits(math::FloatFormat<double>::kInfinity);
  }
  if (overflown != 0) {
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) sums[lane] = lanes[lane];
    i = 0;
  }
  for (; i < n; i += kLanes<T>) {
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) sums[lane] += static_cast<double>(in[i + lane]);
  }
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) lanes[lane] = sums[lane];
}

// Adds the lanes of a block to those of its chunk, and clears them. Sums of sums round less often in the same
// direction.
template <int64_t kCount>
BCE_EXT_TARGET void move_to(double (&lanes)[kCount], double (&lanes_of_block)[kCount]) {
  for (int64_t lane = 0; lane < kCount; ++lane) {
    lanes[lane] += lanes_of_block[lane];
    lanes_of_block[lane] = 0.0;
  }
}

// How many of n elements equal a number.
template <typename T>
BCE_EXT_TARGET int64_t count_equal(int64_t n, const T* in, T number) {
  using Places = math::Condition<Numbers<T>>;
  Places found = 0;  // minus their number, in each place
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    found = found + (Numbers<T>::load(in + i) == Numbers<T>(number));
  }
  int64_t count = 0;
  for (; i < n; ++i) count += in[i] == number;
  for (int64_t lane = 0; lane < Numbers<T>::kPerRegister; ++lane) count -= found.low[lane] + found.high[lane];
  return count;
}

// How many of n bytes equal one, without a conversion: n below 255 registers.
BCE_EXT_TARGET inline int64_t count_equal_bytes(int64_t n, const void* in, uint8_t byte) {
  constexpr int64_t kBytes = BCE_EXT_VECTOR_BYTES;
  using Register __attribute__((vector_size(kBytes))) = uint8_t;
  using InMemory __attribute__((vector_size(kBytes), aligned(1), may_alias)) = uint8_t;
  const auto* const bytes = static_cast<const uint8_t*>(in);
  const Register wanted = byte - Register{};
  Register found = {};  // their number, in each place
  int64_t i = 0;
  for (; i + kBytes <= n; i += kBytes) found -= (Register)(*reinterpret_cast<const InMemory*>(bytes + i) == wanted);
  int64_t count = 0;
  for (; i < n; ++i) count += bytes[i] == byte;
  for (int64_t place = 0; place < kBytes; ++place) count += found[place];
  return count;
}

// Over kCount packs, one after the other.
template <typename T, int kCount>
BCE_EXT_HOST_DEVICE Numbers<T> product_of_excesses(const T* e) {
  if constexpr (kCount == 1) {
    return in_registers(Numbers<T>::load(e));
  } else {
    constexpr int kHalf = kCount / 2;
    return math::product_of_excesses(product_of_excesses<T, kHalf>(e),
                                     product_of_excesses<T, kHalf>(e + kHalf * kLanes<T>));
  }
}

// Adds log1p(e) over the elements of a chunk, with one logarithm for the product of up to kFactors of (1 + e), which
// takes far less than a logarithm each.
template <typename T>
class Log1pSum {
 public:
  // The next n elements, a multiple of kLanes and at most kBlock; e is in [0, 1] or NaN.
  BCE_EXT_TARGET void add(const T* e, int64_t n, double* lanes) {
    if (size_ > kCapacity - kMostOfBlock) finish(lanes);
    const int64_t multiplied = multiply<kFactors>(e, n);
    const int64_t multiplied_by_few = multiply<kFewFactors>(e + multiplied, n - multiplied);
    const int64_t done = multiplied + multiplied_by_few;
    multiply<1>(e + done, n - done);
  }

  BCE_EXT_TARGET void finish(double* lanes) {
    for (int64_t i = 0; i < size_; i += kLanes<T>) {
      math::log1p_of_nonnegative(Numbers<T>::load(products_ + i)).store(products_ + i);
    }
    accumulate(products_, size_, lanes);
    size_ = 0;
  }

 private:
  static constexpr int64_t kFactors = 32;
  static constexpr int64_t kFewFactors = 4;
  static_assert(kBlock<T> % (kFactors * kLanes<T>) == 0);

  // Multiplies kCount of (1 + e) at a time, and returns how many elements that were.
  template <int64_t kCount>
  BCE_EXT_TARGET int64_t multiply(const T* e, int64_t n) {
    constexpr int64_t kGroup = kCount * kLanes<T>;
    int64_t i = 0;
    for (; i + kGroup <= n; i += kGroup, size_ += kLanes<T>) {
      product_of_excesses<T, kCount>(e + i).store(products_ + size_);
    }
    return i;
  }

  // What kFactors leave of a block are less than kFactors * kLanes elements. Room for the blocks of a chunk, if it has
  // long rows.
  static constexpr int64_t kMostOfBlock =
      (kBlock<T> / (kFactors * kLanes<T>)+kFactors / kFewFactors + kFewFactors) * kLanes<T>;
  static constexpr int64_t kCapacity = kChunk / kFactors + 2 * kMostOfBlock;
  alignas(kCacheLine) T products_[kCapacity];
  int64_t size_ = 0;
};

}  // namespace
}  // namespace BCE_EXT_ISA
}  // namespace bce_ext
