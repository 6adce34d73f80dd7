"""Tells :class:`torch.utils.flop_counter.FlopCounterMode` how many operations the products of the linear loss take."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

__all__ = ["linear_bce_flops"]


@register_flop_formula(torch.ops.bce_ext._linear_bce_loss_and_grads)
def linear_bce_flops(
    input_shape: torch.Size, linear_weight_shape: torch.Size | None, *others: Any, **keywords: Any
) -> int:
    """The logits, and a product for each gradient of ``input`` and ``linear_weight`` that is wanted. The operator has no defaults: ``output_mask`` is last."""
    if linear_weight_shape is None:  # the input is the logits
        return 0
    of_input, of_weight, _ = others[-1]
    rows, features = input_shape
    return int(2 * rows * features * linear_weight_shape[0] * (1 + of_input + of_weight))
