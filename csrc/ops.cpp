#include "ops.h"

#include <torch/library.h>

#include <cmath>
#include <limits>

#include "composite.h"
#include "find_operator.h"
#include "linear.h"
#include "sparse_target.h"

namespace bce_ext {

std::optional<double> ignore_index_of(at::ArrayRef<double> options) {
  if (options.size() < 2 || std::isnan(options[1])) return std::nullopt;
  return options[1];
}

double as_option(const std::optional<at::Scalar>& ignore_index) {
  if (!ignore_index) return std::numeric_limits<double>::quiet_NaN();
  const double number = ignore_index->toDouble();
  TORCH_CHECK_VALUE(!std::isnan(number), "bce_ext: expected ignore_index to be a number or None, but got nan");
  return number;
}

namespace {

// The C++ signature of an operator that takes Arguments and more.
template <typename R, typename... Rest>
using Signature = R(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                    int64_t, at::ArrayRef<double>, Rest...);

template <typename Operator, typename... Rest>
auto call(const Operator& op, const Arguments& arguments, Rest&&... rest) {
  return op.call(arguments.input, arguments.target, arguments.weight, arguments.pos_weight, arguments.normalizer,
                 arguments.formula, arguments.options, std::forward<Rest>(rest)...);
}

}  // namespace

at::ScalarType loss_dtype(const Arguments& arguments) {
  const auto input = arguments.input.scalar_type();
  const auto target = arguments.target.scalar_type();
  if (input == target || !is_arithmetic(target)) return input;
  return at::promoteTypes(input, target);
}

c10::SymInt divisor_of(const Arguments& arguments, int64_t reduction) {
  const bool counts = reduction == at::Reduction::Mean && !is_defined(arguments.normalizer);
  return counts ? arguments.input.sym_numel() : c10::SymInt(1);
}

bool has_kernel(const Tensor& input) { return input.is_cpu() || input.is_cuda() || input.is_meta(); }

bool kernel_counts_valid(const Arguments& arguments, int64_t reduction) {
  return reduction == at::Reduction::Mean && !is_defined(arguments.normalizer) && arguments.ignore_index() &&
         arguments.input.is_cpu() && is_plain(arguments.input) && is_plain(arguments.target) &&
         (!is_defined(arguments.weight) || is_plain(*arguments.weight)) &&
         (!is_defined(arguments.pos_weight) || is_plain(*arguments.pos_weight));
}

OptionalTensor normalizer_of(const Arguments& arguments, int64_t reduction) {
  if (reduction != at::Reduction::Mean || is_defined(arguments.normalizer)) return arguments.normalizer;
  const auto ignore_index = arguments.ignore_index();
  return ignore_index ? OptionalTensor(count_valid(arguments.target, *ignore_index)) : std::nullopt;
}

Tensor loss_without_grad(const Arguments& given, int64_t reduction, at::ScalarType dtype) {
  if (kernel_counts_valid(given, reduction)) return std::get<0>(bce_mean_of_valid(given, dtype, false));
  const OptionalTensor normalizer = normalizer_of(given, reduction);
  const Arguments arguments = given.with_normalizer(normalizer);
  if (!has_kernel(arguments.input)) return composite_loss(arguments, reduction, dtype);
  return bce_loss(arguments, reduction != at::Reduction::None, divisor_of(arguments, reduction), dtype);
}

Tensor bce(const Arguments& arguments, int64_t reduction, std::optional<at::ScalarType> dtype) {
  static const auto op = find_operator<Signature<Tensor, int64_t, std::optional<at::ScalarType>>>("bce_ext::_bce");
  return call(op, arguments, reduction, dtype);
}

Tensor bce_loss(const Arguments& arguments, bool reduce, c10::SymInt divisor, at::ScalarType dtype) {
  static const auto op = find_operator<Signature<Tensor, bool, c10::SymInt, at::ScalarType>>("bce_ext::_bce_loss");
  return call(op, arguments, reduce, std::move(divisor), dtype);
}

std::tuple<Tensor, Tensor> bce_loss_and_grad(const Arguments& arguments, c10::SymInt divisor, at::ScalarType dtype) {
  static const auto op =
      find_operator<Signature<std::tuple<Tensor, Tensor>, c10::SymInt, at::ScalarType>>("bce_ext::_bce_loss_and_grad");
  return call(op, arguments, std::move(divisor), dtype);
}

std::tuple<Tensor, Tensor> bce_backward(const Arguments& arguments, const Tensor& grad_output, c10::SymInt divisor,
                                        std::array<bool, 2> output_mask) {
  static const auto op =
      find_operator<Signature<std::tuple<Tensor, Tensor>, const Tensor&, c10::SymInt, std::array<bool, 2>>>(
          "bce_ext::_bce_backward");
  return call(op, arguments, grad_output, std::move(divisor), output_mask);
}

std::tuple<Tensor, Tensor> bce_mean_of_valid(const Arguments& arguments, at::ScalarType dtype, bool wants_gradient) {
  static const auto op =
      find_operator<Signature<std::tuple<Tensor, Tensor>, at::ScalarType, bool>>("bce_ext::_bce_mean_of_valid");
  return call(op, arguments, dtype, wants_gradient);
}

void scale_grad_(Tensor& grad, const Tensor& grad_output) {
  static const auto op = find_operator<void(Tensor&, const Tensor&)>("bce_ext::_scale_grad_");
  op.call(grad, grad_output);
}

Tensor count_valid(const Tensor& target, double ignore_index) {
  static const auto op = find_operator<Tensor(const Tensor&, double)>("bce_ext::_count_valid");
  return op.call(target, ignore_index);
}

// What the internal operators take first: Arguments.
#define BCE_EXT_ARGUMENTS \
  "Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, Tensor? normalizer, int formula, float[] options"

// What those of the linear layer and its loss take first: LinearArguments.
#define BCE_EXT_LINEAR_ARGUMENTS                                                                               \
  "Tensor input, Tensor? linear_weight, Tensor? linear_bias, Tensor target, Tensor? indices, Tensor? weight, " \
  "Tensor? pos_weight, Tensor? normalizer, float[] options"

// What the overloads `options` of the public operators take beyond the arguments of aten.
#define BCE_EXT_OPTIONS "float label_smoothing=0.0, Scalar? ignore_index=None, Tensor? normalizer=None"

TORCH_LIBRARY(bce_ext, m) {
  // The public operators: the schemas of aten, so that a caller changes the namespace only; and with options.
  m.def(
      "binary_cross_entropy_with_logits(Tensor input, Tensor target, Tensor? weight=None, Tensor? pos_weight=None, int "
      "reduction=1) -> Tensor");
  m.def(
      "binary_cross_entropy_with_logits.options(Tensor input, Tensor target, Tensor? weight=None, Tensor? "
      "pos_weight=None, int reduction=1, *, " BCE_EXT_OPTIONS ") -> Tensor");
  m.def("binary_cross_entropy(Tensor input, Tensor target, Tensor? weight=None, int reduction=1) -> Tensor");
  m.def(
      "binary_cross_entropy.options(Tensor input, Tensor target, Tensor? weight=None, int reduction=1, "
      "*, " BCE_EXT_OPTIONS ") -> Tensor");
  m.def(
      "sigmoid_focal_loss(Tensor inputs, Tensor targets, float alpha=0.25, float gamma=2.0, int reduction=0, *, "
      "Tensor? "
      "weight=None, Tensor? pos_weight=None, " BCE_EXT_OPTIONS ") -> Tensor");
  m.def(
      "asymmetric_loss(Tensor input, Tensor target, float gamma_neg=4.0, float gamma_pos=1.0, float clip=0.05, int "
      "reduction=1, *, Tensor? weight=None, Tensor? pos_weight=None, " BCE_EXT_OPTIONS
      ", bool detach_focusing=False, float eps=1e-08) -> Tensor");

  // Every loss, with its derivatives, under autocast and transforms. dtype is that of the loss; None stands for that of
  // input and target promoted, under autocast float32 at least.
  m.def("_bce(" BCE_EXT_ARGUMENTS ", int reduction, ScalarType? dtype=None) -> Tensor");

  // The kernels. The losses are summed when `reduce`; sums and gradients are divided by `divisor` and by `normalizer`:
  // the operators are linear in shards of a batch.
  m.def("_bce_loss(" BCE_EXT_ARGUMENTS ", bool reduce, SymInt divisor, ScalarType dtype) -> Tensor");
  m.def("_bce_loss_and_grad(" BCE_EXT_ARGUMENTS
        ", SymInt divisor, ScalarType dtype) -> (Tensor loss, Tensor grad_input)");
  // A gradient that output_mask does not ask for is an empty tensor.
  m.def("_bce_backward(" BCE_EXT_ARGUMENTS
        ", Tensor grad_output, SymInt divisor, bool[2] output_mask) -> (Tensor grad_input, Tensor grad_target)");
  // The mean over the elements that are not ignored, whose number is then no tensor. On the CPU, where the count leaves
  // the pass less to read. A gradient that is not wanted is an empty tensor.
  m.def("_bce_mean_of_valid(" BCE_EXT_ARGUMENTS
        ", ScalarType dtype, bool wants_gradient) -> (Tensor loss, Tensor grad_input)");
  // grad *= grad_output, one number, and nothing at all when that is 1.
  m.def("_scale_grad_(Tensor(a!) grad, Tensor grad_output) -> ()");
  // The number of elements that do not equal ignore_index, in float64.
  m.def("_count_valid(Tensor target, float ignore_index) -> Tensor");

  // The linear layer and its loss. target: dense, class indices or, sparse, a tensor of the same size.
  m.def(
      "linear_binary_cross_entropy_with_logits(Tensor input, Tensor? linear_weight, Tensor target, *, Tensor? "
      "linear_bias=None, Tensor? weight=None, Tensor? pos_weight=None, int reduction=1, " BCE_EXT_OPTIONS
      ") -> Tensor");
  m.def("_linear_bce(" BCE_EXT_LINEAR_ARGUMENTS ", int reduction, ScalarType? dtype=None) -> Tensor");
  // Without the logits. The gradients are multiplied by grad_output, if it is given, and divided as those of
  // _bce_loss_and_grad. One that output_mask does not ask for is an empty tensor.
  m.def("_linear_bce_loss_and_grads(" BCE_EXT_LINEAR_ARGUMENTS
        ", SymInt divisor, ScalarType dtype, Tensor? grad_output, bool[3] output_mask) -> (Tensor loss, Tensor "
        "grad_input, Tensor grad_weight, Tensor grad_bias)");
}

#undef BCE_EXT_LINEAR_ARGUMENTS
#undef BCE_EXT_ARGUMENTS
#undef BCE_EXT_OPTIONS

namespace {

using OptionalNumber = std::optional<at::Scalar>;

Tensor with_logits(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                   const OptionalTensor& pos_weight, int64_t reduction) {
  constexpr auto kFormula = static_cast<int64_t>(Formula::WithLogits);
  const Arguments arguments{input, target, weight, pos_weight, std::nullopt, kFormula, {}};
  return is_sparse(target) ? sparse_with_logits(arguments, reduction) : bce(arguments, reduction);
}

Tensor with_logits_options(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                           const OptionalTensor& pos_weight, int64_t reduction, double label_smoothing,
                           const OptionalNumber& ignore_index, const OptionalTensor& normalizer) {
  constexpr auto kFormula = static_cast<int64_t>(Formula::WithLogits);
  const std::array<double, 2> options{label_smoothing, as_option(ignore_index)};
  const Arguments arguments{input, target, weight, pos_weight, normalizer, kFormula, options};
  return is_sparse(target) ? sparse_with_logits(arguments, reduction) : bce(arguments, reduction);
}

Tensor probabilities(const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction) {
  constexpr auto kFormula = static_cast<int64_t>(Formula::Probabilities);
  return bce({input, target, weight, std::nullopt, std::nullopt, kFormula, {}}, reduction);
}

Tensor probabilities_options(const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                             double label_smoothing, const OptionalNumber& ignore_index,
                             const OptionalTensor& normalizer) {
  constexpr auto kFormula = static_cast<int64_t>(Formula::Probabilities);
  const std::array<double, 2> options{label_smoothing, as_option(ignore_index)};
  return bce({input, target, weight, std::nullopt, normalizer, kFormula, options}, reduction);
}

Tensor focal(const Tensor& inputs, const Tensor& targets, double alpha, double gamma, int64_t reduction,
             const OptionalTensor& weight, const OptionalTensor& pos_weight, double label_smoothing,
             const OptionalNumber& ignore_index, const OptionalTensor& normalizer) {
  constexpr auto kFormula = static_cast<int64_t>(Formula::Focal);
  const std::array<double, 4> options{label_smoothing, as_option(ignore_index), alpha, gamma};
  return bce({inputs, targets, weight, pos_weight, normalizer, kFormula, options}, reduction);
}

Tensor asymmetric(const Tensor& input, const Tensor& target, double gamma_neg, double gamma_pos, double clip,
                  int64_t reduction, const OptionalTensor& weight, const OptionalTensor& pos_weight,
                  double label_smoothing, const OptionalNumber& ignore_index, const OptionalTensor& normalizer,
                  bool detach_focusing, double eps) {
  constexpr auto kFormula = static_cast<int64_t>(Formula::Asymmetric);
  const std::array<double, 7> options{label_smoothing,        as_option(ignore_index), gamma_neg, gamma_pos, clip, eps,
                                      double(detach_focusing)};
  return bce({input, target, weight, pos_weight, normalizer, kFormula, options}, reduction);
}

void register_public(torch::Library& m) {
  m.impl("binary_cross_entropy_with_logits", with_logits);
  m.impl("binary_cross_entropy_with_logits.options", with_logits_options);
  m.impl("binary_cross_entropy", probabilities);
  m.impl("binary_cross_entropy.options", probabilities_options);
  m.impl("sigmoid_focal_loss", focal);
  m.impl("asymmetric_loss", asymmetric);
}

Tensor bce_below_autograd(const Arguments& arguments, int64_t reduction, std::optional<at::ScalarType> dtype) {
  check_arguments(arguments);
  check_reduction(arguments, reduction);
  return loss_without_grad(arguments, reduction, dtype.value_or(loss_dtype(arguments)));
}

}  // namespace

// The public operators are made of one internal operator on every device and under every transform: autocast,
// derivatives and vmap are its business.
TORCH_LIBRARY_IMPL(bce_ext, CompositeImplicitAutograd, m) { register_public(m); }
TORCH_LIBRARY_IMPL(bce_ext, FuncTorchBatched, m) { register_public(m); }

// Below autograd, as in inference mode. On every device: loss_without_grad chooses between the kernels and the
// composite formula.
TORCH_LIBRARY_IMPL(bce_ext, CompositeExplicitAutograd, m) { m.impl("_bce", Flat<bce_below_autograd>::call); }

}  // namespace bce_ext
