"""Sums of BCELoss, where hard labels share logarithms, are as exact as their terms, with the same bits with a gradient and without."""

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


def hard_labels(share: str, numel: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(numel)
    own = SHARES[share](torch.rand(numel, generator=generator, dtype=torch.float64))
    target = (torch.rand(numel, generator=generator) < 0.5).to(dtype)
    # A rounding to 1 makes certain and wrong what was nearly so; that is the input then.
    return torch.where(target == 1, own, 1 - own).to(dtype), target


def sum_of_terms(input: Tensor, target: Tensor) -> Tensor:
    q = input.double()
    logarithms = torch.where(target == 1, q.log(), torch.log1p(-q)).clamp(min=-100)
    return torch.tensor(-math.fsum(logarithms.tolist()), dtype=torch.float64)


@pytest.mark.parametrize("numel", SUMMED)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_are_as_exact_as_their_terms(dtype: torch.dtype, share: str, numel: int, device: str) -> None:
    input, target = hard_labels(share, numel, dtype)
    expected = sum_of_terms(input, target)
    tolerance = MAX_ULP * reference.ulp(expected, dtype)
    input = input.to(device)
    for labels in (target.to(device), target.bool().to(device)):
        actual = F.binary_cross_entropy(input, labels, reduction="sum")
        assert abs(actual.cpu() - expected) <= tolerance
        with_gradient = F.binary_cross_entropy(input.requires_grad_(), labels, reduction="sum")
        assert with_gradient.detach().equal(actual)
        input = input.detach()


@pytest.mark.parametrize("place", [0, 100, 255, 299])  # in one product, and in what is left over by them
@pytest.mark.parametrize(
    ("probability", "label", "loss"), [(0.0, 1.0, 100.0), (-0.0, 1.0, 100.0), (1.0, 0.0, 100.0), (1.0, 1.0, 0.0)]
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
    input, target = hard_labels("common", numel, torch.float32)
    target[77] = 0.25
    expected = torch.nn.functional.binary_cross_entropy(input.double(), target.double(), reduction="sum")
    actual = F.binary_cross_entropy(input.to(device), target.to(device), reduction="sum").cpu()
    assert abs(actual - expected) <= MAX_ULP * reference.ulp(expected, torch.float32)
