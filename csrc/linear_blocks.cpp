// The loss of a linear layer and its gradients, a block of the logits at a time.
//
// For each block of labels, and in it for each block of rows: the logits by a product, their loss and gradient by the
// kernel, and the products of that gradient with the rows and with the labels, while the block is in the cache. Labels
// are the outer loop: then the gradient of a block of linear_weight is finished before the next one begins, and the
// gradient of the input is the only sum that lasts. Sums over blocks are taken in float32, or in float64 for float64.
#include <ATen/Functions.h>
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu/output_memory.h"
#include "linear.h"
#include "linear_target.h"

namespace bce_ext {
namespace {

// Blocks of so many elements stay in the caches together with their gradient and target; with fewer labels, the
// products are slower. On a GPU they are large enough to fill it, and still a small part of its memory.
Tiling cut(const LinearArguments& arguments) {
  const int64_t num_rows = arguments.input.size(0);
  const int64_t num_labels = arguments.has_layer() ? arguments.linear_weight->size(0) : arguments.input.size(1);
  const int64_t elements = arguments.input.is_cuda() ? int64_t{1} << 26 : int64_t{1} << 19;
  constexpr int64_t kFewestLabels = 1024;
  if (!arguments.has_layer()) {  // whole rows lie in memory one after the other
    const int64_t labels = std::clamp<int64_t>(num_labels, 1, elements);
    return {num_rows, num_labels, std::clamp<int64_t>(num_rows, 1, elements / labels), labels};
  }
  const int64_t fewest_labels = std::clamp<int64_t>(num_labels, 1, kFewestLabels);
  const int64_t block_rows = std::clamp<int64_t>(num_rows, 1, elements / fewest_labels);
  const int64_t block_labels = std::clamp<int64_t>(num_labels, 1, elements / block_rows);
  return {num_rows, num_labels, block_rows, block_labels};
}

// A weight that broadcasts to (N, num_labels), for a block.
OptionalTensor weight_of(const OptionalTensor& weight, const Range& range) {
  if (!is_defined(weight) || weight->dim() == 0) return weight;
  Tensor block = *weight;
  if (block.size(-1) != 1) block = block.narrow(-1, range.label, range.labels);
  if (block.dim() == 2 && block.size(0) != 1) block = block.narrow(0, range.row, range.rows);
  return block;
}

// A float16 gradient of a mean would underflow. Its blocks are computed without the divisor, the gradient and its
// products in float32, where they do not overflow, and the sums over blocks are scaled before they are rounded.
bool scales_sums(const LinearArguments& arguments) { return arguments.input.scalar_type() == at::kHalf; }

// A large gradient, which takes over the pages of that of the step before.
Tensor empty_gradient(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (!options.device().is_cpu()) return at::empty(sizes, options);
  return empty_output(sizes, {sizes[1], 1}, options.dtype().toScalarType());
}

class BlockwiseLoss {
 public:
  BlockwiseLoss(const LinearArguments& arguments, int64_t divisor, const OptionalTensor& grad_output,
                const LinearMask& mask)
      : arguments_(arguments),
        mask_{mask[0], mask[1] && arguments.has_layer(), mask[2] && arguments.has_layer()},
        blocks_(cut(arguments)),
        sum_dtype_(at::toOpMathType(arguments.input.scalar_type())),
        block_dtype_(sum_dtype_ == at::kDouble || arguments.target.scalar_type() == at::kDouble ? at::kDouble
                                                                                                : at::kFloat),
        target_(arguments, blocks_),
        divisor_(scales_sums(arguments) ? 1 : divisor),
        normalizer_(scales_sums(arguments) ? std::nullopt : arguments.normalizer) {
    const auto options = arguments.input.options();
    total_ = at::zeros({}, options.dtype(at::kDouble));
    if (arguments.has_layer()) logits_ = at::empty({blocks_.block_rows * blocks_.block_labels}, options);
    if (scales_sums(arguments)) {
      factor_ = at::full({}, 1.0 / static_cast<double>(divisor), options.dtype(at::kDouble));
      if (is_defined(arguments.normalizer)) factor_ = factor_ / *arguments.normalizer;
    }
    if (is_defined(grad_output)) grad_output_ = grad_output->to(at::kDouble);
    const auto sum_options =
        options.dtype(arguments.has_layer() || scales_sums(arguments) ? sum_dtype_ : arguments.input.scalar_type());
    if (mask_[0] && !arguments.has_layer()) {
      grad_input_ = empty_gradient(arguments.input.sizes(), sum_options);  // each block is written once
    } else {
      grad_input_ = at::zeros(mask_[0] ? arguments.input.sizes() : at::IntArrayRef{0}, sum_options);
    }
    grad_weight_ = mask_[1] ? empty_gradient(arguments.linear_weight->sizes(), options) : at::empty({0}, options);
    grad_bias_ = at::empty({mask_[2] ? blocks_.num_labels : 0}, options);
    if (mask_[2]) ones_ = at::ones({1, blocks_.block_rows}, options);
    if (blocks_.num_rows == 0) {
      grad_weight_.zero_();
      grad_bias_.zero_();
    }
  }

