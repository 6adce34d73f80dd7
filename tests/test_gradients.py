"""Derivatives: right of first and second order for every way to call the losses, never dropped, and the same at a second backward."""

from __future__ import annotations

import pytest
import reference
import torch
from callables import PROBABILITIES, WITH_LOGITS, Loss, functional, operator
from reference import REDUCTIONS, make_logits, make_probabilities, make_targets, make_weights, reduced, ulp_error
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import bce_ext

SHAPE = (2, 1, 3)  # numerical derivatives are taken element by element: few will do

# Shapes of weight and pos_weight beside an input of SHAPE.
WEIGHTS: dict[str, dict[str, tuple[int, ...]]] = {
    "no_weights": {},
    "weight_scalar": {"weight": ()},
    "weight_last": {"weight": (3,)},
    "weight_batch": {"weight": (2, 1, 1)},
    "weight_full": {"weight": SHAPE},
    "pos_weight_scalar": {"pos_weight": ()},
    "pos_weight_last": {"pos_weight": (3,)},
    "both_full": {"weight": SHAPE, "pos_weight": SHAPE},
    "both_broadcast": {"weight": (2, 1, 1), "pos_weight": (1, 3)},
}
PROBABILITY_WEIGHTS = {name: shapes for name, shapes in WEIGHTS.items() if "pos_weight" not in shapes}

parametrize_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
parametrize_losses = pytest.mark.parametrize("loss_function", WITH_LOGITS, ids=lambda f: f.__name__)
parametrize_probability_losses = pytest.mark.parametrize("loss_function", PROBABILITIES, ids=lambda f: f.__name__)


