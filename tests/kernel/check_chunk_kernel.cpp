// The CPU kernel without PyTorch, against float64 formulas: for machines that only an emulator stands in for, such as
// aarch64 in CI. Prints a line for each case and exits with 1 if one fails.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "../../csrc/cpu/block_kernel.h"
#include "../../csrc/cpu/chunks.h"

using namespace bce_ext;

namespace {

double softplus(double x) { return std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }
double sigmoid(double x) { return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x)); }
double times(double weight, double value) { return weight == 0 ? 0 : weight * value; }

// The logits that decide: both tails, where a float32 exp ends, and what lies between; y alternates, so each meets both
// labels.
std::vector<double> logits() {
  std::vector<double> x = {0, 1e-30, 1e-8, 0.5, 1, 3, 17, 20, 50, 80, 88, 1e4, INFINITY};
  for (double value = 0.01; value < 90; value *= 1.007) x.push_back(value);
  const size_t positive = x.size();
  for (size_t i = 0; i < positive; ++i) x.push_back(-x[i]);
  return x;
}

// The distance of two floats in units in the last place; the infinities and equal values are 0 apart.
template <typename T>
double ulp(T got, double expected) {
  const T rounded = static_cast<T>(expected);
  if (got == rounded) return 0;
  if (std::isnan(got) || std::isinf(got) || std::isinf(rounded)) return INFINITY;
  const T unit = std::nextafter(std::fabs(rounded), std::numeric_limits<T>::infinity()) - std::fabs(rounded);
  return std::fabs(static_cast<double>(got) - expected) / unit;
}

