// Launches on a stream, and where the kernels of each formula are compiled.
#pragma once

#include <c10/cuda/CUDAException.h>

#include "solve.cuh"

namespace bce_ext {
namespace cuda {

struct StreamLauncher {
  cudaStream_t stream;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) const {
    kernel<<<static_cast<unsigned int>(blocks), threads, 0, stream>>>(arguments...);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

// Each is instantiated in a file of its own, formula_*.cu, so that they compile side by side.
extern template int64_t launch_pass<WithLogits>(const Problem&, double*, int64_t, const StreamLauncher&);
extern template int64_t launch_pass<Probabilities>(const Problem&, double*, int64_t, const StreamLauncher&);
extern template int64_t launch_pass<Focal>(const Problem&, double*, int64_t, const StreamLauncher&);
extern template int64_t launch_pass<Asymmetric>(const Problem&, double*, int64_t, const StreamLauncher&);

}  // namespace cuda
}  // namespace bce_ext
