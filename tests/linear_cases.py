"""Targets of every kind for the linear layer and its loss, and the plain form that it must equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("dense", "bool", "csr", "coo", "class indices")


def csr_with_unsorted_duplicates(dense: Tensor) -> Tensor:
    """The same matrix: each value in two halves, the columns of a row in descending order."""
    crow, columns, values = [0], [], []
    for row in dense:
        labels = row.nonzero().flatten().flip(0)
        columns += [labels, labels]
        values += [row[labels] / 2, row[labels] / 2]
        crow.append(crow[-1] + 2 * len(labels))
    empty = [dense.new_empty(0)]
    return torch.sparse_csr_tensor(
        torch.tensor(crow, device=dense.device),
        torch.cat(columns or empty).to(torch.int64),
        torch.cat(values or empty),
        dense.shape,
        check_invariants=False,
    )


def coo_with_unsorted_duplicates(dense: Tensor) -> Tensor:
    indices = dense.nonzero().t()
    values = dense[indices[0], indices[1]]
    order = torch.arange(values.numel(), device=dense.device).flip(0)
    return torch.sparse_coo_tensor(
        torch.cat([indices[:, order], indices], 1), torch.cat([values[order] / 2, values / 2]), dense.shape
    )


@dataclass
class Case:
    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    dense: Tensor  # the same target

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        tensors = [self.input, self.linear_weight] + ([] if self.linear_bias is None else [self.linear_bias])
        return [tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]


def make_case(
    rows: int,
    features: int,
    labels: int,
    kind: str = "dense",
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    input, linear_weight = normal(rows, features), normal(labels, features)
    linear_bias = normal(labels) if bias else None
    if kind == "class indices":
        target = torch.randint(-1, max(labels, 1), (rows,), generator=generator).clamp(max=labels - 1).to(device)
        dense = target[:, None] == torch.arange(labels, device=device)
    else:
        listed = uniform(rows, labels) < 0.05
        soft = torch.where(listed, (64 * uniform(rows, labels)).round() / 64, 0.0)  # halves are exact in every dtype
        dense = (listed if kind == "bool" else soft.to(dtype)).to(device)
        target = {
            "dense": lambda: dense,
            "bool": lambda: dense,
            "csr": lambda: csr_with_unsorted_duplicates(dense),
            "coo": lambda: coo_with_unsorted_duplicates(dense),
        }[kind]()
    return Case(input, linear_weight, linear_bias, target, dense)


def plain(leaves: list[Tensor], dense: Tensor, **keywords: object) -> Tensor:
    """F.linear and native."""
    logits = torch.nn.functional.linear(*leaves)
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, dense.to(logits.dtype), **keywords)  # type: ignore[arg-type]
