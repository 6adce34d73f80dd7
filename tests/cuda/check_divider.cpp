// Compares Divider with the division of the language, up to the ends of its ranges.
#include "cuda/divider.cuh"

template <typename Int>
bool is_exact() {
  std::mt19937_64 random(0);
  constexpr int kBits = 8 * sizeof(Int) - 1;
  const auto number = [&] {
    return static_cast<Int>((random() >> (64 - kBits)) >> (random() % kBits));
  };  // of every magnitude
  constexpr Int kLargest = std::numeric_limits<Int>::max();
  for (int i = 0; i < 200000; ++i) {
    const Int d = i < 1000 ? i + 1 : i == 1000 ? kLargest : std::max<Int>(number(), 1);
    const bce_ext::cuda::Divider<Int> divider(d);
    const Int multiple = kLargest / d * d;
    for (const Int n : {Int(0), Int(d - 1), d, number(), number(), Int(multiple - 1), multiple, kLargest}) {
      if (divider.divide(n) != n / d) return false;
    }
  }
  return true;
}

int main() { return is_exact<int32_t>() && is_exact<int64_t>() ? 0 : 1; }
