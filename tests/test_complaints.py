"""Complaints about the native loss that have been open for years: each test names the issue of pytorch/pytorch that it answers."""

from __future__ import annotations

import math

import pytest
import reference
import torch
import torch.nn.functional as F

import bce_ext

fused = bce_ext.functional


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64], ids=str)
def test_issue_842_integer_and_bool_targets(dtype: torch.dtype, device: str) -> None:
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    labels = torch.rand(4, 5, device=device) > 0.5
    expected = torch.autograd.grad(F.binary_cross_entropy_with_logits(logits, labels.float()), logits)
    loss = bce_ext.BCEWithLogitsLoss()(logits, labels.to(dtype))
    torch.testing.assert_close(torch.autograd.grad(loss, logits), expected)
    torch.testing.assert_close(
        bce_ext.BCELoss()(logits.sigmoid(), labels.to(dtype)), F.binary_cross_entropy(logits.sigmoid(), labels.float())
    )


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
@pytest.mark.parametrize("dtype", reference.FLOATING_DTYPES, ids=str)
@pytest.mark.parametrize("issue", [49844, 102894, 135359])
def test_issues_49844_102894_135359_infinite_logits(
    issue: int, dtype: torch.dtype, reduction: str, device: str
) -> None:
    """The limits: no loss for a certain and right answer, an infinite one for a wrong answer, slopes of 0 and 1; never NaN."""
    infinity = math.inf
    logits, labels, losses, slopes = {
        49844: ([-infinity, infinity], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]),  # masked logits that are right
        102894: ([-infinity, infinity], [1.0, 0.0], [infinity, infinity], [-1.0, 1.0]),  # and wrong
        135359: ([-infinity, 0.0], [0.0, 1.0], [0.0, math.log(2)], [0.0, -0.5]),  # beside finite ones
    }[issue]
    input = torch.tensor(logits, dtype=dtype, device=device, requires_grad=True)
    target = torch.tensor(labels, dtype=dtype, device=device)
    loss = fused.binary_cross_entropy_with_logits(input, target, reduction=reduction)
    expected = torch.tensor(losses, dtype=torch.float64, device=device)
    divisor = 2 if reduction == "mean" else 1
    expected = expected if reduction == "none" else expected.sum() / divisor
    torch.testing.assert_close(loss, expected.to(dtype))
    loss.backward(torch.ones_like(loss))
    torch.testing.assert_close(input.grad, torch.tensor(slopes, dtype=dtype, device=device) / divisor)


@pytest.mark.parametrize("logit", [20.0, 50.0, 88.0, 100.0])
def test_issue_195677_gradients_in_the_tails(logit: float, device: str) -> None:
    """Native's float32 gradient is 0 from 17 on, where sigmoid(x) rounds to 1."""
    for sign in (1.0, -1.0):
        input = torch.tensor(sign * logit, device=device, requires_grad=True)
        target = torch.tensor(1.0 if sign > 0 else 0.0, device=device)
        loss = fused.binary_cross_entropy_with_logits(input, target)
        loss.backward()
        truth = math.exp(-logit) / (1 + math.exp(-logit))
        smallest = 2.0**-149
        assert input.grad is not None
        assert input.grad.item() == pytest.approx(-sign * truth, rel=1e-6, abs=smallest)
        assert loss.item() == pytest.approx(math.log1p(math.exp(-logit)), rel=1e-6, abs=smallest)
        assert input.grad.item() != 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_issue_61098_probabilities_under_autocast(dtype: torch.dtype, device: str) -> None:
    """Native refuses on CUDA: "unsafe to autocast"."""
    layer = torch.nn.Linear(8, 8, device=device)
    with torch.autocast(device, dtype):
        loss = bce_ext.BCELoss()(layer(torch.randn(4, 8, device=device)).sigmoid(), torch.rand(4, 8, device=device))
    assert loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["binary_cross_entropy_with_logits", "binary_cross_entropy"])
