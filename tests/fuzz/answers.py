"""What the public operators should return, from the formulas in float64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import reference
import torch
from torch import Tensor

from .schemas import operators


def _without_gradients(loss: Tensor, scale: Tensor) -> reference.Terms:
    unknown = torch.full_like(loss, math.inf)  # a scale beyond which nothing is compared
    return reference.Terms(loss, scale, unknown, unknown, unknown, unknown)


def focal(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, alpha: float, gamma: float
) -> reference.Terms:
    entropy = reference.with_logits(input, target, weight, pos_weight)
    x, y = input.double(), target
    share = (1 - y) * x.sigmoid() + y * (-x).sigmoid()
    factor = torch.ones_like(y) if alpha < 0 else alpha * y + (1 - alpha) * (1 - y)
    power = factor * share**gamma
    return _without_gradients(entropy.loss * power, entropy.loss_scale * power.abs() * (1 + gamma))


def asymmetric(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    gamma_neg: float,
    gamma_pos: float,
    clip: float,
    eps: float,
) -> reference.Terms:
    x, y = input.double(), target
    w, p = (torch.ones_like(x) if t is None else t.double().expand_as(x) for t in (weight, pos_weight))
    positive, negative = x.sigmoid(), ((-x).sigmoid() + clip).clamp(max=1)
    entropy = -(p * y * positive.clamp(min=eps).log() + (1 - y) * negative.clamp(min=eps).log())
    share = y * (1 - positive) + (1 - y) * (1 - negative)
    gamma = gamma_pos * y + gamma_neg * (1 - y)
    # A share, and a logarithm, are differences from 1: their rounding errors are relative to that.
    scale = (entropy.abs() + p.abs() * y + (1 - y)) * (share**gamma + gamma * (share + 1e-6) ** (gamma - 1))
    return _without_gradients(w * entropy * share**gamma, w.abs() * scale)


def linear(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    arithmetic: torch.dtype,
) -> reference.Terms:
    layer = (input, linear_weight, linear_bias)
    if products_dtype(input, linear_weight) != arithmetic:  # their error is F.linear's, bit for bit: see has_answer
        logits = torch.nn.functional.linear(*layer)
        entropy = reference.with_logits(logits, target, weight, pos_weight)
        return _without_gradients(entropy.loss, entropy.loss_scale)
    exact = [None if each is None else each.double() for each in layer]
    logits, size = (torch.nn.functional.linear(*each) for each in (exact, [x if x is None else x.abs() for x in exact]))
    entropy = reference.with_logits(logits, target, weight, pos_weight)
    # The logits are rounded sums of products; the slope of the loss is at most that of both classes together.
    w, p = (torch.ones_like(logits) if t is None else t.double().expand_as(logits).abs() for t in (weight, pos_weight))
    slope = w * ((1 - target).abs() + p * target.abs())
    return _without_gradients(entropy.loss, entropy.loss_scale + (input.shape[-1] + 1) * slope * size)


def products_dtype(input: Tensor, linear_weight: Tensor) -> torch.dtype:
    """Of F.linear, also under autocast."""
    return torch.nn.functional.linear(input.new_zeros(1, 1), linear_weight.new_zeros(1, 1)).dtype


def dense_target(given: dict[str, Any]) -> Tensor:
    """Class indices stand for one positive label in each row, or for none."""
    target: Tensor = given["target"]
    if "linear_weight" in given and not target.is_floating_point() and target.dim() + 1 == given["input"].dim():
        return (target.long().unsqueeze(-1) == torch.arange(given["linear_weight"].shape[0])).double()
    return target.double()


# The formula of each public operator, which takes the operator's arguments of the same names.
FORMULAS: dict[str, Callable[..., reference.Terms]] = {
    "binary_cross_entropy_with_logits": reference.with_logits,
    "binary_cross_entropy": reference.probabilities,
    "sigmoid_focal_loss": focal,
    "asymmetric_loss": asymmetric,
    "linear_binary_cross_entropy_with_logits": linear,
}
REDUCTIONS = {number: name for name, number in reference.REDUCTION_NUMBER.items()}
GAMMAS = ("gamma", "gamma_neg", "gamma_pos")
OTHER_NAMES = {"inputs": "input", "targets": "target"}


def is_ordinary(tensor: Tensor) -> bool:
    """Real numbers in memory, finite: an operand for which the answer is known."""
    if (
        type(tensor) not in (Tensor, torch.nn.Parameter)
        or tensor.layout != torch.strided
        or tensor.device.type != "cpu"
        or torch._is_functional_tensor(tensor)  # what it wraps may be a fake tensor
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


def shares_memory(one: Tensor, other: Tensor) -> bool:
    storages = (x.untyped_storage().data_ptr() for x in (one, other) if x.layout == torch.strided)
    return len({*storages}) == 1


def expected_terms(operator: str, given: dict[str, Any]) -> reference.Terms:
    """Loss and gradients with their reduction, and with what the options add."""
    formula = FORMULAS[operator.partition(".")[0]]
    arithmetic = reference.arithmetic_dtype(given["input"].dtype, given["target"].dtype)
    given = {**given, "arithmetic": arithmetic}
    raw = dense_target(given)
    names = [name for name in inspect.signature(formula).parameters if name != "target"]
    evaluate = partial(formula, **{name: given[name] for name in names})
    smoothing = given.get("label_smoothing", 0.0)
    terms = evaluate(target=raw * (1 - smoothing) + smoothing / 2)
    terms.grad_target = (1 - smoothing) * terms.grad_target
    if smoothing != 0:  # rounds the label, and with it what multiplies either part
        terms.loss_scale = sum(evaluate(target=torch.full_like(raw, y)).loss_scale for y in (0, 1)) + terms.loss_scale
        terms.grad_input_scale = terms.grad_input_scale + 1
    # A part that overflows the arithmetic is infinite, as it is for native, though a mean of such parts need not be.
    terms.loss_scale = terms.loss_scale.to(arithmetic).double()
    ignored = torch.zeros_like(raw, dtype=torch.bool)
    if (index := given.get("ignore_index")) is not None:
        ignored = raw == index
    for field in vars(terms):
        setattr(terms, field, torch.where(ignored, 0.0, getattr(terms, field)))
    reduction = REDUCTIONS[given["reduction"]]
    if reduction != "mean":
        return reference.reduced(terms, reduction)
    normalizer = given.get("normalizer")
    divisor = (~ignored).sum().double() if normalizer is None else normalizer.double()
    # As a division would: what has no weight has a derivative of 0/0 where the normalizer is 0. Native's chain of
    # derivatives and ours multiply by 1 / normalizer, which may overflow.
    factor = (1 / divisor).to(arithmetic).double()
    return reference.Terms(
        terms.loss.sum() / divisor,
        (terms.loss_scale.sum() / divisor).abs(),
        *(
            torch.where(ignored, 0.0, value * by)
            for gradient, scale in (
                (terms.grad_input, terms.grad_input_scale),
                (terms.grad_target, terms.grad_target_scale),
            )
            for value, by in ((gradient, factor), (scale, factor.abs()))
        ),
    )


def has_answer(operator: str, given: dict[str, Any], result: object) -> bool:
    """Whether all operands are ordinary and the formula says what comes out."""
    names = ("input", "linear_weight", "linear_bias", "target", "weight", "pos_weight", "normalizer")
    if not all(x is None or isinstance(x, (Tensor, int, float)) for x in given.values()):
        return False  # TorchScript takes a dtype for a number
    operands = [given[name] for name in names if given.get(name) is not None]
    if not all(isinstance(x, Tensor) and is_ordinary(x) for x in operands) or not isinstance(result, Tensor):
        return False
    if type(result) is not Tensor or result.device.type != "cpu" or given["input"].numel() == 0:
        return False
    arithmetic = reference.arithmetic_dtype(given["input"].dtype, given["target"].dtype)
    if not all(bool(x.to(arithmetic).isfinite().all()) for x in operands):
        return False  # infinite as native sees it, too
    if operator.startswith("binary"):
        return True
    if operator.startswith("linear"):
        # Products of low precision are rounded otherwise in a block than by F.linear; only large losses have blocks.
        is_low = products_dtype(given["input"], given["linear_weight"]) != arithmetic
        return not (is_low and given["input"].shape[0] * given["linear_weight"].shape[0] >= 2**22)
    # A power of a negative number has no answer, and one that is enormous no digit.
    target = given["target"].double()
    return bool(((target >= 0) & (target <= 1)).all()) and all(given.get(g, 0) <= 100 for g in GAMMAS)


def wrong_answer(operator: str, variables: dict[str, Any]) -> str | None:
    """None where the answer is not known, "" where it is right, else what is wrong."""
    (schema,) = (o for o in operators() if o.name == operator)
    given = {OTHER_NAMES.get(a.name, a.name): variables.get(a.name, a.default) for a in schema.arguments}
    result = variables["result"]
    if not has_answer(operator, given, result):
        return None
    expected = expected_terms(operator, given)
    arithmetic = reference.arithmetic_dtype(given["input"].dtype, given["target"].dtype)
    answers = {"loss": (result, expected.loss, expected.loss_scale)}
    if all(
        isinstance(x, Tensor) and is_ordinary(x) and bool((x == 1).all()) for x in variables.get("grad_outputs", [None])
    ):
        for tensor, gradient in zip(variables["inputs"], variables.get("grads", ()), strict=False):
            if len([other for other in variables["inputs"] if shares_memory(tensor, other)]) > 1:
                continue  # it has the gradients of several operands
            if tensor is given["input"]:
                answers["gradient of input"] = (gradient, expected.grad_input, expected.grad_input_scale)
            elif tensor is given["target"]:
                answers["gradient of target"] = (gradient, expected.grad_target, expected.grad_target_scale)
    known = {what: answer for what, answer in answers.items() if math.isfinite(float(answer[2].sum()))}
    for what, (actual, right, scale) in known.items():
        if actual is None:
            return f"{what}: there is none"
        if what != "loss":
            # The composite formula, which create_graph takes, has no subnormal sigmoid.
            info = torch.finfo(arithmetic)
            scale = scale + info.tiny / (16 * info.eps)
        try:
            reference.assert_rounded_once(actual.detach(), right, scale, arithmetic, ulps=16, what=what)
        except AssertionError as error:
            return str(error)
    return "" if known else None
