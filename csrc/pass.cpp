#include "pass.h"

#include <ATen/ExpandUtils.h>
#include <ATen/Functions.h>

#include <algorithm>

namespace bce_ext {
namespace {

std::optional<Dtype> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kBool:
      return Dtype::Bool;
    case at::kByte:
      return Dtype::UInt8;
    case at::kChar:
      return Dtype::Int8;
    case at::kShort:
      return Dtype::Int16;
    case at::kUInt16:
      return Dtype::UInt16;
    case at::kInt:
      return Dtype::Int32;
    case at::kUInt32:
      return Dtype::UInt32;
    case at::kLong:
      return Dtype::Int64;
    case at::kUInt64:
      return Dtype::UInt64;
    case at::kHalf:
      return Dtype::Half;
    case at::kBFloat16:
      return Dtype::BFloat16;
    case at::kFloat:
      return Dtype::Float;
    case at::kDouble:
      return Dtype::Double;
    default:
      return std::nullopt;  // the 8-bit floats and what is still to come
  }
}

// A dimension of the walk while neighbours are being collapsed.
struct Dimension {
  int64_t size;
  int64_t walk_stride;
  c10::SmallVector<int64_t, 5> strides;  // of every bound tensor
};

bool continues(const Dimension& outer, const Dimension& inner) {
  for (size_t i = 0; i < outer.strides.size(); ++i) {
    if (outer.strides[i] != inner.strides[i] * inner.size) return false;
  }
  return true;
}

}  // namespace

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.itemsize() == 0;
}

double as_label(double number, at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return static_cast<float>(number);
    case at::kHalf:
      return static_cast<c10::Half>(static_cast<float>(number));
    case at::kBFloat16:
      return static_cast<c10::BFloat16>(static_cast<float>(number));
    default:
      // An 8-bit float; integers are compared as they are.
      return at::isFloat8Type(dtype) ? at::scalar_tensor(number, at::kFloat).to(dtype).to(at::kDouble).item<double>()
                                     : number;
  }
}

Tensor readable(const Tensor& tensor) {
  const Tensor known = dtype_of(tensor.scalar_type()) ? tensor : tensor.to(at::kFloat);
  return is_aligned(known) ? known : known.clone();
}

Operand flat_operand(const Tensor& tensor) {
  Operand operand;
  operand.data = tensor.const_data_ptr();
  operand.dtype = *dtype_of(tensor.scalar_type());
  operand.layout = Layout::Flat;
  return operand;
}

Output output_of(const Tensor& tensor) {
  TORCH_INTERNAL_ASSERT(is_arithmetic(tensor.scalar_type()));
  return {tensor.mutable_data_ptr(), *dtype_of(tensor.scalar_type())};
}

Pass::Pass(const Arguments& arguments, at::ScalarType dtype, int64_t divisor, const Tensor& like,
           const Tensor* grad_output)
    : input_(arguments.input) {
  // Anybody can call an internal operator, and none may read or write out of bounds.
  check_arguments(arguments);
  check_loss_dtype(dtype);
  if (grad_output != nullptr) check_grad_output(*grad_output, arguments);

  set_options(arguments);
  problem.divisor = static_cast<double>(divisor);
  problem.numel = input_.numel();
  problem.compute_in_double =
      dtype == at::kDouble || input_.scalar_type() == at::kDouble || arguments.target.scalar_type() == at::kDouble ||
      (problem.ignores && is_rounded_label(problem.ignore_index, arguments.target.scalar_type()));
  const auto strides = like.strides();
  if (like.is_non_overlapping_and_dense()) {
    strides_.assign(strides.begin(), strides.end());
  } else {
    const auto dense = at::infer_dense_strides(like.sizes(), strides);
    strides_.assign(dense.begin(), dense.end());
  }

  bind(problem.input, input_);
  bind(problem.target, arguments.target);
  if (is_defined(arguments.weight)) bind(problem.weight, *arguments.weight);
  if (is_defined(arguments.pos_weight)) bind(problem.pos_weight, *arguments.pos_weight);
  if (grad_output != nullptr) bind(problem.grad_output, *grad_output);
  bind_normalizer(arguments.normalizer);

  bool all_flat = true;
  for (const auto& binding : bindings_) all_flat &= bind_flat(binding);
  if (all_flat) {
    problem.ndim = 1;
    problem.sizes[0] = problem.numel;
  } else if (problem.numel > 0) {
    plan_strided();
  }
}

