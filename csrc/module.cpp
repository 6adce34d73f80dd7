// The Python module bce_ext._C: what this binary was built with, and a short way from Python to the operators. The
// operators themselves need no Python and stand in libbce_ext.so.
#include <ATen/Functions.h>
#include <ATen/Version.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/version.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string>

#include "find_operator.h"
#include "problem.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "Clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "GCC " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

py::dict build_info() {
  py::dict info;
  info["version"] = BCE_EXT_VERSION;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = kCompiler;
  info["cpp_standard"] = static_cast<int64_t>(__cplusplus);
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
  info["cpu_capability"] = at::get_cpu_capability();
  info["cxx_flags"] = BCE_EXT_CXX_FLAGS;
#ifdef BCE_EXT_CUDA_VERSION
  info["cuda"] = BCE_EXT_CUDA_VERSION;
  info["cuda_archs"] = BCE_EXT_CUDA_ARCHS;
  info["nvcc_flags"] = BCE_EXT_NVCC_FLAGS;
#else
  for (const char* key : {"cuda", "cuda_archs", "nvcc_flags"}) {
    info[key] = py::none();
  }
#endif
  return info;
}

// ---- calls ----
// torch.ops looks an operator up by name and matches its schema at every call. For a small loss that takes longer than
// the loss, so the functions of bce_ext.functional come here.

using OptionalTensor = std::optional<at::Tensor>;

PyObject* argument_type_error() {
  static const auto type = py::object(py::module_::import("bce_ext.errors").attr("ArgumentTypeError")).release();
  return type.ptr();
}

[[noreturn]] void refuse_type(py::handle value, py::handle function, const char* argument, const char* expected) {
  PyErr_Format(argument_type_error(), "%S: expected %s to be a %s, but got %s", function.ptr(), argument, expected,
               Py_TYPE(value.ptr())->tp_name);
  throw py::error_already_set();
}

const at::Tensor& as_tensor(py::handle value, py::handle function, const char* argument,
                            const char* expected = "Tensor") {
  if (!THPVariable_Check(value.ptr())) refuse_type(value, function, argument, expected);
  return THPVariable_Unpack(value.ptr());
}

double as_number(py::handle value, py::handle function, const char* argument) {
  if (THPVariable_Check(value.ptr()) && THPVariable_Unpack(value.ptr()).requires_grad()) {
    PyErr_Format(argument_type_error(),
                 "%S: expected %s to be a number, since it has no gradient, but got a Tensor that requires grad",
                 function.ptr(), argument);
    throw py::error_already_set();
  }
  const double number = PyFloat_AsDouble(value.ptr());
  if (number == -1.0 && PyErr_Occurred() != nullptr) {
    if (PyErr_ExceptionMatches(PyExc_TypeError) == 0) throw py::error_already_set();  // an int that no double holds
    PyErr_Clear();
    refuse_type(value, function, argument, "number");
  }
  return number;
}

// As bce_ext._call.as_tensor, which knows of all kinds of numbers.
OptionalTensor as_weight(py::handle value, py::handle function, const char* argument) {
  if (value.is_none()) return std::nullopt;
  if (THPVariable_Check(value.ptr())) return THPVariable_Unpack(value.ptr());
  if (PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr()))
    return at::scalar_tensor(as_number(value, function, argument), at::TensorOptions(at::kDouble).device(at::kCPU));
  static const auto convert = py::object(py::module_::import("bce_ext._call").attr("as_tensor")).release();
  return as_tensor(convert(value), function, argument, "Tensor or a number");
}

// There may be none, which is NaN.
double as_ignore_index(py::handle value, py::handle function) {
  if (value.is_none()) return std::numeric_limits<double>::quiet_NaN();
  const double number = as_number(value, function, "ignore_index");
  if (std::isnan(number)) {
    PyErr_Format(PyExc_ValueError, "%S: expected ignore_index to be a number or None, but got nan", function.ptr());
    throw py::error_already_set();
  }
  return number;
}

std::optional<at::Scalar> unless_nan(double ignore_index) {
  return std::isnan(ignore_index) ? std::nullopt : std::optional<at::Scalar>(ignore_index);
}

// The options of a loss, whose names are for errors. Where a formula has no parameters and both options are at their
// defaults, there are none.
c10::SmallVector<double, 8> as_numbers(const py::tuple& options, py::handle function, const py::tuple& names) {
  c10::SmallVector<double, 8> numbers;
  for (size_t i = 0; i < options.size(); ++i) {
    numbers.push_back(i == 1 ? as_ignore_index(options[i], function)
                             : as_number(options[i], function, PyUnicode_AsUTF8(PyTuple_GetItem(names.ptr(), i))));
  }
  if (numbers.size() == 2 && numbers[0] == 0.0 && std::isnan(numbers[1])) numbers.clear();
  return numbers;
}

