// Element types: how each is converted to the type that a kernel computes in, and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../problem.h"

namespace bce_ext {
namespace cuda {

// A bool in memory. Any byte but 0 is true, also one that did not come from a comparison (a uint8 mask viewed as bool).
struct Boolean {
  uint8_t byte;
};

// The type to compute in for an input of type T: double for double, float for all others.
template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename C, typename T>
__device__ __forceinline__ C to_compute(T value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else if constexpr (std::is_same_v<T, Boolean>) {
    return value.byte != 0 ? C(1) : C(0);
  } else {
    return static_cast<C>(value);
  }
}

// Rounded once: by way of float, a double would be rounded twice.
template <typename T, typename C>
__device__ __forceinline__ T from_compute(C value) {
  constexpr bool kIsDouble = std::is_same_v<C, double>;
  if constexpr (std::is_same_v<T, __half> && kIsDouble) {
    return __double2half(value);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16> && kIsDouble) {
    return __double2bfloat16(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16(value);
  } else {
    return static_cast<T>(value);
  }
}

// visit(T{}) for the element type T of an array that is known at run time only, which is one of the four floating
// types. `visit` is of the host or of the device.
#pragma nv_exec_check_disable
template <typename Visit>
__host__ __device__ __forceinline__ auto with_floating_type(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::Half:
      return visit(__half{});
    case Dtype::BFloat16:
      return visit(__nv_bfloat16{});
    case Dtype::Double:
      return visit(double{});
    default:
      return visit(float{});
  }
}

// The same for any element type.
#pragma nv_exec_check_disable
template <typename Visit>
__host__ __device__ __forceinline__ auto with_type(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::Bool:
      return visit(Boolean{});
    case Dtype::UInt8:
      return visit(uint8_t{});
    case Dtype::Int8:
      return visit(int8_t{});
    case Dtype::Int16:
      return visit(int16_t{});
    case Dtype::UInt16:
      return visit(uint16_t{});
    case Dtype::Int32:
      return visit(int32_t{});
    case Dtype::UInt32:
      return visit(uint32_t{});
    case Dtype::Int64:
      return visit(int64_t{});
    case Dtype::UInt64:
      return visit(uint64_t{});
    default:
      return with_floating_type(dtype, visit);
  }
}

// Element `index` of an array whose type is known at run time only.
template <typename C>
__device__ __forceinline__ C load_element(const void* data, Dtype dtype, int64_t index) {
  return with_type(dtype, [=](auto zero) { return to_compute<C>(static_cast<const decltype(zero)*>(data)[index]); });
}

// Stores to element `index` of an array of one of the four floating types.
template <typename C>
__device__ __forceinline__ void store_element(const Output& output, int64_t index, C value) {
  with_floating_type(output.dtype, [=](auto zero) {
    static_cast<decltype(zero)*>(output.data)[index] = from_compute<decltype(zero)>(value);
  });
}

// The Dtype of an element type, and the size of an element.
template <typename T>
constexpr Dtype dtype_of() {
  if constexpr (std::is_same_v<T, Boolean>) {
    return Dtype::Bool;
  } else if constexpr (std::is_same_v<T, uint8_t>) {
    return Dtype::UInt8;
  } else if constexpr (std::is_same_v<T, int64_t>) {
    return Dtype::Int64;
  } else if constexpr (std::is_same_v<T, __half>) {
    return Dtype::Half;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return Dtype::BFloat16;
  } else if constexpr (std::is_same_v<T, float>) {
    return Dtype::Float;
  } else {
    static_assert(std::is_same_v<T, double>, "no vector path for this type");
    return Dtype::Double;
  }
}

}  // namespace cuda
}  // namespace bce_ext
