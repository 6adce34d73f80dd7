// The second step of the CPU kernel for sums over probabilities, in which elements share logarithms.
#pragma once

#include "../formulas.h"
#include "block_compute.h"

namespace bce_ext {
namespace BCE_EXT_ISA {
namespace {

// Four vectors have one logarithm.
template <typename T>
constexpr int64_t kJoined = 4 * kLanes<T>;
static_assert(kBlock<float> % kJoined<float> == 0 && kBlock<double> % kJoined<double> == 0);

// The losses of four vectors, from x and y on, as one vector, but for what soft labels say for the other label: its
// odds go to `odds`. False where a logarithm may be bounded.
template <Labels kLabels, typename T, typename Formula>
BCE_EXT_TARGET bool join_logarithms(const Formula& formula, const T* x, const T* y, Numbers<T>& sum, T* odds) {
  Share<Numbers<T>> shares[4];
  for (int64_t part = 0; part < 4; ++part) {
    const int64_t at = part * kLanes<T>;
    const auto q = in_registers(Numbers<T>::load(x + at)), target = in_registers(Numbers<T>::load(y + at));
    shares[part] = formula.share_of_nearer(q, target);
    if constexpr (kLabels != Labels::Hard) lifted_odds(shares[part]).store(odds + at);
  }
  return math::all<Numbers<T>>(bce_ext::join_logarithms(shares, sum));
}

// Those losses of a block: as a vector for each kJoined elements, or added where they are all there is. What has no
// place among four vectors, or may be bounded, is computed one by one, and has even odds.
template <Labels kLabels, typename T, typename Formula>
BCE_EXT_TARGET __attribute__((noinline)) void sum_nearer(const Formula& formula, int64_t n, const Block<T>& block,
                                                         T* sums) {
  const auto* const x = static_cast<const T*>(block.x);
  const auto* const y = static_cast<const T*>(block.y);
  for (int64_t i = 0; i < n; i += kJoined<T>) {
    const int64_t end = smaller(n, i + kJoined<T>);
    for (int64_t at = i; at < end; at += kLanes<T>) {
      prefetch<T>(block.ahead.x, at);
      if constexpr (kLabels == Labels::Hard) prefetch<T>(block.ahead.y, at);
    }
    Numbers<T> sum;
    if (end - i < kJoined<T> || !join_logarithms<kLabels, T>(formula, x + i, y + i, sum, block.first + i)) {
      sum = T(0);
      for (int64_t at = i; at < end; at += kLanes<T>) {
        const Numbers<T> q = Numbers<T>::load(x + at), target = Numbers<T>::load(y + at);
        sum = sum + formula.evaluate(q, target, One{}, One{}, Numbers<T>(T(1)), formula.first_stage(q)).summand;
        if constexpr (kLabels != Labels::Hard) Numbers<T>(math::power_of_two<T>(kOddsLift)).store(block.first + at);
      }
    }
    if constexpr (kLabels == Labels::Hard) {
      add_to_lanes<T>(sum, block.lanes);
    } else {
      sum.store(sums + i / 4);
    }
  }
}

// Adds to those losses what soft labels say for the other label. Computes the gradient, if it is wanted.
template <typename T, typename Formula, int kGradient>
BCE_EXT_TARGET void add_minor(const Formula& formula, int64_t n, const Constants<T>& constants, const Block<T>& block,
                              const T* sums) {
  const Numbers<T> scale = constants.scale, unused = T(0);
  for (int64_t i = 0; i < n;) {
    Numbers<T> sum = Numbers<T>::load(sums + i / 4);
    for (const int64_t end = smaller(n, i + kJoined<T>); i < end; i += kLanes<T>) {
      prefetch<T>(block.ahead.y, i);
      const auto target = in_registers(Numbers<T>::load(static_cast<const T*>(block.y) + i));
      sum = sum - minor_term(in_registers(Numbers<T>::load(block.first + i)), target);
      if constexpr (kGradient != 0) {
        const auto q = in_registers(Numbers<T>::load(static_cast<const T*>(block.x) + i));
        const auto terms = formula.evaluate(q, target, One{}, One{}, scale, unused);
        store(terms.grad_input, static_cast<T*>(block.grad_input) + i, block.grad_past_caches);
      }
    }
    add_to_lanes<T>(sum, block.lanes);
  }
}

// The sum of the losses of a block, and the gradient if it is wanted.
template <typename T, typename Formula, int kGradient, Labels kLabels>
BCE_EXT_TARGET void compute_probabilities(int64_t n, const Constants<T>& constants, const Block<T>& block) {
  const Formula formula(constants.parameters);
  if constexpr (kLabels == Labels::Hard) {
    sum_nearer<kLabels, T>(formula, n, block, nullptr);
    if constexpr (kGradient != 0) compute<T, Formula, kGradient | kFetched, false, false>(n, constants, block);
  } else {
    alignas(kCacheLine) T sums[kBlock<T> / 4];
    sum_nearer<kLabels, T>(formula, n, block, sums);
    add_minor<T, Formula, kGradient>(formula, n, constants, block, sums);
  }
}

}  // namespace
}  // namespace BCE_EXT_ISA
}  // namespace bce_ext
