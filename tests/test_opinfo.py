"""PyTorch's own test inputs for the native functions and modules, run against ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import bce_ext

common_methods = pytest.importorskip("torch.testing._internal.common_methods_invocations", exc_type=ImportError)
common_modules = pytest.importorskip("torch.testing._internal.common_modules", exc_type=ImportError)

OP_INFOS = {
    info.name.removeprefix("nn.functional."): info
    for info in common_methods.op_db
    if info.name in ("nn.functional.binary_cross_entropy", "nn.functional.binary_cross_entropy_with_logits")
}
MODULE_INFOS = {
    info.module_cls.__name__: info
    for info in common_modules.module_db
    if info.module_cls in (torch.nn.BCELoss, torch.nn.BCEWithLogitsLoss)
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

every_function = pytest.mark.parametrize("name", sorted(OP_INFOS))
every_module = pytest.mark.parametrize("name", sorted(MODULE_INFOS))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def test_pytorch_has_samples_of_both() -> None:
    assert len(OP_INFOS) == len(MODULE_INFOS) == 2


def samples(name: str, device: str, dtype: torch.dtype, requires_grad: bool = False) -> Iterator[Any]:
    yield from OP_INFOS[name].sample_inputs(device, dtype, requires_grad=requires_grad)


def ours(name: str) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = getattr(bce_ext.functional, name)
    return function


def in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def tolerances(dtype: torch.dtype) -> dict[str, float]:
    if dtype == torch.float64:
        return {"rtol": 1e-12, "atol": 1e-12}  # native is no more exact than that itself
    return {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}


@every_dtype
@every_function
def test_values(name: str, dtype: torch.dtype, device: str) -> None:
    """Against native in float64 on the same inputs: that of a low precision is not the truth."""
    native, count = OP_INFOS[name].op, 0
    for sample in samples(name, device, dtype):
        actual = ours(name)(sample.input, *sample.args, **sample.kwargs)
        exact = sample.transform(in_float64)
        expected = native(exact.input, *exact.args, **exact.kwargs)
        assert actual.dtype == dtype
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual.double(), expected, **tolerances(dtype))
        count += 1
    assert count >= 10


@every_dtype
@every_function
def test_gradients(name: str, dtype: torch.dtype, device: str) -> None:
    native = OP_INFOS[name].op
    for sample in samples(name, device, dtype, requires_grad=True):
        loss = ours(name)(sample.input, *sample.args, **sample.kwargs)
        cotangent = torch.rand_like(loss)
        (actual,) = torch.autograd.grad(loss, sample.input, cotangent)
        exact = sample.transform(lambda value: in_float64(value.detach()) if isinstance(value, Tensor) else value)
        leaf = exact.input.requires_grad_()
        (expected,) = torch.autograd.grad(native(leaf, *exact.args, **exact.kwargs), leaf, cotangent.double())
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, **tolerances(dtype))


@every_dtype
@every_function
def test_non_contiguous(name: str, dtype: torch.dtype, device: str) -> None:
    for sample in samples(name, device, dtype, requires_grad=True):
        strided = sample.noncontiguous()
        results = []
        for each in (sample, strided):
            loss = ours(name)(each.input, *each.args, **each.kwargs)
            results.append((loss, *torch.autograd.grad(loss.sum(), each.input)))
        torch.testing.assert_close(results[1], results[0], **tolerances(dtype))


@every_function
def test_forward_mode(name: str, device: str) -> None:
    native = OP_INFOS[name].op
    for sample in samples(name, device, torch.float64):
        tangent = torch.rand_like(sample.input)
        results = []
        for function in (ours(name), native):
            with fwAD.dual_level():
                dual = function(fwAD.make_dual(sample.input, tangent), *sample.args, **sample.kwargs)
                results.append(fwAD.unpack_dual(dual))
        torch.testing.assert_close(results[0].primal, results[1].primal)
        torch.testing.assert_close(results[0].tangent, results[1].tangent)


@every_function
def test_gradcheck_with_batched_and_forward_gradients(name: str, device: str) -> None:
    for sample in samples(name, device, torch.float64, requires_grad=True):

        def loss(input: Tensor, sample: Any = sample) -> Tensor:
            return ours(name)(input, *sample.args, **sample.kwargs)

        options: dict[str, Any] = {"check_batched_grad": True, "fast_mode": True}
        assert gradcheck(loss, sample.input, check_forward_ad=True, check_batched_forward_grad=True, **options)
        assert gradgradcheck(loss, sample.input, check_fwd_over_rev=True, **options)


@every_function
def test_errors(name: str, device: str) -> None:
    """Native's own error inputs, where PyTorch has any."""
    info = OP_INFOS[name]
    if info.error_inputs_func is None:
        with pytest.raises(ValueError, match="size"):
            ours(name)(torch.rand(3, device=device), torch.rand(4, device=device))
        return
    for error in info.error_inputs(device):
        with pytest.raises(error.error_type):
            ours(name)(error.sample_input.input, *error.sample_input.args, **error.sample_input.kwargs)


@every_dtype
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every_module
def test_modules(name: str, training: bool, dtype: torch.dtype, device: str) -> None:
    info = MODULE_INFOS[name]
    inputs = info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=training)
    for each in inputs:
        arguments, options = each.constructor_input.args, each.constructor_input.kwargs
        native = getattr(torch.nn, name)(*arguments, **options).to(device=device, dtype=torch.float64).train(training)
        module = getattr(bce_ext, name)(*arguments, **options).to(device=device, dtype=dtype).train(training)
        assert repr(module) == repr(native)
        input, target = each.forward_input.args
        actual = module(input, target)
        leaf = input.detach().double().requires_grad_()
        expected = native(leaf, target.detach().double())
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, **tolerances(dtype))
        (gradient,) = torch.autograd.grad(actual.sum(), input)
        torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected.sum(), leaf)[0], **tolerances(dtype))
        if each.reference_fn is not None:
            torch.testing.assert_close(each.reference_fn(module, input, target), actual, **tolerances(dtype))


@every_module
def test_module_gradcheck(name: str, device: str) -> None:
    info = MODULE_INFOS[name]
    for each in info.module_inputs_func(info, device=device, dtype=torch.float64, requires_grad=True, training=True):
        module = (
            getattr(bce_ext, name)(*each.constructor_input.args, **each.constructor_input.kwargs).to(device).double()
        )
        input, target = each.forward_input.args
        assert gradcheck(lambda x, y=target, m=module: m(x, y), input, fast_mode=True)
        assert gradgradcheck(lambda x, y=target, m=module: m(x, y), input, fast_mode=True)
