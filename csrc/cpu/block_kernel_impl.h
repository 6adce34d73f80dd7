// The body of the CPU kernel, compiled once per instruction set: a file block_kernel_<isa>.cpp defines BCE_EXT_ISA, a
// namespace, BCE_EXT_TARGET, the function attribute that selects the instructions, and BCE_EXT_VECTOR_BYTES, the width
// of their registers, and includes this.
//
// Every function here that is not inlined carries BCE_EXT_TARGET and is local to its file. Compiling the files
// themselves for a newer machine would let inline functions of the standard library, which the linker shares among all
// files, use its instructions everywhere. No lambdas: they do not take the attribute of the function around them.
//
// A chunk is worked through in blocks that stay in the first-level cache, each in separate steps: read (convert or
// gather operands into buffers of the compute type), compute, write, sum. Operands and outputs that lie in memory as
// the computation wants them are used in place.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../bce_math.h"
#include "../problem.h"
#include "block_kernel.h"
#include "element_types.h"
#include "pack.h"

namespace bce_ext {
namespace BCE_EXT_ISA {
namespace {

template <typename T>
using Numbers = Pack<T, BCE_EXT_VECTOR_BYTES>;

template <typename T>
constexpr int64_t kBlock = 4096 / sizeof(T);
// Computations run over a multiple of this many elements, so that no loop needs a remainder. It is also the number of
// partial sums.
template <typename T>
constexpr int64_t kLanes = Numbers<T>::kElements;
// Lies between buffers of a block, lest all of a loop's streams have the same place in a page: processors tell accesses
// apart by that first, and take a load for one of what was just stored.
template <typename T>
constexpr int64_t kStagger = 256 / sizeof(T);

BCE_EXT_HOST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
template <typename T>
BCE_EXT_HOST_DEVICE int64_t round_to_lanes(int64_t n) {
  return (n + kLanes<T> - 1) & ~(kLanes<T> - 1);
}

// ---- read ----

template <typename T, typename S>
BCE_EXT_TARGET void convert(const S* __restrict in, int64_t n, T* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = load_as<T>(in[i]);
}

// Vector units convert 32-bit integers to floating point, 64-bit ones only from AVX-512 on; and labels are small.
template <typename T, typename S>
BCE_EXT_TARGET void convert_wide(const S* __restrict in, int64_t n, T* __restrict out) {
  uint64_t high_bits = 0;
  for (int64_t i = 0; i < n; ++i) high_bits |= (static_cast<uint64_t>(in[i]) + 0x80000000u) >> 32;
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
    if constexpr (std::is_same_v<S, int64_t> || std::is_same_v<S, uint64_t>) {
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
  for (int64_t column = 0; column < row; ++column) {
    for (int64_t r = 0; r < rows; ++r) out[r * row + column] = load_as<T>(in[r * row_stride + column * stride]);
  }
}

// Reads the elements [begin, begin + n) of the walk, run by run along the innermost dimension.
template <typename T, typename S>
BCE_EXT_TARGET void read_strided(const Problem& problem, const Operand& operand, int64_t begin, int64_t n, T* out) {
  constexpr int64_t kShortRow = 32;
  const int last = problem.ndim - 1;
  const S* in = static_cast<const S*>(operand.data);
  int64_t coordinates[kMaxDims];
  int64_t offset = 0;
  for (int d = last; d >= 0; --d) {
    coordinates[d] = begin % problem.sizes[d];
    begin /= problem.sizes[d];
    offset += coordinates[d] * operand.strides[d];
  }
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
BCE_EXT_TARGET void read_elements(const Problem& problem, const Operand& operand, int64_t begin, int64_t n, T* out) {
  const S* in = static_cast<const S*>(operand.data);
  switch (operand.layout) {
    case Layout::Absent:
      return fill(T(1), n, out);
    case Layout::Scalar:
      return fill(load_as<T>(*in), n, out);
    case Layout::Flat:
      return read_run(in + begin, 1, n, out);
    case Layout::Strided:
      return read_strided<T, S>(problem, operand, begin, n, out);
  }
}

template <typename T>
BCE_EXT_TARGET void read(const Problem& problem, const Operand& operand, int64_t begin, int64_t n, T* out) {
  switch (operand.dtype) {
    case Dtype::Bool:
      return read_elements<T, BoolBits>(problem, operand, begin, n, out);
    case Dtype::UInt8:
      return read_elements<T, uint8_t>(problem, operand, begin, n, out);
    case Dtype::Int8:
      return read_elements<T, int8_t>(problem, operand, begin, n, out);
    case Dtype::Int16:
      return read_elements<T, int16_t>(problem, operand, begin, n, out);
    case Dtype::UInt16:
      return read_elements<T, uint16_t>(problem, operand, begin, n, out);
    case Dtype::Int32:
      return read_elements<T, int32_t>(problem, operand, begin, n, out);
    case Dtype::UInt32:
      return read_elements<T, uint32_t>(problem, operand, begin, n, out);
    case Dtype::Int64:
      return read_elements<T, int64_t>(problem, operand, begin, n, out);
    case Dtype::UInt64:
      return read_elements<T, uint64_t>(problem, operand, begin, n, out);
    case Dtype::Half:
      return read_elements<T, HalfBits>(problem, operand, begin, n, out);
    case Dtype::BFloat16:
      return read_elements<T, BFloat16Bits>(problem, operand, begin, n, out);
    case Dtype::Float:
      return read_elements<T, float>(problem, operand, begin, n, out);
    case Dtype::Double:
      return read_elements<T, double>(problem, operand, begin, n, out);
  }
}

// The number of elements after which the values of an operand repeat: the product of the sizes inside of the outermost
// dimension with a stride.
BCE_EXT_TARGET int64_t period(const Problem& problem, const Operand& operand) {
  if (operand.layout == Layout::Absent || operand.layout == Layout::Scalar) return 1;
  if (operand.layout == Layout::Flat) return problem.numel;
  int first = 0;
  while (first < problem.ndim && operand.strides[first] == 0) ++first;
  int64_t product = 1;
  for (int d = first; d < problem.ndim; ++d) product *= problem.sizes[d];
  return product;
}

// Memory that is about to be read: `bytes` for each element.
struct Stream {
  const char* data;
  int64_t bytes;

  BCE_EXT_HOST_DEVICE void prefetch(int64_t element) const { __builtin_prefetch(data + element * bytes); }
};

// Supplies an operand of one chunk, block by block. What repeats within a block's length is read once per chunk, as a
// tile that holds every block as a contiguous stretch.
template <typename T>
class OperandReader {
 public:
  BCE_EXT_TARGET OperandReader(const Problem& problem, const Operand& operand, int64_t numel)
      : problem_(problem),
        operand_(operand),
        numel_(numel),
        period_(period(problem, operand)),
        in_place_(operand.layout == Layout::Flat && operand.dtype == dtype_of<T>()),
        tiled_(operand.layout != Layout::Flat && period_ <= kBlock<T>) {}

  // What will be read for the elements from `begin` on, where that is a plain stretch of memory.
  BCE_EXT_TARGET Stream ahead(int64_t begin) const {
    if (operand_.layout != Layout::Flat) return {reinterpret_cast<const char*>(buffer_), 0};
    const int64_t bytes = size_of(operand_.dtype);
    return {static_cast<const char*>(operand_.data) + begin * bytes, bytes};
  }

  // The n elements from `begin` on, at most kBlock, followed by zeros up to a multiple of kLanes. Only the last block
  // of a chunk may need these: no tile is read after it.
  BCE_EXT_TARGET const T* block(int64_t begin, int64_t n) {
    if (n % kLanes<T> == 0) {
      if (in_place_) return static_cast<const T*>(operand_.data) + begin;
      if (tiled_) {
        if (!tile_is_read_) read_tile();
        return buffer_ + begin % period_;
      }
    }
    read(problem_, operand_, begin, n, buffer_);
    fill(T(0), round_to_lanes<T>(n) - n, buffer_ + n);
    return buffer_;
  }

 private:
  BCE_EXT_TARGET void read_tile() {
    read(problem_, operand_, 0, period_, buffer_);
    const int64_t length = period_ + smaller(kBlock<T>, numel_);
    for (int64_t filled = period_; filled < length;) {
      const int64_t copied = smaller(filled, length - filled);
      memcpy(buffer_ + filled, buffer_, copied * sizeof(T));
      filled += copied;
    }
    tile_is_read_ = true;
  }

  const Problem& problem_;
  const Operand& operand_;
  const int64_t numel_;  // of the chunk
  const int64_t period_;
  const bool in_place_;
  const bool tiled_;
  bool tile_is_read_ = false;
  T buffer_[2 * kBlock<T> + kStagger<T>];
};

// ---- compute ----

enum Wanted {
  kLoss = 1,
  kGradInput = 2,
  kGradTarget = 4,
  kLinearSum = 8,    // WithLogits: instead of storing losses, add their linear parts, as Log1pSum adds the logarithms
  kPastCaches = 16,  // writes the gradient past the caches
};

// What the next block will read. Fetched while this one is computed: by itself the processor looks no further than to
// the end of a page, which is as long as a block.
struct Ahead {
  Stream x, y, w, p;
};

template <typename T>
BCE_EXT_TARGET void prefetch(const Stream& stream, int64_t begin) {
  constexpr int64_t kCacheLine = 64 / sizeof(T);
  for (int64_t i = 0; i < kLanes<T>; i += kCacheLine) stream.prefetch(begin + i);
}

template <bool kIsGiven, typename T>
BCE_EXT_HOST_DEVICE auto load_or_one(const T* in) {
  if constexpr (kIsGiven) {
    return Numbers<T>::load(in);
  } else {
    (void)in;
    return One{};
  }
}

// Adds each of `values` to a lane.
template <typename T>
BCE_EXT_TARGET void add_to_lanes(Numbers<T> values, double* __restrict lanes) {
  T in_memory[kLanes<T>];
  values.store(in_memory);
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) lanes[lane] += static_cast<double>(in_memory[lane]);
}

// `first` receives what the first stage computes, `lanes` the sums for kLinearSum.
template <typename T>
using Compute = void (*)(int64_t n, const T* x, const T* y, const T* w, const T* p, T scale, const Ahead& ahead,
                         T* first, T* loss, T* grad_input, T* grad_target, double* lanes);

template <typename T, typename Formula, int kWanted, bool kHasWeight, bool kHasPosWeight>
BCE_EXT_TARGET void compute(int64_t n, const T* __restrict x, const T* __restrict y, const T* __restrict w,
                            const T* __restrict p, T scale, const Ahead& ahead, T* __restrict first, T* __restrict loss,
                            T* __restrict grad_input, T* __restrict grad_target, double* __restrict lanes) {
  const Ahead next = ahead;
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    prefetch<T>(next.x, i);
    prefetch<T>(next.y, i);
    Formula::first_stage(Numbers<T>::load(x + i)).store(first + i);
  }
  const Numbers<T> scales = scale;
  // Four linear parts are added in T, which costs at most three roundings of T and saves conversions to float64.
  constexpr int64_t kGroup = (kWanted & kLinearSum) != 0 ? 4 * kLanes<T> : kBlock<T>;
  for (int64_t i = 0; i < n;) {
    Numbers<T> linear = T(0);
    for (const int64_t end = smaller(n, i + kGroup); i < end; i += kLanes<T>) {
      if constexpr (kHasWeight) prefetch<T>(next.w, i);
      if constexpr (kHasPosWeight) prefetch<T>(next.p, i);
      Numbers<T> weight = T(1);
      if constexpr (kHasWeight) weight = Numbers<T>::load(w + i);
      const Terms<Numbers<T> > terms =
          Formula::evaluate(Numbers<T>::load(x + i), Numbers<T>::load(y + i), weight, load_or_one<kHasPosWeight>(p + i),
                            scales, Numbers<T>::load(first + i));
      if constexpr ((kWanted & kLoss) != 0) terms.loss.store(loss + i);
      if constexpr ((kWanted & kLinearSum) != 0) linear = linear + terms.linear;
      if constexpr ((kWanted & kPastCaches) != 0) {
        terms.grad_input.store_past_caches(grad_input + i);
      } else if constexpr ((kWanted & kGradInput) != 0) {
        terms.grad_input.store(grad_input + i);
      }
      if constexpr ((kWanted & kGradTarget) != 0) terms.grad_target.store(grad_target + i);
    }
    if constexpr ((kWanted & kLinearSum) != 0) add_to_lanes<T>(linear, lanes);
  }
}

template <typename T, typename Formula, bool kHasWeight, bool kHasPosWeight>
BCE_EXT_TARGET Compute<T> select_wanted(int wanted) {
  switch (wanted) {
    case kLoss:
      return compute<T, Formula, kLoss, kHasWeight, kHasPosWeight>;
    case kGradInput:
      return compute<T, Formula, kGradInput, kHasWeight, kHasPosWeight>;
    case kGradTarget:
      return compute<T, Formula, kGradTarget, kHasWeight, kHasPosWeight>;
    case kLoss | kGradInput:
      return compute<T, Formula, kLoss | kGradInput, kHasWeight, kHasPosWeight>;
    case kGradInput | kGradTarget:
      return compute<T, Formula, kGradInput | kGradTarget, kHasWeight, kHasPosWeight>;
    default:
      return compute<T, Formula, kLoss | kGradInput | kGradTarget, kHasWeight, kHasPosWeight>;
  }
}

template <typename T, typename Formula>
BCE_EXT_TARGET Compute<T> select_compute(int wanted, bool has_weight, bool has_pos_weight) {
  if constexpr (std::is_same_v<Formula, WithLogits>) {
    if (wanted == kLinearSum) return compute<T, Formula, kLinearSum, false, false>;
    if (wanted == (kLinearSum | kGradInput)) return compute<T, Formula, kLinearSum | kGradInput, false, false>;
    if (wanted == (kLinearSum | kGradInput | kPastCaches)) {
      return compute<T, Formula, kLinearSum | kGradInput | kPastCaches, false, false>;
    }
    if (has_pos_weight) {
      return has_weight ? select_wanted<T, Formula, true, true>(wanted)
                        : select_wanted<T, Formula, false, true>(wanted);
    }
  }
  return has_weight ? select_wanted<T, Formula, true, false>(wanted) : select_wanted<T, Formula, false, false>(wanted);
}

template <typename T>
BCE_EXT_TARGET void multiply(int64_t n, const T* a, const T* b, T* __restrict out) {
  n &= ~(kLanes<T> - 1);
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] * b[i];
}

template <typename T>
BCE_EXT_TARGET bool all_in_unit_interval(int64_t n, const T* q) {
  int outside = 0;
  for (int64_t i = 0; i < n; ++i) outside |= !(q[i] >= T(0)) | !(q[i] <= T(1));
  return outside == 0;
}

// ---- write ----

template <typename S, typename T>
BCE_EXT_TARGET void store(const T* __restrict in, int64_t n, void* data, int64_t begin) {
  S* __restrict out = static_cast<S*>(data) + begin;
  for (int64_t i = 0; i < n; ++i) store_as(in[i], out[i]);
}

template <typename T>
class OutputWriter {
 public:
  BCE_EXT_TARGET explicit OutputWriter(const Output& output) : output_(output) {}

