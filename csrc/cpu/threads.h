// Work on the threads of PyTorch.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

#if !defined(_OPENMP)
// at::parallel_for is compiled where it is called. With Clang's OpenMP it would start threads beside those of PyTorch,
// in numbers that torch.set_num_threads does not know of. So without OpenMP this calls what GCC would: the runtime that
// PyTorch has loaded. Absent where PyTorch has another one.
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*work)(void*), void* data, unsigned num_threads, unsigned flags);
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_get_num_threads();
}
#endif

namespace bce_ext {

// Calls work(i) for each i below count, all at a time as far as there are threads. It must not throw.
template <typename Work>
void run_on_threads(int64_t count, const Work& work) {
#if defined(_OPENMP)
  at::parallel_for(0, count, /*grain_size=*/1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) work(i);
  });
#else
  struct Team {
    int64_t count;
    const Work& work;

    static void run(void* team) noexcept {
      const auto& [count, work] = *static_cast<const Team*>(team);
      for (int64_t i = omp_get_thread_num(); i < count; i += omp_get_num_threads()) work(i);
    }
  };
  Team team{count, work};
  if (count > 1 && GOMP_parallel != nullptr && !at::in_parallel_region()) {
    GOMP_parallel(Team::run, &team, static_cast<unsigned>(count), 0);
  } else {
    for (int64_t i = 0; i < count; ++i) work(i);
  }
#endif
}

}  // namespace bce_ext
