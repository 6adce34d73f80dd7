"""The focal and the asymmetric loss, and smoothing for every loss: values and gradients are those of the formulas in float64, in every form of call."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from callables import (
    ASYMMETRIC,
    EVERY_FORMULA,
    FOCAL,
    FOCUSED,
    Member,
    every_focused,
    every_formula,
    every_member,
    every_reduction,
)
from reference import (
    BLOCK,
    CHUNK,
    FLOATING_DTYPES,
    LANES,
    REDUCTION_NUMBER,
    REDUCTIONS,
    Terms,
    arithmetic_dtype,
    assert_rounded_once,
    make_targets,
    make_weights,
    reduced,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import bce_ext

# A scalar; empty; a vector and an odd rest; a block and one element, which is computed in a buffer; chunks of two
# threads with a rest; rows that end in the middle of a vector.
SHAPES = [(), (3, 0, 2), (LANES + 3,), (BLOCK + 1,), (CHUNK + LANES + 5,), (7, 13)]
every_dtype = pytest.mark.parametrize("dtype", FLOATING_DTYPES, ids=str)


def differentiated(
    loss: Member, input: Tensor, target: Tensor, grad_output: Tensor | float = 1.0, **arguments: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, gradient of the input and, of a floating target, that of the target."""
    input = input.detach().requires_grad_()
    target = target.detach().requires_grad_(target.is_floating_point())
    value = loss(input, target, **arguments)
    leaves = [input, target] if target.requires_grad else [input]
    cotangent = torch.as_tensor(grad_output, dtype=value.dtype, device=value.device).expand_as(value)
    gradients = torch.autograd.grad(value, leaves, cotangent)
    return value.detach(), gradients[0], gradients[1] if target.requires_grad else None


