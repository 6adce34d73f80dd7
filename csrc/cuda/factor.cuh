// weight, pos_weight and grad_output as the vector kernel reads them.
#pragma once

#include "divider.cuh"
#include "vectorized.cuh"

namespace bce_ext {
namespace cuda {

// How the values of N neighbouring elements of the walk lie in memory.
enum class Access : int8_t {
  Constant,  // one value for all elements of the problem, or none at all: read before the walk
  Flat,      // N neighbours, at the index of the walk
  Row,       // N neighbours, at the offset of the first: [C] on the last dimension
  Shared,    // one value for all N: [C, 1, 1] on channels
  Walk,      // anything else of at most three dimensions, element by element
};

struct Factor {
  const void* data = nullptr;
  Dtype dtype = Dtype::Float;
  Access access = Access::Constant;
  // The walk over at most three dimensions; the outermost one needs no size.
  Divider inner, middle;
  int64_t inner_stride = 0, middle_stride = 0, outer_stride = 0;
};

// Where an element lies: its coordinates in the two inner dimensions, and its offset in elements.
struct Position {
  int64_t inner, middle, offset;
};

__device__ __forceinline__ Position find_position(const Factor& factor, int64_t index) {
  const int64_t row = factor.inner.divide(index);
  const int64_t plane = factor.middle.divide(row);
  Position position;
  position.inner = index - row * factor.inner.divisor();
  position.middle = row - plane * factor.middle.divisor();
  position.offset =
      position.inner * factor.inner_stride + position.middle * factor.middle_stride + plane * factor.outer_stride;
  return position;
}

// Moves on to the next element of the walk.
__device__ __forceinline__ void advance(const Factor& factor, Position& position) {
  position.inner += 1;
  position.offset += factor.inner_stride;
  if (position.inner == factor.inner.divisor()) {
    position.inner = 0;
    position.offset += factor.middle_stride - factor.inner.divisor() * factor.inner_stride;
    position.middle += 1;
    if (position.middle == factor.middle.divisor()) {
      position.middle = 0;
      position.offset += factor.outer_stride - factor.middle.divisor() * factor.middle_stride;
    }
  }
}

// The value of a Constant factor.
template <typename C>
__device__ __forceinline__ C constant_value(const Factor& factor) {
  const bool given = factor.access == Access::Constant && factor.data != nullptr;
  return given ? load_element<C>(factor.data, factor.dtype, 0) : C(1);
}

// The values of elements [index, index + N) of a factor whose elements are of type F, times `constant`.
template <typename F, typename C, int N>
__device__ __forceinline__ void multiply_typed(const Factor& factor, int64_t index, C (&values)[N]) {
  if (factor.access == Access::Walk) {
    Position position = find_position(factor, index);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      values[k] *= to_compute<C>(static_cast<const F*>(factor.data)[position.offset]);
      advance(factor, position);
    }
    return;
  }
  const int64_t offset = factor.access == Access::Flat ? index : find_position(factor, index).offset;
  if (factor.access == Access::Shared) {
    const C value = to_compute<C>(static_cast<const F*>(factor.data)[offset]);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      values[k] *= value;
    }
    return;
  }
  const auto vector = load_vector<F, N>(factor.data, offset);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    values[k] *= to_compute<C>(vector.values[k]);
  }
}

// Multiplies `values` by those of elements [index, index + N). A factor is of the type of the input or of the type
// computed in.
template <typename Input, typename C, int N>
__device__ __forceinline__ void multiply(const Factor& factor, int64_t index, C (&values)[N]) {
  if (factor.access == Access::Constant) {
    return;
  }
  if (factor.dtype == dtype_of<C>()) {
    multiply_typed<C>(factor, index, values);
  } else {
    multiply_typed<Input>(factor, index, values);
  }
}

// The value of one element, where no vector can be read.
template <typename Input, typename C>
__device__ __forceinline__ C factor_at(const Factor& factor, int64_t index) {
  if (factor.access == Access::Constant) {
    return C(1);
  }
  const int64_t offset = find_position(factor, index).offset;
  return factor.dtype == dtype_of<C>() ? to_compute<C>(static_cast<const C*>(factor.data)[offset])
                                       : to_compute<C>(static_cast<const Input*>(factor.data)[offset]);
}

}  // namespace cuda
}  // namespace bce_ext
