// Whether the elements of a block are values that the formula is defined for.
#pragma once

#include <optional>

#include "../problem.h"
#include "block.h"
#include "block_kernel.h"

namespace bce_ext {
namespace BCE_EXT_ISA {
namespace {

// In [0, 1], or `ignored`, which may be NaN: none.
template <typename T>
BCE_EXT_HOST_DEVICE bool is_in_unit_interval(T value, T ignored) {
  return ((value >= T(0)) & (value <= T(1))) | (value == ignored);
}

template <typename T>
BCE_EXT_HOST_DEVICE bool is_hard_label(T value, T ignored) {
  return (value == T(0)) | (value == T(1)) | (value == ignored);
}

// Whether all elements lie in [0, 1]; false for some that do, such as -0. The bits of those numbers, taken for an
// integer, are no larger than those of 1: one instruction for each register.
// Like the next function it reads up to a multiple of kLanes, to which the operands of a block are filled up with
// zeros.
template <typename T>
BCE_EXT_TARGET bool all_seem_in_unit_interval(int64_t n, const T* in) {
  using Bits = math::Bits<Numbers<T>>;
  Bits largest = 0;
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Bits bits = math::to_bits(Numbers<T>::load(in + i));
    largest = {bits.low > largest.low ? bits.low : largest.low, bits.high > largest.high ? bits.high : largest.high};
  }
  return math::all<Numbers<T>>(largest < Bits(math::to_bits(T(1)) + 1));
}

// Whether all elements are 0 or 1, the numbers that are their own square. The first few tell most soft labels.
template <typename T>
BCE_EXT_TARGET bool are_hard_labels(int64_t n, const T* in) {
  math::Bits<Numbers<T>> differences = 0;
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Numbers<T> y = in_registers(Numbers<T>::load(in + i));
    differences = differences | math::to_bits(y * y - y);
    if (i == 0 && !math::all<Numbers<T>>(differences == 0)) return false;
  }
  return math::all<Numbers<T>>(differences == 0);
}

// The index of the first element that fails, or n. `check`: a function of the element and of `ignored`.
template <typename T, bool (*check)(T, T)>
BCE_EXT_TARGET int64_t first_invalid(int64_t n, const T* in, T ignored) {
  int invalid = 0;
  for (int64_t i = 0; i < n; ++i) invalid |= !check(in[i], ignored);
  if (invalid == 0) return n;
  int64_t i = 0;
  while (check(in[i], ignored)) ++i;
  return i;
}

// The first of n integers that is not a label.
BCE_EXT_TARGET std::optional<InvalidElement> find_invalid_label(int64_t n, const int64_t* in) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < n; ++i) bits |= static_cast<uint64_t>(in[i]);
  if (bits <= 1) return std::nullopt;
  int64_t i = 0;
  while (in[i] == 0 || in[i] == 1) ++i;
  return InvalidElement{true, static_cast<double>(in[i])};
}

// The first element of the block that is not valid. The probability of an ignored element may have any value.
// `has_hard_labels`: all targets are known to be 0 or 1.
template <typename T, typename Formula>
BCE_EXT_TARGET std::optional<InvalidElement> find_invalid(const Problem& problem, int64_t n, const T* x, const T* y,
                                                          bool has_hard_labels, T ignored) {
  if (problem.checks_labels && !has_hard_labels) {
    const int64_t i = first_invalid<T, is_hard_label<T>>(n, y, ignored);
    if (i < n) return InvalidElement{true, static_cast<double>(y[i])};
  }
  if constexpr (Formula::kTakesProbabilities) {
    if ((has_hard_labels || all_seem_in_unit_interval(n, y)) && all_seem_in_unit_interval(n, x)) return std::nullopt;
    int64_t i = first_invalid<T, is_in_unit_interval<T>>(n, y, ignored);
    if (i < n) return InvalidElement{true, static_cast<double>(y[i])};
    constexpr T kNone = std::numeric_limits<T>::quiet_NaN();  // ignore_index is a target's value, not a probability's
    for (i = first_invalid<T, is_in_unit_interval<T>>(n, x, kNone); i < n; ++i) {
      if (y[i] != ignored && !is_in_unit_interval(x[i], kNone)) return InvalidElement{false, static_cast<double>(x[i])};
    }
  }
  return std::nullopt;
}

}  // namespace
}  // namespace BCE_EXT_ISA
}  // namespace bce_ext
