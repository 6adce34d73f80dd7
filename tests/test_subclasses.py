"""Subclasses, modes, hooks, checkpointing, copies, lazy views and very large tensors."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from callables import PYTHON_LOSSES, Loss, every_loss, every_reduction, functional, make_input, probabilities_functional
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bce_ext

NAMES = tuple(bce_ext.functional.__all__)


def make(
    loss: Loss, device: str, shape: tuple[int, ...] = (4, 6), dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    return make_input(loss, shape, dtype, device), reference.make_targets(shape, dtype, device)


class Logged(Tensor):
    """A __torch_function__ subclass that keeps the names of what is called on it."""

    seen: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


@every_loss
@pytest.mark.parametrize("which", ["input", "target", "weight"])
def test_torch_function_subclass(loss: Loss, which: str, device: str) -> None:
    Logged.seen = []
    input, target = make(loss, device)
    arguments = {"input": input, "target": target, "weight": torch.rand(6, device=device)}
    expected = loss(**arguments)
    arguments[which] = arguments[which].as_subclass(Logged)
    actual = loss(**arguments)
    assert isinstance(actual, Logged)
    torch.testing.assert_close(actual.as_subclass(Tensor), expected)
    assert any(name.startswith(NAMES) for name in Logged.seen)


@every_loss
def test_torch_function_mode(loss: Loss, device: str) -> None:
    seen: list[str] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    input, target = make(loss, device)
    expected = loss(input, target)
    with Mode():
        actual = loss(input, target)
    torch.testing.assert_close(actual, expected)
    assert any(name.startswith(NAMES) for name in seen)


class Wrapped(Tensor):
    """A __torch_dispatch__ subclass that wraps another tensor."""

    inner: Tensor
    seen: list[str]

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        wrapper: Wrapped = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        unwrap = pytree.tree_map_only(Wrapped, lambda tensor: tensor.inner, (args, kwargs or {}))
        return pytree.tree_map_only(Tensor, Wrapped, func(*unwrap[0], **unwrap[1]))


@every_reduction
@every_loss
def test_torch_dispatch_subclass(loss: Loss, reduction: str, device: str) -> None:
    Wrapped.seen = []
    input, target = make(loss, device)
    expected = loss(input, target, reduction=reduction)
    cotangent = torch.rand_like(expected)
    leaf = input.clone().requires_grad_()
    (expected_gradient,) = torch.autograd.grad(loss(leaf, target, reduction=reduction), leaf, cotangent)

    wrapped = Wrapped(input).requires_grad_()
    actual = loss(wrapped, Wrapped(target), reduction=reduction)
    assert isinstance(actual, Wrapped)
    (gradient,) = torch.autograd.grad(actual, wrapped, Wrapped(cotangent))
    assert isinstance(gradient, Wrapped)
    torch.testing.assert_close(actual.inner, expected)
    torch.testing.assert_close(gradient.inner, expected_gradient)
    assert any(name.startswith("bce_ext") for name in Wrapped.seen)


@every_reduction
@every_loss
def test_a_subclass_that_pytorch_tests_with(loss: Loss, reduction: str, device: str) -> None:
    """TwoTensor is traceable: eager, and through AOT dispatch."""
    input, target = make(loss, device)
    two = TwoTensor(input, input * 0.5)
    expected = [loss(each, target, reduction=reduction) for each in (two.a, two.b)]
    both = TwoTensor(target, target)
    actual = loss(two, both, reduction=reduction)
    torch.testing.assert_close([actual.a, actual.b], expected)
    torch._dynamo.reset()
    leaf = two.clone().requires_grad_()
    compiled = torch.compile(lambda x, y: loss(x, y, reduction=reduction), backend="aot_eager", fullgraph=True)(
        leaf, both
    )
    torch.testing.assert_close([compiled.a, compiled.b], expected)
    compiled.sum().backward()
    gradient: Any = leaf.grad
    for value, part in ((two.a, gradient.a), (two.b, gradient.b)):
        plain = value.clone().requires_grad_()
        loss(plain, target, reduction=reduction).sum().backward()
        torch.testing.assert_close(part, plain.grad)


@every_loss
def test_torch_dispatch_mode(loss: Loss, device: str) -> None:
    """A mode sees the fused operators, forward and backward, as single operations."""
    seen: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    input, target = make(loss, device)
    leaf = input.clone().requires_grad_()
    with Mode():
        loss(leaf, target).backward()
    assert "bce_ext._bce_loss_and_grad.default" in seen
    assert not any("log_sigmoid" in name or "aten.binary_cross_entropy" in name for name in seen)
    expected = input.clone().requires_grad_()
    loss(expected, target).backward()
    torch.testing.assert_close(leaf.grad, expected.grad)


@every_reduction
@every_loss
def test_inference_mode(loss: Loss, reduction: str, device: str) -> None:
    input, target = make(loss, device)
    expected = loss(input, target, reduction=reduction)
    with torch.inference_mode():
        from_outside = loss(input, target, reduction=reduction)
        from_inside = loss(input.clone(), target.clone(), reduction=reduction)
        assert from_inside.is_inference()
    torch.testing.assert_close(from_outside, expected, rtol=0, atol=0)
    torch.testing.assert_close(from_inside, expected, rtol=0, atol=0)
    # Refused as constants of a graph, as by native.
    leaf = input.clone().requires_grad_()
    with torch.inference_mode():
        constant = target.clone()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        loss(leaf, constant, reduction=reduction)


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
@every_reduction
@every_loss
def test_deterministic_mode(loss: Loss, reduction: str, device: str) -> None:
    input, target = make(loss, device, (100, 200))
    results = []
    for _ in range(3):
        leaf = input.clone().requires_grad_()
        value = loss(leaf, target, reduction=reduction)
        value.sum().backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[1:], results[:1] * 2, rtol=0, atol=0)


@every_reduction
@every_loss
def test_saved_tensor_hooks(loss: Loss, reduction: str, device: str) -> None:
    """What is packed is what is used: save_on_cpu, and hooks of one's own."""
    input, target = make(loss, device)
    expected = input.clone().requires_grad_()
    loss(expected, target, reduction=reduction).sum().backward()
    packed = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    for context in (
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        leaf = input.clone().requires_grad_()
        with context:
            value = loss(leaf, target, reduction=reduction)
        value.sum().backward()
        torch.testing.assert_close(leaf.grad, expected.grad)
    assert packed


@every_reduction
@every_loss
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["nonreentrant", "reentrant"])
def test_activation_checkpointing(loss: Loss, use_reentrant: bool, reduction: str, device: str) -> None:
    target = make(loss, device)[1]
    gradients = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        layer = torch.nn.Linear(6, 6, device=device)
        input = torch.randn(4, 6, device=device, requires_grad=True)

        def block(input: Tensor, layer: torch.nn.Linear = layer) -> Tensor:
            return loss(layer(input).sigmoid(), target, reduction=reduction)

        wrap(block, input).sum().backward()
        gradients.append((input.grad, layer.weight.grad))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch_save", "state_dict"])
