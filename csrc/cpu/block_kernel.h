// The CPU kernel: evaluates a stretch of a Problem on one thread. Free of ATen.
#pragma once

#include <cstdint>
#include <optional>

#include "../problem.h"

namespace bce_ext {

// The instruction sets that the kernel is compiled for. Only Baseline exists outside x86-64.
enum class Isa { Baseline, Avx2, Avx512 };

// Whether this machine can execute it.
bool is_supported(Isa isa);

// An element for which the formula is not defined: a probability outside of [0, 1], NaN included, or a label that is
// neither 0 nor 1 nor ignored.
struct InvalidElement {
  bool is_target = false;
  double value = 0.0;
};

struct ChunkResult {
  double sum = 0.0;                       // of the losses, when the problem says `reduce`
  std::optional<InvalidElement> invalid;  // the first one; what was computed is then without meaning
  bool has_codes = false;                 // of a count: whether every target has one
};

// The most elements of a chunk, the unit of work of a thread. A sum depends on the losses in its chunk and on nothing
// else.
constexpr int64_t kChunk = 8192;

// The elements of a chunk: neighbours of the walk, or a rectangle out of it (chunks.h).
struct Chunk {
  int64_t begin = 0;    // the first element, as a position in the walk
  int64_t columns = 0;  // elements of a row, which are neighbours in the walk
  int64_t rows = 1;
  int64_t row_stride = 0;  // from one row to the next, in elements of the walk
  int rows_along = -1;     // the dimension that leads from row to row; -1 for a single row

  int64_t numel() const { return columns * rows; }
};

// Evaluates a chunk.
using ChunkKernel = ChunkResult (*)(const Problem& problem, const Chunk& chunk);

// Whether the kernel for a problem computes from label codes as they are; others take them apart first.
bool computes_from_codes(const Problem& problem);

// The kernel for a problem: chosen once per pass, then called for each chunk by any thread. `isa` must be supported.
ChunkKernel chunk_kernel(const Problem& problem, Isa isa);

}  // namespace bce_ext
