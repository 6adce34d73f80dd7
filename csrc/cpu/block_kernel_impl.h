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
#include <limits>
#include <type_traits>

#include "../formulas.h"
#include "../problem.h"
#include "block_check.h"
#include "block_compute.h"
#include "block_kernel.h"
#include "block_select.h"
#include "block_sum.h"
#include "block_write.h"
#include "operand_reader.h"

namespace bce_ext {
namespace BCE_EXT_ISA {
namespace {

template <typename T, typename Formula>
BCE_EXT_TARGET ChunkResult evaluate_blocks(const Problem& problem, const Chunk& chunk, Summation summation) {
  OperandReader<T> input(problem, problem.input, chunk);
  TargetReader<T> target(problem, chunk);
  WeightReader<T> weight(problem, chunk);
  OperandReader<T> pos_weight(problem, problem.pos_weight, chunk);
  OutputWriter<T> loss(problem, problem.loss);
  OutputWriter<T> grad_input(problem, problem.grad_input);
  OutputWriter<T> grad_target(problem, problem.grad_target);
  const BlockKernels<T> kernels = select_kernels<T, Formula>(problem, summation);
  const bool joins_logs = summation == Summation::Joined;
  const Constants<T> constants(problem, weight.scale());

  ChunkResult result;
  alignas(kCacheLine) double lanes[kLanes<T>] = {};
  alignas(kCacheLine) double lanes_of_block[kLanes<T>] = {};
  alignas(kCacheLine) T first[kBlock<T> + kStagger<T>];
  Log1pSum<T> logarithms;
  for (Blocks<T> blocks(chunk); blocks.next();) {
    const int64_t at = blocks.begin(), n = blocks.size(), padded = round_to_lanes<T>(n);

    Block<T> block;
    block.w = kernels.needs.weight ? weight.block(at, n) : nullptr;
    block.p = kernels.needs.pos_weight ? pos_weight.block(at, n) : nullptr;
    block.first = first;
    block.lanes = lanes_of_block;
    block.ahead = {input.ahead(at + n), target.ahead(at + n), weight.ahead(at + n), pos_weight.ahead(at + n)};
    if (kernels.in_place != nullptr && n == padded) {
      block.x = input.place(at);
      block.y = target.place(at);
      block.grad_input = grad_input.place(at);
      block.grad_past_caches = grad_input.goes_past_caches(block.grad_input);
      kernels.in_place(n, constants, block);
      if (problem.checks_labels && problem.label_codes == nullptr && !result.invalid) {
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
          kernels.of_hard != nullptr && (problem.target.dtype == Dtype::Bool || are_hard_labels(n, y));
      if (n != padded) {
        kernels.of_last(padded, constants, block);
      } else {
        (has_hard_labels ? kernels.of_hard : kernels.converted)(n, constants, block);
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
      logarithms.add(first, padded, lanes);
    } else if (problem.reduce && (summation == Summation::OfStored || n != padded)) {
      fill(T(0), padded - n, block.loss + n);
      accumulate(block.loss, padded, lanes_of_block);
    }
    move_to(lanes, lanes_of_block);
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
BCE_EXT_TARGET ChunkResult evaluate_chunk(const Problem& problem, const Chunk& chunk) {
  const bool stores = !problem.reduce || problem.loss.data != nullptr || problem.grad_target.data != nullptr;
  if (!stores) {
    const bool is_weighted = problem.weight.layout != Layout::Absent || problem.pos_weight.layout != Layout::Absent ||
                             problem.grad_output.layout != Layout::Absent;
    const bool joins_logs = Formula::kJoinsLogarithms && !is_weighted;
    const ChunkResult result =
        evaluate_blocks<T, Formula>(problem, chunk, joins_logs ? Summation::Joined : Summation::InRegisters);
    // Something infinite makes a summand NaN where it has no weight, and sums of four may be too large for T.
    if (std::isfinite(result.sum)) return result;
  }
  return evaluate_blocks<T, Formula>(problem, chunk, Summation::OfStored);
}

template <typename Byte>
BCE_EXT_TARGET ChunkResult count_valid_bytes(const Problem& problem, const Chunk& chunk) {
  const int64_t begin = chunk.begin, end = begin + chunk.numel();
  // As the kernels of losses compare it.
  const double ignored = problem.compute_in_double ? problem.ignore_index : static_cast<float>(problem.ignore_index);
  const bool is_byte = ignored >= std::numeric_limits<Byte>::min() && ignored <= std::numeric_limits<Byte>::max() &&
                       ignored == static_cast<Byte>(ignored);
  const int byte = is_byte ? static_cast<uint8_t>(static_cast<Byte>(ignored)) : -1;
  const auto* const bytes = static_cast<const uint8_t*>(problem.target.data);
  constexpr int64_t kMost = 128 * BCE_EXT_VECTOR_BYTES;
  ChunkResult result;
  result.sum = static_cast<double>(end - begin);
  for (int64_t at = begin; is_byte && at < end; at += kMost) {
    result.sum -= static_cast<double>(count_equal_bytes(smaller(kMost, end - at), bytes + at, byte));
  }
  if (problem.label_codes != nullptr) {
    result.has_codes =
        encode_bytes(end - begin, bytes + begin, byte, problem.label_codes + begin / LabelCodes::kLabels);
  }
  return result;
}

template <typename T>
BCE_EXT_TARGET ChunkResult count_valid(const Problem& problem, const Chunk& chunk) {
  // Further than while losses are computed, as counting takes no time.
  constexpr int64_t kAheadOfCount = 4 * kBlock<T>;
  OperandReader<T> reader(problem, problem.target, chunk);
  const T ignored = static_cast<T>(problem.ignore_index);
  int64_t count = 0;
  ChunkResult result;
  result.has_codes = problem.label_codes != nullptr;
  const int64_t end = chunk.begin + chunk.numel();
  for (int64_t at = chunk.begin; at < end; at += kBlock<T>) {
    const int64_t n = smaller(kBlock<T>, end - at);
    const T* const targets = reader.block(at, n);
    if constexpr (std::is_same_v<T, float>) {
      if (result.has_codes) {
        const Stream ahead{static_cast<const char*>(reader.place(at + kAheadOfCount)), size_of(problem.target.dtype)};
        const auto valid = encode_labels(n, targets, ignored, ahead, problem.label_codes + at / LabelCodes::kLabels);
        if (valid) {
          count += *valid;
          continue;
        }
        result.has_codes = false;
      }
    }
    count += n - count_equal(n, targets, ignored);
  }
  result.sum = static_cast<double>(count);
  return result;
}

BCE_EXT_TARGET ChunkKernel select_count(const Problem& problem) {
  if (problem.target.dtype == Dtype::UInt8) return count_valid_bytes<uint8_t>;
  if (problem.target.dtype == Dtype::Int8) return count_valid_bytes<int8_t>;
  return problem.compute_in_double ? count_valid<double> : count_valid<float>;
}

template <template <typename> typename Formula>
BCE_EXT_TARGET ChunkKernel select_compute_type(const Problem& problem) {
  return problem.compute_in_double ? evaluate_chunk<double, Formula<double>> : evaluate_chunk<float, Formula<float>>;
}

}  // namespace

ChunkKernel select_chunk_kernel(const Problem& problem) {
  if (problem.counts) return select_count(problem);
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
