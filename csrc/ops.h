// The operators of the family: the arguments that they share, the checks of these arguments (checks.cpp), and calls
// through the dispatcher. The schemas stand in ops.cpp.
#pragma once

#include <ATen/core/Reduction.h>
#include <ATen/core/Scalar.h>
#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "problem.h"

namespace bce_ext {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// `options` are label_smoothing, ignore_index (NaN: none), then the parameters of the formula. What is left out is 0 or
// none.
std::optional<double> ignore_index_of(at::ArrayRef<double> options);
double as_option(const std::optional<at::Scalar>& ignore_index);

// What every operator of the family takes first. A view of the caller's arguments: it does not outlive the call.
struct Arguments {
  const Tensor& input;  // logits; probabilities for Formula::Probabilities
  const Tensor& target;
  const OptionalTensor& weight;
  const OptionalTensor& pos_weight;
  const OptionalTensor& normalizer;  // a part of the divisor, known on the device alone
  int64_t formula;                   // a Formula
  at::ArrayRef<double> options;

  Formula kind() const { return static_cast<Formula>(formula); }
  bool takes_probabilities() const { return kind() == Formula::Probabilities; }
  double label_smoothing() const { return options.empty() ? 0.0 : options[0]; }
  std::optional<double> ignore_index() const { return ignore_index_of(options); }
  double parameter(size_t i) const { return options[kParameters + i]; }
  Arguments with_normalizer(const OptionalTensor& other) const {
    return {input, target, weight, pos_weight, other, formula, options};
  }

  // What losses have the memory order of, where there is one for each element: as in torch, the target, unless it takes
  // probabilities.
  const Tensor& order_of_losses() const { return takes_probabilities() ? input : target; }

  static constexpr size_t kParameters = 2;  // where they begin in `options`
};

// Makes a function of the operators' flat arguments out of one that takes Arguments:
//   R function(const Arguments&, Rest...)  becomes  R call(input, target, ..., options, rest...)
template <auto function>
struct Flat;

template <typename R, typename... Rest, R (*function)(const Arguments&, Rest...)>
struct Flat<function> {
  static R call(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                const OptionalTensor& pos_weight, const OptionalTensor& normalizer, int64_t formula,
                at::ArrayRef<double> options, Rest... rest) {
    return function({input, target, weight, pos_weight, normalizer, formula, options}, std::forward<Rest>(rest)...);
  }
};

inline bool is_defined(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

// Whether operations are being recorded above autograd, by torch.jit.trace or torch.export. What was computed below,
// such as a stored gradient, would be a constant of that record.
bool is_recorded();

// Whether the tensor is memory and nothing else: no subclass, no tracer, no transform that would want to see every
// operation on it.
bool is_plain(const Tensor& tensor);

// Whether targets of this dtype are labels, 0 or 1: bools and integers.
bool is_label_type(at::ScalarType type);

// Whether it is a floating type, an integer or bool: not complex.
bool is_real(at::ScalarType type);

// Whether float32 may hold another number than an integer target of this dtype does.
bool is_rounded_label(double number, at::ScalarType target_dtype);

// The floating types that PyTorch computes in, and the kernels write. The 8-bit ones are for storage.
bool is_arithmetic(at::ScalarType type);

// The checks raise what torch raises for the same mistake: ValueError for the size of the target, the reduction and
// numbers out of range, RuntimeError for weights that do not broadcast, for mixed devices and for memory that is not
// there, NotImplementedError for logits that are not real floating point numbers in a strided tensor.
void check_arguments(const Arguments& arguments);
void check_count(const Tensor& target, double ignore_index);
void check_mean_of_valid(const Arguments& arguments);
void check_reduction(const Arguments& arguments, int64_t reduction);
void check_loss_dtype(at::ScalarType dtype);
void check_grad_output(const Tensor& grad_output, const Arguments& arguments);
// A strided grad_output: a sparse COO one made dense, after a look at its indices, which to_dense would believe.
Tensor strided_grad_output(const Tensor& grad_output);
// Raises for an element of the input or the target that is outside of what the loss takes.
[[noreturn]] void refuse_element(Formula formula, const std::optional<double>& ignored, bool is_target, double number);
// That the memory which sizes and strides describe is there. A storage can be freed or cut under a tensor.
void check_storage(const Tensor& tensor, const char* name);

const char* name_of(Formula formula);
inline const char* name_of(const Arguments& arguments) { return name_of(arguments.kind()); }

// The dtype of the loss: that of input and target promoted, where an integral or bool target counts for nothing.
at::ScalarType loss_dtype(const Arguments& arguments);

// The part of the divisor that the host knows: the number of elements for a `mean` without a normalizer, 1 otherwise.
c10::SymInt divisor_of(const Arguments& arguments, int64_t reduction);

// Whether there are kernels for the device of the input; elsewhere the composite formula serves.
bool has_kernel(const Tensor& input);

// Whether a kernel counts the elements that a `mean` does not ignore by itself, with bce_mean_of_valid; elsewhere that
// is what normalizer_of is for. Nobody else may want to see the count.
bool kernel_counts_valid(const Arguments& arguments, int64_t reduction);

// The normalizer of a loss: the one that is given, or the number of elements that a `mean` does not ignore.
OptionalTensor normalizer_of(const Arguments& arguments, int64_t reduction);

// The loss, outside of any gradient graph.
Tensor loss_without_grad(const Arguments& arguments, int64_t reduction, at::ScalarType dtype);

// The internal operators, called through the dispatcher. bce is the loss with all that belongs to it.
Tensor bce(const Arguments& arguments, int64_t reduction, std::optional<at::ScalarType> dtype = std::nullopt);
Tensor bce_loss(const Arguments& arguments, bool reduce, c10::SymInt divisor, at::ScalarType dtype);
std::tuple<Tensor, Tensor> bce_loss_and_grad(const Arguments& arguments, c10::SymInt divisor, at::ScalarType dtype);
std::tuple<Tensor, Tensor> bce_backward(const Arguments& arguments, const Tensor& grad_output, c10::SymInt divisor,
                                        std::array<bool, 2> output_mask);
std::tuple<Tensor, Tensor> bce_mean_of_valid(const Arguments& arguments, at::ScalarType dtype, bool wants_gradient);
void scale_grad_(Tensor& grad, const Tensor& grad_output);
Tensor count_valid(const Tensor& target, double ignore_index);

}  // namespace bce_ext
