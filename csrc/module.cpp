// The Python module bce_ext._C: what this binary was built with. The operators need no Python and stand in libbce_ext.so.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>

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

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "What the binary of bce_ext was built with.";
  module.def("build_info", &build_info, "Facts of the loaded binary: torch, compiler, instruction set, CUDA.");
}