void Pass::set_options(const Arguments& arguments) {
  problem.formula = arguments.kind();
  const auto& options = arguments.options;
  for (size_t i = Arguments::kParameters; i < options.size(); ++i) {
    problem.parameters[i - Arguments::kParameters] = options[i];
  }
  const at::ScalarType target_dtype = arguments.target.scalar_type();
  problem.label_smoothing = arguments.label_smoothing();
  problem.checks_labels = is_label_type(target_dtype) && target_dtype != at::kBool;  // a bool is nothing else
  const auto ignore_index = arguments.ignore_index();
  problem.ignores = ignore_index.has_value();
  if (problem.ignores) problem.ignore_index = as_label(*ignore_index, target_dtype);
}

void Pass::bind_normalizer(const OptionalTensor& normalizer) {
  if (!is_defined(normalizer)) return;
  if (normalizer->is_cpu()) {
    problem.divisor *= normalizer->item().toDouble();
    return;
  }
  normalizer_ = dtype_of(normalizer->scalar_type()) ? *normalizer : normalizer->to(at::kFloat);
  problem.normalizer = flat_operand(normalizer_);
}

void Pass::bind(Operand& operand, const Tensor& tensor) {
  Tensor bound = tensor;
  // A 0-d CPU tensor beside CUDA logits: filled in on the device, since a copy would make the host wait.
  if (tensor.device() != input_.device()) bound = at::full({}, tensor.item(), tensor.options().device(input_.device()));
  bound = readable(bound);
  operand = flat_operand(bound);
  bindings_.push_back({&operand, std::move(bound)});
}

bool Pass::bind_flat(const Binding& binding) const {
  const Tensor& tensor = binding.tensor;
  if (tensor.numel() == 1) {
    binding.operand->layout = problem.numel == 1 ? Layout::Flat : Layout::Scalar;
    return true;
  }
  if (tensor.sizes() == input_.sizes() && tensor.strides() == strides()) {
    binding.operand->layout = Layout::Flat;
    return true;
  }
  return false;
}

void Pass::plan_strided() {
  std::vector<Dimension> dimensions;
  for (int64_t d = 0; d < input_.dim(); ++d) {
    if (input_.size(d) == 1) continue;
    Dimension dimension{input_.size(d), strides_[d], {}};
    for (const auto& [operand, tensor] : bindings_) {
      const int64_t own = d - (input_.dim() - tensor.dim());  // broadcasting aligns the last dimensions
      dimension.strides.push_back(own < 0 || tensor.size(own) == 1 ? 0 : tensor.stride(own));
    }
    dimensions.push_back(std::move(dimension));
  }
  std::stable_sort(dimensions.begin(), dimensions.end(),
                   [](const Dimension& a, const Dimension& b) { return a.walk_stride > b.walk_stride; });

  std::vector<Dimension> walk;
  for (auto& dimension : dimensions) {
    if (!walk.empty() && continues(walk.back(), dimension)) {
      dimension.size *= walk.back().size;
      walk.back() = std::move(dimension);
    } else {
      walk.push_back(std::move(dimension));
    }
  }
  if (walk.size() > kMaxDims) {
    for (auto& binding : bindings_) make_flat(binding);
    problem.ndim = 1;
    problem.sizes[0] = problem.numel;
    return;
  }

  problem.ndim = static_cast<int>(walk.size());
  for (size_t i = 0; i < bindings_.size(); ++i) {
    Operand& operand = *bindings_[i].operand;
    bool constant = true;
    bool flat = true;
    for (size_t d = 0; d < walk.size(); ++d) {
      problem.sizes[d] = walk[d].size;
      operand.strides[d] = walk[d].strides[i];
      constant &= operand.strides[d] == 0;
      flat &= operand.strides[d] == walk[d].walk_stride;
    }
    operand.layout = constant ? Layout::Scalar : flat ? Layout::Flat : Layout::Strided;
  }
}

void Pass::make_flat(Binding& binding) const {
  if (bind_flat(binding)) return;
  Tensor dense = at::empty_strided(sizes(), strides(), binding.tensor.options());
  dense.copy_(binding.tensor.expand(sizes()));
  binding.operand->data = dense.const_data_ptr();
  binding.operand->layout = Layout::Flat;
  binding.tensor = std::move(dense);
}

}  // namespace bce_ext
