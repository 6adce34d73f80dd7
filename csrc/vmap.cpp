// vmap: the losses of a batch are those of one larger tensor, which a kernel computes. The loss of each example is
// reduced by itself. What needs more than that is batched operation by operation, as the composite formula.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <numeric>

#include "composite.h"

namespace bce_ext {
namespace {

// The operand that is mapped by the innermost of the vmaps that map any; null if none does.
const Tensor* innermost(const Arguments& arguments) {
  const Tensor* mapped = nullptr;
  int64_t level = -1;
  const auto see = [&](const Tensor& operand) {
    const auto* const batched = at::functorch::maybeGetBatchedImpl(operand);
    if (batched == nullptr || batched->level() <= level) return;
    mapped = &operand;
    level = batched->level();
  };
  see(arguments.input);
  see(arguments.target);
  if (is_defined(arguments.weight)) see(*arguments.weight);
  if (is_defined(arguments.pos_weight)) see(*arguments.pos_weight);
  return mapped;
}

// The tensors that a vmap maps over, their batch in front. While this lives, operations are of the level below.
class Batch {
 public:
  explicit Batch(const at::functorch::BatchedTensorImpl& mapped)
      : level_(mapped.level()),
        size_(mapped.value().sym_size(mapped.bdim())),
        below_(c10::DispatchKey::FuncTorchBatched) {}

  // A batch of operands of `rank` dimensions, or an operand that broadcasts to each of a batch.
  Tensor underneath(const Tensor& operand, int64_t rank) const {
    const auto* const batched = at_level(operand);
    if (batched == nullptr) return operand;
    Tensor tensor = batched->value().movedim(batched->bdim(), 0);
    while (tensor.dim() < rank + 1) tensor = tensor.unsqueeze(1);
    return tensor;
  }

  OptionalTensor underneath(const OptionalTensor& operand, int64_t rank) const {
    return is_defined(operand) ? OptionalTensor(underneath(*operand, rank)) : std::nullopt;
  }

  // A batch in any case.
  Tensor expanded(const Tensor& operand) const {
    if (at_level(operand) != nullptr) return underneath(operand, operand.dim());
    c10::SymDimVector sizes{size_};
    sizes.append(operand.sym_sizes().begin(), operand.sym_sizes().end());
    return operand.expand_symint(sizes);
  }

  Tensor wrapped(Tensor tensor) const { return at::functorch::makeBatched(std::move(tensor), 0, level_); }

 private:
  const at::functorch::BatchedTensorImpl* at_level(const Tensor& operand) const {
    const auto* const batched = at::functorch::maybeGetBatchedImpl(operand);
    return batched != nullptr && batched->level() == level_ ? batched : nullptr;
  }

  const int64_t level_;
  const c10::SymInt size_;
  const c10::impl::ExcludeDispatchKeyGuard below_;
};

// A normalizer may be one for each example. A number on another device goes with a whole tensor, not with a batch.
bool has_one_device(const Arguments& arguments) {
  const auto is_here = [&](const OptionalTensor& operand) {
    return !is_defined(operand) || operand->device() == arguments.input.device();
  };
  return !is_defined(arguments.normalizer) && is_here(arguments.weight) && is_here(arguments.pos_weight);
}

// Whether nothing but vmaps is inside of the transform that maps the arguments. A derivative in between wraps what
// comes back from the levels below, so that it is no batch to look at.
bool is_of_innermost_transform(const Arguments& arguments) {
  const Tensor* const mapped = innermost(arguments);
  if (mapped == nullptr) return false;
  const Tensor alias = mapped->alias();
  const auto* const batched = at::functorch::maybeGetBatchedImpl(alias);
  return batched != nullptr && batched->level() == at::functorch::maybeGetBatchedImpl(*mapped)->level();
}

// The loss of each example, from those of its elements, which `losses_of(arguments, dtype)` computes.
template <typename LossesOf>
Tensor loss_of_each(const Arguments& arguments, bool reduce, const c10::SymInt& divisor, at::ScalarType dtype,
                    const LossesOf& losses_of) {
  const int64_t rank = arguments.input.dim();
  const bool in_double = dtype == at::kDouble || arguments.input.scalar_type() == at::kDouble ||
                         arguments.target.scalar_type() == at::kDouble;
  const Batch batch(*at::functorch::maybeGetBatchedImpl(*innermost(arguments)));
  const Tensor input = batch.expanded(arguments.input), target = batch.expanded(arguments.target);
  const OptionalTensor weight = batch.underneath(arguments.weight, rank),
                       pos_weight = batch.underneath(arguments.pos_weight, rank);
  const Arguments of_batch{
      input, target, weight, pos_weight, arguments.normalizer, arguments.formula, arguments.options};
  if (!reduce) return batch.wrapped(losses_of(of_batch, dtype));
  // Losses are rounded to the type of the arithmetic, and their sum, in float64, once.
  Tensor losses = losses_of(of_batch, in_double ? at::kDouble : at::kFloat);
  c10::SmallVector<int64_t, 8> dims(rank);
  std::iota(dims.begin(), dims.end(), 1);
  if (rank > 0) losses = losses.sum(dims, /*keepdim=*/false, at::kDouble);
  return batch.wrapped((losses / at::Scalar(divisor)).to(dtype));
}

Tensor bce_vmap(const Arguments& arguments, int64_t reduction, std::optional<at::ScalarType> given_dtype) {
  check_arguments(arguments);
  check_reduction(arguments, reduction);
  const at::ScalarType dtype = given_dtype.value_or(loss_dtype(arguments));
  check_loss_dtype(dtype);
  const bool counts = reduction == at::Reduction::Mean && arguments.ignore_index().has_value();
  if (counts || !has_one_device(arguments) || !has_kernel(arguments.input) || !is_of_innermost_transform(arguments)) {
    const OptionalTensor normalizer = normalizer_of(arguments, reduction);
    return composite_loss(arguments.with_normalizer(normalizer), reduction, dtype);
  }
  const auto losses_of = [](const Arguments& of_batch, at::ScalarType of_losses) {
    return bce(of_batch, at::Reduction::None, of_losses);
  };
  return loss_of_each(arguments, reduction != at::Reduction::None, divisor_of(arguments, reduction), dtype, losses_of);
}

Tensor loss_vmap(const Arguments& arguments, bool reduce, c10::SymInt divisor, at::ScalarType dtype) {
  check_arguments(arguments);
  check_loss_dtype(dtype);
  if (!has_one_device(arguments) || !is_of_innermost_transform(arguments)) {
    return composite_loss(arguments, reduce, divisor, dtype);
  }
  const auto losses_of = [](const Arguments& of_batch, at::ScalarType of_losses) {
    return bce_loss(of_batch, /*reduce=*/false, 1, of_losses);
  };
  return loss_of_each(arguments, reduce, divisor, dtype, losses_of);
}

std::tuple<Tensor, Tensor> backward_vmap(const Arguments& arguments, const Tensor& grad_output, c10::SymInt divisor,
                                         std::array<bool, 2> output_mask) {
  check_arguments(arguments);
  return composite_backward(arguments, grad_output, divisor, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(bce_ext, FuncTorchBatched, m) {
  m.impl("_bce", Flat<bce_vmap>::call);
  m.impl("_bce_loss", Flat<loss_vmap>::call);
  m.impl("_bce_backward", Flat<backward_vmap>::call);
  m.impl("_count_valid", composite_count_valid);
}

}  // namespace bce_ext
