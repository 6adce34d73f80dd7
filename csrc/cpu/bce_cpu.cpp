// The internal operators on CPU tensors: allocation, threads, and the fixed-order sum. The arithmetic is in
// block_kernel.
#include <ATen/Dispatch.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <mutex>
#include <vector>

#include "../composite.h"
#include "../pass_operators.h"
#include "block_kernel.h"
#include "chunks.h"
#include "element_types.h"
#include "output_memory.h"
#include "threads.h"

namespace bce_ext {
namespace {

// PyTorch's own choice for its kernels, ATEN_CPU_CAPABILITY included.
Isa isa() {
  static const Isa chosen = [] {
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return Isa::Avx512;
    if (capability == "AVX2") return Isa::Avx2;
    return Isa::Baseline;
  }();
  return chosen;
}

// Calls `work` with each of 0 .. count - 1, from all threads. A thread begins with a share of its own, the same each
// time as long as the count is, so that it finds in its cache what it wrote there. Where shares are large it then helps
// the others, whose core may be slower or busy with something else; of a small one, all memory may be in that cache.
template <typename Work>
void run_in_shares(int64_t count, const Work& work) {
  constexpr int64_t kSmallestShare = 2;  // less does not pay for a thread
  constexpr int64_t kLargeShare = 16;
  const int64_t shares = std::clamp<int64_t>(count / kSmallestShare, 1, at::get_num_threads());
  const int64_t shares_to_visit = count < kLargeShare * shares ? 1 : shares;
  const auto begin = [=](int64_t share) { return share * count / shares; };
  std::vector<std::atomic<int64_t>> next(shares);
  for (int64_t share = 0; share < shares; ++share) next[share] = begin(share);
  run_on_threads(shares, [&](int64_t own) {
    for (int64_t step = 0; step < shares_to_visit; ++step) {
      const int64_t share = (own + step) % shares;
      const int64_t end = begin(share + 1);
      while (next[share].load(std::memory_order_relaxed) < end) {
        const int64_t i = next[share]++;
        if (i < end) work(i);
      }
    }
  });
}

// The element that a kernel refused first, in the order of the chunks, whatever thread met it.
class FirstInvalid {
 public:
  void add(int64_t chunk, const InvalidElement& element) {
    const std::lock_guard lock(mutex_);
    if (chunk >= chunk_) return;
    chunk_ = chunk;
    element_ = element;
  }

  void raise(const Problem& problem) const {
    if (chunk_ == std::numeric_limits<int64_t>::max()) return;
    const auto ignore_index = problem.ignores ? std::optional(problem.ignore_index) : std::nullopt;
    refuse_element(problem.formula, ignore_index, element_.is_target, element_.value);
  }

 private:
  std::mutex mutex_;
  int64_t chunk_ = std::numeric_limits<int64_t>::max();
  InvalidElement element_;
};

// Adds neighbours, and then the sums of neighbours: a chunk takes part in as many roundings as their number has bits.
template <typename Sums>
double sum_pairwise(Sums& sums) {
  size_t count = sums.size();
  if (count == 0) return 0.0;
  while (count > 1) {
    for (size_t i = 0; i < count / 2; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
    if (count % 2 != 0) sums[count / 2] = sums[count - 1];
    count = (count + 1) / 2;
  }
  return sums[0];
}

// Whether outputs are written past the caches, and so not read first. One that is larger than a third-level cache is
// not there any more when the next operation reads it. Cross entropy waits for memory, and gains as soon as input,
// target and output together are larger; what computes for longer does not.
bool goes_past_caches(const Problem& problem) {
  constexpr int64_t kLargest = 32 << 20, kLargestOfThree = 12 << 20;
  const bool waits = problem.formula == Formula::WithLogits || problem.formula == Formula::Probabilities;
  const Output& output = problem.grad_input.data != nullptr ? problem.grad_input : problem.loss;
  return problem.numel * size_of(output.dtype) > (waits ? kLargestOfThree : kLargest);
}

// Runs the pass and returns the sum of the losses. Each chunk has a place of its own for its partial sum, and these are
// added in a fixed order, so the result does not depend on the number of threads.
double run_chunks(Problem& problem) {
  problem.past_caches = goes_past_caches(problem);
  const Chunks chunks(problem);
  const ChunkKernel kernel = chunk_kernel(problem, isa());
  c10::SmallVector<double, 64> sums(chunks.size());
  FirstInvalid invalid;
  run_in_shares(chunks.size(), [&](int64_t i) {
    const ChunkResult result = kernel(problem, chunks[i]);
    sums[i] = result.sum;
    if (result.invalid) invalid.add(i, *result.invalid);
  });
  invalid.raise(problem);
  return sum_pairwise(sums);
}

// The number of targets that are not ignored. Where problem.label_codes has room for their codes, it is left there only
// if every target has one.
int64_t count_chunks(Problem& problem) {
  Problem counting = problem;
  counting.counts = true;
  Problem encoding = counting;
  counting.label_codes = nullptr;
  const ChunkKernel count = chunk_kernel(counting, isa()), encode = chunk_kernel(encoding, isa());
  std::atomic<int64_t> valid = 0;
  std::atomic<bool> encodes = encoding.label_codes != nullptr;
  const Chunks chunks(counting);
  run_in_shares(chunks.size(), [&](int64_t i) {
    const bool encodes_this = encodes.load(std::memory_order_relaxed);
    const ChunkResult result = encodes_this ? encode(encoding, chunks[i]) : count(counting, chunks[i]);
    if (encodes_this && !result.has_codes) encodes = false;
    valid += static_cast<int64_t>(result.sum);
  });
  if (!encodes) problem.label_codes = nullptr;
  return valid;
}

// Whether the count should leave codes: few targets are still in a cache when they are read again, and to take codes
// apart pays for 64-bit integers only. Elsewhere there are no instructions to make them with.
bool wants_label_codes(const Problem& problem) {
#if defined(__x86_64__)
  constexpr int64_t kLargestCached = 1 << 20;
  const int64_t bytes = size_of(problem.target.dtype);
  return !problem.compute_in_double && problem.numel * bytes > kLargestCached &&
         (computes_from_codes(problem) || bytes == 8);
#else
  (void)problem;
  return false;
#endif
}

Tensor number(double value, at::ScalarType dtype) {
  Tensor result = empty_output({}, {}, dtype);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "number", [&] {
    const double once = sizeof(scalar_t) == 2 ? round_to_odd(value) : value;
    *result.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(once);
  });
  return result;
}

struct Cpu {
  struct Guard {
    explicit Guard(const at::Device&) {}
  };

