"""Sparse targets of every make: the host reads their memory, so that whatever is odd about it must be seen. They equal their dense form or raise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import bce_ext.functional as F

pytestmark = [pytest.mark.filterwarnings("ignore:Sparse"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

ROWS, LABELS = 3, 5
SIZES = [LABELS, 1_400_000]  # labels: the plain form, and blocks
PLACES = torch.tensor([[0, 2, 2, 0], [1, 0, 4, 1]])  # one of them twice
VALUES = torch.tensor([0.25, 1.0, 0.5, 0.5], dtype=torch.float64)


def coo(values: Tensor, labels: int = LABELS, places: Tensor = PLACES) -> Tensor:
    return torch.sparse_coo_tensor(places, values, (ROWS, labels), check_invariants=False)


def csr(
    values: Tensor,
    labels: int = LABELS,
    columns: Sequence[int] = (1, 1, 4, 0),
    index: torch.dtype = torch.int64,
) -> Tensor:
    crow, col = torch.tensor([0, 2, 2, 4], dtype=index), torch.tensor(columns, dtype=index)
    return torch.sparse_csr_tensor(crow, col, values, (ROWS, labels), check_invariants=False)


def dense_form(target: Tensor) -> Tensor:
    """In float64, by one addition after the other."""
    dense = torch.zeros(target.shape, dtype=torch.float64)
    if target.layout == torch.sparse_csr:
        rows = torch.arange(ROWS).repeat_interleave(target.crow_indices().diff())
        places = (rows, target.col_indices().long())
    else:
        places = tuple(target._indices())
    values = target.values() if target.layout == torch.sparse_csr else target._values()
    return dense.index_put(places, values.detach().double(), accumulate=True)


def losses(labels: int, size: tuple[int, ...] = (ROWS,)) -> list[Callable[[Tensor], list[Tensor]]]:
    """The loss with its gradients, of a layer and of logits."""
    generator = torch.Generator().manual_seed(0)
    input, logits, linear_weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((*size, 2), (*size, labels), (labels, 2))
    )

    def layer(target: Tensor) -> list[Tensor]:
        loss = F.linear_binary_cross_entropy_with_logits(input, linear_weight, target)
        return [loss, *torch.autograd.grad(loss, [input, linear_weight])]

    def plain(target: Tensor) -> list[Tensor]:
        loss = F.binary_cross_entropy_with_logits(logits, target)
        return [loss, *torch.autograd.grad(loss, logits)]

    return [layer, plain]


def assert_as_dense(target: Tensor, dense: Tensor | None = None) -> None:
    dense = dense_form(target) if dense is None else dense
    for loss in losses(target.shape[-1], target.shape[:-1]):
        torch.testing.assert_close(loss(target), loss(dense), rtol=1e-12, atol=1e-300, equal_nan=True)


@pytest.mark.parametrize("labels", SIZES)
@pytest.mark.parametrize("make", [csr, coo])
def test_values_of_every_make(make: Callable[..., Tensor], labels: int) -> None:
    hard = torch.tensor([0, 1, 1, 1], dtype=torch.uint8)
    halves = [VALUES.to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    integers = [hard.to(dtype) for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)]
    one = torch.ones(1, dtype=torch.float64).expand(4)
    every_other = torch.stack([VALUES, 7 * VALUES], 1)[:, 0]
    negated = torch.complex(VALUES, -VALUES).conj().imag
    assert negated.is_neg()
    for values in (*halves, *integers, hard.bool(), one, every_other, negated):
        assert_as_dense(make(values, labels))
    with_nan = VALUES.clone()
    with_nan[2] = torch.nan
    assert_as_dense(make(with_nan, labels))
    assert_as_dense(make((2 * hard).view(torch.bool), labels), dense_form(make(hard.bool(), labels)).bool().double())


@pytest.mark.parametrize("labels", SIZES)
@pytest.mark.parametrize("make", [csr, coo])
def test_integers_that_are_no_labels(make: Callable[..., Tensor], labels: int) -> None:
    for values in ([1, 2, 0, 0], [2**63 - 1, 1, 0, 2**63 - 1], [-1, 0, 0, 0]):
        for loss in losses(labels):
            with pytest.raises(RuntimeError, match="to be 0 or 1"):
                loss(make(torch.tensor(values), labels))


@pytest.mark.parametrize("labels", SIZES)
def test_indices_of_every_make(labels: int) -> None:
    assert_as_dense(csr(VALUES, labels, index=torch.int32))
    assert_as_dense(coo(VALUES, labels, PLACES.t().contiguous().t()))
    assert_as_dense(coo(VALUES[:1].expand(4), labels, torch.tensor([[1], [3]]).expand(2, 4)))  # one place, four times
    assert_as_dense(coo(VALUES[:0], labels, PLACES[:, :0]))
    assert_as_dense(coo(VALUES, labels, PLACES.int()))
    assert_as_dense(coo(VALUES, labels).coalesce())


def misaligned(tensor: Tensor) -> Tensor:
    """The same numbers where torch.frombuffer finds them in a file that was read: between the multiples of their size."""
    count = tensor.numel()
    memory = bytearray(count * tensor.itemsize + 1)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=1).view(tensor.shape)
    assert copy.data_ptr() % tensor.itemsize
    return copy.copy_(tensor)


@pytest.mark.parametrize("labels", SIZES)
def test_memory_that_is_not_aligned(labels: int) -> None:
    """Nothing shows on x86-64 but under UndefinedBehaviorSanitizer; other processors stop."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        values = misaligned(VALUES.to(dtype))
        assert_as_dense(csr(values, labels))
        assert_as_dense(coo(values, labels, misaligned(PLACES)))
    crow, col = misaligned(torch.tensor([0, 2, 2, 4])), misaligned(torch.tensor([1, 1, 4, 0]))
    assert_as_dense(torch.sparse_csr_tensor(crow, col, VALUES, (ROWS, labels)))
    indices = torch.tensor([4, -1, 0])
    layer, _ = losses(labels)
    torch.testing.assert_close(layer(misaligned(indices)), layer(indices), rtol=0, atol=0)


