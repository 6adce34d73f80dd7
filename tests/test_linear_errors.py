"""Bad input of the linear layer and its loss: one clear sentence, of native's exception type, and nothing is read out of bounds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import bce_ext.functional as F

OPS = torch.ops.bce_ext
X, W, B = torch.ones(3, 4), torch.ones(5, 4), torch.ones(5)
Y = torch.ones(3, 5)
INDICES = torch.tensor([0, -1, 4])


def csr(crow: list[int], columns: list[int], size: tuple[int, ...] = (3, 5)) -> Tensor:
    return torch.sparse_csr_tensor(
        torch.tensor(crow), torch.tensor(columns), torch.ones(len(columns)), size, check_invariants=False
    )


def coo(rows: list[int], columns: list[int], size: tuple[int, ...] = (3, 5)) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows, columns]), torch.ones(len(rows)), size, check_invariants=False)


GOOD: dict[str, Any] = {"input": X, "linear_weight": W, "target": Y, "linear_bias": B}
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "other features": ({"linear_weight": torch.ones(5, 3)}, RuntimeError, "expected linear_weight of size"),
    "weight of one dimension": ({"linear_weight": torch.ones(4)}, RuntimeError, "expected linear_weight of size"),
    "weight of another dtype": ({"linear_weight": W.double()}, RuntimeError, "of the dtype of input"),
    "bias of another dtype": ({"linear_bias": B.half()}, RuntimeError, "of the dtype of input"),
    "bias of another size": ({"linear_bias": torch.ones(4)}, RuntimeError, "expected linear_bias of size"),
    "integer input": ({"input": X.long()}, NotImplementedError, "real floating dtype"),
    "complex input": ({"input": X.cfloat()}, NotImplementedError, "real floating dtype"),
    "a number as input": ({"input": torch.tensor(1.0)}, RuntimeError, "at least one dimension"),
    "target of other labels": ({"target": torch.ones(3, 4)}, ValueError, "size of the logits"),
    "target of other rows": ({"target": torch.ones(2, 5)}, ValueError, "size of the logits"),
    "floating class indices": ({"target": torch.ones(3)}, ValueError, "size of the logits"),
    "class indices of other rows": ({"target": torch.tensor([0, 1])}, ValueError, "class indices of size"),
    "complex target": ({"target": Y.cfloat()}, RuntimeError, "expected a real target"),
    "integer target of 2": ({"target": torch.full((3, 5), 2)}, RuntimeError, "to be 0 or 1"),
    "class index too large": ({"target": torch.tensor([0, 5, 1])}, IndexError, "but one is 5"),
    "class index beyond int64": (
        {"target": torch.tensor([0, 2**64 - 1, 1], dtype=torch.uint64)},
        IndexError,
        "number of labels (5), but one is 18446744073709551615",
    ),
    "target of another device": ({"target": Y.to("meta")}, RuntimeError, "target on the device of input"),
    "weight of another device": ({"linear_weight": W.to("meta")}, RuntimeError, "linear_weight on the device"),
    "bias of another device": ({"linear_bias": B.to("meta")}, RuntimeError, "linear_bias on the device"),
    "loss weight of another size": ({"weight": torch.ones(4)}, RuntimeError, "expected weight to broadcast"),
    "pos_weight of another size": ({"pos_weight": torch.ones(2, 5)}, RuntimeError, "expected pos_weight to broadcast"),
    "unknown reduction": ({"reduction": "max"}, ValueError, "not a valid value for reduction"),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, "label_smoothing between 0 and 1"),
    "normalizer of a sum": (
        {"reduction": "sum", "normalizer": torch.tensor(1.0)},
        ValueError,
        "expected reduction 'mean'",
    ),
    "CSR of another size": ({"target": csr([0, 0, 0, 0], [], (3, 6))}, ValueError, "size of the logits"),
    "CSR with a label too large": ({"target": csr([0, 1, 1, 2], [0, 5])}, RuntimeError, "labels from 0 to 4"),
    "CSR with a negative label": ({"target": csr([0, 1, 1, 2], [0, -1])}, RuntimeError, "labels from 0 to 4"),
    "CSR that falls": ({"target": csr([0, 2, 1, 2], [0, 1])}, RuntimeError, "rise from 0"),
    "CSR that ends too late": ({"target": csr([0, 1, 1, 1000], [0, 1])}, RuntimeError, "rise from 0"),
    "CSR that begins too late": ({"target": csr([1, 1, 1, 2], [0, 1])}, RuntimeError, "rise from 0"),
    "COO of another size": ({"target": coo([0], [0], (3, 6))}, ValueError, "size of the logits"),
    "COO with a row too large": ({"target": coo([3], [0])}, RuntimeError, "below its size"),
    "COO with a negative row": ({"target": coo([-1], [0])}, RuntimeError, "below its size"),
    "COO with a label too large": ({"target": coo([0], [5])}, RuntimeError, "labels from 0 to 4"),
    "CSC": ({"target": Y.to_sparse_csc()}, RuntimeError, "strided, sparse CSR or COO"),
    "COO with dense dimensions": ({"target": Y.to_sparse(1)}, RuntimeError, "without dense dimensions"),
}


def is_repeatable(name: str) -> bool:
    """A sparse target or a number is not repeated: test_bad_targets_of_blocks has those that take blocks."""
    arguments = {**GOOD, **BAD[name][0]}
    return arguments["target"].layout == torch.strided and arguments["input"].dim() > 0


def assert_raises(name: str, arguments: dict[str, Any]) -> None:
    _, error, words = BAD[name]
    with pytest.raises(error) as caught:
        F.linear_binary_cross_entropy_with_logits(**arguments)
    assert words in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value).strip()


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    assert_raises(name, {**GOOD, **BAD[name][0]})


@pytest.mark.parametrize("name", filter(is_repeatable, BAD))
def test_bad_input_of_many_rows(name: str) -> None:
    """So many rows take blocks: each tensor of a few rows is repeated, valid or not."""
    arguments = {**GOOD, **BAD[name][0]}
    for key in ("input", "target"):
        tensor = arguments[key]
        if tensor.shape[0] in (2, 3):
            arguments[key] = tensor.repeat(100_000, *(1 for _ in tensor.shape[1:]))
    assert_raises(name, arguments)


@pytest.mark.parametrize("sizes", [(3, 2), (2, 4)], ids=str)
def test_siglip_of_other_sizes(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="of the same size"):
        F.siglip_loss(X, torch.ones(sizes), torch.tensor(1.0))


LARGE_X, LARGE_W = torch.ones(3, 1), torch.ones(500_000, 1)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    ("target", "error"),
    [
        (csr([0, 1, 1, 2], [0, 500_000], (3, 500_000)), RuntimeError),
        (csr([0, 2, 1, 2], [0, 1], (3, 500_000)), RuntimeError),
        (csr([0, 1, 1, 10**9], [0, 1], (3, 500_000)), RuntimeError),
        (coo([7], [0], (3, 500_000)), RuntimeError),
        (torch.tensor([0, 1, 500_000]), IndexError),
    ],
    ids=["label", "order", "end", "row", "class index"],
)
def test_bad_targets_of_blocks(target: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error):
        F.linear_binary_cross_entropy_with_logits(LARGE_X, LARGE_W, target)


@pytest.mark.parametrize("index", [[[0], [5]], [[3], [0]], [[-1], [0]], [[0], [-1]]], ids=str)
def test_internal_operators_read_nothing_out_of_bounds(index: list[list[int]]) -> None:
    with pytest.raises(RuntimeError, match="rows and labels"):
        OPS._linear_bce_loss_and_grads(
            X, W, None, torch.ones(1), torch.tensor(index), None, None, None, [], 1, torch.float32, None, [True] * 3
        )


OPERANDS = ["input", "linear_weight", "linear_bias", "target"]


def calls(tensors: dict[str, Tensor]) -> list[Callable[[], Any]]:
    """The internal operators: the loss, and the loss with its gradients."""
    operands = (*(tensors[name] for name in OPERANDS), None, None, None, None, [])
    return [
        lambda: OPS._linear_bce(*operands, 1),
        lambda: OPS._linear_bce_loss_and_grads(*operands, 1, torch.float32, None, [True] * 3),
    ]


# int1 and bits8 have no type that they are promoted to. An 8-bit float is a target like any other.
STORED_ONLY = [torch.int1, torch.uint4, torch.bits8, torch.float8_e4m3fn]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, d) for name in OPERANDS for d in STORED_ONLY if (name, d) != ("target", torch.float8_e4m3fn)],
)
def test_dtypes_without_arithmetic(name: str, dtype: torch.dtype) -> None:
    """In one sentence of ours, before ATen promotes any types."""
    stored = torch.zeros(GOOD[name].shape, dtype=torch.uint8).view(dtype)
    for call in calls({**GOOD, name: stored}):
        for context in (contextlib.nullcontext(), torch.inference_mode(), forward_ad.dual_level()):
            with context, pytest.raises(RuntimeError, match="linear_binary_cross_entropy_with_logits: expected a"):
                call()


def test_reductions_that_there_are_not() -> None:
    for input in (X, torch.ones(900_000, 4)):  # the plain form; blocks
        for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
            with context, pytest.raises(ValueError, match="is not a valid value for reduction"):
                OPS._linear_bce(input, W, B, torch.ones(len(input), 5), None, None, None, None, [], 3)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("grad_output", [torch.ones(1), torch.ones(3, 4), torch.ones((), dtype=torch.int64)], ids=str)
def test_a_grad_output_is_one_number(grad_output: Tensor, device: str) -> None:
    operands = [tensor.to(device) for tensor in (X, W, B, Y)]
    with pytest.raises(RuntimeError, match="grad_output"):
        OPS._linear_bce_loss_and_grads(
            *operands, None, None, None, None, [], 1, torch.float32, grad_output.to(device), [True] * 3
        )


@pytest.mark.parametrize("name", OPERANDS)
def test_memory_that_is_gone(name: str) -> None:
    arguments = {key: tensor.clone() for key, tensor in GOOD.items()}
    arguments[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"expected the memory of {name}"):
        F.linear_binary_cross_entropy_with_logits(**arguments)
    for call in calls(arguments):
        with pytest.raises(RuntimeError, match=f"expected the memory of {name}"):
            call()
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=f"expected the memory of {name}"):
            call()


TARGETS_IN_PARTS: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
    "target": (INDICES.to(torch.int16), lambda target: target),
    "the indices of target": (coo([0], [0]), lambda target: target._indices()),
    "the values of target": (coo([0], [0]), lambda target: target._values()),
    "the crow_indices of target": (csr([0, 1, 1, 1], [0]), lambda target: target.crow_indices()),
    "the col_indices of target": (csr([0, 1, 1, 1], [0]), lambda target: target.col_indices()),
}


@pytest.mark.parametrize("name", TARGETS_IN_PARTS)
def test_memory_of_a_target_that_is_gone(name: str) -> None:
    target, part = TARGETS_IN_PARTS[name]
    target = target.clone()
    part(target).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"expected the memory of {name}"):
        F.linear_binary_cross_entropy_with_logits(X, W, target)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", ["input", "linear_weight", "target"])
def test_memory_that_is_freed_between_forward_and_backward(name: str, create_graph: bool) -> None:
    tensors = {"input": torch.ones(900_000, 4), "linear_weight": W.clone(), "target": torch.ones(900_000, 5)}
    leaf = (tensors["linear_weight"] if name == "input" else tensors["input"]).requires_grad_()
    loss = F.linear_binary_cross_entropy_with_logits(**tensors)
    assert "LinearBCE" in loss.grad_fn.name()  # it takes blocks
    torch.autograd.grad(loss, leaf, retain_graph=True)  # hands the stored gradient over
    tensors[name].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"expected the memory of {name}"):
        torch.autograd.grad(loss, leaf, create_graph=create_graph)
