// The choice among the instruction sets that the CPU kernel is compiled for.
#include "block_kernel.h"

namespace bce_ext {

namespace baseline {
ChunkKernel select_chunk_kernel(const Problem& problem);
}
#if defined(__x86_64__)
namespace avx2 {
ChunkKernel select_chunk_kernel(const Problem& problem);
}
namespace avx512 {
ChunkKernel select_chunk_kernel(const Problem& problem);
}
#endif

bool is_supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::Avx2) return has_avx2;
  if (isa == Isa::Avx512) {
    return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::Baseline;
}

bool computes_from_codes(const Problem& problem) {
  return problem.formula == Formula::WithLogits && problem.weight.layout == Layout::Absent &&
         problem.pos_weight.layout == Layout::Absent && problem.input.layout == Layout::Flat &&
         problem.input.dtype == Dtype::Float && !problem.compute_in_double;
}

ChunkKernel chunk_kernel(const Problem& problem, Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::Avx512) return avx512::select_chunk_kernel(problem);
  if (isa == Isa::Avx2) return avx2::select_chunk_kernel(problem);
#endif
  (void)isa;
  return baseline::select_chunk_kernel(problem);
}

}  // namespace bce_ext
