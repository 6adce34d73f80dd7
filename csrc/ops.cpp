#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/irange.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "composite.h"
#include "linear.h"

namespace bce_ext {

std::optional<double> Arguments::ignore_index() const {
  if (options.size() < 2 || std::isnan(options[1])) return std::nullopt;
  return options[1];
}

namespace {

// Whether the tensor holds memory itself: no subclass, no wrapper of a transform.
bool holds_memory(const Tensor& tensor) {
  constexpr c10::DispatchKeySet wrapped({c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                         c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched,
                                         c10::DispatchKey::FuncTorchGradWrapper});
  return !tensor.key_set().has_any(wrapped) && tensor.layout() == at::kStrided;
}

}  // namespace

bool is_plain(const Tensor& tensor) {
  return holds_memory(tensor) && !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

bool is_hard_label(at::ScalarType target_dtype) { return at::isIntegralType(target_dtype, /*includeBool=*/true); }

bool is_arithmetic(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
}

const char* name_of(Formula formula) {
  switch (formula) {
    case Formula::WithLogits:
      return "binary_cross_entropy_with_logits";
    case Formula::Probabilities:
      return "binary_cross_entropy";
    case Formula::Focal:
      return "sigmoid_focal_loss";
    case Formula::Asymmetric:
      return "asymmetric_loss";
  }
  return "bce_ext";
}

namespace {

bool broadcasts_to(c10::SymIntArrayRef from, c10::SymIntArrayRef to) {
  if (from.size() > to.size()) return false;
  const size_t offset = to.size() - from.size();
  for (const auto d : c10::irange(from.size())) {
    if (from[d] != 1 && from[d] != to[offset + d]) return false;
  }
  return true;
}

// A real, strided tensor on the device of the input, or a number on the CPU, which goes with any device as in all of
// PyTorch; and one that broadcasts to the input.
void check_operand(const Arguments& arguments, const Tensor& operand, const char* what) {
  const Tensor& input = arguments.input;
  TORCH_CHECK(operand.device() == input.device() || (operand.dim() == 0 && operand.is_cpu()), name_of(arguments),
              ": expected ", what, " on the device of input (", input.device(), "), but got ", operand.device());
  TORCH_CHECK(at::isFloatingType(operand.scalar_type()) || is_hard_label(operand.scalar_type()), name_of(arguments),
              ": expected a real ", what, ", but got ", operand.scalar_type());
  TORCH_CHECK(operand.layout() == at::kStrided, name_of(arguments), ": expected a strided ", what, ", but got ",
              operand.layout());
  TORCH_CHECK(broadcasts_to(operand.sym_sizes(), input.sym_sizes()), name_of(arguments), ": expected ", what,
              " to broadcast to the size of input (", input.sym_sizes(), "), but got size ", operand.sym_sizes());
  check_storage(operand, what);
}

void check_operand(const Arguments& arguments, const OptionalTensor& operand, const char* what) {
  if (is_defined(operand)) check_operand(arguments, *operand, what);
}

// (N, 1) logits beside (N,) targets is the most frequent mistake: broadcasting them would give an N x N loss.
std::string hint_for_sizes(const Arguments& arguments) {
  const Tensor& input = arguments.input;
  const Tensor& target = arguments.target;
  if (input.sym_numel() != target.sym_numel()) return "";
  if (input.dim() == target.dim() + 1)
    return "; the number of elements agrees: use target.unsqueeze(dim) or input.squeeze(dim)";
  if (target.dim() == input.dim() + 1)
    return "; the number of elements agrees: use target.squeeze(dim) or input.unsqueeze(dim)";
  return "; the number of elements agrees: use target.view_as(input) if their order does too";
}

// In the words of native, which programs look for.
void check_sizes(const Arguments& arguments) {
  const auto size = arguments.input.sym_sizes();
  const auto target_size = arguments.target.sym_sizes();
  if (arguments.takes_probabilities()) {
    TORCH_CHECK_VALUE(target_size == size, name_of(arguments), ": Using a target size (torch.Size(", target_size,
                      ")) that is different to the input size (torch.Size(", size,
                      ")) is deprecated. Please ensure they have the same size.", hint_for_sizes(arguments));
  } else {
    TORCH_CHECK_VALUE(target_size == size, name_of(arguments), ": Target size (", target_size,
                      ") must be the same as input size (", size, ")", hint_for_sizes(arguments));
  }
}

// The number of parameters that a formula takes.
size_t num_parameters(Formula formula) {
  switch (formula) {
    case Formula::WithLogits:
    case Formula::Probabilities:
      return 0;
    case Formula::Focal:
      return 2;
    case Formula::Asymmetric:
      return 5;
  }
  return 0;
}

void check_not_negative(const Arguments& arguments, const char* what, double value) {
  TORCH_CHECK_VALUE(value >= 0.0 && std::isfinite(value), name_of(arguments), ": expected ", what,
                    " to be at least 0, but got ", value);
}

void check_parameters(const Arguments& arguments) {
  if (arguments.kind() == Formula::Focal) {
    const double alpha = arguments.parameter(0);
    TORCH_CHECK_VALUE((alpha >= 0.0 && alpha <= 1.0) || alpha == -1.0, name_of(arguments),
                      ": Invalid alpha value: ", alpha, ". alpha must be in the range [0,1] or -1 for ignore.");
    check_not_negative(arguments, "gamma", arguments.parameter(1));
  } else if (arguments.kind() == Formula::Asymmetric) {
    check_not_negative(arguments, "gamma_neg", arguments.parameter(0));
    check_not_negative(arguments, "gamma_pos", arguments.parameter(1));
    TORCH_CHECK_VALUE(arguments.parameter(2) >= 0.0 && arguments.parameter(2) < 1.0, name_of(arguments),
                      ": expected clip to be at least 0 and less than 1, but got ", arguments.parameter(2));
    TORCH_CHECK_VALUE(arguments.parameter(3) > 0.0 && arguments.parameter(3) < 1.0, name_of(arguments),
                      ": expected eps between 0 and 1, but got ", arguments.parameter(3));
  }
}

void check_options(const Arguments& arguments) {
  TORCH_CHECK_VALUE(arguments.formula >= 0 && arguments.formula < kFormulas, "bce_ext: expected a formula from 0 to ",
                    kFormulas - 1, ", but got ", arguments.formula);
  const size_t parameters = num_parameters(arguments.kind());
  const size_t expected = Arguments::kParameters + parameters;
  TORCH_CHECK_VALUE(arguments.options.size() == expected || (parameters == 0 && arguments.options.empty()),
                    name_of(arguments), ": expected ", expected, " options, but got ", arguments.options.size());
  const double smoothing = arguments.label_smoothing();
  TORCH_CHECK_VALUE(smoothing >= 0.0 && smoothing <= 1.0, name_of(arguments),
                    ": expected label_smoothing between 0 and 1, but got ", smoothing);
  check_parameters(arguments);
}

template <typename Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

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

void check_storage(const Tensor& tensor, const char* name) {
  // What is no memory of its own has nothing to check: a subclass, a meta tensor, a transform's wrapper. The operations
  // of ATen that these end in read memory as they do for native.
  if (!(tensor.is_cpu() || tensor.is_cuda()) || !holds_memory(tensor) || !tensor.has_storage() || tensor.numel() == 0) {
    return;
  }
  int64_t last = tensor.storage_offset();
  for (const auto d : c10::irange(tensor.dim())) last += (tensor.size(d) - 1) * tensor.stride(d);
  const auto needed = (last + 1) * static_cast<int64_t>(tensor.itemsize());
  const auto& storage = tensor.storage();
  TORCH_CHECK(static_cast<int64_t>(storage.nbytes()) >= needed && storage.data() != nullptr, "expected the memory of ",
              name, " to hold the ", needed, " bytes that its size and strides need, but its storage has ",
              storage.nbytes());
}

void check_reduction(const Arguments& arguments, int64_t reduction) {
  TORCH_CHECK_VALUE(reduction >= at::Reduction::None && reduction < at::Reduction::END, reduction,
                    " is not a valid value for reduction: expected 0 (none), 1 (mean) or 2 (sum)");
  TORCH_CHECK_VALUE(reduction == at::Reduction::Mean || !is_defined(arguments.normalizer), name_of(arguments),
                    ": expected reduction 'mean' beside a normalizer, but got '",
                    reduction == at::Reduction::None ? "none" : "sum", "'");
}

void check_loss_dtype(at::ScalarType dtype) {
  TORCH_CHECK(is_arithmetic(dtype), "expected a loss of float64, float32, bfloat16 or float16, but got ", dtype);
}

void check_count(const Tensor& target, double ignore_index) {
  TORCH_CHECK(at::isFloatingType(target.scalar_type()) || is_hard_label(target.scalar_type()),
              "_count_valid: expected a real target, but got ", target.scalar_type());
  TORCH_CHECK(target.layout() == at::kStrided, "_count_valid: expected a strided target, but got ", target.layout());
  TORCH_CHECK_VALUE(!std::isnan(ignore_index), "_count_valid: expected ignore_index to be a number, but got nan");
  check_storage(target, "target");
}

void check_arguments(const Arguments& arguments) {
  check_options(arguments);
  const Tensor& input = arguments.input;
  const Tensor& target = arguments.target;
  TORCH_CHECK(input.defined() && target.defined(), name_of(arguments), ": expected ",
              input.defined() ? "target" : "input", " to be a Tensor, but got None");
  TORCH_CHECK_NOT_IMPLEMENTED(
      is_arithmetic(input.scalar_type()), name_of(arguments),
      ": expected input of a real floating dtype (float64, float32, bfloat16 or float16), but got ",
      input.scalar_type());
  TORCH_CHECK_NOT_IMPLEMENTED(input.layout() == at::kStrided, name_of(arguments),
                              ": expected a strided input, but got ", input.layout());
  check_sizes(arguments);
  check_operand(arguments, target, "target");
  TORCH_CHECK(target.device() == input.device(), name_of(arguments), ": expected target on the device of input (",
              input.device(), "), but got ", target.device());
  check_storage(input, "input");
  check_operand(arguments, arguments.weight, "weight");
  check_operand(arguments, arguments.pos_weight, "pos_weight");
  TORCH_CHECK(!(arguments.takes_probabilities() && is_defined(arguments.pos_weight)), name_of(arguments),
              ": expected no pos_weight beside probabilities");
  if (is_defined(arguments.normalizer)) {
    check_operand(arguments, *arguments.normalizer, "normalizer");
    TORCH_CHECK_VALUE(arguments.normalizer->dim() == 0, name_of(arguments),
                      ": expected a normalizer of one number, but got size ", arguments.normalizer->sym_sizes());
  }
}

void check_grad_output(const Tensor& grad_output, const Arguments& arguments) {
  TORCH_CHECK(is_arithmetic(grad_output.scalar_type()), name_of(arguments),
              ": expected grad_output of float64, float32, bfloat16 or float16, but got ", grad_output.scalar_type());
  check_operand(arguments, grad_output, "grad_output");
}

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

OptionalTensor normalizer_of(const Arguments& arguments, int64_t reduction) {
  if (reduction != at::Reduction::Mean || is_defined(arguments.normalizer)) return arguments.normalizer;
  const auto ignore_index = arguments.ignore_index();
  return ignore_index ? OptionalTensor(count_valid(arguments.target, *ignore_index)) : std::nullopt;
}

Tensor loss_without_grad(const Arguments& arguments, int64_t reduction, at::ScalarType dtype) {
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

  // All of them: the loss with its derivatives, under autocast and under transforms. dtype: of the loss; None: that of
  // input and target promoted, and float32 at least under autocast.
  m.def("_bce(" BCE_EXT_ARGUMENTS ", int reduction, ScalarType? dtype=None) -> Tensor");

  // The kernels. The losses are summed when `reduce`; sums and gradients are divided by `divisor` and by `normalizer`:
  // the operators are linear in shards of a batch.
  m.def("_bce_loss(" BCE_EXT_ARGUMENTS ", bool reduce, SymInt divisor, ScalarType dtype) -> Tensor");
  m.def("_bce_loss_and_grad(" BCE_EXT_ARGUMENTS
        ", SymInt divisor, ScalarType dtype) -> (Tensor loss, Tensor grad_input)");
  // A gradient that output_mask does not ask for is an empty tensor.
  m.def("_bce_backward(" BCE_EXT_ARGUMENTS
        ", Tensor grad_output, SymInt divisor, bool[2] output_mask) -> (Tensor grad_input, Tensor grad_target)");
  // grad *= grad_output, one number, and nothing at all when that is 1.
  m.def("_scale_grad_(Tensor(a!) grad, Tensor grad_output) -> ()");
  // The number of elements that do not equal ignore_index, in float64.
  m.def("_count_valid(Tensor target, float ignore_index) -> Tensor");

  // The linear layer and its loss. target: dense, class indices or, sparse, a tensor of the same size.
  m.def(
      "linear_binary_cross_entropy_with_logits(Tensor input, Tensor linear_weight, Tensor target, *, Tensor? "
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

double number_or_nan(const OptionalNumber& number) {
  return number.has_value() ? number->toDouble() : std::numeric_limits<double>::quiet_NaN();
}

bool is_sparse(const Tensor& target) {
  return target.defined() && (target.layout() == at::kSparse || target.layout() == at::kSparseCsr);
}

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
  const std::array<double, 2> options{label_smoothing, number_or_nan(ignore_index)};
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
  const std::array<double, 2> options{label_smoothing, number_or_nan(ignore_index)};
  return bce({input, target, weight, std::nullopt, normalizer, kFormula, options}, reduction);
}

Tensor focal(const Tensor& inputs, const Tensor& targets, double alpha, double gamma, int64_t reduction,
             const OptionalTensor& weight, const OptionalTensor& pos_weight, double label_smoothing,
             const OptionalNumber& ignore_index, const OptionalTensor& normalizer) {
  constexpr auto kFormula = static_cast<int64_t>(Formula::Focal);
  const std::array<double, 4> options{label_smoothing, number_or_nan(ignore_index), alpha, gamma};
  return bce({inputs, targets, weight, pos_weight, normalizer, kFormula, options}, reduction);
}

Tensor asymmetric(const Tensor& input, const Tensor& target, double gamma_neg, double gamma_pos, double clip,
                  int64_t reduction, const OptionalTensor& weight, const OptionalTensor& pos_weight,
                  double label_smoothing, const OptionalNumber& ignore_index, const OptionalTensor& normalizer,
                  bool detach_focusing, double eps) {
  constexpr auto kFormula = static_cast<int64_t>(Formula::Asymmetric);
  const std::array<double, 7> options{
      label_smoothing, number_or_nan(ignore_index), gamma_neg, gamma_pos, clip, eps, double(detach_focusing)};
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
  const OptionalTensor normalizer = normalizer_of(arguments, reduction);
  return loss_without_grad(arguments.with_normalizer(normalizer), reduction, dtype.value_or(loss_dtype(arguments)));
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
