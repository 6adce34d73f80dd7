// From a Problem to the kernel that solves it. What launches a kernel is a parameter, so that the choice made here can
// be run without a GPU.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <limits>

#include "generic_kernel.cuh"
#include "small_kernels.cuh"

namespace bce_ext {
namespace cuda {

// Blocks of a grid at most; a function of nothing but the problem, so that the order of a sum is too. More than run at
// a time on any GPU; few enough for what each block sets up, and for the second stage of the sum, to be little.
constexpr int64_t kMaxBlocks = 2048;

// A launcher is called as launch(kernel, blocks, threads, arguments...).

inline int64_t num_blocks(int64_t numel, int64_t tile, int64_t max_blocks) {
  return std::min((numel + tile - 1) / tile, max_blocks);
}

// The vector kernel finds the elements of a factor with 32 bits: in larger problems, or further apart, it cannot.
constexpr int64_t kMaxOffset = std::numeric_limits<int32_t>::max();

// A Strided operand as a Factor of at most three dimensions; false when it has more, or too large ones.
inline bool collapse(const Operand& operand, const Problem& problem, Factor& factor) {
  int64_t sizes[3] = {1, 1, 1};
  int64_t strides[3] = {0, 0, 0};  // innermost first
  int count = 0;
  for (int d = problem.ndim - 1; d >= 0; --d) {
    if (problem.sizes[d] == 1) {
      continue;
    }
    if (count > 0 && operand.strides[d] == strides[count - 1] * sizes[count - 1]) {
      sizes[count - 1] *= problem.sizes[d];
      continue;
    }
    if (count == 3) {
      return false;
    }
    sizes[count] = problem.sizes[d];
    strides[count] = operand.strides[d];
    ++count;
  }
  int64_t last = 0;
  for (int d = 0; d < count; ++d) {
    last += (sizes[d] - 1) * std::abs(strides[d]);
  }
  if (problem.numel > kMaxOffset || last > kMaxOffset) {
    return false;
  }
  factor.has_planes = count == 3;
  factor.inner = Divider(static_cast<int32_t>(sizes[0]));
  factor.middle = Divider(static_cast<int32_t>(sizes[1]));
  factor.inner_stride = static_cast<int32_t>(strides[0]);
  factor.middle_stride = static_cast<int32_t>(strides[1]);
  factor.outer_stride = static_cast<int32_t>(strides[2]);
  return true;
}

// How the vector kernel with vectors of N elements reads an operand; false when it cannot. `aligned` becomes false
// where there are no vectors to read.
template <typename Input, int N>
bool make_factor(const Operand& operand, const Problem& problem, Factor& factor, bool& aligned) {
  using C = compute_t<Input>;
  if (operand.layout == Layout::Absent) {
    return true;
  }
  factor.data = operand.data;
  factor.dtype = operand.dtype;
  if (operand.layout == Layout::Scalar) {
    return true;
  }
  if (operand.dtype != dtype_of<Input>() && operand.dtype != dtype_of<C>()) {
    return false;
  }
  const bool is_vector =
      operand.dtype == dtype_of<C>() ? is_aligned<C, N>(operand.data) : is_aligned<Input, N>(operand.data);
  if (operand.layout == Layout::Flat) {
    factor.access = Access::Flat;
    aligned &= is_vector;
    return true;
  }
  if (!collapse(operand, problem, factor)) {
    return false;
  }
  if (factor.inner.divisor() % N != 0) {
    factor.access = Access::Walk;
  } else if (factor.inner_stride == 0) {
    factor.access = Access::Shared;
  } else if (factor.inner_stride == 1 && factor.middle_stride % N == 0 && factor.outer_stride % N == 0 && is_vector) {
    factor.access = Access::Row;
  } else {
    factor.access = Access::Walk;
  }
  return true;
}

// Whether the vector kernel for these types can read the input and the target and write the outputs.
template <typename Input, typename Target>
bool fits(const Problem& problem) {
  using C = compute_t<Input>;
  const auto reads = [](const Operand& operand, Dtype dtype) {
    return operand.layout == Layout::Flat && operand.dtype == dtype;
  };
  const auto writes = [](const Output& output, Dtype dtype) { return output.data == nullptr || output.dtype == dtype; };
  return problem.compute_in_double == std::is_same_v<C, double> && reads(problem.input, dtype_of<Input>()) &&
         reads(problem.target, dtype_of<Target>()) &&
         (writes(problem.loss, dtype_of<Input>()) || writes(problem.loss, dtype_of<C>())) &&
         writes(problem.grad_input, dtype_of<Input>()) && writes(problem.grad_target, dtype_of<Target>());
}

// Solves the problem with a vector kernel where the layouts of the weights allow it: returns the number of blocks, or
// -1.
template <typename Formula, typename Input, typename Target, bool kWeighted, typename Launch>
int64_t try_vector_kernel(const Problem& problem, double* partials, int64_t max_blocks, const Launch& launch) {
  using C = compute_t<Input>;
  constexpr int N = kVectorSize<Input, Target, kWeighted>;
  VectorArguments<Formula, C> arguments(problem);
  arguments.aligned = is_aligned<Input, N>(problem.input.data) && is_aligned<Target, N>(problem.target.data) &&
                      (problem.loss.dtype == dtype_of<C>() ? is_aligned<C, N>(problem.loss.data)
                                                           : is_aligned<Input, N>(problem.loss.data)) &&
                      is_aligned<Input, N>(problem.grad_input.data) && is_aligned<Target, N>(problem.grad_target.data);
  if (!make_factor<Input, N>(problem.weight, problem, arguments.weight, arguments.aligned) ||
      !make_factor<Input, N>(problem.pos_weight, problem, arguments.pos_weight, arguments.aligned) ||
      !make_factor<Input, N>(problem.grad_output, problem, arguments.grad_output, arguments.aligned)) {
    return -1;
  }
  arguments.input = problem.input.data;
  arguments.target = problem.target.data;
  arguments.partials = partials;
  const int64_t blocks = num_blocks(problem.numel, kTile<Input, Target, kWeighted>, max_blocks);
  launch(vector_kernel<Formula, Input, Target, kWeighted>, blocks, kThreads, arguments);
  return blocks;
}

// Whether a problem is more than the kernel without weights does. That kernel takes a grad_output of one value.
inline bool needs_weights(const Problem& problem) {
  const Wanted wanted = wanted_of(problem);
  const bool is_scaled = wanted == Wanted::GradInput && problem.grad_output.layout == Layout::Scalar;
  return wanted == Wanted::All || problem.weight.layout != Layout::Absent ||
         problem.pos_weight.layout != Layout::Absent || problem.adjusts_target() ||
         (problem.grad_output.layout != Layout::Absent && !is_scaled);
}

// `Formula` stands for its instance for the type computed in.
template <template <typename> typename Formula, typename Input, typename Target, typename Launch>
int64_t try_types(const Problem& problem, double* partials, int64_t max_blocks, const Launch& launch) {
  if (!fits<Input, Target>(problem)) {
    return -1;
  }
  using Instance = Formula<compute_t<Input>>;
  // A formula that does more has no kernel without weights: reading none is little beside it.
  if constexpr (Instance::kJoinsLogarithms || Instance::kTakesProbabilities) {
    if (!needs_weights(problem))
      return try_vector_kernel<Instance, Input, Target, false>(problem, partials, max_blocks, launch);
  }
  return try_vector_kernel<Instance, Input, Target, true>(problem, partials, max_blocks, launch);
}

template <template <typename> typename Formula, typename Input, typename... Targets, typename Launch>
int64_t try_targets(const Problem& problem, double* partials, int64_t max_blocks, const Launch& launch) {
  int64_t blocks = -1;
  ((blocks = blocks >= 0 ? blocks : try_types<Formula, Input, Targets>(problem, partials, max_blocks, launch)), ...);
  return blocks;
}

// The pairs of element types that have a vector kernel.
template <template <typename> typename Formula, typename Launch>
int64_t try_vector_kernels(const Problem& problem, double* partials, int64_t max_blocks, const Launch& launch) {
  switch (problem.input.dtype) {
    case Dtype::Float:
      return try_targets<Formula, float, float, Boolean, uint8_t, int64_t>(problem, partials, max_blocks, launch);
    case Dtype::Half:
      return try_targets<Formula, __half, __half, float, Boolean, uint8_t, int64_t>(problem, partials, max_blocks,
                                                                                    launch);
    case Dtype::BFloat16:
      return try_targets<Formula, __nv_bfloat16, __nv_bfloat16, float, Boolean, uint8_t, int64_t>(problem, partials,
                                                                                                  max_blocks, launch);
    case Dtype::Double:
      return try_targets<Formula, double, double, Boolean>(problem, partials, max_blocks, launch);
    default:
      return -1;
  }
}

template <template <typename> typename Formula, typename Launch>
int64_t launch_generic_kernel(const Problem& problem, double* partials, int64_t max_blocks, const Launch& launch) {
  const int64_t blocks = num_blocks(problem.numel, kGenericTile, max_blocks);
  const auto launch_typed = [&](auto zero) {
    using C = decltype(zero);
    GenericArguments<Formula<C>, C> arguments(problem);
    arguments.partials = partials;
    for (int d = 0; d < problem.ndim; ++d) {
      arguments.sizes[d] = Divider(problem.sizes[d]);
    }
    launch(generic_kernel<Formula<C>, C>, blocks, kThreads, arguments);
  };
  if (problem.compute_in_double) {
    launch_typed(double{});
  } else {
    launch_typed(float{});
  }
  return blocks;
}

template <template <typename> typename Formula, typename Launch>
int64_t launch_pass(const Problem& problem, double* partials, int64_t max_blocks, const Launch& launch) {
  if (problem.numel == 0) {
    return 0;
  }
  const int64_t blocks = try_vector_kernels<Formula>(problem, partials, max_blocks, launch);
  return blocks >= 0 ? blocks : launch_generic_kernel<Formula>(problem, partials, max_blocks, launch);
}

template <typename Launch>
int64_t launch_formula(const Problem& problem, double* partials, int64_t max_blocks, const Launch& launch) {
  switch (problem.formula) {
    case Formula::Probabilities:
      return launch_pass<Probabilities>(problem, partials, max_blocks, launch);
    case Formula::Focal:
      return launch_pass<Focal>(problem, partials, max_blocks, launch);
    case Formula::Asymmetric:
      return launch_pass<Asymmetric>(problem, partials, max_blocks, launch);
    default:
      return launch_pass<WithLogits>(problem, partials, max_blocks, launch);
  }
}

// The partial sums that a problem can have at most: the smallest tile is that of vectors of two elements.
inline int64_t max_partials(int64_t numel, int64_t max_blocks = kMaxBlocks) {
  return num_blocks(numel, kTile<double, double, true>, max_blocks);
}

// Solves a problem. When it asks for a sum, `total` receives it, divided by the divisor and the normalizer, and
// `partials` has room for max_partials(numel) values.
template <typename Launch>
void solve(const Problem& problem, double* partials, const Output& total, const Launch& launch,
           int64_t max_blocks = kMaxBlocks) {
  if (!problem.reduce) {
    partials = nullptr;
  }
  const int64_t blocks = launch_formula(problem, partials, max_blocks, launch);
  if (problem.reduce) {
    launch(final_sum_kernel, 1, kSumThreads, partials, blocks, problem.divisor, problem.normalizer, total);
  }
}

// grad *= grad_output, see scale_kernel.
template <typename Launch>
void scale_grad(const Output& grad, int64_t numel, const void* grad_output, Dtype grad_output_dtype,
                const Launch& launch, int64_t max_blocks = kMaxBlocks) {
  if (numel == 0) {
    return;
  }
  with_floating_type(grad.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t kTileSize = kThreads * kVectorBytes / sizeof(T);
    launch(scale_kernel<T>, num_blocks(numel, kTileSize, max_blocks), kThreads, static_cast<T*>(grad.data), numel,
           grad_output, grad_output_dtype);
  });
}

// The partial sums of a count_valid at most.
inline int64_t max_count_partials(int64_t numel, int64_t max_blocks = kMaxBlocks) {
  return num_blocks(numel, kThreads * kVectorBytes / sizeof(double), max_blocks);
}

// count = the number of elements that do not equal ignore_index. `partials` has room for max_count_partials(numel).
template <typename Launch>
void count_valid(const void* target, Dtype dtype, int64_t numel, double ignore_index, double* partials,
                 const Output& count, const Launch& launch, int64_t max_blocks = kMaxBlocks) {
  int64_t blocks = 0;
  if (numel > 0) {
    with_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      blocks = num_blocks(numel, kThreads * kVectorBytes / sizeof(T), max_blocks);
      launch(count_valid_kernel<T>, blocks, kThreads, static_cast<const T*>(target), numel, ignore_index, partials);
    });
  }
  launch(final_sum_kernel, 1, kSumThreads, partials, blocks, 1.0, Operand{}, count);
}

}  // namespace cuda
}  // namespace bce_ext
