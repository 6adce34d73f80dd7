// The third step of the CPU kernel: a block of results, rounded to the type of the output.
#pragma once

#include "../problem.h"
#include "block.h"
#include "element_types.h"
#include "memory_access.h"

namespace bce_ext {
namespace BCE_EXT_ISA {
namespace {

template <typename S, typename T>
BCE_EXT_TARGET void store(const T* __restrict in, int64_t n, S* __restrict out) {
  for (int64_t i = 0; i < n; ++i) store_as(in[i], out[i]);
}

BCE_EXT_TARGET inline void copy_past_caches(const void* in, int64_t bytes, void* out) {
  using Vector __attribute__((vector_size(BCE_EXT_VECTOR_BYTES), may_alias)) = uint8_t;
  for (int64_t i = 0; i < bytes; i += sizeof(Vector)) {
    store_past_caches(*reinterpret_cast<const Vector*>(static_cast<const char*>(in) + i), static_cast<char*>(out) + i);
  }
}

template <typename T>
class OutputWriter {
 public:
  BCE_EXT_TARGET OutputWriter(const Problem& problem, const Output& output)
      : output_(output), past_caches_(problem.past_caches) {}

  // Where to put the n elements from `begin` on, rounded up to a multiple of kLanes.
  BCE_EXT_TARGET T* block(int64_t begin, int64_t n) {
    const bool in_place = output_.data != nullptr && output_.dtype == dtype_of<T>() && n % kLanes<T> == 0;
    return in_place ? static_cast<T*>(output_.data) + begin : buffer_;
  }

  // Where memory holds an element of the output; null where it is not wanted.
  BCE_EXT_TARGET void* place(int64_t begin) const {
    return output_.data == nullptr ? nullptr : static_cast<char*>(output_.data) + begin * size_of(output_.dtype);
  }

  // Whether a block that begins here is written past the caches: in the output, that is, and where it is aligned.
  BCE_EXT_TARGET bool goes_past_caches(const void* block) const {
    return past_caches_ && block != buffer_ && is_aligned(block);
  }

  BCE_EXT_TARGET void finish(const T* block, int64_t begin, int64_t n) const {
    if (output_.data == nullptr || block != buffer_) return;
    switch (output_.dtype) {
      case Dtype::Half:
        return write<HalfBits>(n, begin);
      case Dtype::BFloat16:
        return write<BFloat16Bits>(n, begin);
      case Dtype::Double:
        return write<double>(n, begin);
      default:
        return write<float>(n, begin);
    }
  }

 private:
  BCE_EXT_TARGET static bool is_aligned(const void* block) {
    return reinterpret_cast<uintptr_t>(block) % BCE_EXT_VECTOR_BYTES == 0;
  }

  // The buffer to the output.
  template <typename S>
  BCE_EXT_TARGET void write(int64_t n, int64_t begin) const {
    S* const out = static_cast<S*>(output_.data) + begin;
    const int64_t bytes = n * sizeof(S);
    if (!past_caches_ || !is_aligned(out) || bytes % BCE_EXT_VECTOR_BYTES != 0) return store(buffer_, n, out);
    alignas(kCacheLine) S rounded[kBlock<T>];
    store(buffer_, n, rounded);
    copy_past_caches(rounded, bytes, out);
  }

  const Output& output_;
  const bool past_caches_;
  alignas(kCacheLine) T buffer_[kBlock<T> + kStagger<T>];
};

}  // namespace
}  // namespace BCE_EXT_ISA
}  // namespace bce_ext
