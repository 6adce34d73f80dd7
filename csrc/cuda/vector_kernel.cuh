// The kernel for what is common: input and target dense and in walk order, in vectors. Two variants: kWeighted reads
// the weights in any of the ways of factor.cuh and adjusts targets, the other has neither.
#pragma once

#include <c10/macros/Macros.h>

#include <algorithm>

#include "../formulas.h"
#include "block_reduce.cuh"
#include "factor.cuh"

namespace bce_ext {
namespace cuda {

constexpr int kThreads = 256;

// What the kernels take of a Problem's numbers.
template <typename C>
struct Numbers {
  explicit Numbers(const Problem& problem)
      : normalizer(problem.normalizer.data),
        normalizer_dtype(problem.normalizer.dtype),
        scale(static_cast<C>(1.0 / problem.divisor)),
        rule(problem) {}

  // Of the gradients.
  __device__ __forceinline__ C full_scale() const {
    return normalizer == nullptr ? scale : scale / load_element<C>(normalizer, normalizer_dtype, 0);
  }

  const void* normalizer;
  Dtype normalizer_dtype;
  C scale;
  TargetRule<C> rule;
};

template <typename Formula, typename C>
struct VectorArguments {
  explicit VectorArguments(const Problem& problem) : formula(problem.parameters), numbers(problem) {}

  Formula formula;
  Numbers<C> numbers;
  const void* input = nullptr;
  const void* target = nullptr;
  Factor weight, pos_weight, grad_output;
  Output loss, grad_input, grad_target;
  double* partials = nullptr;  // one sum of losses per block, where wanted
  int64_t numel = 0;
  bool aligned = false;  // input, target and the outputs can be accessed in vectors
};

// Elements per vector: the widest operand takes 16 bytes, and all accesses of a warp are to neighbours. Weights may be
// of the type that is computed in.
template <typename Input, typename Target, bool kWeighted>
constexpr int kVectorSize =
    kVectorBytes /
    static_cast<int>(std::max({sizeof(Input), sizeof(Target), kWeighted ? sizeof(compute_t<Input>) : 1}));

// Elements that a block handles at a time.
template <typename Input, typename Target, bool kWeighted>
constexpr int kTile = kThreads * kVectorSize<Input, Target, kWeighted>;

// Logits may have any value; a probability or an integer label that is none stops the program, as in native, by an
// assertion of the kernel.
template <typename Formula, bool kHardLabels, typename C>
__device__ __forceinline__ bool is_in_range(C x, C y, const Numbers<C>& numbers) {
  if constexpr (Formula::kTakesProbabilities) {
    return (x >= C(0) && x <= C(1) && y >= C(0) && y <= C(1)) || y == numbers.rule.ignore_index;
  } else if constexpr (kHardLabels) {
    return y == C(0) || y == C(1) || y == numbers.rule.ignore_index;
  } else {
    return true;
  }
}

// What a thread does with its N elements of a tile.
template <typename Formula, typename Input, typename Target, bool kWeighted>
class TilePass {
 public:
  using C = compute_t<Input>;
  static constexpr int N = kVectorSize<Input, Target, kWeighted>;

  __device__ __forceinline__ explicit TilePass(const VectorArguments<Formula, C>& arguments)
      : arguments_(arguments),
        scale_(arguments.numbers.full_scale()),
        weight_(kWeighted ? constant_value<C>(arguments.weight) * constant_value<C>(arguments.grad_output) : C(1)),
        pos_weight_(kWeighted ? constant_value<C>(arguments.pos_weight) : C(1)) {}

  // Elements [index, index + N), all of them there and aligned. Returns the sum of their losses.
  __device__ __forceinline__ C vector(int64_t index) {
    const auto inputs = load_vector<Input, N>(arguments_.input, index);
    const auto targets = load_vector<Target, N>(arguments_.target, index);
    C weights[N], pos_weights[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      weights[k] = weight_;
      pos_weights[k] = pos_weight_;
    }
    if constexpr (kWeighted) {
      multiply<Input>(arguments_.weight, index, weights);
      multiply<Input>(arguments_.grad_output, index, weights);
      multiply<Input>(arguments_.pos_weight, index, pos_weights);
    }
    C losses[N], grad_inputs[N], grad_targets[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Terms<C> terms =
          evaluate(to_compute<C>(inputs.values[k]), to_compute<C>(targets.values[k]), weights[k], pos_weights[k]);
      losses[k] = terms.loss;
      grad_inputs[k] = terms.grad_input;
      grad_targets[k] = terms.grad_target;
    }
    store(index, losses, grad_inputs, grad_targets);
    C sum = losses[0];
#pragma unroll
    for (int k = 1; k < N; ++k) {
      sum += losses[k];
    }
    return sum;
  }

