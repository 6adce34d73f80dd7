"""The losses as modules; two of them are drop-in for :class:`torch.nn.BCEWithLogitsLoss` and :class:`torch.nn.BCELoss`."""

import torch  # TorchScript reads the annotations of modules, so they are no strings here: no `from __future__ import annotations`
from torch import Tensor

from bce_ext import functional as F

__all__ = ["AsymmetricLoss", "BCELoss", "BCEWithLogitsLoss", "SigmoidFocalLoss"]


class _Options(torch.nn.Module):
    """What every loss of the package offers beyond native."""

    label_smoothing: float
    ignore_index: float | None
    normalizer: Tensor | None

    def _set_options(
        self, label_smoothing: float, ignore_index: float | None, normalizer: Tensor | float | None
    ) -> None:
        self.label_smoothing = float(label_smoothing)
        self.ignore_index = None if ignore_index is None else float(ignore_index)
        self.register_buffer("normalizer", _as_buffer(normalizer))

    def extra_repr(self) -> str:
        options = {"label_smoothing": self.label_smoothing or None, "ignore_index": self.ignore_index}
        return ", ".join(f"{name}={value:g}" for name, value in options.items() if value is not None)


class _Weighted(torch.nn.Module):
    """Buffers and reduction of a loss that torch does not have, as torch's own losses hold them."""

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self, weight: Tensor | float | None, pos_weight: Tensor | float | None, reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.register_buffer("weight", _as_buffer(weight))
        self.register_buffer("pos_weight", _as_buffer(pos_weight))


class BCEWithLogitsLoss(_Options, torch.nn.BCEWithLogitsLoss):
    r"""Binary cross entropy between logits and targets: :func:`bce_ext.functional.binary_cross_entropy_with_logits` as a module.

    A subclass of :class:`torch.nn.BCEWithLogitsLoss`: the same arguments, buffers (``weight``, ``pos_weight``), ``state_dict`` and ``repr``, and
    ``isinstance`` checks hold.

    Args:
        weight: rescales the loss of each element; broadcasts to the shape of the input. A tensor, or a number.
        size_average: deprecated, see ``reduction``.
        reduce: deprecated, see ``reduction``.
        reduction: ``'none'`` | ``'mean'`` | ``'sum'``.
        pos_weight: rescales the positive part; broadcasts to the shape of the input. A tensor, or a number.
        label_smoothing: pulls targets towards one half, see the function.
        ignore_index: elements whose target equals this number have no loss and no gradient, see the function.
        normalizer: what ``'mean'`` divides by, a 0-d tensor or a number. One that changes from call to call is passed to ``forward`` instead.

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
        *,
        label_smoothing: float = 0.0,
        ignore_index: float | None = None,
        normalizer: Tensor | float | None = None,
    ) -> None:
        super().__init__(_as_buffer(weight), size_average, reduce, reduction, _as_buffer(pos_weight))
        self._set_options(label_smoothing, ignore_index, normalizer)

    def forward(self, input: Tensor, target: Tensor, normalizer: Tensor | None = None) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            pos_weight=self.pos_weight,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            normalizer=self.normalizer if normalizer is None else normalizer,
        )


class BCELoss(_Options, torch.nn.BCELoss):
    r"""Binary cross entropy between probabilities and targets: :func:`bce_ext.functional.binary_cross_entropy` as a module.

    A subclass of :class:`torch.nn.BCELoss`: the same arguments, buffer (``weight``), ``state_dict`` and ``repr``, and ``isinstance`` checks hold.

    Args:
        weight: rescales the loss of each element; broadcasts to the shape of the input. A tensor, or a number.
        size_average: deprecated, see ``reduction``.
        reduce: deprecated, see ``reduction``.
        reduction: ``'none'`` | ``'mean'`` | ``'sum'``.
        label_smoothing: pulls targets towards one half, see the function.
        ignore_index: elements whose target equals this number have no loss and no gradient, see the function.
        normalizer: what ``'mean'`` divides by, a 0-d tensor or a number. One that changes from call to call is passed to ``forward`` instead.

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
        *,
        label_smoothing: float = 0.0,
        ignore_index: float | None = None,
        normalizer: Tensor | float | None = None,
    ) -> None:
        super().__init__(_as_buffer(weight), size_average, reduce, reduction)
        self._set_options(label_smoothing, ignore_index, normalizer)

    def forward(self, input: Tensor, target: Tensor, normalizer: Tensor | None = None) -> Tensor:
        return F.binary_cross_entropy(
            input,
            target,
            weight=self.weight,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            normalizer=self.normalizer if normalizer is None else normalizer,
        )


