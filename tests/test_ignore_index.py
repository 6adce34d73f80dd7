"""Ignored elements have no loss and no gradient whatever their operands are, and a mean divides by the number of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from callables import EVERY_FORMULA, FOCAL, Member, every_formula, every_reduction
from reference import BLOCK, CHUNK, FLOATING_DTYPES, LANES, assert_rounded_once, make_targets, reduced
from torch import Tensor

IGNORE = -100
POISON = [float("nan"), float("inf"), float("-inf"), 1e38, -1e38]

# Less than a vector; blocks and a rest; the chunks of several threads.
SIZES = [LANES - 1, 2 * BLOCK + LANES + 3, 2 * CHUNK + 77]
# Enough targets for label codes, which float64 has none of.
CODED = (1 << 18) + CHUNK + 77
TARGET_DTYPES = [torch.int8, torch.int64, *FLOATING_DTYPES]
SIZES_AND_DTYPES = [(numel, dtype) for numel in SIZES for dtype in TARGET_DTYPES]
SIZES_AND_DTYPES += [(CODED * 4 // min(dtype.itemsize, 4), dtype) for dtype in TARGET_DTYPES if dtype != torch.float64]


def with_ignored(
    loss: Member, numel: int, dtype: torch.dtype, target_dtype: torch.dtype, device: str, index: float = IGNORE
) -> tuple[Tensor, Tensor, Tensor]:
    """A third of the elements ignored, the first and the last among them."""
    input, target = loss.make_input((numel,), dtype, device), make_targets((numel,), target_dtype, device)
    ignored = torch.arange(numel, device=device) % 3 == 0
    ignored[-1] = True
    target[ignored] = index
    return input, target, ignored


def gradients(loss: Member, input: Tensor, target: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    input = input.detach().requires_grad_()
    target = target.detach().requires_grad_(target.is_floating_point())
    value = loss(input, target, **arguments)
    leaves = [input, target] if target.requires_grad else [input]
    return (value.detach(), *torch.autograd.grad(value, leaves, torch.ones_like(value)))


@every_reduction
@pytest.mark.parametrize(("numel", "target_dtype"), SIZES_AND_DTYPES, ids=str)
@every_formula
def test_values(loss: Member, numel: int, target_dtype: torch.dtype, reduction: str, device: str) -> None:
    input, target, ignored = with_ignored(loss, numel, torch.float32, target_dtype, device)
    options = {"ignore_index": IGNORE, "label_smoothing": 0.1}
    terms = loss.terms(input, target, **options)
    expected = reduced(terms, reduction, divisor=float((~ignored).sum()))
    arithmetic = torch.float64 if target_dtype == torch.float64 else torch.float32
    value, grad_input, *grad_target = gradients(loss, input, target, reduction=reduction, **options)
    ulps = loss.ulps + 16
    assert_rounded_once(value, expected.loss, expected.loss_scale, arithmetic, ulps, "loss")
    assert_rounded_once(grad_input, expected.grad_input, expected.grad_input_scale, arithmetic, ulps, "grad_input")
    for gradient in grad_target:
        assert_rounded_once(gradient, expected.grad_target, expected.grad_target_scale, arithmetic, ulps, "grad_target")
        assert (gradient[ignored] == 0).all()
    assert (grad_input[ignored] == 0).all()
    leaf = input.clone().requires_grad_()  # the target without a gradient: one pass
    loss(leaf, target, reduction=reduction, **options).sum().backward()
    assert_rounded_once(leaf.grad, expected.grad_input, expected.grad_input_scale, arithmetic, ulps, "one pass")


def paths(loss: Member, input: Tensor, target: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """The gradient of the input by every way that there is to compute it."""
    leaf = input.clone().requires_grad_()
    results = {}
    (results["fused"],) = torch.autograd.grad(loss(leaf, target, **arguments).sum(), leaf)
    (results["create_graph"],) = torch.autograd.grad(loss(leaf, target, **arguments).sum(), leaf, create_graph=True)
    results["func"] = torch.func.grad(lambda x: loss(x, target, **arguments).sum())(input)
    results["vmap"] = torch.func.vmap(torch.func.grad(lambda x, y: loss(x, y, **arguments).sum()))(
        input[None], target[None]
    )[0]
    value = loss(leaf, target, **arguments)
    cotangent = torch.ones_like(value).requires_grad_()
    (first,) = torch.autograd.grad(value, leaf, cotangent, create_graph=True)
    if first.requires_grad:
        second = torch.autograd.grad(first.sum(), leaf, allow_unused=True)[0]
        results["second"] = torch.zeros_like(leaf) if second is None else second
    return results


@pytest.mark.parametrize("place", ["input", "weight", "pos_weight", "all"])
@every_reduction
@every_formula
def test_nothing_of_an_ignored_element_comes_through(loss: Member, reduction: str, place: str, device: str) -> None:
    if not loss.of_logits and place == "pos_weight":
        pytest.skip("probabilities have no pos_weight")
    # Longer than a vector, and no multiple of one: poison in vectors and in what is left over.
    numel = 3 * LANES + 3
    input, target, ignored = with_ignored(loss, numel, torch.float32, torch.float32, device)
    operands = {"input": input, "weight": torch.ones_like(input)}
    if loss.of_logits:
        operands["pos_weight"] = torch.full_like(input, 2.0)
    clean = {name: tensor.clone() for name, tensor in operands.items()}
    poison = torch.tensor(POISON, device=device).repeat(numel)[: int(ignored.sum())]
    for name, tensor in operands.items():
        if place in (name, "all"):
            tensor[ignored] = poison
    options = {"reduction": reduction, "ignore_index": IGNORE}
    given, expected = ({k: v for k, v in each.items() if k != "input"} for each in (operands, clean))
    value = gradients(loss, operands["input"], target, **given, **options)
    for actual, truth in zip(value, gradients(loss, clean["input"], target, **expected, **options), strict=True):
        assert torch.equal(actual, truth)
    truth = paths(loss, clean["input"], target, **expected, **options)
    for name, gradient in paths(loss, operands["input"], target, **given, **options).items():
        assert torch.equal(gradient, truth[name]), name
        assert (gradient[ignored] == 0).all(), name
    if place == "all":  # derivatives with respect to the weights
        leaves = [tensor.clone().requires_grad_() for tensor in given.values()]
        arguments = dict(zip(given, leaves, strict=True))
        loss(operands["input"], target, **arguments, **options).sum().backward()
        assert all((leaf.grad[ignored] == 0).all() for leaf in leaves)
        assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("index", [0, 1, 255, -1, 0.5, 0.1, 2.0])
@pytest.mark.parametrize("target_dtype", [torch.bool, torch.uint8, torch.int64, *FLOATING_DTYPES], ids=str)
@every_formula
def test_the_raw_target_is_compared(loss: Member, target_dtype: torch.dtype, index: float, device: str) -> None:
    """Before smoothing, in its own dtype: 0.1 of float32 and of float16 is an index of 0.1."""
    input, target = loss.make_input((40,), torch.float32, device), make_targets((40,), torch.float32, device)
    target = target.round() if not target_dtype.is_floating_point else target
    target = target.to(target_dtype)
    holds = index in (0, 1) or (target_dtype.is_floating_point or (target_dtype == torch.uint8 and index == 255))
    holds = holds or (target_dtype == torch.int64 and index == int(index))
    if holds:
        target[::2] = index
    ignored = (
        (target == torch.tensor(index, dtype=target_dtype, device=device)) if holds else torch.zeros_like(input) > 0
    )
    options = {"ignore_index": index, "label_smoothing": 0.2}
    values = loss(input, target, reduction="none", **options)
    assert torch.equal(values == 0, ignored | (values == 0))
    assert (values[ignored] == 0).all()
    kept = loss(input[~ignored], target[~ignored], reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(values[~ignored], kept, rtol=1e-6, atol=1e-9)
    mean = loss(input, target, **options)
    torch.testing.assert_close(mean, kept.mean().nan_to_num(torch.nan).to(mean.dtype), equal_nan=True)
    composite = torch.func.vmap(lambda x, y: loss(x, y, **options))(input[None], target[None])[0]
    torch.testing.assert_close(composite, mean, equal_nan=True)


@every_formula
def test_none_left(loss: Member, device: str) -> None:
    input = loss.make_input((5,), torch.float32, device).requires_grad_()
    target = torch.full((5,), IGNORE, device=device)
    assert loss(input, target, ignore_index=IGNORE).isnan()
    total = loss(input, target, ignore_index=IGNORE, reduction="sum")
    assert total == 0
    total.backward()
    assert (input.grad == 0).all()
    assert loss(input[:0], target[:0], ignore_index=IGNORE).isnan()
    assert loss(input[:0], target[:0], ignore_index=IGNORE, reduction="sum") == 0
    composite = torch.func.vmap(lambda x, y: loss(x, y, ignore_index=IGNORE))(input.detach()[None], target[None])
    assert composite.isnan().all()


# Nothing, less than the widest register and around it, and a chunk with a rest.
@pytest.mark.parametrize("numel", [0, 63, 64, 65, CHUNK + 129])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.float32], ids=str)
def test_the_number_of_valid_elements(dtype: torch.dtype, numel: int, device: str) -> None:
    low, high = (-128, 127) if dtype == torch.int8 else (0, 255)
    target = torch.randint(low, high + 1, (numel,), device=device).to(dtype)
    target[::2] = high  # more of one number than a byte can count
    # Numbers that no byte holds among them: their lowest byte would equal another. All are compared in float32.
    for index in (low, high, low - 1, high + 1, 0.5, high * (1 + 1e-9), 1e-46, 1e300, -1e300):
        expected = int((target.float() != torch.tensor(index)).sum())
        assert torch.ops.bce_ext._count_valid(target, index) == expected, index


def test_the_mean_divides_as_cross_entropy_does(device: str) -> None:
    logits = torch.randn(20, device=device)
    target = torch.randint(2, (20,), device=device)
    target[::3] = IGNORE
    two_classes = torch.stack([torch.zeros_like(logits), logits], 1)
    for smoothing in (0.0, 0.1):
        expected = torch.nn.functional.cross_entropy(
            two_classes, target, ignore_index=IGNORE, label_smoothing=smoothing
        )
        actual = EVERY_FORMULA[0](logits, target, ignore_index=IGNORE, label_smoothing=smoothing)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("requires_grad", [False, True])
@every_formula
def test_other_integers_are_refused(loss: Member, requires_grad: bool, device: str) -> None:
    if device != "cpu":
        pytest.skip("a device-side assertion ends the process")
    input = loss.make_input((40,), torch.float32, device).requires_grad_(requires_grad)
    target = torch.ones(40, dtype=torch.int64)
    target[17] = -100
    loss(input, target, ignore_index=-100)
    for options in ({}, {"ignore_index": 255}):
        with pytest.raises(RuntimeError, match="but one is -100"):
            loss(input, target, **options)


def test_probabilities_out_of_range_are_free_where_ignored() -> None:
    input, target = torch.tensor([0.5, 7.0, torch.nan]), torch.tensor([1.0, IGNORE, IGNORE])
    loss = EVERY_FORMULA[1]
    value = loss(input.requires_grad_(), target, ignore_index=IGNORE)
    torch.testing.assert_close(value, torch.tensor(2.0).log())
    value.backward()
    torch.testing.assert_close(input.grad, torch.tensor([-2.0, 0.0, 0.0]))
    for outside in (7.0, IGNORE):  # the number that ignores a target is no probability
        with pytest.raises(RuntimeError, match=f"between 0 and 1, but one is {outside:g}"):
            loss(torch.tensor([0.5, outside]), torch.tensor([IGNORE, 1.0]), ignore_index=IGNORE)


@every_reduction
def test_vmap_counts_each_example_by_itself(reduction: str, device: str) -> None:
    for loss in (EVERY_FORMULA[0], FOCAL[0]):
        input, target = loss.make_input((3, 7), torch.float32, device), torch.ones(3, 7, device=device)
        target[0, :2], target[1, :5] = IGNORE, IGNORE
        options = {"reduction": reduction, "ignore_index": IGNORE}
        batched = torch.func.vmap(lambda x, y: loss(x, y, **options))(input, target)  # noqa: B023
        each = torch.stack([loss(x, y, **options) for x, y in zip(input, target, strict=True)])
        torch.testing.assert_close(batched, each)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("target_dtype", [torch.int32, torch.int64, torch.uint32, torch.uint64], ids=str)
@pytest.mark.parametrize("index", [2**24, 2**31 - 2])
@every_formula
def test_integers_are_not_rounded(
    loss: Member, index: int, target_dtype: torch.dtype, dtype: torch.dtype, device: str
) -> None:
    # float32 has the same number for all of these.
    input = loss.make_input((40,), dtype, device)
    labels = (torch.arange(40) % 2).tolist()
    good = torch.tensor([*labels[:-1], index], dtype=target_dtype, device=device)
    weight = torch.ones(40, dtype=dtype, device=device, requires_grad=True)
    expected = loss(input[:-1], good[:-1].to(dtype))
    torch.testing.assert_close(loss(input, good, ignore_index=index), expected)
    torch.testing.assert_close(loss(input, good, weight=weight, ignore_index=index), expected)
    assert torch.ops.bce_ext._count_valid(good, index).item() == 39
    batched = torch.func.vmap(lambda x, y: loss(x, y, ignore_index=index))(input[None], good[None])
    torch.testing.assert_close(batched[0], expected)
    if device != "cpu":
        return  # a device-side assertion ends the process
    bad = torch.tensor([*labels[:-2], index, index + 1], dtype=target_dtype)
    for options in ({}, {"weight": weight}):
        with pytest.raises(RuntimeError, match=f"but one is {index + 1}"):
            loss(input, bad, ignore_index=index, **options)


def test_a_batch_of_none_beside_a_divisor_of_each_example(device: str) -> None:
    loss = EVERY_FORMULA[0]
    input = torch.full((0, 3), 0.5, device=device)

    def ignoring(input: Tensor) -> Tensor:
        return loss(input, torch.ones_like(input), ignore_index=-100)

    assert torch.func.vmap(ignoring)(input).shape == (0,)
    assert torch.func.vmap(torch.func.grad(ignoring))(input).shape == (0, 3)
    divided = torch.func.vmap(lambda x, n: loss(x, torch.ones_like(x), normalizer=n))
    assert divided(input, torch.ones(0, device=device)).shape == (0,)
