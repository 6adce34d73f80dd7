"""A mean that ignores elements counts them first, and leaves two bits for each of many targets: the loss is the same as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from callables import EVERY_FORMULA, Member, every_formula
from reference import CHUNK
from test_subclasses import Wrapped
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

# From 1 MiB of targets on. A chunk with a rest that is no multiple of 32 labels, nor of any vector.
NUMEL = (1 << 18) + CHUNK + 77
# What is left to a vector of each width, and to a word of 32 labels.
ENDINGS = [1, 7, 8, 15, 16, 17, 31, 32, 33, 1024]

Operands = tuple[Tensor, Tensor]
PLAIN = EVERY_FORMULA[0]


def make_operands(loss: Member, numel: int, target_dtype: torch.dtype, index: float) -> Operands:
    input = loss.make_input((numel,), torch.float32, "cpu")
    target = (torch.rand(numel) < 0.4).to(target_dtype)
    target[torch.rand(numel) < 0.3] = index
    return input, target


def loss_and_grad(loss: Member, operands: Operands, **options: Any) -> Operands:
    input = operands[0].detach().requires_grad_()
    value = loss(input, operands[1], **options)
    (gradient,) = torch.autograd.grad(value, input)
    return value.detach(), gradient


def assert_as_with_a_given_count(loss: Member, operands: Operands, index: float, **options: Any) -> None:
    """With a normalizer nothing is counted, and the pass reads the targets themselves."""
    valid = operands[1] != torch.tensor(index).to(operands[1].dtype)
    options["ignore_index"] = index
    actual = loss_and_grad(loss, operands, **options)
    expected = loss_and_grad(loss, operands, normalizer=valid.sum(), **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert torch.equal(loss(*operands, **options), actual[0])  # without a gradient


@pytest.mark.parametrize(
    ("target_dtype", "index"),
    [
        (torch.float32, -100),
        (torch.float32, 0),  # a label
        (torch.float32, 1),
        (torch.float32, 0.5),
        (torch.int64, -100),
        (torch.int64, 1),
        (torch.uint8, 255),
        (torch.int8, -1),
        (torch.int16, -1),
        (torch.bool, 0),
        (torch.bfloat16, -1),
        (torch.float64, -100),
    ],
    ids=str,
)
@every_formula
def test_every_target(loss: Member, target_dtype: torch.dtype, index: float) -> None:
    numel = NUMEL * 4 // target_dtype.itemsize if target_dtype.itemsize < 4 else NUMEL
    operands = make_operands(loss, numel, target_dtype, index)
    for options in ({}, {"label_smoothing": 0.1}, {"weight": torch.tensor(0.7)}):
        assert_as_with_a_given_count(loss, operands, index, **options)


@pytest.mark.parametrize("ending", ENDINGS)
@every_formula
def test_every_ending(loss: Member, ending: int) -> None:
    for target_dtype, index in ((torch.float32, -1), (torch.int64, 0)):
        operands = make_operands(loss, (1 << 18) + ending, target_dtype, index)
        assert_as_with_a_given_count(loss, operands, index)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@every_formula
def test_every_input(loss: Member, dtype: torch.dtype) -> None:
    input, target = make_operands(loss, NUMEL, torch.int64, 255)
    assert_as_with_a_given_count(loss, (input.to(dtype), target), 255)


@pytest.mark.parametrize("label", [0.25, -1.0, 2.0, -0.0, float("nan")])
@pytest.mark.parametrize("place", [0, CHUNK + 5, NUMEL - 1])
def test_one_target_without_a_code(place: int, label: float) -> None:
    operands = make_operands(PLAIN, NUMEL, torch.float32, -100)
    operands[1][place] = label
    actual = loss_and_grad(PLAIN, operands, ignore_index=-100)
    valid = operands[1] != -100
    kept = tuple(each[valid].double() for each in operands)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(*kept)
    torch.testing.assert_close(actual[0].double(), expected, rtol=1e-6, atol=0, equal_nan=True)
    slope = torch.zeros(NUMEL, dtype=torch.float64)
    slope[valid] = (kept[0].sigmoid() - kept[1]) / valid.sum()
    torch.testing.assert_close(actual[1].double(), slope, rtol=1e-5, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("requires_grad", [False, True])
@every_formula
def test_an_invalid_label_is_still_refused(loss: Member, requires_grad: bool) -> None:
    input, target = make_operands(loss, NUMEL, torch.int64, -100)
    target[NUMEL - 2] = 7
    with pytest.raises(RuntimeError, match="but one is 7"):
        loss(input.requires_grad_(requires_grad), target, ignore_index=-100)


@every_formula
def test_nothing_of_an_ignored_element_comes_through(loss: Member) -> None:
    input, target = make_operands(loss, NUMEL, torch.float32, -100)
    ignored = target == -100
    expected = loss_and_grad(loss, (input, target), ignore_index=-100)
    for poison in (torch.nan, torch.inf, -torch.inf, 3e38):
        poisoned = torch.where(ignored, poison, input)
        actual = loss_and_grad(loss, (poisoned, target), ignore_index=-100)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_infinite_logits_of_the_right_sign_have_no_loss() -> None:
    input, target = make_operands(PLAIN, NUMEL, torch.int64, -100)
    input[::5] = torch.where(target[::5] == 1, torch.inf, -torch.inf)
    assert_as_with_a_given_count(PLAIN, (input, target), -100)
    assert PLAIN(input, target, ignore_index=-100).isfinite()
    input[target == 1] = -torch.inf
    assert PLAIN(input, target, ignore_index=-100) == torch.inf


def test_the_graph_can_be_used_again() -> None:
    """Nothing that was counted is kept: a second backward, and a second derivative, count anew."""
    input, target = make_operands(PLAIN, NUMEL, torch.float32, -100)
    input.requires_grad_()
    value = PLAIN(input, target, ignore_index=-100)
    (first,) = torch.autograd.grad(value, input, retain_graph=True)
    (again,) = torch.autograd.grad(value, input, retain_graph=True)
    assert torch.equal(first, again)
    (slope,) = torch.autograd.grad(value, input, create_graph=True)
    torch.testing.assert_close(slope.detach(), first, rtol=1e-5, atol=1e-12)
    (second,) = torch.autograd.grad(slope.sum(), input)
    valid = target != -100
    curvature = torch.where(valid, input.double().sigmoid() * (1 - input.double().sigmoid()) / valid.sum(), 0)
    torch.testing.assert_close(second.double(), curvature.detach(), rtol=1e-4, atol=1e-12)


def test_the_number_of_threads_does_not_matter() -> None:
    operands = make_operands(PLAIN, 4 * NUMEL, torch.int64, -100)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(loss_and_grad(PLAIN, operands, ignore_index=-100))
    finally:
        torch.set_num_threads(threads)
    for each in results[1:]:
        torch.testing.assert_close(each, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_negated_target_whose_memory_is_gone_is_refused(create_graph: bool) -> None:
    input = torch.randn(9, requires_grad=True)
    target = torch._neg_view(-torch.ones(9))
    value = PLAIN(input, target, ignore_index=-100)
    torch.autograd.grad(value, input, retain_graph=True)
    target.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="expected the memory of target to hold"):
        torch.autograd.grad(value, input, create_graph=create_graph)


def test_a_checkpoint_may_begin_in_a_mode_and_end_outside_of_it() -> None:
    input = torch.randn(4, requires_grad=True)
    target = torch.tensor([0.0, 1.0, -100.0, 1.0])
    with FlopCounterMode(display=False):
        value = checkpoint(lambda x: PLAIN(x.sin(), target, ignore_index=-100), input, use_reentrant=False)
    value.backward()
    expected = input.detach().requires_grad_()
    PLAIN(expected.sin(), target, ignore_index=-100).backward()
    assert torch.equal(input.grad, expected.grad)


@pytest.mark.parametrize("place", ["weight", "pos_weight"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_subclass_sees_the_count_wherever_it_stands(place: str, requires_grad: bool) -> None:
    """It may know how to count shards, and not how to take a mean over what is valid in all of them."""
    input = torch.randn(4, requires_grad=requires_grad)
    target = torch.tensor([0.0, 1.0, -100.0, 1.0])
    weight = torch.rand(4)
    Wrapped.seen = []
    value = PLAIN(input, target, ignore_index=-100, **{place: Wrapped(weight)})
    assert isinstance(value, Wrapped)
    assert Wrapped.seen
    assert not any("_bce_mean_of_valid" in name for name in Wrapped.seen)
    torch.testing.assert_close(value.inner, PLAIN(input, target, ignore_index=-100, **{place: weight}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_index_that_8_bits_cannot_hold_is_rounded(requires_grad: bool, dtype: torch.dtype) -> None:
    target = torch.tensor([0.0, 0.1, 1.0, 0.1]).to(torch.float8_e4m3fn)
    input = torch.zeros(2, 4, dtype=dtype, requires_grad=requires_grad)
    for two_dimensional in (target.expand(2, 4), torch.stack([target, target], 1).t()):
        value = PLAIN(input, two_dimensional, ignore_index=0.1)
        torch.testing.assert_close(value.float(), torch.tensor(2.0).log(), rtol=1e-3, atol=0)
        assert (PLAIN(input, two_dimensional, ignore_index=0.1, reduction="none")[:, 1::2] == 0).all()
