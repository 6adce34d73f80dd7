"""What the tests measure against: the formulas in float64, written independently of the kernels, and the distance to them in ULP."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")
REDUCTION_NUMBER = {"none": 0, "mean": 1, "sum": 2}
FLOATING_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Of csrc/cpu: a thread works through chunks of so many elements, in blocks of so many, in lanes of so many. The CUDA
# kernels have sizes of their own, all of them powers of two at most as large as a chunk.
LANES, BLOCK, CHUNK = 16, 1024, 8192


@dataclass
class Terms:
    """Loss and gradients of each element in float64. A `..._scale` is the sum of the magnitudes of the addends: what rounding errors are relative to."""

    loss: Tensor
    loss_scale: Tensor
    grad_input: Tensor
    grad_input_scale: Tensor
    grad_target: Tensor
    grad_target_scale: Tensor


def _product(coefficient: Tensor, term: Tensor) -> Tensor:
    """What has no weight has no say, infinite or not."""
    return torch.where((coefficient == 0) & term.isinf(), 0.0, coefficient * term)


def _float64(tensor: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like) if tensor is None else tensor.detach().to(like).expand_as(like)


def with_logits(input: Tensor, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None) -> Terms:
    x = input.detach().double()
    y, w, p = (_float64(tensor, x) for tensor in (target, weight, pos_weight))
    e = torch.exp(-x.abs())
    softplus = torch.log1p(e) + x.clamp(min=0)  # log(1 + exp(x))
    softplus_minus = torch.log1p(e) + (-x).clamp(min=0)  # log(1 + exp(-x))
    larger, smaller = 1 / (1 + e), e / (1 + e)
    sigmoid, sigmoid_minus = torch.where(x >= 0, larger, smaller), torch.where(x >= 0, smaller, larger)
    sigmoid, sigmoid_minus = sigmoid + 0 * e, sigmoid_minus + 0 * e  # NaN in, NaN out
    negative, positive = w * (1 - y), w * p * y
    return Terms(
        loss=_product(negative, softplus) + _product(positive, softplus_minus),
        loss_scale=_product(negative.abs(), softplus) + _product(positive.abs(), softplus_minus),
        grad_input=negative * sigmoid - positive * sigmoid_minus,
        grad_input_scale=negative.abs() * sigmoid + positive.abs() * sigmoid_minus,
        grad_target=_product(w * p, softplus_minus) - _product(w, softplus),
        grad_target_scale=_product((w * p).abs(), softplus_minus) + _product(w.abs(), softplus),
    )


def probabilities(input: Tensor, target: Tensor, weight: Tensor | None = None) -> Terms:
    q = input.detach().double()
    y, w = (_float64(tensor, q) for tensor in (target, weight))
    log_q, log_rest = q.log(), (-q).log1p()
    for_positive, for_negative = -log_q.clamp(min=-100), -log_rest.clamp(min=-100)
    grad_input = w * (q - y) / ((1 - q) * q).clamp(min=1e-12)
    return Terms(
        loss=w * (y * for_positive + (1 - y) * for_negative),
        loss_scale=w.abs() * (y.abs() * for_positive + (1 - y).abs() * for_negative),
        grad_input=grad_input,
        grad_input_scale=grad_input.abs(),
        grad_target=_product(w, log_rest - log_q),
        grad_target_scale=_product(w.abs(), log_rest.abs() + log_q.abs()),
    )


def reduced(terms: Terms, reduction: str, grad_output: Tensor | float = 1.0) -> Terms:
    """The terms of the reduced loss, its gradients times `grad_output`."""
    numel = terms.loss.numel()
    factor = torch.as_tensor(grad_output, dtype=torch.float64, device=terms.loss.device)
    if reduction == "mean":
        factor = factor / max(numel, 1)
    loss, loss_scale = terms.loss, terms.loss_scale
    if reduction == "sum":
        loss, loss_scale = loss.sum(), loss_scale.sum()
    elif reduction == "mean":
        loss, loss_scale = loss.mean(), loss_scale.mean()
    return Terms(
        loss,
        loss_scale,
        terms.grad_input * factor,
        terms.grad_input_scale * factor.abs(),
        terms.grad_target * factor,
        terms.grad_target_scale * factor.abs(),
    )


def ulp(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of `dtype` at the float64 number `expected`; below the normal numbers, that of the subnormal ones."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(expected.abs().clamp(info.tiny, info.max))
    return torch.ldexp(torch.full_like(expected, info.eps), exponent - 1)


def ulp_error(actual: Tensor, expected: Tensor) -> Tensor:
    """The error of `actual` against the float64 `expected`, in ULP of the dtype of `actual`. Equal infinities, and NaN for NaN, are no error."""
    error = (actual.double() - expected).abs() / ulp(expected, actual.dtype)
    same = (actual.double() == expected.to(actual.dtype).double()) & expected.to(actual.dtype).isinf()
    same |= actual.isnan() & expected.isnan()
    return torch.where(same, 0.0, error.nan_to_num(nan=math.inf, posinf=math.inf))


def arithmetic_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def assert_rounded_once(
    actual: Tensor, expected: Tensor, scale: Tensor, arithmetic: torch.dtype, ulps: float = 4.0, what: str = ""
) -> None:
    """`actual` is `expected`, computed in `arithmetic` with an error of at most `ulps` relative to `scale`, and rounded once to its own dtype."""
    expected, scale = expected.to(actual.device), scale.to(actual.device)
    assert actual.shape == expected.shape
    info = torch.finfo(arithmetic)
    bound = ulps * (info.eps * scale + info.tiny * info.eps)
    if actual.dtype != arithmetic:
        bound = bound + 0.5 * (1 + info.eps) * ulp(expected, actual.dtype)
    error = (actual.double() - expected).abs()
    rounded = expected.to(actual.dtype)
    wrong = ~((error <= bound) | (rounded.isinf() & (actual == rounded)) | (expected.isnan() & actual.isnan()))
    if wrong.any():
        index = tuple(torch.nonzero(wrong)[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off, the first at {index}: {actual[index].item()!r}, "
            f"expected {expected[index].item()!r} within {bound[index].item()!r}"
        )


def make_logits(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).to(device)


def make_probabilities(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return make_logits(shape, torch.float64, "cpu", seed).sigmoid().to(dtype).to(device)


def make_targets(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 1) -> Tensor:
    """Soft labels for floating dtypes, a third of them exactly 0 or 1; hard labels otherwise."""
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = (values * 1.5 - 0.25).clamp(0, 1)
    return (labels if dtype.is_floating_point else labels > 0.5).to(dtype).to(device)


def make_weights(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 2) -> Tensor:
    """Between 0.5 and 2.5, and some exactly 0."""
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(values < 0.1, 0.0, values * 2 + 0.5).to(dtype).to(device)