def problem(
    shapes: dict[str, tuple[int, ...]], device: str, with_logits: bool = True
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    input = (make_logits if with_logits else make_probabilities)(SHAPE, torch.float64, device)
    # Away from the ends of the range of probabilities, where the clamps have kinks and finite differences end outside.
    input = input if with_logits else 0.05 + 0.9 * input
    target = make_targets(SHAPE, torch.float64, device)
    target = target if with_logits else 0.05 + 0.9 * target
    weights = {name: make_weights(shape, torch.float64, device) for name, shape in shapes.items()}
    return input.requires_grad_(), target.requires_grad_(), weights


@parametrize_reduction
@pytest.mark.parametrize("weights", WEIGHTS)
@parametrize_losses
def test_first_and_second_derivatives(loss_function: Loss, weights: str, reduction: str, device: str) -> None:
    input, target, tensors = problem(WEIGHTS[weights], device)

    def of_both(x: Tensor, y: Tensor) -> Tensor:
        return loss_function(x, y, **tensors, reduction=reduction)

    def of_input(x: Tensor) -> Tensor:
        return loss_function(x, target.detach(), **tensors, reduction=reduction)

    assert gradcheck(of_both, (input, target))
    assert gradcheck(of_input, (input,))  # another path: the gradient is computed in the forward pass
    assert gradgradcheck(of_both, (input, target))
    assert gradgradcheck(of_input, (input,))


@parametrize_reduction
@pytest.mark.parametrize("weights", PROBABILITY_WEIGHTS)
@parametrize_probability_losses
def test_first_and_second_derivatives_of_probabilities(
    loss_function: Loss, weights: str, reduction: str, device: str
) -> None:
    input, target, tensors = problem(PROBABILITY_WEIGHTS[weights], device, with_logits=False)

    def of_both(q: Tensor, y: Tensor) -> Tensor:
        return loss_function(q, y, **tensors, reduction=reduction)

    def of_input(q: Tensor) -> Tensor:
        return loss_function(q, target.detach(), **tensors, reduction=reduction)

    assert gradcheck(of_both, (input, target))
    assert gradcheck(of_input, (input,))
    assert gradgradcheck(of_both, (input, target))
    assert gradgradcheck(of_input, (input,))


@parametrize_reduction
@parametrize_losses
def test_weights_get_their_gradient(loss_function: Loss, reduction: str, device: str) -> None:
    input, target, tensors = problem(WEIGHTS["both_broadcast"], device)
    weight, pos_weight = (tensors[name].requires_grad_() for name in ("weight", "pos_weight"))

    def of_all(x: Tensor, y: Tensor, w: Tensor, p: Tensor) -> Tensor:
        return loss_function(x, y, weight=w, pos_weight=p, reduction=reduction)

    assert gradcheck(of_all, (input, target, weight, pos_weight))
    assert gradgradcheck(of_all, (input, target, weight, pos_weight))


@parametrize_losses
def test_the_gradient_of_the_target_alone(loss_function: Loss, device: str) -> None:
    input, target, _ = problem({}, device)
    (gradient,) = torch.autograd.grad(loss_function(input.detach(), target, reduction="sum"), target)
    torch.testing.assert_close(gradient, -input.detach())


@parametrize_reduction
@parametrize_losses
def test_double_backward_is_not_dropped(loss_function: Loss, reduction: str, device: str) -> None:
    # A penalty on the gradient: for y = 0 the slope is sigmoid(x), and its square has the derivative 2 s^2 (1 - s).
    input = make_logits((37,), torch.float64, device).requires_grad_()
    loss = loss_function(input, torch.zeros_like(input), reduction=reduction)
    (gradient,) = torch.autograd.grad(loss.sum(), input, create_graph=True)
    assert gradient.requires_grad
    gradient.square().sum().backward()
    s = torch.sigmoid(input.detach())
    scale = 37.0 if reduction == "mean" else 1.0
    assert input.grad is not None
    torch.testing.assert_close(input.grad, 2 * s**2 * (1 - s) / scale**2)


@pytest.mark.parametrize("with_target", [False, True], ids=["input", "input_and_target"])
@pytest.mark.parametrize("factor", [1.0, 0.37], ids=lambda f: f"grad_output_{f}")
@pytest.mark.parametrize("dtype", reference.FLOATING_DTYPES, ids=str)
@parametrize_reduction
@parametrize_losses
def test_a_second_backward_has_the_same_bits(
    loss_function: Loss, reduction: str, dtype: torch.dtype, factor: float, with_target: bool, device: str
) -> None:
    shape = (1031,)  # a prime above a block
    input = make_logits(shape, dtype, device).requires_grad_()
    target = make_targets(shape, dtype, device).requires_grad_(with_target)
    inputs = [input, target] if with_target else [input]
    loss = loss_function(input, target, make_weights(shape, dtype, device), reduction=reduction)
    grad_output = torch.full_like(loss, factor)
    first = torch.autograd.grad(loss, inputs, grad_output, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.mul_(7)  # the user's to do: the graph must not see it
    for _ in range(2):
        again = torch.autograd.grad(loss, inputs, grad_output, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))


@pytest.mark.parametrize("dtype", reference.FLOATING_DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@parametrize_losses
def test_each_backward_has_its_own_factor(loss_function: Loss, reduction: str, dtype: torch.dtype, device: str) -> None:
    input, target = make_logits((67,), dtype, device).requires_grad_(), make_targets((67,), dtype, device)
    terms = reference.with_logits(input, target)
    loss = loss_function(input, target, reduction=reduction)
    for factor in (0.375, 1.0, -3.0, 1.0):
        grad_output = torch.full_like(loss, factor)
        (gradient,) = torch.autograd.grad(loss, input, grad_output, retain_graph=True)
        expected = reduced(terms, reduction, factor)
        # A gradient kept in 16 bits is rounded once when it is kept, and once when it is scaled.
        error = (gradient.double() - expected.grad_input).abs()
        ulp = reference.ulp(expected.grad_input, dtype)
        assert (
            error <= ulp * 1.01 + 8 * torch.finfo(dtype).eps * expected.grad_input_scale * dtype.itemsize // 4
        ).all() or (
            error <= 2 * ulp + 4 * torch.finfo(reference.arithmetic_dtype(dtype)).eps * expected.grad_input_scale
        ).all()


@parametrize_reduction
@parametrize_losses
def test_gradients_accumulate(loss_function: Loss, reduction: str, device: str) -> None:
    input, target = make_logits((1031,), torch.float32, device), make_targets((1031,), torch.float32, device)
    leaf = input.clone().requires_grad_()
    loss = loss_function(leaf, target, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    assert leaf.grad is not None
    once = leaf.grad.clone()
    loss.backward()  # added to what the first backward left in .grad, which may be the very memory that it handed over
    assert torch.equal(leaf.grad, 2 * once)
    loss_function(leaf, target, reduction=reduction).sum().backward()
    assert torch.equal(leaf.grad, 2 * once + once)

    shared = input.clone().requires_grad_()  # used twice in one graph
    (
        loss_function(shared, target, reduction=reduction) + loss_function(shared, target, reduction=reduction)
    ).sum().backward()
    assert shared.grad is not None
    assert torch.equal(shared.grad, 2 * once)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@parametrize_losses
def test_the_loss_times_zero_and_infinity(loss_function: Loss, reduction: str, device: str) -> None:
    input, target = make_logits((37,), torch.float32, device).requires_grad_(), torch.zeros(37, device=device)
    (gradient,) = torch.autograd.grad(loss_function(input, target, reduction=reduction) * 0, input)
    assert (gradient == 0).all()
    (gradient,) = torch.autograd.grad(loss_function(input, target, reduction=reduction) * float("inf"), input)
    assert (gradient == float("inf")).all()  # what a gradient scaler looks for


@parametrize_losses
def test_backward_after_the_input_was_overwritten_raises(loss_function: Loss, device: str) -> None:
    leaf = make_logits((37,), torch.float32, device).requires_grad_()
    input = leaf * 1
    loss = loss_function(input, torch.zeros_like(input), reduction="none")
    input.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@parametrize_losses
def test_a_second_backward_after_the_input_was_overwritten_raises(
    loss_function: Loss, reduction: str, device: str
) -> None:
    leaf = make_logits((37,), torch.float32, device).requires_grad_()
    input = leaf * 1
    loss = loss_function(input, torch.zeros_like(input), reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    input.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("loss_function", [functional, operator], ids=lambda f: f.__name__)
def test_a_second_backward_without_retain_graph_raises(loss_function: Loss, device: str) -> None:
    for reduction in REDUCTIONS:
        input = make_logits((37,), torch.float32, device).requires_grad_()
        loss = loss_function(input, torch.zeros_like(input), reduction=reduction).sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


@pytest.mark.parametrize("with_target", [False, True], ids=["input", "input_and_target"])
@pytest.mark.parametrize("scale", [1024.0, 32768.0])
@parametrize_losses
def test_a_float16_mean_does_not_underflow_under_a_gradient_scaler(
    loss_function: Loss, scale: float, with_target: bool, device: str
) -> None:
    # Divided by the number of elements alone, the gradients are below the smallest normal float16, and many of them 0.
    shape = (300_007,)
    input = make_logits(shape, torch.float16, device).requires_grad_()
    target = make_targets(shape, torch.float16, device).requires_grad_(with_target)
    loss = loss_function(input, target)
    gradient = torch.autograd.grad(loss, [input, target] if with_target else [input], torch.full_like(loss, scale))[0]
    expected = reduced(reference.with_logits(input, target), "mean", scale)
    reference.assert_rounded_once(
        gradient, expected.grad_input, expected.grad_input_scale, torch.float32, what="gradient"
    )


@parametrize_reduction
def test_a_scaler_of_65536_under_autocast(reduction: str, device: str) -> None:
    # The first scale of torch.amp.GradScaler, larger than any float16: the loss is float32 under autocast, its gradient
    # float16.
    input = (make_logits((300_007,), torch.float16, device) - 8).requires_grad_()
    target = torch.zeros_like(input)
    scale = 65536.0 if reduction == "mean" else 16.0
    with torch.autocast(device, dtype=torch.float16):
        loss = functional(input, target, reduction=reduction)
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss, input, torch.full_like(loss, scale))
    expected = reduced(reference.with_logits(input, target), reduction, scale).grad_input
    assert gradient.dtype == torch.float16
    assert ulp_error(gradient, expected).max() <= 1


class Stop(torch.autograd.Function):
    """Says that nothing depends on its argument, by no gradient at all."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, grad_output: Tensor) -> None:
        return None


@pytest.mark.parametrize("reduction", REDUCTIONS)
@parametrize_losses
def test_no_gradient_comes_of_none(loss_function: Loss, reduction: str, device: str) -> None:
    # Zeros would become NaN here, and would move a parameter under weight decay.
    input = torch.full((5,), torch.nan, device=device, requires_grad=True)
    target = torch.ones(5, device=device, requires_grad=True)
    for leaves in ((input,), (target,), (input, target)):
        loss = Stop.apply(loss_function(input, target, reduction=reduction))
        assert torch.autograd.grad(loss.sum(), leaves, allow_unused=True) == (None,) * len(leaves)


def test_no_gradient_comes_of_none_beside_a_linear_layer(device: str) -> None:
    for labels in (3, 2**22):  # all logits, and blocks of them
        rows = torch.full((2, 2), torch.nan, device=device, requires_grad=True)
        weight = torch.zeros(labels, 2, device=device, requires_grad=True)
        target = torch.zeros(2, dtype=torch.int64, device=device)
        loss = Stop.apply(bce_ext.functional.linear_binary_cross_entropy_with_logits(rows, weight, target))
        assert torch.autograd.grad(loss, (rows, weight), allow_unused=True) == (None, None)


def test_numbers_of_a_module_belong_to_no_mode() -> None:
    with torch.inference_mode():
        criterion = bce_ext.BCEWithLogitsLoss(pos_weight=2.0, weight=0.5, normalizer=3.0)
    input = torch.zeros(3, requires_grad=True)
    criterion(input, torch.ones(3)).backward()
    torch.testing.assert_close(input.grad, torch.full((3,), -0.5 * 0.5 * 2 / 3))
