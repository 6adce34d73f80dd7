"""The layer of LinearBCEWithLogitsLoss: where a call of it is more than the product of its parameters, the loss is that of its logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from linear_cases import KINDS, make_case, plain
from torch import Tensor
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import bce_ext

ROWS, FEATURES, LABELS = 5, 3, 7

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")


class Adapter(torch.nn.Module):
    """Of low rank, around a layer whose parameters it passes on, as the adapters of other libraries do."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Parameter(torch.randn(2, FEATURES, dtype=torch.float64))
        self.up = torch.nn.Parameter(torch.randn(LABELS, 2, dtype=torch.float64))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + input @ self.down.T @ self.up.T  # type: ignore[no-any-return]


class Doubling(torch.nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def with_adapter(loss: bce_ext.LinearBCEWithLogitsLoss) -> None:
    loss.linear = Adapter(loss.linear)  # type: ignore[assignment]


def with_subclass(loss: bce_ext.LinearBCEWithLogitsLoss) -> None:
    loss.linear = Doubling(FEATURES, LABELS, dtype=torch.float64)


def with_forward_of_its_own(loss: bce_ext.LinearBCEWithLogitsLoss) -> None:
    forward = loss.linear.forward
    loss.linear.forward = lambda input: 2 * forward(input)  # type: ignore[method-assign]


def with_spectral_norm(loss: bce_ext.LinearBCEWithLogitsLoss) -> None:
    torch.nn.utils.spectral_norm(loss.linear)
    loss.linear.eval()  # in training, each call takes a step of the power iteration


CHANGES: dict[str, Callable[[bce_ext.LinearBCEWithLogitsLoss], object]] = {
    "adapter": with_adapter,
    "subclass": with_subclass,
    "forward of its own": with_forward_of_its_own,
    "spectral_norm": with_spectral_norm,
    "pruned": lambda loss: prune.l1_unstructured(loss.linear, "weight", 0.3),
    "forward hook": lambda loss: loss.linear.register_forward_hook(lambda module, inputs, output: 2 * output),
    "forward pre-hook": lambda loss: loss.linear.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    "backward hook": lambda loss: loss.linear.register_full_backward_hook(
        lambda module, grad_inputs, grad_outputs: (2 * grad_inputs[0],)
    ),
    "parametrization": lambda loss: torch.nn.utils.parametrizations.weight_norm(loss.linear),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_call_of_the_layer_does_is_in_the_loss(change: str, kind: str) -> None:
    torch.manual_seed(0)
    case = make_case(ROWS, FEATURES, LABELS, kind)
    pos_weight = torch.linspace(1, 2, LABELS, dtype=torch.float64)
    loss = bce_ext.LinearBCEWithLogitsLoss(
        FEATURES, LABELS, pos_weight=pos_weight, label_smoothing=0.1, dtype=torch.float64
    )
    CHANGES[change](loss)
    dense = case.dense.double() * 0.9 + 0.05
    for _ in range(2):  # what is computed anew in each call must be
        gradients = []
        for compute in (
            lambda input: loss(input, case.target),
            lambda input: torch.nn.functional.binary_cross_entropy_with_logits(
                loss.linear(input), dense, pos_weight=pos_weight
            ),
        ):
            leaves = [case.input.clone().requires_grad_(), *loss.parameters()]
            value = compute(leaves[0])
            gradients.append((value.detach(), *torch.autograd.grad(value, leaves)))
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_the_layer_alone_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(ROWS, FEATURES, LABELS)
    loss = bce_ext.LinearBCEWithLogitsLoss(FEATURES, LABELS, dtype=torch.float64)
    called: list[object] = []
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda self, *arguments: called.append(self))
    value = loss.forward(case.input, case.target)
    assert not called
    torch.testing.assert_close(value, plain([case.input, loss.linear.weight, loss.linear.bias], case.dense))


@pytest.mark.parametrize("change", ["none", "forward hook"])
def test_wrong_class_indices_raise_either_way(change: str) -> None:
    input, good = torch.randn(2, FEATURES), torch.tensor([0, -1])
    for target, error, text, options in (
        (torch.tensor([0, LABELS]), IndexError, f"but one is {LABELS}", {}),
        (torch.tensor([0, 2**63 + 5], dtype=torch.uint64), IndexError, f"but one is {2**63 + 5}", {}),
        (torch.tensor([0.0, 1.0]), ValueError, "size", {}),
        (torch.tensor([True, False]), ValueError, "size", {}),
        (good, ValueError, "ignore_index of 0 or 1", {"ignore_index": -100}),
    ):
        loss = bce_ext.LinearBCEWithLogitsLoss(FEATURES, LABELS, **options)
        CHANGES.get(change, lambda loss: None)(loss)
        with pytest.raises(error, match=text):
            loss(input, target)


@pytest.mark.parametrize("change", ["none", "forward hook"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_labels_at_all(change: str, reduction: str) -> None:
    loss = bce_ext.LinearBCEWithLogitsLoss(FEATURES, 0, reduction=reduction)
    CHANGES.get(change, lambda loss: None)(loss)
    input, target = torch.randn(2, FEATURES), torch.tensor([-1, -1])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        loss.linear(input), torch.zeros(2, 0), reduction=reduction
    )
    for mode in (nullcontext(), FlopCounterMode(display=False)):  # in a mode, values are not read
        with mode:
            torch.testing.assert_close(loss(input, target), expected, equal_nan=True)
    torch.testing.assert_close(torch.vmap(lambda x, y: loss(x[None], y[None]))(input, target).shape[0], 2)


def test_hooks_of_all_modules_are_in_the_loss() -> None:
    case = make_case(ROWS, FEATURES, LABELS)
    loss = bce_ext.LinearBCEWithLogitsLoss(FEATURES, LABELS, dtype=torch.float64)
    is_layer = lambda module: isinstance(module, torch.nn.Linear)  # noqa: E731
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: 2 * output if is_layer(module) else None
    )
    try:
        value = loss(case.input, case.target)
    finally:
        hook.remove()
    logits = 2 * loss.linear(case.input)
    torch.testing.assert_close(value, torch.nn.functional.binary_cross_entropy_with_logits(logits, case.dense))


# A weight of 32 MiB, of which there are blocks of labels; and a small one.
@pytest.mark.parametrize("labels", [LABELS, 2**17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"ignore_index": 1}, {"normalizer": 0.0}, {"normalizer": 2.0}], ids=str)
@pytest.mark.parametrize("kind", ["dense", "class indices"])
def test_no_rows_at_all(kind: str, options: dict[str, float], dtype: torch.dtype, labels: int) -> None:
    features = 2**25 // (labels * dtype.itemsize) if labels > LABELS else FEATURES
    input, weight = torch.zeros(0, features, dtype=dtype), torch.zeros(labels, features, dtype=dtype)
    target = torch.zeros(0, dtype=torch.int64) if kind == "class indices" else torch.zeros(0, labels)
    for requires_grad in (False, True):
        weight.requires_grad_(requires_grad)
        loss = bce_ext.functional.linear_binary_cross_entropy_with_logits
        mean = loss(input, weight, target, **options)
        assert mean.item() == 0.0 if options == {"normalizer": 2.0} else mean.isnan()
        assert "normalizer" in options or loss(input, weight, target, reduction="sum", **options).item() == 0.0
        if requires_grad:
            mean.backward()
            assert weight.grad is not None
            assert not weight.grad.any()
