"""What the programs of the cases use beside torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .schemas import scripted

__all__ = [
    "FakeTensorMode",
    "first",
    "forward_ad",
    "own_saved",
    "requiring_grad",
    "requiring_grad_of",
    "scripted",
]


def tensors_of(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in tensors_of(part)] if isinstance(result, (tuple, list)) else []


def first(result: object) -> Tensor:
    return tensors_of(result)[0]


def requiring_grad_of(result: object) -> list[Tensor]:
    return [t for t in tensors_of(result) if t.requires_grad]


def requiring_grad(variables: dict[str, Any], names: Iterable[str]) -> list[Tensor]:
    return requiring_grad_of([variables.get(name) for name in names])


def own_saved(outputs: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Tensors that may be spoiled before backward: those that no node of ATen's will read, which would crash by itself."""
    aten = re.compile(r"Backward\d+$")  # ATen numbers its nodes: MulBackward0
    if is_in_torch_dispatch_mode() or any(aten.search(x.grad_fn.name()) for x in outputs if x.grad_fn):
        return []
    return [x for x in tensors if x.is_leaf]
