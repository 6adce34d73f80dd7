// The formulas of the losses and their gradients for one element: host and device. Terms that the caller does not use
// cost nothing.
//
// A formula is a template over the scalar type, made from the parameters of a Problem. It offers first_stage(x) and
// evaluate(x, y, w, p, scale, first_stage(x)), the loss and its gradients, these multiplied by `scale`. It has two
// stages because a loop over each of them is faster on a CPU than one loop over both: it overlaps more elements. Where
// w or p is known to be 1 it may be One. first_stage<true>(x) is rougher, for inputs of half precision.
//
// A formula whose terms are simpler for targets that are 0 or 1 has a form of its own for them:
// first_stage_of_hard(x, y) and evaluate_hard(x, y, w, One, scale, first_stage_of_hard(x, y)), without pos_weight and
// the derivative with respect to the target. hard_form_serves() says whether the parameters allow
// it.
//
// grad_input depends on the first stage unless kGradInputNeedsFirstStage is false. Losses of probabilities that have
// the same weight are added by share_of_nearer(x, y), whose logarithms are joined.
#pragma once

#include "formulas/asymmetric.h"
#include "formulas/cross_entropy.h"
#include "formulas/focal.h"
#include "formulas/probabilities.h"
