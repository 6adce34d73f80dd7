"""torch.func, forward-mode AD, derivatives of higher order and torch.autograd.functional: none may be silently wrong, none slower than one batched call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import reference
import torch
import torch.autograd.forward_ad as fwAD
from callables import PYTHON_PROBABILITIES, PYTHON_WITH_LOGITS, Loss, functional
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

FORMULAS: dict[str, tuple[Loss, ...]] = {
    "with_logits": PYTHON_WITH_LOGITS,
    "probabilities": PYTHON_PROBABILITIES,
}
CALLS = [pytest.param(formula, loss, id=loss.__name__) for formula, losses in FORMULAS.items() for loss in losses]
# One of each formula where a test takes long: the ways to call differ in what stands before the operator only.
OPERATORS = [call for call in CALLS if call.id in ("operator", "function", "probabilities_operator")]
WEIGHTED = ["plain", "weighted"]
SHAPE = (2, 3)

pytestmark = pytest.mark.parametrize("reduction", reference.REDUCTIONS)


@pytest.fixture(autouse=True)
def _no_slow_loops() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batching rule.*")
        warnings.filterwarnings("error", message=".*performance drop.*")
        yield


class Case:
    """One loss with its tensors in float64, and the same loss as a formula of elementary operations, which autograd has the derivatives of."""

    def __init__(
        self, formula: str, loss: Loss, weighted: str, reduction: str, device: str, batch: tuple[int, ...] = ()
    ) -> None:
        shape = (*batch, *SHAPE)
        float64 = torch.float64
        self.logits = formula == "with_logits"
        if self.logits:
            self.input = 4 * torch.randn(shape, dtype=float64, device=device)
        else:
            self.input = 0.05 + 0.9 * torch.rand(shape, dtype=float64, device=device)
        self.target = torch.rand(shape, dtype=float64, device=device)
        self.weights: dict[str, Tensor] = {}
        if weighted == "weighted":
            self.weights["weight"] = torch.rand((*batch, *SHAPE), dtype=float64, device=device) + 0.5
            if self.logits:
                self.weights["pos_weight"] = torch.rand((*batch, SHAPE[1]), dtype=float64, device=device) + 0.5
        self.loss, self.reduction = loss, reduction

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.input, self.target, *self.weights.values())

    def ours(self, input: Tensor, target: Tensor, *weights: Tensor) -> Tensor:
        return self.loss(input, target, **dict(zip(self.weights, weights, strict=True)), reduction=self.reduction)

    def formula(self, input: Tensor, target: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(self.weights, weights, strict=True))
        if self.logits:
            softplus, softplus_minus = torch.logaddexp(input, input * 0), torch.logaddexp(-input, input * 0)
            terms = (1 - target) * softplus + named.get("pos_weight", 1.0) * target * softplus_minus
        else:
            terms = -(target * input.log() + (1 - target) * (1 - input).log())
        terms = terms * named.get("weight", 1.0)
        return {"none": lambda: terms, "mean": terms.mean, "sum": terms.sum}[self.reduction]()


def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # The square makes the gradient of the loss something that depends on the input as well.
    return lambda *tensors: (function(*tensors) ** 2).sum()


def same(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("weighted", WEIGHTED)
@pytest.mark.parametrize(("formula", "loss"), CALLS)
def test_func_grad_vjp_and_jvp(formula: str, loss: Loss, weighted: str, reduction: str, device: str) -> None:
    case = Case(formula, loss, weighted, reduction, device)
    everything = tuple(range(len(case.tensors)))
    same(
        torch.func.grad(scalar(case.ours), everything)(*case.tensors),
        torch.func.grad(scalar(case.formula), everything)(*case.tensors),
    )
    (output, vjp), (expected, expected_vjp) = (torch.func.vjp(f, *case.tensors) for f in (case.ours, case.formula))
    same(output, expected)
    cotangent = torch.randn_like(output)
    same(vjp(cotangent), expected_vjp(cotangent))
    tangents = tuple(torch.randn_like(tensor) for tensor in case.tensors)
    same(torch.func.jvp(case.ours, case.tensors, tangents), torch.func.jvp(case.formula, case.tensors, tangents))


@pytest.mark.parametrize("weighted", WEIGHTED)
@pytest.mark.parametrize(("formula", "loss"), OPERATORS)
def test_func_jacobians_and_hessian(formula: str, loss: Loss, weighted: str, reduction: str, device: str) -> None:
    case = Case(formula, loss, weighted, reduction, device)
    for argument in range(len(case.tensors)):
        expected = torch.func.jacrev(case.formula, argument)(*case.tensors)
        same(torch.func.jacrev(case.ours, argument)(*case.tensors), expected)
        same(torch.func.jacfwd(case.ours, argument)(*case.tensors), expected)
    same(torch.func.hessian(case.ours)(*case.tensors), torch.func.hessian(case.formula)(*case.tensors))
    same(
        torch.func.jacrev(torch.func.jacrev(scalar(case.ours)))(*case.tensors),
        torch.func.hessian(scalar(case.formula))(*case.tensors),
    )


@pytest.mark.parametrize("weighted", WEIGHTED)
@pytest.mark.parametrize(("formula", "loss"), CALLS)
def test_vmap_over_every_argument(formula: str, loss: Loss, weighted: str, reduction: str, device: str) -> None:
    """Each argument batched alone, all of them together, and over a dimension that is not the first."""
    batched = Case(formula, loss, weighted, reduction, device, batch=(5,))
    single = tuple(tensor[0] for tensor in batched.tensors)
    count = len(single)
    choices = [{argument} for argument in range(count)] + [set(range(count))]
    for choice in choices:
        tensors = tuple(batched.tensors[i] if i in choice else single[i] for i in range(count))
        dims = tuple(0 if i in choice else None for i in range(count))
        each = [
            batched.ours(*(batched.tensors[i][b] if i in choice else single[i] for i in range(count))) for b in range(5)
        ]
        same(torch.func.vmap(batched.ours, dims)(*tensors), torch.stack(each))
        moved = tuple(t.movedim(0, -1) if d == 0 else t for t, d in zip(tensors, dims, strict=True))
        last = tuple(None if d is None else -1 for d in dims)
        same(torch.func.vmap(batched.ours, last)(*moved), torch.stack(each))


@pytest.mark.parametrize("weighted", WEIGHTED)
@pytest.mark.parametrize(("formula", "loss"), CALLS)
def test_vmap_of_grad_gives_the_gradient_of_each_example(
    formula: str, loss: Loss, weighted: str, reduction: str, device: str
) -> None:
    case = Case(formula, loss, weighted, reduction, device, batch=(5,))
    same(
        torch.func.vmap(torch.func.grad(scalar(case.ours)))(*case.tensors),
        torch.func.vmap(torch.func.grad(scalar(case.formula)))(*case.tensors),
    )
    same(
        torch.func.vmap(torch.func.hessian(scalar(case.ours)))(*case.tensors),
        torch.func.vmap(torch.func.hessian(scalar(case.formula)))(*case.tensors),
    )
    # Outside: the batch is already there when the graph is recorded.
    leaf = case.input.clone().requires_grad_()
    torch.func.vmap(case.ours)(leaf, *case.tensors[1:]).sum().backward()
    same(leaf.grad, torch.func.grad(lambda x: torch.func.vmap(case.formula)(x, *case.tensors[1:]).sum())(case.input))


@pytest.mark.parametrize("weighted", WEIGHTED)
@pytest.mark.parametrize(("formula", "loss"), CALLS)
def test_forward_mode(formula: str, loss: Loss, weighted: str, reduction: str, device: str) -> None:
    case = Case(formula, loss, weighted, reduction, device)
    tangents = tuple(torch.randn_like(tensor) for tensor in case.tensors)
    with fwAD.dual_level():
        output = fwAD.unpack_dual(case.ours(*map(fwAD.make_dual, case.tensors, tangents)))
    expected, expected_tangent = torch.func.jvp(case.formula, case.tensors, tangents)
    same(output.primal, expected)
    assert output.tangent is not None
    same(output.tangent, expected_tangent)


@pytest.mark.parametrize("weighted", WEIGHTED)
@pytest.mark.parametrize(("formula", "loss"), OPERATORS)
def test_gradcheck_in_all_modes(formula: str, loss: Loss, weighted: str, reduction: str, device: str) -> None:
    case = Case(formula, loss, weighted, reduction, device)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in case.tensors)
    assert gradcheck(case.ours, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(case.ours, leaves, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize(("formula", "loss"), OPERATORS)
def test_reverse_over_forward_mode(formula: str, loss: Loss, reduction: str, device: str) -> None:
    case = Case(formula, loss, "plain", reduction, device)
    gradients = []
    for function in (case.ours, case.formula):
        leaf = case.input.clone().requires_grad_()
        with fwAD.dual_level():
            output = function(fwAD.make_dual(leaf, torch.ones_like(leaf)), case.target)
            tangent = fwAD.unpack_dual(output).tangent
            assert tangent is not None
            gradients.append(torch.autograd.grad(tangent.sum(), leaf)[0])
    same(*gradients)


@pytest.mark.parametrize("weighted", WEIGHTED)
@pytest.mark.parametrize(("formula", "loss"), OPERATORS)
def test_third_derivative(formula: str, loss: Loss, weighted: str, reduction: str, device: str) -> None:
    case = Case(formula, loss, weighted, reduction, device)

    def third(function: Callable[..., Tensor]) -> Tensor:
        leaf = case.input.clone().requires_grad_()
        value = scalar(function)(leaf, *case.tensors[1:])
        cotangent = torch.linspace(0.5, 1.5, leaf.numel(), dtype=leaf.dtype, device=device).view_as(leaf)
        for _ in range(2):
            (derivative,) = torch.autograd.grad(value, leaf, create_graph=True)
            assert derivative.requires_grad
            value = (derivative * cotangent).sum()
        (derivative,) = torch.autograd.grad(value, leaf)
        return derivative

    same(third(case.ours), third(case.formula))


@pytest.mark.parametrize(("formula", "loss"), OPERATORS)
def test_autograd_functional(formula: str, loss: Loss, reduction: str, device: str) -> None:
    case = Case(formula, loss, "plain", reduction, device)
    fixed = case.tensors[1:]
    ours, expected = (lambda x: case.ours(x, *fixed)), (lambda x: case.formula(x, *fixed))
    # Vectorised jacobians are checked by gradcheck's batched gradients.
    same(torch.autograd.functional.jacobian(ours, case.input), torch.autograd.functional.jacobian(expected, case.input))
    same(
        torch.autograd.functional.hessian(scalar(ours), case.input),
        torch.autograd.functional.hessian(scalar(expected), case.input),
    )
    same(
        torch.autograd.functional.hvp(scalar(ours), case.input, case.target),
        torch.autograd.functional.hvp(scalar(expected), case.input, case.target),
    )
    same(
        torch.autograd.functional.jvp(ours, case.input, case.target),
        torch.autograd.functional.jvp(expected, case.input, case.target),
    )


@pytest.mark.parametrize(("formula", "loss"), OPERATORS)
def test_batched_gradients(formula: str, loss: Loss, reduction: str, device: str) -> None:
    """is_grads_batched runs backward itself under vmap: through the fast path, not the formula."""
    case = Case(formula, loss, "plain", reduction, device)
    leaf = case.input.clone().requires_grad_()
    output = case.ours(leaf, *case.tensors[1:])
    cotangents = torch.randn(6, *output.shape, dtype=output.dtype, device=device)
    (batched,) = torch.autograd.grad(output, leaf, cotangents, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(output, leaf, cotangent, retain_graph=True)[0] for cotangent in cotangents]
    same(batched, torch.stack(each))


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_transforms_are_as_exact_as_the_kernel(dtype: torch.dtype, transform: str, reduction: str, device: str) -> None:
    """The tails, where native's formula cancels, and infinite logits."""
    infinity = torch.inf if dtype != torch.float16 else 20.0
    input = torch.tensor([-infinity, -88, -50, -20, -3, 0, 3, 20, 50, 88, infinity], device=device).to(dtype)
    for label in (0.0, 1.0):
        target = torch.full_like(input, label)
        keep = (input.isfinite()) | ((input > 0) == bool(label))  # the others have an infinite loss, which spoils a sum
        x, y = input[keep], target[keep]
        expected = reference.reduced(reference.with_logits(x, y), reduction)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return functional(x, y, reduction=reduction)

        if transform == "grad":
            actual = torch.func.grad(lambda x, y: loss(x, y).sum())(x, y)
            truth = expected.grad_input
        elif transform == "jvp":
            tangent = torch.ones_like(x)
            _, actual = torch.func.jvp(loss, (x, y), (tangent, torch.zeros_like(y)))
            truth = expected.grad_input if reduction == "none" else expected.grad_input.sum()
        else:
            actual = torch.func.vmap(loss)(x.expand(2, -1), y.expand(2, -1))[0]
            truth = expected.loss
        torch.testing.assert_close(
            actual.double(), truth, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny
        )


@pytest.mark.parametrize(("formula", "loss"), OPERATORS)
@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad], ids=["loss", "gradient"])
def test_a_batch_of_none(transform: Callable[..., Loss], formula: str, loss: Loss, reduction: str, device: str) -> None:
    def scalar(input: Tensor) -> Tensor:
        return loss(input, torch.ones_like(input), reduction=reduction).sum()

    input = torch.full((0, 3), 0.5, device=device)
    assert torch.func.vmap(transform(scalar))(input).shape == torch.func.vmap(transform(torch.sum))(input).shape
