"""Bad input raises what native raises, in one clear sentence: the functional, the module and the operator alike."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from callables import PROBABILITIES, WITH_LOGITS
from torch import Tensor

import bce_ext
import bce_ext.functional as F

NATIVE = torch.nn.functional.binary_cross_entropy_with_logits
NATIVE_PROBABILITIES = torch.nn.functional.binary_cross_entropy


def raised_by(call: Callable[..., object], *args: Any, **kwargs: Any) -> Exception:
    try:
        call(*args, **kwargs)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def assert_raises_as_native(error: Exception, native: Exception) -> None:
    # `except` clauses written for native must catch ours.
    assert isinstance(error, type(native)), f"native raises {native!r}, ours {error!r}"
    message = str(error)
    assert message
    assert "\n" not in message.strip(), message


def probability(input: Tensor) -> Tensor:
    return input.sigmoid() if input.is_floating_point() else input


Arguments = tuple[Tensor, Tensor, dict[str, Tensor]]

X = torch.linspace(-2, 2, 12).view(3, 4)
Y = torch.linspace(0, 1, 12).view(3, 4)

# Tensors that native refuses, and a word of our message.
SIZE_OF_LOGITS, SIZE_OF_PROBABILITIES = "must be the same as input size", "different to the input size"
BAD_TENSORS: dict[str, tuple[Arguments, str]] = {
    "target of another size": ((X, Y[:, :3], {}), SIZE_OF_LOGITS),
    "(N, 1) logits, (N,) targets": ((X[:, :1], Y[:, 0], {}), "unsqueeze"),
    "(N,) logits, (N, 1) targets": ((X[:, 0], Y[:, :1], {}), "squeeze"),
    "target that would broadcast": ((X, Y[:1], {}), SIZE_OF_LOGITS),
    "input that would broadcast": ((X[:1], Y, {}), SIZE_OF_LOGITS),
    "target of the same numel": ((X, Y.view(4, 3), {}), "the number of elements agrees"),
    "empty target": ((X, Y[:0], {}), SIZE_OF_LOGITS),
    "weight of another size": ((X, Y, {"weight": torch.ones(5)}), "expected weight to broadcast"),
    "weight of the wrong dimension": ((X, Y, {"weight": torch.ones(3)}), "expected weight to broadcast"),
    "weight larger than the input": ((X, Y, {"weight": torch.ones(2, 3, 4)}), "expected weight to broadcast"),
    "empty weight": ((X, Y, {"weight": torch.ones(0)}), "expected weight to broadcast"),
    "pos_weight of another size": ((X, Y, {"pos_weight": torch.ones(5)}), "expected pos_weight to broadcast"),
    "pos_weight of the wrong dimension": ((X, Y, {"pos_weight": torch.ones(3)}), "expected pos_weight to broadcast"),
    "pos_weight larger than the input": (
        (X, Y, {"pos_weight": torch.ones(2, 3, 4)}),
        "expected pos_weight to broadcast",
    ),
    "empty pos_weight": ((X, Y, {"pos_weight": torch.ones(0)}), "expected pos_weight to broadcast"),
    "int64 logits": ((X.long(), Y, {}), "expected input of a real floating dtype"),
    "uint8 logits": ((X.byte(), Y, {}), "expected input of a real floating dtype"),
    "bool logits": ((X > 0, Y, {}), "expected input of a real floating dtype"),
    "complex logits": ((X.cfloat(), Y, {}), "expected input of a real floating dtype"),
    "complex logits and targets": ((X.cfloat(), Y.cfloat(), {}), "expected input of a real floating dtype"),
    "complex weight": ((X, Y, {"weight": X.cfloat()}), "expected a real weight"),
    "complex pos_weight": ((X, Y, {"pos_weight": X.cfloat()}), "expected a real pos_weight"),
    "target on another device": ((X, Y.to("meta"), {}), "expected target on the device of input"),
    "input on another device": ((X.to("meta"), Y, {}), "expected target on the device of input"),
    "weight on another device": ((X, Y, {"weight": Y.to("meta")}), "expected weight on the device of input"),
    "pos_weight on another device": (
        (X, Y, {"pos_weight": Y.to("meta")}),
        "expected pos_weight on the device of input",
    ),
    "sparse logits": ((X.to_sparse(), Y, {}), "expected a strided input"),
}


def to_device(tensor: Tensor, device: str) -> Tensor:
    return tensor if tensor.is_meta else tensor.to(device)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("loss_function", WITH_LOGITS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(case: str, loss_function: Callable[..., Tensor], requires_grad: bool, device: str) -> None:
    (input, target, weights), text = BAD_TENSORS[case]
    input, target = to_device(input, device), to_device(target, device)
    weights = {name: to_device(weight, device) for name, weight in weights.items()}
    if input.is_floating_point():
        input = input.detach().requires_grad_(requires_grad)
    native = raised_by(NATIVE, input, target, **weights)
    if loss_function.__name__ == "scripted":
        # TorchScript turns every exception of an operator into its own kind of RuntimeError, and shows the code around
        # the call.
        with pytest.raises((type(native), RuntimeError), match=text):
            loss_function(input, target, **weights)
        return
    error = raised_by(loss_function, input, target, **weights)
    assert_raises_as_native(error, native)
    assert text in str(error)


@pytest.mark.parametrize("loss_function", PROBABILITIES[:-1], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "case", [case for case, ((_, _, weights), _) in BAD_TENSORS.items() if "pos_weight" not in weights]
)
def test_bad_tensors_of_probabilities(case: str, loss_function: Callable[..., Tensor], device: str) -> None:
    (input, target, weights), text = BAD_TENSORS[case]
    if input.is_sparse or target.is_sparse:
        pytest.skip("native names another backend's missing kernel")
    input, target = to_device(probability(input), device), to_device(target, device)
    weights = {name: to_device(weight, device) for name, weight in weights.items()}
    error = raised_by(loss_function, input, target, **weights)
    native = raised_by(NATIVE_PROBABILITIES, input, target, **weights)
    assert_raises_as_native(error, native)
    assert (SIZE_OF_PROBABILITIES if text == SIZE_OF_LOGITS else text) in str(error)
    if "Using a target size" in str(native):
        assert str(native) in str(error)  # programs look for native's words


@pytest.mark.parametrize("loss_function", [*WITH_LOGITS[:-1], *PROBABILITIES[:-1]], ids=lambda f: f.__name__)
def test_a_complex_target_raises(loss_function: Callable[..., Tensor], device: str) -> None:
    # Native gives a complex loss with logits, whose meaning nobody has defined, and raises RuntimeError with
    # probabilities.
    with pytest.raises(RuntimeError, match="expected a real target, but got ComplexFloat"):
        loss_function(X.sigmoid().to(device), Y.cfloat().to(device))


def test_the_hint_for_the_most_frequent_mistake() -> None:
    with pytest.raises(ValueError, match=r"use target\.unsqueeze\(dim\) or input\.squeeze\(dim\)"):
        F.binary_cross_entropy_with_logits(X[:, :1], Y[:, 0])
    with pytest.raises(ValueError, match=r"use target\.squeeze\(dim\) or input\.unsqueeze\(dim\)"):
        F.binary_cross_entropy_with_logits(X[:, 0], Y[:, :1])


@pytest.mark.parametrize("reduction", ["max", "", "Mean", None, 1])
def test_unknown_reduction(reduction: Any) -> None:
    native = raised_by(NATIVE, X, Y, reduction=reduction)
    for ours in (
        raised_by(F.binary_cross_entropy_with_logits, X, Y, reduction=reduction),
        raised_by(F.binary_cross_entropy, X.sigmoid(), Y, reduction=reduction),
        raised_by(bce_ext.BCEWithLogitsLoss(reduction=reduction), X, Y),
        raised_by(bce_ext.BCELoss(reduction=reduction), X.sigmoid(), Y),
    ):
        assert type(ours) is type(native)
        assert str(ours) == str(native)


@pytest.mark.parametrize("reduction", [3, -1, 2**40])
def test_unknown_reduction_number(reduction: int) -> None:
    with pytest.raises(ValueError, match="is not a valid value for reduction"):
        torch.ops.bce_ext.binary_cross_entropy_with_logits(X, Y, None, None, reduction)
    with pytest.raises(ValueError, match="is not a valid value for reduction"):
        torch.ops.bce_ext.binary_cross_entropy(X.sigmoid(), Y, None, reduction)
    with pytest.raises(ValueError, match="is not a valid value for reduction"):
        bce_ext.BCEWithLogitsFunction.apply(X, Y, None, None, reduction)


NON_TENSORS = {
    "list": [[1.0, 2.0]],
    "None": None,
    "array": np.ones((3, 4), dtype=np.float32),
    "number": 1.0,
    "string": "a",
}


@pytest.mark.parametrize("place", ["input", "target"])
@pytest.mark.parametrize("value", NON_TENSORS)
def test_something_else_than_a_tensor(value: str, place: str) -> None:
    bad = NON_TENSORS[value]
    arguments = (bad, Y) if place == "input" else (X, bad)
    probabilities = (bad, Y) if place == "input" else (X.sigmoid(), bad)
    native = raised_by(NATIVE, *arguments)
    assert_raises_as_native(raised_by(F.binary_cross_entropy_with_logits, *arguments), native)
    assert_raises_as_native(raised_by(bce_ext.BCEWithLogitsLoss(), *arguments), native)
    native = raised_by(NATIVE_PROBABILITIES, *probabilities)
    assert_raises_as_native(raised_by(F.binary_cross_entropy, *probabilities), native)
    assert_raises_as_native(raised_by(bce_ext.BCELoss(), *probabilities), native)
    # The operators of torch raise whatever their dispatcher does, and so do ours.
    assert isinstance(raised_by(torch.ops.bce_ext.binary_cross_entropy_with_logits, *arguments), RuntimeError)


def test_the_exception_can_be_caught_by_name_and_pickled() -> None:
    error = raised_by(F.binary_cross_entropy_with_logits, [1.0], Y)
    assert type(error) is bce_ext.ArgumentTypeError
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is bce_ext.ArgumentTypeError
    assert str(copy) == str(error)


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
@pytest.mark.parametrize("value", ["list", "array", "string"])
def test_weights_that_are_no_tensors(value: str, name: str) -> None:
    weights = {name: NON_TENSORS[value]}
    assert_raises_as_native(
        raised_by(F.binary_cross_entropy_with_logits, X, Y, **weights), raised_by(NATIVE, X, Y, **weights)
    )
    ours, native = raised_by(bce_ext.BCEWithLogitsLoss, **weights), raised_by(torch.nn.BCEWithLogitsLoss, **weights)
    assert type(ours) is type(native) is TypeError
    if name == "weight":
        assert isinstance(raised_by(bce_ext.BCELoss, **weights), TypeError)


@pytest.mark.parametrize("value", [1.0000001, -1e-30, 2.0, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(
    "position", [0, 17, 8192, 20_010]
)  # in the first and a later vector, in the second chunk, in what is left over
@pytest.mark.parametrize("loss_function", PROBABILITIES[:-1], ids=lambda f: f.__name__)
def test_probabilities_out_of_range_raise_on_the_cpu(
    loss_function: Callable[..., Tensor], position: int, value: float
) -> None:
    input, target = torch.full((20_011,), 0.5), torch.ones(20_011)
    input[position] = value
    native = raised_by(NATIVE_PROBABILITIES, input, target)
    for requires_grad in (False, True):
        for reduction in ("none", "mean"):
            error = raised_by(loss_function, input.detach().requires_grad_(requires_grad), target, reduction=reduction)
            assert type(error) is type(native) is RuntimeError
            assert "all elements of input should be between 0 and 1" in str(error)


def test_a_failed_call_leaves_nothing_behind() -> None:
    with pytest.raises(ValueError, match="must be the same"):
        F.binary_cross_entropy_with_logits(X, Y[:, :3])
    torch.testing.assert_close(F.binary_cross_entropy_with_logits(X, Y), NATIVE(X, Y))


def test_unsupported_floating_dtypes_raise() -> None:
    with pytest.raises((NotImplementedError, RuntimeError)):
        F.binary_cross_entropy_with_logits(X.to(torch.float8_e4m3fn), Y)


@pytest.mark.parametrize("wrong", ["a", [1], 1 + 2j, None], ids=repr)
def test_options_that_are_no_numbers(wrong: Any) -> None:
    x, y = torch.zeros(3), torch.zeros(3)
    options: dict[Callable[..., Tensor], list[str]] = {
        F.binary_cross_entropy_with_logits: ["label_smoothing", "ignore_index"],
        F.binary_cross_entropy: ["label_smoothing", "ignore_index"],
        F.sigmoid_focal_loss: ["label_smoothing", "ignore_index", "alpha", "gamma"],
        F.asymmetric_loss: ["label_smoothing", "ignore_index", "gamma_neg", "gamma_pos", "clip", "eps"],
    }
    for function, names in options.items():
        for name in names:
            if name == "ignore_index" and wrong is None:
                continue
            with pytest.raises(bce_ext.ArgumentTypeError, match=f"{function.__name__}: expected {name} to be a number"):
                function(x, y, **{name: wrong})
    with pytest.raises(bce_ext.ArgumentTypeError, match="expected label_smoothing to be a number"):
        F.linear_binary_cross_entropy_with_logits(x[None], torch.zeros(2, 3), torch.zeros(1, 2), label_smoothing=wrong)


def test_an_ignore_index_that_is_not_a_number() -> None:
    """No target equals NaN: it would leave nothing out, and say nothing."""
    x, y, nan = torch.zeros(3), torch.zeros(3), float("nan")
    for function in (
        F.binary_cross_entropy_with_logits,
        F.binary_cross_entropy,
        F.sigmoid_focal_loss,
        F.asymmetric_loss,
        torch.ops.bce_ext.binary_cross_entropy_with_logits,
        torch.ops.bce_ext.binary_cross_entropy,
    ):
        with pytest.raises(ValueError, match="expected ignore_index to be a number or None, but got nan"):
            function(x, y, ignore_index=nan)
    with pytest.raises(ValueError, match="expected ignore_index to be a number or None, but got nan"):
        F.linear_binary_cross_entropy_with_logits(x, torch.zeros(2, 3), torch.zeros(2), ignore_index=nan)
    with pytest.raises(ValueError, match="expected ignore_index to be a number or None, but got nan"):
        bce_ext.BCEWithLogitsLoss(ignore_index=nan)(x, y)


def test_parameters_that_require_grad() -> None:
    """They are numbers: as such they would silently get no gradient."""
    x, y = torch.zeros(3), torch.zeros(3)
    number = torch.tensor(0.5)
    torch.testing.assert_close(F.sigmoid_focal_loss(x, y, alpha=number), F.sigmoid_focal_loss(x, y, alpha=0.5))
    for name in ("alpha", "gamma", "label_smoothing"):
        with pytest.raises(
            bce_ext.ArgumentTypeError, match=f"expected {name} to be a number, since it has no gradient"
        ):
            F.sigmoid_focal_loss(x, y, **{name: number.clone().requires_grad_()})


@pytest.mark.parametrize("name", ["BCEWithLogitsLoss", "BCELoss"])
def test_a_module_that_torch_has_initialised(name: str) -> None:
    """As where a program exchanges the class of a module that is there."""
    input, target = torch.tensor([0.2, 0.7]), torch.tensor([0.0, 1.0])
    module = getattr(torch.nn, name)(weight=torch.tensor([1.0, 2.0]))
    expected = module(input, target)
    module.__class__ = getattr(bce_ext, name)
    torch.testing.assert_close(module(input, target), expected)
    assert repr(module) == f"{name}()"


def test_an_ignore_index_beside_class_indices_that_no_target_has() -> None:
    """A user of cross_entropy expects -100 to leave the row out; here it is a row without a label."""
    input, linear_weight = torch.zeros(3, 2), torch.zeros(4, 2)
    for size in (4, 1_500_000):  # the plain form, and blocks
        with pytest.raises(ValueError, match="expected an ignore_index of 0 or 1 with class indices"):
            F.linear_binary_cross_entropy_with_logits(
                input, torch.zeros(size, 2), torch.tensor([1, -100, 2]), ignore_index=-100
            )
    loss = F.linear_binary_cross_entropy_with_logits(input, linear_weight, torch.tensor([1, -100, 2]), ignore_index=0)
    assert loss.isfinite()


def test_numbers_of_siglip() -> None:
    features = torch.eye(3)
    expected = F.siglip_loss(features, features, torch.tensor(10.0), torch.tensor(-10.0))
    assert torch.equal(F.siglip_loss(features, features, 10.0, -10), expected)
    assert torch.equal(
        F.siglip_loss(features, features, torch.full((1,), 10.0), torch.full((1, 1, 1), -10.0)), expected
    )
    for numbers in ((torch.ones(3),), (1.0, torch.ones(2))):
        with pytest.raises(ValueError, match="to be one number, but got size"):
            F.siglip_loss(features, features, *numbers)