  // The same one by one, for elements first, first + step, ... before `end`: what is not aligned, and the last ones.
  __device__ __forceinline__ C elements(int64_t first, int step, int64_t end) {
    C sum = 0;
#pragma unroll 1
    for (int64_t i = first; i < end; i += step) {
      C w = weight_, p = pos_weight_;
      if constexpr (kWeighted) {
        w *= factor_at<Input, C>(arguments_.weight, i) * factor_at<Input, C>(arguments_.grad_output, i);
        p *= factor_at<Input, C>(arguments_.pos_weight, i);
      }
      const Terms<C> terms = evaluate(to_compute<C>(static_cast<const Input*>(arguments_.input)[i]),
                                      to_compute<C>(static_cast<const Target*>(arguments_.target)[i]), w, p);
      const C loss[1] = {terms.loss};
      const C grad_input[1] = {terms.grad_input};
      const C grad_target[1] = {terms.grad_target};
      store(i, loss, grad_input, grad_target);
      sum += terms.loss;
    }
    return sum;
  }

  // Whether all inputs so far were values that the formula is defined for.
  __device__ __forceinline__ bool in_range() const { return in_range_; }

 private:
  __device__ __forceinline__ Terms<C> evaluate(C x, C y, C w, C p) {
    in_range_ &= is_in_range<Formula, std::is_integral_v<Target>>(x, y, arguments_.numbers);
    if constexpr (kWeighted) {
      return evaluate_by_rule(arguments_.formula, arguments_.numbers.rule, x, y, w, p, scale_,
                              arguments_.formula.first_stage(x));
    } else {
      return arguments_.formula.evaluate(x, y, One{}, One{}, scale_, arguments_.formula.first_stage(x));
    }
  }

  template <int M>
  __device__ __forceinline__ void store(int64_t index, const C (&losses)[M], const C (&grad_inputs)[M],
                                        const C (&grad_targets)[M]) const {
    if (arguments_.loss.data != nullptr) {
      if (arguments_.loss.dtype == dtype_of<C>()) {
        store_vector<C>(arguments_.loss.data, index, losses);
      } else {
        store_vector<Input>(arguments_.loss.data, index, losses);
      }
    }
    if (arguments_.grad_input.data != nullptr) {
      store_vector<Input>(arguments_.grad_input.data, index, grad_inputs);
    }
    if constexpr (!std::is_integral_v<Target> && !std::is_same_v<Target, Boolean>) {
      if (arguments_.grad_target.data != nullptr) {
        store_vector<Target>(arguments_.grad_target.data, index, grad_targets);
      }
    }
  }

  const VectorArguments<Formula, C>& arguments_;
  const C scale_;                // of the gradients
  const C weight_, pos_weight_;  // the constant parts
  bool in_range_ = true;
};

// Blocks that an SM must have room for: a thread has up to 64 registers, or 128 in float64, enough to keep out of local
// memory.
template <typename C>
constexpr int kMinBlocks = std::is_same_v<C, double> ? 2 : 4;

template <typename Formula, typename Input, typename Target, bool kWeighted>
__global__ void __launch_bounds__(kThreads, kMinBlocks<compute_t<Input>>)
    vector_kernel(const VectorArguments<Formula, compute_t<Input>> arguments) {
  using Pass = TilePass<Formula, Input, Target, kWeighted>;
  constexpr int64_t kSize = kTile<Input, Target, kWeighted>;
  Pass pass(arguments);
  double sum = 0;
  for (int64_t tile = blockIdx.x; tile * kSize < arguments.numel; tile += gridDim.x) {
    const int64_t begin = tile * kSize;
    const int64_t index = begin + static_cast<int>(threadIdx.x) * Pass::N;
    if (arguments.aligned && index + Pass::N <= arguments.numel) {
      sum += pass.vector(index);
    } else {
      // Misaligned, neighbours go to neighbouring threads; aligned, what is left of a vector goes to one.
      const int64_t first = arguments.aligned ? index : begin + static_cast<int>(threadIdx.x);
      const int64_t end = begin + kSize < arguments.numel ? begin + kSize : arguments.numel;
      sum += pass.elements(first, arguments.aligned ? 1 : kThreads, end);
    }
  }
  CUDA_KERNEL_ASSERT(pass.in_range());
  store_block_sum(sum, arguments.partials);
}

}  // namespace cuda
}  // namespace bce_ext
