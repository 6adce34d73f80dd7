"""Two processes over gloo: DDP and FSDP2 train as one process does, and DTensors are never gathered."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from callables import CROSS_ENTROPIES, EVERY_FORMULA, Member
from torch import Tensor

import bce_ext

WORLD = 2
ROWS, CLASSES = 6, 5  # the classes do not divide evenly

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)

Scenario = Callable[[], Any]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, CLASSES))


def make_batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(ROWS, 8), torch.rand(ROWS, CLASSES)) for _ in range(4)]


def train(model: torch.nn.Module, share: slice) -> list[float]:
    """SGD with every loss; returns the losses of the share of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with_logits = bce_ext.BCEWithLogitsLoss(pos_weight=torch.linspace(0.5, 2, CLASSES))
    probabilities = bce_ext.BCELoss()
    focal = bce_ext.SigmoidFocalLoss(label_smoothing=0.1)
    asymmetric = bce_ext.AsymmetricLoss(ignore_index=-100)
    losses = []
    for input, target in make_batches():
        logits = model(input[share])
        own = target[share]
        loss = with_logits(logits, own) + probabilities(logits.sigmoid(), own) + focal(logits, own)
        # A mean over all elements: the processes ignore different numbers of them.
        loss = loss + asymmetric(logits, torch.where(own < 0.3, -100.0, own), torch.tensor(float(own.numel())))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def own_share() -> slice:
    rows = ROWS // WORLD
    return slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)


@scenario
def ddp() -> Any:
    model = torch.nn.parallel.DistributedDataParallel(make_model())
    losses = train(model, own_share())
    return losses, [parameter.detach() for parameter in model.parameters()]


@scenario
def fsdp() -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = train(model, own_share())
    return losses, [parameter.full_tensor().detach() for parameter in model.parameters()]  # type: ignore[operator]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "ignoring": {"ignore_index": 1.0},
    "normalized": {"normalizer": 7.0},
}


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int]
    dim: int
    loss: Member
    reduction: str
    weights: str
    options: str

    def __str__(self) -> str:
        words = (self.shape, self.dim, self.loss.name, self.reduction, self.weights, self.options)
        return "-".join(map(str, words))


EVEN, UNEVEN, EMPTY = (6, 4), (5, 3), (1, 3)  # the shards, where they are of the first dimension
REDUCTIONS = ("none", "mean", "sum")
DTENSOR_CASES = [
    Case(shape, dim, loss, reduction, weights, "plain")
    for shape in (EVEN, UNEVEN, EMPTY)
    for dim in (0, 1)
    for loss in CROSS_ENTROPIES
    for reduction in REDUCTIONS
    for weights in ("none", "class", "full", "scalar")
]
DTENSOR_CASES += [
    Case(shape, dim, loss, reduction, "class", options)
    for shape in (EVEN, UNEVEN, EMPTY)
    for dim in (0, 1)
    for loss in EVERY_FORMULA
    for options in OPTIONS
    for reduction in (("mean",) if options == "normalized" else REDUCTIONS)
    if not (options == "plain" and loss in CROSS_ENTROPIES)
]


