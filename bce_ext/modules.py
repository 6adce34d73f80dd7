"""The losses as modules: drop-in for :class:`torch.nn.BCEWithLogitsLoss` and :class:`torch.nn.BCELoss`."""

from __future__ import annotations

import torch
from torch import Tensor

from bce_ext import functional as F

__all__ = ["BCELoss", "BCEWithLogitsLoss"]


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    r"""Binary cross entropy between logits and targets: :func:`bce_ext.functional.binary_cross_entropy_with_logits` as a module.

    A subclass of :class:`torch.nn.BCEWithLogitsLoss`: the same arguments, buffers (``weight``, ``pos_weight``), ``state_dict`` and ``repr``, and
    ``isinstance`` checks hold.

    Args:
        weight: rescales the loss of each element; broadcasts to the shape of the input. A tensor, or a number.
        size_average: deprecated, see ``reduction``.
        reduce: deprecated, see ``reduction``.
        reduction: ``'none'`` | ``'mean'`` | ``'sum'``.
        pos_weight: rescales the positive part; broadcasts to the shape of the input. A tensor, or a number.

    Shape:
        Input and target: :math:`(*)`. Output: a scalar for ``'mean'`` and ``'sum'``, :math:`(*)` for ``'none'``.

    Example::

        >>> loss = bce_ext.BCEWithLogitsLoss()
        >>> input = torch.randn(3, requires_grad=True)
        >>> target = torch.empty(3).random_(2)
        >>> loss(input, target).backward()
    """

    def __init__(
        self,
        weight: Tensor | float | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | float | None = None,
    ) -> None:
        super().__init__(_as_buffer(weight), size_average, reduce, reduction, _as_buffer(pos_weight))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


class BCELoss(torch.nn.BCELoss):
    r"""Binary cross entropy between probabilities and targets: :func:`bce_ext.functional.binary_cross_entropy` as a module.

    A subclass of :class:`torch.nn.BCELoss`: the same arguments, buffer (``weight``), ``state_dict`` and ``repr``, and ``isinstance`` checks hold.

    Args:
        weight: rescales the loss of each element; broadcasts to the shape of the input. A tensor, or a number.
        size_average: deprecated, see ``reduction``.
        reduce: deprecated, see ``reduction``.
        reduction: ``'none'`` | ``'mean'`` | ``'sum'``.

    Shape:
        Input and target: :math:`(*)`. Output: a scalar for ``'mean'`` and ``'sum'``, :math:`(*)` for ``'none'``.

    Example::

        >>> loss = bce_ext.BCELoss()
        >>> input = torch.rand(3, requires_grad=True)
        >>> target = torch.empty(3).random_(2)
        >>> loss(input, target).backward()
    """

    def __init__(
        self,
        weight: Tensor | float | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(_as_buffer(weight), size_average, reduce, reduction)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy(input, target, weight=self.weight, reduction=self.reduction)


def _as_buffer(weight: Tensor | float | None) -> Tensor | None:
    """Numbers become 0-d tensors, which broadcast and go with any device."""
    return torch.tensor(weight, dtype=torch.get_default_dtype()) if isinstance(weight, (int, float)) else weight