  LossAndGrads run(at::ScalarType dtype) {
    for (int64_t label = 0; label < blocks_.num_labels; label += blocks_.block_labels) {
      run_labels(label, std::min(blocks_.block_labels, blocks_.num_labels - label));
    }
    if (factor_.defined()) {
      total_ *= factor_;
    } else if (blocks_.num_rows == 0 || blocks_.num_labels == 0) {
      total_ /= static_cast<double>(divisor_);  // a mean of nothing is NaN, and there was no block to say so
      if (is_defined(normalizer_)) total_ /= *normalizer_;
    }
    return {total_.to(dtype), scaled(grad_input_).to(arguments_.input.scalar_type()), std::move(grad_weight_),
            std::move(grad_bias_)};
  }

 private:
  void run_labels(int64_t label, int64_t labels) {
    const Tensor weight = arguments_.has_layer() ? arguments_.linear_weight->narrow(0, label, labels) : Tensor();
    Tensor weight_sum, bias_sum;
    for (int64_t row = 0; row < blocks_.num_rows; row += blocks_.block_rows) {
      const Range range{row, label, std::min(blocks_.block_rows, blocks_.num_rows - row), labels};
      const Tensor rows = arguments_.input.narrow(0, row, range.rows);
      const Tensor gradient = gradient_of(range, rows, weight);
      if (!arguments_.has_layer()) {
        if (mask_[0]) grad_input_.narrow(0, row, range.rows).narrow(1, label, labels).copy_(gradient);
        continue;
      }
      if (mask_[0]) add_product(grad_input_.narrow(0, row, range.rows), gradient, weight);
      if (mask_[1]) {
        const Tensor columns = gradient.t();
        if (blocks_.down() == 1 && !factor_.defined()) {
          Tensor out = grad_weight_.narrow(0, label, labels);
          at::mm_out(out, columns, rows);
        } else if (!weight_sum.defined()) {
          weight_sum = product(columns, rows);
        } else {
          add_product(weight_sum, columns, rows);
        }
      }
      if (mask_[2]) {
        // A product with ones is faster than a sum over columns.
        const Tensor sum = product(ones_.narrow(1, 0, range.rows), gradient).select(0, 0);
        bias_sum = bias_sum.defined() ? bias_sum.add_(sum) : sum;
      }
    }
    if (weight_sum.defined()) grad_weight_.narrow(0, label, labels).copy_(scaled(weight_sum));
    if (bias_sum.defined()) grad_bias_.narrow(0, label, labels).copy_(scaled(bias_sum));
  }

  Tensor logits_of_block(const Range& range, const Tensor& rows, const Tensor& weight) {
    if (!arguments_.has_layer()) return rows.narrow(1, range.label, range.labels);
    Tensor logits = logits_.narrow(0, 0, range.rows * range.labels).view({range.rows, range.labels});
    if (is_defined(arguments_.linear_bias)) {
      return at::addmm_out(logits, arguments_.linear_bias->narrow(0, range.label, range.labels), rows, weight.t());
    }
    return at::mm_out(logits, rows, weight.t());
  }

  // Adds the loss of a block, and returns its gradient with respect to the logits if one is wanted.
  Tensor gradient_of(const Range& range, const Tensor& rows, const Tensor& weight) {
    const bool wants_gradient = mask_[0] || mask_[1] || mask_[2];
    const Tensor products = logits_of_block(range, rows, weight);
    const Tensor logits = wants_gradient && scales_sums(arguments_) ? products.to(sum_dtype_) : products;
    const Tensor target = target_.block(range);
    const OptionalTensor block_weight = weight_of(arguments_.weight, range);
    const OptionalTensor pos_weight = weight_of(arguments_.pos_weight, range);
    const Arguments of_block{logits,
                             target,
                             block_weight,
                             pos_weight,
                             normalizer_,
                             static_cast<int64_t>(Formula::WithLogits),
                             arguments_.options};
    if (!wants_gradient) {
      total_ += bce_loss(of_block, /*reduce=*/true, divisor_, block_dtype_);
      return {};
    }
    auto [loss, gradient] = bce_loss_and_grad(of_block, divisor_, block_dtype_);
    total_ += loss;
    return gradient;
  }

