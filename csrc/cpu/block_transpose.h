// Rows of numbers whose columns are neighbours in memory: element c of row r is in[r + c * stride].
#pragma once

#include <type_traits>

#include "block.h"
#include "element_types.h"

namespace bce_ext {
namespace BCE_EXT_ISA {
namespace {

// Few columns, each of them one stretch of memory. Compilers know how to shuffle a number that is known to them.
template <int64_t kColumns, typename T, typename S>
BCE_EXT_TARGET void interleave(const S* __restrict in, int64_t stride, int64_t rows, T* __restrict out) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < kColumns; ++c) out[row * kColumns + c] = load_as<T>(in[row + c * stride]);
  }
}

// Few rows, all of them in one stretch of memory.
template <int64_t kRows, typename T, typename S>
BCE_EXT_TARGET void deinterleave(const S* __restrict in, int64_t columns, T* __restrict out) {
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t r = 0; r < kRows; ++r) out[r * columns + column] = load_as<T>(in[column * kRows + r]);
  }
}

// The numbers of two vectors, those of the second counted on from those of the first. GCC 11 knows one of the names,
// Clang the other.
#if defined(__clang__)
#define BCE_EXT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define BCE_EXT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (typename Four<T>::Places{__VA_ARGS__}))
#endif

template <typename T>
struct Four {
  using Vector __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias)) = T;
  using Places __attribute__((vector_size(4 * sizeof(T)))) = typename math::FloatFormat<T>::Bits;
};

// Four columns of four numbers become four rows, `stride` apart.
template <typename T>
BCE_EXT_TARGET void transpose_four(const T* const (&columns)[4], int64_t stride, T* out) {
  using Vector = typename Four<T>::Vector;
  const Vector a = *reinterpret_cast<const Vector*>(columns[0]), b = *reinterpret_cast<const Vector*>(columns[1]);
  const Vector c = *reinterpret_cast<const Vector*>(columns[2]), d = *reinterpret_cast<const Vector*>(columns[3]);
  const Vector ab_low = BCE_EXT_SHUFFLE(a, b, 0, 4, 1, 5), ab_high = BCE_EXT_SHUFFLE(a, b, 2, 6, 3, 7);
  const Vector cd_low = BCE_EXT_SHUFFLE(c, d, 0, 4, 1, 5), cd_high = BCE_EXT_SHUFFLE(c, d, 2, 6, 3, 7);
  *reinterpret_cast<Vector*>(out) = BCE_EXT_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
  *reinterpret_cast<Vector*>(out + stride) = BCE_EXT_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
  *reinterpret_cast<Vector*>(out + 2 * stride) = BCE_EXT_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
  *reinterpret_cast<Vector*>(out + 3 * stride) = BCE_EXT_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
}

#undef BCE_EXT_SHUFFLE

// kRows of the rows: at most what a cache line holds of each column, so that it is used while it is there.
template <int64_t kRows, typename T, typename S>
BCE_EXT_TARGET void transpose(const S* in, int64_t stride, int64_t columns, T* __restrict out) {
  constexpr int64_t kAhead = 16;
  int64_t column = 0;
  for (; column + 4 <= columns; column += 4) {
    T converted[4][kRows];
    const T* at[4];
    for (int64_t c = 0; c < 4; ++c) {
      const S* const from = in + (column + c) * stride;
      if (column + kAhead < columns) __builtin_prefetch(from + kAhead * stride);
      if constexpr (std::is_same_v<S, T>) {
        at[c] = from;
      } else {
        for (int64_t row = 0; row < kRows; ++row) converted[c][row] = load_as<T>(from[row]);
        at[c] = converted[c];
      }
    }
    for (int64_t row = 0; row < kRows; row += 4) {
      transpose_four({at[0] + row, at[1] + row, at[2] + row, at[3] + row}, columns, out + row * columns + column);
    }
  }
  for (; column < columns; ++column) {
    for (int64_t row = 0; row < kRows; ++row) out[row * columns + column] = load_as<T>(in[row + column * stride]);
  }
}

// All of them, row by row.
template <typename T, typename S>
BCE_EXT_TARGET void read_transposed(const S* in, int64_t stride, int64_t rows, int64_t columns, T* __restrict out) {
  switch (columns) {
    case 2:
      return interleave<2>(in, stride, rows, out);
    case 3:
      return interleave<3>(in, stride, rows, out);
    case 4:
      return interleave<4>(in, stride, rows, out);
    case 5:
      return interleave<5>(in, stride, rows, out);
    case 6:
      return interleave<6>(in, stride, rows, out);
    case 7:
      return interleave<7>(in, stride, rows, out);
  }
  if (rows == 2 && stride == 2) return deinterleave<2>(in, columns, out);
  if (rows == 3 && stride == 3) return deinterleave<3>(in, columns, out);
  constexpr int64_t kMany = 16, kFew = 4;
  int64_t row = 0;
  for (; row + kMany <= rows; row += kMany) transpose<kMany>(in + row, stride, columns, out + row * columns);
  for (; row + kFew <= rows; row += kFew) transpose<kFew>(in + row, stride, columns, out + row * columns);
  for (; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      out[row * columns + column] = load_as<T>(in[row + column * stride]);
    }
  }
}

}  // namespace
}  // namespace BCE_EXT_ISA
}  // namespace bce_ext
