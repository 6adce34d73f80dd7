// The second step of the CPU kernel: losses and gradients of a block.
#pragma once

#include <type_traits>

#include "../formulas.h"
#include "label_codes.h"
#include "memory_access.h"
#include "operand_reader.h"

namespace bce_ext {
namespace BCE_EXT_ISA {
namespace {

enum Wanted {
  kLoss = 1,
  kGradInput = 2,
  kGradTarget = 4,
  kSum = 8,       // instead of storing losses, add their summands
  kFetched = 16,  // what comes next has been fetched already
};

// The types in which memory holds the input, the target and the gradient of the input of a block. `kHalf`: the input
// has half precision, or had before it was converted.
template <typename Input, typename Target, typename Gradient, bool kHalf = sizeof(Input) == 2>
struct InMemory {
  using X = Input;
  using Y = Target;
  using G = Gradient;
  static constexpr bool kHasHalfPrecision = kHalf;
};

// What is fetched while a block is computed, the input in its first loop and the rest in the second: by itself the
// processor looks no further than to the end of a page, which is as long as a block.
struct Ahead {
  Stream x, y, w, p;
};

template <bool kGiven, typename T>
BCE_EXT_HOST_DEVICE auto load_or_one(const T* in, int64_t i) {
  if constexpr (kGiven) {
    return Numbers<T>::load(in + i);
  } else {
    (void)in, (void)i;
    return One{};
  }
}

// Adds each of `values` to a lane.
template <typename T>
BCE_EXT_TARGET void add_to_lanes(Numbers<T> values, double* __restrict lanes) {
  T in_memory[kLanes<T>];
  values.store(in_memory);
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) lanes[lane] += static_cast<double>(in_memory[lane]);
}

// What is the same for all blocks of a problem.
template <typename T>
struct Constants {
  BCE_EXT_TARGET explicit Constants(const Problem& problem, T factor)
      : parameters(problem.parameters), scale(static_cast<T>(1.0 / problem.divisor) * factor), rule(problem) {
    // Any NaN comes in here, and one with many bits is not what store() expects.
    if (scale != scale) scale = std::numeric_limits<T>::quiet_NaN();
  }

