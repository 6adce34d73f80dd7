"""The way from a public function to its operator, the same for every loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function

from bce_ext import _C

__all__ = ["Loss", "call", "reduction_number"]


class Loss(NamedTuple):
    """The function that a ``__torch_function__`` is told of, the operator, a short way to it, and what both call their operands behind input and target."""

    function: Callable[..., Tensor]
    operator: Callable[..., Tensor]
    short_way: Callable[..., Tensor]
    names: tuple[str, ...]

    @classmethod
    def of(cls, function: Callable[..., Tensor], *names: str) -> Loss:
        name = function.__name__
        return cls(function, getattr(torch.ops.bce_ext, name), getattr(_C, name), names)


def call(
    loss: Loss, operands: tuple[Any, ...], reduction: str, size_average: bool | None = None, reduce: bool | None = None
) -> Tensor:
    """What every loss does outside of TorchScript. The operands are input, target and what ``loss.names`` has names for."""
    if has_torch_function(operands):
        input, target, *rest = operands
        options = dict(zip(loss.names, rest, strict=True), reduction=reduction)
        deprecated = {"size_average": size_average, "reduce": reduce}
        options.update({name: value for name, value in deprecated.items() if value is not None})
        return handle_torch_function(loss.function, operands, input, target, **options)
    number = reduction_number(reduction, size_average, reduce)
    if is_dynamo_compiling():  # which sees operators only
        return loss.operator(*operands[:2], *map(_as_tensor, operands[2:]), number)
    return loss.short_way(*operands, number)


def reduction_number(reduction: str, size_average: bool | None = None, reduce: bool | None = None) -> int:
    if size_average is not None or reduce is not None:
        return _Reduction.legacy_get_enum(size_average, reduce)
    return _Reduction.get_enum(reduction)


def _as_tensor(weight: Tensor | float | None) -> Tensor | None:
    """A number becomes a 0-d tensor on the CPU, which broadcasts and goes with any device."""
    if isinstance(weight, (int, float)):
        return torch.scalar_tensor(weight, dtype=torch.float64, device="cpu")
    return weight
