// The problem that a kernel solves, in plain C++: raw pointers, element types and strides, nothing of ATen. The host
// code fills it in (pass.cpp), the CPU and CUDA kernels read it.
#pragma once

#include <cstdint>

namespace bce_ext {

// The element types that a kernel can read. Gradients and losses are written in the four floating types only.
enum class Dtype : int8_t {
  Bool,
  UInt8,
  Int8,
  Int16,
  UInt16,
  Int32,
  UInt32,
  Int64,
  UInt64,
  Half,
  BFloat16,
  Float,
  Double,
};

constexpr bool is_integral(Dtype dtype) { return dtype < Dtype::Half; }

// Walks of more dimensions than this, after neighbours have been collapsed, are made contiguous by the host before a
// kernel sees them.
constexpr int kMaxDims = 8;

// How an operand lies in memory relative to the walk over the elements.
enum class Layout : int8_t {
  Absent,   // not given: the value is 1 everywhere
  Scalar,   // one value for all elements: data[0]
  Flat,     // element i of the walk is data[i]
  Strided,  // element with walk coordinates c is data[sum_d c[d] * strides[d]]; a stride may be 0 (broadcast) or
            // negative
};

// Something that is read: logits or probabilities, targets, weights, the incoming gradient.
struct Operand {
  const void* data = nullptr;
  Dtype dtype = Dtype::Float;
  Layout layout = Layout::Absent;
  int64_t strides[kMaxDims] = {};  // in elements, outermost dimension first; meaningful when Strided
};

// Something that is written, densely and in walk order: element i of the walk is data[i]. Null where it is not wanted.
struct Output {
  void* data = nullptr;
  Dtype dtype = Dtype::Float;
};

// Targets that are 0, 1 or ignored in two bits each, the first in the lowest ones. One that is not valid is ignored.
struct LabelCodes {
  static constexpr int64_t kLabels = 32;
  uint32_t ones, valid;
};

// What is computed of each element: see formulas.h. Its numbers are those of the internal operators.
enum class Formula : int8_t { WithLogits, Probabilities, Focal, Asymmetric };
constexpr int kFormulas = 4;

// The most parameters that a formula has.
constexpr int kMaxParameters = 5;

// One elementwise pass. For each element, with x, y, w, p, g read from the operands (absent: 1) and (loss, grad_input,
// grad_target) the terms of formulas.h for the weight w * g:
//   output loss         = loss
//   sum                += loss                (when `reduce`)
//   output grad_input   = scale * grad_input
//   output grad_target  = scale * grad_target
// The order of the sum is decided by numel and layouts on a CPU, by dtypes and alignment as well on a GPU.
// The target y is first what memory holds. Where that equals `ignore_index`, all three terms are 0 whatever the other
// operands are; elsewhere y becomes y * (1 - label_smoothing) + label_smoothing / 2.
// The walk visits the elements in the order in which the outputs lie in memory.
struct Problem {
  Formula formula = Formula::WithLogits;
  double parameters[kMaxParameters] = {};
  double label_smoothing = 0.0;
  double ignore_index = 0.0;
  bool ignores = false;        // whether there is an ignore_index
  bool checks_labels = false;  // an integer target that is neither 0 nor 1 nor ignored is an error; bools are labels

  bool compute_in_double = false;  // float64 arithmetic; float32 otherwise
  bool reduce = false;
  bool counts = false;       // sum the number of elements that are not ignored instead; a CPU kernel of its own
  bool past_caches = false;  // a CPU should write outputs past its caches, where it can

  // Gradients and the reduced loss are divided by divisor * normalizer, where the latter is one value in the memory of
  // the device, or Absent. The CPU kernel leaves the division of the loss to its caller, and takes the normalizer as a
  // part of the divisor.
  double divisor = 1.0;
  Operand normalizer;

  int64_t numel = 0;
  int ndim = 0;                  // of the collapsed walk; 0 or 1 when every operand is Flat, Scalar or Absent
  int64_t sizes[kMaxDims] = {};  // outermost first

  Operand input, target, weight, pos_weight, grad_output;
  LabelCodes* label_codes = nullptr;  // the target once more, for a CPU: written by a count, read by another pass
  Output loss, grad_input, grad_target;

  bool adjusts_target() const { return ignores || label_smoothing != 0.0; }
};

}  // namespace bce_ext