class SigmoidFocalLoss(_Options, _Weighted):
    r"""Focal loss of logits: :func:`bce_ext.functional.sigmoid_focal_loss` as a module.

    Args:
        alpha: the weight of the positive class, in :math:`[0, 1]`; -1 for none.
        gamma: the exponent of the focusing factor, at least 0.
        reduction: ``'none'`` | ``'mean'`` | ``'sum'``.
        weight: rescales the loss of each element; broadcasts to the shape of the input. A tensor, or a number.
        pos_weight: rescales the positive part; broadcasts to the shape of the input. A tensor, or a number.
        label_smoothing: pulls targets towards one half, see the function.
        ignore_index: elements whose target equals this number have no loss and no gradient, see the function.
        normalizer: what ``'mean'`` divides by, a 0-d tensor or a number. One that changes from call to call is passed to ``forward`` instead.

    Shape:
        Input and target: :math:`(*)`. Output: a scalar for ``'mean'`` and ``'sum'``, :math:`(*)` for ``'none'``.

    Example::

        >>> loss = bce_ext.SigmoidFocalLoss(gamma=1.5)
        >>> input = torch.randn(3, requires_grad=True)
        >>> target = torch.empty(3).random_(2)
        >>> loss(input, target).backward()
    """

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2.0,
        reduction: str = "mean",
        *,
        weight: Tensor | float | None = None,
        pos_weight: Tensor | float | None = None,
        label_smoothing: float = 0.0,
        ignore_index: float | None = None,
        normalizer: Tensor | float | None = None,
    ) -> None:
        super().__init__(weight, pos_weight, reduction)
        self._set_options(label_smoothing, ignore_index, normalizer)
        self.alpha, self.gamma = float(alpha), float(gamma)

    def forward(self, input: Tensor, target: Tensor, normalizer: Tensor | None = None) -> Tensor:
        return F.sigmoid_focal_loss(
            input,
            target,
            self.alpha,
            self.gamma,
            self.reduction,
            self.weight,
            self.pos_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            normalizer=self.normalizer if normalizer is None else normalizer,
        )

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [f"alpha={self.alpha:g}, gamma={self.gamma:g}", super().extra_repr()]))


class AsymmetricLoss(_Options, _Weighted):
    r"""Asymmetric loss of logits (ASL) for many labels: :func:`bce_ext.functional.asymmetric_loss` as a module.

    Args:
        gamma_neg: the exponent of the focusing factor of negatives, at least 0.
        gamma_pos: the exponent of the focusing factor of positives, at least 0.
        clip: the margin by which probabilities of negatives are shifted, in :math:`[0, 1)`.
        reduction: ``'none'`` | ``'mean'`` | ``'sum'``.
        weight: rescales the loss of each element; broadcasts to the shape of the input. A tensor, or a number.
        pos_weight: rescales the positive part; broadcasts to the shape of the input. A tensor, or a number.
        label_smoothing: pulls targets towards one half, see the function.
        ignore_index: elements whose target equals this number have no loss and no gradient, see the function.
        normalizer: what ``'mean'`` divides by, a 0-d tensor or a number. One that changes from call to call is passed to ``forward`` instead.
        detach_focusing: whether the focusing factor is taken for a constant in the gradients.
        eps: the smallest probability in a logarithm.

    Shape:
        Input and target: :math:`(*)`. Output: a scalar for ``'mean'`` and ``'sum'``, :math:`(*)` for ``'none'``.

    Example::

        >>> loss = bce_ext.AsymmetricLoss()
        >>> input = torch.randn(2, 3, requires_grad=True)
        >>> target = torch.empty(2, 3).random_(2)
        >>> loss(input, target).backward()
    """

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 1.0,
        clip: float = 0.05,
        reduction: str = "mean",
        *,
        weight: Tensor | float | None = None,
        pos_weight: Tensor | float | None = None,
        label_smoothing: float = 0.0,
        ignore_index: float | None = None,
        normalizer: Tensor | float | None = None,
        detach_focusing: bool = False,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(weight, pos_weight, reduction)
        self._set_options(label_smoothing, ignore_index, normalizer)
        self.gamma_neg, self.gamma_pos, self.clip = float(gamma_neg), float(gamma_pos), float(clip)
        self.detach_focusing, self.eps = detach_focusing, eps

    def forward(self, input: Tensor, target: Tensor, normalizer: Tensor | None = None) -> Tensor:
        return F.asymmetric_loss(
            input,
            target,
            self.gamma_neg,
            self.gamma_pos,
            self.clip,
            self.weight,
            self.pos_weight,
            self.reduction,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            normalizer=self.normalizer if normalizer is None else normalizer,
            detach_focusing=self.detach_focusing,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        numbers = f"gamma_neg={self.gamma_neg:g}, gamma_pos={self.gamma_pos:g}, clip={self.clip:g}"
        return ", ".join(filter(None, [numbers, super().extra_repr()]))


def _as_buffer(weight: Tensor | float | None) -> Tensor | None:
    """Numbers become 0-d tensors, which broadcast and go with any device."""
    return torch.tensor(weight, dtype=torch.get_default_dtype()) if isinstance(weight, (int, float)) else weight
