"""The linear layer and its loss where a :class:`torch.distributed.tensor.DTensor` divides the labels among processes.

Each process computes the logits of its own labels only. The loss comes out as ``Partial``, the gradient of the weight stays sharded, and that of the input is
summed over the processes. Where a dimension of the mesh shards the rows of the input instead, each process has its rows, and the gradient of the weight is
summed over that dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

__all__ = ["loss"]


def loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
    ignore_index: float | None,
    normalizer: Tensor | None,
) -> Tensor:
    """:func:`bce_ext.functional.linear_binary_cross_entropy_with_logits` for a DTensor ``linear_weight``. What is no DTensor is whole on each process."""
    from bce_ext.linear import linear_binary_cross_entropy_with_logits

    assert isinstance(linear_weight, DTensor)
    part = Part(input, linear_weight)
    part.check_target(target)
    local_target = part.target(target)
    if reduction == "mean" and normalizer is None:
        if ignore_index is None:
            normalizer = torch.full(
                (), float(part.num_rows * part.num_labels), dtype=torch.float64, device=local_target.device
            )
        else:
            normalizer = part.count_valid(local_target, ignore_index)
    local = linear_binary_cross_entropy_with_logits(
        part.input(input),
        part.linear_weight(linear_weight),
        local_target,
        linear_bias=part.linear_bias(linear_bias),
        weight=part.elements(weight),
        pos_weight=part.elements(pos_weight),
        reduction=reduction,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        normalizer=part.shared(normalizer),
    )
    return part.losses(local) if reduction == "none" else part.sum(local)


class Part:
    """The rows and labels of this process."""

    def __init__(self, input: Tensor, linear_weight: Any) -> None:
        self.mesh = linear_weight.device_mesh
        replicated = [Replicate()] * self.mesh.ndim
        if input.dim() != 2:
            raise ValueError(f"expected an input of two dimensions with sharded labels, but got {input.dim()}")
        of_rows = list(input.placements) if isinstance(input, DTensor) else replicated
        of_labels = list(linear_weight.placements)
        for own, other in zip(of_rows, of_labels, strict=True):
            rows_or_labels = (own.is_replicate() or own.is_shard(0)) and (other.is_replicate() or other.is_shard(0))
            if not rows_or_labels or (own.is_shard() and other.is_shard()):
                raise ValueError(
                    "expected each dimension of the mesh to shard the rows of input or the labels of linear_weight, or none of them, "
                    f"but got {of_rows} and {of_labels}"
                )
        self.of_rows, self.of_labels = of_rows, of_labels
        self.num_rows, self.num_labels = input.shape[0], linear_weight.shape[0]
        self.rows, self.row = self._range(self.num_rows, of_rows)
        self.labels, self.label = self._range(self.num_labels, of_labels)
        # Where a gradient is the sum over processes.
        self.is_shared = [a.is_shard() or b.is_shard() for a, b in zip(of_rows, of_labels, strict=True)]

    def _range(self, size: int, placements: list[Any]) -> tuple[int, int]:
        shape, offset = compute_local_shape_and_global_offset((size,), self.mesh, placements)
        return shape[0], offset[0]

    def input(self, input: Tensor) -> Tensor:
        if not isinstance(input, DTensor):
            input = DTensor.from_local(input, self.mesh, self.of_rows, run_check=False)
        summed = [Partial() if b.is_shard() else a for a, b in zip(self.of_rows, self.of_labels, strict=True)]
        return input.to_local(grad_placements=summed)

    def linear_weight(self, linear_weight: DTensor) -> Tensor:
        summed = [Partial() if a.is_shard() else b for a, b in zip(self.of_rows, self.of_labels, strict=True)]
        return linear_weight.to_local(grad_placements=summed)

    def linear_bias(self, linear_bias: Tensor | None) -> Tensor | None:
        if linear_bias is None:
            return None
        if not isinstance(linear_bias, DTensor):
            linear_bias = DTensor.from_local(linear_bias, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        return self.linear_weight(linear_bias.redistribute(placements=self.of_labels))

    def shared(self, tensor: Tensor | None) -> Tensor | None:
        """A tensor that is whole on each process; its gradient is the sum of those that the processes have."""
        if tensor is None or not tensor.requires_grad:
            return _whole(tensor)
        replicated = [Replicate()] * self.mesh.ndim
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, self.mesh, replicated, run_check=False)
        summed = [Partial() if is_shared else Replicate() for is_shared in self.is_shared]
        return tensor.redistribute(placements=replicated).to_local(grad_placements=summed)

    def elements(self, tensor: Tensor | None) -> Tensor | None:
        """The part of a tensor that broadcasts to the logits."""
        tensor = self.shared(tensor)
        if tensor is None:
            return None
        if tensor.dim() >= 1 and tensor.shape[-1] != 1:
            tensor = tensor.narrow(-1, self.label, self.labels)
        if tensor.dim() == 2 and tensor.shape[0] != 1:
            tensor = tensor.narrow(0, self.row, self.rows)
        return tensor

    def check_target(self, target: Tensor) -> None:
        """What the operator cannot see in a part of the target."""
        if target.shape not in ((self.num_rows, self.num_labels), (self.num_rows,)):
            raise ValueError(
                f"linear_binary_cross_entropy_with_logits: expected a target of size ({self.num_rows}, {self.num_labels}) or one integer for each row, "
                f"but got size {tuple(target.shape)}"
            )
        if target.dim() == 1:
            if target.is_floating_point() or target.dtype == torch.bool:
                raise ValueError(
                    f"linear_binary_cross_entropy_with_logits: expected class indices to be integers, but got {target.dtype}"
                )
            indices = _whole(target)  # so that all processes raise, or none
            assert indices is not None
            if (indices >= self.num_labels).any():
                raise IndexError(
                    "linear_binary_cross_entropy_with_logits: expected class indices below the number of labels "
                    f"({self.num_labels}), but one is {int(indices.max())}"
                )
        elif target.layout == torch.sparse_csr:
            crow = target.crow_indices()
            if crow[0] != 0 or crow[-1] != target.values().shape[0] or (crow.diff() < 0).any():
                raise RuntimeError(
                    "linear_binary_cross_entropy_with_logits: expected crow_indices that rise from 0 to the number of values"
                )
            _check_places("labels", target.col_indices(), self.num_labels)
        elif target.layout == torch.sparse_coo:
            rows, labels = target._indices()
            _check_places("rows", rows, self.num_rows)
            _check_places("labels", labels, self.num_labels)

    def target(self, target: Tensor) -> Tensor:
        if isinstance(target, DTensor):
            if target.dim() == 1:
                return self._class_indices(target.redistribute(placements=self.of_rows).to_local())
            dense = [
                Shard(0) if a.is_shard() else Shard(1) if b.is_shard() else Replicate()
                for a, b in zip(self.of_rows, self.of_labels, strict=True)
            ]
            return target.redistribute(placements=dense).to_local()
        if target.layout in (torch.sparse_csr, torch.sparse_coo):
            return self._sparse(target)
        if target.dim() == 1:
            return self._class_indices(target.narrow(0, self.row, self.rows))
        whole = self.shared(target)
        assert whole is not None
        return whole.narrow(0, self.row, self.rows).narrow(1, self.label, self.labels)

    def _class_indices(self, indices: Tensor) -> Tensor:
        own = indices.to(torch.int64) - self.label
        return torch.where((own >= 0) & (own < self.labels), own, -1)

    def _sparse(self, target: Tensor) -> Tensor:
        """The elements that this process has rows and labels of."""
        if target.layout == torch.sparse_csr:
            labels, values = target.col_indices().to(torch.int64), target.values()
            rows = torch._convert_indices_from_csr_to_coo(target.crow_indices(), target.col_indices())[0]
        else:
            # Duplicates are added up anyway; only coalesced values have a derivative.
            coalesced = target.coalesce() if target.requires_grad else target
            rows, labels = coalesced._indices()
            values = coalesced.values() if target.requires_grad else coalesced._values()
        rows, labels = rows.to(torch.int64) - self.row, labels - self.label
        own = (rows >= 0) & (rows < self.rows) & (labels >= 0) & (labels < self.labels)
        indices = torch.stack([rows[own], labels[own]])
        whole = self.shared(values)
        assert whole is not None
        return torch.sparse_coo_tensor(indices, whole[own], (self.rows, self.labels), check_invariants=False)

    def count_valid(self, target: Tensor, ignore_index: float) -> Tensor:
        """The number of elements on all processes that are not ignored."""
        if target.dim() == 1:
            target = target.unsqueeze(1) == torch.arange(self.labels, device=target.device)
        dense = target.to_dense() if target.layout != torch.strided else target
        count: Tensor = torch.ops.bce_ext._count_valid(dense, ignore_index)
        for dim, is_shared in enumerate(self.is_shared):
            if is_shared:
                count = collectives.all_reduce(count, "sum", (self.mesh, dim))
        return count

    def sum(self, loss: Tensor) -> Tensor:
        placements = [Partial() if is_shared else Replicate() for is_shared in self.is_shared]
        return DTensor.from_local(loss, self.mesh, placements, run_check=False)

    def losses(self, losses: Tensor) -> Tensor:
        placements = [
            Shard(0) if a.is_shard() else Shard(1) if b.is_shard() else Replicate()
            for a, b in zip(self.of_rows, self.of_labels, strict=True)
        ]
        whole = (self.num_rows, self.num_labels)
        return DTensor.from_local(
            losses, self.mesh, placements, run_check=False, shape=torch.Size(whole), stride=(whole[1], 1)
        )


def _check_places(what: str, places: Tensor, count: int) -> None:
    if ((places < 0) | (places >= count)).any():
        raise RuntimeError(
            f"linear_binary_cross_entropy_with_logits: expected the sparse target to have {what} from 0 to {count - 1}"
        )


def _whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