  static Tensor empty(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype, const Tensor& /*like*/) {
    return empty_output(sizes, strides, dtype);
  }

  static void run(Problem& problem) { run_chunks(problem); }

  static Tensor run_and_sum(Problem& problem, at::ScalarType dtype, const Tensor& /*like*/) {
    return number(run_chunks(problem) / problem.divisor, dtype);
  }

  static void scale_grad(Tensor& grad, const Tensor& grad_output) {
    const bool is_one =
        is_aligned(grad_output) &&
        AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad_output.scalar_type(), "scale_grad_",
                                        [&] { return *grad_output.const_data_ptr<scalar_t>() == scalar_t(1); });
    if (!is_one) grad.mul_(grad_output);
  }

  static Tensor count_valid(const Tensor& target, double ignore_index) {
    const at::ScalarType dtype = target.scalar_type();
    // The order of the elements does not matter; memory that holds other elements too does, and 8-bit floats.
    if (!target.is_non_overlapping_and_dense() || !is_aligned(target) || (at::isFloat8Type(dtype))) {
      return composite_count_valid(target, ignore_index);
    }
    Problem problem;
    problem.compute_in_double = dtype == at::kDouble || is_rounded_label(ignore_index, dtype);
    problem.ignore_index = as_label(ignore_index, dtype);
    problem.numel = target.numel();
    problem.target = flat_operand(target);
    return number(static_cast<double>(count_chunks(problem)), at::kDouble);
  }
};

// The mean over the elements that are not ignored, which it counts, and the gradient if it is wanted.
std::tuple<Tensor, Tensor> mean_of_valid(const Arguments& arguments, at::ScalarType dtype, bool wants_gradient) {
  const Tensor& input = arguments.input;
  Pass pass(arguments, dtype, /*divisor=*/1, input);
  check_mean_of_valid(arguments);
  Problem& problem = pass.problem;
  Tensor codes;
  if (problem.target.layout == Layout::Flat) {
    if (wants_label_codes(problem)) {
      constexpr int64_t kBytes = sizeof(LabelCodes), kLabels = LabelCodes::kLabels;
      codes = Cpu::empty({(problem.numel + kLabels - 1) / kLabels * kBytes}, {1}, at::kByte, input);
      problem.label_codes = static_cast<LabelCodes*>(codes.mutable_data_ptr());
    }
    problem.divisor = static_cast<double>(count_chunks(problem));
  } else {
    problem.divisor = Cpu::count_valid(arguments.target, problem.ignore_index).item<double>();
  }
  Tensor grad_input = wants_gradient ? empty_output<Cpu>(pass, input.scalar_type(), input)
                                     : Cpu::empty({0}, {1}, input.scalar_type(), input);
  problem.reduce = true;
  if (wants_gradient) problem.grad_input = output_of(grad_input);
  return {Cpu::run_and_sum(problem, dtype, input), std::move(grad_input)};
}

}  // namespace

TORCH_LIBRARY_IMPL(bce_ext, CPU, m) {
  register_pass_operators<Cpu>(m);
  m.impl("_bce_mean_of_valid", Flat<mean_of_valid>::call);
}

}  // namespace bce_ext
