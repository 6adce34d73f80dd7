// Runs the kernels of csrc/cuda under the shim: run_kernels CASES RESULTS. The formats are those of harness.py.
#include <cstdio>
#include <fstream>
#include <iostream>
#include <memory>

#include "cuda/solve.cuh"

using namespace bce_ext;

namespace {

constexpr bool is_generic(const void*) { return false; }

template <typename Formula, typename C>
constexpr bool is_generic(const cuda::GenericArguments<Formula, C>*) {
  return true;
}

struct ShimLauncher {
  shim::Schedule schedule;
  bool* vectorized;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) const {
    constexpr bool kIsGeneric = (is_generic(static_cast<std::decay_t<Parameters>*>(nullptr)) || ...);
    *vectorized &= !kIsGeneric;
    shim::machine.launch(blocks, threads, schedule, [&] { kernel(arguments...); });
  }
};

class Reader {
 public:
  explicit Reader(const char* path) : file_(path, std::ios::binary) {
    file_.exceptions(std::ios::failbit | std::ios::badbit);
  }

  bool at_end() { return file_.peek() == std::ifstream::traits_type::eof(); }

  int64_t integer() { return read<int64_t>(); }
  double real() { return read<double>(); }
  void bytes(char* data, int64_t size) { file_.read(data, size); }

 private:
  template <typename T>
  T read() {
    T value;
    file_.read(reinterpret_cast<char*>(&value), sizeof(value));
    return value;
  }

  std::ifstream file_;
};

// An array of exactly `size` bytes, `shift` bytes off alignment: the address sanitizer sees every access beside it. So
// do the guards without it.
class Buffer {
 public:
  Buffer(int64_t size, int64_t shift) : size_(size), shift_(shift), memory_(new char[kGuard + shift + size + kGuard]) {
    std::memset(memory_.get(), kFill, kGuard + shift + size + kGuard);
  }

  char* data() const { return memory_.get() + kGuard + shift_; }
  int64_t size() const { return size_; }

  bool intact() const {
    const auto filled = [](const char* begin, const char* end) {
      return std::all_of(begin, end, [](char byte) { return byte == kFill; });
    };
    return filled(memory_.get(), data()) && filled(data() + size_, data() + size_ + kGuard);
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kGuard = 0;
#else
  static constexpr int64_t kGuard = 64;
#endif
  static constexpr char kFill = '\xff';  // NaN in every floating type

  int64_t size_, shift_;
  std::unique_ptr<char[]> memory_;
};

enum class Task : int64_t { Solve, Scale, Count };

std::unique_ptr<Buffer> read_operand(Reader& reader, Operand& operand) {
  operand.dtype = static_cast<Dtype>(reader.integer());
  operand.layout = static_cast<Layout>(reader.integer());
  for (int64_t& stride : operand.strides) stride = reader.integer();
  const int64_t first = reader.integer();
  const int64_t shift = reader.integer();
  const int64_t size = reader.integer();
  auto buffer = std::make_unique<Buffer>(size, shift);
  reader.bytes(buffer->data(), size);
  operand.data = operand.layout == Layout::Absent ? nullptr : buffer->data() + first;
  return buffer;
}

std::unique_ptr<Buffer> read_output(Reader& reader, Output& output) {
  const int64_t wanted = reader.integer();
  output.dtype = static_cast<Dtype>(reader.integer());
  const int64_t shift = reader.integer();
  const int64_t size = reader.integer();
  auto buffer = std::make_unique<Buffer>(wanted ? size : 0, shift);
  output.data = wanted ? buffer->data() : nullptr;
  return buffer;
}

void run_case(Reader& reader, std::ofstream& results) {
  Problem problem;
  const auto task = static_cast<Task>(reader.integer());
  problem.formula = static_cast<Formula>(reader.integer());
  problem.compute_in_double = reader.integer() != 0;
  problem.reduce = reader.integer() != 0;
  problem.ignores = reader.integer() != 0;
  problem.checks_labels = reader.integer() != 0;
  problem.divisor = reader.real();
  problem.label_smoothing = reader.real();
  problem.ignore_index = reader.real();
  for (double& parameter : problem.parameters) parameter = reader.real();
  const int64_t max_blocks = reader.integer();
  shim::Schedule schedule;
  schedule.order = static_cast<shim::Schedule::Order>(reader.integer());
  schedule.seed = static_cast<unsigned int>(reader.integer());
  problem.numel = reader.integer();
  problem.ndim = static_cast<int>(reader.integer());
  for (int64_t& size : problem.sizes) size = reader.integer();
  std::vector<std::unique_ptr<Buffer>> inputs, outputs;
  for (Operand* operand : {&problem.input, &problem.target, &problem.weight, &problem.pos_weight, &problem.grad_output,
                           &problem.normalizer}) {
    inputs.push_back(read_operand(reader, *operand));
  }
  Output total;
  for (Output* output : {&problem.loss, &problem.grad_input, &problem.grad_target, &total})
    outputs.push_back(read_output(reader, *output));

  bool vectorized = true;
  const ShimLauncher launch{schedule, &vectorized};
  if (task == Task::Scale) {
    std::memcpy(problem.grad_input.data, problem.input.data, inputs[0]->size());
    cuda::scale_grad(problem.grad_input, problem.numel, problem.grad_output.data, problem.grad_output.dtype, launch,
                     max_blocks);
  } else if (task == Task::Count) {
    const Buffer partials(cuda::max_count_partials(problem.numel, max_blocks) * sizeof(double), 0);
    cuda::count_valid(problem.target.data, problem.target.dtype, problem.numel, problem.ignore_index,
                      reinterpret_cast<double*>(partials.data()), total, launch, max_blocks);
    if (!partials.intact()) throw std::runtime_error("a write outside of the partial sums");
  } else {
    const Buffer partials(cuda::max_partials(problem.numel, max_blocks) * sizeof(double), 0);
    cuda::solve(problem, reinterpret_cast<double*>(partials.data()), total, launch, max_blocks);
    if (!partials.intact()) throw std::runtime_error("a write outside of the partial sums");
  }
  const char is_vectorized = vectorized;
  results.write(&is_vectorized, 1);
  for (const auto& output : outputs) {
    if (!output->intact()) throw std::runtime_error("a write outside of an output");
    results.write(output->data(), output->size());
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  try {
    Reader reader(argv[1]);
    std::ofstream results(argv[2], std::ios::binary);
    while (!reader.at_end()) run_case(reader, results);
    if (shim::machine.assertion_failed()) throw std::runtime_error("device-side assert triggered");
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
