// Several neighbouring elements in one load or store.
#pragma once

#include <cstdint>

#include "../number.h"
#include "element.cuh"

namespace bce_ext {
namespace cuda {

constexpr int kVectorBytes = 16;  // the widest load or store of one thread on every architecture

// N elements that are loaded and stored together; in accesses of 16 bytes where they take more.
template <typename T, int N>
struct alignas(sizeof(T) * N < kVectorBytes ? sizeof(T) * N : kVectorBytes) Vector {
  T values[N];
};

// Precondition of all: the address of element `index` is a multiple of alignof(Vector<T, N>).
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> load_vector(const void* data, int64_t index) {
  return *reinterpret_cast<const Vector<T, N>*>(static_cast<const T*>(data) + index);
}

// The same to be kept for a while: in words, as a compiler takes what is smaller apart wherever it is kept.
template <typename T, int N>
class Packed {
 public:
  Packed() = default;
  __device__ __forceinline__ Packed(const void* data, int64_t index)
      : words_(load_vector<Word, kWords>(static_cast<const T*>(data) + index, 0)) {}

  // Element k as the type computed in.
  template <typename C>
  __device__ __forceinline__ C value(int k) const {
    if constexpr (!kHasParts) {
      T value;
      memcpy(&value, reinterpret_cast<const char*>(&words_) + k * sizeof(T), sizeof(T));
      return to_compute<C>(value);
    } else {
      const uint32_t word = words_.values[k * sizeof(T) / sizeof(uint32_t)];
      const int shift = 8 * (k * sizeof(T) % sizeof(uint32_t));
      if constexpr (std::is_same_v<T, Boolean>) {
        return (word & (0xffu << shift)) != 0 ? C(1) : C(0);
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return C(math::from_bits<float>(shift == 0 ? word << 16 : word & 0xffff0000u));
      } else {
        const auto bits = static_cast<std::conditional_t<sizeof(T) == 1, uint8_t, uint16_t>>(word >> shift);
        T value;
        memcpy(&value, &bits, sizeof(T));
        return to_compute<C>(value);
      }
    }
  }

 private:
  static constexpr bool kHasParts = sizeof(T) < sizeof(uint32_t) && sizeof(T) * N % sizeof(uint32_t) == 0;
  using Word = std::conditional_t<kHasParts, uint32_t, T>;
  static constexpr int kWords = sizeof(T) * N / sizeof(Word);

  Vector<Word, kWords> words_;
};

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