def test_issue_193757_eager_and_compiled_validate_alike(name: str, device: str) -> None:
    torch._dynamo.reset()
    function = getattr(fused, name)
    input, target = torch.rand(4, 5, device=device), torch.rand(4, 6, device=device)
    with pytest.raises(ValueError, match=r"same as input size|different to the input size") as eager:
        function(input, target)
    with pytest.raises(Exception) as compiled:  # noqa: PT011 -- Dynamo wraps it in an exception of its own
        torch.compile(function, fullgraph=True, backend="aot_eager")(input, target)
    assert str(eager.value).splitlines()[0] in str(compiled.value)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_issue_193757_probabilities_out_of_range_when_compiled(backend: str) -> None:
    """An error in eager mode; natively a NaN from inductor. On the CPU: CUDA asserts on the device, in both."""
    torch._dynamo.reset()
    compiled = torch.compile(fused.binary_cross_entropy, fullgraph=True, backend=backend)
    for input in (torch.tensor([0.5, 1.5]), torch.tensor([-0.5, 0.5])):
        for function in (fused.binary_cross_entropy, compiled):
            with pytest.raises(RuntimeError, match="between 0 and 1"):
                function(input, torch.zeros(2))


@pytest.mark.parametrize(
    "pos_weight", [3, 3.0, torch.tensor(3.0), torch.tensor([3.0])], ids=["int", "float", "0d", "1d"]
)
@pytest.mark.parametrize("issue", [27936, 65702])
def test_issues_27936_65702_scalar_pos_weight(issue: int, pos_weight: float | torch.Tensor, device: str) -> None:
    """A number, or a tensor with one element, for any shape of the logits."""
    shape = (4, 5) if issue == 27936 else (2, 3, 4, 5)
    logits, target = torch.randn(shape, device=device), torch.rand(shape, device=device)
    expected = F.binary_cross_entropy_with_logits(logits, target, pos_weight=torch.full(shape[-1:], 3.0, device=device))
    if isinstance(pos_weight, torch.Tensor):
        pos_weight = pos_weight.to(device)
    torch.testing.assert_close(fused.binary_cross_entropy_with_logits(logits, target, pos_weight=pos_weight), expected)
    module = bce_ext.BCEWithLogitsLoss(pos_weight=pos_weight).to(device)  # type: ignore[arg-type]
    torch.testing.assert_close(module(logits, target), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_issue_40679_bce_loss_scripted_and_traced_with_weight(how: str, device: str) -> None:
    weight = torch.rand(5, device=device)
    module = bce_ext.BCELoss(weight=weight).to(device)
    input, target = torch.rand(4, 5, device=device), torch.rand(4, 5, device=device)
    program = torch.jit.script(module) if how == "script" else torch.jit.trace(module, (input, target))
    for rows in (4, 7):
        input, target = torch.rand(rows, 5, device=device), torch.rand(rows, 5, device=device)
        torch.testing.assert_close(program(input, target), F.binary_cross_entropy(input, target, weight))


def test_issue_190139_more_than_two_to_the_31_elements(device: str) -> None:
    rows, classes = 2**20 + 1, 2**11
    logits = torch.linspace(-3, 3, classes, device=device)
    target = torch.ones(1, dtype=torch.bool, device=device)
    with torch.no_grad():
        loss = fused.binary_cross_entropy_with_logits(logits.expand(rows, classes), target.expand(rows, classes))
        expected = F.softplus(-logits.double()).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["binary_cross_entropy_with_logits", "binary_cross_entropy"])
def test_issue_1939_column_against_row_says_what_to_do(name: str, device: str) -> None:
    column, row = torch.rand(7, 1, device=device), torch.rand(7, device=device)
    function = getattr(fused, name)
    with pytest.raises(ValueError, match=r"use target\.unsqueeze\(dim\) or input\.squeeze\(dim\)"):
        function(column, row)
    with pytest.raises(ValueError, match=r"use target\.squeeze\(dim\) or input\.unsqueeze\(dim\)"):
        function(row, column)
    function(column, row.unsqueeze(1))
    function(column.squeeze(1), row)
