"""The losses as functions: names, arguments and defaults are those of :mod:`torch.nn.functional`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.jit import is_scripting  # type: ignore[attr-defined]

from bce_ext._call import Loss, as_tensor, call, reduction_number
from bce_ext._docs import with_shared_arguments
from bce_ext.linear import linear_binary_cross_entropy_with_logits, siglip_loss

__all__ = [
    "asymmetric_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "linear_binary_cross_entropy_with_logits",
    "siglip_loss",
    "sigmoid_focal_loss",
]


@with_shared_arguments
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | float | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: float | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r"""Binary cross entropy between logits and targets, its gradient computed in the same pass.

    With logit :math:`x`, target :math:`y`, weight :math:`w` and positive weight :math:`p`, an element contributes

    .. math::
        \ell(x, y) = w \left[ (1 - y) \operatorname{softplus}(x) + p\, y \operatorname{softplus}(-x) \right], \qquad
        \frac{\partial \ell}{\partial x} = w \left[ (1 - y)\, \sigma(x) - p\, y\, \sigma(-x) \right],

    where :math:`\operatorname{softplus}(x) = \log(1 + e^x)`. Elements are reduced by ``'mean'``, by ``'sum'`` or not at all.

    Args:
        input: logits of any shape, float64, float32, bfloat16 or float16.
        target: the same shape, any real dtype. Bool and integer ones must be 0, 1 or ``ignore_index``; floating ones are usually in :math:`[0, 1]`, which is
            not required.
        $weight
        $deprecated
        $reduction
        $pos_weight
        $options

    Shape:
        ``input`` and ``target``: :math:`(*)`. Returns a scalar for ``'mean'`` and ``'sum'``, :math:`(*)` for ``'none'``.

    Returns:
        The loss, in the promoted dtype of ``input`` and a floating ``target``. An empty input has mean NaN and sum 0.

    Raises:
        $raises

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
    if not is_scripting():
        operands = (input, target, weight, pos_weight, normalizer)
        options = (label_smoothing, ignore_index)
        return call(WITH_LOGITS, operands, options, reduction, size_average, reduce)
    number = reduction_number(reduction, size_average, reduce)
    return torch.ops.bce_ext.binary_cross_entropy_with_logits(  # type: ignore[no-any-return]
        input,
        target,
        as_tensor(weight),
        as_tensor(pos_weight),
        number,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        normalizer=as_tensor(normalizer),
    )


