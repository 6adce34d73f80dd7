"""The losses as functions: names, arguments and defaults are those of :mod:`torch.nn.functional`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from bce_ext import _C
from bce_ext.linear import linear_binary_cross_entropy_with_logits, siglip_loss

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "linear_binary_cross_entropy_with_logits",
    "siglip_loss",
]


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Binary cross entropy between logits and targets, its gradient computed in the same pass.

    With logit :math:`x`, target :math:`y`, weight :math:`w` and positive weight :math:`p`, an element contributes

    .. math::
        \ell(x, y) = w \left[ (1 - y) \operatorname{softplus}(x) + p\, y \operatorname{softplus}(-x) \right], \qquad
        \frac{\partial \ell}{\partial x} = w \left[ (1 - y)\, \sigma(x) - p\, y\, \sigma(-x) \right],

    where :math:`\operatorname{softplus}(x) = \log(1 + e^x)`. Elements are reduced by ``'mean'``, by ``'sum'`` or not at all.

    Args:
        input: logits of any shape, float64, float32, bfloat16 or float16.
        target: the same shape, any real dtype: bool, integer or floating. Usually in :math:`[0, 1]`, which is not required.
        weight: rescales the loss of each element; broadcasts to the shape of ``input``. A tensor of any real dtype, or a number.
        size_average: deprecated, see ``reduction``.
        reduce: deprecated, see ``reduction``.
        reduction: ``'none'`` | ``'mean'`` | ``'sum'``.
        pos_weight: rescales the positive part; broadcasts to the shape of ``input``. A tensor of any real dtype, or a number.

    Shape:
        ``input`` and ``target``: :math:`(*)`. Returns a scalar for ``'mean'`` and ``'sum'``, :math:`(*)` for ``'none'``.

    Returns:
        The loss, in the promoted dtype of ``input`` and a floating ``target``. An empty input has mean NaN and sum 0.

    Raises:
        ValueError: ``target`` has another size than ``input``, or ``reduction`` is unknown.
        RuntimeError: a weight does not broadcast, the devices differ, or an argument is complex.
        NotImplementedError: ``input`` is not of a floating dtype.

    Note:
        Arithmetic is in float32 (float64 for float64), rounded once when stored. Sums are taken in a fixed order, the larger part of it in float64, so that
        the result has the same bits for any number of threads. Gradients of any order with respect to every floating argument are available. See
        :func:`torch.nn.functional.binary_cross_entropy_with_logits` for the function that this one replaces.

    Example::

        >>> target = torch.ones([10, 64])  # 64 classes, batch size 10
        >>> output = torch.full([10, 64], 1.5)  # logits
        >>> pos_weight = torch.ones([64])
        >>> binary_cross_entropy_with_logits(output, target, pos_weight=pos_weight)  # -log(sigmoid(1.5))
        tensor(0.2014)
    """
    if size_average is not None or reduce is not None:
        reduction_enum = _Reduction.legacy_get_enum(size_average, reduce)
    else:
        reduction_enum = _Reduction.get_enum(reduction)
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        if has_torch_function_variadic(input, target, weight, pos_weight):
            return handle_torch_function(
                binary_cross_entropy_with_logits,
                (input, target, weight, pos_weight),
                input,
                target,
                weight=weight,
                size_average=size_average,
                reduce=reduce,
                reduction=reduction,
                pos_weight=pos_weight,
            )
        if not torch.compiler.is_dynamo_compiling():
            return _C.binary_cross_entropy_with_logits(input, target, weight, pos_weight, reduction_enum)
        weight = _as_tensor(weight)
        pos_weight = _as_tensor(pos_weight)
    return torch.ops.bce_ext.binary_cross_entropy_with_logits(input, target, weight, pos_weight, reduction_enum)  # type: ignore[no-any-return]


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Binary cross entropy between probabilities and targets, its gradient computed in the same pass.

    With probability :math:`q`, target :math:`y` and weight :math:`w`, an element contributes

    .. math::
        \ell(q, y) = -w \left[ y \max(\log q, -100) + (1 - y) \max(\log(1 - q), -100) \right], \qquad
        \frac{\partial \ell}{\partial q} = w\, \frac{q - y}{\max((1 - q)\, q,\ 10^{-12})},

    with the clamps of :func:`torch.nn.functional.binary_cross_entropy`. Where the probabilities come out of a sigmoid,
    :func:`binary_cross_entropy_with_logits` on its argument is more exact.

    Args:
        input: probabilities of any shape, float64, float32, bfloat16 or float16, in :math:`[0, 1]`.
        target: the same shape, any real dtype: bool, integer or floating.
        weight: rescales the loss of each element; broadcasts to the shape of ``input``. A tensor of any real dtype, or a number.
        size_average: deprecated, see ``reduction``.
        reduce: deprecated, see ``reduction``.
        reduction: ``'none'`` | ``'mean'`` | ``'sum'``.

    Shape:
        ``input`` and ``target``: :math:`(*)`. Returns a scalar for ``'mean'`` and ``'sum'``, :math:`(*)` for ``'none'``.

    Returns:
        The loss, in the promoted dtype of ``input`` and a floating ``target``. An empty input has mean NaN and sum 0.

    Raises:
        ValueError: ``target`` has another size than ``input``, or ``reduction`` is unknown.
        RuntimeError: a probability on the CPU is outside :math:`[0, 1]`, a weight does not broadcast, or the devices differ.

    Note:
        Allowed under autocast, where native raises an error on CUDA. Precision and determinism as for
        :func:`binary_cross_entropy_with_logits`.

    Example::

        >>> input = torch.tensor([0.25, 0.75])
        >>> binary_cross_entropy(input, torch.tensor([0, 1]))  # -log(0.75)
        tensor(0.2877)
    """
    if size_average is not None or reduce is not None:
        reduction_enum = _Reduction.legacy_get_enum(size_average, reduce)
    else:
        reduction_enum = _Reduction.get_enum(reduction)
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        if has_torch_function_variadic(input, target, weight):
            return handle_torch_function(
                binary_cross_entropy,
                (input, target, weight),
                input,
                target,
                weight=weight,
                size_average=size_average,
                reduce=reduce,
                reduction=reduction,
            )
        if not torch.compiler.is_dynamo_compiling():
            return _C.binary_cross_entropy(input, target, weight, reduction_enum)
        weight = _as_tensor(weight)
    return torch.ops.bce_ext.binary_cross_entropy(input, target, weight, reduction_enum)  # type: ignore[no-any-return]


def _as_tensor(weight: Tensor | float | None) -> Tensor | None:
    """A number becomes a 0-d tensor, which broadcasts and goes with any device."""
    return torch.scalar_tensor(weight, dtype=torch.float64) if isinstance(weight, (int, float)) else weight
