"""Errors against float64, in ULP of the output dtype: for hard labels small at every logit, both tails, infinities and NaN included."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from callables import Member, every_focused
from reference import ulp_error
from torch import Tensor

import bce_ext.functional as F

MAX_ULP = {torch.float32: 4.0, torch.float64: 4.0, torch.bfloat16: 1.0, torch.float16: 1.0}
POS_WEIGHT = 3.0


def edge_logits(dtype: torch.dtype) -> Tensor:
    """The sweep: where exp, log1p or their formulas overflow, underflow, or lose their last bits, and 500 numbers around each such place."""
    info = torch.finfo(dtype)
    places = [
        0.0,
        info.tiny * info.eps,
        info.tiny,
        info.eps,
        2**-12,
        0.5,
        1.0,
        17.0,
        20.0,
        50.0,
        88.0,
        88.72,
        100.0,
        104.0,
    ]
    places += [110.0, 709.0, 745.0, 750.0, 1e4, info.max, float("inf")]
    around = torch.tensor(places, dtype=torch.float64)[:, None] * (
        1 + torch.linspace(-0.02, 0.02, 501, dtype=torch.float64)
    )
    magnitudes = torch.cat(
        [torch.tensor(places, dtype=torch.float64), around.flatten(), torch.logspace(-40, 3, 2000, dtype=torch.float64)]
    )
    magnitudes = magnitudes.to(dtype)
    return torch.cat([magnitudes, -magnitudes, torch.tensor([float("nan")], dtype=dtype)])


def all_logits(dtype: torch.dtype) -> Tensor:
    """Every number of a 16-bit dtype; a dense stride over all bit patterns of float32, a prime so that every exponent and mantissa ending occurs."""
    if dtype == torch.float32:
        return torch.from_numpy(np.arange(0, 2**32, 8191, dtype=np.uint64).astype(np.uint32).view(np.float32))
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def loss_and_gradients(
    input: Tensor, target: Tensor, with_target: bool = False, **arguments: object
) -> tuple[Tensor, ...]:
    input = input.detach().requires_grad_()
    target = target.detach().requires_grad_(with_target)
    loss = F.binary_cross_entropy_with_logits(input, target, reduction="none", **arguments)
    inputs = [input, target] if with_target else [input]
    return (loss.detach(), *torch.autograd.grad(loss, inputs, torch.ones_like(loss)))


def assert_exact(actual: Tensor, expected: Tensor, input: Tensor, max_ulp: float, what: str) -> None:
    error = ulp_error(actual, expected.to(actual.device))
    worst = int(error.argmax())
    assert error[worst] <= max_ulp, (
        f"{what} at {input.flatten()[worst].item()!r} is off by {error[worst].item():.2f} ULP: {actual[worst].item()!r}, "
        f"expected {expected[worst].item()!r}"
    )


@pytest.mark.parametrize("pos_weight", [None, POS_WEIGHT], ids=lambda p: f"pos_weight_{p}")
@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("logits", [edge_logits, all_logits])
def test_hard_labels_are_exact_at_every_logit(
    logits: Callable[[torch.dtype], Tensor], dtype: torch.dtype, label: float, pos_weight: float | None, device: str
) -> None:
    input = logits(dtype).to(device)
    target = torch.full_like(input, label)
    weights = {} if pos_weight is None else {"pos_weight": torch.tensor(pos_weight, dtype=dtype, device=device)}
    expected = reference.with_logits(input, target, **weights)
    loss, gradient = loss_and_gradients(input, target, **weights)
    assert_exact(loss, expected.loss, input, MAX_ULP[dtype], "loss")
    assert_exact(gradient, expected.grad_input, input, MAX_ULP[dtype], "gradient")


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="long double is no wider than double here")
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_float64_is_exact_against_long_double(label: float, device: str) -> None:
    input = edge_logits(torch.float64)
    x = np.longdouble(1) * input.numpy()
    signed = x if label == 0 else -x  # softplus(x) and sigmoid(x) for a negative, of -x for a positive
    with np.errstate(all="ignore"):
        e = np.exp(-np.abs(signed))
        loss_wide = np.log1p(e) + np.maximum(signed, 0)
        gradient_wide = np.where(signed >= 0, 1 / (1 + e), e / (1 + e)) * (1 if label == 0 else -1)
    loss, gradient = (t.cpu() for t in loss_and_gradients(input.to(device), torch.full_like(input, label).to(device)))
    for actual, wide, what in ((loss, loss_wide, "loss"), (gradient, gradient_wide, "gradient")):
        rounded = torch.from_numpy(wide.astype(np.float64))
        with np.errstate(all="ignore"):
            difference = torch.from_numpy((np.longdouble(1) * actual.numpy() - wide).astype(np.float64)).abs()
        error = difference / reference.ulp(rounded, torch.float64)
        same = (actual == rounded) | (actual.isnan() & rounded.isnan())
        error = torch.where(same, 0.0, error.nan_to_num(nan=float("inf")))
        worst = int(error.argmax())
        assert error[worst] <= MAX_ULP[torch.float64], (
            f"{what} at {input[worst].item()!r} is off by {error[worst].item():.2f} ULP"
        )


# What the formulas of torch.nn.functional make of these: 0, NaN, or a number that is off by 99 %.
NATIVE_FAILURES = [
    pytest.param(
        torch.float32, -20.0, 0.0, "loss", 2.0611536181902037e-09, id="loss of a confident negative: native 0"
    ),
    pytest.param(torch.float32, 20.0, 1.0, "loss", 2.0611536181902037e-09, id="loss of a confident positive: native 0"),
    pytest.param(
        torch.float32, 20.0, 1.0, "gradient", -2.0611536181902037e-09, id="gradient of a confident positive: native 0"
    ),
    pytest.param(
        torch.float32, 100.0, 1.0, "gradient", -3.720075976020836e-44, id="gradient in the subnormal numbers: native 0"
    ),
    pytest.param(torch.float32, float("-inf"), 1.0, "loss", float("inf"), id="minus infinity, positive: native NaN"),
    pytest.param(torch.float32, float("inf"), 1.0, "loss", 0.0, id="infinity, positive: native NaN"),
    pytest.param(torch.float32, float("inf"), 0.0, "loss", float("inf"), id="infinity, negative"),
    pytest.param(torch.float32, float("-inf"), 0.0, "loss", 0.0, id="minus infinity, negative"),
    pytest.param(torch.float32, float("inf"), 1.0, "gradient", 0.0, id="gradient at infinity, positive"),
    pytest.param(torch.float32, float("-inf"), 1.0, "gradient", -1.0, id="gradient at minus infinity, positive"),
    pytest.param(torch.float32, float("inf"), 0.0, "gradient", 1.0, id="gradient at infinity, negative"),
    pytest.param(torch.float32, float("-inf"), 0.0, "gradient", 0.0, id="gradient at minus infinity, negative"),
    pytest.param(torch.bfloat16, -8.0, 0.0, "loss", 0.00033540637289566238, id="bfloat16 negative at -8: native 0"),
    pytest.param(torch.float16, -16.0, 0.0, "loss", 1.1253516207787584e-07, id="float16 negative at -16: native 0"),
]


@pytest.mark.parametrize(("dtype", "logit", "label", "what", "true_value"), NATIVE_FAILURES)
def test_where_native_fails(
    dtype: torch.dtype, logit: float, label: float, what: str, true_value: float, device: str
) -> None:
    input, target = torch.tensor([logit], dtype=dtype, device=device), torch.tensor([label], dtype=dtype, device=device)
    actual = loss_and_gradients(input, target)[0 if what == "loss" else 1].cpu()
    assert ulp_error(actual, torch.tensor([true_value], dtype=torch.float64)) <= MAX_ULP[dtype]


# A whole block is converted in registers, one element by itself.
@pytest.mark.parametrize("numel", [1, 1024])
@pytest.mark.parametrize("target", [0.2490234375, 0.2470703125], ids=["down", "up"])
def test_a_gradient_between_two_bfloat16_numbers_goes_to_the_even_one(target: float, numel: int, device: str) -> None:
    targets = torch.full((numel,), target, dtype=torch.bfloat16, device=device)
    logits = torch.zeros(numel, dtype=torch.bfloat16, device=device, requires_grad=True)
    F.binary_cross_entropy_with_logits(logits, targets, reduction="sum").backward()
    exact = 0.5 - targets.float()  # 9 digits
    torch.testing.assert_close(logits.grad, exact.bfloat16(), rtol=0, atol=0)


def test_the_mean_over_bfloat16_negatives_keeps_the_tail(device: str) -> None:
    input = (torch.randn(100_003, generator=torch.Generator().manual_seed(0)) - 8).bfloat16().to(device)
    target = torch.zeros_like(input)
    expected = reference.with_logits(input, target).loss.mean()
    assert ulp_error(F.binary_cross_entropy_with_logits(input, target), expected) <= 1
    native = torch.nn.functional.binary_cross_entropy_with_logits(input, target, reduction="none").double().mean()
    assert abs(native - expected) > 0.5 * expected  # so the test is a hard one


# One element; less than a vector; 16 vectors, whose logarithms are one, with and without one beside; blocks and chunks with rests of each kind.
SUMMED = [
    1,
    15,
    255,
    256,
    257,
    reference.BLOCK - 1,
    reference.BLOCK + 273,
    reference.CHUNK - 3,
    3 * reference.CHUNK + 300,
]


@pytest.mark.parametrize("numel", SUMMED)
@pytest.mark.parametrize(
    "logits",
    [
        lambda x: 5 * x,
        lambda x: x.abs() * 3 - 40,  # losses so small that 1 + exp(x) is 1
        lambda x: x.abs() * 3 - 110,  # subnormal ones among them, in float32
        lambda x: 0 * x,  # the largest products of 1 + exp(-|x|)
        lambda x: 300 * x,  # no logarithms to speak of
    ],
    ids=["common", "tiny", "subnormal", "zero", "large"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_are_as_exact_as_their_terms(
    dtype: torch.dtype, logits: Callable[[Tensor], Tensor], numel: int, device: str
) -> None:
    noise = torch.randn(numel, generator=torch.Generator().manual_seed(numel), dtype=torch.float64)
    input = logits(noise).to(dtype)
    magnitude = input.abs().double()
    logarithm = torch.log1p(torch.exp(-magnitude))
    likely = (input > 0).to(dtype)  # what is true was found likely: the loss is a logarithm alone
    for target, terms in ((likely, logarithm), (1 - likely, logarithm + magnitude)):
        expected = torch.tensor(math.fsum(terms.tolist()), dtype=torch.float64)
        actual = F.binary_cross_entropy_with_logits(input.to(device), target.to(device), reduction="sum").cpu()
        below_normal = numel * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # each term is rounded there
        assert abs(actual - expected) <= MAX_ULP[dtype] * reference.ulp(expected, dtype) + below_normal


@pytest.mark.parametrize("numel", [reference.CHUNK, 100_000, 2**20])
@pytest.mark.parametrize("value", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("of_logits", [True, False])
def test_sums_of_equal_terms_do_not_drift(of_logits: bool, value: float, numel: int, device: str) -> None:
    """One after the other, they would all be rounded in the same direction."""
    input = torch.full((numel,), value, dtype=torch.float64, device=device)
    loss = F.binary_cross_entropy_with_logits if of_logits else F.binary_cross_entropy
    expected = math.log1p(math.exp(value)) if of_logits else -math.log1p(-value)
    actual = loss(input, torch.zeros_like(input)).item()
    assert abs(actual - expected) <= MAX_ULP[torch.float64] * math.ulp(expected)


@pytest.mark.parametrize("place", [0, 100, 256, 299])  # in one product, and in what is left over by them
@pytest.mark.parametrize(
    ("logit", "label", "loss"), [(float("inf"), 0.0, float("inf")), (float("inf"), 1.0, 0.0), (float("nan"), 1.0, None)]
)
def test_an_extreme_term_among_others_in_a_sum(
    logit: float, label: float, loss: float | None, place: int, device: str
) -> None:
    input, target = torch.zeros(300, device=device), torch.zeros(300, device=device)
    input[place], target[place] = logit, label
    actual = F.binary_cross_entropy_with_logits(input, target, reduction="sum").item()
    expected = float("nan") if loss is None else loss + 299 * math.log(2)
    assert actual == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_partial_sums_on_a_cpu_do_not_overflow() -> None:
    input = torch.full((300,), 2e38)  # a finite mean, and two of them are too much for float32
    assert F.binary_cross_entropy_with_logits(input, torch.zeros(300)).item() == pytest.approx(2e38, rel=1e-6)


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
@pytest.mark.parametrize("dtype", reference.FLOATING_DTYPES, ids=str)
def test_an_infinite_term_without_weight_has_no_say(dtype: torch.dtype, reduction: str, device: str) -> None:
    inf = float("inf")
    input = torch.tensor([inf, -inf, inf, -inf], dtype=dtype, device=device, requires_grad=True)
    target = torch.tensor([1, 0, 0, 1], dtype=dtype, device=device, requires_grad=True)
    weight = torch.tensor(
        [1, 1, 0, 0], dtype=dtype, device=device
    )  # the two whose loss would be infinite are masked out
    loss = F.binary_cross_entropy_with_logits(input, target, weight=weight, reduction=reduction)
    assert (loss == 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), input)
    assert (gradient == 0).all()


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
@pytest.mark.parametrize("dtype", reference.FLOATING_DTYPES, ids=str)
@pytest.mark.parametrize("place", ["input", "target", "weight", "pos_weight"])
def test_nan_comes_through(place: str, dtype: torch.dtype, reduction: str, device: str) -> None:
    arguments = {
        name: torch.full((19,), 0.5, dtype=dtype, device=device) for name in ("input", "target", "weight", "pos_weight")
    }
    arguments[place][17] = float("nan")  # beyond the first vector
    arguments["input"].requires_grad_()
    loss = F.binary_cross_entropy_with_logits(**arguments, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, arguments["input"], torch.ones_like(loss))
    assert gradient[17].isnan()
    assert not gradient[:17].isnan().any()
    assert not gradient[18].isnan()
    assert loss.flatten()[17 if reduction == "none" else 0].isnan()


@pytest.mark.parametrize("pos_weight", [None, POS_WEIGHT], ids=lambda p: f"pos_weight_{p}")
@pytest.mark.parametrize("dtype", reference.FLOATING_DTYPES, ids=str)
def test_soft_labels_err_by_little_of_the_larger_term(
    dtype: torch.dtype, pos_weight: float | None, device: str
) -> None:
    input = edge_logits(dtype)
    input = input[input.isfinite() & (input.abs() < 1e4)].to(device)
    target = (
        torch.rand(input.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype).to(device)
    )
    weights = {} if pos_weight is None else {"pos_weight": torch.tensor(pos_weight, dtype=dtype, device=device)}
    expected = reference.with_logits(input, target, **weights)
    loss, grad_input, grad_target = loss_and_gradients(input, target, with_target=True, **weights)
    arithmetic = reference.arithmetic_dtype(dtype)
    reference.assert_rounded_once(loss, expected.loss, expected.loss_scale, arithmetic, what="loss")
    reference.assert_rounded_once(
        grad_input, expected.grad_input, expected.grad_input_scale, arithmetic, what="grad_input"
    )
    reference.assert_rounded_once(
        grad_target, expected.grad_target, expected.grad_target_scale, arithmetic, what="grad_target"
    )


def focused_logits(loss: Member, dtype: torch.dtype) -> Tensor:
    """Both tails until nothing is left, and the logits above the one whose probability is the clip."""
    magnitudes = torch.cat([torch.linspace(0, 110, 5_001), torch.logspace(-40, 3, 1_001)])
    parts = [magnitudes, -magnitudes]
    if clip := loss.parameters.get("clip", 0.0):
        parts.append(math.log(clip / (1 - clip)) + torch.logspace(-6, 1, 2_001, dtype=torch.float64))
    return torch.cat(parts).to(dtype)


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_focused
def test_focusing_keeps_the_digits_of_hard_labels(loss: Member, dtype: torch.dtype, label: float, device: str) -> None:
    """In float32, rounded once to half precision."""
    input = focused_logits(loss, dtype).to(device)
    target = torch.full_like(input, label)
    expected = loss.terms(input, target)
    leaf = input.clone().requires_grad_()
    value = loss(leaf, target, reduction="none")
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    # A negative's probability less the clip has an error relative to the probability.
    probability, clip = input.double().sigmoid(), loss.parameters.get("clip", 0.0) * (1 - label)
    condition = torch.where(probability > clip, probability / (probability - clip), 1.0)
    bound = loss.ulps * condition
    if dtype != torch.float32:
        bound = 1 + bound * (torch.finfo(torch.float32).eps / torch.finfo(dtype).eps)
    info = torch.finfo(torch.float32)
    subnormal = 1024 * info.tiny * info.eps  # factors of the result may be subnormal numbers
    for actual, truth, what in ((value.detach(), expected.loss, "loss"), (gradient, expected.grad_input, "gradient")):
        error = (actual.double() - truth).abs() / (bound * reference.ulp(truth, dtype) + subnormal)
        error = torch.where(actual.isinf() & (actual == truth.to(dtype)), 0.0, error)
        worst = int(error.argmax())
        assert error[worst] <= 1, (
            f"{what} at {input[worst].item()!r}: {actual[worst].item()!r}, expected {truth[worst].item()!r}"
        )


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("dtype", reference.FLOATING_DTYPES, ids=str)
def test_probabilities_are_exact_near_zero_and_one(dtype: torch.dtype, label: float, device: str) -> None:
    info = torch.finfo(dtype)
    small = torch.logspace(float(np.log2(info.tiny)) - 3, 0, 30_011, base=2, dtype=torch.float64).to(dtype)
    input = torch.cat(
        [torch.tensor([0.0, -0.0, 1.0], dtype=dtype), small, 1 - small, torch.linspace(0, 1, 10_007).to(dtype)]
    ).to(device)
    target = torch.full_like(input, label)
    expected = reference.probabilities(input, target)
    input = input.requires_grad_()
    loss = F.binary_cross_entropy(input, target, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), input)
    assert_exact(loss.detach(), expected.loss, input, MAX_ULP[dtype], "loss")
    assert_exact(gradient, expected.grad_input, input, MAX_ULP[dtype], "gradient")


def supported_capabilities() -> dict[str, str | None]:
    """For each instruction set that the kernels are compiled for, why it cannot be run here, or None."""
    avx2, avx512 = torch.cpu._is_avx2_supported(), torch.cpu._is_avx512_supported()
    return {
        "default": None,
        "avx2": None if avx2 else "this machine has no AVX2",
        "avx512": None if avx512 else "this machine has no AVX-512",
    }


@pytest.mark.skipif("BCE_EXT_TEST_CAPABILITY" in os.environ, reason="this is the run for one instruction set")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_keeps_the_same_bounds(capability: str) -> None:
    if reason := supported_capabilities()[capability]:
        pytest.skip(reason)
    run = """
import os, sys, pytest, bce_ext
assert bce_ext.build_info()["cpu_capability"].lower() == os.environ["ATEN_CPU_CAPABILITY"], bce_ext.build_info()
sys.exit(pytest.main([sys.argv[1], "-q", "-p", "no:cacheprovider", "-k", "cpu"]))
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "BCE_EXT_TEST_CAPABILITY": "1"}
    command = [sys.executable, "-c", run, __file__]
    result = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_reduced_loss_is_rounded_once(requires_grad: bool) -> None:
    """256 + (1 + 2**-20): between the bfloat16 numbers 256 and 258, just above the middle, where float32 has the middle itself."""
    logits = torch.tensor([256.0, 100.0], dtype=torch.bfloat16, requires_grad=requires_grad)  # their losses for label 0
    weight = torch.tensor([1.0, (1 + 2**-20) / 100])
    loss = F.binary_cross_entropy_with_logits(logits, torch.zeros(2, dtype=torch.bfloat16), weight, reduction="sum")
    assert loss.item() == 258.0
