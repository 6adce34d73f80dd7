"""The loss as a :class:`torch.autograd.Function`."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BCEWithLogitsFunction"]


class _Transparent(type(torch.autograd.Function)):  # type: ignore[misc]
    """torch.compile looks into ``apply`` of these, as into any function. Of those that have torch's metaclass itself it takes ``forward`` and ``backward``."""


class BCEWithLogitsFunction(torch.autograd.Function, metaclass=_Transparent):
    """Binary cross entropy with logits for code that expects a :class:`torch.autograd.Function`, to call its ``apply``.

    ``apply(input, target, weight=None, pos_weight=None, reduction=1)`` is the operator ``torch.ops.bce_ext.binary_cross_entropy_with_logits`` itself, with
    ATen's numbers for the reduction: 0 none, 1 mean, 2 sum. The operator has the derivatives, so there is no ``forward`` and no ``backward`` here.
    :func:`bce_ext.functional.binary_cross_entropy_with_logits` states the maths.

    Example::

        >>> input = torch.zeros(3, requires_grad=True)
        >>> BCEWithLogitsFunction.apply(input, torch.ones(3), reduction=2).backward()
        >>> input.grad
        tensor([-0.5000, -0.5000, -0.5000])
    """

    @classmethod
    def apply(
        cls,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        reduction: int = 1,
    ) -> Tensor:
        return torch.ops.bce_ext.binary_cross_entropy_with_logits(input, target, weight, pos_weight, reduction)  # type: ignore[no-any-return]
