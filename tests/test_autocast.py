"""Autocast: half precision goes in as it is, the answer and dtype of native's float32 path come out."""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from callables import (
    PROBABILITIES,
    PYTHON_PROBABILITIES,
    WITH_LOGITS,
    Loss,
    every_cross_entropy,
    every_loss,
    every_reduction,
    functional,
    make_input,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

HALF = [torch.bfloat16, torch.float16]


@every_reduction
@every_cross_entropy
@pytest.mark.parametrize(
    "target_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.float64], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64], ids=str)
def test_dtype_and_value_of_the_float32_path(
    loss: Loss, dtype: torch.dtype, target_dtype: torch.dtype, reduction: str, device: str
) -> None:
    input = make_input(loss, (7, 9), dtype, device).requires_grad_()
    target = reference.make_targets((7, 9), target_dtype, device)
    formula = reference.with_logits if loss in WITH_LOGITS else reference.probabilities
    expected = reference.reduced(formula(input, target), reduction)
    with torch.autocast(device, torch.bfloat16):
        actual = loss(input, target, reduction=reduction)
    assert actual.dtype == (torch.float64 if torch.float64 in (dtype, target_dtype) else torch.float32)
    reference.assert_rounded_once(actual, expected.loss, expected.loss_scale, torch.float32, ulps=16)
    actual.sum().backward()
    assert input.grad is not None
    assert input.grad.dtype == dtype
    reference.assert_rounded_once(input.grad, expected.grad_input, expected.grad_input_scale, torch.float32, ulps=16)


@every_reduction
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_native_has_the_same_dtypes(dtype: torch.dtype, reduction: str, device: str) -> None:
    input = make_input(functional, (7, 9), dtype, device)
    target = reference.make_targets((7, 9), dtype, device)
    with torch.autocast(device, torch.bfloat16):
        native = F.binary_cross_entropy_with_logits(input, target, reduction=reduction)
        ours = functional(input, target, reduction=reduction)
    assert ours.dtype == native.dtype
    torch.testing.assert_close(ours, native, rtol=1e-4, atol=1e-5)


@every_loss
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
def test_nothing_is_cast(loss: Loss, requires_grad: bool, device: str) -> None:
    """bfloat16 logits with bool targets stay 5 bytes an element: no tensor of full size but the gradient is made."""
    rows, classes = 512, 512
    input = make_input(loss, (rows, classes), torch.bfloat16, device).requires_grad_(requires_grad)
    target = reference.make_targets((rows, classes), torch.bool, device)
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        torch.autocast(device, torch.bfloat16),
    ):
        loss(input, target)
    names = {event.key for event in profiler.key_averages()}
    assert not names & {"aten::to", "aten::_to_copy", "aten::copy_"}, names
    allocated = sum(max(event.self_device_memory_usage, event.self_cpu_memory_usage, 0) for event in profiler.events())
    sums = 8 * 2048 if device == "cuda" else 4096  # on a GPU, one for each block at most
    assert allocated <= 2 * rows * classes * requires_grad + sums


@every_reduction
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("loss", PYTHON_PROBABILITIES, ids=lambda f: f.__name__)
def test_probabilities_are_safe_under_autocast(loss: Loss, dtype: torch.dtype, reduction: str, device: str) -> None:
    """pytorch#61098: native raises on CUDA, since its gradient would overflow in half precision. Ours is computed in float32."""
    layer = torch.nn.Linear(8, 8, device=device)
    target = reference.make_targets((4, 8), torch.float32, device)
    with torch.autocast(device, dtype):
        value = loss(layer(torch.randn(4, 8, device=device)).sigmoid(), target, reduction=reduction)
    assert value.dtype == torch.float32
    value.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


@every_loss
def test_inside_of_compile_and_transforms(loss: Loss, device: str) -> None:
    input = make_input(loss, (4, 6), torch.bfloat16, device)
    target = reference.make_targets((4, 6), torch.float32, device)

    def under_autocast(input: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return loss(input, target)

    expected = under_autocast(input)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(under_autocast, fullgraph=True, backend="aot_eager")(input), expected)
    if device == "cuda" and loss in PROBABILITIES:
        with pytest.raises(RuntimeError, match="unsafe to autocast"):  # torch's own function is used there, and refuses
            torch.func.grad_and_value(under_autocast)(input)
        return
    gradient, value = torch.func.grad_and_value(under_autocast)(input)
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    batched = torch.func.vmap(under_autocast)(input.expand(3, -1, -1))
    torch.testing.assert_close(batched, expected.expand(3), rtol=1e-5, atol=1e-6)


@every_loss
def test_second_derivative_under_autocast(loss: Loss, device: str) -> None:
    input = make_input(loss, (4, 6), torch.float32, device).clamp(-0.9, 0.9).abs().requires_grad_()
    target = reference.make_targets((4, 6), torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        (first,) = torch.autograd.grad(loss(input, target), input, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), input)
    (expected,) = torch.autograd.grad(
        torch.autograd.grad(loss(input, target), input, create_graph=True)[0].sum(), input
    )
    torch.testing.assert_close(second, expected)
