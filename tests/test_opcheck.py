"""`torch.library.opcheck` on every operator, public and internal, with gradients and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import make_logits, make_probabilities, make_targets, make_weights
from torch import Tensor

OPS = torch.ops.bce_ext

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def tensors(
    case: str, device: str, with_logits: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """input, target, weight, pos_weight; which of them require a gradient is the case."""
    shape = (3, 5)
    input = (make_logits if with_logits else make_probabilities)(shape, dtype, device)
    target = make_targets(shape, torch.bool if case == "bool_target" else dtype, device)
    weight = make_weights((5,), dtype, device) if case in ("weights", "weights_require_grad") else None
    pos_weight = make_weights((3, 1), dtype, device) if weight is not None and with_logits else None
    if case == "transposed":
        input = input.t().contiguous().t()
    if case != "no_grad":
        input.requires_grad_()
    if case == "target_requires_grad":
        target.requires_grad_()
    if case == "weights_require_grad" and weight is not None:
        weight.requires_grad_()
    return input, target, weight, pos_weight


def arguments(case: str, device: str, with_logits: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """What the internal operators take first: the tensors, normalizer, formula, options."""
    normalizer = torch.tensor(7.0, device=device) if case == "normalizer" else None
    options = [0.1, 0.0] if case == "options" else []
    return *tensors(case, device, with_logits, dtype), normalizer, 0 if with_logits else 1, options


CASES = ["no_grad", "grad", "target_requires_grad", "bool_target", "weights", "weights_require_grad", "transposed"]


def opcheck(op: Any, *args: Any, **kwargs: Any) -> None:
    assert set(torch.library.opcheck(op, args, kwargs).values()) == {"SUCCESS"}


def test_every_operator_is_checked_here() -> None:
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("bce_ext::")}
    assert names == {
        "binary_cross_entropy_with_logits",
        "binary_cross_entropy_with_logits.options",
        "binary_cross_entropy",
        "binary_cross_entropy.options",
        "sigmoid_focal_loss",
        "asymmetric_loss",
        "_bce",
        "_bce_loss",
        "_bce_loss_and_grad",
        "_bce_backward",
        "_bce_mean_of_valid",
        "_scale_grad_",
        "_count_valid",
        "empty_cache",
        # in test_linear_composition.py
        "linear_binary_cross_entropy_with_logits",
        "_linear_bce",
        "_linear_bce_loss_and_grads",
    }


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_with_logits(case: str, reduction: int, device: str) -> None:
    opcheck(OPS.binary_cross_entropy_with_logits.default, *tensors(case, device, with_logits=True), reduction)


@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("case", ["no_grad", "grad", "target_requires_grad", "weights_require_grad"])
def test_probabilities(case: str, reduction: int, device: str) -> None:
    opcheck(OPS.binary_cross_entropy.default, *tensors(case, device, with_logits=False)[:3], reduction)


@pytest.mark.parametrize("name", ["binary_cross_entropy_with_logits", "binary_cross_entropy"])
def test_defaults(name: str, device: str) -> None:
    input, target, _, _ = tensors("grad", device, with_logits=name.endswith("logits"))
    opcheck(getattr(OPS, name).default, input, target)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", [0, 1])
def test_other_dtypes(reduction: int, dtype: torch.dtype, device: str) -> None:
    opcheck(OPS.binary_cross_entropy_with_logits.default, *tensors("weights", device, True, dtype), reduction)


@pytest.mark.parametrize("with_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("case", ["no_grad", "grad", "weights", "options"])
def test_bce(case: str, reduction: int, with_logits: bool, device: str) -> None:
    # With another dtype than that of the input, as autocast calls it.
    opcheck(OPS._bce.default, *arguments(case, device, with_logits, torch.bfloat16), reduction, torch.float32)


@pytest.mark.parametrize("with_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("reduce", [False, True], ids=["none", "sum"])
@pytest.mark.parametrize("case", ["no_grad", "grad", "weights", "transposed", "options"])
def test_bce_loss(case: str, reduce: bool, with_logits: bool, device: str) -> None:
    opcheck(
        OPS._bce_loss.default,
        *arguments(case, device, with_logits),
        reduce,
        7 if reduce else 1,
        torch.float32,
    )


@pytest.mark.parametrize("with_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("case", ["no_grad", "grad", "weights", "transposed", "options", "normalizer"])
def test_bce_loss_and_grad(case: str, with_logits: bool, device: str) -> None:
    opcheck(OPS._bce_loss_and_grad.default, *arguments(case, device, with_logits), 7, torch.float32)


@pytest.mark.parametrize("with_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("output_mask", [[True, True], [True, False], [False, True]], ids=str)
@pytest.mark.parametrize("grad_output_shape", [(), (3, 5)], ids=["reduced", "elementwise"])
@pytest.mark.parametrize("case", ["no_grad", "grad", "options", "normalizer"])
def test_bce_backward(
    case: str, grad_output_shape: tuple[int, ...], output_mask: list[bool], with_logits: bool, device: str
) -> None:
    grad_output = make_weights(grad_output_shape, torch.float32, device).requires_grad_(case != "no_grad")
    opcheck(OPS._bce_backward.default, *arguments(case, device, with_logits), grad_output, 7, output_mask)


@pytest.mark.parametrize("grad_output", [1.0, 0.37])
def test_scale_grad(grad_output: float, device: str) -> None:
    gradient = make_logits((3, 5), torch.float32, device)
    expected = gradient * torch.tensor(grad_output, device=device)
    opcheck(OPS._scale_grad_.default, gradient.clone(), torch.tensor(grad_output, device=device))
    OPS._scale_grad_(gradient, torch.tensor(grad_output, device=device))
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("wants_gradient", [False, True])
@pytest.mark.parametrize("with_logits", [True, False], ids=["logits", "probabilities"])
@pytest.mark.parametrize("case", ["no_grad", "grad", "weights", "weights_require_grad", "transposed"])
def test_bce_mean_of_valid(case: str, with_logits: bool, wants_gradient: bool) -> None:
    # A kernel of the CPU alone.
    args = (*tensors(case, "cpu", with_logits), None, 0 if with_logits else 1, [0.1, 0.0])
    opcheck(OPS._bce_mean_of_valid.default, *args, torch.float32, wants_gradient)
    with pytest.raises(ValueError, match="expected an ignore_index and no normalizer"):
        OPS._bce_mean_of_valid(*args[:4], torch.tensor(2.0), *args[5:], torch.float32, wants_gradient)
    with pytest.raises(ValueError, match="expected an ignore_index and no normalizer"):
        OPS._bce_mean_of_valid(*args[:6], [], torch.float32, wants_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
def test_count_valid(dtype: torch.dtype, device: str) -> None:
    target = make_targets((3, 5), dtype, device)
    opcheck(OPS._count_valid.default, target, 1.0)
    assert OPS._count_valid(target, 1.0) == (target != 1).sum()


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("name", ["binary_cross_entropy_with_logits", "binary_cross_entropy"])
def test_options(name: str, reduction: int, device: str) -> None:
    input, target, _, _ = tensors("grad", device, with_logits=name.endswith("logits"))
    op = getattr(OPS, name).options
    opcheck(op, input, target, reduction=reduction, label_smoothing=0.1, ignore_index=0)
    if reduction == 1:
        normalizer = torch.tensor(3.0, device=device)
        opcheck(op, input, target, reduction=reduction, normalizer=normalizer)
        opcheck(op, input, target, reduction=reduction, normalizer=normalizer.requires_grad_())


def test_empty_cache() -> None:
    opcheck(OPS.empty_cache.default)


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["sigmoid_focal_loss", "asymmetric_loss"])
def test_focused_losses(name: str, case: str, reduction: int, device: str) -> None:
    input, target, weight, pos_weight = tensors(case, device, with_logits=True)
    op = getattr(OPS, name).default
    opcheck(op, input, target, reduction=reduction, weight=weight, pos_weight=pos_weight, label_smoothing=0.1)
    if reduction == 1:
        opcheck(op, input, target, reduction=1, ignore_index=1, normalizer=torch.tensor(3.0, device=device))