@with_shared_arguments
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | float | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: float | None = None,
    normalizer: Tensor | float | None = None,
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
        target: the same shape, any real dtype, in :math:`[0, 1]`.
        $weight
        $deprecated
        $reduction
        $options

    Shape:
        ``input`` and ``target``: :math:`(*)`. Returns a scalar for ``'mean'`` and ``'sum'``, :math:`(*)` for ``'none'``.

    Returns:
        The loss, in the promoted dtype of ``input`` and a floating ``target``. An empty input has mean NaN and sum 0.

    Raises:
        $raises
        RuntimeError: on the CPU, a probability or a target is outside of :math:`[0, 1]`. On CUDA that is a device-side assertion.

    Note:
        Allowed under autocast, where native raises an error on CUDA. Precision and determinism as for
        :func:`binary_cross_entropy_with_logits`.

    Example::

        >>> input = torch.tensor([0.25, 0.75])
        >>> binary_cross_entropy(input, torch.tensor([0, 1]))  # -log(0.75)
        tensor(0.2877)
    """
    if not is_scripting():
        operands = (input, target, weight, None, normalizer)
        options = (label_smoothing, ignore_index)
        return call(PROBABILITIES, operands, options, reduction, size_average, reduce)
    number = reduction_number(reduction, size_average, reduce)
    return torch.ops.bce_ext.binary_cross_entropy(  # type: ignore[no-any-return]
        input,
        target,
        as_tensor(weight),
        number,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        normalizer=as_tensor(normalizer),
    )


@with_shared_arguments
def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    weight: Tensor | float | None = None,
    pos_weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    ignore_index: float | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r"""Focal loss of logits, its gradient computed in the same pass: the signature and the values of :func:`torchvision.ops.sigmoid_focal_loss`.

    With logit :math:`x`, target :math:`y`, weight :math:`w` and positive weight :math:`p`, an element contributes

    .. math::
        \ell(x, y) = w \, \alpha_y \, u^\gamma \left[ (1 - y) \operatorname{softplus}(x) + p\, y \operatorname{softplus}(-x) \right], \qquad
        u = (1 - y)\, \sigma(x) + y\, \sigma(-x), \qquad \alpha_y = \alpha y + (1 - \alpha)(1 - y).

    Gradients are finite for every :math:`\gamma \ge 0` at every logit, also where :math:`u` underflows.

    Args:
        inputs: logits of any shape, float64, float32, bfloat16 or float16.
        targets: the same shape: bool, integer (0 or 1) or floating.
        $focal
        $reduction
        $weight
        $pos_weight
        $options

    Shape:
        ``inputs`` and ``targets``: :math:`(*)`. Returns a scalar for ``'mean'`` and ``'sum'``, :math:`(*)` for ``'none'``.

    Returns:
        The loss, in the promoted dtype of ``inputs`` and a floating ``targets``. An empty input has mean NaN and sum 0.

    Raises:
        $raises

    Note:
        Precision and determinism as for :func:`binary_cross_entropy_with_logits`. From Lin et al., Focal Loss for Dense Object Detection, 2017.

    Example::

        >>> inputs = torch.tensor([-2.0, 0.0, 2.0])
        >>> sigmoid_focal_loss(inputs, torch.tensor([0, 1, 1]))
        tensor([0.0014, 0.0433, 0.0005])
    """
    if not is_scripting():
        options = (label_smoothing, ignore_index, alpha, gamma)
        return call(FOCAL, (inputs, targets, weight, pos_weight, normalizer), options, reduction)
    return torch.ops.bce_ext.sigmoid_focal_loss(  # type: ignore[no-any-return]
        inputs,
        targets,
        alpha,
        gamma,
        reduction_number(reduction, None, None),
        weight=as_tensor(weight),
        pos_weight=as_tensor(pos_weight),
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        normalizer=as_tensor(normalizer),
    )


@with_shared_arguments
def asymmetric_loss(
    input: Tensor,
    target: Tensor,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    weight: Tensor | float | None = None,
    pos_weight: Tensor | float | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: float | None = None,
    normalizer: Tensor | float | None = None,
    detach_focusing: bool = False,
    eps: float = 1e-8,
) -> Tensor:
    r"""Asymmetric loss of logits (ASL) for many labels, its gradient computed in the same pass: the formula of timm.

    With logit :math:`x`, target :math:`y`, weight :math:`w`, positive weight :math:`p`, :math:`P = \sigma(x)` and
    :math:`Q = \min(\sigma(-x) + \mathrm{clip},\ 1)`, an element contributes

    .. math::
        \ell(x, y) = -w \left[ p\, y \log \max(P, \varepsilon) + (1 - y) \log \max(Q, \varepsilon) \right]
        \left[ y (1 - P) + (1 - y)(1 - Q) \right]^{\gamma_+ y + \gamma_- (1 - y)}.

    Args:
        input: logits of any shape, float64, float32, bfloat16 or float16.
        target: the same shape: bool, integer (0 or 1) or floating.
        $asymmetric
        $weight
        $pos_weight
        $reduction
        $options
        $focusing

    Shape:
        ``input`` and ``target``: :math:`(*)`. Returns a scalar for ``'mean'`` and ``'sum'``, :math:`(*)` for ``'none'``.

    Returns:
        The loss, in the promoted dtype of ``input`` and a floating ``target``. An empty input has mean NaN and sum 0.

    Raises:
        $raises

    Note:
        Precision and determinism as for :func:`binary_cross_entropy_with_logits`. From Ridnik et al., Asymmetric Loss for Multi-Label Classification, 2021.

    Example::

        >>> input = torch.tensor([-4.0, 0.0, 2.0])
        >>> asymmetric_loss(input, torch.tensor([0, 1, 1]), reduction="none")
        tensor([0.0000, 0.3466, 0.0151])
    """
    if not is_scripting():
        options = (label_smoothing, ignore_index, gamma_neg, gamma_pos, clip, eps, float(detach_focusing))
        return call(ASYMMETRIC, (input, target, weight, pos_weight, normalizer), options, reduction)
    return torch.ops.bce_ext.asymmetric_loss(  # type: ignore[no-any-return]
        input,
        target,
        gamma_neg,
        gamma_pos,
        clip,
        reduction_number(reduction, None, None),
        weight=as_tensor(weight),
        pos_weight=as_tensor(pos_weight),
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        normalizer=as_tensor(normalizer),
        detach_focusing=detach_focusing,
        eps=eps,
    )


# How the losses are called outside of TorchScript.
WITH_LOGITS = Loss.of(binary_cross_entropy_with_logits, 0)
PROBABILITIES = Loss.of(binary_cross_entropy, 1)
FOCAL = Loss.of(sigmoid_focal_loss, 2, alpha=0.25, gamma=2.0)
ASYMMETRIC = Loss.of(asymmetric_loss, 3, gamma_neg=4.0, gamma_pos=1.0, clip=0.05, eps=1e-8, detach_focusing=0.0)
