// What the vector kernel is told: its arguments, the sizes of its vectors, and what it makes of them.
#pragma once

#include <algorithm>

#include "../formulas.h"
#include "factor.cuh"

namespace bce_ext {
namespace cuda {

constexpr int kThreads = 256;

// What the kernels take of a Problem's constants.
template <typename C>
struct Constants {
  explicit Constants(const Problem& problem)
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

// What a problem wants of its elements. A kernel computes nothing else, except for All.
enum class Wanted : int8_t { Sum, SumAndGradInput, Losses, GradInput, All };

inline Wanted wanted_of(const Problem& problem) {
  const bool losses = problem.loss.data != nullptr;
  const bool grad_input = problem.grad_input.data != nullptr;
  if (problem.grad_target.data != nullptr || (losses && (problem.reduce || grad_input))) return Wanted::All;
  if (problem.reduce) return grad_input ? Wanted::SumAndGradInput : Wanted::Sum;
  return losses ? Wanted::Losses : Wanted::GradInput;
}

template <typename Formula, typename C>
struct VectorArguments {
  explicit VectorArguments(const Problem& problem)
      : formula(problem.parameters),
        constants(problem),
        loss(problem.loss),
        grad_input(problem.grad_input),
        grad_target(problem.grad_target),
        wanted(wanted_of(problem)),
        numel(problem.numel) {
    if constexpr (Formula::kHasHardForm) {
      takes_hard_form =
          formula.hard_form_serves() && problem.label_smoothing == 0.0 && problem.pos_weight.layout == Layout::Absent;
    }
  }

  Formula formula;
  Constants<C> constants;
  const void* input = nullptr;
  const void* target = nullptr;
  Factor weight, pos_weight, grad_output;
  Output loss, grad_input, grad_target;
  Wanted wanted;
  double* partials = nullptr;  // one sum of losses per block, where wanted
  int64_t numel = 0;
  bool takes_hard_form = false;  // where the labels are 0, 1 or ignored
  bool aligned = false;          // input, target and the outputs can be accessed in vectors
};

// Elements per vector: the widest operand takes 16 bytes. Weights may be of the type that is computed in.
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
__device__ __forceinline__ bool is_in_range(C x, C y) {
  if constexpr (Formula::kTakesProbabilities) {
    return x >= C(0) && x <= C(1) && y >= C(0) && y <= C(1);
  } else if constexpr (kHardLabels) {
    return y == C(0) || y == C(1);
  } else {
    return true;
  }
}

}  // namespace cuda
}  // namespace bce_ext
