// The operators of the family: the arguments that they share, the checks of these arguments, and calls through the
// dispatcher. The schemas stand in ops.cpp.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "problem.h"

namespace bce_ext {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What every operator of the family takes. A view of the caller's tensors: it does not outlive the call.
struct Arguments {
  const Tensor& input;
  const Tensor& target;
  const OptionalTensor& weight;
  const OptionalTensor& pos_weight;
  bool with_logits;  // logits and the formula of binary_cross_entropy_with_logits; else probabilities and
                     // binary_cross_entropy
};

inline bool is_defined(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

// Raise what torch raises for the same mistake: ValueError for the size of the target or the reduction, RuntimeError
// for weights that do not broadcast and for mixed devices, NotImplementedError for logits that are not real floating
// point numbers in a strided tensor.
void check_arguments(const Arguments& arguments);
void check_reduction(int64_t reduction);

// The dtype of the loss: that of input and target promoted, where an integral or bool target counts for nothing.
at::ScalarType loss_dtype(const Arguments& arguments);

// What the sum of the losses is divided by: the number of elements for `mean`, 1 otherwise.
c10::SymInt divisor_of(const Tensor& input, int64_t reduction);

// Whether there are kernels for the device of the input; elsewhere the composite formula serves.
bool has_kernel(const Tensor& input);

// The loss, outside of any gradient graph.
Tensor loss_without_grad(const Arguments& arguments, int64_t reduction, at::ScalarType dtype);

// The internal operators, called through the dispatcher.
Tensor bce_loss(const Arguments& arguments, bool reduce, c10::SymInt divisor, at::ScalarType dtype);
std::tuple<Tensor, Tensor> bce_loss_and_grad(const Arguments& arguments, c10::SymInt divisor, at::ScalarType dtype);
std::tuple<Tensor, Tensor> bce_backward(const Tensor& grad_output, const Arguments& arguments, c10::SymInt divisor,
                                        std::array<bool, 2> output_mask);
void scale_grad_(Tensor& grad, const Tensor& grad_output);

}  // namespace bce_ext
