"""Whether the binaries beside this file fit this Python and this torch: asked before they are loaded, since their own errors do not tell."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import torch

__all__ = ["check"]

ANY_TORCH = "BCE_EXT_ANY_TORCH"
REBUILD = "build it anew by `pip install --no-build-isolation --no-deps --force-reinstall .` in its sources"


def check() -> None:
    """Raises an ImportError that says in one sentence what does not fit and what to do."""
    folder = Path(__file__).parent
    if not (folder / "_build.py").exists():
        raise ImportError(_why_no_binary(folder))
    from bce_ext import _build

    python = sysconfig.get_config_var("SOABI")
    if python != _build.PYTHON:
        raise ImportError(
            f"bce_ext: the binary in {folder} is of {_build.PYTHON}, but this Python is {python}: {REBUILD}"
        )
    with_cuda = _build.CUDA is not None
    built = _describe(_build.TORCH, _build.CUDA, with_cuda)
    found = _describe(torch.__version__, torch.version.cuda, with_cuda)
    if built != found and os.environ.get(ANY_TORCH) != "1":
        raise ImportError(
            f"bce_ext: the binary in {folder} is built for {built}, but this is {found}: {REBUILD}, "
            f"or set {ANY_TORCH}=1 to try it as it is"
        )


def _why_no_binary(folder: Path) -> str:
    if (folder.parent / "setup.py").exists():
        return (
            f"bce_ext: {folder.parent} is the source tree and is not built in place: "
            "run `make build` there, or start Python in another directory to import the installed package"
        )
    return f"bce_ext: {folder} holds no binary: {REBUILD}"


def _describe(torch_version: str, cuda_version: str | None, with_cuda: bool) -> str:
    """What must be equal: the minor version of torch, and the major version of CUDA where the binary has kernels for it."""
    description = "torch " + ".".join(torch_version.split(".")[:2])
    if not with_cuda:
        return description
    return f"{description} with CUDA {cuda_version.split('.')[0]}" if cuda_version else f"{description} without CUDA"