double widen(const void* data, Dtype dtype, int64_t i) {
  if (dtype == Dtype::Float) return static_cast<const float*>(data)[i];
  if (dtype == Dtype::Double) return static_cast<const double*>(data)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16;  // bfloat16
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

struct Buffer {
  std::vector<uint64_t> storage;
  Dtype dtype;
  void* data() { return storage.data(); }
  double operator[](int64_t i) const { return widen(storage.data(), dtype, i); }
};

Buffer make(Dtype dtype, const std::vector<double>& values) {
  Buffer buffer{std::vector<uint64_t>(values.size() + 1), dtype};
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == Dtype::Double) {
      static_cast<double*>(buffer.data())[i] = values[i];
    } else if (dtype == Dtype::Float) {
      static_cast<float*>(buffer.data())[i] = static_cast<float>(values[i]);
    } else if (dtype == Dtype::Bool) {
      static_cast<uint8_t*>(buffer.data())[i] = values[i] != 0;
    } else {  // bfloat16; cutting off is rounding enough for test data
      const float value = static_cast<float>(values[i]);
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      static_cast<uint16_t*>(buffer.data())[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
  return buffer;
}

bool check(const char* name, Dtype input_dtype, Dtype target_dtype, Isa isa, bool with_pos_weight) {
  const std::vector<double> x = logits();
  const int64_t rows = static_cast<int64_t>(x.size());
  constexpr int64_t kLabels = 2;
  std::vector<double> inputs, targets;
  for (const double value : x) {
    for (int64_t label = 0; label < kLabels; ++label) {
      inputs.push_back(value);
      targets.push_back(static_cast<double>(label));
    }
  }
  const int64_t numel = rows * kLabels;
  Buffer input = make(input_dtype, inputs);
  Buffer target = make(target_dtype, targets);
  Buffer pos_weight = make(Dtype::Float, {2.0, 3.0});
  Buffer loss = make(input_dtype, std::vector<double>(numel));
  Buffer grad = make(input_dtype, std::vector<double>(numel));

  Problem problem;
  problem.compute_in_double = input_dtype == Dtype::Double;
  problem.numel = numel;
  problem.ndim = 2;
  problem.sizes[0] = rows;
  problem.sizes[1] = kLabels;
  problem.input = {input.data(), input_dtype, Layout::Flat, {}};
  problem.target = {target.data(), target_dtype, Layout::Flat, {}};
  if (with_pos_weight) problem.pos_weight = {pos_weight.data(), Dtype::Float, Layout::Strided, {0, 1}};
  problem.reduce = true;
  problem.loss = {loss.data(), input_dtype};
  problem.grad_input = {grad.data(), input_dtype};
  const ChunkKernel kernel = chunk_kernel(problem, isa);
  const Chunks chunks(problem);
  for (int64_t i = 0; i < chunks.size(); ++i) kernel(problem, chunks[i]);

  double worst = 0;
  for (int64_t i = 0; i < numel; ++i) {
    const double logit = input[i], y = targets[i], p = with_pos_weight ? pos_weight[i % kLabels] : 1.0;
    const double expected_loss = times(1 - y, softplus(logit)) + times(p * y, softplus(-logit));
    const double expected_grad = times(1 - y, sigmoid(logit)) - times(p * y, sigmoid(-logit));
    if (input_dtype == Dtype::Double) {
      worst = std::fmax(worst, std::fmax(ulp<double>(loss[i], expected_loss), ulp<double>(grad[i], expected_grad)));
    } else {
      // A bfloat16 is compared as a float: its rounding is 2^16 float units.
      const double unit = input_dtype == Dtype::Float ? 1 : 65536;
      worst = std::fmax(worst, std::fmax(ulp<float>(static_cast<float>(loss[i]), expected_loss),
                                         ulp<float>(static_cast<float>(grad[i]), expected_grad)) /
                                   unit);
    }
  }
  const bool good = worst <= 4;
  std::printf("%-28s isa %d, %lld elements: at most %.2f ULP %s\n", name, static_cast<int>(isa),
              static_cast<long long>(numel), worst, good ? "" : "FAILED");
  return good;
}

// A label for each i; the third kind is ignored.
template <typename T>
std::vector<T> labels(int64_t n, T ignored) {
  std::vector<T> result(n);
  for (int64_t i = 0; i < n; ++i) result[i] = i * i % 7 < 3 ? T(0) : i * i % 7 < 4 ? T(1) : ignored;
  return result;
}

// Runs the chunks of a problem and returns the sum. `every_code`: whether all counts left codes.
double run(const Problem& problem, Isa isa, bool& every_code) {
  const ChunkKernel kernel = chunk_kernel(problem, isa);
  double sum = 0;
  every_code = true;
  const Chunks chunks(problem);
  for (int64_t i = 0; i < chunks.size(); ++i) {
    const ChunkResult result = kernel(problem, chunks[i]);
    sum += result.sum;
    every_code &= result.has_codes;
  }
  return sum;
}

// Counting with codes, and a pass that reads them: nothing is read or written out of bounds, and all comes out as
// without codes.
template <typename T>
bool check_codes(const char* name, Dtype dtype, T ignored, Isa isa) {
#if defined(__x86_64__)
  constexpr bool kEncodes = true;
#else
  constexpr bool kEncodes = false;
#endif
  bool good = true;
  for (const int64_t n : {1, 5, 8, 16, 31, 32, 33, 1024, 1100, 8191, 8192, 8193, 20011}) {
    const std::vector<T> target = labels<T>(n, ignored);
    int64_t valid = 0;
    for (const T label : target) valid += label != ignored;
    std::vector<float> input(n), expected(n), grad(n);
    for (int64_t i = 0; i < n; ++i) input[i] = static_cast<float>(i % 200 - 100) * 0.3f;
    std::vector<LabelCodes> codes((n + LabelCodes::kLabels - 1) / LabelCodes::kLabels);

    Problem problem;
    problem.numel = n;
    problem.ndim = 1;
    problem.sizes[0] = n;
    problem.input = {input.data(), Dtype::Float, Layout::Flat, {}};
    problem.target = {target.data(), dtype, Layout::Flat, {}};
    problem.checks_labels = dtype != Dtype::Float;
    problem.ignores = true;
    problem.ignore_index = static_cast<double>(ignored);
    problem.reduce = true;
    Problem counting = problem;
    counting.counts = true;
    counting.label_codes = codes.data();
    bool every_code, unused;
    good &= run(counting, isa, every_code) == static_cast<double>(valid) && every_code == kEncodes;
    counting.label_codes = nullptr;
    good &= run(counting, isa, unused) == static_cast<double>(valid);
    for (const Formula formula : {Formula::WithLogits, Formula::Focal}) {
      problem.formula = formula;
      problem.parameters[0] = 0.25;
      problem.parameters[1] = 2.0;
      problem.label_codes = nullptr;
      problem.grad_input = {expected.data(), Dtype::Float};
      const double sum = run(problem, isa, unused);
      if (kEncodes) problem.label_codes = codes.data();
      problem.grad_input = {grad.data(), Dtype::Float};
      good &= run(problem, isa, unused) == sum && grad == expected;
    }
  }
  std::printf("label codes of %-13s isa %d %s\n", name, static_cast<int>(isa), good ? "" : "FAILED");
  return good;
}

// A target that lies in memory in another order than the walk: the gradients are those of a copy that does not, bit for
// bit, and so is the sum but for its order. Sizes of the walk, outermost first, and the dimension along which the
// targets are neighbours.
bool check_rectangles(Dtype target_dtype, Isa isa) {
  struct Walk {
    std::vector<int64_t> sizes;
    size_t neighbours;
    bool has_rectangles;
  };
  const std::vector<Walk> walks = {
      // Rows in two parts; the last rectangle has one row more than 16.
      {{145, 513}, 0, true},
      // Rows that touch, in several rectangles for each of the outermost dimension.
      {{3, 700, 21}, 1, true},
      {{3, 1000, 8}, 1, true},
      // Few rows, in two parts.
      {{4, 3, 2900}, 1, true},
      {{4, 2, 2900}, 1, true},
      // Rows that do not touch.
      {{137, 5, 130}, 0, true},
      // Too short for that; too short at all; too small a rectangle.
      {{137, 5, 40}, 0, false},
      {{1300, 7}, 0, false},
      {{500, 5, 5}, 1, false},
  };
  bool good = true;
  for (const Walk& walk : walks) {
    Problem problem;
    problem.ndim = static_cast<int>(walk.sizes.size());
    problem.numel = 1;
    for (int d = 0; d < problem.ndim; ++d) problem.numel *= problem.sizes[d] = walk.sizes[d];
    const int64_t n = problem.numel;
    // Neighbours along one dimension; the others as they are, innermost first.
    int64_t strides[kMaxDims] = {}, stride = walk.sizes[walk.neighbours];
    strides[walk.neighbours] = 1;
    for (int d = problem.ndim - 1; d >= 0; --d) {
      if (strides[d] != 0) continue;
      strides[d] = stride;
      stride *= walk.sizes[d];
    }
    std::vector<double> flat(n), strided(n);
    std::vector<float> input(n), expected(n), grad(n);
    for (int64_t i = 0; i < n; ++i) {
      input[i] = static_cast<float>(i % 201 - 100) * 0.3f;
      flat[i] = target_dtype == Dtype::Bool ? static_cast<double>(i % 3 == 0) : static_cast<double>(i % 257) / 256;
      int64_t offset = 0, rest = i;
      for (int d = problem.ndim - 1; d >= 0; rest /= walk.sizes[d--]) offset += rest % walk.sizes[d] * strides[d];
      strided[offset] = flat[i];
    }
    Buffer in_order = make(target_dtype, flat), out_of_order = make(target_dtype, strided);
    problem.input = {input.data(), Dtype::Float, Layout::Flat, {}};
    problem.target = {in_order.data(), target_dtype, Layout::Flat, {}};
    problem.reduce = true;
    problem.grad_input = {expected.data(), Dtype::Float};
    bool unused;
    const double sum = run(problem, isa, unused);
    problem.target = {out_of_order.data(), target_dtype, Layout::Strided, {}};
    std::copy(strides, strides + kMaxDims, problem.target.strides);
    problem.grad_input = {grad.data(), Dtype::Float};
    good &= std::fabs(run(problem, isa, unused) - sum) <= 1e-6 * sum && grad == expected;
    const Chunks chunks(problem);
    int64_t elements = 0;
    for (int64_t i = 0; i < chunks.size(); ++i) elements += chunks[i].numel();
    good &= elements == n && (chunks[0].rows_along >= 0) == walk.has_rectangles;
  }
  std::printf("rectangles of %-14s isa %d %s\n", target_dtype == Dtype::Bool ? "bool" : "numbers",
              static_cast<int>(isa), good ? "" : "FAILED");
  return good;
}

// An operand whose rows lie apart in memory, are one number each, or are the same row: gradients and sum are those of a
// copy without gaps, bit for bit.
bool check_rows(Dtype dtype, Isa isa) {
  // Blocks are 1,024 float32 or 512 float64: rows that hold some, that most blocks reach beyond, that are just one, and
  // that are shorter.
  const std::vector<std::vector<int64_t>> walks = {{5, 4096}, {7, 1500}, {2, 3, 1031}, {9, 1024}, {9, 1023}, {30, 511}};
  bool good = true;
  for (const std::vector<int64_t>& sizes : walks) {
    Problem problem;
    problem.ndim = static_cast<int>(sizes.size());
    problem.numel = 1;
    for (int d = 0; d < problem.ndim; ++d) problem.numel *= problem.sizes[d] = sizes[d];
    problem.compute_in_double = dtype == Dtype::Double;
    const Dtype type = problem.compute_in_double ? Dtype::Double : Dtype::Float;
    const int64_t n = problem.numel, row = sizes.back();
    std::vector<double> numbers(n);
    for (int64_t i = 0; i < n; ++i) numbers[i] = static_cast<double>(i % 201 - 100) * 0.25;
    Buffer input = make(type, numbers);
    Buffer expected = make(type, std::vector<double>(n)), grad = expected;
    problem.input = {input.data(), type, Layout::Flat, {}};
    problem.target = {input.data(), type, Layout::Flat, {}};
    problem.reduce = true;
    enum Kind { kApart, kOneNumber, kSameRow };
    for (const Kind kind : {kApart, kOneNumber, kSameRow}) {
      int64_t strides[kMaxDims] = {};
      strides[problem.ndim - 1] = kind == kOneNumber ? 0 : 1;
      int64_t stride = kind == kApart ? row + 7 : kind == kOneNumber ? 1 : 0;
      for (int d = problem.ndim - 2; d >= 0; stride *= sizes[d--]) strides[d] = stride;
      std::vector<double> flat(n), in_rows(n / row * (row + 7));
      for (int64_t i = 0; i < n; ++i) {
        int64_t offset = 0, rest = i;
        for (int d = problem.ndim - 1; d >= 0; rest /= sizes[d--]) offset += rest % sizes[d] * strides[d];
        flat[i] = static_cast<double>(offset % 257) / 256;
        in_rows[offset] = flat[i];
      }
      Buffer without_gaps = make(dtype, flat), with_gaps = make(dtype, in_rows);
      for (Operand Problem::* operand : {&Problem::input, &Problem::target, &Problem::weight, &Problem::pos_weight}) {
        Problem one = problem;
        bool unused;
        one.*operand = {without_gaps.data(), dtype, Layout::Flat, {}};
        one.grad_input = {expected.data(), type};
        const double sum = run(one, isa, unused);
        one.*operand = {with_gaps.data(), dtype, Layout::Strided, {}};
        std::copy(strides, strides + kMaxDims, (one.*operand).strides);
        one.grad_input = {grad.data(), type};
        good &= run(one, isa, unused) == sum && grad.storage == expected.storage;
      }
    }
  }
  std::printf("rows of type %-15d isa %d %s\n", static_cast<int>(dtype), static_cast<int>(isa), good ? "" : "FAILED");
  return good;
}

// Outputs past the caches are those that go through them, and nothing beside them is written, wherever they begin.
bool check_past_caches(Dtype dtype, Isa isa) {
  bool good = true;
  for (const int64_t n : {64, 1024, 1100, 9001}) {
    std::vector<double> numbers(n);
    for (int64_t i = 0; i < n; ++i) numbers[i] = static_cast<double>(i % 201 - 100) * 0.25;
    Buffer input = make(dtype, numbers), weight = make(Dtype::Float, numbers);
    const int64_t bytes = n * (dtype == Dtype::Float ? 4 : 2);
    for (const int64_t begin : {0, 16, 64}) {  // bytes beyond a cache line
      constexpr int64_t kLine = 64;
      std::vector<uint8_t> expected(bytes + 3 * kLine, 0xab), got(expected.size() + kLine, 0xab);
      uint8_t* const line = got.data() + (kLine - reinterpret_cast<uintptr_t>(got.data()) % kLine) % kLine;
      for (const bool is_weighted : {false, true}) {
        Problem problem;
        bool unused;
        problem.numel = n;
        problem.ndim = 1;
        problem.sizes[0] = n;
        problem.input = {input.data(), dtype, Layout::Flat, {}};
        problem.target = {input.data(), dtype, Layout::Flat, {}};
        if (is_weighted) problem.weight = {weight.data(), Dtype::Float, Layout::Flat, {}};
        problem.reduce = true;
        problem.grad_input = {expected.data() + begin, dtype};
        run(problem, isa, unused);
        problem.past_caches = true;
        problem.grad_input = {line + begin, dtype};
        run(problem, isa, unused);
        good &= std::equal(expected.begin(), expected.end(), line);
      }
    }
  }
  std::printf("past the caches, type %-6d isa %d %s\n", static_cast<int>(dtype), static_cast<int>(isa),
              good ? "" : "FAILED");
  return good;
}

}  // namespace

int main() {
  bool good = true;
  for (const Isa isa : {Isa::Baseline, Isa::Avx2, Isa::Avx512}) {
    if (!is_supported(isa)) continue;
    good &= check("float32", Dtype::Float, Dtype::Float, isa, false);
    good &= check("float32, bool target", Dtype::Float, Dtype::Bool, isa, false);
    good &= check("float32, pos_weight", Dtype::Float, Dtype::Float, isa, true);
    good &= check("float64", Dtype::Double, Dtype::Double, isa, false);
    good &= check("bfloat16", Dtype::BFloat16, Dtype::BFloat16, isa, false);
    for (const Dtype dtype : {Dtype::Float, Dtype::Bool, Dtype::BFloat16, Dtype::Double}) {
      good &= check_rectangles(dtype, isa);
    }
    for (const Dtype dtype : {Dtype::Float, Dtype::BFloat16, Dtype::Double}) good &= check_rows(dtype, isa);
    for (const Dtype dtype : {Dtype::Float, Dtype::BFloat16}) good &= check_past_caches(dtype, isa);
    good &= check_codes<float>("float32", Dtype::Float, -100.0f, isa);
    good &= check_codes<int64_t>("int64", Dtype::Int64, 255, isa);
    good &= check_codes<uint8_t>("uint8", Dtype::UInt8, 255, isa);
  }
  return good ? 0 : 1;
}
