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
  // The walk over at most three dimensions, in 32 bits; the outermost one needs no size.
  bool has_planes = false;  // a third dimension
  Divider<int32_t> inner, middle;
  int32_t inner_stride = 0, middle_stride = 0, outer_stride = 0;
};

// Where an element lies, in elements.
__device__ __forceinline__ int32_t find_offset(const Factor& factor, int32_t index) {
  const int32_t row = factor.inner.divide(index);
  const int32_t in_row = (index - row * factor.inner.divisor()) * factor.inner_stride;
  if (!factor.has_planes) {
    return in_row + row * factor.middle_stride;
  }
  const int32_t plane = factor.middle.divide(row);
  return in_row + (row - plane * factor.middle.divisor()) * factor.middle_stride + plane * factor.outer_stride;
}

// The value of a Constant factor.
template <typename C>
__device__ __forceinline__ C constant_value(const Factor& factor) {
  const bool given = factor.access == Access::Constant && factor.data != nullptr;
  return given ? load_element<C>(factor.data, factor.dtype, 0) : C(1);
}

// The values of elements [index, index + N) of a factor whose elements are of type F, times `values`.
template <typename F, typename C, int N>
__device__ __forceinline__ void multiply_typed(const Factor& factor, int64_t index, C (&values)[N]) {
  const F* const data = static_cast<const F*>(factor.data);
  if (factor.access == Access::Walk) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      values[k] *= to_compute<C>(data[find_offset(factor, static_cast<int32_t>(index) + k)]);
    }
    return;
  }
  const int64_t offset = factor.access == Access::Flat ? index : find_offset(factor, static_cast<int32_t>(index));
  if (factor.access == Access::Shared) {
    const C value = to_compute<C>(data[offset]);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      values[k] *= value;
    }
    return;
  }
  const auto vector = load_vector<F, N>(data, offset);
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
  if (std::is_same_v<Input, C> || factor.dtype == dtype_of<C>()) {
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
  const int64_t offset = factor.access == Access::Flat ? index : find_offset(factor, static_cast<int32_t>(index));
  return std::is_same_v<Input, C> || factor.dtype == dtype_of<C>()
             ? to_compute<C>(static_cast<const C*>(factor.data)[offset])
             : to_compute<C>(static_cast<const Input*>(factor.data)[offset]);
}

}  // namespace cuda
}  // namespace bce_ext
