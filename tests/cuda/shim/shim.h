// Enough of CUDA, in plain C++, to run the kernels of csrc/cuda without a GPU: compile with -include shim.h -I <this
// directory>.
//
// The threads of a block are fibers, switched at barriers and shuffles; the blocks of a grid run one after the other.
// The order of both is that of a schedule, which no correct kernel depends on. A barrier or a shuffle that not all
// threads reach ends the launch with an error, and shared memory holds NaNs when a block starts.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("shim_shared")))

extern "C" char __start_shim_shared[] __attribute__((weak));
extern "C" char __stop_shim_shared[] __attribute__((weak));

constexpr int warpSize = 32;

namespace shim {

struct Dim3 {
  unsigned int x = 1, y = 1, z = 1;
};

enum class State { Ready, Shuffle, Barrier, Done };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state = State::Ready;
  double value = 0;  // what it offers in a shuffle, then what it receives
  int offset = 0;
};

struct Schedule {
  enum Order { Forward, Reverse, Random } order = Forward;
  unsigned int seed = 0;
};

class Machine {
 public:
  Dim3 thread_idx, block_idx, block_dim, grid_dim;

  void launch(int64_t blocks, int threads, const Schedule& schedule, const std::function<void()>& kernel) {
    if (blocks < 1 || threads < 1 || threads > 1024 || threads % warpSize != 0)
      throw std::runtime_error("invalid launch");
    schedule_ = schedule;
    random_.seed(schedule.seed);
    kernel_ = &kernel;
    grid_dim = {static_cast<unsigned int>(blocks)};
    block_dim = {static_cast<unsigned int>(threads)};
    while (fibers_.size() < static_cast<size_t>(threads)) fibers_.emplace_back();
    for (const int block : ordered(static_cast<int>(blocks))) {
      block_idx = {static_cast<unsigned int>(block), 0, 0};
      run_block(threads);
    }
  }

  double shuffle_down(double value, int offset) {
    Fiber& fiber = fibers_[thread_idx.x];
    fiber.value = value;
    fiber.offset = offset;
    wait(State::Shuffle);
    return fiber.value;
  }

  void barrier() { wait(State::Barrier); }

  void check(bool condition) { assertion_failed_ |= !condition; }
  bool assertion_failed() const { return assertion_failed_; }

 private:
  std::vector<int> ordered(int count) {
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    if (schedule_.order == Schedule::Reverse) std::reverse(order.begin(), order.end());
    if (schedule_.order == Schedule::Random) std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

  // Warps run as far as they come, one after the other: the worst case for what relies on them to run side by side.
  void run_block(int threads) {
    std::memset(__start_shim_shared, 0xff, __stop_shim_shared - __start_shim_shared);
    for (int t = 0; t < threads; ++t) start(fibers_[t]);
    const int num_warps = threads / warpSize;
    for (int done = 0; done < num_warps;) {
      done = 0;
      for (const int warp : ordered(num_warps)) done += run_warp(warp);
      if (done == num_warps) return;
      for (int t = 0; t < threads; ++t) {
        if (fibers_[t].state != State::Barrier)
          throw std::runtime_error("a thread does not reach the barrier that others wait at");
        fibers_[t].state = State::Ready;
      }
    }
  }

  // True when all its threads have returned, false when they wait at a barrier.
  bool run_warp(int warp) {
    for (;;) {
      for (const int lane : ordered(warpSize)) resume(warp * warpSize + lane);
      const State state = fibers_[warp * warpSize].state;
      for (int lane = 0; lane < warpSize; ++lane) {
        if (fibers_[warp * warpSize + lane].state != state)
          throw std::runtime_error("the lanes of a warp diverge at a shuffle or barrier");
      }
      if (state != State::Shuffle) return state == State::Done;
      exchange(warp);
    }
  }

  void exchange(int warp) {
    double values[warpSize];
    for (int lane = 0; lane < warpSize; ++lane) values[lane] = fibers_[warp * warpSize + lane].value;
    for (int lane = 0; lane < warpSize; ++lane) {
      Fiber& fiber = fibers_[warp * warpSize + lane];
      if (lane + fiber.offset < warpSize) fiber.value = values[lane + fiber.offset];
      fiber.state = State::Ready;
    }
  }

  void start(Fiber& fiber) {
    fiber.stack.resize(256 * 1024);
    fiber.state = State::Ready;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, &Machine::enter, 0);
  }

  void resume(int thread) {
    if (fibers_[thread].state == State::Done || fibers_[thread].state == State::Barrier) return;
    thread_idx = {static_cast<unsigned int>(thread), 0, 0};
    swapcontext(&scheduler_, &fibers_[thread].context);
  }

  void wait(State state) {
    const unsigned int thread = thread_idx.x;
    fibers_[thread].state = state;
    swapcontext(&fibers_[thread].context, &scheduler_);
  }

  static void enter();

  std::deque<Fiber> fibers_;  // a context must not move
  ucontext_t scheduler_;
  Schedule schedule_;
  std::mt19937 random_;
  const std::function<void()>* kernel_ = nullptr;
  bool assertion_failed_ = false;
};

inline Machine machine;

inline void Machine::enter() {
  (*machine.kernel_)();
  machine.fibers_[machine.thread_idx.x].state = State::Done;
}

}  // namespace shim

#define threadIdx (shim::machine.thread_idx)
#define blockIdx (shim::machine.block_idx)
#define blockDim (shim::machine.block_dim)
#define gridDim (shim::machine.grid_dim)

inline void __syncthreads() { shim::machine.barrier(); }

inline double __shfl_down_sync(unsigned int mask, double value, int offset) {
  if (mask != 0xffffffffu) throw std::runtime_error("a shuffle of a part of a warp");
  return shim::machine.shuffle_down(value, offset);
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t(a) * b) >> 32); }

inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}
