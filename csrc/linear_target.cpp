#include "linear_target.h"

#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/util/Load.h>
#include <c10/util/irange.h>

#include "pass.h"
#include "sparse_target.h"

namespace bce_ext {

BlockTarget::BlockTarget(const LinearArguments& arguments, const Tiling& blocks) : blocks_(blocks) {
  if (!arguments.is_sparse() && !arguments.has_class_indices()) {
    dense_ = arguments.target;
    return;
  }
  // Row and label of each value.
  Tensor rows, labels, values;
  if (arguments.is_sparse()) {
    const Tensor indices = arguments.indices->resolve_neg();
    rows = indices.select(0, 0);
    labels = indices.select(0, 1);
    values = arguments.target.resolve_neg();
  } else {
    labels = arguments.target.to(at::kLong).resolve_neg();
    rows = at::arange(labels.size(0), labels.options());
    values = at::ones_like(labels, at::kBool);
  }
  const at::ScalarType dtype = values.scalar_type();
  values_ = has_addition(dtype) ? values : values.to(is_label_type(dtype) ? at::kLong : at::kFloat);
  // The last place is that of elements of other blocks.
  buffer_ = at::zeros({blocks_.block_rows * blocks_.block_labels + 1}, values_.options());
  if (buffer_.is_cpu()) {
    // The host reads all three as memory.
    values_ = readable(values_);
    sort_on_host(readable(rows), readable(labels), /*allows_none=*/!arguments.is_sparse());
  } else {
    list_on_device(rows, labels);
  }
}

Tensor BlockTarget::block(const Range& range) {
  if (dense_.defined()) return dense_.narrow(0, range.row, range.rows).narrow(1, range.label, range.labels);
  const int64_t block = range.row / blocks_.block_rows * blocks_.across() + range.label / blocks_.block_labels;
  buffer_.is_cpu() ? fill_on_host(block) : fill_on_device(block);
  return buffer_.as_strided({range.rows, range.labels}, {blocks_.block_labels, 1});
}

// ---- on the host: a counting sort ----

void BlockTarget::sort_on_host(const Tensor& rows, const Tensor& labels, bool allows_none) {
  const auto row = rows.accessor<const int64_t, 1>();
  const auto label = labels.accessor<const int64_t, 1>();
  const int64_t num_values = values_.size(0);
  const auto is_none = [&](int64_t i) { return allows_none && label[i] < 0; };
  const auto block_of = [&](int64_t i) {
    return row[i] / blocks_.block_rows * blocks_.across() + label[i] / blocks_.block_labels;
  };
  begin_.assign(blocks_.down() * blocks_.across() + 1, 0);
  for (const auto i : c10::irange(num_values)) {
    if (is_none(i)) continue;
    TORCH_CHECK(row[i] >= 0 && row[i] < blocks_.num_rows && label[i] >= 0 && label[i] < blocks_.num_labels,
                "_linear_bce: expected indices of rows and labels inside of the logits");
    ++begin_[block_of(i) + 1];
  }
  for (size_t block = 1; block < begin_.size(); ++block) begin_[block] += begin_[block - 1];
  elements_.resize(begin_.back());
  std::vector<int64_t> next = begin_;
  for (const auto i : c10::irange(num_values)) {
    if (is_none(i)) continue;
    const int64_t place = row[i] % blocks_.block_rows * blocks_.block_labels + label[i] % blocks_.block_labels;
    elements_[next[block_of(i)]++] = {place, i};
  }
}

void BlockTarget::fill_on_host(int64_t block) {
  AT_DISPATCH_FLOATING_TYPES_AND4(
      at::kHalf, at::kBFloat16, at::kBool, at::kLong, values_.scalar_type(), "_linear_bce", [&] {
        const auto value = values_.accessor<const scalar_t, 1>();
        auto* buffer = buffer_.mutable_data_ptr<scalar_t>();
        const auto for_each_of = [&](int64_t b, auto function) {
          for (int64_t i = begin_[b]; i < begin_[b + 1]; ++i) function(elements_[i]);
        };
        if (written_block_ >= 0) for_each_of(written_block_, [&](Element e) { buffer[e.place] = 0; });
        for_each_of(block, [&](Element e) { add_to(buffer[e.place], c10::load(&value[e.value])); });
      });
  written_block_ = block;
}

// ---- on a device ----
// The host does not know how many elements a block has, and asking the device would make it wait. So all elements are
// written, those of other blocks to the last place of the buffer.

void BlockTarget::list_on_device(const Tensor& rows, const Tensor& labels) {
  const Tensor outside =
      (labels < 0).logical_or(labels >= blocks_.num_labels).logical_or(rows < 0).logical_or(rows >= blocks_.num_rows);
  const Tensor block =
      rows.div(blocks_.block_rows, "floor") * blocks_.across() + labels.div(blocks_.block_labels, "floor");
  block_of_ = at::where(outside, -1, block);  // belongs to no block
  places_ = rows.remainder(blocks_.block_rows) * blocks_.block_labels + labels.remainder(blocks_.block_labels);
}

void BlockTarget::fill_on_device(int64_t block) {
  if (written_places_.defined()) buffer_.index_fill_(0, written_places_, 0);
  written_places_ = at::where(block_of_ == block, places_, buffer_.numel() - 1);
  buffer_.index_put_({written_places_}, values_, /*accumulate=*/true);
}

}  // namespace bce_ext
