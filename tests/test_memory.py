"""What is allocated and kept: the gradient for mean and sum, nothing but the inputs for none, nothing at all under no_grad, never a cast copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from callables import Member, every_formula
from torch import Tensor

import bce_ext
import bce_ext.functional as F

LOGITS = "binary_cross_entropy_with_logits"
OPTIONS = {"label_smoothing": 0.1, "ignore_index": 255}

NUMEL = 16 * 2**20
MIB = 2**20
SLACK = 2 * MIB

# Measures in a fresh process, where no freed memory of an earlier test hides an allocation. A first small run loads and
# starts what is needed once: threads, their stacks, the autograd engine. Then the peak is reset, and read after the
# run.
MEASURE = """
import functools
import json
import sys
import torch
import bce_ext

function, input_dtype, target_dtype, reduction, mode, options = sys.argv[1:]
loss_function = functools.partial(getattr(bce_ext.functional, function), **json.loads(options))


def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


def run(input, target):
    if mode == "no_grad":
        with torch.no_grad():
            return loss_function(input, target, reduction=reduction)
    loss = loss_function(input, target, reduction=reduction)
    if mode == "forward":
        return loss
    loss.backward(torch.ones_like(loss).expand_as(loss) if reduction != "none" else torch.ones(()).to(loss).expand_as(loss))
    return loss


def inputs(numel):
    input = torch.full((numel,), 0.3, dtype=getattr(torch, input_dtype), requires_grad=True)
    return input, torch.ones(numel, dtype=getattr(torch, target_dtype))


for _ in range(2):
    run(*inputs(40_000))
input, target = inputs(NUMEL)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # resets the peak
before = status("VmRSS")
kept = run(input, target)
print(status("VmHWM") - before, status("VmRSS") - before)
""".replace("NUMEL", str(NUMEL))


def measure(
    function: str, input_dtype: str, target_dtype: str, reduction: str, mode: str, options: dict[str, Any]
) -> tuple[int, int]:
    """Bytes beyond the inputs: at the peak, and afterwards, with the loss and its graph still alive."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", MEASURE, function, input_dtype, target_dtype, reduction, mode, json.dumps(options)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    peak, after = map(int, output.split())
    return peak, after


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(
    ("function", "input_dtype", "target_dtype", "reduction", "mode", "outputs", "options"),
    [
        # (the outputs, in bytes an element: the gradient, and the loss for none)
        pytest.param(LOGITS, "float32", "float32", "mean", "backward", 4, {}, id="mean"),
        pytest.param("binary_cross_entropy", "float32", "float32", "mean", "backward", 4, {}, id="of probabilities"),
        pytest.param(LOGITS, "bfloat16", "bool", "sum", "backward", 2, {}, id="sum, bfloat16 and bool"),
        pytest.param(LOGITS, "float16", "int64", "mean", "backward", 2, {}, id="mean, float16 and int64"),
        pytest.param(LOGITS, "float32", "float32", "none", "forward", 4, {}, id="none keeps its inputs only"),
        pytest.param(LOGITS, "float32", "float32", "none", "backward", 8, {}, id="none"),
        pytest.param(LOGITS, "float32", "bool", "mean", "no_grad", 0, {}, id="no_grad allocates nothing"),
        pytest.param(
            "sigmoid_focal_loss", "float32", "uint8", "mean", "backward", 4, OPTIONS, id="focal, with options"
        ),
        pytest.param("asymmetric_loss", "bfloat16", "bool", "mean", "backward", 2, {}, id="asymmetric"),
    ],
)
def test_peak_memory_beyond_the_inputs(
    function: str, input_dtype: str, target_dtype: str, reduction: str, mode: str, outputs: int, options: dict[str, Any]
) -> None:
    peak, after = measure(function, input_dtype, target_dtype, reduction, mode, options)
    expected = outputs * NUMEL
    assert peak <= expected + SLACK, f"{peak / MIB:.1f} MiB at the peak, expected {expected / MIB:.1f}"
    # The measurement itself sees what is there.
    assert after >= expected - SLACK


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_peak_memory_on_the_gpu(reduction: str, device: str) -> None:
    if device == "cpu":
        pytest.skip("measured in processes of their own, above")
    input = torch.full((NUMEL,), 0.3, device=device, requires_grad=True)
    target = torch.ones(NUMEL, device=device)
    F.binary_cross_entropy_with_logits(input, target).backward()
    input.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = F.binary_cross_entropy_with_logits(input, target, reduction=reduction)
    loss.backward(torch.ones((), device=device).expand_as(loss))
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= (8 if reduction == "none" else 4) * NUMEL + SLACK


def saved_tensors(loss_function: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_function(*args, **kwargs)
    return saved


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
@every_formula
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bool, torch.int64], ids=str)
def test_nothing_is_saved_but_the_inputs(
    target_dtype: torch.dtype, reduction: str, loss: Member, options: dict[str, Any], device: str
) -> None:
    input = torch.full((5, 37), 0.3, device=device, requires_grad=True)
    target, weight = torch.ones(5, 37, device=device).to(target_dtype), torch.ones(37, device=device)
    saved = saved_tensors(loss, input, target, weight=weight, reduction=reduction, **options)
    assert saved
    own = {tensor.data_ptr() for tensor in (input, target, weight)}
    # A mean that ignores elements keeps their number.
    assert {tensor.data_ptr() for tensor in saved if tensor.dim() > 0} <= own


def test_the_function_saves_nothing_but_the_inputs(device: str) -> None:
    input, target = torch.full((5, 37), 0.3, device=device, requires_grad=True), torch.ones(5, 37, device=device)
    for reduction in (0, 1, 2):
        saved = saved_tensors(bce_ext.BCEWithLogitsFunction.apply, input, target, None, None, reduction)
        assert {tensor.data_ptr() for tensor in saved} <= {input.data_ptr(), target.data_ptr()}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nothing_is_kept_without_a_gradient(reduction: str, context: Any, device: str) -> None:
    input, target = torch.full((5, 37), 0.3, device=device, requires_grad=True), torch.ones(5, 37, device=device)
    with context():
        loss = F.binary_cross_entropy_with_logits(input, target, reduction=reduction)
        assert not saved_tensors(F.binary_cross_entropy_with_logits, input, target, reduction=reduction)
    assert loss.grad_fn is None
    assert not loss.requires_grad
    assert F.binary_cross_entropy_with_logits(input.detach(), target, reduction=reduction).grad_fn is None


def test_no_gradient_is_computed_under_no_grad(device: str) -> None:
    """The operators that run: the pass with a gradient, and the one without."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    input, target = torch.full((37,), 0.3, device=device, requires_grad=True), torch.ones(37, device=device)
    with torch.no_grad(), Record() as without:
        F.binary_cross_entropy_with_logits(input, target)
    with Record() as with_gradient:
        F.binary_cross_entropy_with_logits(input, target)
    assert not any("grad" in name or "backward" in name for name in without.names), without.names
    assert "_bce_loss_and_grad.default" in with_gradient.names


def test_the_graph_frees_the_gradient_that_it_handed_over() -> None:
    input, target = torch.full((1031,), 0.3, requires_grad=True), torch.ones(1031)
    loss = F.binary_cross_entropy_with_logits(input, target)
    (gradient,) = torch.autograd.grad(loss, input, retain_graph=True)
    assert gradient._use_count() <= 2  # ours, and the argument of this call