  const double* parameters;
  T scale;
  TargetRule<T> rule;
};

// The operands and results of one block. `first` receives what a first loop computes for a second one, `lanes` the sums
// for kSum.
template <typename T>
struct Block {
  const void *x, *y;  // InMemory says of what type, as for grad_input
  const T *w, *p;
  T* first;
  T* loss;
  void* grad_input;
  T* grad_target;
  double* lanes;
  Ahead ahead;
  bool loss_past_caches, grad_past_caches;
};

template <typename T>
using Compute = void (*)(int64_t n, const Constants<T>& constants, const Block<T>& block);

// What is known of targets.
enum class Labels {
  Any,
  Adjusted,  // smoothed, or ignored
  Hard,      // 0 or 1
};

template <Labels kLabels, bool kRough, typename Formula, typename T>
BCE_EXT_HOST_DEVICE T first_stage(const Formula& formula, T x, T y) {
  if constexpr (kLabels == Labels::Hard) {
    return formula.template first_stage_of_hard<kRough>(x, y);
  } else {
    return formula.template first_stage<kRough>(x);
  }
}

template <Labels kLabels, typename Formula, typename T, typename Ignored, typename Weight, typename PosWeight,
          typename Scalar>
BCE_EXT_HOST_DEVICE Terms<T> evaluate(const Formula& formula, const TargetRule<Scalar>& rule, T x, T y, Ignored ignored,
                                      Weight w, PosWeight p, T scale, T first) {
  if constexpr (kLabels == Labels::Hard) {
    return formula.evaluate_hard(x, y, w, p, scale, first);
  } else if constexpr (kLabels == Labels::Adjusted) {
    return evaluate_by_rule(formula, rule, x, y, ignored, w, p, scale, first);
  } else {
    return formula.evaluate(x, y, w, p, scale, first);
  }
}

template <typename T, typename Formula, int kWanted, bool kHasWeight, bool kHasPosWeight, Labels kLabels = Labels::Any,
          typename Memory = InMemory<T, T, T>>
BCE_EXT_TARGET void compute(int64_t n, const Constants<T>& constants, const Block<T>& block) {
  const Formula formula(constants.parameters);
  const Ahead next = block.ahead;
  const auto* __restrict const x = static_cast<const typename Memory::X*>(block.x);
  const auto* __restrict const y = static_cast<const typename Memory::Y*>(block.y);
  auto* __restrict const grad_input = static_cast<typename Memory::G*>(block.grad_input);
  T* __restrict const first = block.first;
  constexpr bool kFetches = (kWanted & kFetched) == 0;
  // Stays without a meaning where nothing depends on it.
  constexpr bool kHasFirstStage = Formula::kGradInputNeedsFirstStage || (kWanted & ~kFetched) != kGradInput;
  for (int64_t i = 0; kHasFirstStage && i < n; i += kLanes<T>) {
    if constexpr (kFetches) prefetch<T, typename Memory::X>(next.x, i);
    const Numbers<T> input = load<Numbers<T>>(x + i), target = load_target<Numbers<T>>(y, i);
    Numbers<T> stage = first_stage<kLabels, Memory::kHasHalfPrecision>(formula, input, target);
    // log1p(0) adds nothing where the logarithms are joined.
    if constexpr (kLabels == Labels::Adjusted && (kWanted & kSum) != 0) {
      stage = unless(ignored_of(y, i, target, constants.rule), stage);
    }
    stage.store(first + i);
  }
  const Numbers<T> scale = constants.scale;
  // A loss has the same bits with a gradient and without, so summands are rounded before they are added. Without
  // logarithms they come out the same anyhow, and are so little work that the instruction would show.
  constexpr bool kJoins = Formula::kJoinsLogarithms && !kHasWeight && !kHasPosWeight;
  // Four summands are added in T, which costs at most three roundings of T and saves conversions to float64.
  constexpr int64_t kGroup = (kWanted & kSum) != 0 ? 4 * kLanes<T> : kBlock<T>;
  for (int64_t i = 0; i < n;) {
    Numbers<T> sum = T(0);
    for (const int64_t end = smaller(n, i + kGroup); i < end; i += kLanes<T>) {
      if constexpr (kFetches && !kHasFirstStage) prefetch<T, typename Memory::X>(next.x, i);
      if constexpr (kFetches) prefetch_any<T, typename Memory::Y>(next.y, i);
      if constexpr (kFetches && kHasWeight) prefetch_any<T>(next.w, i);
      if constexpr (kFetches && kHasPosWeight) prefetch_any<T>(next.p, i);
      const auto weight = load_or_one<kHasWeight>(block.w, i);
      const auto pos_weight = load_or_one<kHasPosWeight>(block.p, i);
      const Numbers<T> input = in_registers(load<Numbers<T>>(x + i));
      const Numbers<T> target = in_registers(load_target<Numbers<T>>(y, i));
      const auto ignored = ignored_of(y, i, target, constants.rule);
      const Numbers<T> stage = kHasFirstStage ? in_registers(Numbers<T>::load(first + i)) : Numbers<T>(T(0));
      const auto terms =
          evaluate<kLabels>(formula, constants.rule, input, target, ignored, weight, pos_weight, scale, stage);
      if constexpr ((kWanted & kLoss) != 0) store(terms.loss, block.loss + i, block.loss_past_caches);
      if constexpr ((kWanted & kSum) != 0 && kJoins) sum = sum + terms.summand;
      if constexpr ((kWanted & kSum) != 0 && !kJoins) sum = sum + rounded(terms.summand);
      if constexpr ((kWanted & kGradInput) != 0) store(terms.grad_input, grad_input + i, block.grad_past_caches);
      if constexpr ((kWanted & kGradTarget) != 0) terms.grad_target.store(block.grad_target + i);
    }
    if constexpr ((kWanted & kSum) != 0) add_to_lanes<T>(sum, block.lanes);
  }
}

}  // namespace
}  // namespace BCE_EXT_ISA
}  // namespace bce_ext
