"""The memory that the losses keep for their next gradient."""

from __future__ import annotations

import torch

__all__ = ["empty_cache"]


def empty_cache() -> None:
    """Gives the memory that freed gradients on the CPU left behind back to the system.

    Up to four freed blocks of 1 MiB and more are kept for the next gradient. 128 MiB of them count as the process's own; the system may take the rest
    when it needs memory. The environment variable ``BCE_EXT_CACHE_MIB``, read when bce_ext is loaded, replaces the 128; 0 keeps nothing. The same as
    ``torch.ops.bce_ext.empty_cache()``. For memory on a GPU there is :func:`torch.cuda.empty_cache`.

    Example::

        >>> input = torch.randn(2**22, requires_grad=True)
        >>> bce_ext.BCEWithLogitsLoss()(input, torch.ones(2**22)).backward()
        >>> input.grad = None
        >>> bce_ext.empty_cache()  # 16 MiB
    """
    torch.ops.bce_ext.empty_cache()
