"""The way from a public function to its operator, the same for every loss."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.jit import is_scripting  # type: ignore[attr-defined]
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function

from bce_ext import _C

__all__ = ["Loss", "as_tensor", "call", "reduction_number"]

Option = float | None


class Loss(NamedTuple):
    """A loss: the function that a ``__torch_function__`` is told of, its operator, and the options of both."""

    name: str
    function: Callable[..., Tensor]
    operator: Callable[..., Tensor]
    formula: int  # its number in csrc/problem.h
    options: dict[str, Option]  # with their defaults, in the order of the internal operators
    option_names: tuple[str, ...]

    @classmethod
    def of(cls, function: Callable[..., Tensor], formula: int, **parameters: Option) -> Loss:
        name = function.__name__
        options = {"label_smoothing": 0.0, "ignore_index": None, **parameters}
        return cls(name, function, getattr(torch.ops.bce_ext, name), formula, options, tuple(options))


def call(
    loss: Loss,
    operands: tuple[Any, ...],
    options: tuple[Option, ...],
    reduction: str,
    size_average: bool | None = None,
    reduce: bool | None = None,
) -> Tensor:
    """What every loss does outside of TorchScript.

    The operands are input, target, weight, pos_weight and normalizer, the options those of ``loss.options``, or none of them.
    """
    if has_torch_function(operands):
        deprecated = {"size_average": size_average, "reduce": reduce}
        keywords = _given(loss, operands, options) | {
            name: value for name, value in deprecated.items() if value is not None
        }
        return handle_torch_function(loss.function, operands, *operands[:2], reduction=reduction, **keywords)
    # Small losses are bound by what a call costs: what is usual goes first.
    is_usual = reduction == "mean" and size_average is None and reduce is None
    number = 1 if is_usual else reduction_number(reduction, size_average, reduce)
    if not is_dynamo_compiling():
        result = _C.bce(loss.name, loss.formula, operands, options, loss.option_names, number)
        if result is not NotImplemented:
            return result  # type: ignore[no-any-return]
    # Compilers and tracers see public operators only.
    tensors = (*operands[:2], *map(as_tensor, operands[2:]))
    return loss.operator(*operands[:2], reduction=number, **_given(loss, tensors, options))


def reduction_number(reduction: str, size_average: bool | None = None, reduce: bool | None = None) -> int:
    if size_average is not None or reduce is not None:
        return _legacy_number(size_average, reduce)
    return _Reduction.get_enum(reduction)


def _legacy_number(size_average: bool | None, reduce: bool | None) -> int:
    if is_dynamo_compiling():  # which does not see through torch's own function
        if reduce is not None and not reduce:
            return 0
        return 2 if size_average is not None and not size_average else 1
    return _Reduction.legacy_get_enum(size_average, reduce)


def _given(loss: Loss, operands: tuple[Any, ...], options: tuple[Option, ...]) -> dict[str, Any]:
    """The keyword arguments that are not at their defaults."""
    by_name = zip(("weight", "pos_weight", "normalizer"), operands[2:], strict=True)
    keywords = {name: operand for name, operand in by_name if operand is not None}
    return keywords | {name: value for name, value in zip(loss.options, options) if value != loss.options[name]}  # noqa: B905


def as_tensor(weight: Tensor | float | None) -> Tensor | None:
    """A number becomes a 0-d tensor on the CPU, which broadcasts and goes with any device."""
    if isinstance(weight, (int, float)):
        return torch.scalar_tensor(float(weight), dtype=torch.float64, device="cpu")
    if not is_scripting():
        if isinstance(weight, Real):  # of NumPy, among others
            return torch.scalar_tensor(float(weight), dtype=torch.float64, device="cpu")
        if isinstance(weight, (torch.SymInt, torch.SymFloat)):
            return torch.scalar_tensor(weight, dtype=torch.float64, device="cpu")
    return weight
