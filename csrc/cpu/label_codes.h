// Targets in two bits each, where every one of them is 0, 1 or ignored. A mean over the elements that are not ignored
// needs its targets twice, as their number divides the gradients: the count leaves these codes, and the pass reads them
// instead of the targets, which take sixteen times the memory in float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>

#include "../problem.h"
#include "memory_access.h"
#include "operand_reader.h"

namespace bce_ext {
namespace BCE_EXT_ISA {
namespace {

#if defined(__x86_64__)
// A bit for each place of a condition.
template <typename Condition>
BCE_EXT_HOST_DEVICE uint32_t bits_of(Condition condition) {
  if constexpr (sizeof(condition.low) == 32) {
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)condition.low)) |
           static_cast<uint32_t>(_mm256_movemask_ps((__m256)condition.high)) << Condition::kPerRegister;
  } else {
    return static_cast<uint32_t>(_mm_movemask_ps((__m128)condition.low)) |
           static_cast<uint32_t>(_mm_movemask_ps((__m128)condition.high)) << Condition::kPerRegister;
  }
}

// The codes of a pack of targets. Adds bits to `without_code` where one is neither 0 nor 1 nor ignored.
template <typename Labels, typename Bits>
BCE_EXT_HOST_DEVICE LabelCodes codes_of(Labels targets, Labels ignored, Bits& without_code) {
  using Register = typename Labels::Register;
  if constexpr (sizeof(Register) == 64) {
    const __m512 low = (__m512)targets.low, high = (__m512)targets.high, one = _mm512_set1_ps(1.0f);
    const __mmask16 valid_low = _mm512_cmp_ps_mask(low, (__m512)ignored.low, _CMP_NEQ_UQ);
    const __mmask16 valid_high = _mm512_cmp_ps_mask(high, (__m512)ignored.high, _CMP_NEQ_UQ);
    const __mmask16 not_one_low = _mm512_mask_cmp_ps_mask(valid_low, low, one, _CMP_NEQ_UQ);
    const __mmask16 not_one_high = _mm512_mask_cmp_ps_mask(valid_high, high, one, _CMP_NEQ_UQ);
    auto bits = (__m512i)without_code;
    bits = _mm512_mask_or_epi32(bits, not_one_low, bits, (__m512i)low);
    bits = _mm512_mask_or_epi32(bits, not_one_high, bits, (__m512i)high);
    without_code = (Bits)bits;
    // The two masks become one number where they are.
    return {~_cvtmask32_u32(_mm512_kunpackw(not_one_high, not_one_low)),
            _cvtmask32_u32(_mm512_kunpackw(valid_high, valid_low))};
  } else {
    const auto is_ignored = targets == ignored, is_one_or_ignored = is_ignored | (targets == Labels(1.0f));
    without_code |= (Bits)targets.low & ~(Bits)is_one_or_ignored.low;
    without_code |= (Bits)targets.high & ~(Bits)is_one_or_ignored.high;
    constexpr uint32_t kAllPlaces = (1u << Labels::kElements) - 1;
    return {bits_of(is_one_or_ignored), bits_of(is_ignored) ^ kAllPlaces};
  }
}
#endif

// Writes the codes of n targets, which are followed by others up to a whole vector. Returns how many are valid, or
// nothing where a target has no code, such as one that is not 0 or 1 and, for the sake of one instruction, -0. Fetches
// what is `ahead` of as many.
BCE_EXT_TARGET std::optional<int64_t> encode_labels(int64_t n, const float* targets, float ignored, const Stream& ahead,
                                                    LabelCodes* codes) {
#if defined(__x86_64__)
  using Labels = Numbers<float>;
  typename Vectors<BCE_EXT_VECTOR_BYTES>::Bits without_code = {};
  int64_t valid = 0;
  for (int64_t i = 0; i < n; i += LabelCodes::kLabels) {
    const int64_t labels = smaller(LabelCodes::kLabels, n - i);
    LabelCodes code = {};
    for (int64_t at = 0; at < labels; at += kLanes<float>) {
      prefetch_any<float>(ahead, i + at);
      const LabelCodes part = codes_of(Labels::load(targets + i + at), Labels(ignored), without_code);
      code.ones |= part.ones << at;
      code.valid |= part.valid << at;
    }
    codes[i / LabelCodes::kLabels] = code;
    valid += __builtin_popcount(code.valid & (~0u >> (LabelCodes::kLabels - labels)));
  }
  uint32_t any = 0;
  for (size_t place = 0; place < sizeof(without_code) / sizeof(any); ++place) any |= without_code[place];
  if (any == 0) return valid;
#else
  // There is no instruction that gathers the bits of a comparison.
  (void)n, (void)targets, (void)ignored, (void)ahead, (void)codes;
#endif
  return std::nullopt;
}

// A bit for each of LabelCodes::kLabels bytes: whether it equals `byte`.
BCE_EXT_TARGET inline uint32_t bits_of_equal(const uint8_t* bytes, uint8_t byte) {
  uint32_t bits = 0;
#if defined(__x86_64__)
  if constexpr (BCE_EXT_VECTOR_BYTES >= 32) {
    bits = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_loadu_si256((const __m256i*)bytes), _mm256_set1_epi8(byte)));
  } else {
    for (int half = 0; half < 2; ++half) {
      const __m128i in = _mm_loadu_si128((const __m128i*)bytes + half);
      bits |= static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(in, _mm_set1_epi8(byte)))) << (16 * half);
    }
  }
#else
  (void)bytes, (void)byte;
#endif
  return bits;
}

