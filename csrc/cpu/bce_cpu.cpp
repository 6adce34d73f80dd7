// The internal operators on CPU tensors: allocation, threads, and the fixed-order sum. The arithmetic is in
// block_kernel.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../pass.h"
#include "block_kernel.h"
#include "output_memory.h"

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

Tensor empty_output(const Pass& pass, at::ScalarType dtype) {
  return bce_ext::empty_output(pass.sizes(), pass.strides(), dtype);
}

Tensor no_output(at::ScalarType dtype) { return bce_ext::empty_output({0}, {1}, dtype); }

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
  at::parallel_for(0, shares, /*grain_size=*/1, [&](int64_t first, int64_t last) {
    for (int64_t own = first; own < last; ++own) {
      for (int64_t step = 0; step < shares_to_visit; ++step) {
        const int64_t share = (own + step) % shares;
        const int64_t end = begin(share + 1);
        while (next[share].load(std::memory_order_relaxed) < end) {
          const int64_t i = next[share]++;
          if (i < end) work(i);
        }
      }
    }
  });
}

// Runs the pass and returns the sum of the losses. Each chunk has a place of its own for its partial sum, and these are
// added in order, so the result does not depend on the number of threads.
double run(const Problem& problem) {
  const int64_t chunks = (problem.numel + kChunk - 1) / kChunk;
  const ChunkKernel kernel = chunk_kernel(problem, isa());
  c10::SmallVector<double, 64> sums(chunks);
  std::atomic<bool> in_range{true};
  run_in_shares(chunks, [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk;
    const ChunkResult result = kernel(problem, begin, std::min(begin + kChunk, problem.numel));
    sums[chunk] = result.sum;
    if (!result.input_in_range) in_range = false;
  });
  TORCH_CHECK(in_range, "binary_cross_entropy: all elements of input should be between 0 and 1");
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

Tensor scalar_loss(double sum, int64_t divisor, at::ScalarType dtype) {
  Tensor loss = bce_ext::empty_output({}, {}, dtype);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "scalar_loss", [&] {
    *loss.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(sum / static_cast<double>(divisor));
  });
  return loss;
}

Tensor loss_cpu(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                const OptionalTensor& pos_weight, bool with_logits, bool reduce, int64_t divisor,
                at::ScalarType dtype) {
  Pass pass({input, target, weight, pos_weight, with_logits}, dtype);
  pass.problem.reduce = reduce;
  if (reduce) return scalar_loss(run(pass.problem), divisor, dtype);
  Tensor loss = empty_output(pass, dtype);
  pass.problem.loss = output_of(loss);
  run(pass.problem);
  return loss;
}

std::tuple<Tensor, Tensor> loss_and_grad_cpu(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                             const OptionalTensor& pos_weight, bool with_logits, int64_t divisor,
                                             at::ScalarType dtype) {
  Pass pass({input, target, weight, pos_weight, with_logits}, dtype);
  Tensor grad_input = empty_output(pass, input.scalar_type());
  pass.problem.reduce = true;
  pass.problem.scale = 1.0 / static_cast<double>(divisor);
  pass.problem.grad_input = output_of(grad_input);
  // So large a gradient is not in a cache any more when backward hands it on; and memory that is written past the
  // caches is not read first.
  constexpr size_t kLargestCached = 32 << 20;
  pass.problem.past_caches = grad_input.nbytes() > kLargestCached;
  return {scalar_loss(run(pass.problem), divisor, dtype), std::move(grad_input)};
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                        const OptionalTensor& weight, const OptionalTensor& pos_weight,
                                        bool with_logits, int64_t divisor, std::array<bool, 2> output_mask) {
  Pass pass({input, target, weight, pos_weight, with_logits}, grad_output.scalar_type(), &grad_output);
  pass.problem.scale = 1.0 / static_cast<double>(divisor);
  Tensor grad_input = output_mask[0] ? empty_output(pass, input.scalar_type()) : no_output(input.scalar_type());
  Tensor grad_target = output_mask[1] ? empty_output(pass, target.scalar_type()) : no_output(target.scalar_type());
  if (output_mask[0]) pass.problem.grad_input = output_of(grad_input);
  if (output_mask[1]) pass.problem.grad_target = output_of(grad_target);
  run(pass.problem);
  return {std::move(grad_input), std::move(grad_target)};
}

void scale_grad_cpu(Tensor& grad, const Tensor& grad_output) {
  const bool is_one =
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad_output.scalar_type(), "scale_grad_",
                                      [&] { return *grad_output.const_data_ptr<scalar_t>() == scalar_t(1); });
  if (!is_one) grad.mul_(grad_output);
}

}  // namespace

TORCH_LIBRARY_IMPL(bce_ext, CPU, m) {
  m.impl("_bce_loss", loss_cpu);
  m.impl("_bce_loss_and_grad", loss_and_grad_cpu);
  m.impl("_bce_backward", backward_cpu);
  m.impl("_scale_grad_", scale_grad_cpu);
}

}  // namespace bce_ext