  // Where to put the n elements from `begin` on, rounded up to a multiple of kLanes.
  BCE_EXT_TARGET T* block(int64_t begin, int64_t n) {
    const bool in_place = output_.data != nullptr && output_.dtype == dtype_of<T>() && n % kLanes<T> == 0;
    return in_place ? static_cast<T*>(output_.data) + begin : buffer_;
  }

  BCE_EXT_TARGET void finish(const T* block, int64_t begin, int64_t n) const {
    if (output_.data == nullptr || block != buffer_) return;
    switch (output_.dtype) {
      case Dtype::Half:
        return store<HalfBits>(block, n, output_.data, begin);
      case Dtype::BFloat16:
        return store<BFloat16Bits>(block, n, output_.data, begin);
      case Dtype::Double:
        return store<double>(block, n, output_.data, begin);
      default:
        return store<float>(block, n, output_.data, begin);
    }
  }

 private:
  const Output& output_;
  T buffer_[kBlock<T> + kStagger<T>];
};

// ---- sum ----

// Adds element i to lane i % kLanes, in an order that depends on n alone. Four at a time are added in T first, which
// costs at most two roundings of T and halves the time; should that overflow, the block is added again in float64.
template <typename T>
BCE_EXT_TARGET void accumulate(const T* in, int64_t n, double* __restrict lanes) {
  double sums[kLanes<T>];
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) sums[lane] = lanes[lane];
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= n; i += 4 * kLanes<T>) {
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
      const T* at = in + i + lane;
      sums[lane] += static_cast<double>((at[0] + at[kLanes<T>]) + (at[2 * kLanes<T>] + at[3 * kLanes<T>]));
    }
  }
  uint64_t overflown = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
    overflown |= math::to_bits(math::magnitude(sums[lane])) >= math::to_bits(math::FloatFormat<double>::kInfinity);
  }
  if (overflown != 0) {
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) sums[lane] = lanes[lane];
    i = 0;
  }
  for (; i < n; i += kLanes<T>) {
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) sums[lane] += static_cast<double>(in[i + lane]);
  }
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) lanes[lane] = sums[lane];
}

