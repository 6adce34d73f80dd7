"""Threads of Python may compute losses at the same time, large ones and those too small to release its lock for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as native
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bce_ext.functional as F


class Python(TorchDispatchMode):
    """Sends every operation of its thread through Python, which needs the lock."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def gradient(function: Any, seed: int, numel: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(numel, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.rand(numel, generator=generator, dtype=torch.float64)
    logits.register_hook(lambda grad: grad * 2)  # Python code in the backward pass
    function(logits, target).backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("through_python", [False, True])
@pytest.mark.parametrize(
    "numel",
    [
        50,
        2**15 - 1,  # the largest that keeps the lock
        2**15,
        200_000,  # threads of its own
    ],
)
def test_threads_get_their_own_gradients(numel: int, through_python: bool) -> None:
    def train(seed: int) -> list[Tensor]:
        mode = Python() if through_python else torch.enable_grad()
        with mode:
            return [gradient(F.binary_cross_entropy_with_logits, seed + i, numel) for i in range(20)]

    seeds = [0, 100, 200, 300]
    with ThreadPoolExecutor(len(seeds)) as threads:
        results = list(threads.map(train, seeds))
    for seed, gradients in zip(seeds, results, strict=True):
        for i, grad in enumerate(gradients):
            expected = gradient(native.binary_cross_entropy_with_logits, seed + i, numel)
            torch.testing.assert_close(grad, expected)
