// The second stage of the sum, the scaling of a stored gradient, and the number of elements that are not ignored.
#pragma once

#include "block_reduce.cuh"
#include "vector_kernel.cuh"

namespace bce_ext {
namespace cuda {

constexpr int kSumThreads = 512;

// result = (sum of partials) / (divisor * normalizer), in an order that depends on their number alone. One block.
static __global__ void __launch_bounds__(kSumThreads)
    final_sum_kernel(const double* partials, int64_t num_partials, double divisor, Operand normalizer, Output result) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < num_partials; i += kSumThreads) {
    sum += partials[i];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    if (normalizer.layout != Layout::Absent) {
      divisor *= load_element<double>(normalizer.data, normalizer.dtype, 0);
    }
    store_element(result, 0, sum / divisor);
  }
}

// grad *= grad_output, where grad_output is one value on the device. When it is 1, which is the rule, nothing is read
// or written.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(T* grad, int64_t numel, const void* grad_output, Dtype grad_output_dtype) {
  using C = compute_t<T>;
  constexpr int N = kVectorBytes / sizeof(T);
  const C factor = load_element<C>(grad_output, grad_output_dtype, 0);
  if (factor == C(1)) {
    return;
  }
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t num_vectors = is_aligned<T, N>(grad) ? numel / N : 0;
  for (int64_t i = first; i < num_vectors; i += num_threads) {
    const auto vector = load_vector<T, N>(grad, i * N);
    C scaled[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      scaled[k] = factor * to_compute<C>(vector.values[k]);
    }
    store_vector<T>(grad, i * N, scaled);
  }
#pragma unroll 1
  for (int64_t i = num_vectors * N + first; i < numel; i += num_threads) {
    grad[i] = from_compute<T>(factor * to_compute<C>(grad[i]));
  }
}

// The type in which labels of type T are compared.
template <typename T>
using label_t = std::conditional_t<std::is_arithmetic_v<T>, T, float>;

// Per block, the number of elements that do not equal ignore_index.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    count_valid_kernel(const T* target, int64_t numel, double ignore_index, double* partials) {
  using Label = label_t<T>;
  constexpr int N = kVectorBytes / sizeof(T);
  const Label label = static_cast<Label>(ignore_index);
  const bool exists = static_cast<double>(label) == ignore_index;  // or else no element can equal it
  const auto is_valid = [=](T value) { return !exists || to_compute<Label>(value) != label; };
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t num_vectors = is_aligned<T, N>(target) ? numel / N : 0;
  int64_t count = 0;
#pragma unroll 1
  for (int64_t i = first; i < num_vectors; i += num_threads) {
    const auto vector = load_vector<T, N>(target, i * N);
    int of_vector = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      of_vector += is_valid(vector.values[k]);
    }
    count += of_vector;
  }
#pragma unroll 1
  for (int64_t i = num_vectors * N + first; i < numel; i += num_threads) {
    count += is_valid(target[i]);
  }
  const double sum = block_sum(static_cast<double>(count));
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum;
  }
}

}  // namespace cuda
}  // namespace bce_ext