template <typename T, int kCount>
BCE_EXT_HOST_DEVICE Numbers<T> product_of_excesses(const T* e, int64_t step) {
  if constexpr (kCount == 1) {
    return Numbers<T>::load(e);
  } else {
    return math::product_of_excesses(product_of_excesses<T, kCount / 2>(e, step),
                                     product_of_excesses<T, kCount / 2>(e + kCount / 2 * step, step));
  }
}

// Adds log1p(e) over the elements of a chunk, with one logarithm for the product of up to kFactors of (1 + e), which
// takes far less than a logarithm each.
template <typename T>
class Log1pSum {
 public:
  // The next n elements, a multiple of kLanes; e is in [0, 1] or NaN.
  BCE_EXT_TARGET void add(const T* e, int64_t n) {
    const int64_t multiplied = multiply<kFactors>(e, n);
    const int64_t multiplied_by_few = multiply<kFewFactors>(e + multiplied, n - multiplied);
    const int64_t done = multiplied + multiplied_by_few;
    multiply<1>(e + done, n - done);
  }

  BCE_EXT_TARGET void finish(double* lanes) {
    for (int64_t i = 0; i < size_; i += kLanes<T>) {
      math::log1p_of_nonnegative(Numbers<T>::load(products_ + i)).store(products_ + i);
    }
    accumulate(products_, size_, lanes);
  }

