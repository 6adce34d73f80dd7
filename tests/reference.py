"""What the tests measure against: the formulas in float64, written independently of the kernels, and the distance to them in ULP."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

Weight = Tensor | None

REDUCTIONS = ("none", "mean", "sum")
REDUCTION_NUMBER = {"none": 0, "mean": 1, "sum": 2}
FLOATING_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Of csrc/cpu: a thread works through chunks of so many elements, in blocks of so many, in lanes of so many. The CUDA
# kernels have sizes of their own, all of them powers of two at most as large as a chunk.
LANES, BLOCK, CHUNK = 16, 1024, 8192

SMALLEST_VARIANCE = torch.tensor(1e-12, dtype=torch.float32).item()  # of BCELoss: native has it as a float32


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


def with_logits(input: Tensor, target: Tensor, weight: Weight = None, pos_weight: Weight = None) -> Terms:
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


def probabilities(input: Tensor, target: Tensor, weight: Weight = None) -> Terms:
    q = input.detach().double()
    y, w = (_float64(tensor, q) for tensor in (target, weight))
    log_q, log_rest = q.log(), (-q).log1p()
    for_positive, for_negative = -log_q.clamp(min=-100), -log_rest.clamp(min=-100)
    grad_input = w * (q - y) / ((1 - q) * q).clamp(min=SMALLEST_VARIANCE)
    return Terms(
        loss=w * (y * for_positive + (1 - y) * for_negative),
        loss_scale=w.abs() * (y.abs() * for_positive + (1 - y).abs() * for_negative),
        grad_input=grad_input,
        grad_input_scale=grad_input.abs(),
        grad_target=_product(w, log_rest - log_q),
        grad_target_scale=_product(w.abs(), log_rest.abs() + log_q.abs()),
    )


def focal(
    input: Tensor, target: Tensor, weight: Weight = None, pos_weight: Weight = None, *, alpha: float, gamma: float
) -> Terms:
    """torchvision's formula: ce * (1 - p_t)^gamma * alpha_t, with 1 - p as sigmoid(-x), and its derivatives by the product rule."""
    x = input.detach().double()
    y, w, p = (_float64(tensor, x) for tensor in (target, weight, pos_weight))
    ce = with_logits(x, y, None, p)
    prob, rest = x.sigmoid(), (-x).sigmoid()
    one_minus_p_t = prob * (1 - y) + rest * y
    alpha_t = torch.ones_like(y) if alpha < 0 else alpha * y + (1 - alpha) * (1 - y)
    alpha_slope = 0.0 if alpha < 0 else 2 * alpha - 1
    by_input, by_target = (1 - 2 * y) * prob * rest, rest - prob
    base = Base(one_minus_p_t, one_minus_p_t.abs(), by_input, by_input.abs(), by_target, by_target.abs())
    return _focused(ce, w, (alpha_t, alpha_slope), base, (torch.full_like(y, gamma), 0.0))


def asymmetric(
    input: Tensor,
    target: Tensor,
    weight: Weight = None,
    pos_weight: Weight = None,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    detach_focusing: bool = False,
    eps: float = 1e-8,
) -> Terms:
    """timm's formula, with 1 - sigmoid(x) as sigmoid(-x), and its derivatives by the product rule.

    The scales are those of clip = 0: the clipped probability is a difference, and errors are relative to what it is a difference of."""
    x = input.detach().double()
    y, w, p = (_float64(tensor, x) for tensor in (target, weight, pos_weight))
    positive, rest = x.sigmoid(), (-x).sigmoid()
    negative = (rest + clip).clamp(max=1)
    loss_of_1 = -torch.where(positive < eps, math.log(eps), -torch.logaddexp(-x, torch.zeros_like(x)))
    of_0 = -torch.log1p(-(positive - clip).clamp(min=0))
    of_0 = torch.where(negative < 0.5, -negative.clamp(min=eps).log(), of_0)
    product = positive * rest
    is_free = (positive > clip) & (negative >= eps)
    slope_of_1 = torch.where(positive < eps, 0.0, -rest)
    slope_of_0 = torch.where(is_free, product / negative.clamp(min=eps), 0.0)
    softplus = torch.logaddexp(x, torch.zeros_like(x))
    entropy = Terms(
        loss=p * y * loss_of_1 + (1 - y) * of_0,
        loss_scale=(p * y).abs() * loss_of_1 + (1 - y).abs() * softplus,
        grad_input=p * y * slope_of_1 + (1 - y) * slope_of_0,
        grad_input_scale=(p * y).abs() * rest + (1 - y).abs() * positive,
        grad_target=p * loss_of_1 - of_0,
        grad_target_scale=p.abs() * loss_of_1 + softplus,
    )
    clipped = (positive - clip).clamp(min=0)
    factor = y * rest + (1 - y) * clipped
    factor_scale = y.abs() * rest + (1 - y).abs() * positive
    by_input = (1 - y) * torch.where(positive > clip, product, 0.0) - y * product
    gamma = gamma_pos * y + gamma_neg * (1 - y)
    base = Base(factor, factor_scale, by_input, product, rest - clipped, rest + positive)
    no_alpha = (torch.ones_like(y), 0.0)
    return _focused(entropy, w, no_alpha, base, (gamma, gamma_pos - gamma_neg), detach_focusing)


