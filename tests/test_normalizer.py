"""A mean is the sum divided by the normalizer: a number, or a tensor that is read where it is and has a gradient of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from callables import Member, every_formula
from reference import CHUNK, FLOATING_DTYPES, LANES, assert_rounded_once, make_targets, reduced
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

# Less than a vector and one more; chunks of several threads with a rest.
SIZES = [LANES + 1, 2 * CHUNK + 77]
DIVISOR = 7.25  # exact in every dtype


def problem(loss: Member, numel: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return loss.make_input((numel,), dtype, device), make_targets((numel,), dtype, device)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "ignore_index": 1.0}], ids=["plain", "options"])
@pytest.mark.parametrize("form", ["number", "integer", "float32", "float64", "int64", "bfloat16"])
@pytest.mark.parametrize("numel", SIZES)
@every_formula
def test_values(loss: Member, numel: int, form: str, options: dict[str, Any], device: str) -> None:
    divisor = DIVISOR if "int" not in form else 7
    normalizer: Any = divisor
    if form not in ("number", "integer"):
        normalizer = torch.tensor(divisor, dtype=getattr(torch, form), device=device)
    input, target = problem(loss, numel, device)
    expected = reduced(loss.terms(input, target, **options), "mean", divisor=divisor)
    ulps = loss.ulps + (16 if options else 0)
    for with_target in (False, True):
        x, y = input.clone().requires_grad_(), target.clone().requires_grad_(with_target)
        value = loss(x, y, normalizer=normalizer, **options)
        assert_rounded_once(value.detach(), expected.loss, expected.loss_scale, torch.float32, ulps, "loss")
        value.backward()
        assert_rounded_once(x.grad, expected.grad_input, expected.grad_input_scale, torch.float32, ulps, "input")
        if with_target:
            assert_rounded_once(y.grad, expected.grad_target, expected.grad_target_scale, torch.float32, ulps, "target")
    assert torch.equal(loss(input, target, normalizer=normalizer, **options), value.detach())


@pytest.mark.parametrize("dtype", FLOATING_DTYPES, ids=str)
@every_formula
def test_the_loss_has_the_dtype_of_the_input(loss: Member, dtype: torch.dtype, device: str) -> None:
    input, target = problem(loss, 19, device, dtype)
    for normalizer in (3.0, torch.tensor(3.0, dtype=torch.float64, device=device)):
        value = loss(input.requires_grad_(), target, normalizer=normalizer)
        assert value.dtype == dtype
        (gradient,) = torch.autograd.grad(value, input)
        assert gradient.dtype == dtype


@every_formula
def test_gradient_of_the_normalizer(loss: Member, device: str) -> None:
    input, target = problem(loss, 3, device, torch.float64)
    input = input if loss.of_logits else 0.1 + 0.8 * input
    normalizer = torch.tensor(2.5, dtype=torch.float64, device=device, requires_grad=True)
    leaves = (input.requires_grad_(), normalizer)

    def function(x: Tensor, n: Tensor) -> Tensor:
        return loss(x, target, normalizer=n)

    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves, fast_mode=True)
    value = function(*leaves)
    (gradient,) = torch.autograd.grad(value, normalizer)
    torch.testing.assert_close(gradient, -value.detach() / 2.5)


@pytest.mark.parametrize("value", [0.0, -3.0, float("inf"), float("nan"), 1e-30, 1e300])
@every_formula
def test_the_sum_is_divided_by_whatever_it_is(loss: Member, value: float, device: str) -> None:
    """As a division would: no normalizer is refused, since a tensor could not be looked at without waiting for the device."""
    input, target = problem(loss, 19, device, torch.float64)
    total = loss(input, target, reduction="sum")
    for normalizer in (value, torch.tensor(value, dtype=torch.float64, device=device)):
        leaf = input.clone().requires_grad_()
        mean = loss(leaf, target, normalizer=normalizer)
        torch.testing.assert_close(
            mean.detach(), total / value if value else total / torch.zeros_like(total), equal_nan=True
        )
        mean.backward()
        other = input.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(other, target, reduction="sum"), other)
        torch.testing.assert_close(leaf.grad, gradient / torch.tensor(value, dtype=torch.float64), equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@every_formula
def test_other_reductions_raise(loss: Member, reduction: str, device: str) -> None:
    input, target = problem(loss, 5, device)
    for normalizer in (2.0, torch.tensor(2.0)):
        for leaf in (input, input.clone().requires_grad_()):
            with pytest.raises(ValueError, match="expected reduction 'mean' with a normalizer"):
                loss(leaf, target, normalizer=normalizer, reduction=reduction)


@pytest.mark.parametrize("shape", [(1,), (5,), (1, 1)])
@every_formula
def test_a_normalizer_is_one_number(loss: Member, shape: tuple[int, ...], device: str) -> None:
    input, target = problem(loss, 5, device)
    with pytest.raises((ValueError, RuntimeError), match="normalizer"):
        loss(input, target, normalizer=torch.ones(shape, device=device))
    with pytest.raises(TypeError):
        loss(input, target, normalizer="a")
    with pytest.raises(RuntimeError, match="normalizer"):
        loss(input, target, normalizer=torch.tensor(1j, device=device))


@every_formula
def test_the_normalizer_of_a_module(loss: Member, device: str) -> None:
    input, target = problem(loss, 5, device)
    total = loss(input, target, reduction="sum")
    module = loss.make_module(normalizer=4.0).to(device)
    torch.testing.assert_close(module(input, target), total / 4)
    torch.testing.assert_close(module(input, target, torch.tensor(8.0, device=device)), total / 8)
    torch.testing.assert_close(module(input, target, normalizer=torch.tensor(2.0, device=device)), total / 2)


@every_formula
@pytest.mark.parametrize("held", [5.0, torch.tensor(5.0), None], ids=["number", "tensor", "none"])
def test_a_symbolic_trace_keeps_the_normalizer_of_a_module(loss: Member, held: float | Tensor | None) -> None:
    input, target = problem(loss, 5, "cpu")
    module = loss.make_module(**({"normalizer": held} if held is not None else {}))
    traced = torch.fx.symbolic_trace(module)
    torch.testing.assert_close(traced(input, target), module(input, target), rtol=0, atol=0)
    if held is not None:
        given = torch.tensor(7.0)
        torch.testing.assert_close(traced(input, target, given), module(input, target, given), rtol=0, atol=0)


@every_formula
def test_vmap_over_the_normalizer(loss: Member, device: str) -> None:
    input, target = problem(loss, 5, device, torch.float64)
    normalizers = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64, device=device)
    batched = torch.func.vmap(lambda n: loss(input, target, normalizer=n))(normalizers)
    torch.testing.assert_close(batched, loss(input, target, reduction="sum") / normalizers)


@every_formula
def test_accumulated_micro_batches_make_the_mean_of_the_whole(loss: Member, device: str) -> None:
    """What num_items_in_batch is for."""
    input, target = problem(loss, 30, device, torch.float64)
    leaf, parts = input.clone().requires_grad_(), input.clone().requires_grad_()
    loss(leaf, target).backward()
    count = torch.tensor(30.0, dtype=torch.float64, device=device)
    for x, y in zip(parts.split([7, 20, 3]), target.split([7, 20, 3]), strict=True):
        loss(x, y, normalizer=count).backward()
    torch.testing.assert_close(parts.grad, leaf.grad)