def test_copies_of_modules(how: str, device: str) -> None:
    for original in (
        bce_ext.BCEWithLogitsLoss(weight=torch.rand(6), pos_weight=torch.rand(6), reduction="sum").to(device),
        bce_ext.BCELoss(weight=torch.rand(6), reduction="none").to(device),
    ):
        input, target = torch.rand(4, 6, device=device), torch.rand(4, 6, device=device)
        if how == "deepcopy":
            clone = copy.deepcopy(original)
        elif how == "pickle":
            clone = pickle.loads(pickle.dumps(original))
        elif how == "torch_save":
            buffer = io.BytesIO()
            torch.save(original, buffer)
            buffer.seek(0)
            clone = torch.load(buffer, weights_only=False)
        else:
            native: Any = getattr(torch.nn, type(original).__name__)(*(torch.ones(6),), reduction=original.reduction)
            if isinstance(original, bce_ext.BCEWithLogitsLoss):
                native = torch.nn.BCEWithLogitsLoss(torch.ones(6), reduction="sum", pos_weight=torch.ones(6))
            native.load_state_dict(original.state_dict())
            clone = native.to(device)
        assert repr(clone) == repr(original)
        torch.testing.assert_close(clone(input, target), original(input, target))


def lazily_negated(tensor: Tensor) -> Tensor:
    """A view with the negative bit: the imaginary part of a conjugate."""
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg()
    return view


