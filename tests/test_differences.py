"""Deliberate differences from native that no other file shows: docs/compatibility.md has the table."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import bce_ext.functional as F


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_input_that_is_changed_after_forward(reduction: str) -> None:
    input = torch.tensor([0.5, -1.0, 2.0])
    target = torch.tensor([1.0, 0.0, 1.0])

    def gradient(function: Callable[..., torch.Tensor], change: bool) -> torch.Tensor:
        leaf = input.clone().requires_grad_()
        logits = leaf * 1
        loss = function(logits, target, reduction=reduction)
        if change:
            logits.mul_(3)
        return torch.autograd.grad(loss, leaf)[0]

    native = torch.nn.functional.binary_cross_entropy_with_logits
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(native, change=True)
    ours = F.binary_cross_entropy_with_logits
    assert torch.equal(gradient(ours, change=True), gradient(ours, change=False))
