// The kernel for what is common: input and target dense and in walk order, in vectors. Two variants: kWeighted reads
// the weights in any of the ways of factor.cuh and adjusts targets, the other has neither.
#pragma once

#include <c10/macros/Macros.h>

#include "block_reduce.cuh"
#include "vector_arguments.cuh"

namespace bce_ext {
namespace cuda {

// What a thread does with its elements, N at a time.
template <typename Formula, typename Input, typename Target, bool kWeighted>
class VectorPass {
 public:
  using C = compute_t<Input>;
  using Arguments = VectorArguments<Formula, C>;
  static constexpr int N = kVectorSize<Input, Target, kWeighted>;

  // Without weights, grad_output may be one value: a factor of the gradient.
  __device__ __forceinline__ explicit VectorPass(const Arguments& arguments)
      : arguments_(arguments),
        scale_(arguments.constants.full_scale() * (kWeighted ? C(1) : constant_value<C>(arguments.grad_output))),
        weight_(kWeighted ? constant_value<C>(arguments.weight) * constant_value<C>(arguments.grad_output) : C(1)),
        pos_weight_(kWeighted ? constant_value<C>(arguments.pos_weight) : C(1)) {}

  // Input and target of elements [index, index + N), all of them there and aligned.
  struct Loaded {
    Packed<Input, N> inputs;
    Packed<Target, N> targets;
  };

  __device__ __forceinline__ Loaded load(int64_t index) const {
    return {{arguments_.input, index}, {arguments_.target, index}};
  }

