"""Any memory layout gives the answer of the contiguous one, element for element, and a dense layout of the input is kept by loss and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from reference import BLOCK, CHUNK, REDUCTIONS, make_logits, make_targets, make_weights
from torch import Tensor

import bce_ext.functional as F

# (Each layout takes a contiguous tensor, and gives one of the same values that lies in memory in another way.)
Layout = Callable[[Tensor], Tensor]


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def reversed_dims(tensor: Tensor) -> Tensor:
    order = list(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def every_other_element(tensor: Tensor) -> Tensor:
    storage = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), 99)
    view = storage[..., 1::2]
    view.copy_(tensor)
    return view


def cropped(tensor: Tensor) -> Tensor:
    """A window in a larger tensor: rows are contiguous, with gaps between them, from an odd offset on."""
    storage = tensor.new_full(tuple(size + 3 for size in tensor.shape), 99)
    view = storage[tuple(slice(1, size + 1) for size in tensor.shape)]
    view.copy_(tensor)
    return view


def offset(tensor: Tensor) -> Tensor:
    """Contiguous, one element behind the alignment of an allocation."""
    storage = tensor.new_full((tensor.numel() + 1,), 99)
    view = storage[1:].view(tensor.shape)
    view.copy_(tensor)
    return view


LAYOUTS: tuple[Layout, ...] = (
    contiguous,
    transposed,
    reversed_dims,
    channels_last,
    every_other_element,
    cropped,
    offset,
)
DENSE: tuple[Layout, ...] = (contiguous, transposed, reversed_dims, channels_last, offset)

# Batch, channels, height, width: no size divides another, the rows are no multiple of a vector, and all of it is more
# than a block.
IMAGES = (4, 3, 11, 37)


def ids(layout: Layout) -> str:
    return layout.__name__


def evaluate(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    with_target: bool = False,
) -> tuple[Tensor, ...]:
    input = input.detach().requires_grad_()
    target = target.detach().requires_grad_(with_target)
    loss = F.binary_cross_entropy_with_logits(input, target, weight=weight, pos_weight=pos_weight, reduction=reduction)
    inputs = [input, target] if with_target else [input]
    grad_output = make_weights(tuple(loss.shape), loss.dtype, str(loss.device), seed=9)
    return (loss.detach(), *torch.autograd.grad(loss, inputs, grad_output))


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Element for element the same bits; a sum is taken in the order of memory, so it may differ in the last place. Each CUDA kernel rounds by
    itself: all may differ in the last places."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        eps = torch.finfo(a.dtype).eps
        if a.is_cuda:
            torch.testing.assert_close(a, e, rtol=4 * eps, atol=eps * e.abs().max().item() if e.numel() else 0)
        else:
            assert torch.equal(a, e) if a.dim() else torch.allclose(a, e, rtol=2 * eps, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("target_layout", LAYOUTS, ids=ids)
@pytest.mark.parametrize("input_layout", LAYOUTS, ids=ids)
def test_layouts_of_input_and_target_need_not_agree(
    input_layout: Layout, target_layout: Layout, reduction: str, device: str
) -> None:
    input, target = make_logits(IMAGES, torch.float32, device), make_targets(IMAGES, torch.float32, device)
    weight, pos_weight = (
        make_weights((3, 1, 1), torch.float32, device),
        make_weights(IMAGES, torch.float32, device, seed=3),
    )
    expected = evaluate(input, target, weight, pos_weight, reduction)
    actual = evaluate(input_layout(input), target_layout(target), weight, pos_weight, reduction)
    assert_same(actual, expected)
    assert_same(
        evaluate(input_layout(input), target_layout(target), weight, pos_weight, reduction, with_target=True),
        evaluate(input, target, weight, pos_weight, reduction, with_target=True),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
def test_layouts_of_full_weights(layout: Layout, reduction: str, device: str) -> None:
    input, target = make_logits(IMAGES, torch.float32, device), make_targets(IMAGES, torch.float32, device)
    weight, pos_weight = (
        make_weights(IMAGES, torch.float32, device),
        make_weights(IMAGES, torch.float32, device, seed=3),
    )
    expected = evaluate(input, target, weight, pos_weight, reduction)
    assert_same(evaluate(input, target, layout(weight), pos_weight, reduction), expected)
    assert_same(evaluate(input, target, weight, layout(pos_weight), reduction), expected)
    assert_same(evaluate(channels_last(input), target, layout(weight), layout(pos_weight), reduction), expected)


@pytest.mark.parametrize(
    "weight_shape", [(3, 1, 1), (37,), (11, 1), (4, 1, 1, 37), (1, 3, 1, 1), (4, 3, 11, 37)], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=ids)
def test_weights_broadcast_into_every_layout(layout: Layout, weight_shape: tuple[int, ...], device: str) -> None:
    input, target = make_logits(IMAGES, torch.float32, device), make_targets(IMAGES, torch.float32, device)
    weight, pos_weight = (make_weights(weight_shape, torch.float32, device, seed) for seed in (2, 3))
    expected = evaluate(input, target, weight, pos_weight, "none", with_target=True)
    assert_same(evaluate(layout(input), layout(target), weight, pos_weight, "none", with_target=True), expected)


@pytest.mark.parametrize("dtype", reference.FLOATING_DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", DENSE, ids=ids)
def test_dense_layouts_are_kept(layout: Layout, reduction: str, dtype: torch.dtype, device: str) -> None:
    input, target = layout(make_logits(IMAGES, dtype, device)), layout(make_targets(IMAGES, dtype, device))
    loss, grad_input, grad_target = evaluate(input, target, None, None, reduction, with_target=True)
    assert grad_input.stride() == input.stride()
    assert grad_target.stride() == input.stride()
    if reduction == "none":
        assert loss.stride() == input.stride()
    (_, alone) = evaluate(input, target, None, None, reduction)
    assert alone.stride() == input.stride()


def all_expanded(tensor: Tensor) -> Tensor:
    return tensor[:1, :1, :1, :1].expand_as(tensor)


def columns_expanded(tensor: Tensor) -> Tensor:
    return channels_last(tensor)[..., :1].expand_as(tensor)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target_layout", [*LAYOUTS, all_expanded, columns_expanded], ids=ids)
@pytest.mark.parametrize("input_layout", [*LAYOUTS, all_expanded, columns_expanded], ids=ids)
def test_losses_lie_in_memory_as_those_of_torch(
    input_layout: Layout, target_layout: Layout, weighted: bool, device: str
) -> None:
    """What comes after the loss may be a view of it: with logits they have the order of the target, with probabilities that of the input."""
    input = input_layout(make_logits(IMAGES, torch.float32, device))
    target = target_layout(make_targets(IMAGES, torch.float32, device))
    weight = make_weights((3, 1, 1), torch.float32, device) if weighted else None
    for name, tensor in (("binary_cross_entropy_with_logits", input), ("binary_cross_entropy", input.sigmoid())):
        arguments: dict[str, Any] = {"weight": weight, "reduction": "none"}
        native = getattr(torch.nn.functional, name)
        exact = native(tensor.double(), target.double(), None if weight is None else weight.double(), reduction="none")
        for leaf in (tensor, tensor.detach().requires_grad_()):
            loss = getattr(F, name)(leaf, target, **arguments)
            assert loss.stride() == native(leaf, target, **arguments).stride()
            torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["binary_cross_entropy_with_logits", "binary_cross_entropy"])
@pytest.mark.parametrize("layout", [every_other_element, cropped], ids=ids)
def test_outputs_of_an_input_with_gaps_have_none(layout: Layout, name: str, device: str) -> None:
    input = layout(make_logits(IMAGES, torch.float32, device).sigmoid()).requires_grad_()
    loss = getattr(F, name)(input, torch.zeros_like(input), reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), input)
    assert loss.is_contiguous()
    assert gradient.is_contiguous()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("expanded", ["input", "target", "weight", "pos_weight", "all"])
@pytest.mark.parametrize("shape", [(1, 37), (11, 1), (1, 1)], ids=str)
def test_expanded_tensors_are_read_with_stride_zero(
    shape: tuple[int, int], expanded: str, reduction: str, device: str
) -> None:
    full = (11, 37)
    makers = {
        "input": make_logits,
        "target": make_targets,
        "weight": make_weights,
        "pos_weight": make_weights,
    }
    tensors = {
        name: make(shape, torch.float32, device).expand(full)
        if expanded in (name, "all")
        else make(full, torch.float32, device)
        for name, make in makers.items()
    }
    dense = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert_same(evaluate(**tensors, reduction=reduction), evaluate(**dense, reduction=reduction))


def test_the_gradient_of_an_expanded_leaf_is_summed(device: str) -> None:
    leaf = make_logits((1, 37), torch.float64, device).requires_grad_()
    F.binary_cross_entropy_with_logits(
        leaf.expand(11, 37), torch.ones(11, 37, device=device), reduction="sum"
    ).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, 11 * (torch.sigmoid(leaf.detach()) - 1))


# The first dimension is 1, the last, all, or one in the middle: such a dimension has a stride that means nothing.
@pytest.mark.parametrize("shape", [(1, 37), (37, 1), (1, 1, 1), (5, 1, 37), (1, 5, 1, 37, 1)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dimensions_of_size_one(shape: tuple[int, ...], reduction: str, device: str) -> None:
    input, target = make_logits(shape, torch.float32, device), make_targets(shape, torch.float32, device)
    weight = make_weights((*shape[:-1], 1), torch.float32, device)
    expected = evaluate(input, target, weight, None, reduction)
    odd_strides = [7919 if size == 1 else stride for size, stride in zip(shape, input.stride(), strict=True)]
    assert_same(evaluate(input.as_strided(shape, odd_strides), target, weight, None, reduction), expected)
    assert_same(evaluate(input, target.as_strided(shape, odd_strides), weight, None, reduction), expected)


# 8 dimensions is what a kernel can walk; with the dimensions of the target reversed none of them can be joined.
@pytest.mark.parametrize("dims", [7, 8, 9, 12])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_more_dimensions_than_a_kernel_walks(dims: int, reduction: str, device: str) -> None:
    shape = (2,) * dims
    input, target = make_logits(shape, torch.float32, device), make_targets(shape, torch.float32, device)
    weight = make_weights(
        tuple(1 + d % 2 for d in range(dims)), torch.float32, device
    )  # every other dimension broadcasts
    expected = reference.reduced(reference.with_logits(input, target, weight), reduction)
    grad_output = make_weights(shape if reduction == "none" else (), torch.float32, device, seed=9)
    expected = reference.reduced(reference.with_logits(input, target, weight), reduction, grad_output)
    for x, y in (
        (input, reversed_dims(target)),
        (reversed_dims(input), target),
        (every_other_element(input), reversed_dims(target)),
    ):
        loss, gradient = evaluate(x, y, weight, None, reduction)
        reference.assert_rounded_once(loss, expected.loss, expected.loss_scale, torch.float32, what="loss")
        reference.assert_rounded_once(
            gradient, expected.grad_input, expected.grad_input_scale, torch.float32, what="gradient"
        )


# Pointers from 1 to 7 elements behind an alignment of 16 or 64 bytes, of each tensor by itself.
@pytest.mark.parametrize("dtype", reference.FLOATING_DTYPES, ids=str)
@pytest.mark.parametrize("numel", [37, BLOCK + 37, CHUNK + 37])
def test_misaligned_pointers(numel: int, dtype: torch.dtype, device: str) -> None:
    tensors = {
        "input": make_logits((numel,), dtype, device),
        "target": make_targets((numel,), dtype, device),
        "weight": make_weights((numel,), dtype, device),
        "pos_weight": make_weights((numel,), dtype, device, seed=3),
    }
    for reduction in REDUCTIONS:
        expected = evaluate(**tensors, reduction=reduction)
        for name, tensor in tensors.items():
            for shift in (1, 2, 3, 7):
                storage = tensor.new_empty(numel + shift)
                storage[shift:] = tensor
                actual = evaluate(**{**tensors, name: storage[shift:]}, reduction=reduction)
                if device == "cuda":
                    assert_same(actual, expected)
                else:
                    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_of_a_strided_target_across_chunks(reduction: str, device: str) -> None:
    # Rows of 1031, a prime, so that chunks and blocks begin in the middle of rows; 3 chunks.
    shape = (3 * CHUNK // 1031 + 1, 1031)
    input, target = make_logits(shape, torch.float32, device), make_targets(shape, torch.float32, device)
    expected = evaluate(input, target, None, None, reduction)
    assert_same(evaluate(input, transposed(target), None, None, reduction), expected)
    assert_same(evaluate(transposed(input), target, None, None, reduction), expected)
    assert_same(evaluate(cropped(input), every_other_element(target), None, None, reduction), expected)


# An input and a target whose elements are neighbours along different dimensions: a CPU reads rectangles of them.
CROSSED = {
    "images": ((2, 70, 40, 50), channels_last),  # all rows of a rectangle follow each other
    "nine channels": ((2, 9, 60, 70), channels_last),  # a rectangle of more rows than columns
    "five channels": ((2, 5, 60, 70), channels_last),  # short rows; the other way round, few long ones
    "three channels": ((2, 3, 60, 70), channels_last),
    "two channels": ((2, 2, 60, 70), channels_last),
    "long rows": ((85, 1100), transposed),  # rows in three parts, the last one no multiple of a vector
    "odd sizes": ((1, 613, 17, 31), channels_last),  # rows that begin anywhere
    "three dimensions": ((140, 5, 150), reversed_dims),  # rows that are not neighbours in the walk
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "target_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.uint8, torch.int64], ids=str
)
@pytest.mark.parametrize("name", CROSSED)
def test_layouts_that_cross(name: str, target_dtype: torch.dtype, reduction: str, device: str) -> None:
    shape, layout = CROSSED[name]
    input, target = make_logits(shape, torch.float32, device), make_targets(shape, target_dtype, device)
    expected = evaluate(input, target, None, None, reduction)
    assert_same(evaluate(layout(input), target, None, None, reduction), expected)
    assert_same(evaluate(input, layout(target), None, None, reduction), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", reference.FLOATING_DTYPES, ids=str)
@pytest.mark.parametrize("name", CROSSED)
def test_weights_and_gradients_that_cross(name: str, dtype: torch.dtype, reduction: str, device: str) -> None:
    shape, layout = CROSSED[name]
    input, target = make_logits(shape, dtype, device), make_targets(shape, dtype, device)
    weight, row_weight = make_weights(shape, dtype, device, seed=3), make_weights(shape[-1:], dtype, device, seed=4)
    for w, p in ((weight, None), (None, weight), (row_weight, weight), (None, row_weight)):
        expected = evaluate(input, target, w, p, reduction, with_target=True)
        crossed = [tensor if tensor is None or tensor.dim() == 1 else layout(tensor) for tensor in (w, p)]
        assert_same(evaluate(layout(input), target, w, p, reduction, with_target=True), expected)
        assert_same(evaluate(input, target, *crossed, reduction, with_target=True), expected)
        assert_same(evaluate(layout(input), layout(target), w, p, reduction, with_target=True), expected)


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("name", CROSSED)
def test_ignored_labels_in_layouts_that_cross(name: str, target_dtype: torch.dtype, device: str) -> None:
    shape, layout = CROSSED[name]
    input = make_logits(shape, torch.float32, device)
    target = torch.arange(input.numel(), device=device).remainder(7).fmod(3).view(shape).to(target_dtype)
    weight = make_weights(shape, torch.float32, device)
    for w in (None, weight):
        results = []
        for x, y, v in (
            (input, target, w),
            (layout(input), target, w),
            (input, layout(target), w),
            (input, target, w if w is None else layout(w)),
        ):
            leaf = x.detach().requires_grad_()
            loss = F.binary_cross_entropy_with_logits(leaf, y, weight=v, ignore_index=2)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        for actual in results[1:]:
            assert_same(actual, results[0])


def test_gradients_past_the_caches_in_layouts_that_cross(device: str) -> None:
    # Large enough for stores past the caches, which must be aligned; blocks begin at any element, as 1801 is odd.
    shape = (1801, 1801)
    input, target = make_logits(shape, torch.float32, device), make_targets(shape, torch.bool, device)
    expected = evaluate(input, target, None, None, "mean")
    assert_same(evaluate(transposed(input), target, None, None, "mean"), expected)
    assert_same(evaluate(input, transposed(target), None, None, "none"), evaluate(input, target, None, None, "none"))


@pytest.mark.parametrize("place", [(0, 0), (15, 511), (16, 512), (84, 1099)], ids=str)
def test_bad_labels_are_found_in_layouts_that_cross(place: tuple[int, int]) -> None:
    input, target = torch.zeros(85, 1100), torch.zeros(85, 1100, dtype=torch.int64)
    target[place] = 7
    with pytest.raises(RuntimeError, match="7"):
        F.binary_cross_entropy_with_logits(input, transposed(target))
    with pytest.raises(RuntimeError, match="7"):
        F.binary_cross_entropy_with_logits(transposed(input), target)
    with pytest.raises(RuntimeError, match=r"-0\.5"):
        F.binary_cross_entropy(
            transposed(input.index_put((torch.tensor(place[0]), torch.tensor(place[1])), torch.tensor(-0.5))), input
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_negated_views(reduction: str, device: str) -> None:
    # The imaginary part of a conjugate is a view with the negative bit: its memory holds the opposite sign.
    values = make_logits((37,), torch.float32, device)
    input = torch.complex(values, -values).conj().imag
    target = torch.complex(values, -make_targets((37,), torch.float32, device)).conj().imag
    assert input.is_neg()
    assert target.is_neg()
    assert_same(
        evaluate(input, target, None, None, reduction),
        evaluate(input.resolve_neg(), target.resolve_neg(), None, None, reduction),
    )
