"""The ways to call the losses, under one signature: f(input, target, weight=None, pos_weight=None, reduction="mean")."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference import REDUCTION_NUMBER, REDUCTIONS, make_logits, make_probabilities
from torch import Tensor

import bce_ext

Loss = Callable[..., Tensor]
Weight = Tensor | None


def module(
    input: Tensor, target: Tensor, weight: Weight = None, pos_weight: Weight = None, reduction: str = "mean"
) -> Tensor:
    loss: Tensor = bce_ext.BCEWithLogitsLoss(weight=weight, pos_weight=pos_weight, reduction=reduction)(input, target)
    return loss


def functional(
    input: Tensor, target: Tensor, weight: Weight = None, pos_weight: Weight = None, reduction: str = "mean"
) -> Tensor:
    return bce_ext.functional.binary_cross_entropy_with_logits(input, target, weight, None, None, reduction, pos_weight)


def function(
    input: Tensor, target: Tensor, weight: Weight = None, pos_weight: Weight = None, reduction: str = "mean"
) -> Tensor:
    return bce_ext.BCEWithLogitsFunction.apply(input, target, weight, pos_weight, REDUCTION_NUMBER[reduction])


def operator(
    input: Tensor, target: Tensor, weight: Weight = None, pos_weight: Weight = None, reduction: str = "mean"
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
    input: Tensor, target: Tensor, weight: Weight = None, pos_weight: Weight = None, reduction: str = "mean"
) -> Tensor:
    return _scripted(input, target, weight, pos_weight, REDUCTION_NUMBER[reduction])


def probabilities_module(input: Tensor, target: Tensor, weight: Weight = None, reduction: str = "mean") -> Tensor:
    loss: Tensor = bce_ext.BCELoss(weight=weight, reduction=reduction)(input, target)
    return loss


def probabilities_functional(input: Tensor, target: Tensor, weight: Weight = None, reduction: str = "mean") -> Tensor:
    return bce_ext.functional.binary_cross_entropy(input, target, weight, None, None, reduction)


def probabilities_operator(input: Tensor, target: Tensor, weight: Weight = None, reduction: str = "mean") -> Tensor:
    loss: Tensor = torch.ops.bce_ext.binary_cross_entropy(input, target, weight, REDUCTION_NUMBER[reduction])
    return loss


@torch.jit.script
def _scripted_probabilities(input: Tensor, target: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
    return torch.ops.bce_ext.binary_cross_entropy(input, target, weight, reduction)  # type: ignore[no-any-return]


def probabilities_scripted(input: Tensor, target: Tensor, weight: Weight = None, reduction: str = "mean") -> Tensor:
    return _scripted_probabilities(input, target, weight, REDUCTION_NUMBER[reduction])


# Those that everything of torch can be applied to. TorchScript stands apart: it has exceptions and a profile of its own.
PYTHON_WITH_LOGITS: tuple[Loss, ...] = (module, functional, function, operator)
PYTHON_PROBABILITIES: tuple[Loss, ...] = (probabilities_module, probabilities_functional, probabilities_operator)
PYTHON_LOSSES = PYTHON_WITH_LOGITS + PYTHON_PROBABILITIES
WITH_LOGITS: tuple[Loss, ...] = (*PYTHON_WITH_LOGITS, scripted)
PROBABILITIES: tuple[Loss, ...] = (*PYTHON_PROBABILITIES, probabilities_scripted)

every_loss = pytest.mark.parametrize("loss", PYTHON_LOSSES, ids=lambda f: f.__name__)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def make_input(loss: Loss, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return (make_logits if loss in WITH_LOGITS else make_probabilities)(shape, dtype, device)
