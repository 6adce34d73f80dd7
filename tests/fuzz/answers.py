"""What the public operators should return, from the formulas in float64."""

from __future__ import annotations

import inspect
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


def expected_terms(operator: str, variables: dict[str, Any]) -> reference.Terms:
    """Loss and gradients with their reduction, and with what the overloads with options add."""
    formula = FORMULAS[operator.partition(".")[0]]
    raw = variables["target"].double()
    smoothing = variables.get("label_smoothing", 0.0)
    given = {name: variables.get(name) for name in inspect.signature(formula).parameters}
    terms = formula(**given | {"target": raw * (1 - smoothing) + smoothing / 2})
    terms.grad_target, terms.grad_target_scale = (
        (1 - smoothing) * terms.grad_target,
        (1 - smoothing) * terms.grad_target_scale,
    )
    ignored = torch.zeros_like(raw, dtype=torch.bool)
    if (index := variables.get("ignore_index")) is not None:
        ignored = raw == index
    for field in vars(terms):
        setattr(terms, field, torch.where(ignored, 0.0, getattr(terms, field)))
    reduction = REDUCTIONS[variables.get("reduction", 1)]
    if reduction != "mean":
        return reference.reduced(terms, reduction)
    normalizer = variables.get("normalizer")
    divisor = (~ignored).sum().double() if normalizer is None else normalizer.double()
    expected = reference.reduced(terms, "sum", 1 / divisor)
    expected.loss, expected.loss_scale = expected.loss / divisor, (expected.loss_scale / divisor).abs()
    return expected


def wrong_answer(operator: str, variables: dict[str, Any]) -> str | None:
    """None where the answer is not known, "" where it is right, else what is wrong."""
    names = ("input", "target", "weight", "pos_weight", "normalizer")
    input, target, *others = (variables.get(name) for name in names)
    operands = [input, target, *(value for value in others if value is not None)]
    result = variables["result"]
    if not all(isinstance(x, Tensor) and is_ordinary(x) for x in operands) or not isinstance(result, Tensor):
        return None
    if type(result) is not Tensor or result.device.type != "cpu" or input.numel() == 0:
        return None
    expected = expected_terms(operator, variables)
    arithmetic = reference.arithmetic_dtype(input.dtype, target.dtype)
    answers = {"loss": (result, expected.loss, expected.loss_scale)}
    if all(
        isinstance(x, Tensor) and is_ordinary(x) and bool((x == 1).all()) for x in variables.get("grad_outputs", [None])
    ):
        for tensor, gradient in zip(variables["inputs"], variables.get("grads", ()), strict=False):
            if tensor is input:
                answers["gradient of input"] = (gradient, expected.grad_input, expected.grad_input_scale)
            elif tensor is target:
                answers["gradient of target"] = (gradient, expected.grad_target, expected.grad_target_scale)
    known = {what: answer for what, answer in answers.items() if math.isfinite(float(answer[2].sum()))}
    for what, (actual, right, scale) in known.items():
        if actual is None:
            return f"{what}: there is none"
        try:
            reference.assert_rounded_once(actual.detach(), right, scale, arithmetic, ulps=16, what=what)
        except AssertionError as error:
            return str(error)
    return "" if known else None