// bce_ext::binary_cross_entropy_with_logits, which takes sparse targets as well.
at::Tensor bce_of_any_target(const at::Tensor& x, const at::Tensor& y, const OptionalTensor& w, const OptionalTensor& p,
                             const OptionalTensor& n, at::ArrayRef<double> options, int64_t reduction) {
  static const auto op = bce_ext::find_operator<at::Tensor(
      const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t, double,
      const std::optional<at::Scalar>&, const OptionalTensor&)>("bce_ext::binary_cross_entropy_with_logits", "options");
  const double label_smoothing = options.empty() ? 0.0 : options[0];
  const auto ignore_index = options.empty() ? std::nullopt : unless_nan(options[1]);
  const py::gil_scoped_release no_gil;
  return op.call(x, y, w, p, reduction, label_smoothing, ignore_index, n);
}

// Whether other threads of Python may run meanwhile. To let them costs a tenth of a small loss, which takes a few
// microseconds; from some 2^15 elements on it is large enough for threads of its own.
bool takes_long(const at::Tensor& input) {
  constexpr int64_t kMany = 1 << 15;
  return !input.is_cpu() || input.sym_numel().maybe_as_int().value_or(kMany) >= kMany;
}

// Whether operators are being recorded: by torch.jit.trace, which sees those of torch.ops, or by a mode, as
// torch.export has. Programs are to hold public operators.
bool is_traced() { return torch::jit::tracer::isTracing() || c10::impl::TorchDispatchModeTLS::any_modes_set(); }

// The loss `function` of input, target, weight, pos_weight and normalizer: bce_ext::_bce. NotImplemented where that
// would be recorded.
py::object bce(py::handle function, int64_t formula, const py::tuple& operands, const py::tuple& options,
               const py::tuple& option_names, int64_t reduction) {
  static const auto op = bce_ext::find_operator<at::Tensor(
      const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      int64_t, at::ArrayRef<double>, int64_t, std::optional<at::ScalarType>)>("bce_ext::_bce");
  const at::Tensor& x = as_tensor(operands[0], function, "input");
  const at::Tensor& y = as_tensor(operands[1], function, "target");
  const OptionalTensor w = as_weight(operands[2], function, "weight");
  const OptionalTensor p = as_weight(operands[3], function, "pos_weight");
  const OptionalTensor n = as_weight(operands[4], function, "normalizer");
  if (is_traced()) return py::reinterpret_borrow<py::object>(Py_NotImplemented);
  const c10::SmallVector<double, 8> numbers = as_numbers(options, function, option_names);
  if (formula == static_cast<int64_t>(bce_ext::Formula::WithLogits) && y.layout() != at::kStrided) {
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(bce_of_any_target(x, y, w, p, n, numbers, reduction)));
  }
  std::optional<py::gil_scoped_release> no_gil;
  if (takes_long(x)) no_gil.emplace();
  at::Tensor loss = op.call(x, y, w, p, n, formula, numbers, reduction, std::nullopt);
  no_gil.reset();
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(loss)));
}

// bce_ext::linear_binary_cross_entropy_with_logits of input, linear_weight, target, linear_bias, weight, pos_weight and
// normalizer.
py::object linear_bce(const py::tuple& operands, const py::tuple& options, int64_t reduction) {
  static const py::handle function = py::str("linear_binary_cross_entropy_with_logits").release();
  static const auto op = bce_ext::find_operator<at::Tensor(
      const at::Tensor&, const OptionalTensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, int64_t, double, const std::optional<at::Scalar>&, const OptionalTensor&)>(
      "bce_ext::linear_binary_cross_entropy_with_logits");
  const at::Tensor& x = as_tensor(operands[0], function, "input");
  const at::Tensor& layer = as_tensor(operands[1], function, "linear_weight");
  const at::Tensor& y = as_tensor(operands[2], function, "target");
  const OptionalTensor bias =
      operands[3].is_none() ? OptionalTensor() : OptionalTensor(as_tensor(operands[3], function, "linear_bias"));
  const OptionalTensor w = as_weight(operands[4], function, "weight");
  const OptionalTensor p = as_weight(operands[5], function, "pos_weight");
  const OptionalTensor n = as_weight(operands[6], function, "normalizer");
  if (is_traced()) return py::reinterpret_borrow<py::object>(Py_NotImplemented);
  const double label_smoothing = as_number(options[0], function, "label_smoothing");
  const auto ignore_index = unless_nan(as_ignore_index(options[1], function));
  py::gil_scoped_release no_gil;
  at::Tensor loss = op.call(x, layer, y, bias, w, p, reduction, label_smoothing, ignore_index, n);
  py::gil_scoped_acquire gil;
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(loss)));
}

}  // namespace

// Free-threaded Pythons need no lock here: statics are initialized once, and no object is shared between calls.
PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.doc() = "What the binary of bce_ext was built with, and a short way to its operators.";
  module.def("bce", torch::wrap_pybind_function(bce));
  module.def("linear_bce", torch::wrap_pybind_function(linear_bce));
  module.def("build_info", &build_info, "Facts of the loaded binary: torch, compiler, instruction set, CUDA.");
}
