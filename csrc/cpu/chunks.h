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

namespace bce_ext {

class Chunks {
 public:
  explicit Chunks(const Problem& problem) : problem_(problem), last_(problem.ndim - 1) {
    if (problem.label_codes == nullptr && !problem.counts && problem.numel >= kChunk) choose_rectangle();
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
    Chunk chunk;
    chunk.rows_along = rows_along_;
    // Rectangles that share cache lines follow each other.
    const int64_t first_row = i % parts_along(rows_along_) * rows_;
    i /= parts_along(rows_along_);
    chunk.rows = std::min(rows_, problem_.sizes[rows_along_] - first_row);
    int64_t stride = 1;  // of a dimension of the walk
    for (int d = last_; d >= 0; stride *= problem_.sizes[d], --d) {
      if (d == rows_along_) {
        chunk.begin += first_row * stride;
        chunk.row_stride = stride;
        continue;
      }
      const int64_t at = i % parts_along(d) * (d == last_ ? columns_ : 1);
      i /= parts_along(d);
      chunk.begin += at * stride;
      if (d == last_) chunk.columns = std::min(columns_, problem_.sizes[d] - at);
    }
    return chunk;
  }

 private:
  static constexpr int64_t kRowsOfLine = 16;  // in float32
  static constexpr int64_t kVectors = 64;     // elements, a multiple of any vector

  static int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
  static int64_t round_down(int64_t n, int64_t unit) { return n - n % unit; }
  static int64_t round_up(int64_t n, int64_t unit) { return parts(n, unit) * unit; }

  int64_t parts_along(int d) const {
    if (d == rows_along_) return parts(problem_.sizes[d], rows_);
    return d == last_ ? parts(problem_.sizes[d], columns_) : problem_.sizes[d];
  }

  // The dimension along which an operand's elements are neighbours, if it is not the innermost; -1 otherwise.
  int across(const Operand& operand) const {
    if (operand.layout != Layout::Strided || operand.strides[last_] <= 1) return -1;
    for (int d = 0; d < last_; ++d) {
      if (operand.strides[d] == 1) return d;
    }
    return -1;
  }

  void choose_rectangle() {
    constexpr int64_t kShortRow = 8, kShortBlock = 128, kLongRow = 512, kSmallest = kChunk / 4;
    const int64_t row = last_ < 0 ? 0 : problem_.sizes[last_];
    for (const Operand* operand :
         {&problem_.target, &problem_.input, &problem_.grad_output, &problem_.weight, &problem_.pos_weight}) {
      const int d = across(*operand);
      // Rows that are not neighbours in the walk make blocks of their own.
      if (d < 0 || row < (d == last_ - 1 ? kShortRow : kShortBlock)) continue;
      const int64_t most_rows = problem_.sizes[d];
      const int64_t most = most_rows < kRowsOfLine ? round_down(kChunk / most_rows, kVectors) : kLongRow;
      columns_ = row <= most ? row : std::min(most, round_up(parts(row, parts(row, most)), kVectors));
      rows_ = most_rows < kRowsOfLine ? most_rows : std::min(most_rows, round_down(kChunk / columns_, kRowsOfLine));
      if (rows_ * columns_ < kSmallest) continue;
      rows_along_ = d;
      return;
    }
  }

  const Problem& problem_;
  const int last_;
  int rows_along_ = -1;
  int64_t rows_ = 1, columns_ = 0;
  int64_t size_;
};

}  // namespace bce_ext