@every_reduction
@every_loss
def test_negative_and_conjugate_views(loss: Loss, reduction: str, device: str) -> None:
    input, target = make(loss, device)
    weight = torch.rand(4, 6, device=device)
    expected_leaf = input.clone().requires_grad_()
    expected = loss(expected_leaf, target, weight, reduction=reduction)
    expected.sum().backward()
    leaf = input.clone().requires_grad_()
    actual = loss(lazily_negated(leaf), lazily_negated(target), lazily_negated(weight), reduction=reduction)
    actual.sum().backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(leaf.grad, expected_leaf.grad)
    # A gradient that arrives as such a view.
    (gradient,) = torch.autograd.grad(
        loss(leaf, target, weight, reduction=reduction), leaf, lazily_negated(torch.full_like(expected, 0.5))
    )
    torch.testing.assert_close(gradient, 0.5 * expected_leaf.grad)
    # Real parts are views with a stride of 2.
    complex_input = torch.complex(input, torch.zeros_like(input)).conj()
    torch.testing.assert_close(loss(complex_input.real, target, weight, reduction=reduction), expected.detach())


@every_reduction
@every_loss
def test_expanded_inputs(loss: Loss, reduction: str, device: str) -> None:
    input, target = make(loss, device, (1, 6))
    for sizes in ((4, 6), (3, 4, 6)):
        leaf, expected_leaf = input.clone().requires_grad_(), input.clone().requires_grad_()
        actual = loss(leaf.expand(sizes), target.expand(sizes), reduction=reduction)
        expected = loss(
            expected_leaf.expand(sizes).contiguous(), target.expand(sizes).contiguous(), reduction=reduction
        )
        torch.testing.assert_close(actual, expected)
        actual.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(leaf.grad, expected_leaf.grad)


@pytest.mark.parametrize("loss", [functional, probabilities_functional], ids=lambda f: f.__name__)
def test_more_than_two_to_the_31_elements(loss: Loss, device: str) -> None:
    """pytorch#190139: indices need 64 bits. The tensors are expanded, so that they take no memory."""
    rows, classes = 2**20 + 1, 2**11 + 1
    input, target = make(loss, device, (classes,))
    with torch.no_grad():
        actual = loss(input.expand(rows, classes), target.expand(rows, classes), reduction="mean")
        expected = loss(input.double(), target.double(), reduction="mean")
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.skipif(not hasattr(torch, "bfloat16"), reason="bfloat16 keeps it small")
def test_a_gradient_of_more_than_two_to_the_31_elements(device: str) -> None:
    """With memory: a gradient of 4 GiB. The last elements are the ones that a 32-bit index would miss."""
    pages = _available_memory(device)
    if pages < 10 * 2**30:
        pytest.skip(f"needs 10 GiB of memory, and {pages / 2**30:.0f} GiB are available")
    numel = 2**31 + 64
    target = torch.zeros(1, dtype=torch.bool, device=device).expand(numel)
    input = torch.zeros(1, dtype=torch.bfloat16, device=device).expand(numel).requires_grad_()
    loss = functional(input, target, reduction="sum")
    assert loss.item() == pytest.approx(numel * 0.6931471805599453, rel=2**-8)
    (gradient,) = torch.autograd.grad(loss, input)
    assert gradient[-1] == 0.5
    assert gradient[2**31 - 1 : 2**31 + 1].tolist() == [0.5, 0.5]


def _available_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as file:
        return 1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1])


def test_no_warnings_in_plain_use(device: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loss in PYTHON_LOSSES:
            input, target = make(loss, device)
            loss(input.requires_grad_(), target).backward()


def test_native_and_ours_agree_on_parameter_subclasses(device: str) -> None:
    """nn.Parameter as logits, as in matrix factorisation without a model around it."""
    logits = torch.nn.Parameter(torch.randn(4, 6, device=device))
    target = torch.rand(4, 6, device=device)
    expected = torch.autograd.grad(F.binary_cross_entropy_with_logits(logits, target), logits)
    torch.testing.assert_close(torch.autograd.grad(functional(logits, target), logits), expected)
