// The first step of the CPU kernel: elements of an operand, converted or gathered into a buffer of the compute type.
#pragma once

#include <type_traits>

#include "../problem.h"
#include "block.h"
#include "block_transpose.h"
#include "element_types.h"

namespace bce_ext {
namespace BCE_EXT_ISA {
namespace {

template <typename T, typename S>
BCE_EXT_TARGET void convert(const S* __restrict in, int64_t n, T* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = load_as<T>(in[i]);
}

// Vector units convert 32-bit integers to floating point, 64-bit ones only from AVX-512 on; and labels are small.
template <typename T, typename S>
BCE_EXT_TARGET void convert_wide(const S* __restrict in, int64_t n, T* __restrict out) {
  // 0 for what an int32_t holds: with 2^31 added, numbers from -2^31 on have no high bits, if there are negative ones.
  constexpr uint64_t kOffset = std::is_signed_v<S> ? 0x80000000u : 0;
  constexpr int kBits = std::is_signed_v<S> ? 32 : 31;
  uint64_t high_bits = 0;
  for (int64_t i = 0; i < n; ++i) high_bits |= (static_cast<uint64_t>(in[i]) + kOffset) >> kBits;
  if (high_bits == 0) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(static_cast<int32_t>(in[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(in[i]);
  }
}

template <typename T>
BCE_EXT_TARGET __attribute__((noinline)) void fill(T value, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = value;
}

template <typename T, typename S>
BCE_EXT_TARGET void read_run(const S* in, int64_t stride, int64_t n, T* out) {
  if (stride == 1) {
    constexpr bool kIsWide = std::is_same_v<S, int64_t> || std::is_same_v<S, uint64_t>;
    if constexpr (kIsWide && BCE_EXT_VECTOR_BYTES < 64) {
      convert_wide(in, n, out);
    } else {
      convert(in, n, out);
    }
  } else if (stride == 0) {
    fill(load_as<T>(*in), n, out);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = load_as<T>(in[i * stride]);
  }
}

// Reads whole rows that are too short to be worth a run each: column by column.
template <typename T, typename S>
BCE_EXT_TARGET void read_short_rows(const S* in, int64_t row_stride, int64_t stride, int64_t rows, int64_t row,
                                    T* __restrict out) {
  if (row_stride == 1) return read_transposed(in, stride, rows, row, out);
  for (int64_t column = 0; column < row; ++column) {
    for (int64_t r = 0; r < rows; ++r) out[r * row + column] = load_as<T>(in[r * row_stride + column * stride]);
  }
}

// Where memory holds an element of the walk, and its coordinates there.
BCE_EXT_TARGET int64_t offset_of(const Problem& problem, const Operand& operand, int64_t element,
                                 int64_t (&coordinates)[kMaxDims]) {
  int64_t offset = 0;
  for (int d = problem.ndim - 1; d >= 0; --d) {
    coordinates[d] = element % problem.sizes[d];
    element /= problem.sizes[d];
    offset += coordinates[d] * operand.strides[d];
  }
  return offset;
}

// Reads the rows of a rectangle.
template <typename T, typename S>
BCE_EXT_TARGET void read_rectangle(const Problem& problem, const Operand& operand, const Chunk& chunk, T* out) {
  int64_t coordinates[kMaxDims];
  const S* in = static_cast<const S*>(operand.data) + offset_of(problem, operand, chunk.begin, coordinates);
  const int64_t row_stride = operand.strides[chunk.rows_along], stride = operand.strides[problem.ndim - 1];
  if (row_stride == 1) return read_transposed(in, stride, chunk.rows, chunk.columns, out);
  for (int64_t row = 0; row < chunk.rows; ++row) {
    read_run(in + row * row_stride, stride, chunk.columns, out + row * chunk.columns);
  }
}

// Reads the elements [begin, begin + n) of the walk, run by run along the innermost dimension.
template <typename T, typename S>
BCE_EXT_TARGET void read_strided(const Problem& problem, const Operand& operand, int64_t begin, int64_t n, T* out) {
  constexpr int64_t kShortRow = 32;
  const int last = problem.ndim - 1;
  const S* in = static_cast<const S*>(operand.data);
  int64_t coordinates[kMaxDims];
  int64_t offset = offset_of(problem, operand, begin, coordinates);
  const int64_t row = problem.sizes[last];
  const int64_t stride = operand.strides[last];
  for (;;) {
    int d = last;  // the dimension along which to step on
    int64_t steps;
    if (last > 0 && row < kShortRow && coordinates[last] == 0 && n >= row) {
      d = last - 1;
      steps = smaller(n / row, problem.sizes[d] - coordinates[d]);
      read_short_rows(in + offset, operand.strides[d], stride, steps, row, out);
      n -= steps * row;
      out += steps * row;
    } else {
      steps = smaller(n, row - coordinates[last]);
      read_run(in + offset, stride, steps, out);
      n -= steps;
      out += steps;
    }
    if (n == 0) return;
    coordinates[d] += steps;
    offset += steps * operand.strides[d];
    while (coordinates[d] == problem.sizes[d]) {
      offset -= coordinates[d] * operand.strides[d];
      coordinates[d] = 0;
      --d;
      ++coordinates[d];
      offset += operand.strides[d];
    }
  }
}

template <typename T, typename S>
BCE_EXT_TARGET void read_elements(const Problem& problem, const Operand& operand, const Chunk& chunk, T* out) {
  const S* in = static_cast<const S*>(operand.data);
  const int64_t n = chunk.numel();
  switch (operand.layout) {
    case Layout::Absent:
      return fill(T(1), n, out);
    case Layout::Scalar:
      return fill(load_as<T>(*in), n, out);
    case Layout::Flat:
      return read_run(in + chunk.begin, 1, n, out);
    case Layout::Strided:
      if (chunk.rows_along >= 0) return read_rectangle<T, S>(problem, operand, chunk, out);
      return read_strided<T, S>(problem, operand, chunk.begin, n, out);
  }
}

// Reads a chunk, or neighbours out of it; rectangles of strided operands only.
template <typename T>
BCE_EXT_TARGET void read(const Problem& problem, const Operand& operand, const Chunk& chunk, T* out) {
  switch (operand.dtype) {
    case Dtype::Bool:
      return read_elements<T, BoolBits>(problem, operand, chunk, out);
    case Dtype::UInt8:
      return read_elements<T, uint8_t>(problem, operand, chunk, out);
    case Dtype::Int8:
      return read_elements<T, int8_t>(problem, operand, chunk, out);
    case Dtype::Int16:
      return read_elements<T, int16_t>(problem, operand, chunk, out);
    case Dtype::UInt16:
      return read_elements<T, uint16_t>(problem, operand, chunk, out);
    case Dtype::Int32:
      return read_elements<T, int32_t>(problem, operand, chunk, out);
    case Dtype::UInt32:
      return read_elements<T, uint32_t>(problem, operand, chunk, out);
    case Dtype::Int64:
      return read_elements<T, int64_t>(problem, operand, chunk, out);
    case Dtype::UInt64:
      return read_elements<T, uint64_t>(problem, operand, chunk, out);
    case Dtype::Half:
      return read_elements<T, HalfBits>(problem, operand, chunk, out);
    case Dtype::BFloat16:
      return read_elements<T, BFloat16Bits>(problem, operand, chunk, out);
    case Dtype::Float:
      return read_elements<T, float>(problem, operand, chunk, out);
    case Dtype::Double:
      return read_elements<T, double>(problem, operand, chunk, out);
  }
}

}  // namespace
}  // namespace BCE_EXT_ISA
}  // namespace bce_ext
