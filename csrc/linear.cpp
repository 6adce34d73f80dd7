// The public operator, the checks of its arguments, and the plain form.
#include "linear.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <c10/util/irange.h>
#include <torch/library.h>

#include <algorithm>

#include "find_operator.h"
#include "sparse_target.h"

namespace bce_ext {
namespace {

template <typename R, typename... Rest>
using Signature = R(const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
                    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, at::ArrayRef<double>, Rest...);

template <typename Signature, typename... Rest>
auto call(const c10::TypedOperatorHandle<Signature>& op, const LinearArguments& arguments, Rest&&... rest) {
  return op.call(arguments.input, arguments.linear_weight, arguments.linear_bias, arguments.target, arguments.indices,
                 arguments.weight, arguments.pos_weight, arguments.normalizer, arguments.options,
                 std::forward<Rest>(rest)...);
}

// The public operator that is called: without a layer it is the plain loss, of a sparse target.
const char* name_of(const OptionalTensor& linear_weight) {
  return is_defined(linear_weight) ? kLinearName : name_of(Formula::WithLogits);
}

// What F.linear would refuse, in one sentence. The input has any number of dimensions, and the dtypes may differ:
// autocast makes them one.
void check_layer(const Tensor& input, const OptionalTensor& linear_weight, const OptionalTensor& linear_bias,
                 const Tensor& target) {
  const char* const name = name_of(linear_weight);
  TORCH_CHECK_NOT_IMPLEMENTED(
      is_arithmetic(input.scalar_type()) && input.layout() == at::kStrided, name,
      ": expected a strided input of a real floating dtype (float64, float32, bfloat16 or float16), but got ",
      input.scalar_type(), ", ", input.layout());
  TORCH_CHECK(input.dim() >= 1, name, ": expected an input of at least one dimension, but got a number");
  TORCH_CHECK(
      !is_defined(linear_weight) || (linear_weight->dim() == 2 && linear_weight->sym_size(1) == input.sym_size(-1)),
      name, ": expected linear_weight of size (num_labels, ", input.sym_size(-1), "), but got size ",
      linear_weight->sym_sizes());
  const auto check_parameter = [&](const Tensor& tensor, const char* what) {
    TORCH_CHECK(is_arithmetic(tensor.scalar_type()) && tensor.layout() == at::kStrided, name, ": expected a strided ",
                what, " of the dtype of input (", input.scalar_type(), "), but got ", tensor.scalar_type(), ", ",
                tensor.layout());
    TORCH_CHECK(tensor.device() == input.device(), name, ": expected ", what, " on the device of input (",
                input.device(), "), but got ", tensor.device());
    check_storage(tensor, what);
  };
  if (is_defined(linear_weight)) check_parameter(*linear_weight, "linear_weight");
  if (is_defined(linear_bias)) {
    TORCH_CHECK(is_defined(linear_weight), name, ": expected no linear_bias without linear_weight");
    check_parameter(*linear_bias, "linear_bias");
    TORCH_CHECK(linear_bias->dim() == 1 && linear_bias->sym_size(0) == linear_weight->sym_size(0), name,
                ": expected linear_bias of size (", linear_weight->sym_size(0), "), but got size ",
                linear_bias->sym_sizes());
  }
  TORCH_CHECK(target.device() == input.device(), name, ": expected target on the device of input (", input.device(),
              "), but got ", target.device());
  check_storage(input, "input");
  check_storage(target, "target");
}

bool has_dtype_of(const Tensor& input, const OptionalTensor& parameter) {
  return !is_defined(parameter) || parameter->scalar_type() == input.scalar_type();
}

void check_dtype_of_layer(const Tensor& input, const OptionalTensor& parameter, const char* what) {
  TORCH_CHECK(has_dtype_of(input, parameter), kLinearName, ": expected ", what, " of the dtype of input (",
              input.scalar_type(), "), but got ", parameter->scalar_type());
}

c10::SymInt num_rows_of(const Tensor& input) {
  c10::SymInt count = 1;
  for (int64_t d = 0; d + 1 < input.dim(); ++d) count *= input.sym_size(d);
  return count;
}

// The size of the logits.
c10::SymDimVector logits_size(const Tensor& input, const OptionalTensor& linear_weight) {
  c10::SymDimVector size(input.sym_sizes().begin(), input.sym_sizes().end());
  if (is_defined(linear_weight)) size.back() = linear_weight->sym_size(0);
  return size;
}

void check_target_size(const Tensor& target, const Tensor& input, const OptionalTensor& linear_weight) {
  const auto expected = logits_size(input, linear_weight);
  if (are_class_indices(target, input)) {
    TORCH_CHECK_VALUE(target.sym_sizes() == input.sym_sizes().slice(0, target.dim()), kLinearName,
                      ": expected class indices of size ", input.sym_sizes().slice(0, target.dim()), ", but got size ",
                      target.sym_sizes());
    return;
  }
  if (!is_defined(linear_weight)) {
    TORCH_CHECK_VALUE(target.sym_sizes() == input.sym_sizes(), name_of(Formula::WithLogits), ": Target size (",
                      target.sym_sizes(), ") must be the same as input size (", input.sym_sizes(), ")");
  }
  TORCH_CHECK_VALUE(target.sym_sizes() == c10::SymIntArrayRef(expected), kLinearName, ": Target size (",
                    target.sym_sizes(), ") must be the same as the size of the logits (", c10::SymIntArrayRef(expected),
                    "), or one integer for each row");
}

// A target as the internal operators take it.
SparseTarget split_target(const Tensor& target, const Tensor& input, const c10::SymInt& num_labels, const char* loss) {
  if (is_sparse(target)) return split_sparse(target, loss);
  TORCH_CHECK(target.layout() == at::kStrided, loss, ": expected a target that is strided, sparse CSR or COO, but got ",
              target.layout());
  if (!are_class_indices(target, input)) {
    if (target.dim() == 2) return {target, Tensor()};
    return {target.reshape_symint({num_rows_of(input), num_labels}), Tensor()};
  }
  check_class_indices(target, num_labels);
  return {target.dim() == 1 ? target : target.reshape({-1}), Tensor()};
}

// Weights broadcast to the logits. With the rows in one dimension, those that have a value for each row are reshaped
// with them.
OptionalTensor with_rows_in_one_dimension(const OptionalTensor& weight, const Tensor& input) {
  if (!is_defined(weight) || weight->dim() < 2 || (weight->dim() == 2 && input.dim() == 2)) return weight;
  if (weight->dim() > input.dim()) return weight;  // to be refused
  c10::SymDimVector size(input.sym_sizes().begin(), input.sym_sizes().end());
  size.back() = weight->sym_size(-1);
  return weight->expand_symint(size).reshape_symint({num_rows_of(input), weight->sym_size(-1)});
}

// That of the logits.
at::ScalarType product_dtype(const Tensor& input) {
  const at::DeviceType device = input.device().type();
  const bool is_cast = (input.is_cpu() || input.is_cuda()) && at::autocast::is_autocast_enabled(device);
  return is_cast ? at::autocast::get_autocast_dtype(device) : input.scalar_type();
}

// Whether the plain form is known to serve at once: without sizes that a compiler leaves open.
bool is_small(c10::SymIntArrayRef logits_size, const OptionalTensor& linear_weight, at::ScalarType dtype) {
  const auto answer = are_better(c10::multiply_integers(logits_size), linear_weight, dtype).maybe_as_bool();
  return answer.has_value() && !*answer;
}

Tensor loss_of_rows(const Tensor& input, const OptionalTensor& linear_weight, const OptionalTensor& linear_bias,
                    const Tensor& target, const OptionalTensor& weight, const OptionalTensor& pos_weight,
                    const OptionalTensor& normalizer, at::ArrayRef<double> options, int64_t reduction) {
  check_layer(input, linear_weight, linear_bias, target);
  check_target_size(target, input, linear_weight);
  const auto size = logits_size(input, linear_weight);
  // What a call costs is most of the time of a small problem.
  const bool takes_plain_form = has_dtype_of(input, linear_weight) && has_dtype_of(input, linear_bias) &&
                                is_small(size, linear_weight, product_dtype(input));
  const auto loss_of = [&](const Tensor& logits, const Tensor& dense) {
    constexpr auto kFormula = static_cast<int64_t>(Formula::WithLogits);
    return bce({logits, dense, weight, pos_weight, normalizer, kFormula, options}, reduction);
  };
  const auto logits = [&] {
    return is_defined(linear_weight) ? at::linear(input, *linear_weight, linear_bias) : input;
  };
  const double ignore_index = ignore_index_of(options).value_or(0.0);
  TORCH_CHECK_VALUE(ignore_index == 0.0 || ignore_index == 1.0 || !are_class_indices(target, input), kLinearName,
                    ": expected an ignore_index of 0 or 1 with class indices, which stand for targets of 0 and 1, "
                    "but got ",
                    ignore_index, "; a row without a label has a negative index");
  if (takes_plain_form && target.layout() == at::kStrided) {
    if (!are_class_indices(target, input)) return loss_of(logits(), target);
    check_class_indices(target, size.back());
    return loss_of(logits(), one_hot(target, size.back()));
  }
  if (takes_plain_form && is_sparse(target)) {
    const Tensor dense = readable_dense_of(target, input.scalar_type(), name_of(linear_weight));
    if (dense.defined()) return loss_of(logits(), dense);
  }
  const SparseTarget split = split_target(target, input, size.back(), name_of(linear_weight));
  const OptionalTensor indices = split.indices.defined() ? OptionalTensor(split.indices) : std::nullopt;
  const bool has_rows = input.dim() == 2;
  const Tensor rows = has_rows ? input : input.reshape_symint({num_rows_of(input), input.sym_size(-1)});
  const OptionalTensor weight_of_rows = with_rows_in_one_dimension(weight, input);
  const OptionalTensor pos_weight_of_rows = with_rows_in_one_dimension(pos_weight, input);
  const Tensor loss = linear_bce({rows, linear_weight, linear_bias, split.values, indices, weight_of_rows,
                                  pos_weight_of_rows, normalizer, options},
                                 reduction);
  return reduction == at::Reduction::None && !has_rows ? loss.reshape_symint(size) : loss;
}

Tensor linear_with_logits(const Tensor& input, const OptionalTensor& linear_weight, const Tensor& target,
                          const OptionalTensor& linear_bias, const OptionalTensor& weight,
                          const OptionalTensor& pos_weight, int64_t reduction, double label_smoothing,
                          const std::optional<at::Scalar>& ignore_index, const OptionalTensor& normalizer) {
  const std::array<double, 2> options{label_smoothing, as_option(ignore_index)};
  const bool has_options = label_smoothing != 0.0 || ignore_index.has_value();
  return loss_of_rows(input, linear_weight, linear_bias, target, weight, pos_weight, normalizer,
                      has_options ? at::ArrayRef<double>(options) : at::ArrayRef<double>(), reduction);
}

Tensor linear_below_autograd(const LinearArguments& arguments, int64_t reduction,
                             std::optional<at::ScalarType> given_dtype) {
  check_linear_arguments(arguments);
  check_reduction(arguments, reduction);
  const at::ScalarType dtype = given_dtype.value_or(loss_dtype(arguments));
  if (!takes_blocks(arguments, reduction)) return plain_loss(arguments, reduction, dtype);
  const OptionalTensor normalizer = normalizer_of(arguments, reduction);
  return std::get<0>(linear_bce_loss_and_grads(arguments.with_normalizer(normalizer), divisor_of(arguments, reduction),
                                               dtype, std::nullopt, {false, false, false}));
}

}  // namespace

void check_layer(const LinearArguments& arguments) {
  TORCH_CHECK(arguments.input.defined() && arguments.target.defined(), kLinearName,
              ": expected input and target to be Tensors, but got None");
  check_layer(arguments.input, arguments.linear_weight, arguments.linear_bias, arguments.target);
}

void check_logits_and_target(const LinearArguments& arguments) {
  check_layer(arguments);
  const char* const name = name_of(arguments.linear_weight);
  const Tensor& input = arguments.input;
  const Tensor& target = arguments.target;
  check_dtype_of_layer(input, arguments.linear_weight, "linear_weight");
  check_dtype_of_layer(input, arguments.linear_bias, "linear_bias");
  TORCH_CHECK_VALUE(input.dim() == 2, name, ": expected rows of input, but got ", input.dim(), " dimensions");
  TORCH_CHECK(is_real(target.scalar_type()), name, ": expected a real target, but got ", target.scalar_type());
  if (!arguments.is_sparse()) return check_target_size(target, input, arguments.linear_weight);
  const Tensor& indices = *arguments.indices;
  TORCH_CHECK(target.dim() == 1 && indices.dim() == 2 && indices.sym_size(0) == 2 &&
                  indices.sym_size(1) == target.sym_size(0) && indices.scalar_type() == at::kLong &&
                  indices.device() == target.device(),
              name, ": expected int64 indices of size (2, ", target.sym_numel(), ") on the device of their values, ",
              "but got ", indices.scalar_type(), " of size ", indices.sym_sizes(), " on ", indices.device());
  check_storage(indices, "indices");
}

void check_linear_arguments(const LinearArguments& arguments) {
  check_logits_and_target(arguments);
  // The rest is for the loss to say, of logits and a target of these sizes.
  const Tensor& target = arguments.target;
  const c10::SymDimVector size = logits_size(arguments.input, arguments.linear_weight);
  const Tensor logits = at::empty({}, arguments.input.options()).expand_symint(size);
  const bool is_dense = !arguments.is_sparse() && !arguments.has_class_indices();
  check_arguments(arguments.of_loss(logits, is_dense ? target : at::empty({}, target.options()).expand_symint(size)));
}

void check_loss_and_grads(const LinearArguments& arguments, at::ScalarType dtype, const OptionalTensor& grad_output) {
  check_linear_arguments(arguments);
  check_loss_dtype(dtype);
  if (!is_defined(grad_output)) return;
  check_grad_output(*grad_output, arguments.of_loss(arguments.input, arguments.target));
  TORCH_CHECK(grad_output->dim() == 0, kLinearName, ": expected a grad_output of one number, but got size ",
              grad_output->sym_sizes());
}

void check_reduction(const LinearArguments& arguments, int64_t reduction) {
  check_reduction(arguments.of_loss(arguments.input, arguments.target), reduction);
}

at::ScalarType loss_dtype(const LinearArguments& arguments) {
  return loss_dtype(arguments.of_loss(arguments.input, arguments.target));
}

c10::SymInt divisor_of(const LinearArguments& arguments, int64_t reduction) {
  const bool counts = reduction == at::Reduction::Mean && !is_defined(arguments.normalizer);
  return counts ? arguments.num_rows() * arguments.num_labels() : c10::SymInt(1);
}

c10::SymBool are_better(const c10::SymInt& num_logits, const OptionalTensor& linear_weight, at::ScalarType dtype) {
  constexpr int64_t kFewestLogits = int64_t{1} << 22, kFewestOfHalf = int64_t{1} << 20;
  if (!is_defined(linear_weight)) return num_logits.sym_ge(kFewestLogits);
  constexpr int64_t kFewestBytes = int64_t{1} << 25;
  const c10::SymBool has_many = num_logits.sym_ge(dtype == at::kHalf ? kFewestOfHalf : kFewestLogits);
  return has_many.sym_or((linear_weight->sym_numel() * linear_weight->itemsize()).sym_ge(kFewestBytes));
}

Tensor dense_target(const LinearArguments& arguments) {
  const Tensor& target = arguments.target;
  const c10::SymInt num_labels = arguments.num_labels();
  if (arguments.has_class_indices()) return one_hot(target, num_labels);
  if (arguments.is_sparse()) {
    return dense_of({target, *arguments.indices}, arguments.num_rows(), num_labels, arguments.input.scalar_type());
  }
  return target;
}

Tensor logits_of(const LinearArguments& arguments) {
  if (!arguments.has_layer()) return arguments.input;
  return at::linear(arguments.input, *arguments.linear_weight, arguments.linear_bias);
}

Tensor sparse_with_logits(const Arguments& arguments, int64_t reduction) {
  return loss_of_rows(arguments.input, std::nullopt, std::nullopt, arguments.target, arguments.weight,
                      arguments.pos_weight, arguments.normalizer, arguments.options, reduction);
}

Tensor plain_loss(const LinearArguments& arguments, int64_t reduction, at::ScalarType dtype) {
  return bce(arguments.of_loss(logits_of(arguments), dense_target(arguments)), reduction, dtype);
}

Tensor linear_bce(const LinearArguments& arguments, int64_t reduction, std::optional<at::ScalarType> dtype) {
  static const auto op =
      find_operator<Signature<Tensor, int64_t, std::optional<at::ScalarType>>>("bce_ext::_linear_bce");
  return call(op, arguments, reduction, dtype);
}

LossAndGrads linear_bce_loss_and_grads(const LinearArguments& arguments, c10::SymInt divisor, at::ScalarType dtype,
                                       const OptionalTensor& grad_output, LinearMask output_mask) {
  static const auto op =
      find_operator<Signature<LossAndGrads, c10::SymInt, at::ScalarType, const OptionalTensor&, LinearMask>>(
          "bce_ext::_linear_bce_loss_and_grads");
  return call(op, arguments, std::move(divisor), dtype, grad_output, output_mask);
}

TORCH_LIBRARY_IMPL(bce_ext, CompositeImplicitAutograd, m) { m.impl(kLinearName, linear_with_logits); }
TORCH_LIBRARY_IMPL(bce_ext, CompositeExplicitAutograd, m) {
  m.impl("_linear_bce", LinearFlat<linear_below_autograd>::call);
}

namespace {

// vmap: batching the plain form is batching its operations.
Tensor linear_composite(const LinearArguments& arguments, int64_t reduction, std::optional<at::ScalarType> dtype) {
  check_linear_arguments(arguments);
  return plain_loss(arguments, reduction, dtype.value_or(loss_dtype(arguments)));
}

}  // namespace

TORCH_LIBRARY_IMPL(bce_ext, FuncTorchBatched, m) {
  m.impl(kLinearName, linear_with_logits);
  m.impl("_linear_bce", LinearFlat<linear_composite>::call);
}

}  // namespace bce_ext
