"""The ways to call the losses, under one signature: f(input, target, weight=None, pos_weight=None, reduction="mean")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import reference
import torch
from reference import REDUCTION_NUMBER, REDUCTIONS, Terms, Weight, make_logits, make_probabilities
from torch import Tensor

import bce_ext

Loss = Callable[..., Tensor]


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


def focal(
    input: Tensor, target: Tensor, weight: Weight = None, pos_weight: Weight = None, reduction: str = "mean"
) -> Tensor:
    return bce_ext.functional.sigmoid_focal_loss(
        input, target, reduction=reduction, weight=weight, pos_weight=pos_weight
    )


def asymmetric(
    input: Tensor, target: Tensor, weight: Weight = None, pos_weight: Weight = None, reduction: str = "mean"
) -> Tensor:
    return bce_ext.functional.asymmetric_loss(input, target, reduction=reduction, weight=weight, pos_weight=pos_weight)


def optional(
    input: Tensor, target: Tensor, weight: Weight = None, pos_weight: Weight = None, reduction: str = "mean"
) -> Tensor:
    """With every option that goes beyond native."""
    options = {"label_smoothing": 0.1, "ignore_index": 1.0, "normalizer": 3.0 if reduction == "mean" else None}
    return bce_ext.functional.binary_cross_entropy_with_logits(
        input, target, weight, reduction=reduction, pos_weight=pos_weight, **options
    )


# Those that everything of torch can be applied to. TorchScript stands apart: it has exceptions and a profile of its own.
PYTHON_WITH_LOGITS: tuple[Loss, ...] = (module, functional, function, operator)
PYTHON_PROBABILITIES: tuple[Loss, ...] = (probabilities_module, probabilities_functional, probabilities_operator)
WRAPPED: tuple[Loss, ...] = (focal, asymmetric, optional)  # of logits
PYTHON_LOSSES = PYTHON_WITH_LOGITS + PYTHON_PROBABILITIES + WRAPPED
WITH_LOGITS: tuple[Loss, ...] = (*PYTHON_WITH_LOGITS, scripted)
PROBABILITIES: tuple[Loss, ...] = (*PYTHON_PROBABILITIES, probabilities_scripted)

every_loss = pytest.mark.parametrize("loss", PYTHON_LOSSES, ids=lambda f: f.__name__)
every_cross_entropy = pytest.mark.parametrize(
    "loss", PYTHON_WITH_LOGITS + PYTHON_PROBABILITIES, ids=lambda f: f.__name__
)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def make_input(loss: Loss, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return (make_logits if takes_logits(loss) else make_probabilities)(shape, dtype, device)


def takes_logits(loss: Loss) -> bool:
    return loss in WITH_LOGITS + WRAPPED


@dataclass(frozen=True)
class Member:
    """A loss of the family: the function with some parameters, its module, its operator, and the formula in float64."""

    name: str
    function: Loss
    module: type[torch.nn.Module]
    formula: Callable[..., Terms]
    parameters: dict[str, Any] = field(default_factory=dict)
    # Errors of single elements, in units of the arithmetic, relative to the sum of the magnitudes of what is added:
    # 4 for a cross entropy; powers multiply the error of their base by the exponent, and add their own.
    ulps: float = 4.0

    @property
    def of_logits(self) -> bool:
        return self.module is not bce_ext.BCELoss

    def __call__(self, input: Tensor, target: Tensor, **arguments: Any) -> Tensor:
        return self.function(input, target, **{"reduction": "mean", **self.parameters, **arguments})

    def make_module(self, **arguments: Any) -> torch.nn.Module:
        return self.module(**self.parameters, **arguments)

    def terms(self, input: Tensor, target: Tensor, **arguments: Any) -> Terms:
        return reference.with_options(self.formula, input, target, **self.parameters, **arguments)

    def make_input(self, shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
        return (make_logits if self.of_logits else make_probabilities)(shape, dtype, device, seed)


F = bce_ext.functional


def _focal(name: str, gamma: float, alpha: float = 0.25) -> Member:
    parameters = {"alpha": alpha, "gamma": gamma}
    return Member(name, F.sigmoid_focal_loss, bce_ext.SigmoidFocalLoss, reference.focal, parameters, 8 + 4 * gamma)


def _asymmetric(name: str, gamma_neg: float, gamma_pos: float, clip: float, detach_focusing: bool = False) -> Member:
    parameters = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip, "detach_focusing": detach_focusing}
    ulps = 8 + 4 * max(gamma_neg, gamma_pos)
    return Member(name, F.asymmetric_loss, bce_ext.AsymmetricLoss, reference.asymmetric, parameters, ulps)


CROSS_ENTROPIES = (
    Member("with_logits", F.binary_cross_entropy_with_logits, bce_ext.BCEWithLogitsLoss, reference.with_logits),
    Member("probabilities", F.binary_cross_entropy, bce_ext.BCELoss, reference.probabilities),
)
# Exponents that a kernel has a shortcut for and others, those below 1 among them; with the class weight and without.
FOCAL = (
    _focal("focal", 2.0),
    _focal("focal_0", 0.0, -1.0),
    _focal("focal_0.5", 0.5),
    _focal("focal_1", 1.0, 0.9),
    _focal("focal_3.7", 3.7, -1.0),
)
ASYMMETRIC = (
    _asymmetric("asymmetric", 4.0, 1.0, 0.05),
    _asymmetric("asymmetric_detached", 4.0, 1.0, 0.05, True),
    _asymmetric("asymmetric_0", 0.0, 0.0, 0.0),
    _asymmetric("asymmetric_0.5", 0.5, 0.5, 0.0),
    _asymmetric("asymmetric_3.7", 3.7, 2.0, 0.2),
)
FOCUSED = FOCAL + ASYMMETRIC
EVERY_FORMULA = (*CROSS_ENTROPIES, FOCAL[0], ASYMMETRIC[0])  # one of each
FAMILY = CROSS_ENTROPIES + FOCUSED

every_formula = pytest.mark.parametrize("loss", EVERY_FORMULA, ids=lambda loss: loss.name)
every_member = pytest.mark.parametrize("loss", FAMILY, ids=lambda loss: loss.name)
every_focused = pytest.mark.parametrize("loss", FOCUSED, ids=lambda loss: loss.name)
