"""Targets of every dtype, mixed floating dtypes, numbers as weights: the right answer without a cast of full size."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, get_type_hints

import numpy
import pytest
import reference
import torch
from callables import (
    WITH_LOGITS,
    Loss,
    every_cross_entropy,
    every_reduction,
    functional,
    make_input,
    probabilities_functional,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import bce_ext

INTEGERS = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FLOAT8 = [
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
]

both = pytest.mark.parametrize("loss", [functional, probabilities_functional], ids=lambda f: f.__name__)


def labels(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """0 and 1, by way of float32: not every dtype has random numbers, and float8_e8m0fnu has no 0."""
    hard = (torch.rand(shape, device=device) > 0.5).float()
    return (hard if dtype.is_floating_point is False or "e8m0" not in str(dtype) else torch.ones_like(hard)).to(dtype)


# A whole block is converted in registers, a few elements one by one.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("numel", [7, 1024])
def test_any_byte_but_0_is_true(numel: int, dtype: torch.dtype) -> None:
    bytes_of_target = torch.arange(numel).remainder(256).byte()
    logits = torch.randn(numel).to(dtype)
    actual = bce_ext.functional.binary_cross_entropy_with_logits(logits, bytes_of_target.view(torch.bool))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), (bytes_of_target != 0).double())
    torch.testing.assert_close(actual, expected.to(dtype))


@every_reduction
@every_cross_entropy
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("target_dtype", INTEGERS + FLOATS + FLOAT8, ids=str)
def test_every_target_dtype(
    loss: Loss, target_dtype: torch.dtype, dtype: torch.dtype, reduction: str, device: str
) -> None:
    input = make_input(loss, (5, 33), dtype, device).requires_grad_()
    target = labels((5, 33), target_dtype, device)
    formula = reference.with_logits if loss in WITH_LOGITS else reference.probabilities
    expected = reference.reduced(formula(input, target.float() if target_dtype in FLOAT8 else target), reduction)
    actual = loss(input, target, reduction=reduction)
    if target_dtype in INTEGERS:
        assert actual.dtype == dtype
    elif target_dtype in FLOATS:
        assert actual.dtype == torch.promote_types(dtype, target_dtype)
    arithmetic = reference.arithmetic_dtype(dtype, target_dtype)
    reference.assert_rounded_once(actual, expected.loss, expected.loss_scale, arithmetic, ulps=16)
    actual.sum().backward()
    assert input.grad is not None
    assert input.grad.dtype == dtype
    reference.assert_rounded_once(input.grad, expected.grad_input, expected.grad_input_scale, arithmetic, ulps=16)


@both
@pytest.mark.parametrize("target_dtype", INTEGERS + FLOAT8, ids=str)
def test_every_target_dtype_under_transforms(loss: Loss, target_dtype: torch.dtype, device: str) -> None:
    """The formula that serves transforms takes them too."""
    input = make_input(loss, (5, 3), torch.float32, device)
    target = labels((5, 3), target_dtype, device)
    number = target.float()
    torch.testing.assert_close(
        torch.func.grad(lambda x: loss(x, target))(input), torch.func.grad(lambda x: loss(x, number))(input)
    )
    torch.testing.assert_close(torch.func.vmap(loss)(input, target), torch.func.vmap(loss)(input, number))
    leaf = input.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf, target), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    (first,) = torch.autograd.grad(loss(leaf, number), leaf, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(first.sum(), leaf)[0])


@both
@pytest.mark.parametrize("target_dtype", [torch.bool, torch.uint8, torch.int64, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_cast_of_full_size(loss: Loss, dtype: torch.dtype, target_dtype: torch.dtype, device: str) -> None:
    """Nothing is allocated but the gradient; the target has a stride of its own, so that no copy could make it dense either."""
    rows, classes = 300, 1000
    input = make_input(loss, (rows, classes), dtype, device).requires_grad_()
    target = labels((rows, 2 * classes), target_dtype, device)[:, ::2]
    loss(input, target)  # what is allocated once only
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss(input, target)
    allocated = sum(max(event.self_device_memory_usage, event.self_cpu_memory_usage, 0) for event in profiler.events())
    assert allocated <= rows * classes * dtype.itemsize + 8192


@every_reduction
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numbers_as_weights(dtype: torch.dtype, reduction: str, device: str) -> None:
    input = reference.make_logits((5, 7), dtype, device)
    target = labels((5, 7), torch.bool, device)
    per_class = torch.linspace(0.5, 2, 7, device=device)
    functions = bce_ext.functional
    for weight, pos_weight in ((0.375, None), (None, 3), (0.375, 3.0), (0.375, per_class), (per_class, 3)):
        expected = reference.reduced(
            reference.with_logits(
                input, target, *(w if w is None else torch.as_tensor(w, device=device) for w in (weight, pos_weight))
            ),
            reduction,
        )
        for actual in (
            functions.binary_cross_entropy_with_logits(
                input, target, weight, reduction=reduction, pos_weight=pos_weight
            ),
            bce_ext.BCEWithLogitsLoss(weight, reduction=reduction, pos_weight=pos_weight).to(device)(input, target),
        ):
            assert actual.dtype == dtype
            reference.assert_rounded_once(
                actual, expected.loss, expected.loss_scale, reference.arithmetic_dtype(dtype), ulps=16
            )
    probabilities = reference.make_probabilities((5, 7), dtype, device)
    torch.testing.assert_close(
        functions.binary_cross_entropy(probabilities, target, 2.0, reduction=reduction),
        functions.binary_cross_entropy(probabilities, target, torch.tensor(2.0, device=device), reduction=reduction),
    )
    assert bce_ext.BCELoss(2.0, reduction=reduction).to(device)(probabilities, target).dtype == dtype


@pytest.mark.parametrize(
    "number", [2, True, numpy.float32(2), numpy.float16(2), numpy.int64(2), Fraction(5, 2), 2**70], ids=repr
)
def test_numbers_of_python_and_numpy(number: float) -> None:
    input, target = torch.linspace(-2, 2, 6), torch.linspace(0, 1, 6)
    tensor = torch.tensor(float(number), dtype=torch.float64)
    for loss in (bce_ext.functional.binary_cross_entropy_with_logits, bce_ext.functional.sigmoid_focal_loss):
        expected = loss(input, target, weight=tensor, pos_weight=tensor, normalizer=tensor, reduction="mean")
        actual = loss(input, target, weight=number, pos_weight=number, normalizer=number, reduction="mean")
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    module = bce_ext.BCEWithLogitsLoss(number, pos_weight=number, normalizer=number)
    assert all(torch.equal(each, tensor) for each in (module.weight, module.pos_weight, module.normalizer))
    given = bce_ext.BCEWithLogitsLoss(number, pos_weight=number)
    assert module(input, target) == given(input, target, number) == given(input, target, tensor)
    layer = torch.eye(6)
    linear = bce_ext.functional.linear_binary_cross_entropy_with_logits
    assert linear(input, layer, target, weight=number) == linear(input, layer, target, weight=tensor)


@pytest.mark.parametrize("name", ["binary_cross_entropy_with_logits", "linear_binary_cross_entropy_with_logits"])
def test_annotations_admit_numbers(name: str) -> None:
    hints = get_type_hints(getattr(bce_ext.functional, name))
    assert {hints[each] for each in ("weight", "pos_weight", "normalizer")} == {Tensor | float | None}


@pytest.mark.parametrize(
    "number", ["2", [2], numpy.ones(1), numpy.bool_(True), 2j], ids=lambda number: type(number).__name__
)
def test_what_is_no_number_is_refused(number: Any) -> None:
    input = torch.zeros(3)
    with pytest.raises(TypeError, match=r"with_logits: expected weight to be a .*number, but got"):
        bce_ext.functional.binary_cross_entropy_with_logits(input, input, number)
    with pytest.raises(TypeError, match=r"with_logits: expected normalizer to be a .*number, but got"):
        bce_ext.BCEWithLogitsLoss()(input, input, number)


@pytest.mark.parametrize("number", [10**400, Fraction(10**400)], ids=["int", "Fraction"])
def test_numbers_beyond_float64_are_refused(number: float) -> None:
    with pytest.raises(OverflowError):
        bce_ext.functional.binary_cross_entropy_with_logits(torch.zeros(3), torch.zeros(3), number)
    with pytest.raises(OverflowError):
        bce_ext.BCEWithLogitsLoss(number)


@pytest.mark.parametrize("label", [2, -1, 2**32, 2**32 + 1, -(2**63)])
@pytest.mark.parametrize("place", [0, 1000, 1024, 2049])  # in the first block of a CPU kernel, the next, what is left
def test_an_integer_that_is_no_label_raises_wherever_it_stands(place: int, label: int) -> None:
    target = torch.ones(2050, dtype=torch.int64)
    target[place] = label
    for loss in (functional, bce_ext.functional.asymmetric_loss):
        with pytest.raises(RuntimeError, match=r"targets to be 0 or 1, but one is"):
            loss(torch.zeros(2050), target)


@every_reduction
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 1), (5, 7)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights_that_require_grad(dtype: torch.dtype, shape: tuple[int, ...], reduction: str, device: str) -> None:
    """Native refuses the gradient of both."""
    input = reference.make_logits((5, 7), dtype, device)
    target = reference.make_targets((5, 7), dtype, device)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        weight = reference.make_weights(shape, torch.float32, device).to(dtype).requires_grad_()
        pos_weight = reference.make_weights(shape, torch.float32, device, seed=5).to(dtype).requires_grad_()
        leaf = input.detach().to(dtype).requires_grad_()
        loss = functional(leaf, target.to(dtype), weight, pos_weight, reduction)
        return list(torch.autograd.grad(loss.sum(), (leaf, weight, pos_weight)))

    for actual, expected in zip(gradients(dtype), gradients(torch.float64), strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(
            actual.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
        )