@scenario
def dtensor() -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (WORLD,))
    results = []
    for case in DTENSOR_CASES:
        torch.manual_seed(0)
        shape = case.shape
        input, target = torch.rand(shape), (1.5 * torch.rand(shape)).clamp(max=1)
        weight = {"none": None, "class": torch.rand(shape[1:]), "full": torch.rand(shape), "scalar": torch.rand(())}[
            case.weights
        ]
        name = "pos_weight" if case.loss.of_logits else "weight"
        arguments = {"reduction": case.reduction, **OPTIONS[case.options]}

        leaves = [input.requires_grad_(), target.requires_grad_(case.weights == "full")]
        leaves = [leaf for leaf in leaves if leaf.requires_grad]
        expected = case.loss(input, target, **{name: weight}, **arguments)
        expected_gradients = torch.autograd.grad(expected.sum(), leaves)

        sharded = [
            distribute_tensor(each.detach(), mesh, [Shard(case.dim)]).requires_grad_(each.requires_grad)
            for each in (input, target)
        ]
        sharded_weight = None if weight is None else distribute_tensor(weight, mesh, [Replicate()])
        sharded_leaves = [leaf for leaf in sharded if leaf.requires_grad]
        with CommDebugMode() as communication:
            actual = case.loss(*sharded, **{name: sharded_weight}, **arguments)
            gradients = torch.autograd.grad(actual.sum(), sharded_leaves)
        assert isinstance(actual, DTensor)
        torch.testing.assert_close(actual.full_tensor(), expected.detach(), equal_nan=True)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient.full_tensor(), expected_gradient)
        for no_graph in (torch.no_grad, torch.inference_mode):
            with no_graph():
                again = case.loss(*sharded, **{name: sharded_weight}, **arguments)
                torch.testing.assert_close(again.full_tensor(), expected.detach(), equal_nan=True)
        results.append(
            (
                str(actual.placements),
                [str(gradient.placements) for gradient in gradients],
                {str(key): count for key, count in communication.get_comm_counts().items() if count},
            )
        )
    return results


@scenario
def native_dtensor() -> Any:
    """How far native's mean is off, where the shards are even and where they are not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    errors = []
    for shape in ((6, 3), (5, 3)):
        torch.manual_seed(0)
        input, target = torch.rand(shape), torch.rand(shape)
        sharded = [distribute_tensor(each, mesh, [Shard(0)]) for each in (input, target)]
        loss: Any = F.binary_cross_entropy(*sharded)
        errors.append((loss.full_tensor() - F.binary_cross_entropy(input, target)).abs().item())
    return errors


@scenario
def dtensor_two_dimensional() -> Any:
    """Batch and classes sharded at once, on a mesh of two dimensions."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD, 1))
    torch.manual_seed(0)
    input, target = torch.rand(5, 3).requires_grad_(), torch.rand(5, 3)
    expected = bce_ext.functional.binary_cross_entropy_with_logits(input, target)
    (expected_gradient,) = torch.autograd.grad(expected, input)
    sharded = distribute_tensor(input.detach(), mesh, [Shard(0), Shard(1)]).requires_grad_()
    loss = bce_ext.functional.binary_cross_entropy_with_logits(
        sharded, distribute_tensor(target, mesh, [Shard(0), Shard(1)])
    )
    (gradient,) = torch.autograd.grad(loss, sharded)
    torch.testing.assert_close(loss.full_tensor(), expected.detach())  # type: ignore[attr-defined]
    torch.testing.assert_close(gradient.full_tensor(), expected_gradient)
    return str(loss.placements), str(gradient.placements)  # type: ignore[attr-defined]


@scenario
def autocast_and_double_backward() -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    input, target = torch.randn(5, 3), torch.rand(5, 3)

    def second(input: Tensor, target: Tensor) -> Tensor:
        loss = bce_ext.functional.binary_cross_entropy_with_logits(input, target)
        (first,) = torch.autograd.grad(loss, input, create_graph=True)
        return torch.autograd.grad(first.sum(), input)[0]

    sharded = [distribute_tensor(each, mesh, [Shard(0)]) for each in (input, target)]
    actual = second(sharded[0].requires_grad_(), sharded[1])
    torch.testing.assert_close(actual.full_tensor(), second(input.requires_grad_(), target))  # type: ignore[attr-defined]
    half = distribute_tensor(input.detach().bfloat16(), mesh, [Shard(0)])
    with torch.autocast("cpu", torch.bfloat16):
        loss = bce_ext.functional.binary_cross_entropy_with_logits(half, sharded[1])
    return str(loss.dtype)


