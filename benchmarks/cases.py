"""What is measured: a case, its inputs, and the calls that each implementation makes on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from timing import Candidate, repeat, repeat_prepared
from torch import Tensor

import bce_ext

IMPLEMENTATIONS = ("native", "compile", "ours")


@dataclass(frozen=True)
class Case:
    """One cell of the benchmark grid. The fields are the columns of the CSV files."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    target: str = "same"  # same: the dtype of the input | bool | int64
    reduction: str = "mean"
    weights: str = "none"  # none | weight | weight[N,1] | pos_weight | pos_weight[C] | pos_weight[C,1,1]
    layout: str = "contiguous"  # contiguous | channels_last | transposed | mixed: the input alone | sliced
    loss: str = "logits"  # logits: BCEWithLogitsLoss | probabilities: BCELoss
    mode: str = "full"  # forward, recorded by autograd | inference: forward under no_grad | backward | full: both
    threads: int = 1
    device: str = "cpu"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype.itemsize

    def bytes_moved(self, name: str) -> int:
        """What one pass has to read and write: with the gradient made in forward, unless the reduction is none."""
        tensor = self.numel * self.itemsize
        if name in ("copy", "add"):
            return {"copy": 2, "add": 3}[name] * tensor
        weight_numel = {
            "none": 0,
            "weight": self.numel,
            "weight[N,1]": self.shape[0] if self.shape else 0,
            "pos_weight": 1,
            "pos_weight[C]": self.shape[-1],
            "pos_weight[C,1,1]": self.shape[-3] if len(self.shape) > 2 else 0,
        }
        read = tensor + self.numel * {"same": self.itemsize, "bool": 1, "int64": 8}[self.target]
        read += weight_numel[self.weights] * self.itemsize
        if self.reduction == "none":
            forward, backward = read + tensor, read + 2 * tensor  # the loss; grad_output and the gradient
            return {"backward": backward, "full": forward + backward}.get(self.mode, forward)
        return {"inference": read, "backward": 0}.get(self.mode, read + tensor)


class Inputs:
    """The tensors of a case, always the same values."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        dtype = getattr(torch, case.dtype)
        to_input = partial(torch.Tensor.to, device=case.device, dtype=dtype)

        input = torch.randn(case.shape) if case.loss == "logits" else torch.rand(case.shape).clamp(0.01, 0.99)
        self.input = _lay_out(to_input(input), case.layout).requires_grad_(case.mode != "inference")
        target = torch.rand(case.shape)
        if case.target == "same":
            target = to_input(target)
        else:
            target = (target < 0.5).to(case.device, getattr(torch, case.target))
        self.target = target if case.layout == "mixed" else _lay_out(target, case.layout)
        self.grad_output = to_input(torch.rand(case.shape)) if case.reduction == "none" else None

        self.weights: dict[str, Tensor] = {}
        match case.weights:
            case "weight":
                self.weights["weight"] = _lay_out(to_input(torch.rand(case.shape)), case.layout)
            case "weight[N,1]":
                self.weights["weight"] = to_input(torch.rand(case.shape[0], 1))
            case "pos_weight":
                self.weights["pos_weight"] = to_input(torch.tensor(1.5))
            case "pos_weight[C]":
                self.weights["pos_weight"] = to_input(1 + torch.rand(case.shape[-1]))
            case "pos_weight[C,1,1]":
                self.weights["pos_weight"] = to_input(1 + torch.rand(case.shape[-3], 1, 1))


def _lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values, stored in another order."""
    match layout:
        case "channels_last":
            return values.contiguous(memory_format=torch.channels_last)
        case "mixed" if values.dim() == 4:
            return values.contiguous(memory_format=torch.channels_last)
        case "transposed" | "mixed":
            return values.mT.contiguous().mT
        case "sliced":
            return torch.cat([values, values], dim=-1)[..., : values.shape[-1]]
    return values


def loss_function(case: Case, implementation: str) -> Callable[..., Tensor]:
    name = "binary_cross_entropy" if case.loss == "probabilities" else "binary_cross_entropy_with_logits"
    function: Callable[..., Tensor] = getattr(bce_ext.functional if implementation == "ours" else F, name)
    native = function
    if implementation != "ours" and case.target != "same":

        def function(input: Tensor, target: Tensor, **options: object) -> Tensor:
            return native(input, target.to(input.dtype), **options)

    if implementation == "compile":
        torch._dynamo.reset()  # a graph of its own for each case, and no limit on their number
        function = torch.compile(function, fullgraph=True, dynamic=False)
    return function


def loss_steps(
    case: Case, inputs: Inputs, function: Callable[..., Tensor]
) -> tuple[Callable[[], Tensor], Callable[[Tensor], None], Callable[[], None]]:
    """The forward call, the backward call on its result, and one followed by the other."""
    # A leaf of its own for each implementation, on the same memory: nobody pays for freeing the gradient of another.
    input = inputs.input.detach().requires_grad_(inputs.input.requires_grad)
    target, grad_output = inputs.target, inputs.grad_output
    loss = partial(function, reduction=case.reduction, **inputs.weights)

    def forward() -> Tensor:
        return loss(input, target)

    def backward(loss: Tensor) -> None:
        input.grad = None
        loss.backward(grad_output)

    def full() -> None:
        input.grad = None
        loss(input, target).backward(grad_output)

    return forward, backward, full


def candidate(case: Case, inputs: Inputs, function: Callable[..., Tensor]) -> Candidate:
    forward, backward, full = loss_steps(case, inputs, function)

    match case.mode:
        case "full":
            return repeat(full, case.device)
        case "backward":
            return repeat_prepared(forward, backward, case.device)
        case "inference":
            return torch.no_grad()(repeat(forward, case.device))
    return repeat(forward, case.device)


def reference(case: Case, inputs: Inputs, name: str) -> Candidate:
    """What the losses are held against: plain passes over memory in place, the cheapest trip through autograd."""
    input, target = inputs.input.detach(), inputs.target
    output = torch.empty_like(input)

    def add() -> None:
        torch.add(input, target, out=output)

    def copy() -> None:
        output.copy_(input)

    leaf = input.detach().requires_grad_(inputs.input.requires_grad)

    def sum_backward() -> None:
        leaf.grad = None
        leaf.sum().backward()

    return repeat({"add": add, "copy": copy, "sum": sum_backward}[name], case.device)


def candidates(case: Case, names: tuple[str, ...]) -> dict[str, Candidate]:
    """Every named implementation and reference, on the same inputs."""
    inputs = Inputs(case)

    def make(name: str) -> Candidate:
        if name in IMPLEMENTATIONS:
            return candidate(case, inputs, loss_function(case, name))
        return reference(case, inputs, name)

    return {name: make(name) for name in names}
