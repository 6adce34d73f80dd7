"""The passes over memory that torch's loss and its gradient take: what each operation reads and writes, in sizes of the logits.

    python benchmarks/passes.py

Counts what the tensors of every operation that PyTorch dispatches hold. Views move nothing, and a broadcast tensor counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from terminal import print_table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHAPE = (1024, 1024)
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"}  # move nothing


class CountBytes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes_of: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "binary_cross_entropy_with_logits":  # torch makes it of others, below what a mode sees by itself
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        result = func(*args, **kwargs)
        if func.is_view or name in FREE:
            return result
        read = () if name == "fill_" else tree_leaves((args, kwargs))
        moved = sum(_bytes(leaf) for leaf in read if isinstance(leaf, Tensor))
        moved += sum(_bytes(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.bytes_of.append((name, moved))
        return result


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def passes(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, int]:
    """The passes of forward and backward, and the number of operations that move at least one."""
    logits = torch.randn(SHAPE, requires_grad=True)
    target = torch.rand(SHAPE)
    with CountBytes() as count:
        loss(logits, target).backward()
    size = _bytes(logits.detach())
    return sum(moved for _, moved in count.bytes_of) / size, sum(moved >= size for _, moved in count.bytes_of)


def main() -> None:
    pos_weight = 1 + torch.rand(SHAPE[-1])
    weight = torch.rand(SHAPE[0], 1)
    cases: dict[str, dict[str, Any]] = {
        "mean": {},
        "pos_weight [C]": {"pos_weight": pos_weight},
        "weight [N, 1]": {"weight": weight},
    }
    lines = [[name, *passes(partial(F.binary_cross_entropy_with_logits, **options))] for name, options in cases.items()]
    print_table("Forward and backward, float32", ("torch's loss", "passes over memory", "operations"), lines)


if __name__ == "__main__":
    main()
