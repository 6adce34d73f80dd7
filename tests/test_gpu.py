"""What only a GPU can show: streams, several devices, CUDA graphs, no waiting for the device, sizes above 2^31."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu import WHY_NO_CUDA
from torch import Tensor

import bce_ext

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NO_CUDA is not None, reason=str(WHY_NO_CUDA))]

loss_of = bce_ext.functional.binary_cross_entropy_with_logits


def example(device: str = "cuda", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(257, 33, device=device, dtype=dtype, requires_grad=True), torch.rand(257, 33, device=device)


def expected(input: Tensor, target: Tensor, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    """Native in float64."""
    x = input.detach().double().requires_grad_()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(x, target.double(), reduction=reduction)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), gradient


@pytest.fixture
def _error_on_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("factor", [1.0, 0.25])  # whether the stored gradient is scaled is decided on the device
@pytest.mark.usefixtures("_error_on_sync")
def test_nothing_waits_for_the_device(reduction: str, factor: float) -> None:
    input, target = example()
    loss = loss_of(
        input, target, pos_weight=torch.tensor(2.0), reduction=reduction
    )  # a CPU scalar goes with any device
    loss.backward(torch.full_like(loss, factor))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_current_stream_is_used(reduction: str) -> None:
    input, target = example()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what ran on another stream would read the values from before the multiplication
        scaled = input * 3
        loss = loss_of(scaled, target, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss.sum(), scaled)
    torch.cuda.current_stream().wait_stream(stream)
    want_loss, want_gradient = expected(input * 3, target, reduction)
    torch.testing.assert_close(loss, want_loss.float())
    torch.testing.assert_close(gradient, want_gradient.float())


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_cuda_graph_replays_forward_and_backward(reduction: str) -> None:
    input, target = example()
    factor = torch.ones((), device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        loss = loss_of(input, target, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss, input, factor.expand_as(loss))
        return loss, gradient

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step()
    for scale in (1.0, 0.5):  # captured with 1: the replay must look at the value anew
        with torch.no_grad():
            input.copy_(torch.randn_like(input))
        factor.fill_(scale)
        graph.replay()
        want_loss, want_gradient = expected(input, target, reduction)
        torch.testing.assert_close(loss, want_loss.float())
        torch.testing.assert_close(gradient, (want_gradient * scale).float())


def test_the_device_of_the_input_is_used() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    input, target = example("cuda:1")  # not the current device
    loss = loss_of(input, target)
    loss.backward()
    want_loss, want_gradient = expected(input, target)
    torch.testing.assert_close(loss, want_loss.float())
    torch.testing.assert_close(input.grad, want_gradient.float())


def test_results_are_the_same_from_run_to_run() -> None:
    input, target = example()
    losses = {loss_of(input, target).item() for _ in range(20)}
    assert len(losses) == 1


def test_more_than_2_to_the_31_elements() -> None:
    numel = 2**31 + 2**20 + 3  # an odd number of elements: the last vector is not full
    if torch.cuda.mem_get_info()[0] < 6 * numel:
        pytest.skip("needs 13 GB of GPU memory")
    input = torch.zeros(numel, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    target = torch.zeros(numel, dtype=torch.bool, device="cuda")
    target[-1] = True
    loss_of(input, target, reduction="sum").backward()
    assert input.grad is not None
    assert input.grad[:-1].eq(0.5).all()
    assert input.grad[-1] == -0.5
