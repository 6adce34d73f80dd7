"""Loads the operator library, after which ``torch.ops.bce_ext`` holds the operators."""

from __future__ import annotations

from pathlib import Path

import torch

from bce_ext import _binary

_binary.check()
torch.ops.load_library(Path(__file__).with_name("libbce_ext.so"))

from bce_ext import _flops as _flops  # noqa: E402
