"""A vmap takes the kernel: each example of a batch has the loss, the gradients and the errors of a call of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from callables import EVERY_FORMULA, Member, every_formula
from reference import REDUCTIONS
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import bce_ext

BATCH = 3
SHAPES = [
    pytest.param((), id="numbers"),
    pytest.param((4,), id="rows"),
    # Neither is a multiple of a vector.
    pytest.param((3, 5, 7), id="images"),
]
# The dimension of the batch in input and target; None: the same one for all examples.
PLACES = [(0, 0), (1, 0), (-1, 1), (0, None), (None, 0)]

every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def with_batch(tensor: Tensor, place: int | None) -> Tensor:
    """A batch of other examples like the tensor, along one of its dimensions."""
    if place is None:
        return tensor
    examples = [tensor.roll(i).clone() for i in range(BATCH)]
    return torch.stack(examples, min(place, tensor.dim()))


def example(tensor: Tensor, place: int | None, i: int) -> Tensor:
    return tensor if place is None else tensor.select(min(place, tensor.dim() - 1), i)


def in_dim(tensor: Tensor, place: int | None) -> int | None:
    return None if place is None else min(place, tensor.dim() - 1)


def problem(
    loss: Member, shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    target = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return loss.make_input(shape, dtype, device), target


@every_formula
@every_reduction
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("places", PLACES, ids=str)
def test_every_place_of_the_batch(
    loss: Member, reduction: str, shape: tuple[int, ...], places: tuple[int | None, int | None], device: str
) -> None:
    tensors = [with_batch(t, place) for t, place in zip(problem(loss, shape, device), places, strict=True)]
    dims = tuple(in_dim(t, place) for t, place in zip(tensors, places, strict=True))

    def one(input: Tensor, target: Tensor) -> Tensor:
        return loss(input, target, reduction=reduction)

    expected = [one(*(example(t, p, i) for t, p in zip(tensors, places, strict=True))) for i in range(BATCH)]
    torch.testing.assert_close(vmap(one, dims)(*tensors), torch.stack(expected))


@every_formula
@every_reduction
@pytest.mark.parametrize("batched", [True, False])
def test_weights_with_a_batch_and_without(loss: Member, reduction: str, batched: bool, device: str) -> None:
    """They broadcast to an example, not to the batch: (5,) is a row of (4, 5) in each of 5 examples."""
    generator = torch.Generator().manual_seed(2)
    input = torch.stack([loss.make_input((4, 5), torch.float32, device, seed) for seed in range(5)])
    target = torch.rand(5, 4, 5, generator=generator).to(device)
    weight = torch.rand(5, *([5] if batched else []), generator=generator).to(device)
    weights = {"weight": weight, "pos_weight": weight.flip(0)} if loss.of_logits else {"weight": weight}

    def one(input: Tensor, target: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return loss(input, target, reduction=reduction, **weights)

    of_example = [{name: w[i] if batched else w for name, w in weights.items()} for i in range(5)]
    expected = [one(input[i], target[i], of_example[i]) for i in range(5)]
    torch.testing.assert_close(vmap(one, (0, 0, 0 if batched else None))(input, target, weights), torch.stack(expected))


@every_formula
@every_reduction
@pytest.mark.parametrize("options", [{"label_smoothing": 0.2}, {"ignore_index": 1.0}, {"weight": 0.5}], ids=str)
def test_options_and_numbers(loss: Member, reduction: str, options: dict[str, Any], device: str) -> None:
    input, target = (with_batch(t, 0) for t in problem(loss, (6,), device))
    target = target.round()

    def one(input: Tensor, target: Tensor) -> Tensor:
        return loss(input, target, reduction=reduction, **options)

    torch.testing.assert_close(
        vmap(one)(input, target), torch.stack([one(input[i], target[i]) for i in range(BATCH)]), equal_nan=True
    )


@every_formula
@every_reduction
def test_a_vmap_in_a_vmap(loss: Member, reduction: str, device: str) -> None:
    input, target = loss.make_input((2, 3, 4), torch.float32, device), torch.rand(3, 4, device=device)

    def one(input: Tensor, target: Tensor) -> Tensor:
        return loss(input, target, reduction=reduction)

    # The outer one maps the input alone.
    nested = vmap(lambda of_outer: vmap(one)(of_outer, target))(input)
    torch.testing.assert_close(
        nested, torch.stack([torch.stack([one(input[i, j], target[j]) for j in range(3)]) for i in range(2)])
    )


@every_formula
@every_reduction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(loss: Member, reduction: str, dtype: torch.dtype, device: str) -> None:
    input, target = (with_batch(t, 0) for t in problem(loss, (300,), device, dtype))  # 300: a sum that shows roundings

    def one(input: Tensor, target: Tensor) -> Tensor:
        return loss(input, target, reduction=reduction)

    expected = torch.stack([one(input[i], target[i]) for i in range(BATCH)])
    torch.testing.assert_close(vmap(one)(input, target), expected, rtol=torch.finfo(dtype).eps, atol=0)


@every_formula
@every_reduction
def test_gradients_outside_of_the_vmap(loss: Member, reduction: str, device: str) -> None:
    input, target = (with_batch(t, 0).double() for t in problem(loss, (2, 3), device))

    def total(input: Tensor, target: Tensor, mapped: bool) -> Tensor:
        def one(input: Tensor, target: Tensor) -> Tensor:
            return loss(input, target, reduction=reduction)

        losses = (
            vmap(one)(input, target)
            if mapped
            else torch.stack([one(*each) for each in zip(input, target, strict=True)])
        )
        return losses.square().sum()

    gradients = []
    for mapped in (True, False):
        leaves = input.clone().requires_grad_(), target.clone().requires_grad_()
        first = torch.autograd.grad(total(*leaves, mapped), leaves, create_graph=True)
        gradients.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)))
    torch.testing.assert_close(gradients[0], gradients[1])


@every_formula
@every_reduction
def test_gradients_inside_of_the_vmap(loss: Member, reduction: str, device: str) -> None:
    input, target = (with_batch(t, 0).double() for t in problem(loss, (2, 3), device))

    def one(input: Tensor, target: Tensor) -> Tensor:
        return loss(input, target, reduction=reduction).square().sum()

    for argument in (0, 1):
        each = [grad(one, argument)(input[i], target[i]) for i in range(BATCH)]
        torch.testing.assert_close(vmap(grad(one, argument))(input, target), torch.stack(each))
        leaves = input.clone().requires_grad_(), target.clone().requires_grad_()
        expected = torch.stack(
            [torch.autograd.grad(one(leaves[0][i], leaves[1][i]), leaves[argument])[0][i] for i in range(BATCH)]
        )
        torch.testing.assert_close(torch.stack(each), expected)


@every_formula
@pytest.mark.parametrize("outer", ["target", "weight", "input"])
@pytest.mark.parametrize("between", ["grad", "jvp", "vmap"])
def test_an_operand_that_only_an_outer_vmap_maps(loss: Member, between: str, outer: str, device: str) -> None:
    """The innermost vmap maps none of the operands, and a derivative of something else may be between both."""
    input, target = (t.double() for t in problem(loss, (4, 3), device))
    weight = torch.rand(3, dtype=torch.float64, device=device)
    factors = torch.tensor([0.5, -2.0], dtype=torch.float64, device=device)
    batches = {
        "input": loss.make_input((2, 4, 3), torch.float64, device),
        "target": torch.stack([target, 1 - target]),
        "weight": torch.stack([weight, 2 * weight]),
    }

    def of_outer(mapped: Tensor) -> Tensor:
        operands = {"input": input, "target": target, "weight": weight} | {outer: mapped}
        other = "input" if outer != "input" else "target"  # that is differentiated

        def total(x: Tensor) -> Tensor:
            return vmap(lambda factor: factor * loss(**(operands | {other: x})))(factors).sum()

        if between == "grad":
            return grad(total)(operands[other])
        if between == "jvp":
            return torch.func.jvp(total, (operands[other],), (torch.ones_like(operands[other]),))[1]
        return vmap(total)(torch.stack([operands[other]] * 2))

    expected = torch.stack([of_outer(each) for each in batches[outer]])
    torch.testing.assert_close(vmap(of_outer)(batches[outer]), expected)


@every_formula
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_second_derivatives_of_an_example_of_nothing(loss: Member, reduction: str, device: str) -> None:
    nothing = torch.zeros(0, dtype=torch.float64, device=device)
    hessian = torch.func.hessian(lambda x: loss(x, nothing, reduction=reduction))(nothing)
    assert hessian.shape == (0, 0)


@pytest.mark.parametrize("loss", [loss for loss in EVERY_FORMULA if loss.of_logits], ids=lambda loss: loss.name)
def test_integer_targets_are_checked(loss: Member) -> None:
    input = loss.make_input((BATCH, 4), torch.float32, "cpu")
    target = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1]])
    expected = torch.stack([loss(input[i], target[i]) for i in range(BATCH)])
    torch.testing.assert_close(vmap(loss)(input, target), expected)
    target[1, 2] = 7
    with pytest.raises(RuntimeError, match="expected bool and integer targets to be 0 or 1, but one is 7"):
        vmap(loss)(input, target)


def test_probabilities_are_checked() -> None:
    with pytest.raises(RuntimeError, match=r"between 0 and 1|\[0, 1\]"):
        vmap(bce_ext.functional.binary_cross_entropy)(torch.tensor([[0.5], [1.5]]), torch.ones(2, 1))


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@every_formula
@every_reduction
def test_the_kernel_computes_the_batch_at_once(loss: Member, reduction: str, device: str) -> None:
    input, target = (with_batch(t, 0) for t in problem(loss, (4,), device))
    with Operators() as seen:
        vmap(lambda x, y: loss(x, y, reduction=reduction))(input, target)
    assert seen.names.count("bce_ext._bce_loss.default") == 1
    assert len(seen.names) < 8, seen.names
