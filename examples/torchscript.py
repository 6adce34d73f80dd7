"""Saves a scripted module with our loss, and loads it in a process that has the operators but not the package."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import bce_ext

LOAD = """
import sys
import torch

torch.ops.load_library(sys.argv[1])
model = torch.jit.load(sys.argv[2])
features, target = torch.randn(32, 8), torch.randint(0, 2, (32, 3))
loss = model(features, target)
loss.backward()
print(f"loss {loss.item():.4f}, norm of the weight's gradient {model.linear.weight.grad.norm():.4f}")
"""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.register_buffer("pos_weight", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        logits = self.linear(features)
        loss: Tensor = torch.ops.bce_ext.binary_cross_entropy_with_logits(logits, target, pos_weight=self.pos_weight)
        return loss


def main() -> None:
    library = Path(bce_ext.__file__).with_name("libbce_ext.so")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.pt")
        torch.jit.script(Model()).save(path)
        subprocess.run([sys.executable, "-c", LOAD, library, path], check=True)


if __name__ == "__main__":
    main()
