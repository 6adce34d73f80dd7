"""One formula, one answer: the kernel, the composite formula under a transform and the differentiable gradient agree at every special value.

Each difference is in DIFFERENCES with its condition, and in the table of docs/compatibility.md with its reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from callables import EVERY_FORMULA, Member
from torch import Tensor

INF, NAN = float("inf"), float("nan")
LOGITS = [0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0, 88.0, -88.0, 104.0, -104.0, 1e4, -1e4, INF, -INF, NAN]
PROBABILITIES = [0.0, -0.0, 1e-40, 1e-13, 0.5, 1 - 2**-24, 1.0]
TARGETS = [0.0, -0.0, 1e-40, 0.3, 1.0, 88.0, -1e4, INF, -INF, NAN]
TARGETS_IN_RANGE = [0.0, -0.0, 1e-40, 0.3, 1.0, NAN]  # outside of it the base of a power is negative
TARGETS_OF_PROBABILITIES = [0.0, -0.0, 1e-40, 0.3, 1.0]  # others are refused
WEIGHTS = [0.0, -0.0, 1e-40, 1.0, -88.0, 1e4, INF, -INF, NAN]
POS_WEIGHTS = [0.0, 1e-40, 1.0, 104.0, INF, NAN]

Results = dict[str, Tensor]


class Grid:
    """All combinations, as one column an operand."""

    def __init__(self, loss: Member) -> None:
        self.loss = loss
        if loss.of_logits:
            targets = TARGETS if loss.name == "with_logits" else TARGETS_IN_RANGE
            axes = {"x": LOGITS, "y": targets, "w": WEIGHTS, "p": POS_WEIGHTS}
        else:
            axes = {"x": PROBABILITIES, "y": TARGETS_OF_PROBABILITIES, "w": WEIGHTS}
        columns = torch.tensor(list(itertools.product(*axes.values())))
        self.operands = dict(zip(axes, columns.T.contiguous(), strict=True))

    def call(self, x: Tensor, y: Tensor, w: Tensor, p: Tensor | None = None) -> Tensor:
        weights = {"weight": w} if p is None else {"weight": w, "pos_weight": p}
        return self.loss(x, y, reduction="none", **weights)


def kernel(grid: Grid) -> Results:
    x, y, *weights = (tensor.clone() for tensor in grid.operands.values())
    loss = grid.call(x.requires_grad_(), y.requires_grad_(), *weights)
    grad_input, grad_target = torch.autograd.grad(loss, (x, y), torch.ones_like(loss))
    return {"loss": loss.detach(), "grad_input": grad_input, "grad_target": grad_target}


def create_graph(grid: Grid) -> Results:
    x, y, *weights = (tensor.clone() for tensor in grid.operands.values())
    loss = grid.call(x.requires_grad_(), y.requires_grad_(), *weights)
    gradients = torch.autograd.grad(loss, (x, y), torch.ones_like(loss), create_graph=True)
    return {"loss": loss.detach(), "grad_input": gradients[0].detach(), "grad_target": gradients[1].detach()}


def func_grad(grid: Grid) -> Results:
    def total(*operands: Tensor) -> tuple[Tensor, Tensor]:
        loss = grid.call(*operands)
        return loss.sum(), loss

    (grad_input, grad_target), loss = torch.func.grad(total, (0, 1), has_aux=True)(*grid.operands.values())
    return {"loss": loss, "grad_input": grad_input, "grad_target": grad_target}


def vmap(grid: Grid) -> Results:
    """Each element an example of its own."""

    def total(*operands: Tensor) -> tuple[Tensor, Tensor]:
        loss = grid.call(*operands)
        return loss, loss

    transform = torch.func.vmap(torch.func.grad(total, (0, 1), has_aux=True))
    (grad_input, grad_target), loss = transform(*grid.operands.values())
    return {"loss": loss, "grad_input": grad_input, "grad_target": grad_target}


PATHS: dict[str, Callable[[Grid], Results]] = {"create_graph": create_graph, "func_grad": func_grad, "vmap": vmap}


def is_infinite_operand(grid: Grid, what: str) -> Tensor:
    y, *weights = list(grid.operands.values())[1:]
    return torch.stack([y, *weights]).isinf().any(0)


def is_target_gradient_at_infinity(grid: Grid, what: str) -> Tensor:
    at_infinity = grid.operands["x"].isinf()
    return at_infinity if what == "grad_target" else torch.zeros_like(at_infinity)


def is_nan_weight_at_infinity(grid: Grid, what: str) -> Tensor:
    return grid.operands["w"].isnan() & grid.operands["x"].isinf()


EVERY_PATH = tuple(PATHS)
LOGIT_LOSSES = ("with_logits", "focal", "asymmetric")

# Condition, losses, paths: the rows of the table "Where our own paths differ" of docs/compatibility.md, in its order.
DIFFERENCES: dict[str, tuple[Callable[[Grid, str], Tensor], tuple[str, ...], tuple[str, ...]]] = {
    "an infinite target, weight or positive weight": (is_infinite_operand, LOGIT_LOSSES, EVERY_PATH),
    "the gradient of a target at an infinite logit": (is_target_gradient_at_infinity, ("focal",), EVERY_PATH),
    "a NaN weight beside an infinite logit": (is_nan_weight_at_infinity, ("focal",), EVERY_PATH),
}


def differences(grid: Grid, actual: Tensor, expected: Tensor, what: str) -> Tensor:
    """Which elements are neither both NaN nor equal within the rounding of what is added."""
    operands = grid.operands
    weights = {"weight": operands["w"]} | ({"pos_weight": operands["p"]} if "p" in operands else {})
    scale = getattr(grid.loss.terms(operands["x"], operands["y"], **weights), f"{what}_scale")
    # In the subnormal numbers each product is rounded to few places.
    smallest = 1e-37 * (1 + operands["w"].abs() * (1 + operands.get("p", operands["w"]).abs()))
    relative = torch.where(operands["w"].abs() < 1e-37, 1e-4, 1e-6)
    rounding = sum(each.double().nan_to_num(0.0, 0.0) for each in (1e-5 * scale, smallest))
    tolerance = relative * expected.double().abs() + rounding
    close = (actual.double() - expected.double()).abs() <= tolerance
    return ~((close & expected.isfinite()) | (actual == expected) | (actual.isnan() & expected.isnan()))


def explained(grid: Grid, path: str, what: str) -> dict[str, Tensor]:
    return {
        reason: condition(grid, what)
        for reason, (condition, losses, paths) in DIFFERENCES.items()
        if grid.loss.name in losses and path in paths
    }


@pytest.mark.parametrize("what", ["loss", "grad_input", "grad_target"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("loss", EVERY_FORMULA, ids=lambda loss: loss.name)
def test_the_paths_agree(loss: Member, path: str, what: str) -> None:
    grid = Grid(loss)
    expected, actual = kernel(grid)[what], PATHS[path](grid)[what]
    different = differences(grid, actual, expected, what)
    for condition in explained(grid, path, what).values():
        different &= ~condition
    if different.any():
        at = int(different.nonzero()[0])
        operands = {name: tensor[at].item() for name, tensor in grid.operands.items()}
        raise AssertionError(
            f"{int(different.sum())} unexplained, the first at {operands}: {actual[at].item()}, kernel {expected[at].item()}"
        )


@pytest.mark.parametrize("reason", DIFFERENCES)
def test_every_listed_difference_is_there(reason: str) -> None:
    """A list that explains nothing any more is shortened."""
    _, losses, paths = DIFFERENCES[reason]
    for loss in (loss for loss in EVERY_FORMULA if loss.name in losses):
        grid = Grid(loss)
        expected = kernel(grid)
        found = 0
        for path in paths:
            actual = PATHS[path](grid)
            for what in expected:
                different = differences(grid, actual[what], expected[what], what)
                found += int((different & explained(grid, path, what)[reason]).sum())
        assert found, loss.name


@pytest.mark.parametrize("loss", EVERY_FORMULA, ids=lambda loss: loss.name)
def test_the_kernel_has_one_answer_too(loss: Member) -> None:
    """None, mean and sum, with a gradient of the target and without: the same gradient at each special value."""
    grid = Grid(loss)
    expected = kernel(grid)
    operands = [tensor.clone() for tensor in grid.operands.values()]
    leaf = operands[0].requires_grad_()
    value = grid.call(*operands)
    (gradient,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    assert torch.equal(value.detach().nan_to_num(7.0), expected["loss"].nan_to_num(7.0))
    assert torch.equal(gradient.nan_to_num(7.0), expected["grad_input"].nan_to_num(7.0))
    weights = {"weight": operands[2]} | ({"pos_weight": operands[3]} if loss.of_logits else {})
    (of_sum,) = torch.autograd.grad(loss(leaf, operands[1], reduction="sum", **weights), leaf)
    assert torch.equal(of_sum.nan_to_num(7.0), expected["grad_input"].nan_to_num(7.0))
