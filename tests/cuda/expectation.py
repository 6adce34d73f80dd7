"""What the kernels must write: the formulas of the losses in float64, as their definitions read."""

import dataclasses
from collections.abc import Callable

import numpy as np
from harness import ASYMMETRIC, EPS, FOCAL, LOGITS, PROBABILITIES, Array, Case, Result


@dataclasses.dataclass
class Terms:
    """Loss and derivatives of each element without its weight, and the size of what is added up in each: what its error
    is relative to."""

    loss: Array
    loss_scale: Array
    grad_input: Array
    grad_input_scale: Array
    grad_target: Array
    grad_target_scale: Array


def _times(weight: Array, value: Array) -> Array:
    """0 * inf is 0: a term without weight has no say."""
    return np.where(weight == 0, np.where(np.isnan(value), value, 0.0), weight * value)


def _logistic(x: Array) -> tuple[Array, Array, Array, Array]:
    """softplus(x), softplus(-x), sigmoid(x), sigmoid(-x)."""
    e = np.exp(-np.abs(x))
    softplus, softplus_of_minus = np.maximum(x, 0) + np.log1p(e), np.maximum(-x, 0) + np.log1p(e)
    sigmoid, sigmoid_of_minus = np.where(x >= 0, 1, e) / (1 + e), np.where(x <= 0, 1, e) / (1 + e)
    sigmoid, sigmoid_of_minus = (np.where(np.isnan(x), x, value) for value in (sigmoid, sigmoid_of_minus))
    return softplus, softplus_of_minus, sigmoid, sigmoid_of_minus


def _with_logits(case: Case, x: Array, y: Array, p: Array) -> Terms:
    softplus, softplus_of_minus, sigmoid, sigmoid_of_minus = _logistic(x)
    negative, positive = _times(1 - y, softplus), _times(p * y, softplus_of_minus)
    against, along = (1 - y) * sigmoid, p * y * sigmoid_of_minus
    return Terms(
        loss=negative + positive,
        loss_scale=np.abs(negative) + np.abs(positive),
        grad_input=against - along,
        grad_input_scale=np.abs(against) + np.abs(along),
        grad_target=_times(p, softplus_of_minus) - softplus,
        grad_target_scale=_times(np.abs(p), softplus_of_minus) + softplus,
    )


def _probabilities(case: Case, x: Array, y: Array, p: Array) -> Terms:
    log_x, log_rest = np.maximum(np.log(x), -100), np.maximum(np.log1p(-x), -100)
    denominator = np.maximum((1 - x) * x, float(np.float32(1e-12)))  # native has it as a float32
    return Terms(
        loss=-(y * log_x + (1 - y) * log_rest),
        loss_scale=np.abs(y * log_x) + np.abs((1 - y) * log_rest),
        grad_input=(x - y) / denominator,
        grad_input_scale=(np.abs(x) + np.abs(y)) / denominator,
        grad_target=np.log1p(-x) - np.log(x),
        grad_target_scale=np.abs(np.log1p(-x)) + np.abs(np.log(x)),
    )


def _power_error(u: Array, terms_of_u: Array, gamma: Array | float) -> Array:
    """How much larger the relative error of u**gamma is than that of one rounding, where u is a sum of such terms."""
    return np.where(u > 0, 1 + gamma * terms_of_u / np.where(u > 0, u, 1), 1)


def _focal(case: Case, x: Array, y: Array, p: Array) -> Terms:
    alpha, gamma = case.parameters
    entropy = _with_logits(case, x, y, p)
    _, _, sigmoid, sigmoid_of_minus = _logistic(x)
    u = (1 - y) * sigmoid + y * sigmoid_of_minus
    a = alpha * y + (1 - alpha) * (1 - y) if alpha >= 0 else np.ones_like(y)
    slope_of_a = 2 * alpha - 1 if alpha >= 0 else 0.0
    power = u**gamma
    power_by_u = gamma * u ** (gamma - 1) if gamma >= 1 else np.where(u > 0, gamma * u ** (gamma - 1), 0)
    by_x = power_by_u * _times(sigmoid * sigmoid_of_minus, entropy.loss)
    by_y = power_by_u * (sigmoid_of_minus - sigmoid)
    error = _power_error(u, u, gamma)
    return Terms(
        loss=_times(a * power, entropy.loss),
        loss_scale=error * _times(a * power, entropy.loss_scale),
        grad_input=a * (entropy.grad_input * power + by_x * (1 - 2 * y)),
        grad_input_scale=error * a * (entropy.grad_input_scale * power + by_x * (1 + 2 * y)),
        grad_target=_times(slope_of_a * power + a * by_y, entropy.loss) + _times(a * power, entropy.grad_target),
        grad_target_scale=error
        * (
            _times(np.abs(slope_of_a) * power + a * np.abs(by_y), entropy.loss_scale)
            + _times(a * power, entropy.grad_target_scale)
        ),
    )


