#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "composite.h"

namespace bce_ext {
namespace {

const char* name_of(const Arguments& arguments) {
  return arguments.with_logits ? "binary_cross_entropy_with_logits" : "binary_cross_entropy";
}

// The floating types that PyTorch computes in. The 8-bit ones are for storage: good for targets and weights, not for
// logits.
bool is_arithmetic(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
}

bool broadcasts_to(c10::SymIntArrayRef from, c10::SymIntArrayRef to) {
  if (from.size() > to.size()) return false;
  const size_t offset = to.size() - from.size();
  for (size_t d = 0; d < from.size(); ++d) {
    if (from[d] != 1 && from[d] != to[offset + d]) return false;
  }
  return true;
}

void check_weight(const Arguments& arguments, const OptionalTensor& weight, const char* what) {
  if (!is_defined(weight)) return;
  const Tensor& input = arguments.input;
  // A 0-d tensor on the CPU goes with any device, as in all of PyTorch.
  TORCH_CHECK(weight->device() == input.device() || (weight->dim() == 0 && weight->is_cpu()), name_of(arguments),
              ": expected ", what, " on the device of input (", input.device(), "), but got ", weight->device());
  TORCH_CHECK(!weight->is_complex(), name_of(arguments), ": expected a real ", what, ", but got ",
              weight->scalar_type());
  TORCH_CHECK(weight->layout() == at::kStrided, name_of(arguments), ": expected a strided ", what, ", but got ",
              weight->layout());
  TORCH_CHECK(broadcasts_to(weight->sym_sizes(), input.sym_sizes()), name_of(arguments), ": expected ", what,
              " to broadcast to the size of input (", input.sym_sizes(), "), but got size ", weight->sym_sizes());
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

template <typename Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

void check_reduction(int64_t reduction) {
  TORCH_CHECK_VALUE(reduction >= at::Reduction::None && reduction < at::Reduction::END, reduction,
                    " is not a valid value for reduction: expected 0 (none), 1 (mean) or 2 (sum)");
}

void check_arguments(const Arguments& arguments) {
  const Tensor& input = arguments.input;
  const Tensor& target = arguments.target;
  TORCH_CHECK_NOT_IMPLEMENTED(
      is_arithmetic(input.scalar_type()), name_of(arguments),
      ": expected input of a real floating dtype (float64, float32, bfloat16 or float16), but got ",
      input.scalar_type());
  TORCH_CHECK_NOT_IMPLEMENTED(input.layout() == at::kStrided, name_of(arguments),
                              ": expected a strided input, but got ", input.layout());
  TORCH_CHECK(target.layout() == at::kStrided, name_of(arguments), ": expected a strided target, but got ",
              target.layout());
  TORCH_CHECK(!target.is_complex(), name_of(arguments), ": expected a real target, but got ", target.scalar_type());
  TORCH_CHECK(target.device() == input.device(), name_of(arguments), ": expected target on the device of input (",
              input.device(), "), but got ", target.device());
  TORCH_CHECK_VALUE(target.sym_sizes() == input.sym_sizes(), name_of(arguments), ": Target size (", target.sym_sizes(),
                    ") must be the same as input size (", input.sym_sizes(), ")", hint_for_sizes(arguments));
  check_weight(arguments, arguments.weight, "weight");
  check_weight(arguments, arguments.pos_weight, "pos_weight");
}

at::ScalarType loss_dtype(const Arguments& arguments) {
  const auto input = arguments.input.scalar_type();
  const auto target = arguments.target.scalar_type();
  if (input == target || !is_arithmetic(target)) return input;
  return at::promoteTypes(input, target);
}

c10::SymInt divisor_of(const Tensor& input, int64_t reduction) {
  return reduction == at::Reduction::Mean ? input.sym_numel() : c10::SymInt(1);
}

bool has_kernel(const Tensor& input) { return input.is_cpu() || input.is_cuda() || input.is_meta(); }

Tensor loss_without_grad(const Arguments& arguments, int64_t reduction, at::ScalarType dtype) {
  if (!has_kernel(arguments.input)) return composite_loss(arguments, reduction, dtype);
  return bce_loss(arguments, reduction != at::Reduction::None, divisor_of(arguments.input, reduction), dtype);
}

Tensor bce_loss(const Arguments& arguments, bool reduce, c10::SymInt divisor, at::ScalarType dtype) {
  static const auto op =
      find_operator<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, bool, bool,
                           c10::SymInt, at::ScalarType)>("bce_ext::_bce_loss");
  return op.call(arguments.input, arguments.target, arguments.weight, arguments.pos_weight, arguments.with_logits,
                 reduce, std::move(divisor), dtype);
}

std::tuple<Tensor, Tensor> bce_loss_and_grad(const Arguments& arguments, c10::SymInt divisor, at::ScalarType dtype) {
  static const auto op = find_operator<std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, bool, c10::SymInt, at::ScalarType)>(
      "bce_ext::_bce_loss_and_grad");
  return op.call(arguments.input, arguments.target, arguments.weight, arguments.pos_weight, arguments.with_logits,
                 std::move(divisor), dtype);
}

std::tuple<Tensor, Tensor> bce_backward(const Tensor& grad_output, const Arguments& arguments, c10::SymInt divisor,
                                        std::array<bool, 2> output_mask) {
  static const auto op =
      find_operator<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                               const OptionalTensor&, bool, c10::SymInt, std::array<bool, 2>)>(
          "bce_ext::_bce_backward");
  return op.call(grad_output, arguments.input, arguments.target, arguments.weight, arguments.pos_weight,
                 arguments.with_logits, std::move(divisor), output_mask);
}

