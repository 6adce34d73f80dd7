"""A linear layer together with its loss, without the matrix of logits: for many labels, and for image-text batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function

from bce_ext import _C, distributed
from bce_ext._call import as_tensor, reduction_number
from bce_ext._docs import with_shared_arguments

__all__ = ["linear_binary_cross_entropy_with_logits", "siglip_loss"]


@with_shared_arguments
def linear_binary_cross_entropy_with_logits(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | float | None = None,
    pos_weight: Tensor | float | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ignore_index: float | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    r"""Binary cross entropy of the logits of a linear layer, without the matrix of logits.

    With input :math:`h`, weight :math:`W` and bias :math:`b` of the layer, the logits are

    .. math::
        x = h W^\top + b,

    and the result equals ``binary_cross_entropy_with_logits(F.linear(input, linear_weight, linear_bias), target, ...)``. For a reduced loss, a block of logits
    at a time is computed, turned into loss and gradient, and multiplied into the gradients

    .. math::
        \frac{\partial \ell}{\partial h} = g W, \qquad \frac{\partial \ell}{\partial W} = g^\top h, \qquad
        \frac{\partial \ell}{\partial b} = g^\top 1, \qquad g = \frac{\partial \ell}{\partial x},

    so that all the memory it takes is these gradients and a few blocks. Only those gradients are computed that are asked for.

    Args:
        input: the features, float64, float32, bfloat16 or float16.
        linear_weight: the weight of the layer, of the dtype of ``input``. Under autocast, which casts input, weight and bias for the products, their dtypes may
            differ. A :class:`torch.distributed.tensor.DTensor` that is sharded on dimension 0 divides the labels among processes.
        target: one of three kinds. Dense, of any real dtype. Sparse, ``torch.sparse_csr`` or ``torch.sparse_coo`` of the size of the logits: what is not
            listed is 0, what is listed more than once is added up. Or class indices, an integer for each row: its one positive label, negative for none.
            They stand for targets of 0 and 1, so that ``ignore_index`` must be one of these.
        linear_bias: the bias of the layer.
        $weight
        $pos_weight
        $reduction With ``'none'`` there are as many losses as logits, so that the logits are computed as a whole.
        $options

    Shape:
        - ``input``: :math:`(*, D)` for any number of dimensions, also none
        - ``linear_weight``: :math:`(C, D)`; ``linear_bias``: :math:`(C)`
        - ``target``: :math:`(*, C)`, or :math:`(*)` for class indices
        - returns a scalar for ``'mean'`` and ``'sum'``, :math:`(*, C)` for ``'none'``

    Returns:
        The loss, in the dtype of ``input``, promoted with that of a floating ``target``; under autocast float32 at least.

    Raises:
        ValueError: ``target`` has a size that does not go with the logits, ``reduction`` is unknown, or ``ignore_index`` is not 0 or 1 with class indices.
        IndexError: a class index is not below the number of labels.
        RuntimeError: the number of features or, outside of autocast, the dtypes differ, a sparse target is not valid, a weight does not broadcast, or the
            devices differ.
        NotImplementedError: ``input`` is not of a floating dtype.

    Note:
        Products are those of ATen, in the dtype of the input; those of float16 gradients are in float32. Sums over blocks are in float32 (float64 for
        float64), and are rounded once. The same call gives the same bits from run to run; for another number of threads, as far as the matrix
        product of the BLAS does. Small problems take the plain form, as do transforms, forward-mode derivatives, and derivatives with respect to the target
        or the weights of the loss.

    Example::

        >>> input = torch.zeros(2, 3)  # 2 rows of 3 features
        >>> linear_weight = torch.zeros(5, 3)  # 5 labels
        >>> target = torch.tensor([4, -1])  # label 4 for the first row, none for the second
        >>> linear_binary_cross_entropy_with_logits(input, linear_weight, target)  # log(2)
        tensor(0.6931)
    """
    operands = (input, linear_weight, target, linear_bias, weight, pos_weight, normalizer)
    number = reduction_number(reduction)
    is_overridden = has_torch_function(operands)
    is_sharded = distributed.is_dtensor(linear_weight)
    if not (is_overridden or is_sharded or is_dynamo_compiling()):
        result = _C.linear_bce(operands, (label_smoothing, ignore_index), number)
        if result is not NotImplemented:
            return result  # type: ignore[no-any-return]
    keywords: dict[str, Any] = {
        "linear_bias": linear_bias,
        "weight": weight,
        "pos_weight": pos_weight,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "ignore_index": ignore_index,
        "normalizer": normalizer,
    }
    if is_overridden:
        return handle_torch_function(linear_binary_cross_entropy_with_logits, operands, *operands[:3], **keywords)
    keywords |= {name: as_tensor(keywords[name]) for name in ("weight", "pos_weight", "normalizer")}
    if is_sharded:
        from bce_ext import sharded_labels

        return sharded_labels.loss(*operands[:3], **keywords)
    # Compilers and tracers see public operators only.
    return torch.ops.bce_ext.linear_binary_cross_entropy_with_logits(  # type: ignore[no-any-return]
        *operands[:3], **(keywords | {"reduction": number})
    )


def loss_of_logits(logits: Tensor, target: Tensor, *, reduction: str, **options: Any) -> Tensor:
    """The loss where a layer was called: of its logits, with a target of any kind."""
    options |= {name: as_tensor(options[name]) for name in ("weight", "pos_weight", "normalizer")}
    return torch.ops.bce_ext.linear_binary_cross_entropy_with_logits(  # type: ignore[no-any-return]
        logits, None, target, reduction=reduction_number(reduction), **options
    )


def siglip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None = None
) -> Tensor:
    r"""The sigmoid loss for pairs of images and texts (SigLIP), without the matrix of logits.

    With image features :math:`u_i`, text features :math:`v_j`, scale :math:`s` and bias :math:`b`,

    .. math::
        \ell = -\frac{1}{N} \sum_{i=1}^N \sum_{j=1}^N \log \sigma\bigl(z_{ij} (s\, u_i \cdot v_j + b)\bigr), \qquad
        z_{ij} = \begin{cases} 1 & i = j \\ -1 & i \ne j. \end{cases}

    Args:
        image_features: usually of length 1 each.
        text_features: as many, of the same dtype. Row :math:`i` belongs to image :math:`i`.
        logit_scale: :math:`s`, a tensor of one element or a number; where a model learns its logarithm, ``log_scale.exp()``.
        logit_bias: :math:`b`, a tensor of one element or a number.

    Shape:
        ``image_features`` and ``text_features``: :math:`(N, D)`. Returns a scalar.

    Returns:
        The loss, with gradients for all four arguments.

    Raises:
        ValueError: the features are not matrices of the same size, or scale or bias is more than one number.

    Note:
        It is :func:`linear_binary_cross_entropy_with_logits` with the texts as labels, and class indices :math:`0, \dots, N - 1`.
        From Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023.

    Example::

        >>> features = torch.eye(2)
        >>> siglip_loss(features, features, torch.tensor(10.0), torch.tensor(-10.0))
        tensor(0.6932)
    """
    if image_features.dim() != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            "siglip_loss: expected image_features and text_features of the same size (N, D), but got "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    num_pairs = image_features.shape[0]
    device = image_features.device
    return linear_binary_cross_entropy_with_logits(
        image_features * _one_number("logit_scale", logit_scale, image_features),
        text_features,
        torch.arange(num_pairs, device=device),
        linear_bias=None
        if logit_bias is None
        else _one_number("logit_bias", logit_bias, image_features).expand(num_pairs),
        normalizer=torch.full((), num_pairs, dtype=torch.float64, device=device),
    )


def _one_number(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=torch.float64, device=like.device)
    if value.numel() != 1:
        raise ValueError(f"siglip_loss: expected {name} to be one number, but got size {tuple(value.shape)}")
    return value.to(like.dtype).reshape(())
