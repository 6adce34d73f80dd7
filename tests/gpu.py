"""Whether tests can run on a GPU."""

from __future__ import annotations

import torch

import bce_ext


def why_no_cuda() -> str | None:
    """The reason why nothing can be run on a GPU, or None."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a CPU build"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if bce_ext.build_info()["cuda"] is None and torch.version.hip is None:
        return "the extension was built without CUDA"
    return None


WHY_NO_CUDA = why_no_cuda()
