"""Sizes that depend on data, as those of input[mask], where a compiler knows which of them are equal but not whether one is 0 or 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import bce_ext
import bce_ext.functional as F

ROWS, FEATURES, LABELS = 10, 3, 5
WEIGHT = torch.linspace(0.5, 1.5, ROWS * FEATURES).view(ROWS, FEATURES)
OF_COLUMNS = torch.linspace(1, 2, FEATURES)
LAYER = torch.linspace(-1, 1, LABELS * FEATURES).view(LABELS, FEATURES)
INDICES = torch.arange(ROWS) % LABELS

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "plain": lambda x, y, m: F.binary_cross_entropy_with_logits(x[m], y[m]),
    "none": lambda x, y, m: F.binary_cross_entropy_with_logits(x[m], y[m], reduction="none").square().mean(),
    "flattened": lambda x, y, m: F.binary_cross_entropy_with_logits(x[m].flatten(), y[m].flatten()),
    "weight": lambda x, y, m: F.binary_cross_entropy_with_logits(x[m], y[m], weight=WEIGHT[m]),
    "weights of columns": lambda x, y, m: F.binary_cross_entropy_with_logits(x[m], y[m], OF_COLUMNS, pos_weight=OF_COLUMNS),
    "ignored": lambda x, y, m: F.binary_cross_entropy_with_logits(x[m], y[m], ignore_index=1),
    "probabilities": lambda x, y, m: F.binary_cross_entropy(x[m].sigmoid(), y[m]),
    "focal": lambda x, y, m: F.sigmoid_focal_loss(x[m], y[m], reduction="mean"),
    "asymmetric": lambda x, y, m: F.asymmetric_loss(x[m], y[m]),
    "linear": lambda x, y, m: F.linear_binary_cross_entropy_with_logits(x[m], LAYER, y[m] @ LAYER.T.sigmoid()),
    "linear, class indices": lambda x, y, m: F.linear_binary_cross_entropy_with_logits(x[m], LAYER, INDICES[m]),
    "torch's own": lambda x, y, m: torch.nn.functional.binary_cross_entropy_with_logits(x[m], y[m]),
}  # fmt: skip
every_loss = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture(autouse=True)
def _fused() -> Iterator[None]:
    torch._dynamo.reset()
    with bce_ext.fused(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    target = torch.randint(0, 2, (ROWS, FEATURES)).float()
    return torch.randn(ROWS, FEATURES), target, torch.arange(ROWS) % 3 > 0


class Module(torch.nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, input: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return self.loss(input, target, mask)


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
@every_loss
def test_export(name: str, strict: bool) -> None:
    program = torch.export.export(Module(LOSSES[name]), tensors(), strict=strict).module()
    for mask in (tensors()[2], torch.arange(ROWS) == 1, torch.ones(ROWS, dtype=torch.bool)):
        arguments = (*tensors()[:2], mask)
        torch.testing.assert_close(program(*arguments), LOSSES[name](*arguments))


@every_loss
def test_one_graph(name: str) -> None:
    results = []
    for loss in (LOSSES[name], torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")):
        input, target, mask = tensors()
        value = loss(input.requires_grad_(), target, mask)
        results.append((value.detach(), *torch.autograd.grad(value, input)))
    torch.testing.assert_close(results[0], results[1])
