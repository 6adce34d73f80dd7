// The checks of the arguments that the operators share.
#include <ATen/Functions.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/irange.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <cmath>

#include "ops.h"

namespace bce_ext {

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
  return holds_memory(tensor) && !c10::impl::TorchDispatchModeTLS::any_modes_set() && !is_recorded();
}

bool is_recorded() {
  return torch::jit::tracer::isTracing() || c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::PreDispatch);
}

bool is_label_type(at::ScalarType type) { return at::isIntegralType(type, /*includeBool=*/true); }

bool is_real(at::ScalarType type) { return at::isFloatingType(type) || is_label_type(type); }

bool is_rounded_label(double number, at::ScalarType target_dtype) {
  constexpr double kFirstGap = 1 << 24;
  return is_label_type(target_dtype) && std::abs(number) >= kFirstGap;
}

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
    // Equality goes first: where sizes depend on data, a compiler may know that two are equal, but not whether one
    // is 1.
    const c10::SymInt& size = to[offset + d];
    if (!TORCH_GUARD_OR_FALSE(from[d].sym_eq(size)) && from[d] != 1 && from[d] != size) return false;
  }
  return true;
}

// A real, strided tensor on the device of the input, or a number on the CPU, which goes with any device as in all of
// PyTorch; and one that broadcasts to the input.
void check_operand(const Arguments& arguments, const Tensor& operand, const char* what) {
  const Tensor& input = arguments.input;
  TORCH_CHECK(operand.device() == input.device() || (operand.dim() == 0 && operand.is_cpu()), name_of(arguments),
              ": expected ", what, " on the device of input (", input.device(), "), but got ", operand.device());
  TORCH_CHECK(is_real(operand.scalar_type()), name_of(arguments), ": expected a real ", what, ", but got ",
              operand.scalar_type());
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
                    " to be finite and at least 0, but got ", value);
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
                      ": expected eps above 0 and below 1, but got ", arguments.parameter(3));
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

}  // namespace

void check_storage(const Tensor& tensor, const char* name) {
  // What is no memory of its own has nothing to check: a subclass, a meta tensor, a transform's wrapper, a tensor of
  // zeros that stands for one of forward-mode AD. The operations of ATen that these end in read memory as they do for
  // native.
  if (!(tensor.is_cpu() || tensor.is_cuda()) || !holds_memory(tensor) || tensor._is_zerotensor() ||
      !tensor.has_storage() || tensor.numel() == 0) {
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

void refuse_element(Formula formula, const std::optional<double>& ignored, bool is_target, double number) {
  // All places of an integer, which may differ from ignore_index in the last one.
  const auto text = [](double value) {
    const bool is_integer = value == std::trunc(value) && std::abs(value) < 0x1p63;
    return is_integer ? std::to_string(static_cast<int64_t>(value)) : c10::str(value);
  };
  const std::string value = text(number);
  if (formula == Formula::Probabilities) {
    TORCH_CHECK(false, name_of(formula), ": all elements of ", is_target ? "target" : "input",
                " should be between 0 and 1, but one is ", value);
  }
  if (ignored) {
    TORCH_CHECK(false, name_of(formula), ": expected bool and integer targets to be 0, 1 or ignore_index (",
                text(*ignored), "), but one is ", value);
  }
  TORCH_CHECK(false, name_of(formula), ": expected bool and integer targets to be 0 or 1, but one is ", value,
              "; floating targets may have any value");
}

void check_reduction(const Arguments& arguments, int64_t reduction) {
  TORCH_CHECK_VALUE(reduction >= at::Reduction::None && reduction < at::Reduction::END, reduction,
                    " is not a valid value for reduction: expected 0 (none), 1 (mean) or 2 (sum)");
  TORCH_CHECK_VALUE(reduction == at::Reduction::Mean || !is_defined(arguments.normalizer), name_of(arguments),
                    ": expected reduction 'mean' with a normalizer, but got '",
                    reduction == at::Reduction::None ? "none" : "sum", "'");
}

void check_loss_dtype(at::ScalarType dtype) {
  TORCH_CHECK(is_arithmetic(dtype), "expected a loss of float64, float32, bfloat16 or float16, but got ", dtype);
}

void check_count(const Tensor& target, double ignore_index) {
  TORCH_CHECK(is_real(target.scalar_type()), "_count_valid: expected a real target, but got ", target.scalar_type());
  TORCH_CHECK(target.layout() == at::kStrided, "_count_valid: expected a strided target, but got ", target.layout());
  TORCH_CHECK_VALUE(!std::isnan(ignore_index), "_count_valid: expected ignore_index to be a number, but got nan");
  check_storage(target, "target");
}

void check_mean_of_valid(const Arguments& arguments) {
  TORCH_CHECK_VALUE(arguments.ignore_index() && !is_defined(arguments.normalizer),
                    "_bce_mean_of_valid: expected an ignore_index and no normalizer");
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
              ": expected no pos_weight with probabilities");
  if (is_defined(arguments.normalizer)) {
    TORCH_CHECK_VALUE(arguments.normalizer->dim() == 0, name_of(arguments),
                      ": expected a normalizer of one number, but got size ", arguments.normalizer->sym_sizes());
    check_operand(arguments, *arguments.normalizer, "normalizer");
  }
}

void check_grad_output(const Tensor& grad_output, const Arguments& arguments) {
  TORCH_CHECK(is_arithmetic(grad_output.scalar_type()), name_of(arguments),
              ": expected grad_output of float64, float32, bfloat16 or float16, but got ", grad_output.scalar_type());
  check_operand(arguments, grad_output, "grad_output");
}

Tensor strided_grad_output(const Tensor& grad_output) {
  if (grad_output.layout() != at::kSparse) return grad_output;
  TORCH_CHECK(is_arithmetic(grad_output.scalar_type()),
              "expected grad_output of float64, float32, bfloat16 or float16, but got ", grad_output.scalar_type());
  const Tensor indices = grad_output._indices(), values = grad_output._values();
  if (is_plain(indices) && is_plain(values) && !grad_output.is_meta()) {
    check_storage(indices, "the indices of grad_output");
    check_storage(values, "the values of grad_output");
    at::_validate_sparse_coo_tensor_args(indices, values, grad_output.sizes(), grad_output.is_coalesced());
  }
  return grad_output.to_dense();
}

}  // namespace bce_ext