@dataclass
class Base:
    """What a focusing factor is a power of, and its derivatives, with their scales as in Terms."""

    value: Tensor
    scale: Tensor
    by_input: Tensor
    by_input_scale: Tensor
    by_target: Tensor
    by_target_scale: Tensor


def _focused(
    entropy: Terms,
    w: Tensor,
    alpha: tuple[Tensor, float],
    u: Base,
    gamma: tuple[Tensor, float],
    detached: bool = False,
) -> Terms:
    """w * alpha * entropy * u^gamma and its derivatives, alpha and gamma with their slopes over the target: what has no weight has no say, and u^(gamma - 1)
    has none where u is 0."""

    def powers(base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        safe = torch.where(base > 0, base, 1.0)
        is_zero = base <= 0
        exponent = gamma[0]
        power = torch.where(is_zero, (exponent == 0).double(), safe**exponent)
        slope = torch.where(is_zero, 0.0, exponent * safe ** (exponent - 1))
        return power, slope, torch.where(is_zero, 0.0, safe.log())

    def terms(
        loss: Tensor, by_input: Tensor, by_target: Tensor, base: Tensor, du_dx: Tensor, du_dy: Tensor, magnitudes: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        power, slope, log = powers(base)
        (a, a_slope), g_slope = alpha, gamma[1]
        if magnitudes:
            log, a_slope, g_slope, a = log.abs(), abs(a_slope), abs(g_slope), a.abs()
        through = 0.0 if detached else 1.0
        focus_by_input = through * slope * du_dx
        focus_by_target = through * (slope * du_dy + g_slope * log * power)
        grad_input = a * (by_input * power + _product(focus_by_input, loss))
        grad_target = _product(a_slope * power + a * focus_by_target, loss) + _product(a * power, by_target)
        return _product(a * power, loss), grad_input, grad_target

    values = terms(entropy.loss, entropy.grad_input, entropy.grad_target, u.value, u.by_input, u.by_target, False)
    scales = terms(
        entropy.loss_scale,
        entropy.grad_input_scale,
        entropy.grad_target_scale,
        u.scale,
        u.by_input_scale,
        u.by_target_scale,
        True,
    )
    loss, grad_input, grad_target = (_product(w, value) for value in values)
    loss_scale, grad_input_scale, grad_target_scale = (_product(w.abs(), scale) for scale in scales)
    return Terms(loss, loss_scale, grad_input, grad_input_scale, grad_target, grad_target_scale)


def with_options(
    formula: Callable[..., Terms],
    input: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: float | None = None,
    **arguments: object,
) -> Terms:
    """The terms for a smoothed target. Ignored elements, by the target as it is given, have none at all, whatever their other operands are."""
    raw = target.detach()
    y = raw.double() * (1 - label_smoothing) + label_smoothing / 2
    terms = formula(input, y, **arguments)
    if label_smoothing and formula is probabilities:  # the smoothed target is rounded before q is taken from it
        q = input.detach().double()
        terms.grad_input_scale = terms.grad_input_scale + y.abs() / ((1 - q) * q).clamp(min=SMALLEST_VARIANCE)
    terms.grad_target, terms.grad_target_scale = (
        each * (1 - label_smoothing) for each in (terms.grad_target, terms.grad_target_scale)
    )
    if ignore_index is None:
        return terms
    ignored = raw == ignore_index
    return Terms(*(torch.where(ignored, 0.0, getattr(terms, field.name)) for field in fields(Terms)))


def reduced(terms: Terms, reduction: str, grad_output: Tensor | float = 1.0, divisor: float | None = None) -> Terms:
    """The terms of the reduced loss, its gradients times `grad_output`. A mean divides by the number of elements, or by `divisor`."""
    numel = terms.loss.numel()
    factor = torch.as_tensor(grad_output, dtype=torch.float64, device=terms.loss.device)
    if reduction == "mean":
        factor = factor / (max(numel, 1) if divisor is None else divisor)
    loss, loss_scale = terms.loss, terms.loss_scale
    if reduction == "sum":
        loss, loss_scale = loss.sum(), loss_scale.sum()
    elif reduction == "mean":
        count = numel if divisor is None else divisor
        loss, loss_scale = loss.sum() / count, loss_scale.sum() / abs(count)
    return Terms(
        loss,
        loss_scale,
        # No element is left where the divisor is 0, and what is ignored has a gradient of 0.
        _product(terms.grad_input, factor),
        _product(terms.grad_input_scale, factor.abs()),
        _product(terms.grad_target, factor),
        _product(terms.grad_target_scale, factor.abs()),
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