  // Returns the sum of their losses, where it is wanted.
  __device__ __forceinline__ C vector(int64_t index, const Loaded& loaded) {
    Elements elements;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      elements.x[k] = loaded.inputs.template value<C>(k);
      elements.y[k] = loaded.targets.template value<C>(k);
      check(elements.x[k], elements.y[k]);
    }
    if constexpr (kWeighted) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        elements.w[k] = weight_;
        elements.p[k] = pos_weight_;
      }
      multiply<Input>(arguments_.weight, index, elements.w);
      multiply<Input>(arguments_.grad_output, index, elements.w);
      multiply<Input>(arguments_.pos_weight, index, elements.p);
    }
    switch (arguments_.wanted) {
      case Wanted::Sum:
        return sum<false>(index, elements);
      case Wanted::SumAndGradInput:
        return sum<true>(index, elements);
      case Wanted::Losses:
        return by_labels<true, false>(index, elements);
      case Wanted::GradInput:
        return by_labels<false, true>(index, elements);
      default:
        if constexpr (kWeighted) return all(index, elements);
        return C(0);  // not without weights: see needs_weights
    }
  }

  // One element, wherever it lies. Returns its loss.
  __device__ __forceinline__ C element(int64_t index) {
    [[maybe_unused]] C w = weight_, p = pos_weight_;
    if constexpr (kWeighted) {
      w *= factor_at<Input, C>(arguments_.weight, index) * factor_at<Input, C>(arguments_.grad_output, index);
      p *= factor_at<Input, C>(arguments_.pos_weight, index);
    }
    const C x = to_compute<C>(static_cast<const Input*>(arguments_.input)[index]);
    const C y = to_compute<C>(static_cast<const Target*>(arguments_.target)[index]);
    check(x, y);
    Terms<C> terms;
    if constexpr (kWeighted) {
      terms =
          evaluate_by_rule(arguments_.formula, arguments_.constants.rule, x, y, arguments_.constants.rule.is_ignored(y),
                           w, p, scale_, arguments_.formula.template first_stage<kRough>(x));
    } else {
      terms = terms_of<Labels::Any>(x, y, One{}, One{});
    }
    const C loss[1] = {terms.loss}, grad_input[1] = {terms.grad_input}, grad_target[1] = {terms.grad_target};
    store_losses(index, loss);
    store_grad_input(index, grad_input);
    store_grad_target(index, grad_target);
    return terms.loss;
  }

  // Whether all inputs so far were values that the formula is defined for.
  __device__ __forceinline__ bool in_range() const { return in_range_; }

 private:
  static constexpr bool kRough = sizeof(Input) == 2;
  static constexpr bool kHasHardLabels = std::is_integral_v<Target> || std::is_same_v<Target, Boolean>;

  enum class Labels { Any, Hard };

  struct Elements {
    C x[N], y[N], w[N], p[N];
  };

  __device__ __forceinline__ void check(C x, C y) {
    in_range_ &= is_in_range<Formula, std::is_integral_v<Target>>(x, y) ||
                 (kWeighted && y == arguments_.constants.rule.ignore_index);
  }

  // The terms of element k as if it were not ignored.
  template <Labels kLabels>
  __device__ __forceinline__ Terms<C> terms_of(const Elements& elements, int k) const {
    const auto& rule = arguments_.constants.rule;
    if constexpr (kWeighted) {
      const C y = kLabels == Labels::Hard ? elements.y[k] : rule.smoothed(elements.y[k]);
      return terms_of<kLabels>(elements.x[k], y, elements.w[k], elements.p[k]);
    } else {
      return terms_of<kLabels>(elements.x[k], elements.y[k], One{}, One{});
    }
  }

  template <Labels kLabels, typename Weight, typename PosWeight>
  __device__ __forceinline__ Terms<C> terms_of(C x, C y, Weight w, PosWeight p) const {
    const Formula& formula = arguments_.formula;
    if constexpr (kLabels == Labels::Hard) {
      return formula.evaluate_hard(x, y, w, One{}, scale_, formula.template first_stage_of_hard<kRough>(x, y));
    } else {
      return formula.evaluate(x, y, w, p, scale_, formula.template first_stage<kRough>(x));
    }
  }

  __device__ __forceinline__ void clear_ignored(const Elements& elements, C (&values)[N]) const {
    const auto& rule = arguments_.constants.rule;
    if (kWeighted && rule.ignores()) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        values[k] = unless(rule.is_ignored(elements.y[k]), values[k]);
      }
    }
  }

  // Whether the form for hard labels serves: all are 0, 1 or ignored.
  __device__ __forceinline__ bool are_hard(const Elements& elements) const {
    bool result = arguments_.takes_hard_form;
#pragma unroll
    for (int k = 0; !kHasHardLabels && k < N; ++k) {
      const C y = elements.y[k];
      result &= y == C(0) || y == C(1) || (kWeighted && y == arguments_.constants.rule.ignore_index);
    }
    return result;
  }

  template <bool kLosses, bool kGradInput>
  __device__ __forceinline__ C by_labels(int64_t index, const Elements& elements) const {
    if constexpr (Formula::kHasHardForm) {
      if (are_hard(elements)) return evaluate<Labels::Hard, kLosses, kGradInput>(index, elements);
    }
    return evaluate<Labels::Any, kLosses, kGradInput>(index, elements);
  }

  // Stores losses or gradients, and returns the sum of the losses.
  template <Labels kLabels, bool kLosses, bool kGradInput>
  __device__ __forceinline__ C evaluate(int64_t index, const Elements& elements) const {
    C values[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Terms<C> terms = terms_of<kLabels>(elements, k);
      values[k] = kLosses ? terms.loss : terms.grad_input;
    }
    clear_ignored(elements, values);
    if constexpr (kGradInput) store_grad_input(index, values);
    if constexpr (!kLosses) return C(0);
    store_losses(index, values);
    return sum_of(values);
  }

  __device__ __forceinline__ C all(int64_t index, const Elements& elements) const {
    C losses[N], grad_inputs[N], grad_targets[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Terms<C> terms = terms_of<Labels::Any>(elements, k);
      losses[k] = terms.loss;
      grad_inputs[k] = terms.grad_input;
      grad_targets[k] = terms.grad_target * arguments_.constants.rule.slope;
    }
    clear_ignored(elements, losses);
    clear_ignored(elements, grad_inputs);
    clear_ignored(elements, grad_targets);
    store_losses(index, losses);
    store_grad_input(index, grad_inputs);
    store_grad_target(index, grad_targets);
    return sum_of(losses);
  }

  // The sum of the losses, and maybe the gradient. Summands are what losses are as long as their sum is finite, and
  // less work.
  template <bool kGradInput>
  __device__ __forceinline__ C sum(int64_t index, const Elements& elements) const {
    C result = 0;
    bool is_valid;
    if constexpr (!kWeighted && Formula::kTakesProbabilities) {
      if constexpr (kGradInput) evaluate<Labels::Any, false, true>(index, elements);
      is_valid = join_logarithms(elements, result);
    } else {
      if constexpr (Formula::kHasHardForm) {
        if (are_hard(elements)) {
          result = add_summands<Labels::Hard, kGradInput>(index, elements);
        } else {
          result = add_summands<Labels::Any, kGradInput>(index, elements);
        }
      } else {
        result = add_summands<Labels::Any, kGradInput>(index, elements);
      }
      is_valid = math::magnitude(result) < C(math::Format<C>::kInfinity);
    }
    return is_valid ? result : evaluate<Labels::Any, true, false>(index, elements);
  }

  static __device__ __forceinline__ C sum_of(const C (&values)[N]) {
    C sum = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      sum += values[k];
    }
    return sum;
  }

  template <Labels kLabels, bool kGradInput>
  __device__ __forceinline__ C add_summands(int64_t index, const Elements& elements) const {
    constexpr bool kJoins = !kWeighted && Formula::kJoinsLogarithms;
    C summands[N], grad_inputs[N], excess = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Terms<C> terms = terms_of<kLabels>(elements, k);
      summands[k] = terms.summand;
      grad_inputs[k] = terms.grad_input;
      if constexpr (kJoins) {
        excess = math::product_of_excesses(excess, arguments_.formula.template first_stage<kRough>(elements.x[k]));
      }
    }
    if constexpr (kGradInput) {
      clear_ignored(elements, grad_inputs);
      store_grad_input(index, grad_inputs);
    }
    clear_ignored(elements, summands);
    const C sum = sum_of(summands);
    return kJoins ? sum + math::log1p_of_nonnegative(excess) : sum;
  }

  // See Share of formulas/probabilities.h.
  __device__ __forceinline__ bool join_logarithms(const Elements& elements, C& sum) const {
    Share<C> shares[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      shares[k] = arguments_.formula.share_of_nearer(elements.x[k], elements.y[k]);
    }
    const bool is_valid = bce_ext::join_logarithms(shares, sum);
    if constexpr (!kHasHardLabels) {
      if (!are_hard(elements)) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          sum -= minor_term(lifted_odds(shares[k]), elements.y[k]);
        }
      }
    }
    return is_valid;
  }

  template <int M>
  __device__ __forceinline__ void store_losses(int64_t index, const C (&values)[M]) const {
    if (arguments_.loss.data == nullptr) return;
    if (arguments_.loss.dtype == dtype_of<C>()) {
      store_vector<C>(arguments_.loss.data, index, values);
    } else {
      store_vector<Input>(arguments_.loss.data, index, values);
    }
  }

  template <int M>
  __device__ __forceinline__ void store_grad_input(int64_t index, const C (&values)[M]) const {
    if (arguments_.grad_input.data != nullptr) store_vector<Input>(arguments_.grad_input.data, index, values);
  }

  template <int M>
  __device__ __forceinline__ void store_grad_target(int64_t index, const C (&values)[M]) const {
    if constexpr (!kHasHardLabels) {
      if (arguments_.grad_target.data != nullptr) store_vector<Target>(arguments_.grad_target.data, index, values);
    }
  }

  const Arguments& arguments_;
  const C scale_;                // of the gradients
  const C weight_, pos_weight_;  // the constant parts
  bool in_range_ = true;
};

