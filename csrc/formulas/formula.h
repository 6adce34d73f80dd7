// What every formula has, and what is common to formulas of a logit.
#pragma once

#include "../elementary.h"
#include "../terms.h"

namespace bce_ext {

// What a formula is, unless it says otherwise. See formulas.h.
struct FormulaDefaults {
  static constexpr bool kJoinsLogarithms = false;  // losses without weights are their summand + log1p(first_stage)
  static constexpr bool kTakesProbabilities = false;
  static constexpr bool kHasHardForm = false;
  static constexpr bool kGradInputNeedsFirstStage = true;
};

struct FormulaOfLogit : FormulaDefaults {
  template <bool kRough = false, typename T>
  BCE_EXT_HOST_DEVICE T first_stage(T x) const {
    return math::exp_of_negative<kRough>(math::magnitude(x));
  }
};

}  // namespace bce_ext
