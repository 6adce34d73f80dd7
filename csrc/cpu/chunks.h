// The chunks of a problem: stretches of the walk, or rectangles out of it.
//
// The walk goes through memory as the outputs lie there. An operand that lies the other way round (a channels_last
// image beside targets that are not, a transposed matrix) would give one element of each cache line, and the line would
// be gone when the next row asks for the next one. So a chunk is then a rectangle, of the innermost dimension of the
// walk and of the one along which that operand's elements are neighbours, and all of a line is used at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "block_kernel.h"
#include "element_types.h"

namespace bce_ext {

class Chunks {
 public:
  explicit Chunks(const Problem& problem) : problem_(problem) {
    if (problem.label_codes == nullptr && !problem.counts) choose_rectangle();
    if (rows_along_ < 0) {
      size_ = parts(problem.numel, kChunk);
      return;
    }
    size_ = 1;
    for (int d = 0; d < problem.ndim; ++d) size_ *= parts_along(d);
  }

  int64_t size() const { return size_; }

  Chunk operator[](int64_t i) const {
    if (rows_along_ < 0) return {i * kChunk, std::min(kChunk, problem_.numel - i * kChunk)};
    // Rectangles that share cache lines follow each other.
    const int64_t row = i % parts_along(rows_along_) * rows_;
    i /= parts_along(rows_along_);
    Chunk chunk{0, 0, std::min(rows_, problem_.sizes[rows_along_] - row), 0, rows_along_};
    int64_t stride = 1;  // of a dimension of the walk
    for (int d = problem_.ndim - 1; d >= 0; stride *= problem_.sizes[d], --d) {
      if (d == rows_along_) {
        chunk.begin += row * stride;
        chunk.row_stride = stride;
        continue;
      }
      const int64_t step = d == problem_.ndim - 1 ? columns_ : 1;
      const int64_t at = i % parts_along(d) * step;
      i /= parts_along(d);
      chunk.begin += at * stride;
      if (d == problem_.ndim - 1) chunk.columns = std::min(columns_, problem_.sizes[d] - at);
    }
    return chunk;
  }

 private:
  static constexpr int64_t kCacheLine = 64;

  static int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

  int64_t parts_along(int d) const {
    if (d == rows_along_) return parts(problem_.sizes[d], rows_);
    return d == problem_.ndim - 1 ? parts(problem_.sizes[d], columns_) : problem_.sizes[d];
  }

  // The dimension along which an operand's elements are neighbours, if it is another one than the innermost, along
  // which each has a cache line of its own; -1 otherwise.
  int across(const Operand& operand) const {
    const int last = problem_.ndim - 1;
    if (operand.layout != Layout::Strided || operand.strides[last] * size_of(operand.dtype) < kCacheLine) return -1;
    for (int d = 0; d < last; ++d) {
      if (operand.strides[d] == 1) return d;
    }
    return -1;
  }

  void choose_rectangle() {
    constexpr int64_t kRowsOfLine = 16, kShortRow = 8, kLongRow = 512, kSmallestRectangle = kChunk / 4;
    const Problem& p = problem_;
    for (const Operand* operand : {&p.target, &p.input, &p.grad_output, &p.weight, &p.pos_weight}) {
      const int d = across(*operand);
      if (d < 0 || p.numel < kChunk) continue;
      const int64_t row = p.sizes[p.ndim - 1];
      const bool rows_touch = d == p.ndim - 2;
      if (row < kShortRow || (!rows_touch && row < kLongRow / 4)) continue;  // short rows would make short blocks
      columns_ = row;
      if (row > kLongRow) columns_ = parts(parts(row, parts(row, kLongRow)), kCacheLine) * kCacheLine;
      rows_ = std::min(kChunk / columns_ / kRowsOfLine * kRowsOfLine, p.sizes[d]);
      if (rows_ * columns_ < kSmallestRectangle) continue;
      rows_along_ = d;
      return;
    }
  }

  const Problem& problem_;
  int rows_along_ = -1;
  int64_t rows_ = 1, columns_ = 0;
  int64_t size_;
};

}  // namespace bce_ext