// Blocks that an SM must have room for: a thread has up to 64 registers, or 128 in float64, enough to keep out of local
// memory. The losses with a form for hard labels, and eight probabilities at a time, take more.
template <typename Formula, typename Input, bool kWeighted>
constexpr bool kTakesMoreRegisters =
    Formula::kTakesProbabilities ? !kWeighted && sizeof(Input) == 2 : Formula::kHasHardForm;
template <typename Formula, typename Input, bool kWeighted>
constexpr int kMinBlocks = (sizeof(Input) == 8 ? 2 : 4) - (kTakesMoreRegisters<Formula, Input, kWeighted> ? 1 : 0);

// Whether what a thread will need next is under way while it computes: where memory is what it waits for, and where
// there are registers.
template <typename Formula, typename Input>
constexpr bool kPrefetches = Formula::kJoinsLogarithms || (Formula::kTakesProbabilities && sizeof(Input) > 2);

template <typename Formula, typename Input, typename Target, bool kWeighted>
__global__ void __launch_bounds__(kThreads, kMinBlocks<Formula, Input, kWeighted>)
    vector_kernel(const VectorArguments<Formula, compute_t<Input>> arguments) {
  using Pass = VectorPass<Formula, Input, Target, kWeighted>;
  Pass pass(arguments);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t num_vectors = arguments.aligned ? arguments.numel / Pass::N : 0;
  double sum = 0;
  if (thread < num_vectors) {
    constexpr bool kAhead = kPrefetches<Formula, Input>;
    typename Pass::Loaded next = pass.load(thread * Pass::N);
#pragma unroll 1
    for (int64_t i = thread; i < num_vectors; i += num_threads) {
      const typename Pass::Loaded current = kAhead ? next : pass.load(i * Pass::N);
      if (kAhead && i + num_threads < num_vectors) {
        next = pass.load((i + num_threads) * Pass::N);
      }
      sum += pass.vector(i * Pass::N, current);
    }
  }
  // What is left of a vector, and all that is not aligned: neighbours by neighbouring threads.
#pragma unroll 1
  for (int64_t i = num_vectors * Pass::N + thread; i < arguments.numel; i += num_threads) {
    sum += pass.element(i);
  }
  CUDA_KERNEL_ASSERT(pass.in_range());
  store_block_sum(sum, arguments.partials);
}

}  // namespace cuda
}  // namespace bce_ext
