// Who supplies the operands of a chunk, block by block: from where they lie, or read into a buffer.
#pragma once

#include <cstdlib>
#include <cstring>

#include "../problem.h"
#include "block.h"
#include "block_read.h"
#include "element_types.h"

namespace bce_ext {
namespace BCE_EXT_ISA {
namespace {

// The number of elements after which the values of an operand repeat: the product of the sizes inside of the outermost
// dimension with a stride.
BCE_EXT_TARGET int64_t period(const Problem& problem, const Operand& operand) {
  if (operand.layout == Layout::Absent || operand.layout == Layout::Scalar) return 1;
  if (operand.layout == Layout::Flat) return problem.numel;
  int first = 0;
  while (first < problem.ndim && operand.strides[first] == 0) ++first;
  int64_t product = 1;
  for (int d = first; d < problem.ndim; ++d) product *= problem.sizes[d];
  return product;
}

// How far beyond the next block memory is fetched. Where a block is computed fast, the time of one is not enough.
template <typename T>
constexpr int64_t kAhead = kBlock<T> / 2;

// Memory that is about to be read: `bytes` for each element.
struct Stream {
  const char* data;
  int64_t bytes;

  BCE_EXT_HOST_DEVICE void prefetch(int64_t element) const { __builtin_prefetch(data + element * bytes); }
};

// The cache lines of a pack that memory holds as S, or as something that is no wider. Inlined for sure: GCC takes a
// function that only fetches for one without effects, and leaves out its calls.
template <typename T, typename S = T>
BCE_EXT_HOST_DEVICE void prefetch(const Stream& stream, int64_t begin) {
  if constexpr (std::is_same_v<S, LabelCodes>) {
    __builtin_prefetch(stream.data + begin / LabelCodes::kLabels * sizeof(LabelCodes));
  } else {
    constexpr int64_t kStep = kCacheLine / sizeof(S);
    for (int64_t i = 0; i < kLanes<T>; i += kStep) stream.prefetch(begin + i);
  }
}

// The same of what may be wider where S is T: an integer of 64 bits that is converted has every other line left.
template <typename T, typename S = T>
BCE_EXT_HOST_DEVICE void prefetch_any(const Stream& stream, int64_t begin) {
  prefetch<T, S>(stream, begin);
  const bool is_wide = std::is_same_v<S, T> && stream.bytes > static_cast<int64_t>(sizeof(T));
  if (is_wide) prefetch<T, S>({stream.data + kCacheLine, stream.bytes}, begin);
}

// Supplies an operand of one chunk, block by block, in place where memory holds neighbours of the walk as neighbours,
// in the compute type. What repeats within a block's length is read once per chunk, as a tile that holds every block as
// a contiguous stretch; what is the same along a row, once per row. A rectangle of a strided operand is read as a
// whole, in the order of its memory.
template <typename T>
class OperandReader {
 public:
  BCE_EXT_TARGET OperandReader(const Problem& problem, const Operand& operand, const Chunk& chunk)
      : problem_(problem),
        operand_(operand),
        chunk_(chunk),
        period_(period(problem, operand)),
        in_place_(operand.layout == Layout::Flat && operand.dtype == dtype_of<T>()),
        tiled_(operand.layout != Layout::Flat && period_ <= kBlock<T>),
        rows_(kind_of_rows()) {
    if (chunk.rows_along < 0 || operand.layout != Layout::Strided || tiled_) return;
    // Without memory for it, block by block.
    rectangle_ = static_cast<T*>(aligned_alloc(kCacheLine, kChunk * sizeof(T)));
    if (rectangle_ != nullptr) read(problem, operand, chunk, rectangle_);
  }
  OperandReader(const OperandReader&) = delete;
  OperandReader& operator=(const OperandReader&) = delete;
  BCE_EXT_TARGET ~OperandReader() { free(rectangle_); }

  // What to fetch while the block before `next` is computed, if that is about a stretch of memory. A row that is used
  // again is in a cache.
  BCE_EXT_TARGET Stream ahead(int64_t next) const {
    const int64_t bytes = size_of(operand_.dtype);
    if (operand_.layout == Layout::Flat) return {static_cast<const char*>(place(next + kAhead<T>)), bytes};
    const bool has_rows = operand_.layout == Layout::Strided && operand_.strides[problem_.ndim - 1] == 1;
    // Of what fits a second-level cache, less would be gained than to find the place takes.
    constexpr int64_t kSmall = 1 << 18;
    if (!has_rows || period_ != problem_.numel || chunk_.rows_along >= 0 || problem_.numel < kSmall ||
        next >= problem_.numel) {
      return {reinterpret_cast<const char*>(buffer_), 0};
    }
    const int64_t first = offset_at(next), length = smaller(kBlock<T>, problem_.numel - next);
    const int64_t gaps = next + length <= row_end_ ? 0 : offset_at(next + length - 1) - first - (length - 1);
    // Far apart, the elements of the block are fetched as far as they follow the first one.
    const bool is_dense = gaps >= 0 && gaps <= length;
    return {static_cast<const char*>(operand_.data) + first * bytes, is_dense ? bytes + bytes * gaps / length : bytes};
  }

  // Where memory holds an element of a flat operand.
  BCE_EXT_TARGET const void* place(int64_t begin) const {
    return static_cast<const char*>(operand_.data) + begin * size_of(operand_.dtype);
  }