void scale_grad_(Tensor& grad, const Tensor& grad_output) {
  static const auto op = find_operator<void(Tensor&, const Tensor&)>("bce_ext::_scale_grad_");
  op.call(grad, grad_output);
}

TORCH_LIBRARY(bce_ext, m) {
  // The public operators: the schemas of aten, so that a caller changes the namespace only.
  m.def(
      "binary_cross_entropy_with_logits(Tensor input, Tensor target, Tensor? weight=None, Tensor? pos_weight=None, int "
      "reduction=1) -> Tensor");
  m.def("binary_cross_entropy(Tensor input, Tensor target, Tensor? weight=None, int reduction=1) -> Tensor");

  // Both of them, with the dtype of the loss given by the caller: what autocast calls to have a float32 loss of half
  // precision logits.
  m.def(
      "_bce(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, bool with_logits, int reduction, "
      "ScalarType dtype) -> Tensor");

  // The kernels. The losses are summed when `reduce`; sums and gradients are divided by `divisor`: the operators are
  // linear in shards of a batch.
  m.def(
      "_bce_loss(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, bool with_logits, bool reduce, "
      "SymInt divisor, ScalarType dtype) "
      "-> Tensor");
  m.def(
      "_bce_loss_and_grad(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, bool with_logits, SymInt "
      "divisor, ScalarType dtype) -> "
      "(Tensor loss, Tensor grad_input)");
  // A gradient that output_mask does not ask for is an empty tensor.
  m.def(
      "_bce_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, bool "
      "with_logits, SymInt divisor, bool[2] "
      "output_mask) -> (Tensor grad_input, Tensor grad_target)");
  // grad *= grad_output, and nothing at all when grad_output is 1.
  m.def("_scale_grad_(Tensor(a!) grad, Tensor grad_output) -> ()");
}

namespace {

Tensor with_logits(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                   const OptionalTensor& pos_weight, int64_t reduction) {
  const Arguments arguments{input, target, weight, pos_weight, /*with_logits=*/true};
  check_arguments(arguments);
  check_reduction(reduction);
  return loss_without_grad(arguments, reduction, loss_dtype(arguments));
}

Tensor probabilities(const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction) {
  const Arguments arguments{input, target, weight, std::nullopt, /*with_logits=*/false};
  check_arguments(arguments);
  check_reduction(reduction);
  return loss_without_grad(arguments, reduction, loss_dtype(arguments));
}

Tensor either(const Tensor& input, const Tensor& target, const OptionalTensor& weight, const OptionalTensor& pos_weight,
              bool with_logits, int64_t reduction, at::ScalarType dtype) {
  return loss_without_grad({input, target, weight, pos_weight, with_logits}, reduction, dtype);
}

}  // namespace

// Below autograd, as in inference mode. On every device: loss_without_grad chooses between the kernels and the
// composite formula.
TORCH_LIBRARY_IMPL(bce_ext, CompositeExplicitAutograd, m) {
  m.impl("binary_cross_entropy_with_logits", with_logits);
  m.impl("binary_cross_entropy", probabilities);
  m.impl("_bce", either);
}

}  // namespace bce_ext