def _asymmetric(case: Case, x: Array, y: Array, p: Array) -> Terms:
    gamma_neg, gamma_pos, clip, eps, detached = case.parameters
    _, softplus_of_minus, sigmoid, sigmoid_of_minus = _logistic(x)
    clipped = sigmoid < clip
    rest = np.where(clipped, 0, sigmoid - clip)  # 1 - Q
    q = np.where(clipped, 1, sigmoid_of_minus + clip)
    log_p = np.where(sigmoid < eps, np.log(eps), -softplus_of_minus)
    log_q = np.where(q < 0.5, np.log(np.maximum(q, eps)), np.log1p(-np.minimum(rest, 1 - eps)))
    log_p_by_x = np.where(sigmoid < eps, 0, sigmoid_of_minus)
    q_by_x = np.where(clipped, 0, -sigmoid * sigmoid_of_minus)
    log_q_by_x = np.where(q < eps, 0, q_by_x / q)
    entropy = -(p * y * log_p + (1 - y) * log_q)
    entropy_by_x = -(p * y * log_p_by_x + (1 - y) * log_q_by_x)
    entropy_by_x_scale = p * y * log_p_by_x - (1 - y) * log_q_by_x

    u = y * sigmoid_of_minus + (1 - y) * rest
    gamma = gamma_pos * y + gamma_neg * (1 - y)
    power = u**gamma
    error = _power_error(u, y * sigmoid_of_minus + (1 - y) * np.where(clipped, 0, sigmoid + clip), gamma + 1)
    attached = 1.0 - detached
    positive_u = np.where(u > 0, u, 1)
    power_by_u = attached * np.where(u > 0, gamma * power / positive_u, 0)
    u_by_x = -y * sigmoid * sigmoid_of_minus - (1 - y) * q_by_x
    u_by_x_scale = (y * sigmoid - (1 - y) * np.where(clipped, 0, -sigmoid)) * sigmoid_of_minus
    power_by_gamma = attached * power * (gamma_pos - gamma_neg) * np.where(u > 0, np.log(positive_u), 0)
    power_by_y = power_by_gamma + power_by_u * (sigmoid_of_minus - rest)
    power_by_y_scale = attached * power * np.abs(gamma_pos - gamma_neg) + np.abs(power_by_gamma)
    power_by_y_scale += power_by_u * (sigmoid_of_minus + rest)
    return Terms(
        loss=entropy * power,
        loss_scale=error * entropy * power,
        grad_input=entropy_by_x * power + entropy * power_by_u * u_by_x,
        grad_input_scale=error * (entropy_by_x_scale * power + entropy * power_by_u * u_by_x_scale),
        grad_target=(log_q - p * log_p) * power + entropy * power_by_y,
        grad_target_scale=error * ((np.abs(log_q) + p * np.abs(log_p)) * power + entropy * power_by_y_scale),
    )


FORMULAS: dict[int, Callable[[Case, Array, Array, Array], Terms]] = {
    LOGITS: _with_logits,
    PROBABILITIES: _probabilities,
    FOCAL: _focal,
    ASYMMETRIC: _asymmetric,
}


def expected(case: Case) -> dict[str, Array]:
    """The outputs in float64, and as ``*_scale`` the size of the terms of each: what its error is relative to."""
    x, raw_target, w, p, g = (
        operand.gather(case.sizes)
        for operand in (case.input, case.target, case.weight, case.pos_weight, case.grad_output)
    )
    slope = 1 - case.label_smoothing
    y = raw_target * slope + case.label_smoothing / 2
    with np.errstate(all="ignore"):
        w = w * g
        of_one = FORMULAS[case.formula](case, x, y, p)
        divisor = case.divisor * float(case.normalizer.gather((1,))[0])
        scale = np.float64(1) / divisor
        terms = {
            "loss": _times(w, of_one.loss),
            "loss_scale": _times(np.abs(w), of_one.loss_scale),
            "grad_input": scale * w * of_one.grad_input,
            "grad_input_scale": abs(scale) * np.abs(w) * of_one.grad_input_scale,
            "grad_target": scale * slope * _times(w, of_one.grad_target),
            "grad_target_scale": abs(scale) * slope * _times(np.abs(w), of_one.grad_target_scale),
        }
        if case.ignore_index is not None:
            terms = {name: np.where(raw_target == case.ignore_index, 0.0, term) for name, term in terms.items()}
        total, total_scale = np.sum(terms["loss"]), np.sum(terms["loss_scale"])
        return {**terms, "total": np.array([total]) / divisor, "total_scale": np.array([total_scale]) / divisor}


def mismatch(case: Case, result: Result) -> str | None:
    """What is wrong with the outputs of a case; None when they are right."""
    reference = expected(case)
    computed = EPS["double" if case.in_double else "float"]
    # What is lost where exp(-|x|) underflows, times gamma and the bounded logarithm that multiply it.
    underflow = 128 * (2.0**-1074 if case.in_double else 2.0**-149)
    for name, dtype, _ in case.outputs():
        want, got, scale = reference[name], result[name], reference[name + "_scale"]
        smallest = {"half": 2.0**-24, "bfloat16": 2.0**-133, "float": 2.0**-149, "double": 2.0**-1074}[dtype]
        largest = {"half": 65504.0, "bfloat16": 3.39e38, "float": 3.4e38, "double": 1.79e308}[dtype]
        with np.errstate(all="ignore"):
            want = np.where(np.abs(want) > largest, np.copysign(np.inf, want), want)
            tolerance = 16 * computed * scale + 2 * EPS[dtype] * np.abs(want) + smallest + underflow
            right = (np.abs(got - want) <= tolerance) | (got == want) | (np.isnan(got) & np.isnan(want))
        if not right.all():
            i = int(np.argmin(right))
            types = f"formula {case.formula}, {case.input.dtype}, {case.target.dtype}"
            return f"{types}: {name}[{i}] of {got.size} is {got[i]!r}, expected {want[i]!r} within {tolerance[i]!r}"
    return None
