"""No argument reads or writes outside of a tensor: what the operators cannot use raises an error, public and internal ones alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from callables import EVERY_FORMULA, FOCAL, Member, every_formula
from reference import LANES, REDUCTIONS, make_targets
from torch import Tensor

import bce_ext
import bce_ext.functional as F

OPS = torch.ops.bce_ext
X, Y = torch.linspace(-2, 2, 12).view(3, 4), torch.linspace(0, 1, 12).view(3, 4)
PLAIN = (None, None, None, 0, [])  # weight, pos_weight, normalizer, formula, options

# ---- internal operators ----

NO_LOSS_DTYPES = [torch.int8, torch.bool, torch.int64, torch.uint64, torch.complex64, torch.float8_e4m3fn, torch.bits8]


@pytest.mark.parametrize("dtype", NO_LOSS_DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_loss_of_no_loss_dtype(requires_grad: bool, dtype: torch.dtype) -> None:
    input = X.clone().requires_grad_(requires_grad)
    for reduction in (0, 1, 2):
        with pytest.raises(RuntimeError, match="expected a loss of float64"):
            OPS._bce(input, Y, *PLAIN, reduction, dtype)
    for reduce in (False, True):
        with pytest.raises(RuntimeError, match="expected a loss of float64"):
            OPS._bce_loss(input, Y, *PLAIN, reduce, 1, dtype)
    with pytest.raises(RuntimeError, match="expected a loss of float64"):
        OPS._bce_loss_and_grad(input, Y, *PLAIN, 1, dtype)


@pytest.mark.parametrize("target", [Y > 0.5, (Y > 0.5).long(), (Y > 0.5).byte()], ids=["bool", "int64", "uint8"])
def test_the_gradient_of_an_integer_target(target: Tensor) -> None:
    """Of its own dtype, whatever that is good for: it is not written as if it were floating."""
    expected, _ = OPS._bce_backward(X, target, *PLAIN, torch.ones(()), 1, [True, False])
    grad_input, grad_target = OPS._bce_backward(X, target, *PLAIN, torch.ones(()), 1, [True, True])
    torch.testing.assert_close(grad_input, expected)
    assert (grad_target.dtype, grad_target.shape) == (target.dtype, target.shape)


@pytest.mark.parametrize("shape", [(7, 3), (4, 4), (0,), (3, 4, 1), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_grad_output_of_another_shape(requires_grad: bool, shape: tuple[int, ...]) -> None:
    grad_output = torch.ones(shape, requires_grad=requires_grad)
    with pytest.raises(RuntimeError, match="expected grad_output to broadcast"):
        OPS._bce_backward(X, Y, *PLAIN, grad_output, 1, [True, False])


BAD_FACTORS = {
    "empty": torch.ones(0),
    "several": torch.ones(3),
    "meta": torch.ones((), device="meta"),
    "integer": torch.ones((), dtype=torch.int64),
    "complex": torch.ones((), dtype=torch.complex64),
    "sparse": torch.ones(1).to_sparse(),
}


@pytest.mark.parametrize("factor", BAD_FACTORS)
def test_a_gradient_is_scaled_by_one_real_number(factor: str) -> None:
    gradient = torch.ones(5)
    with pytest.raises(RuntimeError):
        OPS._scale_grad_(gradient, BAD_FACTORS[factor])
    assert torch.equal(gradient, torch.ones(5))
    with pytest.raises(RuntimeError):
        OPS._scale_grad_(torch.ones(5, dtype=torch.int64), torch.tensor(2.0))


@pytest.mark.parametrize("reduction", [-1, 3, 100, 2**40])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_no_reduction_of_that_number(requires_grad: bool, reduction: int) -> None:
    input = X.clone().requires_grad_(requires_grad)
    calls: list[Callable[[], Any]] = [
        lambda: OPS._bce(input, Y, *PLAIN, reduction),
        lambda: bce_ext.BCEWithLogitsFunction.apply(input, Y, None, None, reduction),
        lambda: OPS.sigmoid_focal_loss(input, Y, reduction=reduction),
        lambda: OPS.asymmetric_loss(input, Y, reduction=reduction),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="is not a valid value for reduction"):
            call()


BAD_OPTIONS = [
    (0, [0.1], "expected 2 options"),
    (0, [0.1, 0.0, 1.0], "expected 2 options"),
    (1, [0.0] * 7, "expected 2 options"),
    (2, [], "expected 4 options"),
    (2, [0.0, 0.0], "expected 4 options"),
    (3, [0.0] * 6, "expected 7 options"),
    (3, [0.0] * 8, "expected 7 options"),
    (-1, [], "expected a formula from 0 to 3"),
    (4, [], "expected a formula from 0 to 3"),
    (2**40, [], "expected a formula from 0 to 3"),
]


@pytest.mark.parametrize(("formula", "options", "text"), BAD_OPTIONS)
def test_formulas_and_options_that_there_are_not(formula: int, options: list[float], text: str) -> None:
    operands = (X.sigmoid(), Y, None, None, None, formula, options)
    calls: list[Callable[[], Any]] = [
        lambda: OPS._bce(*operands, 1),
        lambda: OPS._bce_loss(*operands, True, 1, torch.float32),
        lambda: OPS._bce_loss_and_grad(*operands, 1, torch.float32),
        lambda: OPS._bce_backward(*operands, torch.ones(()), 1, [True, False]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=text):
            call()


def test_a_pos_weight_beside_probabilities() -> None:
    with pytest.raises(RuntimeError, match="expected no pos_weight with probabilities"):
        OPS._bce(X.sigmoid(), Y, None, torch.ones(4), None, 1, [], 1)


# ---- memory ----


def freed(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def short(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().clone()
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)
    return tensor


OPERANDS = ["input", "target", "weight", "pos_weight", "normalizer"]


@pytest.mark.parametrize("damage", [freed, short], ids=["freed", "short"])
@pytest.mark.parametrize("operand", OPERANDS)
@every_formula
def test_storages_without_memory(loss: Member, operand: str, damage: Callable[[Tensor], Tensor]) -> None:
    if operand == "pos_weight" and not loss.of_logits:
        pytest.skip("probabilities have no pos_weight")
    clean = {"input": X.sigmoid(), "target": Y, "weight": torch.ones(4), "pos_weight": torch.ones(3, 1)}
    clean["normalizer"] = torch.tensor(3.0)
    damaged = damage(clean[operand])
    kept = ("input", "target", operand)
    for leaf in (None, "input", "target", "weight"):  # no graph; one pass; two gradients; the composite formula
        tensors = {name: tensor.clone() for name, tensor in clean.items() if name in (*kept, leaf)}
        tensors[operand] = damaged.detach()
        if leaf is not None:
            tensors[leaf].requires_grad_()
        for reduction in ("mean",) if "normalizer" in tensors else REDUCTIONS:
            with pytest.raises(RuntimeError, match=f"expected the memory of {operand} to hold"):
                loss(tensors["input"], tensors["target"], reduction=reduction, **_beyond(tensors))


def _beyond(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in ("input", "target")}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("operand", ["input", "target", "grad_output"])
@every_formula
def test_storages_freed_between_forward_and_backward(loss: Member, operand: str, create_graph: bool) -> None:
    tensors = {"input": X.sigmoid().requires_grad_(), "target": Y.clone(), "grad_output": torch.ones_like(X)}
    value = loss(tensors["input"], tensors["target"], reduction="none")
    tensors[operand].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory"):
        torch.autograd.grad(value, tensors["input"], tensors["grad_output"], create_graph=create_graph)


@every_formula
def test_a_negated_view_freed_before_a_second_backward(loss: Member) -> None:
    """The dispatcher resolves such a view before it calls a kernel."""
    input, target = X.sigmoid().requires_grad_(), torch._neg_view(-Y)
    value = loss(input, target)
    torch.autograd.grad(value, input, retain_graph=True)
    target.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory of target"):
        torch.autograd.grad(value, input)


def test_the_count_of_a_target_without_memory() -> None:
    with pytest.raises(RuntimeError, match="memory of target"):
        OPS._count_valid(freed(Y), 0.5)
    with pytest.raises(ValueError, match="expected ignore_index to be a number"):
        OPS._count_valid(Y, float("nan"))


@pytest.mark.parametrize("offset", [1, 2, 3])
@every_formula
def test_misaligned_memory(loss: Member, offset: int) -> None:
    """As torch.frombuffer gives it, out of a file that was read."""
    count = LANES + 3  # a vector and a rest
    values, target = torch.linspace(0.1, 0.9, count), make_targets((count,), torch.float32, "cpu")
    buffer = bytearray(offset) + bytearray(values.numpy().tobytes())
    misaligned = torch.frombuffer(buffer, dtype=torch.float32, count=count, offset=offset)
    assert torch.equal(loss(misaligned, target), loss(values, target))


# ---- derivatives of what is handed in ----


@pytest.mark.parametrize("reduction", REDUCTIONS)
@every_formula
def test_the_tangent_of_grad_output_is_kept(loss: Member, reduction: str) -> None:
    """Forward over reverse: backward is linear in grad_output."""
    input = loss.make_input((5,), torch.float64, "cpu").requires_grad_()
    target = make_targets((5,), torch.float64, "cpu")
    value = loss(input, target, reduction=reduction)
    grad_output, tangent = torch.rand_like(value), torch.rand_like(value)
    (expected,) = torch.autograd.grad(value, input, tangent, retain_graph=True)
    with fwAD.dual_level():
        (gradient,) = torch.autograd.grad(value, input, fwAD.make_dual(grad_output, tangent))
        primal, actual = fwAD.unpack_dual(gradient)
    assert actual is not None
    torch.testing.assert_close(actual, expected)
    value = loss(input, target, reduction=reduction)
    torch.testing.assert_close(primal, torch.autograd.grad(value, input, grad_output)[0])


@pytest.mark.parametrize("create_graph", [False, True])
@every_formula
def test_a_sparse_grad_output(loss: Member, create_graph: bool) -> None:
    input = loss.make_input((3, 4), torch.float32, "cpu").requires_grad_()
    grad_output = torch.eye(3, 4)
    value = loss(input, Y, reduction="none")
    (expected,) = torch.autograd.grad(value, input, grad_output, retain_graph=True)
    (actual,) = torch.autograd.grad(value, input, grad_output.to_sparse(), create_graph=create_graph)
    torch.testing.assert_close(actual.detach(), expected)


def sparse(row: int, size: tuple[int, ...] = (3, 4), is_coalesced: bool = False) -> Tensor:
    indices, values = torch.tensor([[row], [0]]), torch.ones(1)
    return torch.sparse_coo_tensor(indices, values, size, check_invariants=False, is_coalesced=is_coalesced)


def csr(crow: list[int], columns: list[int]) -> Tensor:
    indices, values = (torch.tensor(crow), torch.tensor(columns)), torch.ones(len(columns))
    return torch.sparse_csr_tensor(*indices, values, (3, 4), check_invariants=False)


BAD_SPARSE = {
    "row beyond": (sparse(3), "found index 3"),
    "row far beyond": (sparse(2**62), "found index"),
    "coalesced row far beyond": (sparse(2**62, is_coalesced=True), "found index"),
    "negative row": (sparse(-1), "found negative index -1"),
    "another size": (sparse(0, (5, 4)), "expected grad_output to broadcast"),
    "integers": (sparse(0).long(), "expected grad_output of float64"),
    # Native refuses other layouts, valid or not.
    "CSR": (torch.eye(3, 4).to_sparse_csr(), "expected a strided grad_output"),
    "CSR with columns beyond": (csr([-5, 9, 2**40, 3], [2**40, 1, -7]), "expected a strided grad_output"),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", BAD_SPARSE)
def test_a_sparse_grad_output_that_is_not_valid(name: str, requires_grad: bool) -> None:
    grad_output, text = BAD_SPARSE[name]
    input = X.clone().requires_grad_(requires_grad)
    with pytest.raises(RuntimeError, match=text):
        OPS._bce_backward(input, Y, *PLAIN, grad_output, 1, [True, False])


def test_a_sparse_grad_output_without_memory() -> None:
    for part in ("indices", "values"):
        grad_output = sparse(0)
        getattr(grad_output, f"_{part}")().untyped_storage().resize_(2)
        with pytest.raises(RuntimeError, match=f"expected the memory of the {part} of grad_output"):
            OPS._bce_backward(X, Y, *PLAIN, grad_output, 1, [True, False])


# ---- values ----


@pytest.mark.parametrize("numel", [1, LANES + 3])
@pytest.mark.parametrize("value", [2**64 - 2**31, 2**64 - 1, 2**63], ids=hex)
def test_weights_near_two_to_the_64(value: int, numel: int) -> None:
    weight = torch.full((numel,), value, dtype=torch.uint64)
    input = torch.zeros(numel)
    actual = F.binary_cross_entropy_with_logits(input, torch.zeros(numel), weight=weight, reduction="none")
    torch.testing.assert_close(actual, torch.full((numel,), float(value)) * torch.log(torch.tensor(2.0)))


def test_targets_near_two_to_the_64_are_no_labels() -> None:
    target = torch.full((LANES + 3,), 2**64 - 1, dtype=torch.uint64)
    with pytest.raises(RuntimeError, match="to be 0 or 1"):
        F.binary_cross_entropy_with_logits(torch.zeros(LANES + 3), target)


@pytest.mark.parametrize("loss", [EVERY_FORMULA[0], FOCAL[0]], ids=lambda loss: loss.name)
def test_a_product_of_weights_that_overflows_elsewhere(loss: Member) -> None:
    """weight * pos_weight is beyond float32, and has no part in a negative."""
    input = torch.tensor([2.0], requires_grad=True)
    large = torch.tensor([1e20])
    value = loss(input, torch.zeros(1), weight=large, pos_weight=large)
    expected = loss(input, torch.zeros(1)) * 1e20
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, input), torch.autograd.grad(expected, input))


def test_an_infinite_weight() -> None:
    value = F.binary_cross_entropy_with_logits(torch.tensor([200.0]), torch.zeros(1), weight=torch.tensor([torch.inf]))
    assert value == torch.inf


# ---- labels ----


@pytest.mark.parametrize("bad", [255, -100, 2])
@pytest.mark.parametrize("place", [0, LANES + 2, 5000, 20_010])  # in a vector, in a rest, in another chunk, the last
@pytest.mark.parametrize("requires_grad", [False, True])
@every_formula
def test_integer_targets_are_labels(loss: Member, requires_grad: bool, place: int, bad: int) -> None:
    input = loss.make_input((20_011,), torch.float32, "cpu").requires_grad_(requires_grad)
    for dtype in (torch.uint8, torch.int64) if bad > 0 else (torch.int16, torch.int64):
        target = torch.ones(20_011, dtype=dtype)
        target[place] = bad
        for reduction in ("none", "mean"):
            with pytest.raises(RuntimeError, match=f"but one is {bad}"):
                loss(input, target, reduction=reduction)
        with pytest.raises(RuntimeError, match=f"but one is {bad}"):
            loss(input, target, weight=torch.ones(1, requires_grad=True))  # the composite formula


@pytest.mark.parametrize("bad", [255, -100, 2])
@every_formula
def test_integer_targets_are_labels_in_transforms(loss: Member, bad: int) -> None:
    """Where no value can be read, a look-up that torch refuses."""
    input = loss.make_input((3, 4), torch.float64, "cpu")
    target = torch.tensor([[0, 1, 0, bad]]).expand(3, 4)
    good = torch.tensor([[0, 1, 0, 1]]).expand(3, 4)

    def calls(target: Tensor, **options: Any) -> dict[str, Callable[[], object]]:
        return {
            "vmap": lambda: torch.vmap(lambda x, y: loss(x, y, **options))(input, target),
            "grad": lambda: torch.func.grad(lambda x, y: loss(x, y, **options))(input, target),
            "grad of each": lambda: torch.vmap(torch.func.grad(lambda x, y: loss(x, y, **options)))(input, target),
            "jvp": lambda: torch.func.jvp(lambda x: loss(x, target, **options), (input,), (input,)),
        }

    for call in calls(target).values():
        with pytest.raises((IndexError, RuntimeError), match=r"out of range|but one is"):
            call()
    for call in (*calls(good).values(), *calls(target, ignore_index=bad).values()):
        call()


@every_formula
def test_a_mask_whose_bytes_are_255_is_a_mask(loss: Member) -> None:
    """Not torch's own, but memory of other programs that is viewed as bool."""
    mask = make_targets((LANES + 3,), torch.bool, "cpu")
    viewed = (mask.byte() * 255).view(torch.bool)
    input = loss.make_input((LANES + 3,), torch.float32, "cpu")
    assert torch.equal(loss(input, viewed), loss(input, mask))


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan"), float("inf")])
def test_targets_of_probabilities_are_probabilities(bad: float) -> None:
    target = Y.clone()
    target[1, 2] = bad
    for input in (X.sigmoid(), X.sigmoid().requires_grad_()):
        with pytest.raises(RuntimeError, match="all elements of target should be between 0 and 1"):
            F.binary_cross_entropy(input, target)
