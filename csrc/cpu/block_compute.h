// The second step of the CPU kernel: losses and gradients of a block.
#pragma once

#include <type_traits>

#include "../formulas.h"
#include "block_read.h"

namespace bce_ext {
namespace BCE_EXT_ISA {
namespace {

enum Wanted {
  kLoss = 1,
  kGradInput = 2,
  kGradTarget = 4,
  kLinearSum = 8,    // WithLogits: instead of storing losses, add their linear parts, as Log1pSum adds the logarithms
  kPastCaches = 16,  // writes the gradient past the caches
};

// What the next block will read. Fetched while this one is computed: by itself the processor looks no further than to
// the end of a page, which is as long as a block.
struct Ahead {
  Stream x, y, w, p;
};

template <typename T>
BCE_EXT_TARGET void prefetch(const Stream& stream, int64_t begin) {
  constexpr int64_t kCacheLine = 64 / sizeof(T);
  for (int64_t i = 0; i < kLanes<T>; i += kCacheLine) stream.prefetch(begin + i);
}

template <bool kIsGiven, typename T>
BCE_EXT_HOST_DEVICE auto load_or_one(const T* in) {
  if constexpr (kIsGiven) {
    return Numbers<T>::load(in);
  } else {
    (void)in;
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

// `first` receives what the first stage computes, `lanes` the sums for kLinearSum.
template <typename T>
using Compute = void (*)(int64_t n, const T* x, const T* y, const T* w, const T* p, T scale, const Ahead& ahead,
                         T* first, T* loss, T* grad_input, T* grad_target, double* lanes);

template <typename T, typename Formula, int kWanted, bool kHasWeight, bool kHasPosWeight>
BCE_EXT_TARGET void compute(int64_t n, const T* __restrict x, const T* __restrict y, const T* __restrict w,
                            const T* __restrict p, T scale, const Ahead& ahead, T* __restrict first, T* __restrict loss,
                            T* __restrict grad_input, T* __restrict grad_target, double* __restrict lanes) {
  const Ahead next = ahead;
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    prefetch<T>(next.x, i);
    prefetch<T>(next.y, i);
    Formula::first_stage(Numbers<T>::load(x + i)).store(first + i);
  }
  const Numbers<T> scales = scale;
  // Four linear parts are added in T, which costs at most three roundings of T and saves conversions to float64.
  constexpr int64_t kGroup = (kWanted & kLinearSum) != 0 ? 4 * kLanes<T> : kBlock<T>;
  for (int64_t i = 0; i < n;) {
    Numbers<T> linear = T(0);
    for (const int64_t end = smaller(n, i + kGroup); i < end; i += kLanes<T>) {
      if constexpr (kHasWeight) prefetch<T>(next.w, i);
      if constexpr (kHasPosWeight) prefetch<T>(next.p, i);
      Numbers<T> weight = T(1);
      if constexpr (kHasWeight) weight = Numbers<T>::load(w + i);
      const Terms<Numbers<T> > terms =
          Formula::evaluate(Numbers<T>::load(x + i), Numbers<T>::load(y + i), weight, load_or_one<kHasPosWeight>(p + i),
                            scales, Numbers<T>::load(first + i));
      if constexpr ((kWanted & kLoss) != 0) terms.loss.store(loss + i);
      if constexpr ((kWanted & kLinearSum) != 0) linear = linear + terms.linear;
      if constexpr ((kWanted & kPastCaches) != 0) {
        terms.grad_input.store_past_caches(grad_input + i);
      } else if constexpr ((kWanted & kGradInput) != 0) {
        terms.grad_input.store(grad_input + i);
      }
      if constexpr ((kWanted & kGradTarget) != 0) terms.grad_target.store(grad_target + i);
    }
    if constexpr ((kWanted & kLinearSum) != 0) add_to_lanes<T>(linear, lanes);
  }
}

template <typename T, typename Formula, bool kHasWeight, bool kHasPosWeight>
BCE_EXT_TARGET Compute<T> select_wanted(int wanted) {
  switch (wanted) {
    case kLoss:
      return compute<T, Formula, kLoss, kHasWeight, kHasPosWeight>;
    case kGradInput:
      return compute<T, Formula, kGradInput, kHasWeight, kHasPosWeight>;
    case kGradTarget:
      return compute<T, Formula, kGradTarget, kHasWeight, kHasPosWeight>;
    case kLoss | kGradInput:
      return compute<T, Formula, kLoss | kGradInput, kHasWeight, kHasPosWeight>;
    case kGradInput | kGradTarget:
      return compute<T, Formula, kGradInput | kGradTarget, kHasWeight, kHasPosWeight>;
    default:
      return compute<T, Formula, kLoss | kGradInput | kGradTarget, kHasWeight, kHasPosWeight>;
  }
}

template <typename T, typename Formula>
BCE_EXT_TARGET Compute<T> select_compute(int wanted, bool has_weight, bool has_pos_weight) {
  if constexpr (std::is_same_v<Formula, WithLogits>) {
    if (wanted == kLinearSum) return compute<T, Formula, kLinearSum, false, false>;
    if (wanted == (kLinearSum | kGradInput)) return compute<T, Formula, kLinearSum | kGradInput, false, false>;
    if (wanted == (kLinearSum | kGradInput | kPastCaches)) {
      return compute<T, Formula, kLinearSum | kGradInput | kPastCaches, false, false>;
    }
    if (has_pos_weight) {
      return has_weight ? select_wanted<T, Formula, true, true>(wanted)
                        : select_wanted<T, Formula, false, true>(wanted);
    }
  }
  return has_weight ? select_wanted<T, Formula, true, false>(wanted) : select_wanted<T, Formula, false, false>(wanted);
}

template <typename T>
BCE_EXT_TARGET void multiply(int64_t n, const T* a, const T* b, T* __restrict out) {
  n &= ~(kLanes<T> - 1);
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] * b[i];
}

template <typename T>
BCE_EXT_TARGET bool all_in_unit_interval(int64_t n, const T* q) {
  int outside = 0;
  for (int64_t i = 0; i < n; ++i) outside |= !(q[i] >= T(0)) | !(q[i] <= T(1));
  return outside == 0;
}

}  // namespace
}  // namespace BCE_EXT_ISA
}  // namespace bce_ext