 private:
  static constexpr int64_t kFactors = 32;
  static constexpr int64_t kFewFactors = 4;
  static_assert(kBlock<T> % (kFactors * kLanes<T>) == 0);

  // Multiplies kCount of (1 + e) at a time, and returns how many elements that were.
  template <int64_t kCount>
  BCE_EXT_TARGET int64_t multiply(const T* e, int64_t n) {
    const int64_t step = n / (kCount * kLanes<T>)*kLanes<T>;
    for (int64_t i = 0; i < step; i += kLanes<T>) {
      product_of_excesses<T, kCount>(e + i, step).store(products_ + size_ + i);
    }
    size_ += step;
    return kCount * step;
  }

  // All blocks but the last two of a chunk are multiplied by kFactors. Of those, less than kFactors * kLanes elements
  // each are left to the others.
  T products_[kChunk / kFactors + 2 * (kFactors / kFewFactors + kFewFactors) * kLanes<T>];
  int64_t size_ = 0;
};

// `joins_logs`: the losses need not be known one by one, and have the same weight, so that their logarithms can be
// added as the logarithm of a product.
template <typename T, typename Formula>
BCE_EXT_TARGET ChunkResult evaluate_blocks(const Problem& problem, int64_t begin, int64_t end, bool joins_logs) {
  OperandReader<T> input(problem, problem.input, end - begin);
  OperandReader<T> target(problem, problem.target, end - begin);
  OperandReader<T> weight(problem, problem.weight, end - begin);
  OperandReader<T> pos_weight(problem, problem.pos_weight, end - begin);
  OperandReader<T> grad_output(problem, problem.grad_output, end - begin);
  OutputWriter<T> loss(problem.loss);
  OutputWriter<T> grad_input(problem.grad_input);
  OutputWriter<T> grad_target(problem.grad_target);

  const bool has_weight = problem.weight.layout != Layout::Absent;
  const bool has_pos_weight = problem.pos_weight.layout != Layout::Absent;
  const bool has_grad_output = problem.grad_output.layout != Layout::Absent;
  const int wanted = (joins_logs                                       ? kLinearSum
                      : problem.reduce || problem.loss.data != nullptr ? kLoss
                                                                       : 0) |
                     (problem.grad_input.data != nullptr ? kGradInput : 0) |
                     (problem.grad_target.data != nullptr ? kGradTarget : 0);
  const bool past_caches = problem.past_caches && wanted == (kLinearSum | kGradInput) &&
                           problem.grad_input.dtype == dtype_of<T>() &&
                           reinterpret_cast<uintptr_t>(problem.grad_input.data) % BCE_EXT_VECTOR_BYTES == 0;
  const Compute<T> compute_rest = select_compute<T, Formula>(wanted, has_weight || has_grad_output, has_pos_weight);
  const Compute<T> compute_full =
      past_caches ? select_compute<T, Formula>(wanted | kPastCaches, false, false) : compute_rest;
  const T scale = static_cast<T>(problem.scale);

  ChunkResult result;
  double lanes[kLanes<T>] = {};
  T product[kBlock<T>];
  T first[kBlock<T> + kStagger<T>];
  Log1pSum<T> logarithms;
  int64_t n;
  for (int64_t at = begin; at < end; at += n) {
    n = smaller(kBlock<T>, end - at);
    if (n > kLanes<T>) n &= ~(kLanes<T> - 1);  // what remains makes one last, small block
    const int64_t padded = round_to_lanes<T>(n);

    const T* x = input.block(at, n);
    const T* y = target.block(at, n);
    const T* w = nullptr;
    if (has_weight) w = weight.block(at, n);
    if (has_grad_output) {
      const T* g = grad_output.block(at, n);
      if (has_weight) {
        multiply(padded, w, g, product);
        w = product;
      } else {
        w = g;
      }
    }
    T* block_loss = loss.block(at, n);
    T* block_grad_input = grad_input.block(at, n);
    T* block_grad_target = grad_target.block(at, n);
    const T* p = has_pos_weight ? pos_weight.block(at, n) : nullptr;
    const Ahead ahead{input.ahead(at + n), target.ahead(at + n),
                      has_grad_output ? grad_output.ahead(at + n) : weight.ahead(at + n), pos_weight.ahead(at + n)};
    (n == padded ? compute_full : compute_rest)(padded, x, y, w, p, scale, ahead, first, block_loss, block_grad_input,
                                                block_grad_target, lanes);

    loss.finish(block_loss, at, n);
    grad_input.finish(block_grad_input, at, n);
    grad_target.finish(block_grad_target, at, n);
    if constexpr (std::is_same_v<Formula, Probabilities>) {
      result.input_in_range = result.input_in_range && all_in_unit_interval(n, x);
    }
    if (joins_logs) {
      fill(T(0), padded - n, first + n);
      logarithms.add(first, padded);
    } else if (problem.reduce) {
      fill(T(0), padded - n, block_loss + n);
      accumulate(block_loss, padded, lanes);
    }
  }
  if (past_caches) fence_past_caches();
  if (joins_logs) logarithms.finish(lanes);
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  result.sum = lanes[0];
  return result;
}

