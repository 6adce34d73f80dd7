// The sizes that the steps of the CPU kernel share.
#pragma once

#include <cstdint>

#include "../number.h"
#include "pack.h"

namespace bce_ext {
namespace BCE_EXT_ISA {
namespace {

template <typename T>
using Numbers = Pack<T, BCE_EXT_VECTOR_BYTES>;

template <typename T>
constexpr int64_t kBlock = 4096 / sizeof(T);
// Computations run over a multiple of this many elements, so that no loop needs a remainder. It is also the number of
// partial sums.
template <typename T>
constexpr int64_t kLanes = Numbers<T>::kElements;
// Lies between buffers of a block, lest all of a loop's streams have the same place in a page: processors tell accesses
// apart by that first, and take a load for one of what was just stored.
template <typename T>
constexpr int64_t kStagger = 256 / sizeof(T);
// Of those buffers: a vector as long as a cache line then lies in one.
constexpr int64_t kCacheLine = 64;

BCE_EXT_HOST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
template <typename T>
BCE_EXT_HOST_DEVICE int64_t round_to_lanes(int64_t n) {
  return (n + kLanes<T> - 1) & ~(kLanes<T> - 1);
}

}  // namespace
}  // namespace BCE_EXT_ISA
}  // namespace bce_ext
