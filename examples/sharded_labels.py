"""Trains a classifier whose labels are divided among processes, and compares it with one process that has them all.

    torchrun --nproc-per-node 4 examples/sharded_labels.py

Each process keeps its own rows of the last layer's weight, and computes the logits, the loss and the gradients of its own labels only. What the processes
exchange is the loss, one number, and the gradient of the features.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import bce_ext


class Classifier(torch.nn.Module):
    """A small network with a last layer of many labels. The same seed gives the same parameters in every process."""

    def __init__(self, inputs: int, features: int, labels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(inputs, features), torch.nn.Tanh())
        self.loss = bce_ext.LinearBCEWithLogitsLoss(features, labels)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.body(input), target)  # type: ignore[no-any-return]


def shard_labels(model: Classifier, mesh: DeviceMesh) -> None:
    """Divides the rows of the last layer among the processes, evenly or not."""
    layer = model.loss.linear
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))


def make_batches(steps: int, rows: int, inputs: int, labels: int, sparse: bool) -> list[tuple[Tensor, Tensor]]:
    """Random inputs and targets: sparse ones with three labels a row, or class indices."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(steps):
        target = torch.randint(labels, (rows, 3), generator=generator)
        input = torch.randn(rows, inputs, generator=generator)
        if sparse:
            indices = torch.stack([torch.arange(rows).repeat_interleave(3), target.flatten()])
            values = torch.ones(indices.shape[1])
            batches.append((input, torch.sparse_coo_tensor(indices, values, (rows, labels), check_invariants=True)))
        else:
            batches.append((input, target[:, 0]))
    return batches


def train(model: Classifier, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=2000.0, foreach=False)
    losses = []
    for input, target in batches:
        optimizer.zero_grad()
        loss = model(input, target)
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        losses.append((loss.full_tensor() if isinstance(loss, DTensor) else loss).item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=50_001, help="not a multiple of the processes: uneven shards")
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--class-indices", action="store_true", help="one label a row instead of a sparse target")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank = dist.get_rank()
    inputs = 16
    batches = make_batches(arguments.steps, arguments.rows, inputs, arguments.labels, not arguments.class_indices)

    sharded = Classifier(inputs, arguments.features, arguments.labels)
    shard_labels(sharded, mesh)
    losses = train(sharded, batches)
    whole = Classifier(inputs, arguments.features, arguments.labels)
    expected = train(whole, batches)

    weight = sharded.loss.linear.weight
    assert isinstance(weight, DTensor)
    own = weight.to_local().shape[0]
    print(f"process {rank} has {own} of {arguments.labels} labels", flush=True)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)
    for (name, parameter), other in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        torch.testing.assert_close(full, other, rtol=1e-4, atol=1e-6, msg=f"{name} differs from that of one process")
    dist.barrier()
    if rank == 0:
        for step, (loss, one) in enumerate(zip(losses, expected, strict=True)):
            print(f"step {step}: loss {loss:.6f}, in one process {one:.6f}")
        print("the same parameters")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # A thread of gloo that is still there while the interpreter is torn down would abort the process.
    sys.stdout.flush()
    os._exit(0)
