// The target of the linear layer and its loss, block by block.
#pragma once

#include "linear.h"

namespace bce_ext {

// How the matrix of logits is cut.
struct Blocks {
  int64_t num_rows, num_labels;      // of the matrix
  int64_t block_rows, block_labels;  // of a block; those at the end may be smaller

  int64_t down() const { return (num_rows + block_rows - 1) / block_rows; }
  int64_t across() const { return (num_labels + block_labels - 1) / block_labels; }
};

// One block of the matrix.
struct Range {
  int64_t row, label, rows, labels;
};

// A dense target is looked at in place. Class indices and sparse targets are written into a buffer of the size of a
// block; their elements are sorted by block once, so that all blocks together cost as much as the elements that there
// are.
class BlockTarget {
 public:
  BlockTarget(const LinearArguments& arguments, const Blocks& blocks);

  // The target of a block, as a dense tensor. It is valid until the next call.
  Tensor block(const Range& range);

 private:
  void sort_elements(const LinearArguments& arguments);
  void fill(int64_t block);

  const Blocks blocks_;
  Tensor dense_;  // undefined where elements are listed

  // An element: its block, its place in the buffer, its value.
  Tensor block_of_, places_, values_;
  std::vector<int64_t> begin_;  // of the elements of each block, where they are sorted

  Tensor buffer_;
  Tensor written_;  // the places of the buffer that are not 0
};

}  // namespace bce_ext