  // The n elements from `begin` on, at most kBlock, followed by zeros up to a multiple of kLanes. Only the last block
  // of a row may need these.
  BCE_EXT_TARGET const T* block(int64_t begin, int64_t n) {
    if (n % kLanes<T> == 0) {
      if (in_place_) return static_cast<const T*>(operand_.data) + begin;
      if (rectangle_ != nullptr) return in_rectangle(begin);
      if (tiled_) {
        if (!tile_is_read_) read_tile();
        return buffer_ + begin % period_;
      }
      if (rows_ != Rows::Short) {
        if (begin >= row_end_) find_row(begin);
        if (begin + n <= row_end_) {
          return rows_ == Rows::OneNumber ? buffer_ : static_cast<const T*>(operand_.data) + offset_at(begin);
        }
      }
    }
    if (rectangle_ != nullptr) {
      memcpy(buffer_, in_rectangle(begin), n * sizeof(T));
    } else {
      read(problem_, operand_, {begin, n}, buffer_);
    }
    fill(T(0), round_to_lanes<T>(n) - n, buffer_ + n);
    tile_is_read_ = false;
    return buffer_;
  }

 private:
  BCE_EXT_TARGET const T* in_rectangle(int64_t element) const {
    const int64_t distance = element - chunk_.begin;
    return rectangle_ + distance / chunk_.row_stride * chunk_.columns + distance % chunk_.row_stride;
  }

  // The innermost dimension of the walk, as it lies in the memory of an operand.
  enum class Rows {
    Short,      // for most blocks, or in no order that could be read in place
    InOrder,    // in the compute type
    OneNumber,  // for each row
  };

  BCE_EXT_TARGET Rows kind_of_rows() const {
    const int last = problem_.ndim - 1;
    if (operand_.layout != Layout::Strided || tiled_ || chunk_.rows_along >= 0 || problem_.sizes[last] < kBlock<T>) {
      return Rows::Short;
    }
    if (operand_.strides[last] == 0) return Rows::OneNumber;
    return operand_.strides[last] == 1 && operand_.dtype == dtype_of<T>() ? Rows::InOrder : Rows::Short;
  }

  // Where the memory of a strided operand has an element.
  BCE_EXT_TARGET int64_t offset_at(int64_t element) const {
    const bool in_row = rows_ == Rows::InOrder && element >= row_begin_ && element < row_end_;
    if (in_row) return row_offset_ + (element - row_begin_);
    int64_t coordinates[kMaxDims];
    return offset_of(problem_, operand_, element, coordinates);
  }

  // What is left of a row from an element on.
  BCE_EXT_TARGET void find_row(int64_t begin) {
    int64_t coordinates[kMaxDims];
    row_offset_ = offset_of(problem_, operand_, begin, coordinates);
    row_begin_ = begin;
    row_end_ = begin + problem_.sizes[problem_.ndim - 1] - coordinates[problem_.ndim - 1];
    if (rows_ == Rows::OneNumber) read(problem_, operand_, {begin, smaller(kBlock<T>, row_end_ - begin)}, buffer_);
  }

  BCE_EXT_TARGET void read_tile() {
    read(problem_, operand_, {0, period_}, buffer_);
    const int64_t length = period_ + smaller(kBlock<T>, chunk_.numel());
    for (int64_t filled = period_; filled < length;) {
      const int64_t copied = smaller(filled, length - filled);
      memcpy(buffer_ + filled, buffer_, copied * sizeof(T));
      filled += copied;
    }
    tile_is_read_ = true;
  }

  const Problem& problem_;
  const Operand& operand_;
  const Chunk& chunk_;
  const int64_t period_;
  const bool in_place_;
  const bool tiled_;
  bool tile_is_read_ = false;
  const Rows rows_;
  int64_t row_begin_ = 0, row_end_ = 0, row_offset_ = 0;  // of the row that find_row found
  T* rectangle_ = nullptr;
  alignas(kCacheLine) T buffer_[2 * kBlock<T> + kStagger<T>];
};

// Whether the scale of all gradients takes grad_output: one number, unless an infinite gradient of the target may meet
// a 0.
BCE_EXT_HOST_DEVICE bool scales_by_grad_output(const Problem& problem) {
  return problem.grad_output.layout == Layout::Scalar && problem.grad_target.data == nullptr && !problem.reduce;
}

// Supplies the weight times grad_output: 1 where neither is given.
template <typename T>
class WeightReader {
 public:
  BCE_EXT_TARGET WeightReader(const Problem& problem, const Chunk& chunk)
      : weight_(problem, problem.weight, chunk),
        grad_output_(problem, problem.grad_output, chunk),
        in_scale_(scales_by_grad_output(problem)),
        has_weight_(problem.weight.layout != Layout::Absent),
        has_grad_output_(problem.grad_output.layout != Layout::Absent && !in_scale_) {}

  // What of it is left to the scale.
  BCE_EXT_TARGET T scale() { return in_scale_ ? *grad_output_.block(0, kLanes<T>) : T(1); }

  BCE_EXT_TARGET Stream ahead(int64_t next) const {
    return has_grad_output_ ? grad_output_.ahead(next) : weight_.ahead(next);
  }

  // As that of OperandReader.
  BCE_EXT_TARGET const T* block(int64_t begin, int64_t n) {
    if (!has_grad_output_) return weight_.block(begin, n);
    if (!has_weight_) return grad_output_.block(begin, n);
    multiply(round_to_lanes<T>(n), weight_.block(begin, n), grad_output_.block(begin, n), product_);
    return product_;
  }

 private:
  BCE_EXT_TARGET static void multiply(int64_t n, const T* a, const T* b, T* __restrict out) {
    n &= ~(kLanes<T> - 1);
    for (int64_t i = 0; i < n; ++i) out[i] = a[i] * b[i];
  }

  OperandReader<T> weight_;
  OperandReader<T> grad_output_;
  const bool in_scale_, has_weight_, has_grad_output_;
  alignas(kCacheLine) T product_[kBlock<T> + kStagger<T>];
};

}  // namespace
}  // namespace BCE_EXT_ISA
}  // namespace bce_ext