def worker(rank: int, port: int, directory: str) -> None:
    """Runs every scenario, so that the processes start once, and leaves for each what it returned or the error that it raised."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    for name, function in SCENARIOS.items():
        try:
            outcome = function()
        except Exception as error:
            outcome = error
        torch.save(outcome if not isinstance(outcome, Exception) else repr(outcome), Path(directory) / f"{name}.{rank}")
        dist.barrier()
    leave_together(rank, Path(directory))


def leave_together(rank: int, directory: Path) -> None:
    """Ends the process when all are done: gloo aborts one whose peer is gone, and one whose interpreter is torn down with its threads."""
    (directory / f"done.{rank}").touch()
    while len(list(directory.glob("done.*"))) < WORLD:
        time.sleep(0.01)
    os._exit(0)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    directory = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "import sys; sys.path.insert(0, sys.argv[1]); import test_distributed as t; t.worker(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])"
    command = [sys.executable, "-X", "faulthandler", "-c", program, str(Path(__file__).parent)]
    processes = [
        subprocess.Popen([*command, str(rank), str(port), str(directory)], stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    # The last words of a process that a signal ended come last: what the others then say follows from it.
    ends = sorted(zip((process.returncode for process in processes), errors, strict=True), reverse=True)
    assert all(code == 0 for code, _ in ends), "\n".join(
        f"exit status {code}:\n{error[-6000:]}" for code, error in ends
    )
    return {name: [torch.load(directory / f"{name}.{rank}") for rank in range(WORLD)] for name in SCENARIOS}


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_training_matches_one_process(name: str, outcomes: dict[str, list[Any]]) -> None:
    model = make_model()
    expected_losses = train(model, slice(None))
    ranks = outcomes[name]
    assert not any(isinstance(rank, str) for rank in ranks), ranks
    mean_losses = [sum(losses) / WORLD for losses in zip(*(losses for losses, _ in ranks), strict=True)]
    torch.testing.assert_close(mean_losses, expected_losses, rtol=1e-5, atol=1e-6)
    for _, parameters in ranks:
        torch.testing.assert_close(parameters, [p.detach() for p in model.parameters()], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("index", "case"), list(enumerate(DTENSOR_CASES)), ids=str)
def test_dtensor_is_not_gathered(index: int, case: Case, outcomes: dict[str, list[Any]]) -> None:
    """The loss is a partial sum, the gradient is sharded as the input, and nothing but the number of ignored elements is communicated."""
    for rank in outcomes["dtensor"]:
        assert not isinstance(rank, str), rank
        loss_placement, gradient_placements, communication = rank[index]
        assert loss_placement == (f"(Shard(dim={case.dim}),)" if case.reduction == "none" else "(Partial(sum),)")
        assert all(placement == f"(Shard(dim={case.dim}),)" for placement in gradient_placements)
        if case.reduction == "mean" and case.options == "ignoring":
            assert list(communication) == ["c10d_functional.all_reduce"]
        else:
            assert not communication


def test_native_dtensor(outcomes: dict[str, list[Any]]) -> None:
    """Native averages the means of the shards, as if all were of one size."""
    for even, uneven in outcomes["native_dtensor"]:
        assert even < 1e-6
        if uneven < 1e-6:
            pytest.skip("this torch has it right: docs/compatibility.md should say so")


def test_dtensor_on_a_mesh_of_two_dimensions(outcomes: dict[str, list[Any]]) -> None:
    for rank in outcomes["dtensor_two_dimensional"]:
        assert rank == ("(Partial(sum), Partial(sum))", "(Shard(dim=0), Shard(dim=1))"), rank


def test_dtensor_under_autocast_and_twice_differentiated(outcomes: dict[str, list[Any]]) -> None:
    assert outcomes["autocast_and_double_backward"] == ["torch.float32"] * WORLD


def test_importing_the_package_does_not_import_dtensor() -> None:
    program = """
import sys, bce_ext
assert "torch.distributed.tensor" not in sys.modules
finders = len(sys.meta_path)
import torch.distributed.tensor as tensor
import torch
assert len(sys.meta_path) == finders - 1
assert tensor.__spec__.loader is tensor.__loader__
known = tensor.DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
assert torch.ops.bce_ext._bce_loss.default in known
"""
    subprocess.run([sys.executable, "-c", program], check=True)
