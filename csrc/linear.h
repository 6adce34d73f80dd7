// The linear layer together with its loss: binary_cross_entropy_with_logits(linear(input, linear_weight, linear_bias),
// target, ...), whose logits exist for a block of rows and labels at a time. Without a layer, the input is the logits,
// and it is a sparse target that exists for a block at a time.
#pragma once

#include "ops.h"

namespace bce_ext {

// Of the public operator, in its errors.
constexpr auto kLinearName = "linear_binary_cross_entropy_with_logits";

// What the internal operators of the linear layer and its loss take first, as views of the caller's arguments.
struct LinearArguments {
  const Tensor& input;                  // (N, in_features)
  const OptionalTensor& linear_weight;  // (num_labels, in_features); none: the input is (N, num_labels) logits
  const OptionalTensor& linear_bias;
  // Dense: (N, num_labels). Class indices: (N), integers; a negative one stands for no label. Sparse: the values (nnz)
  // that stand at `indices`, those of the same place added up, and 0 elsewhere.
  const Tensor& target;
  const OptionalTensor& indices;  // (2, nnz): row and label
  const OptionalTensor& weight;
  const OptionalTensor& pos_weight;
  const OptionalTensor& normalizer;
  at::ArrayRef<double> options;

  bool is_sparse() const { return is_defined(indices); }
  bool has_class_indices() const { return !is_sparse() && target.dim() == 1; }
  c10::SymInt num_rows() const { return input.sym_size(0); }
  bool has_layer() const { return is_defined(linear_weight); }
  c10::SymInt num_labels() const { return has_layer() ? linear_weight->sym_size(0) : input.sym_size(1); }

  // Those of the loss of some logits.
  Arguments of_loss(const Tensor& logits, const Tensor& dense_target) const {
    return {logits, dense_target, weight, pos_weight, normalizer, static_cast<int64_t>(Formula::WithLogits), options};
  }
  LinearArguments with_normalizer(const OptionalTensor& other) const {
    return {input, linear_weight, linear_bias, target, indices, weight, pos_weight, other, options};
  }
};

// As Flat in ops.h.
template <auto function>
struct LinearFlat;

template <typename R, typename... Rest, R (*function)(const LinearArguments&, Rest...)>
struct LinearFlat<function> {
  static R call(const Tensor& input, const OptionalTensor& linear_weight, const OptionalTensor& linear_bias,
                const Tensor& target, const OptionalTensor& indices, const OptionalTensor& weight,
                const OptionalTensor& pos_weight, const OptionalTensor& normalizer, at::ArrayRef<double> options,
                Rest... rest) {
    return function({input, linear_weight, linear_bias, target, indices, weight, pos_weight, normalizer, options},
                    std::forward<Rest>(rest)...);
  }
};

// Which gradients are wanted: of input, linear_weight, linear_bias.
using LinearMask = std::array<bool, 3>;
using LossAndGrads = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Everything that can be told without looking into the tensors of the target: of the layer before autocast has cast it;
// of what makes the logits and a dense target; of all; and of what a loss with its gradients takes beside it.
void check_layer(const LinearArguments& arguments);
void check_logits_and_target(const LinearArguments& arguments);
void check_linear_arguments(const LinearArguments& arguments);
void check_loss_and_grads(const LinearArguments& arguments, at::ScalarType dtype, const OptionalTensor& grad_output);
void check_reduction(const LinearArguments& arguments, int64_t reduction);

at::ScalarType loss_dtype(const LinearArguments& arguments);

Tensor logits_of(const LinearArguments& arguments);

// The public operator for logits and a target that is not dense.
Tensor sparse_with_logits(const Arguments& arguments, int64_t reduction);

// The plain form: all logits, a dense target, and operators that are differentiable in every way.
Tensor plain_loss(const LinearArguments& arguments, int64_t reduction, at::ScalarType dtype);
Tensor dense_target(const LinearArguments& arguments);

// The normalizer of a loss: the one that is given, or the number of elements that a `mean` does not ignore.
OptionalTensor normalizer_of(const LinearArguments& arguments, int64_t reduction);

// The part of the divisor that the host knows.
c10::SymInt divisor_of(const LinearArguments& arguments, int64_t reduction);

// Whether blocks are better than the plain form, for products in a dtype. Fewer logits and their gradient stay in the
// caches as they are, and a product of whole matrices is faster on several threads than one of blocks. A gradient of
// linear_weight of 32 MiB is reason enough: malloc maps so much memory anew at each step, where blocks write into that
// of the step before. Blocks scale what is float16 after it was added up: the gradient of a mean of a million logits
// would underflow.
c10::SymBool are_better(const c10::SymInt& num_logits, const OptionalTensor& linear_weight, at::ScalarType dtype);

// Whether to take blocks: where they are better, and can be. They need a reduced loss and a device with kernels.
bool takes_blocks(const LinearArguments& arguments, int64_t reduction);

// The internal operators, called through the dispatcher.
Tensor linear_bce(const LinearArguments& arguments, int64_t reduction,
                  std::optional<at::ScalarType> dtype = std::nullopt);
LossAndGrads linear_bce_loss_and_grads(const LinearArguments& arguments, c10::SymInt divisor, at::ScalarType dtype,
                                       const OptionalTensor& grad_output, LinearMask output_mask);

}  // namespace bce_ext
