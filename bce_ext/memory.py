"""The memory that the losses keep for their next gradient."""

from __future__ import annotations

import torch

__all__ = ["empty_cache"]


def empty_cache() -> None:
    """Gives the memory that freed gradients on the CPU left behind back to the system.

    Blocks of 1 MiB and more are kept for the next gradient: at most 128 MiB that count as the process's own, or as many MiB as the environment variable
    ``BCE_EXT_CACHE_MIB`` says when bce_ext is loaded; 0 keeps nothing. The same as ``torch.ops.bce_ext.empty_cache()``. Memory on a GPU is torch's:
    :func:`torch.cuda.empty_cache`.

    Example::

        >>> input = torch.randn(2**22, requires_grad=True)
        >>> bce_ext.BCEWithLogitsLoss()(input, torch.ones(2**22)).backward()
        >>> input.grad = None
        >>> bce_ext.empty_cache()  # 16 MiB
    """
    torch.ops.bce_ext.empty_cache()