def one_pass(loss: Member, input: Tensor, target: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient where the target has none: a mean or sum computes both at once."""
    input = input.detach().requires_grad_()
    value = loss(input, target.detach(), **arguments)
    return value.detach(), torch.autograd.grad(value, input, torch.ones_like(value))[0]


def assert_terms(actual: tuple[Tensor | None, ...], expected: Terms, arithmetic: torch.dtype, ulps: float) -> None:
    parts = ((expected.loss, expected.loss_scale), (expected.grad_input, expected.grad_input_scale))
    parts += ((expected.grad_target, expected.grad_target_scale),)
    for value, (truth, scale), what in zip(actual, parts, ("loss", "grad_input", "grad_target"), strict=False):
        if value is not None:
            assert_rounded_once(value, truth, scale, arithmetic, ulps, what)


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["hard", "smoothed"])
@every_reduction
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_formula
def test_every_shape_and_dtype(
    loss: Member, shape: tuple[int, ...], dtype: torch.dtype, reduction: str, smoothing: float, device: str
) -> None:
    input, target = loss.make_input(shape, dtype, device), make_targets(shape, dtype, device)
    expected = reduced(loss.terms(input, target, label_smoothing=smoothing), reduction)
    arithmetic = arithmetic_dtype(dtype)
    ulps = loss.ulps + (16 if smoothing else 0)  # 1 - y is rounded relative to 1, not to itself
    options = {"reduction": reduction, "label_smoothing": smoothing}
    actual = differentiated(loss, input, target, **options)
    assert actual[0].dtype == actual[1].dtype == dtype
    assert_terms(actual, expected, arithmetic, ulps)
    assert_terms(one_pass(loss, input, target, **options), expected, arithmetic, ulps)
    assert_terms((loss(input, target, **options),), expected, arithmetic, ulps)


@every_reduction
@every_focused
def test_every_parameter(loss: Member, reduction: str, device: str) -> None:
    shape = (3, 2 * BLOCK + 7)
    input, target = loss.make_input(shape, torch.float32, device), make_targets(shape, torch.float32, device)
    expected = reduced(loss.terms(input, target), reduction)
    assert_terms(differentiated(loss, input, target, reduction=reduction), expected, torch.float32, loss.ulps)
    assert_terms(one_pass(loss, input, target, reduction=reduction), expected, torch.float32, loss.ulps)


TARGET_DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.uint64, *FLOATING_DTYPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target_dtype", TARGET_DTYPES, ids=str)
@every_formula
def test_every_target_dtype(loss: Member, target_dtype: torch.dtype, dtype: torch.dtype, device: str) -> None:
    shape = (5, 37)
    input, target = loss.make_input(shape, dtype, device), make_targets(shape, target_dtype, device)
    arithmetic = arithmetic_dtype(dtype, target_dtype)
    for smoothing in (0.0, 0.2):
        expected = reduced(loss.terms(input, target, label_smoothing=smoothing), "mean")
        actual = differentiated(loss, input, target, label_smoothing=smoothing)
        assert_terms(actual, expected, arithmetic, loss.ulps + (16 if smoothing else 0))


# Against an input of (4, 3, 37): 37 is longer than two vectors and no multiple of one.
WEIGHT_SHAPES = [(), (37,), (3, 1), (4, 1, 1), (4, 3, 37)]


@every_reduction
@pytest.mark.parametrize("pos_weight_shape", [None, *WEIGHT_SHAPES], ids=str)
@pytest.mark.parametrize("weight_shape", [None, *WEIGHT_SHAPES], ids=str)
@pytest.mark.parametrize("loss", [FOCAL[0], FOCAL[2], ASYMMETRIC[0]], ids=lambda loss: loss.name)
def test_weights_broadcast(
    loss: Member,
    weight_shape: tuple[int, ...] | None,
    pos_weight_shape: tuple[int, ...] | None,
    reduction: str,
    device: str,
) -> None:
    shape = (4, 3, 37)
    input, target = loss.make_input(shape, torch.float32, device), make_targets(shape, torch.float32, device)
    weights = {
        name: make_weights(of_shape, torch.float32, device, seed)
        for name, of_shape, seed in (("weight", weight_shape, 2), ("pos_weight", pos_weight_shape, 3))
        if of_shape is not None
    }
    grad_output = make_weights(shape if reduction == "none" else (), torch.float32, device, seed=4)
    expected = reduced(loss.terms(input, target, **weights), reduction, grad_output)
    actual = differentiated(loss, input, target, grad_output, reduction=reduction, **weights)
    assert_terms(actual, expected, torch.float32, loss.ulps)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "expanded", "sliced"])
@every_formula
def test_every_layout(loss: Member, layout: str, device: str) -> None:
    shape = (3, 5, 4, 7)
    input, target = loss.make_input(shape, torch.float32, device), make_targets(shape, torch.float32, device)
    match layout:
        case "transposed":
            input = input.mT.contiguous().mT
        case "channels_last":
            input = input.contiguous(memory_format=torch.channels_last)
        case "expanded":
            target = target[:1].expand(shape)
        case "sliced":
            target = torch.cat([target, target], -1)[..., : shape[-1]]
    options = {"label_smoothing": 0.1, "ignore_index": 1.0}
    count = float((target != 1).sum())
    expected = reduced(loss.terms(input, target, **options), "mean", divisor=count)
    assert_terms(differentiated(loss, input, target, **options), expected, torch.float32, loss.ulps + 16)


# ---- exactness ----


SATURATED = [0.0, 1e-40, 1.0, 17.0, 40.0, 88.0, 88.8, 100.0, 104.0, 1e4, 1e30, torch.inf]


@pytest.mark.parametrize("path", ["fused", "create_graph", "func", "vmap", "second"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@every_focused
def test_gradients_are_finite_at_every_logit(loss: Member, dtype: torch.dtype, path: str, device: str) -> None:
    """For every exponent, also below 1, where the power has an infinite slope at 0. Infinite logits of the wrong sign have infinite losses."""
    logits = torch.tensor([*SATURATED, *(-x for x in SATURATED)], dtype=dtype, device=device)
    input, target = (each.flatten() for each in torch.broadcast_tensors(logits, logits.new_tensor([[0], [1], [0.3]])))
    kept = input.isfinite() | ((input > 0) & (target == 1)) | ((input < 0) & (target == 0))
    input, target = input[kept], target[kept]

    def total(x: Tensor) -> Tensor:
        return loss(x, target, reduction="none").sum()

    leaf = input.clone().requires_grad_()
    if path == "fused":
        (gradient,) = torch.autograd.grad(total(leaf), leaf)
    elif path == "create_graph":
        (gradient,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
    elif path == "func":
        gradient = torch.func.grad(total)(input)
    elif path == "vmap":
        gradient = torch.func.vmap(torch.func.grad(lambda x, y: loss(x, y, reduction="sum")))(input, target)
    else:
        (first,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
        (gradient,) = torch.autograd.grad(first.sum(), leaf) if first.requires_grad else (torch.zeros_like(leaf),)
    bad = ~gradient.isfinite()
    assert not bad.any(), f"{gradient[bad].tolist()} at {input[bad].tolist()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("label", [0.0, 1.0])
@every_focused
def test_hard_labels_at_the_largest_logits(loss: Member, label: float, dtype: torch.dtype, device: str) -> None:
    """Hard labels have a form of their own, in which an infinite entropy meets a probability of 0. 65: vectors, and one element that is left."""
    target = torch.full((65,), label, dtype=dtype, device=device)
    for sign in (-1, 1):
        # In float64 the gradient is that of the limit from 2000 on.
        expected = loss.terms(torch.full_like(target, sign * 2000.0), target).grad_input
        for largest in (torch.finfo(dtype).max, torch.inf):
            input = torch.full_like(target, sign * largest)
            for reduction in ("none", "sum"):
                gradient = one_pass(loss, input, target, reduction=reduction)[1]
                torch.testing.assert_close(gradient.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("gamma_neg", [0.0, 0.5, 1.0, 4.0])
def test_just_at_the_clip_the_gradient_is_that_of_the_side_above(gamma_neg: float, device: str) -> None:
    """As that of torch.clamp was up to torch 2.13. 1,040 zeros: the vectors of a block, and a rest that they do not fill."""
    x = torch.zeros(1040, device=device, requires_grad=True)
    expected = torch.full_like(x, 0.25 if gamma_neg == 0 else 0.0)  # -log(1 - (sigmoid(x) - 0.5)) has this slope at 0
    for create_graph in (False, True):
        loss = ASYMMETRIC[0](x, torch.zeros_like(x), gamma_neg=gamma_neg, clip=0.5, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x, create_graph=create_graph)
        torch.testing.assert_close(gradient.detach(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [1e30, 3e37, 3e38])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_gradients_are_finite_for_the_largest_exponents(label: float, gamma: float, device: str) -> None:
    x = torch.tensor([0.0, 3.0, 18.0, 20.0, 30.0, 88.0, 1e4, torch.inf], device=device)
    x = torch.cat([x, -x]).repeat(65).requires_grad_()  # 1,040, as above
    for loss in (ASYMMETRIC[0], FOCAL[0]):
        options = {"gamma_neg": gamma, "gamma_pos": gamma} if loss is ASYMMETRIC[0] else {"gamma": gamma}
        x.grad = None
        loss(x, torch.full_like(x, label), reduction="sum", **options).backward()
        right_side = x.isfinite() | ((x < 0) == (label == 0))
        assert x.grad[right_side].isfinite().all(), options


def test_a_small_alpha_keeps_its_digits(device: str) -> None:
    input, target = FOCAL[0].make_input((101,), torch.float32, device), torch.ones(101, device=device)
    for alpha in (1e-8, 1e-3, 1 - 1e-6):
        member = Member("focal", FOCAL[0].function, FOCAL[0].module, FOCAL[0].formula, {"alpha": alpha, "gamma": 2.0})
        for label in (0.0, 1.0):
            expected = member.terms(input, target * label)
            actual = one_pass(member, input, target * label, reduction="none")
            torch.testing.assert_close(actual[0].double(), expected.loss, rtol=1e-5, atol=0)
            torch.testing.assert_close(actual[1].double(), expected.grad_input, rtol=1e-5, atol=0)


# ---- derivatives and transforms ----


@pytest.mark.parametrize("labels", ["hard", "soft"])
@every_focused
def test_gradcheck_in_all_modes(loss: Member, labels: str, device: str) -> None:
    if loss.parameters.get("detach_focusing"):
        pytest.skip("numerical derivatives go through the focusing factor")
    shape = (3,)
    input = loss.make_input(shape, torch.float64, device).requires_grad_()
    target = make_targets(shape, torch.float64, device)
    target = target.round() if labels == "hard" else (0.1 + 0.8 * target).requires_grad_()
    weight, pos_weight = ((0.5 + make_weights(shape, torch.float64, device, seed)) for seed in (2, 5))
    leaves: tuple[Tensor, ...] = (input, target, weight.requires_grad_(), pos_weight.requires_grad_())

    def function(x: Tensor, y: Tensor, w: Tensor, p: Tensor) -> Tensor:
        return loss(x, y, weight=w, pos_weight=p, label_smoothing=0.1 if labels == "soft" else 0.0, reduction="sum")

    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=labels == "hard")
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True)
    if labels == "hard":  # without a weight that requires grad, the first derivative is the kernel's

        def of_input(x: Tensor) -> Tensor:
            return loss(x, target, reduction="none", weight=weight.detach())

        assert gradcheck(of_input, (input,))
        assert gradgradcheck(of_input, (input,), fast_mode=True)


@every_formula
def test_smoothing_has_every_derivative(loss: Member, device: str) -> None:
    input = loss.make_input((3,), torch.float64, device)
    input = input if loss.of_logits else 0.1 + 0.8 * input
    target = (0.1 + 0.8 * make_targets((3,), torch.float64, device)).requires_grad_()

    def function(x: Tensor, y: Tensor) -> Tensor:
        return loss(x, y, label_smoothing=0.1)

    leaves = (input.requires_grad_(), target)
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


@every_reduction
@every_focused
def test_transforms_agree_with_the_kernel(loss: Member, reduction: str, device: str) -> None:
    batch = (5, 2, 3)
    input, target = loss.make_input(batch, torch.float64, device), make_targets(batch, torch.float64, device)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1, "ignore_index": 1.0}
    each = torch.stack([loss(x, y, **options) for x, y in zip(input, target, strict=True)])
    torch.testing.assert_close(torch.func.vmap(lambda x, y: loss(x, y, **options))(input, target), each)
    torch.testing.assert_close(
        torch.func.vmap(lambda x, y: loss(x, y, **options), (0, None))(input, target[0]),
        torch.stack([loss(x, target[0], **options) for x in input]),
    )
    gradients = torch.stack(
        [one_pass(loss, x, y, **{**options, "label_smoothing": 0.1})[1] for x, y in zip(input, target, strict=True)]
    )
    transform = torch.func.vmap(torch.func.grad(lambda x, y: loss(x, y, **options).sum()))
    torch.testing.assert_close(transform(input, target), gradients)
    hessian = torch.func.hessian(lambda x: loss(x, target[0], **options).sum())(input[0])
    leaf = input[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf, target[0], **options).sum(), leaf, create_graph=True)
    (diagonal,) = torch.autograd.grad(first.sum(), leaf)
    torch.testing.assert_close(hessian.sum((0, 1)), diagonal)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@every_formula
def test_a_second_backward_has_the_same_bits(loss: Member, reduction: str, device: str) -> None:
    input = loss.make_input((5, 37), torch.float32, device).requires_grad_()
    target = make_targets((5, 37), torch.float32, device)
    value = loss(input, target, reduction=reduction, label_smoothing=0.1, ignore_index=0.0).sum()
    (first,) = torch.autograd.grad(value, input, retain_graph=True)
    (second,) = torch.autograd.grad(value, input)
    assert torch.equal(first, second)


# ---- forms of call ----


def module_of(loss: Member, **arguments: Any) -> torch.nn.Module:
    return loss.make_module(**arguments)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "ignored": {"ignore_index": 0},
    "normalized": {"normalizer": 3.0},
    "weighted": {"weight": torch.tensor([0.5, 1.0, 2.0])},
    "all": {"label_smoothing": 0.2, "ignore_index": 1.0, "normalizer": torch.tensor(7.0)},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@every_option
@every_member
def test_modules_do_as_functions(loss: Member, options: dict[str, Any], device: str) -> None:
    input, target = loss.make_input((4, 3), torch.float32, device), make_targets((4, 3), torch.float32, device)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    module = module_of(loss, **options).to(device)
    expected = loss(input, target, **options)
    assert torch.equal(module(input, target), expected)
    assert type(module).__name__ in repr(module)
    scripted = torch.jit.script(module)
    assert torch.equal(scripted(input, target), expected)
    of_numbers = module_of(loss, **{k: v for k, v in options.items() if not isinstance(v, Tensor)})
    tensors = {k for k, v in options.items() if isinstance(v, Tensor)}
    assert tensors <= set(module.state_dict())
    assert not of_numbers.state_dict()


@every_option
@every_formula
def test_scripted_functions(loss: Member, options: dict[str, Any]) -> None:
    input, target = loss.make_input((4, 3), torch.float32, "cpu"), make_targets((4, 3), torch.float32, "cpu")
    options = {k: torch.tensor(v) if k == "normalizer" and not isinstance(v, Tensor) else v for k, v in options.items()}
    scripted = torch.jit.script(loss.function)
    for _ in range(3):  # the profiling executor changes the program
        leaf, other = (input.clone().requires_grad_() for _ in range(2))
        value = scripted(leaf, target, **{"reduction": "mean", **loss.parameters, **options})
        value.backward()
        loss(other, target, **options).backward()
        assert torch.equal(leaf.grad, other.grad)


@every_option
@every_formula
def test_operators_do_as_functions(loss: Member, options: dict[str, Any], device: str) -> None:
    input, target = loss.make_input((4, 3), torch.float32, device), make_targets((4, 3), torch.float32, device)
    operator = getattr(torch.ops.bce_ext, loss.function.__name__)
    options = {k: torch.as_tensor(v).to(device) if k in ("normalizer", "weight") else v for k, v in options.items()}
    for reduction in ["mean"] if "normalizer" in options else REDUCTIONS:
        expected = loss(input, target, reduction=reduction, **options)
        number = REDUCTION_NUMBER[reduction]
        assert torch.equal(operator(input, target, **loss.parameters, reduction=number, **options), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["plain", "all"])
@every_formula
def test_compiled_gives_the_same_bits(loss: Member, options: dict[str, Any], device: str) -> None:
    torch._dynamo.reset()
    input, target = loss.make_input((4, 3), torch.float32, device), make_targets((4, 3), torch.float32, device)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    compiled = torch.compile(lambda x, y: loss(x, y, **options), fullgraph=True, backend="aot_eager")
    leaf, other = (input.clone().requires_grad_() for _ in range(2))
    value, expected = compiled(leaf, target), loss(other, target, **options)
    assert torch.equal(value, expected)
    value.backward()
    expected.backward()
    assert torch.equal(leaf.grad, other.grad)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "ignore_index": 1.0}], ids=["plain", "options"])
@every_formula
def test_export(loss: Member, options: dict[str, Any], device: str) -> None:
    input, target = loss.make_input((4, 3), torch.float32, device), make_targets((4, 3), torch.float32, device)
    module = module_of(loss, **options)
    program = torch.export.export(module, (input, target), strict=False)
    assert torch.equal(program.module()(input, target), module(input, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_reduction
@every_formula
def test_autocast_gives_float32_of_the_same_value(
    loss: Member, reduction: str, dtype: torch.dtype, device: str
) -> None:
    input, target = loss.make_input((5, 37), dtype, device), make_targets((5, 37), dtype, device)
    expected = reduced(loss.terms(input, target), reduction)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = differentiated(loss, input, target, reduction=reduction)
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == dtype
    assert_rounded_once(actual[0], expected.loss, expected.loss_scale, torch.float32, loss.ulps)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@every_formula
def test_the_number_of_threads_does_not_matter(loss: Member, reduction: str) -> None:
    numel = 7 * CHUNK + 1031  # an odd number of chunks with an odd rest
    input, target = loss.make_input((numel,), torch.float32, "cpu"), make_targets((numel,), torch.float32, "cpu")
    options = {"reduction": reduction, "label_smoothing": 0.1, "ignore_index": 0.0}
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(one_pass(loss, input, target, **options))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.skipif("BCE_EXT_TEST_CAPABILITY" in os.environ, reason="this is the run for one instruction set")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_keeps_the_same_bounds(capability: str) -> None:
    if capability == "avx2" and not torch.cpu._is_avx2_supported():
        pytest.skip("this machine has no AVX2")
    names = "test_every_parameter"
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-k", f"cpu and ({names})"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "BCE_EXT_TEST_CAPABILITY": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:]


# ---- errors ----

BAD_PARAMETERS: list[tuple[Member, dict[str, Any], str]] = [
    (FOCAL[0], {"alpha": 1.5}, "Invalid alpha value"),
    (FOCAL[0], {"alpha": -0.5}, "Invalid alpha value"),
    (FOCAL[0], {"alpha": float("nan")}, "Invalid alpha value"),
    (FOCAL[0], {"gamma": -1.0}, "expected gamma to be finite and at least 0"),
    (FOCAL[0], {"gamma": float("inf")}, "expected gamma to be finite and at least 0"),
    (FOCAL[0], {"gamma": float("nan")}, "expected gamma to be finite and at least 0"),
    (ASYMMETRIC[0], {"gamma_neg": -1.0}, "expected gamma_neg to be finite and at least 0"),
    (ASYMMETRIC[0], {"gamma_pos": -1.0}, "expected gamma_pos to be finite and at least 0"),
    (ASYMMETRIC[0], {"clip": 1.0}, "expected clip to be at least 0 and less than 1"),
    (ASYMMETRIC[0], {"clip": -0.1}, "expected clip to be at least 0 and less than 1"),
    (ASYMMETRIC[0], {"eps": 0.0}, "expected eps above 0 and below 1"),
    *(
        (loss, {"label_smoothing": s}, "expected label_smoothing between 0 and 1")
        for loss in EVERY_FORMULA
        for s in (-0.1, 1.1, float("nan"))
    ),
]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    ("loss", "bad", "text"), BAD_PARAMETERS, ids=lambda v: v.name if isinstance(v, Member) else str(v)
)
def test_parameters_out_of_range_raise(loss: Member, bad: dict[str, Any], text: str, requires_grad: bool) -> None:
    input, target = loss.make_input((3,), torch.float32, "cpu"), torch.ones(3)
    with pytest.raises(ValueError, match=text):
        loss(input.requires_grad_(requires_grad), target, **bad)
    with pytest.raises(ValueError, match=text):
        torch.func.vmap(lambda x, y: loss(x, y, **bad))(input.detach().expand(2, 3), target.expand(2, 3))


def test_the_functions_have_the_signatures_of_what_they_replace() -> None:
    input, target = torch.randn(3), torch.ones(3)
    functional = bce_ext.functional
    assert functional.sigmoid_focal_loss(input, target).shape == (3,)  # torchvision does not reduce by default
    assert functional.asymmetric_loss(input, target).shape == ()
    assert torch.equal(
        functional.sigmoid_focal_loss(input, target, 0.3, 1.5, "sum"),
        functional.sigmoid_focal_loss(inputs=input, targets=target, alpha=0.3, gamma=1.5, reduction="sum"),
    )
    assert torch.equal(
        functional.asymmetric_loss(input, target, 3.0, 2.0, 0.1),
        functional.asymmetric_loss(input, target, gamma_neg=3.0, gamma_pos=2.0, clip=0.1),
    )


def test_the_asymmetric_loss_without_asymmetry_is_the_focal_loss(device: str) -> None:
    functional = bce_ext.functional
    input = FOCUSED[0].make_input((1000,), torch.float64, device)
    target = make_targets((1000,), torch.float64, device)
    focal = functional.sigmoid_focal_loss(input, target, -1.0, 3.0)
    torch.testing.assert_close(functional.asymmetric_loss(input, target, 3.0, 3.0, 0.0, reduction="none"), focal)


@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("eps", [0.4, 0.5, 0.9])  # below, at and above where logarithms are taken of the complement
def test_a_large_bound_of_the_asymmetric_loss(eps: float, label: float) -> None:
    """The kernel, and the formula in operations of torch: beside a weight that requires grad, and in transforms."""
    options = {"gamma_neg": 2.0, "gamma_pos": 1.0, "clip": 0.0, "eps": eps, "reduction": "none"}
    x = torch.linspace(-4, 4, 50, dtype=torch.float64)  # no probability at the bound
    y = torch.full_like(x, label)
    p = x.sigmoid()
    entropy = -(y * p.clamp_min(eps).log() + (1 - y) * (1 - p).clamp_min(eps).log())
    expected = entropy * (1 - p * y - (1 - p) * (1 - y)) ** (y + 2 * (1 - y))
    loss = bce_ext.functional.asymmetric_loss
    leaf = x.clone().requires_grad_()
    plain = loss(leaf, y, **options)
    torch.testing.assert_close(plain.detach(), expected)
    torch.testing.assert_close(loss(x, y, weight=torch.ones(1, requires_grad=True), **options).detach(), expected)
    torch.testing.assert_close(torch.vmap(lambda x, y: loss(x, y, **options))(x, y), expected)
    (gradient,) = torch.autograd.grad(plain.sum(), leaf, retain_graph=True)
    (with_graph,) = torch.autograd.grad(loss(leaf, y, **options).sum(), leaf, create_graph=True)
    torch.testing.assert_close(with_graph.detach(), gradient)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 2.0])
def test_the_focal_loss_of_a_float64_target_where_the_other_class_has_little(gamma: float) -> None:
    input = torch.tensor([-45.0, 45.0, -100.0], dtype=torch.float64)
    target = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)

    def loss(target: Tensor) -> Tensor:
        return bce_ext.functional.sigmoid_focal_loss(input, target, -1, gamma, "sum")

    (expected,) = torch.autograd.grad(loss(target), target)
    (with_graph,) = torch.autograd.grad(loss(target), target, create_graph=True)
    torch.testing.assert_close(with_graph.detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.func.grad(loss)(target.detach()), expected, rtol=1e-12, atol=0)


@every_member
def test_a_target_that_was_computed_from_the_input(loss: Member) -> None:
    """What flows through the target belongs to the caller's graph: counted once, with create_graph and without."""
    x = torch.linspace(-2, 2, 7, dtype=torch.float64).sigmoid().requires_grad_()  # logits and probabilities alike

    def of_both(x: Tensor) -> Tensor:
        return loss(x, 0.1 + 0.8 * x.square(), reduction="sum")

    if not loss.parameters.get("detach_focusing"):  # whose gradient is no derivative
        assert torch.autograd.gradcheck(of_both, x)
        assert torch.autograd.gradgradcheck(of_both, x)
        assert torch.autograd.gradcheck(lambda x: loss(x, x, reduction="sum"), x)
        assert torch.autograd.gradgradcheck(lambda x: loss(x, x, reduction="sum"), x)
        y = torch.linspace(0.1, 0.9, 7, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradgradcheck(lambda y: loss(0.1 + 0.8 * y.square(), y, reduction="sum"), y)
    for second in (lambda x: 0.1 + 0.8 * x.square(), lambda x: x):
        (plain,) = torch.autograd.grad(loss(x, second(x)), x)
        (with_graph,) = torch.autograd.grad(loss(x, second(x)), x, create_graph=True)
        torch.testing.assert_close(with_graph, plain)


@every_member
def test_numbers_of_a_module_are_not_rounded_with_it(loss: Member) -> None:
    """float16 has no 100,000, bfloat16 no 16,777,217."""
    input, target = loss.make_input((4, 3), torch.float64, "cpu"), make_targets((4, 3), torch.float64, "cpu")
    for number in (100_000, 16_777_217):
        module = module_of(loss, weight=0.1, normalizer=number)
        assert not module.state_dict()
        assert f"normalizer={number}" in repr(module)
        expected = loss(input, target, weight=0.1, normalizer=number)
        for converted in (module.half(), module.bfloat16(), copy.deepcopy(module), torch.jit.script(module)):
            assert torch.equal(converted(input, target), expected)
        assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(input, target), expected)


@every_member
def test_a_freed_graph_gives_no_second_gradient(loss: Member) -> None:
    input = loss.make_input((4, 3), torch.float32, "cpu").requires_grad_()
    for create_graph in (False, True):
        value = loss(input, make_targets((4, 3), torch.float32, "cpu"))
        torch.autograd.grad(value, input, retain_graph=False, create_graph=create_graph)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(value, input)


@every_member
def test_tensors_of_zeros_that_forward_mode_makes(loss: Member) -> None:
    """torch._efficientzerotensor has no memory."""
    zeros = torch._efficientzerotensor((3,))
    half = torch.full((3,), 0.5, requires_grad=True)
    for input, target in ((half, zeros), (zeros, half.detach())):
        assert torch.equal(loss(input, target), loss(input.clone(), target.clone()))
    loss(half, zeros).backward()