template <typename T, typename Formula>
BCE_EXT_TARGET ChunkResult evaluate_chunk(const Problem& problem, int64_t begin, int64_t end) {
  const bool joins_logs = std::is_same_v<Formula, WithLogits> && problem.reduce && problem.loss.data == nullptr &&
                          problem.grad_target.data == nullptr && problem.weight.layout == Layout::Absent &&
                          problem.pos_weight.layout == Layout::Absent && problem.grad_output.layout == Layout::Absent;
  const ChunkResult result = evaluate_blocks<T, Formula>(problem, begin, end, joins_logs);
  // An infinite logit makes the linear part NaN where it has no weight, and sums of four may be too large for T: then
  // the losses are evaluated one by one.
  if (joins_logs && !std::isfinite(result.sum)) return evaluate_blocks<T, Formula>(problem, begin, end, false);
  return result;
}

}  // namespace

ChunkKernel select_chunk_kernel(const Problem& problem) {
  if (problem.formula == Formula::WithLogits) {
    return problem.compute_in_double ? evaluate_chunk<double, WithLogits> : evaluate_chunk<float, WithLogits>;
  }
  return problem.compute_in_double ? evaluate_chunk<double, Probabilities> : evaluate_chunk<float, Probabilities>;
}

}  // namespace BCE_EXT_ISA
}  // namespace bce_ext
