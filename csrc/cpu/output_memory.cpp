// Large outputs, and what the operating system charges for them.
//
// A training step writes a gradient of the same size as the step before. The C library returns a large block to the
// system when it is freed, and gets the next one page by page, each of them cleared first: for a large loss that takes
// longer than the loss itself. So a few freed blocks are kept. Beyond a limit they are marked with MADV_FREE: the
// system may take their pages when it runs short of memory, and those that it did not take can be written to without a
// page fault.
#include "output_memory.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <optional>
#include <string_view>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace bce_ext {
namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kHugePage = 2 * kMiB;
constexpr size_t kSmallestKept = 1 * kMiB;  // below, the C library does as well

// BCE_EXT_CACHE_MIB: of all freed blocks together; beyond it the system may take the pages. 0: nothing is kept at all.
size_t most_owned_from_environment() {
  constexpr size_t kDefault = 128;
  const char* const text = std::getenv("BCE_EXT_CACHE_MIB");
  if (text == nullptr) return kDefault * kMiB;
  const std::string_view value(text);
  size_t mib = 0;
  const auto [end, error] = std::from_chars(value.begin(), value.end(), mib);
  if (error != std::errc() || end != value.end() || mib > std::numeric_limits<size_t>::max() / kMiB) {
    TORCH_WARN("bce_ext: expected BCE_EXT_CACHE_MIB to be a whole number of MiB, but got \"", value, "\"; ", kDefault,
               " is used");
    return kDefault * kMiB;
  }
  return mib * kMiB;
}

const size_t most_owned = most_owned_from_environment();

// A stretch of memory from c10::alloc_cpu with room for so many bytes of data, which start at a huge page if they fill
// one.
struct Block {
  void* start;
  size_t capacity;
  bool is_owned;  // while it is kept: it is not the system's to take

  char* data() const {
    const size_t alignment = capacity < kHugePage ? c10::gAlignment : kHugePage;
    const auto first = reinterpret_cast<uintptr_t>(start) + sizeof(Block);
    return reinterpret_cast<char*>((first + alignment - 1) / alignment * alignment);
  }
};

