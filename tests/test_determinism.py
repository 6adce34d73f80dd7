"""Sum and mean have the same bits for any number of threads and from run to run, with and without a gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from callables import CROSS_ENTROPIES, Member, every_formula, every_member
from linear_cases import make_case
from reference import CHUNK, FLOATING_DTYPES, make_logits, make_targets, make_weights
from torch import Tensor

import bce_ext.functional as F

# One chunk, a chunk and one element, an odd number of chunks with an odd rest: what is left over falls to another
# thread each time. With and without weights, since the logarithms of equally weighted losses are added in another way.
SIZES = [CHUNK, CHUNK + 1, 37 * CHUNK + 1031]


WITH_LOGITS = CROSS_ENTROPIES[0]


def evaluate(
    loss: Member, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor]:
    """The loss, computed with its gradient and without, and the gradient."""
    input = input.detach().requires_grad_()
    value = loss(input, target, weight=weight, reduction=reduction)
    (gradient,) = torch.autograd.grad(value, input)
    with torch.no_grad():
        alone = loss(input, target, weight=weight, reduction=reduction)
    assert torch.equal(value, alone)
    return alone, gradient


def make_problem(
    loss: Member, numel: int, dtype: torch.dtype, device: str, weighted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    shape = (numel,)
    weight = make_weights(shape, dtype, device) if weighted else None
    return loss.make_input(shape, dtype, device), make_targets(shape, dtype, device), weight


@pytest.mark.usefixtures("restore_threads")
@every_formula
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", FLOATING_DTYPES, ids=str)
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_number_of_threads_does_not_matter(
    weighted: bool, numel: int, dtype: torch.dtype, reduction: str, loss: Member
) -> None:
    problem = make_problem(loss, numel, dtype, "cpu", weighted)
    torch.set_num_threads(1)
    expected = evaluate(loss, *problem, reduction)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for _ in range(2):
            actual = evaluate(loss, *problem, reduction)
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.usefixtures("restore_threads")
@every_formula
@pytest.mark.parametrize("weighted", [False, True])
def test_nor_does_it_where_targets_lie_in_another_order(weighted: bool, loss: Member) -> None:
    shape = (3, 700, 41)  # rectangles of 192 rows, the last ones of 124
    input, target, weight = (
        tensor if tensor is None else tensor.view(shape)
        for tensor in make_problem(loss, 3 * 700 * 41, torch.float32, "cpu", weighted)
    )
    target = target.mT.contiguous().mT
    torch.set_num_threads(1)
    expected = evaluate(loss, input, target, weight, "mean")
    for threads in (2, 3):
        torch.set_num_threads(threads)
        actual = evaluate(loss, input, target, weight, "mean")
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@every_formula
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("numel", [*SIZES, 2**20 + 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_one_run_is_as_the_other(weighted: bool, numel: int, reduction: str, loss: Member, device: str) -> None:
    problem = make_problem(loss, numel, torch.float32, device, weighted)
    expected = evaluate(loss, *problem, reduction)
    for _ in range(10):
        fresh = [None if tensor is None else tensor.clone() for tensor in problem]  # in other memory
        actual = evaluate(loss, *fresh, reduction)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@every_member
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_gradient_does_not_change_the_loss(
    weighted: bool, label_smoothing: float, dtype: torch.dtype, loss: Member, device: str
) -> None:
    # Many sums: a rounding that is done in another place shows in some of them only.
    for seed in range(40):
        input, target = loss.make_input((96,), dtype, device, seed), make_targets((96,), dtype, device, seed)
        weight = make_weights((96,), dtype, device, seed) if weighted else None
        options = {"weight": weight, "label_smoothing": label_smoothing, "reduction": "sum"}
        with_gradient = loss(input.clone().requires_grad_(), target, **options)
        assert torch.equal(with_gradient.detach(), loss(input, target, **options)), seed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_cpu_gradient_of_an_element_depends_on_nothing_else(dtype: torch.dtype) -> None:
    """Neither on the layout nor on an infinite logit, for which its chunk is evaluated once more."""
    # Many elements: another exponential shows in few roundings of half precision.
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(16 * CHUNK, generator=generator)).to(dtype)
    target = torch.rand(16 * CHUNK, generator=generator).to(dtype)
    target[::CHUNK] = 0.0
    _, expected = evaluate(WITH_LOGITS, logits, target, None, "sum")

    _, of_gaps = evaluate(WITH_LOGITS, torch.stack([logits, target], 1)[:, 0], target, None, "sum")
    assert torch.equal(of_gaps, expected)
    logits[::CHUNK] = -torch.inf
    _, beside_infinity = evaluate(WITH_LOGITS, logits, target, None, "sum")
    expected[::CHUNK] = beside_infinity[::CHUNK] = 0.0
    assert torch.equal(beside_infinity, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_broadcast_weight_sums_as_the_full_one(reduction: str, device: str) -> None:
    shape = (611, 37)
    input, target = make_logits(shape, torch.float32, device), make_targets(shape, torch.float32, device)
    weight = make_weights((37,), torch.float32, device)
    expected = evaluate(WITH_LOGITS, input, target, weight.expand(shape).contiguous(), reduction)
    actual = evaluate(WITH_LOGITS, input, target, weight, reduction)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_deterministic_mode_has_nothing_to_object_to(device: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        problem = make_problem(WITH_LOGITS, CHUNK + 1, torch.float32, device, weighted=False)
        evaluate(WITH_LOGITS, *problem, "mean")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("weight", [None, 2.0])
def test_losses_too_large_for_the_caches_are_the_same(weight: float | None, dtype: torch.dtype, device: str) -> None:
    # Above 12 MiB a CPU writes them, and their gradients, past those. A chunk and one element more, as below.
    numel = 32 * 2**20 // dtype.itemsize + CHUNK + 1
    input, target = make_logits((numel,), dtype, device).requires_grad_(), make_targets((numel,), dtype, device)
    loss = F.binary_cross_entropy_with_logits(input, target, weight, reduction="none")
    loss.backward(torch.ones_like(loss))
    exact = input.detach().double().requires_grad_()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(exact, target.double(), reduction="none")
    expected = expected if weight is None else weight * expected
    expected.backward(torch.ones_like(expected))
    torch.testing.assert_close(loss, expected.to(dtype))
    torch.testing.assert_close(input.grad, exact.grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_gradient_too_large_for_the_caches_is_the_same(dtype: torch.dtype, device: str) -> None:
    # Above 12 MiB a CPU writes it past them, a third of it not. A chunk and one element more: the last block is not full.
    numel = 32 * 2**20 // dtype.itemsize + CHUNK + 1
    input, target = make_logits((numel,), dtype, device), make_targets((numel,), dtype, device)
    _, gradient = evaluate(WITH_LOGITS, input, target, None, "sum")
    torch.testing.assert_close(gradient, (torch.sigmoid(input.double()) - target.double()).to(dtype))
    for some_input, some_target, some_gradient in zip(
        input.split(numel // 3), target.split(numel // 3), gradient.split(numel // 3), strict=True
    ):
        _, expected = evaluate(WITH_LOGITS, some_input, some_target, None, "sum")
        assert torch.equal(some_gradient, expected)


def bits(function: Callable[[], list[Tensor]], threads: int) -> list[Tensor]:
    torch.set_num_threads(threads)
    return function()


def differs(function: Callable[[], list[Tensor]]) -> bool:
    """Whether the bits depend on the number of threads."""
    expected = bits(function, 1)
    return not all(
        torch.equal(a, e) for threads in (2, 3) for a, e in zip(bits(function, threads), expected, strict=True)
    )


def with_gradients(loss: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("kind", ["csr", "coo"])
@pytest.mark.parametrize("shape", [(65, 33), (1030, 4099)], ids=["small", "blocks"])
def test_threads_do_not_matter_to_sparse_targets(shape: tuple[int, int], kind: str) -> None:
    target = make_case(shape[0], 1, shape[1], kind, torch.float32).target
    logits = make_logits(shape, torch.float32, "cpu")
    assert not differs(lambda: with_gradients(lambda x: F.binary_cross_entropy_with_logits(x, target), logits))


LAYERS = [(7, 3, 13), (257, 3, 16411), (1025, 16, 4099)]  # the last two take blocks


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("kind", ["dense", "csr", "class indices"])
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_threads_do_not_matter_to_the_loss_of_exact_logits(shape: tuple[int, int, int], kind: str) -> None:
    """Products of small integers are exact in any order, so that what is left is the loss and its sum over blocks."""
    case = make_case(*shape, kind, torch.float32)
    input, linear_weight = case.input.round(), case.linear_weight.round()
    assert not differs(lambda: [F.linear_binary_cross_entropy_with_logits(input, linear_weight, case.target)])


def products_of_blocks(input: Tensor, linear_weight: Tensor, linear_bias: Tensor) -> list[Tensor]:
    """Those that the layer takes: the logits, and the sums for the gradients of input, weight and bias."""
    results = []
    rows = min(len(input), 512)
    labels = 2**19 // rows
    for weight, bias in zip(linear_weight.split(labels), linear_bias.split(labels), strict=True):
        for part in input.split(rows):
            logits = torch.addmm(bias, part, weight.T)
            results += [logits, torch.addmm(part, logits, weight), torch.addmm(weight, logits.T, part)]
            results += [logits @ weight, logits.T @ part, torch.ones_like(logits[:, :1]).T @ logits]
    return results


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("kind", ["dense", "csr", "class indices"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
def test_threads_do_not_matter_to_a_layer_whose_products_they_do_not_change(
    shape: tuple[int, int, int], dtype: torch.dtype, kind: str
) -> None:
    case = make_case(*shape, kind, dtype)
    assert case.linear_bias is not None
    layer = (case.input, case.linear_weight, case.linear_bias)
    if differs(lambda: products_of_blocks(*layer)):
        pytest.skip("the matrix products of this BLAS depend on the number of threads")
    assert not differs(
        lambda: with_gradients(
            lambda x, w, b: F.linear_binary_cross_entropy_with_logits(x, w, case.target, linear_bias=b), *layer
        )
    )
