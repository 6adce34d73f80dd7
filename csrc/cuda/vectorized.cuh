// Several neighbouring elements in one load or store.
#pragma once

#include <cstdint>

#include "element.cuh"

namespace bce_ext {
namespace cuda {

constexpr int kVectorBytes = 16;  // the widest load or store of one thread on every architecture

// N elements that are loaded and stored together; in accesses of 16 bytes where they take more.
template <typename T, int N>
struct alignas(sizeof(T) * N < kVectorBytes ? sizeof(T) * N : kVectorBytes) Vector {
  T values[N];
};

// Precondition of both: the address of element `index` is a multiple of alignof(Vector<T, N>).
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> load_vector(const void* data, int64_t index) {
  return *reinterpret_cast<const Vector<T, N>*>(static_cast<const T*>(data) + index);
}

// Stores the N computed values, each rounded to T.
template <typename T, int N, typename C>
__device__ __forceinline__ void store_vector(void* data, int64_t index, const C (&values)[N]) {
  Vector<T, N> vector;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    vector.values[k] = from_compute<T>(values[k]);
  }
  *reinterpret_cast<Vector<T, N>*>(static_cast<T*>(data) + index) = vector;
}

// Whether an array can be read and written in vectors of N elements from its first element on.
template <typename T, int N>
__host__ __device__ inline bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(Vector<T, N>) == 0;
}

}  // namespace cuda
}  // namespace bce_ext
