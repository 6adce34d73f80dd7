// The sizes that the steps of the CPU kernel share.
#pragma once

#include <cstdint>

#include "../number.h"
#include "block_kernel.h"
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

// The blocks of a chunk, one after the other: stretches of neighbours. Rows that follow each other in the walk count as
// one.
template <typename T>
class Blocks {
 public:
  BCE_EXT_HOST_DEVICE explicit Blocks(const Chunk& chunk)
      : row_stride_(chunk.row_stride),
        row_(chunk.row_stride == chunk.columns ? chunk.numel() : chunk.columns),
        row_begin_(chunk.begin),
        begin_(chunk.begin),
        left_(chunk.numel()) {}

  // Goes on to the next one, if there is one.
  BCE_EXT_HOST_DEVICE bool next() {
    begin_ += size_;
    left_ -= size_;
    if (left_ == 0) return false;
    if (begin_ == row_begin_ + row_) begin_ = row_begin_ += row_stride_;
    size_ = smaller(kBlock<T>, row_begin_ + row_ - begin_);
    if (size_ > kLanes<T>) size_ &= ~(kLanes<T> - 1);  // what remains of the row makes one last, small block
    return true;
  }

  BCE_EXT_HOST_DEVICE int64_t begin() const { return begin_; }
  BCE_EXT_HOST_DEVICE int64_t size() const { return size_; }

 private:
  const int64_t row_stride_, row_;
  int64_t row_begin_, begin_, left_;
  int64_t size_ = 0;
};

}  // namespace
}  // namespace BCE_EXT_ISA
}  // namespace bce_ext
