"""The fused pass as a :class:`torch.autograd.Function`, for code that composes functions by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["BCEWithLogitsFunction"]

NONE, MEAN = 0, 1  # at::Reduction


class BCEWithLogitsFunction(torch.autograd.Function):
    """Binary cross entropy with logits: the Python face of the operators behind ``torch.ops.bce_ext.binary_cross_entropy_with_logits``.

    ``apply(input, target, weight=None, pos_weight=None, reduction=1)``, with ATen's numbers for the reduction: 0 none, 1 mean, 2 sum. The maths is that of
    :func:`bce_ext.functional.binary_cross_entropy_with_logits`. The forward pass of a reduced loss computes the gradient as well and keeps it; backward
    hands it over. Reduction none keeps the inputs only. Differentiable any number of times.

    Example::

        >>> input = torch.zeros(3, requires_grad=True)
        >>> BCEWithLogitsFunction.apply(input, torch.ones(3), None, None, 2).backward()
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
        reduction: int = MEAN,
    ) -> Tensor:
        weights_require_grad = any(w is not None and w.requires_grad for w in (weight, pos_weight))
        in_transform = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
        if weights_require_grad or in_transform:
            # The operator has a derivative for these; a Function with a context of its own has not.
            return torch.ops.bce_ext.binary_cross_entropy_with_logits(input, target, weight, pos_weight, reduction)  # type: ignore[no-any-return]
        return super().apply(input, target, weight, pos_weight, reduction)  # type: ignore[no-any-return, no-untyped-call]

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: int
    ) -> Tensor:
        ctx.save_for_backward(input, target, weight, pos_weight)
        ctx.reduction = reduction
        keeps_gradient = reduction != NONE and input.requires_grad and not target.requires_grad
        # A float16 gradient of a mean would underflow before the factor of a gradient scaler reached it.
        if not keeps_gradient or input.dtype == torch.float16:
            ctx.gradient = None
            return torch.ops.bce_ext.binary_cross_entropy_with_logits(input, target, weight, pos_weight, reduction)  # type: ignore[no-any-return]
        promotes = target.is_floating_point() and target.itemsize > 1  # the 8-bit floats are for storage
        dtype = torch.promote_types(input.dtype, target.dtype) if promotes else input.dtype
        loss, ctx.gradient = torch.ops.bce_ext._bce_loss_and_grad(
            input, target, weight, pos_weight, True, _divisor(input, reduction), dtype
        )
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, target, weight, pos_weight = ctx.saved_tensors
        if ctx.gradient is not None and not torch.is_grad_enabled():
            return (ctx.gradient * grad_output).to(ctx.gradient.dtype), None, None, None, None
        needs_input, needs_target = ctx.needs_input_grad[:2]
        grad_input, grad_target = torch.ops.bce_ext._bce_backward(
            grad_output,
            input,
            target,
            weight,
            pos_weight,
            True,
            _divisor(input, ctx.reduction),
            [needs_input, needs_target],
        )
        return grad_input if needs_input else None, grad_target if needs_target else None, None, None, None


def _divisor(input: Tensor, reduction: int) -> int:
    return input.numel() if reduction == MEAN else 1
