"""What the public operators should return, from the formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import reference
import torch
from torch import Tensor

Terms = Callable[..., reference.Terms]

# The formula of each public operator, which takes the operator's arguments of the same names.
FORMULAS: dict[str, Terms] = {
    "binary_cross_entropy_with_logits": reference.with_logits,
    "binary_cross_entropy": reference.probabilities,
}
REDUCTIONS = {number: name for name, number in reference.REDUCTION_NUMBER.items()}


def is_ordinary(tensor: Tensor) -> bool:
    """Real numbers in memory, finite: an operand for which the answer is known."""
    if (
        type(tensor) not in (Tensor, torch.nn.Parameter)
        or tensor.layout != torch.strided
        or tensor.device.type != "cpu"
    ):
        return False
    if tensor.dtype not in reference.FLOATING_DTYPES and (
        tensor.is_complex() or tensor.is_quantized or tensor.is_floating_point()
    ):
        return False
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    if (last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes():
        return False
    try:
        return bool(tensor.double().isfinite().all())
    except (RuntimeError, NotImplementedError):
        return False  # a dtype without arithmetic


def wrong_answer(operator: str, variables: dict[str, Any]) -> str | None:
    """None where the answer is not known, "" where it is right, else what is wrong."""
    given = {name: variables.get(name) for name in ("input", "target", "weight", "pos_weight")}
    operands = [value for value in given.values() if value is not None]
    result = variables["result"]
    if not all(isinstance(x, Tensor) and is_ordinary(x) for x in operands) or not isinstance(result, Tensor):
        return None
    if type(result) is not Tensor or result.device.type != "cpu" or given["input"].numel() == 0:
        return None
    formula = FORMULAS[operator]
    terms = formula(*[given[name] for name in formula.__code__.co_varnames[: formula.__code__.co_argcount]])
    expected = reference.reduced(terms, REDUCTIONS[variables.get("reduction", 1)])
    arithmetic = reference.arithmetic_dtype(given["input"].dtype, given["target"].dtype)
    answers = {"loss": (result, expected.loss, expected.loss_scale)}
    if all(isinstance(x, Tensor) and bool((x == 1).all()) for x in variables.get("grad_outputs", [None])):
        for tensor, gradient in zip(variables["inputs"], variables.get("grads", ()), strict=False):
            if tensor is given["input"]:
                answers["gradient of input"] = (gradient, expected.grad_input, expected.grad_input_scale)
            elif tensor is given["target"]:
                answers["gradient of target"] = (gradient, expected.grad_target, expected.grad_target_scale)
    for what, (actual, right, scale) in answers.items():
        if not math.isfinite(float(scale.sum())):
            continue
        if actual is None:
            return f"{what}: there is none"
        try:
            reference.assert_rounded_once(actual.detach(), right, scale, arithmetic, ulps=16, what=what)
        except AssertionError as error:
            return str(error)
    return ""
