// The kernel for everything else: any element types, any strides, decided per element.
#pragma once

#include "vector_kernel.cuh"

namespace bce_ext {
namespace cuda {

constexpr int kGenericUnroll = 8;  // elements of a thread whose losses are summed in the type computed in
constexpr int64_t kGenericTile = kThreads * kGenericUnroll;

template <typename Formula, typename C>
struct GenericArguments {
  explicit GenericArguments(const Problem& problem)
      : problem(problem), formula(problem.parameters), constants(problem) {}

  Problem problem;
  Formula formula;
  Constants<C> constants;
  Divider<int64_t> sizes[kMaxDims];
  double* partials = nullptr;
};

// The offset of element `index` of the walk in a Strided operand.
template <typename Formula, typename C>
__device__ __forceinline__ int64_t strided_offset(const Operand& operand, const GenericArguments<Formula, C>& arguments,
                                                  int64_t index) {
  int64_t offset = 0;
  for (int d = arguments.problem.ndim - 1; d >= 0; --d) {
    const int64_t outer = arguments.sizes[d].divide(index);
    offset += (index - outer * arguments.sizes[d].divisor()) * operand.strides[d];
    index = outer;
  }
  return offset;
}

template <typename C, typename Formula>
__device__ __forceinline__ C read(const Operand& operand, const GenericArguments<Formula, C>& arguments,
                                  int64_t index) {
  if (operand.layout == Layout::Absent) {
    return C(1);
  }
  if (operand.layout == Layout::Scalar) {
    index = 0;
  } else if (operand.layout == Layout::Strided) {
    index = strided_offset(operand, arguments, index);
  }
  return load_element<C>(operand.data, operand.dtype, index);
}

template <typename Formula, typename C>
__device__ __forceinline__ C generic_element(const GenericArguments<Formula, C>& arguments, C scale, int64_t index,
                                             bool& in_range) {
  const Problem& problem = arguments.problem;
  const C x = read<C>(problem.input, arguments, index);
  const C y = read<C>(problem.target, arguments, index);
  const C w = read<C>(problem.weight, arguments, index) * read<C>(problem.grad_output, arguments, index);
  const C p = read<C>(problem.pos_weight, arguments, index);
  const bool is_label = !problem.checks_labels || is_in_range<WithLogits<C>, /*kHardLabels=*/true>(x, y);
  in_range &=
      (is_label && is_in_range<Formula, /*kHardLabels=*/false>(x, y)) || y == arguments.constants.rule.ignore_index;
  const Terms<C> terms =
      evaluate_by_rule(arguments.formula, arguments.constants.rule, x, y, arguments.constants.rule.is_ignored(y), w, p,
                       scale, arguments.formula.first_stage(x));
  if (problem.loss.data != nullptr) {
    store_element(problem.loss, index, terms.loss);
  }
  if (problem.grad_input.data != nullptr) {
    store_element(problem.grad_input, index, terms.grad_input);
  }
  if (problem.grad_target.data != nullptr) {
    store_element(problem.grad_target, index, terms.grad_target);
  }
  return terms.loss;
}

// Three blocks per SM leave every thread the 80 registers that keep this out of local memory.
template <typename Formula, typename C>
__global__ void __launch_bounds__(kThreads, 3) generic_kernel(const GenericArguments<Formula, C> arguments) {
  const C scale = arguments.constants.full_scale();
  const int64_t numel = arguments.problem.numel;
  double sum = 0;
  bool in_range = true;
  for (int64_t tile = blockIdx.x; tile * kGenericTile < numel; tile += gridDim.x) {
    C tile_sum = 0;
#pragma unroll 1
    for (int u = 0; u < kGenericUnroll; ++u) {
      const int64_t index = tile * kGenericTile + u * kThreads + threadIdx.x;
      if (index < numel) {
        tile_sum += generic_element(arguments, scale, index, in_range);
      }
    }
    sum += tile_sum;
  }
  CUDA_KERNEL_ASSERT(in_range);
  store_block_sum(sum, arguments.partials);
}

}  // namespace cuda
}  // namespace bce_ext
