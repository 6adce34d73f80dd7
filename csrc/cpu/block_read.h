// The first step of the CPU kernel: operands of a block, converted or gathered into buffers of the compute type.
#pragma once

#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "../problem.h"
#include "block.h"
#include "block_transpose.h"
#include "element_types.h"

namespace bce_ext {
namespace BCE_EXT_ISA {
namespace {

template <typename T, typename S>
BCE_EXT_TARGET void convert(const S* __restrict in, int64_t n, T* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = load_as<T>(in[i]);
}

// Vector units convert 32-bit integers to floating point, 64-bit ones only from AVX-512 on; and labels are small.
template <typename T, typename S>
BCE_EXT_TARGET void convert_wide(const S* __restrict in, int64_t n, T* __restrict out) {
  // 0 for what an int32_t holds: with 2^31 added, numbers from -2^31 on have no high bits, if there are negative ones.
  constexpr uint64_t kOffset = std::is_signed_v<S> ? 0x80000000u : 0;
  constexpr int kBits = std::is_signed_v<S> ? 32 : 31;
  uint64_t high_bits = 0;
  for (int64_t i = 0; i < n; ++i) high_bits |= (static_cast<uint64_t>(in[i]) + kOffset) >> kBits;
  if (high_bits == 0) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(static_cast<int32_t>(in[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(in[i]);
  }
}

template <typename T>
BCE_EXT_TARGET __attribute__((noinline)) void fill(T value, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = value;
}

template <typename T, typename S>
BCE_EXT_TARGET void read_run(const S* in, int64_t stride, int64_t n, T* out) {
  if (stride == 1) {
    constexpr bool kIsWide = std::is_same_v<S, int64_t> || std::is_same_v<S, uint64_t>;
    if constexpr (kIsWide && BCE_EXT_VECTOR_BYTES < 64) {
      convert_wide(in, n, out);
    } else {
      convert(in, n, out);
    }
  } else if (stride == 0) {
    fill(load_as<T>(*in), n, out);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = load_as<T>(in[i * stride]);
  }
}

// Reads whole rows that are too short to be worth a run each: column by column.
template <typename T, typename S>
BCE_EXT_TARGET void read_short_rows(const S* in, int64_t row_stride, int64_t stride, int64_t rows, int64_t row,
                                    T* __restrict out) {
  if (row_stride == 1) return read_transposed(in, stride, rows, row, out);
  for (int64_t column = 0; column < row; ++column) {
    for (int64_t r = 0; r < rows; ++r) out[r * row + column] = load_as<T>(in[r * row_stride + column * stride]);
  }
}

// Where memory holds an element of the walk, and its coordinates there.
BCE_EXT_TARGET int64_t offset_of(const Problem& problem, const Operand& operand, int64_t element,
                                 int64_t (&coordinates)[kMaxDims]) {
  int64_t offset = 0;
  for (int d = problem.ndim - 1; d >= 0; --d) {
    coordinates[d] = element % problem.sizes[d];
    element /= problem.sizes[d];
    offset += coordinates[d] * operand.strides[d];
  }
  return offset;
}

// Reads the rows of a rectangle.
template <typename T, typename S>
BCE_EXT_TARGET void read_rectangle(const Problem& problem, const Operand& operand, const Chunk& chunk, T* out) {
  int64_t coordinates[kMaxDims];
  const S* in = static_cast<const S*>(operand.data) + offset_of(problem, operand, chunk.begin, coordinates);
  const int64_t row_stride = operand.strides[chunk.rows_along], stride = operand.strides[problem.ndim - 1];
  if (row_stride == 1) return read_transposed(in, stride, chunk.rows, chunk.columns, out);
  for (int64_t row = 0; row < chunk.rows; ++row) {
    read_run(in + row * row_stride, stride, chunk.columns, out + row * chunk.columns);
  }
}

// Reads the elements [begin, begin + n) of the walk, run by run along the innermost dimension.
template <typename T, typename S>
BCE_EXT_TARGET void read_strided(const Problem& problem, const Operand& operand, int64_t begin, int64_t n, T* out) {
  constexpr int64_t kShortRow = 32;
  const int last = problem.ndim - 1;
  const S* in = static_cast<const S*>(operand.data);
  int64_t coordinates[kMaxDims];
  int64_t offset = offset_of(problem, operand, begin, coordinates);
  const int64_t row = problem.sizes[last];
  const int64_t stride = operand.strides[last];
  for (;;) {
    int d = last;  // the dimension along which to step on
    int64_t steps;
    if (last > 0 && row < kShortRow && coordinates[last] == 0 && n >= row) {
      d = last - 1;
      steps = smaller(n / row, problem.sizes[d] - coordinates[d]);
      read_short_rows(in + offset, operand.strides[d], stride, steps, row, out);
      n -= steps * row;
      out += steps * row;
    } else {
      steps = smaller(n, row - coordinates[last]);
      read_run(in + offset, stride, steps, out);
      n -= steps;
      out += steps;
    }
    if (n == 0) return;
    coordinates[d] += steps;
    offset += steps * operand.strides[d];
    while (coordinates[d] == problem.sizes[d]) {
      offset -= coordinates[d] * operand.strides[d];
      coordinates[d] = 0;
      --d;
      ++coordinates[d];
      offset += operand.strides[d];
    }
  }
}

template <typename T, typename S>
BCE_EXT_TARGET void read_elements(const Problem& problem, const Operand& operand, const Chunk& chunk, T* out) {
  const S* in = static_cast<const S*>(operand.data);
  const int64_t n = chunk.numel();
  switch (operand.layout) {
    case Layout::Absent:
      return fill(T(1), n, out);
    case Layout::Scalar:
      return fill(load_as<T>(*in), n, out);
    case Layout::Flat:
      return read_run(in + chunk.begin, 1, n, out);
    case Layout::Strided:
      if (chunk.rows_along >= 0) return read_rectangle<T, S>(problem, operand, chunk, out);
      return read_strided<T, S>(problem, operand, chunk.begin, n, out);
  }
}

// Reads a chunk, or neighbours out of it; rectangles of strided operands only.
template <typename T>
BCE_EXT_TARGET void read(const Problem& problem, const Operand& operand, const Chunk& chunk, T* out) {
  switch (operand.dtype) {
    case Dtype::Bool:
      return read_elements<T, BoolBits>(problem, operand, chunk, out);
    case Dtype::UInt8:
      return read_elements<T, uint8_t>(problem, operand, chunk, out);
    case Dtype::Int8:
      return read_elements<T, int8_t>(problem, operand, chunk, out);
    case Dtype::Int16:
      return read_elements<T, int16_t>(problem, operand, chunk, out);
    case Dtype::UInt16:
      return read_elements<T, uint16_t>(problem, operand, chunk, out);
    case Dtype::Int32:
      return read_elements<T, int32_t>(problem, operand, chunk, out);
    case Dtype::UInt32:
      return read_elements<T, uint32_t>(problem, operand, chunk, out);
    case Dtype::Int64:
      return read_elements<T, int64_t>(problem, operand, chunk, out);
    case Dtype::UInt64:
      return read_elements<T, uint64_t>(problem, operand, chunk, out);
    case Dtype::Half:
      return read_elements<T, HalfBits>(problem, operand, chunk, out);
    case Dtype::BFloat16:
      return read_elements<T, BFloat16Bits>(problem, operand, chunk, out);
    case Dtype::Float:
      return read_elements<T, float>(problem, operand, chunk, out);
    case Dtype::Double:
      return read_elements<T, double>(problem, operand, chunk, out);
  }
}

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
