// Which functions compute the blocks of a problem.
#pragma once

#include "../formulas.h"
#include "../problem.h"
#include "block_compute.h"
#include "block_probabilities.h"

namespace bce_ext {
namespace BCE_EXT_ISA {
namespace {

template <typename T, typename Formula, int kGradient, bool kHasWeight, bool kHasPosWeight, Labels kLabels>
BCE_EXT_TARGET Compute<T> select_sum() {
  if constexpr (Formula::kTakesProbabilities && !kHasWeight && kLabels != Labels::Adjusted) {
    return compute_probabilities<T, Formula, kGradient, kLabels>;
  } else {
    return compute<T, Formula, kSum | kGradient, kHasWeight, kHasPosWeight, kLabels>;
  }
}

template <typename T, typename Formula, bool kHasWeight, bool kHasPosWeight, Labels kLabels>
BCE_EXT_TARGET Compute<T> select_wanted(int wanted) {
  switch (wanted) {
    case kSum:
      return select_sum<T, Formula, 0, kHasWeight, kHasPosWeight, kLabels>();
    case kSum | kGradInput:
      return select_sum<T, Formula, kGradInput, kHasWeight, kHasPosWeight, kLabels>();
    case kLoss:
      return compute<T, Formula, kLoss, kHasWeight, kHasPosWeight, kLabels>;
    case kGradInput:
      return compute<T, Formula, kGradInput, kHasWeight, kHasPosWeight, kLabels>;
    case kGradTarget:
      return compute<T, Formula, kGradTarget, kHasWeight, kHasPosWeight, kLabels>;
    case kLoss | kGradInput:
      return compute<T, Formula, kLoss | kGradInput, kHasWeight, kHasPosWeight, kLabels>;
    case kGradInput | kGradTarget:
      return compute<T, Formula, kGradInput | kGradTarget, kHasWeight, kHasPosWeight, kLabels>;
    default:
      return compute<T, Formula, kLoss | kGradInput | kGradTarget, kHasWeight, kHasPosWeight, kLabels>;
  }
}

// As compute adds summands without logarithms: of targets that may be adjusted.
template <typename T, typename Formula>
BCE_EXT_TARGET Compute<T> select_joined(int wanted, bool adjusts) {
  constexpr int kBoth = kSum | kGradInput;
  if (adjusts) {
    if (wanted == kSum) return compute<T, Formula, kSum, false, false, Labels::Adjusted>;
    return compute<T, Formula, kBoth, false, false, Labels::Adjusted>;
  }
  if (wanted == kSum) return compute<T, Formula, kSum, false, false>;
  return compute<T, Formula, kBoth, false, false>;
}

template <typename T, typename Formula, bool kHasWeight>
BCE_EXT_TARGET Compute<T> select_hard(int wanted) {
  switch (wanted) {
    case kSum:
      return select_sum<T, Formula, 0, kHasWeight, false, Labels::Hard>();
    case kSum | kGradInput:
      return select_sum<T, Formula, kGradInput, kHasWeight, false, Labels::Hard>();
    case kLoss:
      return compute<T, Formula, kLoss, kHasWeight, false, Labels::Hard>;
    case kLoss | kGradInput:
      return compute<T, Formula, kLoss | kGradInput, kHasWeight, false, Labels::Hard>;
    default:
      return compute<T, Formula, kGradInput, kHasWeight, false, Labels::Hard>;
  }
}

// What is computed from memory of other types without a detour over buffers.
template <typename T, typename Formula, typename Memory>
BCE_EXT_TARGET Compute<T> select_converting(int wanted) {
  switch (wanted) {
    case kSum:
      return compute<T, Formula, kSum, false, false, Labels::Any, Memory>;
    case kSum | kGradInput:
      return compute<T, Formula, kSum | kGradInput, false, false, Labels::Any, Memory>;
    case kGradInput:
      return compute<T, Formula, kGradInput, false, false, Labels::Any, Memory>;
    default:
      return nullptr;
  }
}

template <typename T, typename Formula, typename S>
BCE_EXT_TARGET Compute<T> select_target(const Problem& problem, int wanted) {
  if (problem.target.dtype == problem.input.dtype) return select_converting<T, Formula, InMemory<S, S, S>>(wanted);
  using Bools = std::conditional_t<std::is_same_v<S, BFloat16Bits>, BoolPairs, BoolBits>;
  if (problem.target.dtype == Dtype::Bool) return select_converting<T, Formula, InMemory<S, Bools, S>>(wanted);
  if constexpr (std::is_same_v<S, float> && kConvertsInt64<BCE_EXT_VECTOR_BYTES>) {
    if (problem.target.dtype == Dtype::Int64) return select_converting<T, Formula, InMemory<S, int64_t, S>>(wanted);
  }
  return nullptr;
}

// What a kernel reads beside input and target, and does to the target.
struct Needs {
  bool weight, pos_weight;  // the weight times grad_output counts as one
  bool adjusts;
  bool joined_logarithms;
};

// What is frequent has a kernel without what it does not need. The rest shares one that takes both weights, 1 where
// they are absent, and adjusts targets, by nothing where there is nothing to adjust.
template <typename Formula>
BCE_EXT_TARGET bool takes_everything(const Needs& needs) {
  const bool is_weighted = needs.weight || needs.pos_weight;
  if constexpr (Formula::kTakesProbabilities) return needs.adjusts;
  if constexpr (Formula::kJoinsLogarithms) return needs.adjusts || (needs.weight && needs.pos_weight);
  return needs.adjusts || is_weighted;
}

template <typename T, typename Formula>
BCE_EXT_TARGET Compute<T> select_compute(int wanted, const Needs& needs) {
  if constexpr (Formula::kJoinsLogarithms) {
    if (needs.joined_logarithms) return select_joined<T, Formula>(wanted, needs.adjusts);
  }
  if (takes_everything<Formula>(needs))
    return select_wanted<T, Formula, true, !Formula::kTakesProbabilities, Labels::Adjusted>(wanted);
  if constexpr (Formula::kJoinsLogarithms) {
    if (needs.pos_weight) return select_wanted<T, Formula, false, true, Labels::Any>(wanted);
  }
  if constexpr (Formula::kJoinsLogarithms || Formula::kTakesProbabilities) {
    if (needs.weight) return select_wanted<T, Formula, true, false, Labels::Any>(wanted);
  }
  return select_wanted<T, Formula, false, false, Labels::Any>(wanted);
}

// The kernel for a block of hard labels, or null.
template <typename T, typename Formula>
BCE_EXT_TARGET Compute<T> select_compute_of_hard(int wanted, const Needs& needs, const double* parameters) {
  if constexpr (Formula::kHasHardForm) {
    const bool serves = Formula(parameters).hard_form_serves();
    if (!serves || (wanted & kGradTarget) != 0 || takes_everything<Formula>(needs)) return nullptr;
    if constexpr (Formula::kTakesProbabilities) {
      if (needs.weight) return select_hard<T, Formula, true>(wanted);
    }
    return select_hard<T, Formula, false>(wanted);
  }
  return nullptr;
}

// The kernel of a problem in types that it need not convert beforehand, or null: what is frequent in training with low
// precision, or with bool targets. Without weights and adjustments.
template <typename T, typename Formula>
BCE_EXT_TARGET Compute<T> select_compute_in_place(const Problem& problem, int wanted) {
  if constexpr (std::is_same_v<T, float> && Formula::kJoinsLogarithms) {
    const bool writes_as_it_reads =
        problem.grad_input.data == nullptr || problem.grad_input.dtype == problem.input.dtype;
    if (problem.input.layout != Layout::Flat || problem.target.layout != Layout::Flat || !writes_as_it_reads) {
      return nullptr;
    }
    if (problem.input.dtype == Dtype::Float) return select_target<T, Formula, float>(problem, wanted);
    if (problem.input.dtype == Dtype::BFloat16) return select_target<T, Formula, BFloat16Bits>(problem, wanted);
    if constexpr (kConvertsHalf<BCE_EXT_VECTOR_BYTES>) {
      if (problem.input.dtype == Dtype::Half) return select_target<T, Formula, HalfBits>(problem, wanted);
    }
  }
  return nullptr;
}

// The kernel for converted operands of a problem in half precision, or null: with the exponential of those that need no
// conversion, so that no result depends on the layout, on the type of a hard label or on an infinite logit elsewhere.
template <typename T, typename Formula>
BCE_EXT_TARGET Compute<T> select_compute_of_half(const Problem& problem, int wanted) {
  if constexpr (std::is_same_v<T, float> && Formula::kJoinsLogarithms) {
    using Memory = InMemory<T, T, T, true>;
    const Dtype input = problem.input.dtype, target = problem.target.dtype;
    const bool is_half = input == Dtype::BFloat16 || input == Dtype::Half;
    if (!is_half || (target != input && !is_integral(target))) return nullptr;
    constexpr int kBoth = kLoss | kGradInput;
    if (wanted == kLoss) return compute<T, Formula, kLoss, false, false, Labels::Any, Memory>;
    if (wanted == kBoth) return compute<T, Formula, kBoth, false, false, Labels::Any, Memory>;
    return select_converting<T, Formula, Memory>(wanted);
  }
  return nullptr;
}

// As select_compute_in_place, of logits beside the codes of their targets, for sums that join logarithms.
template <typename T, typename Formula>
BCE_EXT_TARGET Compute<T> select_compute_of_codes(const Problem& problem, int wanted) {
  if constexpr (std::is_same_v<T, float> && Formula::kJoinsLogarithms) {
    if (problem.label_codes == nullptr || !computes_from_codes(problem)) return nullptr;
    using Memory = InMemory<float, LabelCodes, float>;
    if (wanted == kSum) return compute<T, Formula, kSum, false, false, Labels::Adjusted, Memory>;
    if (problem.grad_input.dtype == Dtype::Float) {
      return compute<T, Formula, kSum | kGradInput, false, false, Labels::Adjusted, Memory>;
    }
  }
  return nullptr;
}

// How losses are added.
enum class Summation {
  OfStored,     // where they must be known one by one, or are not finite
  InRegisters,  // their summands
  Joined,       // those, and their logarithms as the logarithm of a product: losses that have the same weight
};

template <typename T>
struct BlockKernels {
  Needs needs;
  Compute<T> converted;  // of operands in the compute type
  Compute<T> of_hard;    // of those with hard labels; may be null
  Compute<T> of_last;    // of those that are filled up to a whole vector; what fills them up must not be added
  Compute<T> in_place;   // of operands as memory holds them; may be null
};

template <typename T, typename Formula>
BCE_EXT_TARGET BlockKernels<T> select_kernels(const Problem& problem, Summation summation) {
  const bool has_weight = problem.weight.layout != Layout::Absent ||
                          (problem.grad_output.layout != Layout::Absent && !scales_by_grad_output(problem));
  const bool joins_logs = summation == Summation::Joined;
  Needs needs{has_weight, problem.pos_weight.layout != Layout::Absent, problem.adjusts_target(), joins_logs};
  if (!joins_logs && takes_everything<Formula>(needs)) needs = {true, !Formula::kTakesProbabilities, true, false};
  const int gradients =
      (problem.grad_input.data != nullptr ? kGradInput : 0) | (problem.grad_target.data != nullptr ? kGradTarget : 0);
  const int stored = gradients | (problem.reduce || problem.loss.data != nullptr ? kLoss : 0);
  const int wanted = summation == Summation::OfStored ? stored : gradients | kSum;
  const bool is_plain = !needs.weight && !needs.pos_weight && !needs.adjusts;
  const Compute<T> of_half = is_plain ? select_compute_of_half<T, Formula>(problem, wanted) : nullptr;
  const Compute<T> converted = of_half != nullptr ? of_half : select_compute<T, Formula>(wanted, needs);
  Compute<T> in_place = nullptr;
  if (is_plain) {
    in_place = select_compute_in_place<T, Formula>(problem, wanted);
  } else if (joins_logs) {
    in_place = select_compute_of_codes<T, Formula>(problem, wanted);
  }
  return {.needs = needs,
          .converted = converted,
          .of_hard = select_compute_of_hard<T, Formula>(wanted, needs, problem.parameters),
          .of_last = joins_logs || wanted == stored ? converted : select_compute<T, Formula>(stored, needs),
          .in_place = in_place};
}

}  // namespace
}  // namespace BCE_EXT_ISA
}  // namespace bce_ext
