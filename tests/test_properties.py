"""Random shapes, strides, broadcasts, dtypes, weights and reductions against the float64 reference.

BCE_EXT_EXAMPLES sets the number of examples of each property; the default makes 2,800 in all.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import reference
import torch
from callables import FAMILY, functional, operator, probabilities_functional, probabilities_operator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

EXAMPLES = int(os.environ.get("BCE_EXT_EXAMPLES", 800))
PROFILE = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="BCE_EXT_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TARGETS = (*FLOATS, torch.bool, torch.uint8, torch.int8, torch.int64)


@dataclass
class Layout:
    """Where a tensor lies in memory: the order of its dimensions, the steps between elements, an offset."""

    order: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int

    def apply(self, tensor: Tensor) -> Tensor:
        """The same numbers, laid out like this. Steps of 0 leave an expanded dimension as it is."""
        sizes = [size * step for size, step in zip(tensor.shape, self.steps, strict=True)]
        storage = torch.empty(self.offset + max(1, torch.Size(sizes).numel()), dtype=tensor.dtype, device=tensor.device)
        strides, stride = [0] * len(sizes), 1
        for dim in reversed(self.order):
            strides[dim] = stride * self.steps[dim]
            stride *= sizes[dim]
        view = storage.as_strided(tensor.shape, strides, self.offset)
        return view.copy_(tensor)


@st.composite
def layouts(draw: st.DrawFn, ndim: int) -> Layout:
    order = tuple(draw(st.permutations(range(ndim))))
    steps = tuple(draw(st.lists(st.sampled_from([1, 1, 1, 2]), min_size=ndim, max_size=ndim)))
    return Layout(order, steps, draw(st.integers(0, 3)))


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """Small and empty ones, and some that are longer than a block of the kernel."""
    if draw(st.integers(0, 9)) == 0:
        return (draw(st.integers(1, 3)), draw(st.integers(500, 2000)))
    return tuple(draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 8, 17]), max_size=5)))


@st.composite
def broadcast_shapes(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    kept = draw(st.integers(0, len(shape)))
    return tuple(draw(st.sampled_from([size, 1])) for size in shape[len(shape) - kept :])


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Case:
    input: Tensor
    target: Tensor
    weight: Tensor | None
    pos_weight: Tensor | None
    reduction: str
    needs: tuple[bool, bool]  # whether input and target require grad
    through_operator: bool


@st.composite
def cases(draw: st.DrawFn, with_logits: bool) -> Case:
    shape = draw(shapes())
    seed = draw(st.integers(0, 2**16))
    layout = layouts(len(shape))
    dtype = draw(st.sampled_from(FLOATS))
    target_dtype = draw(st.sampled_from((dtype, *TARGETS)))

    uniform = values(shape, seed)
    if with_logits:
        scale = draw(st.sampled_from([1.0, 8.0, 100.0, 2000.0]))
        input = (uniform * 2 - 1) * scale
    else:
        edges = values(shape, seed + 1)
        input = torch.where(edges < 0.05, 0.0, torch.where(edges > 0.95, 1.0, uniform))
    labels = values(shape, seed + 2)
    if not target_dtype.is_floating_point or draw(st.booleans()):
        labels = labels.round()

    weights: list[Tensor | None] = [None, None]
    for index in range(2 if with_logits else 1):
        if draw(st.booleans()):
            of_shape = draw(broadcast_shapes(shape))
            weight = values(of_shape, seed + 3 + index) * 3
            weight = torch.where(weight < 0.3, 0.0, weight)
            weights[index] = draw(layouts(len(of_shape))).apply(
                weight.to(draw(st.sampled_from((dtype, *FLOATS, torch.int64))))
            )

    input = draw(layout).apply(input.to(dtype))
    target = draw(layout).apply(labels.to(target_dtype))
    if shape and draw(st.integers(0, 5)) == 0:  # a dimension that is expanded
        dim = draw(st.integers(0, len(shape) - 1))
        if shape[dim] > 0:
            input = input.narrow(dim, 0, 1).expand(shape)
    return Case(
        input,
        target,
        weights[0],
        weights[1],
        draw(st.sampled_from(reference.REDUCTIONS)),
        (draw(st.booleans()), target_dtype.is_floating_point and draw(st.booleans())),
        draw(st.booleans()),
    )


def check(case: Case, with_logits: bool, device: str) -> None:
    input, target = (tensor.to(device).detach() for tensor in (case.input, case.target))
    weight, pos_weight = (None if w is None else w.to(device) for w in (case.weight, case.pos_weight))
    input.requires_grad_(case.needs[0])
    target.requires_grad_(case.needs[1])
    if with_logits:
        terms = reference.with_logits(input, target, weight, pos_weight)
        loss = (operator if case.through_operator else functional)(input, target, weight, pos_weight, case.reduction)
    else:
        terms = reference.probabilities(input, target, weight)
        loss = (probabilities_operator if case.through_operator else probabilities_functional)(
            input, target, weight, case.reduction
        )

    arithmetic = reference.arithmetic_dtype(input.dtype, target.dtype)
    dtype = torch.promote_types(input.dtype, target.dtype) if target.is_floating_point() else input.dtype
    assert loss.dtype == dtype
    factor = 1.0
    if any(case.needs):
        # Gradients of a loss that is multiplied, as gradient scalers do; exactly, so that no rounding of ours is in the factor.
        factor = 4.0
        (loss * factor).sum().backward()
    expected = reference.reduced(terms, case.reduction, factor)
    if case.reduction == "mean" and input.numel() == 0:
        assert loss.isnan()
    else:
        reference.assert_rounded_once(
            loss.detach(), expected.loss, expected.loss_scale, arithmetic, ulps=16, what="loss"
        )
    for tensor, gradient, scale in (
        (input, expected.grad_input, expected.grad_input_scale),
        (target, expected.grad_target, expected.grad_target_scale),
    ):
        if tensor.requires_grad:
            assert tensor.grad is not None
            assert tensor.grad.dtype == tensor.dtype
            # A gradient that was stored rounded and then multiplied is rounded a second time below the normal numbers only.
            reference.assert_rounded_once(
                tensor.grad, gradient, scale + reference_floor(tensor.dtype, arithmetic), arithmetic, ulps=16
            )
        else:
            assert tensor.grad is None


def reference_floor(dtype: torch.dtype, arithmetic: torch.dtype) -> float:
    """A scale whose tolerance is a few of the smallest numbers of the dtype: factor times what storing it lost."""
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    return 4 * smallest / (16 * torch.finfo(arithmetic).eps)


@PROFILE
@given(case=cases(with_logits=True))
def test_logits(case: Case, device: str) -> None:
    check(case, True, device)


@PROFILE
@given(case=cases(with_logits=False))
def test_probabilities(case: Case, device: str) -> None:
    check(case, False, device)


@PROFILE
@given(case=cases(with_logits=True), data=st.data())
def test_shards_add_up(case: Case, data: st.DataObject, device: str) -> None:
    """The kernels are linear in shards of a batch: what distributed tensors rest on."""
    if case.input.dim() == 0 or case.input.numel() == 0:
        return
    ops = torch.ops.bce_ext
    dtype = (
        torch.promote_types(case.input.dtype, case.target.dtype)
        if case.target.is_floating_point()
        else case.input.dtype
    )
    if dtype not in (torch.float32, torch.float64):
        return
    dim = data.draw(st.integers(0, case.input.dim() - 1))
    split = data.draw(st.integers(0, case.input.shape[dim]))
    weight = None if case.weight is None else case.weight.expand(case.input.shape)
    operands = [case.input, case.target, weight]
    numel = case.input.numel()

    def run(tensors: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        tensors = [None if each is None else each.to(device) for each in tensors]
        loss, gradient = ops._bce_loss_and_grad(*tensors, None, None, 0, [], numel, dtype)
        return loss, gradient

    whole_loss, whole_gradient = run(operands)
    parts = [
        run([None if each is None else each.narrow(dim, start, length) for each in operands])
        for start, length in ((0, split), (split, case.input.shape[dim] - split))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in parts], dim), whole_gradient, rtol=0, atol=0)


@settings(PROFILE, max_examples=EXAMPLES // 2)
@given(data=st.data())
def test_every_argument_of_every_loss(data: st.DataObject, device: str) -> None:
    loss = data.draw(st.sampled_from(FAMILY), label="loss")
    case = data.draw(cases(with_logits=loss.of_logits), label="case")
    smoothing = data.draw(st.sampled_from([0.0, 0.1, 1.0]), label="label_smoothing")
    ignore_index = data.draw(st.sampled_from([None, 0.0, 1.0]), label="ignore_index")
    normalizer = data.draw(st.sampled_from([None, 2.5, torch.tensor(4.0)]), label="normalizer")
    options = {"label_smoothing": smoothing, "ignore_index": ignore_index}
    weights = {"weight": case.weight, "pos_weight": case.pos_weight}
    weights = {name: weight.to(device) for name, weight in weights.items() if weight is not None}
    input, target = (tensor.to(device).detach() for tensor in (case.input, case.target))
    reduction = "mean" if normalizer is not None else case.reduction
    count = target.numel() if ignore_index is None else int((target != ignore_index).sum())
    expected = reference.reduced(
        loss.terms(input, target, **options, **weights),
        reduction,
        divisor=float(count if normalizer is None else normalizer),
    )
    input.requires_grad_(case.needs[0])
    target.requires_grad_(case.needs[1])
    actual = loss(input, target, reduction=reduction, normalizer=normalizer, **options, **weights)
    arithmetic = reference.arithmetic_dtype(input.dtype, target.dtype)
    ulps = 2 * loss.ulps + 16
    # A sum of what underflows: each element is rounded in the subnormal numbers.
    smallest = torch.finfo(arithmetic).tiny * (1 + input.numel())
    reference.assert_rounded_once(
        actual.detach(), expected.loss, expected.loss_scale + smallest, arithmetic, ulps, f"loss of {loss.name}"
    )
    if not actual.requires_grad:
        return
    actual.backward(torch.ones_like(actual))
    parts = (
        (input, expected.grad_input, expected.grad_input_scale),
        (target, expected.grad_target, expected.grad_target_scale),
    )
    for tensor, gradient, scale in parts:
        if tensor.requires_grad:
            assert tensor.grad is not None
            bound = scale + smallest + reference_floor(tensor.dtype, arithmetic)
            reference.assert_rounded_once(tensor.grad, gradient, bound, arithmetic, ulps, f"gradient of {loss.name}")


def test_the_number_of_examples() -> None:
    assert 3 * EXAMPLES >= 2000 or "BCE_EXT_EXAMPLES" in os.environ, "fewer examples than promised"
