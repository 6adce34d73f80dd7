"""Run by test_linear_sharded.py under torch.distributed.run: each case against one process that has all rows and labels."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from linear_cases import KINDS, make_case
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import bce_ext
import bce_ext.functional as F

ROWS, FEATURES = 6, 3
LOSS = F.linear_binary_cross_entropy_with_logits


def full(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(actual: Tensor | None, expected: Tensor | None) -> None:
    torch.testing.assert_close(full(actual), expected, rtol=1e-12, atol=1e-14)


def run(labels: int, kind: str, reduction: str, weighted: bool, ignore_index: float | None) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    case = make_case(ROWS, FEATURES, labels, kind)
    keywords = {"reduction": reduction, "ignore_index": ignore_index}
    if weighted:
        keywords["weight"] = torch.linspace(0.5, 1.5, labels, dtype=torch.float64)
        keywords["pos_weight"] = torch.linspace(1, 2, ROWS * labels, dtype=torch.float64).view(ROWS, labels)
    whole = case.leaves()
    expected = LOSS(whole[0], whole[1], case.target, linear_bias=whole[2], **keywords)
    expected.sum().backward()

    input = case.input.clone().requires_grad_()
    linear_weight, linear_bias = (
        distribute_tensor(tensor, mesh, [Shard(0)]).requires_grad_() for tensor in case.leaves()[1:]
    )
    targets = [case.target]
    if kind in ("dense", "bool"):
        targets.append(distribute_tensor(case.target, mesh, [Shard(1)]))
    for target in targets:
        for leaf in (input, linear_weight, linear_bias):
            leaf.grad = None
        loss = LOSS(input, linear_weight, target, linear_bias=linear_bias, **keywords)
        assert isinstance(loss, DTensor)
        assert loss.placements == (Shard(1),) if reduction == "none" else loss.placements[0].is_partial()
        same(loss.detach(), expected.detach())
        loss.sum().backward()
        same(input.grad, whole[0].grad)
        same(linear_weight.grad, whole[1].grad)
        same(linear_bias.grad, whole[2].grad)
        assert linear_weight.grad is not None
        assert linear_weight.grad.placements == (Shard(0),)


def even_and_uneven() -> None:
    for labels in (8, 7, 2):  # 2: some processes have none
        for kind in KINDS:
            run(labels, kind, "mean", weighted=False, ignore_index=None)
    for reduction in ("none", "mean", "sum"):
        run(7, "csr", reduction, weighted=True, ignore_index=None)
    for kind in KINDS:
        run(7, kind, "mean", weighted=True, ignore_index=0)


def rows_and_labels() -> None:
    """A mesh of two dimensions: rows along one, labels along the other."""
    mesh = init_device_mesh("cpu", (2, 2))
    for kind in KINDS:
        case = make_case(ROWS, FEATURES, 7, kind)
        whole = case.leaves()
        expected = LOSS(whole[0], whole[1], case.target, linear_bias=whole[2])
        expected.backward()
        input = distribute_tensor(case.input, mesh, [Shard(0), Replicate()]).requires_grad_()
        linear_weight, linear_bias = (
            distribute_tensor(tensor, mesh, [Replicate(), Shard(0)]).requires_grad_() for tensor in case.leaves()[1:]
        )
        loss = LOSS(input, linear_weight, case.target, linear_bias=linear_bias)
        same(loss.detach(), expected.detach())
        loss.backward()
        for leaf, other in zip((input, linear_weight, linear_bias), whole, strict=True):
            same(leaf.grad, other.grad)


def fsdp() -> None:
    """Around the module alone, and around its layer, too: the parameters of that are there during a call of it only."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    case = make_case(4 * ROWS, FEATURES, 7, "class indices")
    own = slice(dist.get_rank() * ROWS, (dist.get_rank() + 1) * ROWS)
    for layer_by_itself in (False, True):
        torch.manual_seed(0)
        whole = bce_ext.LinearBCEWithLogitsLoss(FEATURES, 7, dtype=torch.float64)
        torch.manual_seed(0)
        sharded = bce_ext.LinearBCEWithLogitsLoss(FEATURES, 7, dtype=torch.float64)
        if layer_by_itself:
            fully_shard(sharded.linear, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for _ in range(2):
            whole(case.input, case.target).backward()
            sharded(case.input[own], case.target[own]).backward()
        for parameter, other in zip(sharded.parameters(), whole.parameters(), strict=True):
            same(parameter.grad, other.grad)


def parallel_style_of_the_layer() -> None:
    """Its hooks move tensors between processes. The loss does that by itself, and no process has the logits of another."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    case = make_case(ROWS, FEATURES, 8, "class indices")
    torch.manual_seed(0)
    loss = bce_ext.LinearBCEWithLogitsLoss(FEATURES, 8, dtype=torch.float64)
    expected = loss(case.input, case.target)
    expected.backward()
    gradients = [full(parameter.grad).clone() for parameter in loss.parameters()]
    loss.zero_grad()
    parallelize_module(loss.linear, mesh, ColwiseParallel())
    actual = loss(case.input, case.target)
    assert isinstance(actual, DTensor)
    assert actual.placements[0].is_partial()
    actual.backward()
    same(actual.detach(), expected.detach())
    for parameter, gradient in zip(loss.parameters(), gradients, strict=True):
        same(parameter.grad, gradient)
    with CommDebugMode() as communication:
        loss(case.input, case.target)
    assert not communication.get_total_counts()

    handle = loss.linear.register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(RuntimeError, match="no other hooks"):
        loss(case.input, case.target)
    handle.remove()
    loss.linear.forward = lambda input: input  # an adapter would have the logits of this process only
    with pytest.raises(RuntimeError, match="no other hooks"):
        loss(case.input, case.target)


def errors() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    case = make_case(ROWS, FEATURES, 8)
    by_features = distribute_tensor(case.linear_weight, mesh, [Shard(1)])
    by_labels = distribute_tensor(case.linear_weight, mesh, [Shard(0)])
    by_rows = distribute_tensor(case.input, mesh, [Shard(0)])
    for input, linear_weight, target in (
        (case.input, by_features, case.target),
        (by_rows, by_labels, case.target),
        (case.input, by_labels, case.target[:, :5]),
        (case.input, by_labels, case.target[:4]),
        (case.input, by_labels, torch.ones(5, dtype=torch.int64)),
        (case.input, by_labels, torch.ones(ROWS)),
        (case.input, by_labels, torch.ones(ROWS, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match="expected"):
            LOSS(input, linear_weight, target)
    with pytest.raises(IndexError):
        LOSS(case.input, by_labels, torch.tensor([0, 1, 2, 3, 4, 8]))
    on_every_process = distribute_tensor(torch.tensor([0, 1, 2, 3, 4, 8]), mesh, [Replicate()])
    with pytest.raises(IndexError):
        LOSS(case.input, by_labels, on_every_process)
    outside = torch.sparse_coo_tensor(torch.tensor([[0, 1], [2, 9]]), torch.ones(2), (ROWS, 8), check_invariants=False)
    bad_rows = torch.sparse_csr_tensor(
        torch.tensor([0, 1, 1, 1, 1, 1, 2]), torch.tensor([2, 9]), torch.ones(2), (ROWS, 8), check_invariants=False
    )
    for target in (outside, bad_rows):
        with pytest.raises(RuntimeError):
            LOSS(case.input, by_labels, target)


def values_of_a_sparse_target_that_require_grad() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    case = make_case(ROWS, FEATURES, 8)
    by_labels = distribute_tensor(case.linear_weight, mesh, [Shard(0)])
    gradients = []
    for linear_weight in (case.linear_weight, by_labels):
        values = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, requires_grad=True)
        target = torch.sparse_coo_tensor(torch.tensor([[0, 3, 5], [1, 7, 2]]), values, (ROWS, 8))
        LOSS(case.input, linear_weight, target).backward()
        gradients.append(values.grad)
    same(gradients[1], full(gradients[0]))


def shared_tensors_that_require_grad() -> None:
    """Each process has all of them, and gets the gradient of the whole loss."""
    processes = dist.get_world_size()
    for labels in (8, 2):  # 2: some processes have none
        case = make_case(ROWS, FEATURES, labels, "dense")
        given = {
            "target": case.target,
            "weight": torch.linspace(0.5, 1.5, ROWS, dtype=torch.float64).view(ROWS, 1),
            "pos_weight": torch.linspace(1, 2, labels, dtype=torch.float64),
            "normalizer": torch.tensor(3.0, dtype=torch.float64),
        }

        def gradients(
            input: Tensor, linear_weight: Tensor, place: Callable[[Tensor], Tensor], given: dict[str, Tensor] = given
        ) -> list[Tensor | None]:
            leaves = {name: place(tensor.clone()).requires_grad_() for name, tensor in given.items()}
            keywords = {name: leaf for name, leaf in leaves.items() if name != "target"}
            LOSS(input, linear_weight, leaves["target"], **keywords).backward()
            return [leaf.grad for leaf in leaves.values()]

        expected = gradients(case.input, case.linear_weight, lambda tensor: tensor)
        by_labels = (init_device_mesh("cpu", (processes,)), [Replicate()], [Shard(0)])
        by_both = (init_device_mesh("cpu", (2, processes // 2)), [Shard(0), Replicate()], [Replicate(), Shard(0)])
        for mesh, of_rows, of_labels in (by_labels, by_both):
            input = distribute_tensor(case.input, mesh, of_rows)
            linear_weight = distribute_tensor(case.linear_weight, mesh, of_labels)
            on_all = [Replicate()] * mesh.ndim
            for place in (lambda tensor: tensor, lambda tensor: distribute_tensor(tensor, mesh, on_all)):  # noqa: B023
                for actual, other in zip(gradients(input, linear_weight, place), expected, strict=True):
                    same(actual, full(other))


CHECKS: tuple[Callable[[], None], ...] = (
    even_and_uneven,
    rows_and_labels,
    fsdp,
    parallel_style_of_the_layer,
    errors,
    values_of_a_sparse_target_that_require_grad,
    shared_tensors_that_require_grad,
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for check in CHECKS:
        check()
    dist.barrier()
    dist.destroy_process_group()
    # A thread of gloo that is still there while the interpreter is torn down would abort the process.
    sys.stdout.flush()
    os._exit(0)
