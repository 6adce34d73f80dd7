// From tensors to the Problem that a kernel solves: the order in which the elements are walked, and how every operand
// lies relative to it.
#pragma once

#include <c10/util/SmallVector.h>

#include "ops.h"

namespace bce_ext {

// One pass over the elements. Holds the tensors that the pointers of `problem` look into.
class Pass {
 public:
  // `dtype`: of the loss, or of grad_output, which is null in the forward direction. `like`: what the outputs have the
  // memory order of.
  Pass(const Arguments& arguments, at::ScalarType dtype, int64_t divisor, const Tensor& like,
       const Tensor* grad_output = nullptr);

  // The sizes and strides of the outputs, which are dense.
  at::IntArrayRef sizes() const { return input_.sizes(); }
  at::IntArrayRef strides() const { return strides_; }

  Problem problem;

 private:
  struct Binding {
    Operand* operand;
    Tensor tensor;
  };

  void set_options(const Arguments& arguments);
  void bind(Operand& operand, const Tensor& tensor);
  void bind_normalizer(const OptionalTensor& normalizer);
  bool bind_flat(const Binding& binding) const;
  void plan_strided();
  void make_flat(Binding& binding) const;

  const Tensor& input_;
  c10::SmallVector<int64_t, 6> strides_;
  c10::SmallVector<Binding, 5> bindings_;
  Tensor normalizer_;
};

// What a kernel writes to: a tensor of one of the four floating types.
Output output_of(const Tensor& tensor);
// Whether elements lie at multiples of their size, as kernels need it. Memory that came from elsewhere may not.
bool is_aligned(const Tensor& tensor);
// The tensor itself, or a copy where kernels do not know its type or it is not aligned.
Tensor readable(const Tensor& tensor);
// A number as a target of this dtype holds it: 0.1 is another one in float32.
double as_label(double number, at::ScalarType dtype);
// What a kernel reads as it lies in memory, element by element.
Operand flat_operand(const Tensor& tensor);

}  // namespace bce_ext
