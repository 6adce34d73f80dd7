// The target of the linear layer and its loss, block by block.
#pragma once

#include <vector>

#include "linear.h"

namespace bce_ext {

// How the matrix of logits is cut.
struct Tiling {
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
// block; on the host their elements are sorted by block once, so that all blocks together cost as much as the elements
// that there are.
class BlockTarget {
 public:
  BlockTarget(const LinearArguments& arguments, const Tiling& blocks);

  // The target of a block, as a dense tensor. It is valid until the next call.
  Tensor block(const Range& range);

 private:
  struct Element {
    int64_t place;  // in the buffer
    int64_t value;  // its number among the values
  };

  void sort_on_host(const Tensor& rows, const Tensor& labels, bool allows_none);
  void fill_on_host(int64_t block);
  void list_on_device(const Tensor& rows, const Tensor& labels);
  void fill_on_device(int64_t block);

  const Tiling blocks_;
  Tensor dense_;  // undefined where elements are listed

  Tensor values_, buffer_;

  // On the host: elements [begin_[b], begin_[b + 1]) are those of block b.
  std::vector<int64_t> begin_;
  std::vector<Element> elements_;
  int64_t written_block_ = -1;  // the one that the buffer holds

  // On a device: block and place of each value, and the places that the buffer holds.
  Tensor block_of_, places_, written_places_;
};

}  // namespace bce_ext