@pytest.mark.parametrize("labels", SIZES)
def test_several_dimensions_before_the_labels(labels: int) -> None:
    places = torch.tensor([[0, 1, 1], [2, 0, 2], [1, 0, 4]])
    assert_as_dense(torch.sparse_coo_tensor(places, VALUES[:3], (2, 3, labels)))
    assert_as_dense(torch.sparse_coo_tensor(places[:1], VALUES[:3], (labels,)))
    for d, bad in enumerate((2, 3, labels)):
        for index in (bad, -1):
            others = places.clone()
            others[d, 1] = index
            target = torch.sparse_coo_tensor(others, VALUES[:3], (2, 3, labels), check_invariants=False)
            for loss in losses(labels, (2, 3)):
                with pytest.raises(
                    RuntimeError, match="labels from 0" if d == 2 else f"size \\({bad}\\) in dimension {d}"
                ):
                    loss(target)


BAD_CSR: dict[str, tuple[list[int], list[int], int, str]] = {
    "crow_indices too short": ([0, 2, 4], [1, 1, 4, 0], 4, "expected crow_indices of size 4"),
    "crow_indices too long": ([0, 2, 2, 4, 4], [1, 1, 4, 0], 4, "expected crow_indices of size 4"),
    "no crow_indices": ([], [1, 1, 4, 0], 4, "expected crow_indices of size 4"),
    "fewer values than labels": ([0, 2, 2, 4], [1, 1, 4, 0], 3, "as many col_indices as values"),
    "more values than labels": ([0, 2, 2, 5], [1, 1, 4, 0], 5, "as many col_indices as values"),
    "a row that ends behind the values": ([0, 9, 9, 4], [1, 1, 4, 0], 4, "rise from 0"),
    "a row that begins before the values": ([0, -7, 2, 4], [1, 1, 4, 0], 4, "rise from 0"),
    "rows that begin late": ([1, 2, 2, 4], [1, 1, 4, 0], 4, "rise from 0"),
    "rows that end early": ([0, 2, 2, 3], [1, 1, 4, 0], 4, "rise from 0"),
    "a negative label": ([0, 2, 2, 4], [1, 1, -1, 0], 4, "labels from 0"),
    "the least label that there is": ([0, 2, 2, 4], [1, 1, -(2**31), 0], 4, "labels from 0"),
    "a label too large": ([0, 2, 2, 4], [1, 1, 2**30, 0], 4, "labels from 0"),
}


