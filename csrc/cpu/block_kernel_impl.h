// The body of the CPU kernel, compiled once per instruction set: a file block_kernel_<isa>.cpp defines BCE_EXT_ISA, a
// namespace, BCE_EXT_TARGET, the function attribute that selects the instructions, and BCE_EXT_VECTOR_BYTES, the width
// of their registers, and includes this.
//
// Every function here that is not inlined carries BCE_EXT_TARGET and is local to its file. Compiling the files
// themselves for a newer machine would let inline functions of the standard library, which the linker shares among all
// files, use its instructions everywhere. No lambdas: they do not take the attribute of the function around them.
//
// A chunk is worked through in blocks that stay in the first-level cache, each in separate steps: read (convert or
// gather operands into buffers of the compute type), compute, write, sum. Operands and outputs that lie in memory as
// the computation wants them are used in place.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../formulas.h"
#include "../problem.h"
#include "block_check.h"
#include "block_compute.h"
#include "block_kernel.h"
#include "block_read.h"
#include "block_sum.h"
#include "block_write.h"

namespace bce_ext {
namespace BCE_EXT_ISA {
namespace {

// ---- the choice of a kernel ----

template <typename T, typename Formula, bool kHasWeight, bool kHasPosWeight, Labels kLabels>
BCE_EXT_TARGET Compute<T> select_wanted(int wanted) {
  switch (wanted) {
    case kSum:
      return compute<T, Formula, kSum, kHasWeight, kHasPosWeight, kLabels>;
    case kSum | kGradInput:
      return compute<T, Formula, kSum | kGradInput, kHasWeight, kHasPosWeight, kLabels>;
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
      return compute<T, Formula, kSum, kHasWeight, false, Labels::Hard>;
    case kSum | kGradInput:
      return compute<T, Formula, kSum | kGradInput, kHasWeight, false, Labels::Hard>;
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
    const bool serves = Formula(parameters).has_hard_form();
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

// ---- a chunk ----

// How losses are added.
enum class Summation {
  OfStored,     // where they must be known one by one, or are not finite
  InRegisters,  // their summands
  Joined,       // those, and their logarithms as the logarithm of a product: losses that have the same weight
};

template <typename T, typename Formula>
BCE_EXT_TARGET ChunkResult evaluate_blocks(const Problem& problem, int64_t begin, int64_t end, Summation summation) {
  OperandReader<T> input(problem, problem.input, end - begin);
  OperandReader<T> target(problem, problem.target, end - begin);
  OperandReader<T> weight(problem, problem.weight, end - begin);
  OperandReader<T> pos_weight(problem, problem.pos_weight, end - begin);
  OperandReader<T> grad_output(problem, problem.grad_output, end - begin);
  OutputWriter<T> loss(problem, problem.loss);
  OutputWriter<T> grad_input(problem, problem.grad_input);
  OutputWriter<T> grad_target(problem, problem.grad_target);

  // One number for all gradients is a part of their scale, unless an infinite one of the target may meet a 0.
  const bool scales_by_grad_output =
      problem.grad_output.layout == Layout::Scalar && problem.grad_target.data == nullptr && !problem.reduce;
  const bool has_grad_output = problem.grad_output.layout != Layout::Absent && !scales_by_grad_output;
  const bool joins_logs = summation == Summation::Joined;
  Needs needs{problem.weight.layout != Layout::Absent || has_grad_output, problem.pos_weight.layout != Layout::Absent,
              problem.adjusts_target(), joins_logs};
  if (!joins_logs && takes_everything<Formula>(needs)) needs = {true, !Formula::kTakesProbabilities, true, false};
  const bool has_weight = problem.weight.layout != Layout::Absent || (needs.weight && !has_grad_output);
  const int gradients =
      (problem.grad_input.data != nullptr ? kGradInput : 0) | (problem.grad_target.data != nullptr ? kGradTarget : 0);
  const int stored = gradients | (problem.reduce || problem.loss.data != nullptr ? kLoss : 0);
  const int wanted = summation == Summation::OfStored ? stored : gradients | kSum;
  const Compute<T> compute_converted = select_compute<T, Formula>(wanted, needs);
  const Compute<T> compute_hard = select_compute_of_hard<T, Formula>(wanted, needs, problem.parameters);
  // What fills up the last, small block must not be added.
  const Compute<T> compute_last = joins_logs ? compute_converted : select_compute<T, Formula>(stored, needs);
  const Compute<T> compute_in_place = needs.weight || needs.pos_weight || needs.adjusts
                                          ? nullptr
                                          : select_compute_in_place<T, Formula>(problem, wanted);
  const Constants<T> constants(problem, scales_by_grad_output ? *grad_output.block(0, kLanes<T>) : T(1));

  ChunkResult result;
  alignas(kCacheLine) double lanes[kLanes<T>] = {};
  alignas(kCacheLine) T product[kBlock<T>];
  alignas(kCacheLine) T first[kBlock<T> + kStagger<T>];
  Log1pSum<T> logarithms;
  int64_t n;
  for (int64_t at = begin; at < end; at += n) {
    n = smaller(kBlock<T>, end - at);
    if (n > kLanes<T>) n &= ~(kLanes<T> - 1);  // what remains makes one last, small block
    const int64_t padded = round_to_lanes<T>(n);

    Block<T> block;
    block.w = nullptr;
    if (has_weight) block.w = weight.block(at, n);
    if (has_grad_output) {
      const T* g = grad_output.block(at, n);
      if (has_weight) {
        multiply(padded, block.w, g, product);
        block.w = product;
      } else {
        block.w = g;
      }
    }
    block.p = needs.pos_weight ? pos_weight.block(at, n) : nullptr;
    block.first = first;
    block.lanes = lanes;
    block.ahead = {input.ahead(at + n), target.ahead(at + n),
                   has_grad_output ? grad_output.ahead(at + n) : weight.ahead(at + n), pos_weight.ahead(at + n)};
    if (compute_in_place != nullptr && n == padded) {
      block.x = input.place(at);
      block.y = target.place(at);
      block.grad_input = grad_input.place(at);
      block.grad_past_caches = grad_input.goes_past_caches(block.grad_input);
      compute_in_place(n, constants, block);
      if (problem.hard_labels && !result.invalid) {
        result.invalid = find_invalid_label(n, static_cast<const int64_t*>(block.y));
      }
    } else {
      const T* const x = input.block(at, n);
      const T* const y = target.block(at, n);
      T* const gradient = grad_input.block(at, n);
      block.x = x;
      block.y = y;
      block.loss = loss.block(at, n);
      block.grad_input = gradient;
      block.grad_target = grad_target.block(at, n);
      block.loss_past_caches = loss.goes_past_caches(block.loss);
      block.grad_past_caches = grad_input.goes_past_caches(gradient);
      const bool has_hard_labels =
          compute_hard != nullptr && (problem.target.dtype == Dtype::Bool || are_hard_labels(n, y));
      if (n != padded) {
        compute_last(padded, constants, block);
      } else {
        (has_hard_labels ? compute_hard : compute_converted)(n, constants, block);
      }

      loss.finish(block.loss, at, n);
      grad_input.finish(gradient, at, n);
      grad_target.finish(block.grad_target, at, n);
      if (!result.invalid) {
        result.invalid = find_invalid<T, Formula>(problem, n, x, y, has_hard_labels, constants.rule.ignore_index);
      }
    }
    if (joins_logs) {
      fill(T(0), padded - n, first + n);
      logarithms.add(first, padded);
    } else if (problem.reduce && (summation == Summation::OfStored || n != padded)) {
      fill(T(0), padded - n, block.loss + n);
      accumulate(block.loss, padded, lanes);
    }
  }
  if (problem.past_caches) fence_past_caches();
  if (joins_logs) logarithms.finish(lanes);
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  result.sum = lanes[0];
  return result;
}

template <typename T, typename Formula>
BCE_EXT_TARGET ChunkResult evaluate_chunk(const Problem& problem, int64_t begin, int64_t end) {
  const bool stores = !problem.reduce || problem.loss.data != nullptr || problem.grad_target.data != nullptr;
  if (!stores) {
    const bool is_weighted = problem.weight.layout != Layout::Absent || problem.pos_weight.layout != Layout::Absent ||
                             problem.grad_output.layout != Layout::Absent;
    const bool joins_logs = Formula::kJoinsLogarithms && !is_weighted;
    const ChunkResult result =
        evaluate_blocks<T, Formula>(problem, begin, end, joins_logs ? Summation::Joined : Summation::InRegisters);
    // Something infinite makes a summand NaN where it has no weight, and sums of four may be too large for T.
    if (std::isfinite(result.sum)) return result;
  }
  return evaluate_blocks<T, Formula>(problem, begin, end, Summation::OfStored);
}

template <typename T>
BCE_EXT_TARGET ChunkResult count_valid(const Problem& problem, int64_t begin, int64_t end) {
  OperandReader<T> target(problem, problem.target, end - begin);
  const T ignored = static_cast<T>(problem.ignore_index);
  int64_t count = end - begin;
  for (int64_t at = begin; at < end; at += kBlock<T>) {
    const int64_t n = smaller(kBlock<T>, end - at);
    count -= count_equal(n, target.block(at, n), ignored);
  }
  ChunkResult result;
  result.sum = static_cast<double>(count);
  return result;
}

template <template <typename> typename Formula>
BCE_EXT_TARGET ChunkKernel select_compute_type(const Problem& problem) {
  return problem.compute_in_double ? evaluate_chunk<double, Formula<double>> : evaluate_chunk<float, Formula<float>>;
}

}  // namespace

ChunkKernel select_chunk_kernel(const Problem& problem) {
  if (problem.counts) return problem.compute_in_double ? count_valid<double> : count_valid<float>;
  switch (problem.formula) {
    case Formula::Probabilities:
      return select_compute_type<Probabilities>(problem);
    case Formula::Focal:
      return select_compute_type<Focal>(problem);
    case Formula::Asymmetric:
      return select_compute_type<Asymmetric>(problem);
    default:
      return select_compute_type<WithLogits>(problem);
  }
}

}  // namespace BCE_EXT_ISA
}  // namespace bce_ext
