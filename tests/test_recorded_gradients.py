"""A gradient that is taken inside of what torch.jit.trace, make_fx or torch.export record is that of the inputs which the record is given later."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable

import pytest
import torch
from callables import CROSS_ENTROPIES, EVERY_FORMULA, PYTHON_WITH_LOGITS, Loss, Member
from reference import REDUCTIONS, make_targets
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import bce_ext

SHAPE = (5, 3)


def linear(rows: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    weight = torch.linspace(-1, 1, 12, dtype=rows.dtype).view(4, 3)
    return bce_ext.functional.linear_binary_cross_entropy_with_logits(
        rows, weight, target[:, :1].expand(-1, 4), reduction=reduction
    )


def ignoring(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Another number of labels is ignored in each call."""
    labels = (target * 3).floor()
    return bce_ext.functional.binary_cross_entropy_with_logits(input, labels, ignore_index=2, reduction=reduction)


def differentiating_targets(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Where the gradient is not stored."""
    labels = (target * 3).floor().requires_grad_()
    return bce_ext.functional.binary_cross_entropy_with_logits(input, labels, ignore_index=2, reduction=reduction)


def routed(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    with bce_ext.fused():
        return torch.nn.functional.binary_cross_entropy_with_logits(input, target, reduction=reduction)


def each(losses: Iterable[Loss | Member]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("loss", losses, ids=lambda loss: getattr(loss, "name", None) or loss.__name__)


LOSSES = (*EVERY_FORMULA, *PYTHON_WITH_LOGITS, routed, ignoring, differentiating_targets)
# torch.jit.trace does not know what these save for the gradient, as it does not know the results of torch.exp.
UNKNOWN_TO_TRACE = [loss for loss in EVERY_FORMULA if loss not in CROSS_ENTROPIES]


def gradient_of(loss: Loss | Member, reduction: str) -> Callable[[Tensor, Tensor], Tensor]:
    def gradient(input: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = input.detach().requires_grad_()
            (result,) = torch.autograd.grad(3 * loss(leaf, target, reduction=reduction).sum(), leaf)
        return result

    return gradient


class Model(torch.nn.Module):
    def __init__(self, gradient: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gradient = gradient

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.gradient(input, target)


def inputs(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    # Inside of (0, 1), so that they are probabilities too.
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(SHAPE, generator=generator).clamp(0.1, 0.9).to(dtype), make_targets(SHAPE, dtype, "cpu", seed)


def check(
    record: Callable[[Tensor, Tensor], Tensor], expected: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    for seed in (0, 1, 1):  # what was recorded, others, and the same once more
        torch.testing.assert_close(record(*inputs(dtype, seed)), expected(*inputs(dtype, seed)))


@each(loss for loss in LOSSES if loss not in UNKNOWN_TO_TRACE)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_torch_jit_trace(dtype: torch.dtype, reduction: str, loss: Loss | Member) -> None:
    gradient = gradient_of(loss, reduction)
    traced = torch.jit.trace(gradient, inputs(dtype, 0), check_trace=False)
    check(traced, gradient, dtype)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    check(torch.jit.load(file), gradient, dtype)


@each([*UNKNOWN_TO_TRACE, linear])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_torch_jit_trace_refuses_what_it_does_not_know(reduction: str, loss: Loss | Member) -> None:
    with pytest.raises(RuntimeError, match="Cannot insert a Tensor that requires grad as a constant"):
        torch.jit.trace(gradient_of(loss, reduction), inputs(torch.float32, 0), check_trace=False)


@each(LOSSES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(tracing_mode: str, pre_dispatch: bool, reduction: str, loss: Loss | Member) -> None:
    gradient = gradient_of(loss, reduction)
    graph = make_fx(gradient, tracing_mode=tracing_mode, pre_dispatch=pre_dispatch)(*inputs(torch.float32, 0))
    check(graph, gradient, torch.float32)


@each(LOSSES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_torch_export(reduction: str, loss: Loss | Member) -> None:
    gradient = gradient_of(loss, reduction)

    program = torch.export.export(Model(gradient), inputs(torch.float32, 0), strict=False)
    check(program.module(), gradient, torch.float32)


@pytest.mark.parametrize("options", [{}, {"ignore_index": 1}], ids=str)
@pytest.mark.parametrize("record", ["jit.trace", "make_fx", "export"])
def test_blocks_of_the_linear_loss(record: str, options: dict[str, int]) -> None:
    # In float64, as float32 loses places in sums of so many labels.
    def loss(rows: Tensor, target: Tensor, reduction: str) -> Tensor:
        weight = torch.linspace(-1, 1, 3, dtype=rows.dtype).expand(2**21, 3)  # 48 MiB
        labels = (target[:, 0] * 6).long() - 2  # none for some rows
        function = bce_ext.functional.linear_binary_cross_entropy_with_logits
        return function(rows, weight, labels, reduction=reduction, **options)

    gradient = gradient_of(loss, "mean")
    given = inputs(torch.float64, 0)
    recorded: Callable[[Tensor, Tensor], Tensor]
    if record == "jit.trace":
        recorded = torch.jit.trace(gradient, given, check_trace=False)
    elif record == "make_fx":
        recorded = make_fx(gradient, pre_dispatch=True)(*given)
    else:
        recorded = torch.export.export(Model(gradient), given, strict=False).module()
    check(recorded, gradient, torch.float64)


@each([linear, *(loss for loss in LOSSES if loss is not differentiating_targets)])
def test_graphs_have_no_operations_in_place(loss: Loss | Member) -> None:
    """Programs of forward and backward may hold functional operations only."""

    def gradient(input: Tensor, target: Tensor) -> Tensor:
        result: Tensor = torch.func.grad(lambda leaf: loss(leaf, target))(input)
        return result

    graph = make_fx(gradient)(*inputs(torch.float32, 0)).graph
    operators = [node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert operators
    assert not [str(operator) for operator in operators if operator._schema.is_mutable]
