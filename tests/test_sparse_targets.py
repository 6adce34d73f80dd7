"""Sparse targets of the plain loss: the values and gradients of the dense target, without a dense copy of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_cases import make_case
from torch import Tensor

import bce_ext
import bce_ext.functional as F

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")

# The last two take blocks of rows; the last has rows longer than a block of 2**19.
SHAPES = [(1, 1), (0, 5), (4, 0), (7, 13), (2049, 2053), (3, 2**21 + 5)]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", ["csr", "coo"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_dense_target(shape: tuple[int, int], kind: str, reduction: str, device: str) -> None:
    case = make_case(shape[0], 1, shape[1], kind, device=device)
    logits = (4 * torch.randn(shape, dtype=torch.float64, device=device)).requires_grad_()
    weights = {
        "weight": torch.rand(shape[0], 1, dtype=torch.float64, device=device) + 0.5,
        "pos_weight": torch.rand(shape[1], dtype=torch.float64, device=device) + 0.5,
    }
    for keywords in ({}, weights):
        loss = F.binary_cross_entropy_with_logits(logits, case.target, reduction=reduction, **keywords)
        expected = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, case.dense, reduction=reduction, **keywords
        )
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13, equal_nan=True)
        (got,) = torch.autograd.grad(loss.sum(), logits)
        (want,) = torch.autograd.grad(expected.sum(), logits)
        scale = want.abs().max().item() if want.numel() else 0.0
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14 * scale)  # native's own error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype, device: str) -> None:
    case = make_case(2049, 1, 2053, "csr", dtype, device=device)
    logits = torch.randn(2049, 2053, device=device).to(dtype).requires_grad_()
    weight = torch.tensor(1024.0, device=device)
    loss = F.binary_cross_entropy_with_logits(logits, case.target, weight)
    expected = F.binary_cross_entropy_with_logits(logits, case.dense, weight)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    (got,), (want,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(got, want, rtol=2 * tolerance, atol=1e-7)


def test_in_both_tails_every_digit_counts(device: str) -> None:
    """A sum over zeros with corrections would cancel: softplus(40) - 40 is 4e-18, not 0."""
    logits = torch.full((1024, 1024), -100.0, dtype=torch.float64, device=device)
    logits[0, 0] = 40.0
    target = torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (1024, 1024), device=device)
    loss = F.binary_cross_entropy_with_logits(logits, target.double(), reduction="sum")
    torch.testing.assert_close(loss.item(), torch.tensor(-40.0, dtype=torch.float64).exp().log1p().item(), rtol=1e-12, atol=0)  # fmt: skip


@pytest.mark.parametrize("kind", ["csr", "coo"])
def test_module_double_backward_and_transforms(kind: str, device: str) -> None:
    case = make_case(2049, 1, 2053, kind, device=device)
    logits = torch.randn(2049, 2053, dtype=torch.float64, device=device).requires_grad_()
    ours, expected = (lambda x, y=y: bce_ext.BCEWithLogitsLoss()(x, y) ** 2 for y in (case.target, case.dense))
    results = []
    for function in (ours, expected):
        (first,) = torch.autograd.grad(function(logits), logits, create_graph=True)
        results.append([first, *torch.autograd.grad((first**2).sum(), logits)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-300)
    if kind == "coo":  # functorch has no wrapper for CSR tensors
        torch.testing.assert_close(torch.func.grad(ours)(logits), torch.func.grad(expected)(logits), rtol=1e-9, atol=0)


def of_layer(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_binary_cross_entropy_with_logits(input, linear_weight, target)


def of_logits(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(torch.nn.functional.linear(input, linear_weight), target)


LOSSES = [of_layer, of_logits]
SMALL, BLOCKS = (3, 2, 4), (257, 2, 16411)


def with_each_sparse_target(test: Callable[..., None]) -> Callable[..., None]:
    """Of each kind and size, with and without a layer."""
    for names, values in {"shape": (SMALL, BLOCKS), "kind": ("csr", "coo"), "loss": LOSSES}.items():
        test = pytest.mark.parametrize(names, values)(test)
    return test


@with_each_sparse_target
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_with_a_graph_break_since_dynamo_wraps_no_sparse_tensor(
    shape: tuple[int, int, int], dynamic: bool, kind: str, loss: Callable[..., Tensor]
) -> None:
    """Where a break is forbidden, the error is PyTorch's own; where it is allowed, values and gradients are right."""
    torch._dynamo.reset()
    whole = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    case = make_case(*shape, kind, bias=False)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="sparse Tensor"):
        whole(*case.leaves(), case.target)
    broken = torch.compile(loss, dynamic=dynamic, backend="aot_eager")
    for seed in range(2):
        case = make_case(shape[0] + seed, *shape[1:], kind, bias=False, seed=seed)
        results = []
        for function, target in ((broken, case.target), (loss, case.dense)):
            leaves = case.leaves()
            value = function(*leaves, target)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-14)


@with_each_sparse_target
@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_exported_with_a_sparse_input(
    shape: tuple[int, int, int], strict: bool, kind: str, loss: Callable[..., Tensor]
) -> None:
    class Model(torch.nn.Module):
        def forward(self, input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
            return loss(input, linear_weight, target)

    case = make_case(*shape, kind, bias=False)
    program = torch.export.export(Model(), (case.input, case.linear_weight, case.target), strict=strict).module()
    for seed in range(2):  # other values, at other places, and not as many
        case = make_case(*shape, kind, bias=False, seed=seed)
        actual = program(case.input, case.linear_weight, case.target)
        torch.testing.assert_close(actual, loss(case.input, case.linear_weight, case.dense), rtol=1e-12, atol=0)


def coo(rows: list[int], columns: list[int], size: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows, columns]), torch.ones(len(rows)), size, check_invariants=False)


@pytest.mark.parametrize("rows", [3, 1_100_000], ids=["small", "blocks"])
def test_bad_targets(rows: int) -> None:
    logits = torch.zeros(rows, 4)
    bad: list[tuple[Any, type[Exception]]] = [
        (coo([0], [4], (rows, 4)), RuntimeError),
        (coo([rows], [0], (rows, 4)), RuntimeError),
        (coo([0], [0], (rows, 5)), ValueError),
        (coo([0], [0], (rows + 1, 4)), ValueError),
    ]
    for target, error in bad:
        with pytest.raises(error):
            F.binary_cross_entropy_with_logits(logits, target)


MEASURE = """
import torch, bce_ext
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))
def problem(rows):
    logits = torch.full((rows, 4096), 0.1, requires_grad=True)
    target = torch.sparse_csr_tensor(torch.arange(rows + 1), torch.arange(rows) % 4096, torch.ones(rows), (rows, 4096))
    return lambda: bce_ext.functional.binary_cross_entropy_with_logits(logits, target)
for _ in range(2):
    problem(1100)().backward()
loss = problem(4096)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
loss().backward()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak is read from Linux's /proc")
def test_no_dense_copy() -> None:
    command = [sys.executable, "-W", "ignore", "-c", MEASURE]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    gradient = 4 * 4096**2
    assert peak < gradient + 16 * 2**20