// Writes the codes of bytes. None is ignored where `ignored` is no byte. False where a target has no code.
BCE_EXT_TARGET bool encode_bytes(int64_t n, const uint8_t* targets, int ignored, LabelCodes* codes) {
  uint32_t have_no_code = 0;
  for (int64_t i = 0; i < n; i += LabelCodes::kLabels) {
    const uint8_t* bytes = targets + i;
    uint8_t last[LabelCodes::kLabels] = {};
    if (n - i < LabelCodes::kLabels) bytes = static_cast<const uint8_t*>(memcpy(last, bytes, n - i));
    const uint32_t ones = bits_of_equal(bytes, 1);
    const uint32_t ignores = ignored < 0 ? 0 : bits_of_equal(bytes, static_cast<uint8_t>(ignored));
    have_no_code |= ~(bits_of_equal(bytes, 0) | ones | ignores);
    codes[i / LabelCodes::kLabels] = {ones, ~ignores};
  }
  return have_no_code == 0;
}

// Which of the places of a register have their bit set, the first the lowest one.
template <typename Register>
BCE_EXT_HOST_DEVICE auto places_of(uint32_t bits) {
  using Places = typename Vectors<sizeof(Register)>::Bits;
  Places places = {};
  for (uint32_t place = 0; place < sizeof(Register) / sizeof(uint32_t); ++place) places[place] = 1u << place;
  return ((bits - Places{}) & places) != 0;
}

// A condition on a pack, made of bits; with AVX-512 these are masks as they are.
template <typename Labels>
struct BitCondition {
  uint32_t low, high;

  BCE_EXT_HOST_DEVICE BitCondition(const uint32_t& bits, int64_t i) {
    if constexpr (Labels::kElements == LabelCodes::kLabels) {
      uint16_t halves[2];
      memcpy(halves, &bits, sizeof(halves));
      low = halves[0], high = halves[1];
    } else {
      low = bits >> (i % LabelCodes::kLabels), high = low >> Labels::kPerRegister;
    }
  }

  BCE_EXT_HOST_DEVICE Labels select(Labels a, Labels b) const {
    return {select(low, a.low, b.low), select(high, a.high, b.high)};
  }

 private:
  using Register = typename Labels::Register;

  static BCE_EXT_HOST_DEVICE Register select(uint32_t bits, Register a, Register b) {
#if defined(__x86_64__)
    if constexpr (sizeof(Register) == 64) {
      return (Register)_mm512_mask_mov_ps((__m512)b, static_cast<__mmask16>(bits), (__m512)a);
    }
#endif
    return places_of<Register>(bits) ? a : b;
  }
};

// Which elements are ignored, by the bits of the others: those are what a mask keeps.
template <typename Labels>
struct IgnoredByCode {
  BitCondition<Labels> valid;
};

template <typename Labels>
BCE_EXT_HOST_DEVICE Labels unless(IgnoredByCode<Labels> ignored, Labels term) {
  return ignored.valid.select(term, Labels(0.0f));
}

// The targets from the i-th on, as many as fill a pack. Those that are not valid are 0 or 1 as well.
template <typename Labels, typename S>
BCE_EXT_HOST_DEVICE Labels load_target(const S* targets, int64_t i) {
  if constexpr (std::is_same_v<S, LabelCodes>) {
    const LabelCodes& codes = targets[i / LabelCodes::kLabels];
    return BitCondition<Labels>(codes.ones, i).select(Labels(1.0f), Labels(0.0f));
  } else {
    return load<Labels>(targets + i);
  }
}

// Which of those targets are ignored.
template <typename Labels, typename S, typename Rule>
BCE_EXT_HOST_DEVICE auto ignored_of(const S* targets, int64_t i, Labels loaded, const Rule& rule) {
  if constexpr (std::is_same_v<S, LabelCodes>) {
    return IgnoredByCode<Labels>{BitCondition<Labels>(targets[i / LabelCodes::kLabels].valid, i)};
  } else {
    return rule.is_ignored(loaded);
  }
}

// Supplies the targets of a chunk: from their codes where there are some.
template <typename T>
class TargetReader {
 public:
  BCE_EXT_TARGET TargetReader(const Problem& problem, const Chunk& chunk)
      : memory_(problem, problem.target, chunk),
        codes_(problem.label_codes),
        ignored_(static_cast<T>(problem.ignore_index)) {}

  BCE_EXT_TARGET Stream ahead(int64_t next) const {
    if (codes_ != nullptr) return {static_cast<const char*>(place(next + kAhead<T>)), 0};
    return memory_.ahead(next);
  }

  BCE_EXT_TARGET const void* place(int64_t begin) const {
    if (codes_ != nullptr) return codes_ + begin / LabelCodes::kLabels;
    return memory_.place(begin);
  }

  // As that of OperandReader.
  BCE_EXT_TARGET const T* block(int64_t begin, int64_t n) {
    if constexpr (std::is_same_v<T, float>) {
      if (codes_ != nullptr) {
        for (int64_t i = 0; i < n; i += kLanes<T>) decode(begin + i).store(decoded_ + i);
        return decoded_;
      }
    }
    return memory_.block(begin, n);
  }

 private:
  BCE_EXT_HOST_DEVICE Numbers<T> decode(int64_t i) const {
    const BitCondition<Numbers<T>> valid(codes_[i / LabelCodes::kLabels].valid, i);
    return valid.select(load_target<Numbers<T>>(codes_, i), ignored_);
  }

  OperandReader<T> memory_;
  const LabelCodes* const codes_;
  const Numbers<T> ignored_;
  alignas(kCacheLine) T decoded_[std::is_same_v<T, float> ? kBlock<T> + kStagger<T> : 1];
};

}  // namespace
}  // namespace BCE_EXT_ISA
}  // namespace bce_ext
