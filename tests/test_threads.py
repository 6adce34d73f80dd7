"""Threads of Python may compute losses at the same time, large ones and those too small to release its lock for."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as native
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import bce_ext.functional as F


def gradient(function: Any, seed: int, numel: int, *, through_python: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(numel, generator=generator, dtype=torch.float64)
    target = torch.rand(numel, generator=generator, dtype=torch.float64)
    if through_python:  # a subclass whose operations are Python code, which needs the lock
        logits, target = TwoTensor(logits, logits.clone()), TwoTensor(target, target.clone())
    logits.requires_grad_()
    logits.register_hook(lambda grad: grad * 2)  # Python code in the backward pass
    function(logits, target).backward()
    assert logits.grad is not None
    return logits.grad.a if through_python else logits.grad


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
        loss = F.binary_cross_entropy_with_logits
        return [gradient(loss, seed + i, numel, through_python=through_python) for i in range(20)]

    seeds = [0, 100, 200, 300]
    with ThreadPoolExecutor(len(seeds)) as threads:
        results = list(threads.map(train, seeds))
    for seed, gradients in zip(seeds, results, strict=True):
        for i, grad in enumerate(gradients):
            expected = gradient(native.binary_cross_entropy_with_logits, seed + i, numel)
            torch.testing.assert_close(grad, expected)


def test_large_losses_use_the_threads_of_torch() -> None:
    """As many as torch.set_num_threads says, whatever compiler the extension was built with."""
    program = """if True:
        import os, torch, bce_ext
        torch.set_num_threads(3)
        memory = bytearray(4 * 200_000)  # no operation of torch makes these, so that its threads do not exist yet
        input = torch.frombuffer(memory, dtype=torch.float32)
        before = len(os.listdir("/proc/self/task"))
        with torch.inference_mode():
            bce_ext.functional.binary_cross_entropy_with_logits(input, input)
        print(len(os.listdir("/proc/self/task")) - before)
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["2"], result.stderr
