"""Loss and gradients are those of the formula, within rounding: in every reduction, dtype and shape, with weights of every shape that broadcasts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
from callables import CROSS_ENTROPIES, Member
from reference import (
    BLOCK,
    CHUNK,
    FLOATING_DTYPES,
    LANES,
    REDUCTIONS,
    Terms,
    arithmetic_dtype,
    assert_rounded_once,
    make_logits,
    make_probabilities,
    make_targets,
    make_weights,
    reduced,
)
from torch import Tensor

import bce_ext.functional as F

SHAPES = [
    (),  # a scalar
    (1,),
    (0,),  # empty
    (3, 0, 2),
    (LANES - 1,),  # shorter than one vector
    (LANES + 1,),  # a vector and one element
    (BLOCK - 1,),  # around one block: the last elements are computed in a buffer
    (BLOCK,),
    (BLOCK + 1,),
    (2 * BLOCK + LANES + 3,),  # blocks, then a vector, then less than a vector
    (CHUNK - 1,),  # around the work of one thread
    (CHUNK,),
    (CHUNK + 1,),
    (3 * CHUNK + 777,),  # several chunks, the last one odd
    (7, 13),  # rows shorter than a vector, both primes
    (129, 65),  # rows that end in the middle of a vector, in blocks that end in the middle of a row
    (2, 3, 5),
    (2, 3, 5, 7),  # images of 3 channels
    (2, 3, 2, 5, 3),
]

# Every kind of broadcasting against an input of (4, 3, 5, 37): 37 is longer than two vectors and no multiple of one.
WEIGHT_SHAPES = {
    "scalar": (),
    "one": (1,),
    "last": (37,),
    "channel": (3, 1, 1),
    "batch": (4, 1, 1, 1),
    "batch_and_last": (4, 1, 1, 37),
    "inner": (5, 37),
    "middle": (5, 1),
    "ones": (1, 1, 1, 1),
    "full": (4, 3, 5, 37),
}


def differentiated(
    loss_function: Callable[..., Tensor],
    input: Tensor,
    target: Tensor,
    grad_output: Tensor | None = None,
    **arguments: object,
) -> tuple[Tensor, Tensor, Tensor | None]:
    input = input.detach().requires_grad_()
    target = target.detach().requires_grad_(target.is_floating_point())
    loss = loss_function(input, target, **arguments)
    inputs = [input, target] if target.requires_grad else [input]
    gradients = torch.autograd.grad(loss, inputs, torch.ones_like(loss) if grad_output is None else grad_output)
    return loss.detach(), gradients[0], gradients[1] if len(gradients) == 2 else None


def assert_terms(
    loss: Tensor, grad_input: Tensor, grad_target: Tensor | None, expected: Terms, arithmetic: torch.dtype
) -> None:
    assert_rounded_once(loss, expected.loss, expected.loss_scale, arithmetic, what="loss")
    assert_rounded_once(grad_input, expected.grad_input, expected.grad_input_scale, arithmetic, what="grad_input")
    if grad_target is not None:
        assert_rounded_once(
            grad_target, expected.grad_target, expected.grad_target_scale, arithmetic, what="grad_target"
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", FLOATING_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss", CROSS_ENTROPIES, ids=lambda loss: loss.name)
def test_every_shape_and_dtype(
    loss: Member, shape: tuple[int, ...], dtype: torch.dtype, reduction: str, device: str
) -> None:
    input, target = loss.make_input(shape, dtype, device), make_targets(shape, dtype, device)
    expected = reduced(loss.terms(input, target), reduction)
    value, grad_input, grad_target = differentiated(loss, input, target, reduction=reduction)
    assert value.dtype == grad_input.dtype == dtype
    assert_terms(value, grad_input, grad_target, expected, arithmetic_dtype(dtype))
    # Without a gradient for the target the loss and its gradient come out of one pass, without any gradient out of
    # another.
    alone = input.detach().requires_grad_()
    of_pass = loss(alone, target, reduction=reduction)
    assert torch.equal(of_pass, value) or value.isnan().all()
    (grad_of_pass,) = torch.autograd.grad(of_pass, alone, torch.ones_like(value))
    assert_terms(loss(input, target, reduction=reduction), grad_of_pass, None, expected, arithmetic_dtype(dtype))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("pos_weight_shape", [None, *WEIGHT_SHAPES], ids=lambda s: f"pos_weight_{s}")
@pytest.mark.parametrize("weight_shape", [None, *WEIGHT_SHAPES], ids=lambda s: f"weight_{s}")
def test_weights_broadcast(weight_shape: str | None, pos_weight_shape: str | None, reduction: str, device: str) -> None:
    input, target = (
        make_logits((4, 3, 5, 37), torch.float32, device),
        make_targets((4, 3, 5, 37), torch.float32, device),
    )
    weights = {
        name: None if shape is None else make_weights(WEIGHT_SHAPES[shape], torch.float32, device, seed)
        for name, shape, seed in (("weight", weight_shape, 2), ("pos_weight", pos_weight_shape, 3))
    }
    grad_output = make_weights(tuple(input.shape) if reduction == "none" else (), torch.float32, device, seed=4)
    expected = reduced(reference.with_logits(input, target, **weights), reduction, grad_output)
    actual = differentiated(
        F.binary_cross_entropy_with_logits, input, target, grad_output, reduction=reduction, **weights
    )
    assert_terms(*actual, expected, torch.float32)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight_shape", [None, *WEIGHT_SHAPES], ids=lambda s: f"weight_{s}")
def test_weights_of_probabilities_broadcast(weight_shape: str | None, reduction: str, device: str) -> None:
    shape = (4, 3, 5, 37)
    input, target = make_probabilities(shape, torch.float32, device), make_targets(shape, torch.float32, device)
    weight = None if weight_shape is None else make_weights(WEIGHT_SHAPES[weight_shape], torch.float32, device)
    grad_output = make_weights(shape if reduction == "none" else (), torch.float32, device, seed=4)
    expected = reduced(reference.probabilities(input, target, weight), reduction, grad_output)
    actual = differentiated(F.binary_cross_entropy, input, target, grad_output, reduction=reduction, weight=weight)
    assert_terms(*actual, expected, torch.float32)


# The last dimension below, at and above a block, so that a weight of it is a tile, or is not; 3 rows end in the middle
# of blocks.
@pytest.mark.parametrize("classes", [1, 3, LANES, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, CHUNK + 1])
@pytest.mark.parametrize("dtype", FLOATING_DTYPES, ids=str)
def test_class_weights_of_every_length(classes: int, dtype: torch.dtype, device: str) -> None:
    shape = (3 + 2 * CHUNK // classes, classes)
    input, target = make_logits(shape, dtype, device), make_targets(shape, dtype, device)
    weight, pos_weight = (make_weights((classes,), dtype, device, seed) for seed in (2, 3))
    expected = reduced(reference.with_logits(input, target, weight, pos_weight), "mean")
    input = input.requires_grad_()
    loss = F.binary_cross_entropy_with_logits(input, target, weight=weight, pos_weight=pos_weight)
    (gradient,) = torch.autograd.grad(loss, input)
    assert_terms(loss.detach(), gradient, None, expected, arithmetic_dtype(dtype))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight_dtype", [torch.bool, torch.int64, torch.uint8, *FLOATING_DTYPES], ids=str)
@pytest.mark.parametrize("dtype", FLOATING_DTYPES, ids=str)
def test_weights_of_another_dtype_are_converted(
    dtype: torch.dtype, weight_dtype: torch.dtype, reduction: str, device: str
) -> None:
    shape = (5, 37)
    input, target = make_logits(shape, dtype, device), make_targets(shape, dtype, device)
    weight, pos_weight = (4 * make_weights((37,), torch.float64, device, seed) for seed in (2, 3))
    weight, pos_weight = weight.to(weight_dtype), pos_weight.to(weight_dtype)
    expected = reduced(reference.with_logits(input, target, weight, pos_weight), reduction)
    actual = differentiated(
        F.binary_cross_entropy_with_logits, input, target, reduction=reduction, weight=weight, pos_weight=pos_weight
    )
    assert actual[0].dtype == actual[1].dtype == dtype
    assert_terms(*actual, expected, arithmetic_dtype(dtype))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", FLOATING_DTYPES, ids=str)
def test_targets_and_weights_outside_of_their_usual_range(dtype: torch.dtype, reduction: str, device: str) -> None:
    shape = (6, 37)
    input, target = (
        make_logits(shape, dtype, device),
        make_logits(shape, dtype, device, seed=5),
    )  # targets from -12 to 12
    weight, pos_weight = (
        make_logits(shape, dtype, device, seed=6),
        make_logits((37,), dtype, device, seed=7),
    )  # negative ones, too
    expected = reduced(reference.with_logits(input, target, weight, pos_weight), reduction)
    actual = differentiated(
        F.binary_cross_entropy_with_logits, input, target, reduction=reduction, weight=weight, pos_weight=pos_weight
    )
    assert_terms(*actual, expected, arithmetic_dtype(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mean_of_many_elements_loses_nothing(dtype: torch.dtype, device: str) -> None:
    # More than 2^24 elements: a float32 sum would have long lost the last bits of each, and a bfloat16 one would stop
    # at 256 of them.
    numel = 2**24 + 1
    input = torch.full((1,), 0.1, dtype=dtype, device=device).expand(numel)
    target = torch.zeros(1, dtype=dtype, device=device).expand(numel)
    expected = reference.with_logits(input[:1], target[:1]).loss[0]
    mean = F.binary_cross_entropy_with_logits(input, target)
    assert_rounded_once(mean, expected, expected, torch.float32)
    total = F.binary_cross_entropy_with_logits(input, target, reduction="sum")
    assert_rounded_once(total, expected * numel, expected * numel, torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_half_precision_sums_do_not_overflow_inside(reduction: str, device: str) -> None:
    # The losses sum to 8e5, beyond the largest float16.
    input = torch.full((100_003,), 8.0, dtype=torch.float16, device=device)
    actual = F.binary_cross_entropy_with_logits(input, torch.zeros_like(input), reduction=reduction)
    expected = reduced(reference.with_logits(input, torch.zeros_like(input)), reduction).loss
    assert actual == expected.to(torch.float16)
    assert actual.isinf() == (reduction == "sum")


@pytest.mark.parametrize("name", ["binary_cross_entropy_with_logits", "binary_cross_entropy"])
def test_an_empty_input_has_mean_nan_and_sum_zero(name: str, device: str) -> None:
    input, target = torch.empty(0, 3, device=device, requires_grad=True), torch.empty(0, 3, device=device)
    function = getattr(F, name)
    assert function(input, target, reduction="mean").isnan()
    assert function(input, target, reduction="sum") == 0
    assert function(input, target, reduction="none").shape == (0, 3)
    for reduction in REDUCTIONS:
        (gradient,) = torch.autograd.grad(function(input, target, reduction=reduction).sum(), input)
        assert gradient.shape == (0, 3)
