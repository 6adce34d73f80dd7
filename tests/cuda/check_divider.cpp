// Compares Divider with the division of the language, up to the ends of its ranges.
#include "cuda/divider.cuh"

int main() {
  std::mt19937_64 random(0);
  const auto number = [&] { return static_cast<int64_t>((random() >> 1) >> (random() % 63)); };  // of every magnitude
  constexpr int64_t kLargest = INT64_MAX;
  for (int i = 0; i < 200000; ++i) {
    const int64_t d = i < 1000 ? i + 1 : i == 1000 ? kLargest : std::max<int64_t>(number(), 1);
    const bce_ext::cuda::Divider divider(d);
    const int64_t multiple = kLargest / d * d;
    for (const int64_t n : {int64_t(0), d - 1, d, number(), number(), multiple - 1, multiple, kLargest}) {
      if (divider.divide(n) != n / d) return 1;
    }
  }
  return 0;
}
