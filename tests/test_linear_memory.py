"""The linear layer and its loss take the memory of the gradients and of a few blocks, however many labels there are."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MIB = 2**20
BLOCKS = 24 * MIB  # logits, gradient and target of a block, buffers of the products for each thread

# In a fresh process, where no freed memory of an earlier test hides an allocation, after a small run that starts threads.
MEASURE = """
import sys
import torch
import bce_ext

kind, rows, features, labels = sys.argv[1], *map(int, sys.argv[2:])


def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


def problem(rows, labels):
    input = torch.full((rows, features), 0.1, requires_grad=True)
    linear_weight = torch.full((labels, features), 0.1, requires_grad=True)
    if kind == "siglip":
        scale, bias = (torch.tensor(number, requires_grad=True) for number in (10.0, -10.0))
        return lambda: bce_ext.functional.siglip_loss(input, linear_weight, scale, bias)
    linear_bias = torch.zeros(labels, requires_grad=True)
    indices = torch.arange(rows) % labels
    if kind == "csr":
        target = torch.sparse_csr_tensor(torch.arange(rows + 1), indices, torch.ones(rows), (rows, labels))
    else:
        target = indices
    return lambda: bce_ext.functional.linear_binary_cross_entropy_with_logits(
        input, linear_weight, target, linear_bias=linear_bias
    )


for _ in range(2):
    problem(2100, 2100)().backward()
loss = problem(rows, labels)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # resets the peak
before = status("VmRSS")
loss().backward()
print(status("VmHWM") - before)
"""


def peak(kind: str, rows: int, features: int, labels: int) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, kind, *map(str, (rows, features, labels))]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("kind", ["csr", "class indices"])
def test_many_labels(kind: str) -> None:
    """The logits alone are 32 MiB, and eight times that."""
    rows, features, labels = 64, 16, 2**17
    for factor in (1, 8):
        gradients = 4 * (rows * features + factor * labels * (features + 1))
        used = peak(kind, rows, features, factor * labels)
        assert used <= gradients + BLOCKS, f"{used / MIB:.1f} MiB, of which the gradients are {gradients / MIB:.1f}"


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak is read from Linux's /proc")
def test_many_pairs() -> None:
    """The logits alone are 144 MiB."""
    pairs, features = 3 * 2**11, 32
    # The images times the scale, and its gradient, are tensors as well.
    tensors = 4 * 4 * pairs * features
    used = peak("siglip", pairs, features, pairs)
    assert used <= tensors + BLOCKS, f"{used / MIB:.1f} MiB"
