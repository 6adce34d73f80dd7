"""Sums of BCELoss, whose elements share logarithms, are as exact as their terms, with the same bits with a gradient and without."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import reference
import torch
from torch import Tensor

import bce_ext.functional as F

MAX_ULP = 4.0
# One element; less than a vector; around four vectors, whose logarithms are one, of AVX-512 and of AVX2; blocks and chunks with rests of each kind.
SUMMED = [1, 15, 63, 64, 65, 127, 128, 129, 300, reference.BLOCK - 1, reference.BLOCK + 273, 3 * reference.CHUNK + 300]

# Of the class of the label, from a number in (0, 1).
SHARES: dict[str, Callable[[Tensor], Tensor]] = {
    "common": lambda u: u,
    "nearly one": lambda u: 1 - u * 1e-6,
    "products near the bound": lambda u: 10 ** (-6 - 3 * u),  # four of them are some 1e-30, more or less than 2^-90
    "tiny": lambda u: 10 ** (-36 * u),
    "subnormal": lambda u: 1e-40 * u,
    "certain": lambda u: (u > 0.05).double(),  # and wrong for a few: -100 for a logarithm
    "one, or nearly nothing": lambda u: torch.where(u > 0.05, 1.0, 1e-38 * u),
}


# How far a target is from its label, from a number in (0, 1).
DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "hard": lambda u: 0 * u,
    "nearly hard": lambda u: 10 ** (-8 * u),
    "soft": lambda u: 0.5 * u,
    "hard and soft": lambda u: torch.where(u > 0.5, 0.4 * u, 0),
}


def operands(share: str, distance: str, numel: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(numel)

    def uniform() -> Tensor:
        return torch.rand(numel, generator=generator, dtype=torch.float64)

    own, away = SHARES[share](uniform()), DISTANCES[distance](uniform())
    is_positive = uniform() < 0.5
    # A rounding to 1 makes certain and wrong what was nearly so; that is the input then.
    input, target = torch.where(is_positive, own, 1 - own), torch.where(is_positive, 1 - away, away)
    return input.to(dtype), target.to(dtype)


def sum_of_terms(input: Tensor, target: Tensor) -> Tensor:
    q, y = input.double(), target.double()
    terms = y * q.log().clamp(min=-100) + (1 - y) * torch.log1p(-q).clamp(min=-100)
    return torch.tensor(-math.fsum(terms.tolist()), dtype=torch.float64)


@pytest.mark.parametrize("numel", SUMMED)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_are_as_exact_as_their_terms(
    dtype: torch.dtype, share: str, distance: str, numel: int, device: str
) -> None:
    input, target = (operand.to(device) for operand in operands(share, distance, numel, dtype))
    expected = sum_of_terms(input.cpu(), target.cpu())
    for labels in (target, target.bool()) if distance == "hard" else (target,):
        actual = F.binary_cross_entropy(input.detach(), labels, reduction="sum")
        assert abs(actual.cpu() - expected) <= MAX_ULP * reference.ulp(expected, dtype)
        with_gradient = F.binary_cross_entropy(input.requires_grad_(), labels, reduction="sum")
        assert with_gradient.detach().equal(actual)


@pytest.mark.parametrize("place", [0, 100, 255, 299])  # in one product, and in what is left over by them
@pytest.mark.parametrize(
    ("probability", "label", "loss"),
    [
        (0.0, 1.0, 100.0),
        (-0.0, 1.0, 100.0),
        (1.0, 0.0, 100.0),
        (1.0, 1.0, 0.0),
        # For the label that a soft one is farther from.
        (0.0, 0.25, 25.0),
        (-0.0, 0.25, 25.0),
        (1.0, 0.75, 25.0),
        (2.0**-144, 0.25, 36 * math.log(2)),  # the smallest power of two whose logarithm is above -100
        (2.0**-145, 0.25, 25.0),
    ],
)
def test_an_extreme_term_among_others_in_a_sum(
    probability: float, label: float, loss: float, place: int, device: str
) -> None:
    input, target = torch.full((300,), 0.5, device=device), torch.zeros(300, device=device)
    input[place], target[place] = probability, label
    actual = F.binary_cross_entropy(input, target, reduction="sum").item()
    assert actual == pytest.approx(loss + 299 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("numel", [128, 4 * reference.BLOCK])
def test_a_soft_label_among_hard_ones(numel: int, device: str) -> None:
    input, target = operands("common", "hard", numel, torch.float32)
    target[77] = 0.25
    expected = sum_of_terms(input, target)
    actual = F.binary_cross_entropy(input.to(device), target.to(device), reduction="sum").cpu()
    assert abs(actual - expected) <= MAX_ULP * reference.ulp(expected, torch.float32)
