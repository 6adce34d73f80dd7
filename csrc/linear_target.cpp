#include "linear_target.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <algorithm>

namespace bce_ext {
namespace {

struct Elements {
  Tensor rows, labels, values;
};

// Row and label of each element that is not 0. A negative class index is one whose label is outside.
Elements elements_of(const LinearArguments& arguments) {
  if (arguments.is_sparse()) {
    const Tensor& indices = *arguments.indices;
    return {indices.select(0, 0), indices.select(0, 1), arguments.target};
  }
  const Tensor labels = arguments.target.to(at::kLong);
  return {at::arange(labels.size(0), labels.options()), labels, at::ones_like(labels, at::kBool)};
}

// The dtypes that elements can be added in.
bool has_addition(at::ScalarType type) { return type == at::kBool || type == at::kLong || is_arithmetic(type); }

}  // namespace

BlockTarget::BlockTarget(const LinearArguments& arguments, const Blocks& blocks) : blocks_(blocks) {
  if (!arguments.is_sparse() && !arguments.has_class_indices()) {
    dense_ = arguments.target;
  } else {
    sort_elements(arguments);
  }
}

void BlockTarget::sort_elements(const LinearArguments& arguments) {
  const auto [rows, labels, values] = elements_of(arguments);
  const Tensor is_none = labels < 0;  // of class indices
  Tensor outside = is_none.logical_or(labels >= blocks_.num_labels);
  if (arguments.is_sparse()) {
    outside = outside.logical_or(rows < 0).logical_or(rows >= blocks_.num_rows);
    TORCH_CHECK(!outside.is_cpu() || !outside.any().item<bool>(),
                "_linear_bce: expected indices of rows and labels inside of the logits");
  }

  // What is outside belongs to no block.
  const Tensor block =
      rows.div(blocks_.block_rows, "floor") * blocks_.across() + labels.div(blocks_.block_labels, "floor");
  block_of_ = at::where(outside, -1, block);
  places_ = rows.remainder(blocks_.block_rows) * blocks_.block_labels + labels.remainder(blocks_.block_labels);
  values_ = has_addition(values.scalar_type())
                ? values
                : values.to(is_hard_label(values.scalar_type()) ? at::kLong : at::kFloat);
  const int64_t place_of_others = blocks_.block_rows * blocks_.block_labels;
  buffer_ = at::zeros({place_of_others + 1}, values_.options());

  if (!block_of_.is_cpu()) return;
  const Tensor order = block_of_.argsort(/*stable=*/true);
  block_of_ = block_of_.index_select(0, order);
  places_ = places_.index_select(0, order);
  values_ = values_.index_select(0, order);
  const int64_t num_blocks = blocks_.down() * blocks_.across();
  const Tensor begin = at::searchsorted(block_of_, at::arange(num_blocks + 1, block_of_.options()));
  begin_.assign(begin.const_data_ptr<int64_t>(), begin.const_data_ptr<int64_t>() + num_blocks + 1);
}

void BlockTarget::fill(int64_t block) {
  if (written_.defined()) buffer_.index_fill_(0, written_, 0);
  Tensor values;
  if (!begin_.empty()) {
    const int64_t count = begin_[block + 1] - begin_[block];
    written_ = places_.narrow(0, begin_[block], count);
    values = values_.narrow(0, begin_[block], count);
  } else {
    // The host does not know how many elements a block has, and asking the device would make it wait. So all elements
    // are written, those of other blocks to the last place of the buffer.
    written_ = at::where(block_of_ == block, places_, buffer_.numel() - 1);
    values = values_;
  }
  buffer_.index_put_({written_}, values, /*accumulate=*/true);
}

Tensor BlockTarget::block(const Range& range) {
  if (dense_.defined()) return dense_.narrow(0, range.row, range.rows).narrow(1, range.label, range.labels);
  fill(range.row / blocks_.block_rows * blocks_.across() + range.label / blocks_.block_labels);
  return buffer_.as_strided({range.rows, range.labels}, {blocks_.block_labels, 1});
}

}  // namespace bce_ext
