"""The ways to call the losses, under one signature: f(input, target, weight=None, pos_weight=None, reduction="mean")."""

from __future__ import annotations

from collections.abc import Callable

import torch
from reference import REDUCTION_NUMBER
from torch import Tensor

import bce_ext

Loss = Callable[..., Tensor]


def module(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    loss: Tensor = bce_ext.BCEWithLogitsLoss(weight=weight, pos_weight=pos_weight, reduction=reduction)(input, target)
    return loss


def functional(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    return bce_ext.functional.binary_cross_entropy_with_logits(input, target, weight, None, None, reduction, pos_weight)


def function(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    return bce_ext.BCEWithLogitsFunction.apply(input, target, weight, pos_weight, REDUCTION_NUMBER[reduction])


def operator(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    loss: Tensor = torch.ops.bce_ext.binary_cross_entropy_with_logits(
        input, target, weight, pos_weight, REDUCTION_NUMBER[reduction]
    )
    return loss


@torch.jit.script
def _scripted(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: int
) -> Tensor:
    return torch.ops.bce_ext.binary_cross_entropy_with_logits(input, target, weight, pos_weight, reduction)  # type: ignore[no-any-return]


def scripted(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    return _scripted(input, target, weight, pos_weight, REDUCTION_NUMBER[reduction])


def probabilities_module(
    input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    loss: Tensor = bce_ext.BCELoss(weight=weight, reduction=reduction)(input, target)
    return loss


def probabilities_functional(
    input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    return bce_ext.functional.binary_cross_entropy(input, target, weight, None, None, reduction)


def probabilities_operator(
    input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    loss: Tensor = torch.ops.bce_ext.binary_cross_entropy(input, target, weight, REDUCTION_NUMBER[reduction])
    return loss


@torch.jit.script
def _scripted_probabilities(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
    return torch.ops.bce_ext.binary_cross_entropy(input, target, weight, reduction)  # type: ignore[no-any-return]


def probabilities_scripted(
    input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    return _scripted_probabilities(input, target, weight, REDUCTION_NUMBER[reduction])


WITH_LOGITS: tuple[Loss, ...] = (module, functional, function, operator, scripted)
PROBABILITIES: tuple[Loss, ...] = (
    probabilities_module,
    probabilities_functional,
    probabilities_operator,
    probabilities_scripted,
)