@pytest.mark.parametrize("labels", SIZES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", BAD_CSR)
def test_csr_that_is_not_valid(name: str, index: torch.dtype, labels: int) -> None:
    crow, columns, count, words = BAD_CSR[name]
    try:
        target = torch.sparse_csr_tensor(
            torch.tensor(crow, dtype=index), torch.tensor(columns, dtype=index), torch.ones(count), (ROWS, labels),
            check_invariants=False,
        )  # fmt: skip
    except RuntimeError:
        return  # PyTorch does not make it
    for loss in losses(labels):
        with pytest.raises(RuntimeError, match=words):
            loss(target)


@pytest.mark.parametrize("labels", SIZES)
def test_errors_begin_with_the_loss_that_was_called(labels: int) -> None:
    of_csr = torch.sparse_csr_tensor([0, 9, 9, 4], [1, 1, 4, 0], torch.ones(4), (ROWS, labels), check_invariants=False)
    of_coo = torch.sparse_coo_tensor(PLACES - 3, torch.ones(4), (ROWS, labels), check_invariants=False)
    is_complex = torch.sparse_coo_tensor(PLACES, torch.ones(4, dtype=torch.complex64), (ROWS, labels))
    logits, layer = torch.zeros(ROWS, labels), torch.zeros(labels, 2)
    for target in (of_csr, of_coo, is_complex):
        with pytest.raises(RuntimeError, match=r"^binary_cross_entropy_with_logits: expected"):
            F.binary_cross_entropy_with_logits(logits, target)
        with pytest.raises(RuntimeError, match=r"^linear_binary_cross_entropy_with_logits: expected"):
            F.linear_binary_cross_entropy_with_logits(torch.zeros(ROWS, 2), layer, target)


@pytest.mark.parametrize("labels", SIZES)
def test_parts_that_are_resized_behind_its_back(labels: int) -> None:
    """In inference mode the parts of a sparse tensor are its own, not views."""
    for part, size in (("_values", (1,)), ("_values", (4096,)), ("_indices", (2, 1)), ("_indices", (1, 4))):
        with torch.inference_mode():
            target = coo(torch.ones(4), labels, PLACES.clone())
            getattr(target, part)().resize_(size)
            with pytest.raises(RuntimeError, match=r"as many indices of 2 dimensions as values"):
                F.linear_binary_cross_entropy_with_logits(torch.ones(ROWS, 2), torch.ones(labels, 2), target)


@pytest.mark.parametrize("labels", SIZES)
@pytest.mark.parametrize("make", [csr, coo])
def test_values_that_require_grad(make: Callable[..., Tensor], labels: int) -> None:
    # PyTorch differentiates the values of CSR tensors with sorted and distinct columns only.
    values = VALUES.clone().requires_grad_()
    columns = [1, 2, 0, 4]
    rows_and_columns = torch.tensor([[0, 0, 2, 2], columns]) if make is csr else PLACES
    dense = torch.zeros(ROWS, labels, dtype=torch.float64).index_put(tuple(rows_and_columns), values, accumulate=True)
    logits = torch.linspace(-2, 2, ROWS * labels, dtype=torch.float64).view(ROWS, labels)
    layer = logits[:, :1], torch.linspace(-1, 1, labels, dtype=torch.float64)[:, None]
    for loss in (
        lambda y: F.binary_cross_entropy_with_logits(logits, y),
        lambda y: F.linear_binary_cross_entropy_with_logits(*layer, y),
    ):
        target = make(values, labels, columns) if make is csr else make(values, labels)
        (got,) = torch.autograd.grad(loss(target), values)
        (want,) = torch.autograd.grad(loss(dense), values, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(loss(target), loss(dense), rtol=1e-12, atol=0)


def test_sums_in_low_precision_are_those_of_to_dense() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        places = torch.zeros(2, 40, dtype=torch.int64)
        values = torch.full((40,), 0.0123).to(dtype)
        for target in (coo(values, places=places), csr(values[:4])):
            expected = F.binary_cross_entropy_with_logits(torch.zeros(ROWS, LABELS, dtype=dtype), target.to_dense())
            actual = F.binary_cross_entropy_with_logits(torch.zeros(ROWS, LABELS, dtype=dtype), target)
            assert torch.equal(actual, expected)


class Named(torch.Tensor):
    """A subclass without behaviour of its own."""


def as_named(target: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(
        target._indices().as_subclass(Named), target._values().as_subclass(Named), target.shape
    )


@pytest.mark.parametrize("labels", SIZES)
def test_what_follows_operations_is_not_passed_over(labels: int) -> None:
    """Transforms over the logits with a sparse target from outside, and a subclass."""
    target = coo(VALUES, labels)
    dense = dense_form(target)
    x = torch.linspace(-1, 1, 2 * ROWS, dtype=torch.float64).view(ROWS, 2)
    w = torch.linspace(-2, 1, 2 * labels, dtype=torch.float64).view(labels, 2)

    def loss(y: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: F.linear_binary_cross_entropy_with_logits(x, w, y) + F.binary_cross_entropy_with_logits(x @ w.T, y)  # fmt: skip

    def sum_of_squares(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: (function(x) ** 2).sum()

    grad = torch.func.grad
    transforms: list[Callable[[Callable[[Tensor], Tensor]], Any]] = [
        lambda f: grad(f)(x),
        lambda f: grad(sum_of_squares(grad(f)))(x),
        lambda f: torch.vmap(f)(torch.stack([x, -x])),
        lambda f: torch.vmap(grad(f))(torch.stack([x, -x])),
        lambda f: torch.func.jvp(f, (x,), (x + 1,)),
        lambda f: torch.func.functionalize(f)(x),
    ]
    for transform in transforms:
        torch.testing.assert_close(transform(loss(target)), transform(loss(dense)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss(as_named(target))(x), loss(dense)(x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("labels", SIZES)
@pytest.mark.parametrize("make", [csr, coo])
def test_autocast_of_sparse_targets(make: Callable[..., Tensor], labels: int) -> None:
    x, w = torch.ones(ROWS, 2), torch.linspace(-2, 1, 2 * labels).view(labels, 2)
    for values in (VALUES.float(), VALUES.bfloat16(), VALUES):
        target = make(values, labels)
        with torch.autocast("cpu", torch.bfloat16):
            actual = F.linear_binary_cross_entropy_with_logits(x, w, target)
            expected = F.binary_cross_entropy_with_logits(torch.nn.functional.linear(x, w), target.to_dense())
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