  void add_product(Tensor sum, const Tensor& a, const Tensor& b) {
    if (a.scalar_type() == sum_dtype_) {
      sum.addmm_(a, b.to(sum_dtype_));
    } else {
      sum.add_(product(a, b));
    }
  }

  Tensor product(const Tensor& a, const Tensor& b) const {
    return factor_.defined() ? at::mm(a.to(sum_dtype_), b.to(sum_dtype_)) : at::mm(a, b).to(sum_dtype_);
  }

  Tensor scaled(const Tensor& sum) const {
    Tensor result = factor_.defined() ? sum * factor_ : sum;
    return grad_output_.defined() ? result * grad_output_ : result;
  }

  const LinearArguments& arguments_;
  const LinearMask mask_;
  const Tiling blocks_;
  const at::ScalarType sum_dtype_;    // of the sums over blocks
  const at::ScalarType block_dtype_;  // of the loss of a block
  BlockTarget target_;
  const int64_t divisor_;
  const OptionalTensor normalizer_;
  Tensor factor_;  // undefined where the blocks take the divisor and the normalizer
  Tensor grad_output_;
  Tensor total_, logits_, ones_;
  Tensor grad_input_, grad_weight_, grad_bias_;
};

LossAndGrads loss_and_grads(const LinearArguments& arguments, int64_t divisor, at::ScalarType dtype,
                            const OptionalTensor& grad_output, LinearMask output_mask) {
  check_loss_and_grads(arguments, dtype, grad_output);
  // Whoever casts has done so; a backward that is called under autocast would cast the products again.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return BlockwiseLoss(arguments, divisor, grad_output, output_mask).run(dtype);
}

LossAndGrads loss_and_grads_meta(const LinearArguments& arguments, c10::SymInt /*divisor*/, at::ScalarType dtype,
                                 const OptionalTensor& grad_output, LinearMask output_mask) {
  check_loss_and_grads(arguments, dtype, grad_output);
  const auto options = arguments.input.options();
  const auto gradient = [&](bool is_wanted, c10::SymIntArrayRef size) {
    return is_wanted ? at::empty_symint(size, options) : at::empty({0}, options);
  };
  return {at::empty({}, options.dtype(dtype)), gradient(output_mask[0], arguments.input.sym_sizes()),
          gradient(output_mask[1] && arguments.has_layer(), {arguments.num_labels(), arguments.input.sym_size(1)}),
          gradient(output_mask[2] && arguments.has_layer(), {arguments.num_labels()})};
}

}  // namespace

// The number of elements that do not equal ignore_index, block by block where the target is not dense.
OptionalTensor normalizer_of(const LinearArguments& arguments, int64_t reduction) {
  const auto ignore_index = arguments.of_loss(arguments.input, arguments.target).ignore_index();
  if (reduction != at::Reduction::Mean || is_defined(arguments.normalizer) || !ignore_index)
    return arguments.normalizer;
  if (!arguments.is_sparse() && !arguments.has_class_indices()) return count_valid(arguments.target, *ignore_index);
  if (!is_plain(arguments.input) || !is_plain(arguments.target)) {
    return count_valid(dense_target(arguments), *ignore_index);
  }
  const Tiling blocks = cut(arguments);
  BlockTarget target(arguments, blocks);
  Tensor count = at::zeros({}, arguments.input.options().dtype(at::kDouble).requires_grad(false));
  for (int64_t label = 0; label < blocks.num_labels; label += blocks.block_labels) {
    for (int64_t row = 0; row < blocks.num_rows; row += blocks.block_rows) {
      count += count_valid(target.block({row, label, std::min(blocks.block_rows, blocks.num_rows - row),
                                         std::min(blocks.block_labels, blocks.num_labels - label)}),
                           *ignore_index);
    }
  }
  return count;
}

bool takes_blocks(const LinearArguments& arguments, int64_t reduction) {
  if (reduction == at::Reduction::None || !has_kernel(arguments.input)) return false;
  return are_better(arguments.num_rows() * arguments.num_labels(), arguments.linear_weight,
                    arguments.input.scalar_type())
      .guard_or_false(__FILE__, __LINE__);
}

TORCH_LIBRARY_IMPL(bce_ext, CompositeExplicitAutograd, m) {
  m.impl("_linear_bce_loss_and_grads", LinearFlat<loss_and_grads>::call);
}
TORCH_LIBRARY_IMPL(bce_ext, Meta, m) { m.impl("_linear_bce_loss_and_grads", LinearFlat<loss_and_grads_meta>::call); }

}  // namespace bce_ext