Block allocate_block(size_t capacity) {
  const size_t slack = capacity < kHugePage ? 2 * c10::gAlignment : kHugePage + c10::gAlignment;
  const Block block{c10::alloc_cpu(capacity + slack), capacity, false};
#ifdef MADV_HUGEPAGE
  // Before the first touch, which then takes one page fault for 2 MiB instead of 512. A hint: where it is refused,
  // nothing is lost but time.
  if (capacity >= kHugePage) madvise(block.data(), capacity / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return block;
}

// Lets the system take a block that waits. False where it cannot.
bool disown(const Block& block) {
#if defined(__linux__) && defined(MADV_FREE)
  return madvise(block.data(), block.capacity / kHugePage * kHugePage, MADV_FREE) == 0;
#else
  return false;
#endif
}

// Whether a block still has all of its pages. One that lost some gets them back 4 KiB at a time, huge pages no more: it
// is better replaced.
bool is_whole(const Block& block) {
  if (block.is_owned) return true;
#if defined(__linux__)
  static const size_t page = sysconf(_SC_PAGESIZE);
  const size_t nbytes = block.capacity / kHugePage * kHugePage;
  std::vector<unsigned char> is_resident(nbytes / page);
  return mincore(block.data(), nbytes, is_resident.data()) == 0 &&
         std::all_of(is_resident.begin(), is_resident.end(), [](unsigned char flags) { return (flags & 1) != 0; });
#else
  return false;
#endif
}

// Blocks that were freed, the latest last. A lock that is taken means that another thread is here, or was when this
// process was forked: nobody waits for it, who allocates and frees can do without.
class FreedBlocks {
 public:
  FreedBlocks() { blocks_.reserve(kKept + 1); }  // freeing a tensor must not fail

  // The smallest block that has the capacity and no more than twice of it, of equal ones the latest; no block if there
  // is none.
  std::optional<Block> take(size_t capacity) {
    Block taken;
    {
      const std::unique_lock lock(mutex_, std::try_to_lock);
      if (!lock) return std::nullopt;
      auto best = blocks_.end();
      for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
        const bool fits = block->capacity >= capacity && block->capacity / 2 <= capacity;
        if (fits && (best == blocks_.end() || block->capacity <= best->capacity)) best = block;
      }
      if (best == blocks_.end()) return std::nullopt;
      taken = *best;
      blocks_.erase(best);
      if (taken.is_owned) owned_ -= taken.capacity;
    }
    if (is_whole(taken)) return taken;
    c10::free_cpu(taken.start);
    return std::nullopt;
  }

  void put(Block block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || most_owned == 0) return c10::free_cpu(block.start);
    block.is_owned = block.capacity <= most_owned;
    if (block.is_owned) {
      make_room(block.capacity);
      owned_ += block.capacity;
    } else if (!disown(block)) {
      return c10::free_cpu(block.start);
    }
    blocks_.push_back(block);
    if (blocks_.size() > kKept) remove(blocks_.begin());
  }

  // Other threads are here for a moment only, unless the process was forked in that moment.
  void clear() {
    const std::unique_lock lock(mutex_, std::chrono::seconds(1));
    if (!lock) return;
    for (const Block& block : blocks_) c10::free_cpu(block.start);
    blocks_.clear();
    owned_ = 0;
  }

 private:
  static constexpr size_t kKept = 4;  // the outputs of some losses of a model

  // Disowns the oldest blocks until so much more can be owned.
  void make_room(size_t capacity) {
    for (auto block = blocks_.begin(); owned_ + capacity > most_owned;) {
      if (block->is_owned && !disown(*block)) {
        block = remove(block);
        continue;
      }
      if (block->is_owned) owned_ -= block->capacity;
      block->is_owned = false;
      ++block;
    }
  }

  std::vector<Block>::iterator remove(std::vector<Block>::iterator block) {
    if (block->is_owned) owned_ -= block->capacity;
    c10::free_cpu(block->start);
    return blocks_.erase(block);
  }

  std::timed_mutex mutex_;
  std::vector<Block> blocks_;
  size_t owned_ = 0;  // bytes of the owned ones among them
};

FreedBlocks& freed_blocks() {
  static auto* const blocks = new FreedBlocks;  // never destroyed: tensors are freed until the very end of the process
  return *blocks;
}

// The Block of a tensor stands in front of its data.
Block& block_of(void* data) { return static_cast<Block*>(data)[-1]; }

void free_output(void* data) {
  c10::profiledCPUMemoryReporter().Delete(data);
  freed_blocks().put(block_of(data));
}

class OutputAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t nbytes) override {
    std::optional<Block> block = freed_blocks().take(nbytes);
    if (!block) block = allocate_block(nbytes);
    void* const data = block->data();
    block_of(data) = *block;
    c10::profiledCPUMemoryReporter().New(data, nbytes);
    return {data, data, free_output, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return free_output; }

  void copy_data(void* destination, const void* source, size_t nbytes) const override {
    default_copy_data(destination, source, nbytes);
  }
};

// Gives the memory of freed outputs back to the system.
void empty_cache() {
  freed_blocks().clear();
#ifdef __GLIBC__
  malloc_trim(0);  // the C library keeps smaller blocks in turn
#endif
}

}  // namespace

at::Tensor empty_output(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  if (at::detail::computeStorageNbytes(sizes, strides, c10::elementSize(dtype)) < kSmallestKept) {
    return at::detail::empty_strided_cpu(sizes, strides, dtype);
  }
  static OutputAllocator allocator;
  constexpr c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);
  return at::detail::empty_strided_generic(sizes, strides, &allocator, kCpu, dtype);
}

TORCH_LIBRARY_FRAGMENT(bce_ext, m) { m.def("empty_cache() -> ()", empty_cache); }

}  // namespace bce_ext
