"""The linear layer and its loss under everything that PyTorch composes functions with: never less than the two calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from linear_cases import KINDS, make_case, plain
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import bce_ext
import bce_ext.functional as F

OPS = torch.ops.bce_ext
SMALL, BLOCKS = (3, 2, 4), (257, 2, 16411)  # the second takes blocks

pytestmark = [pytest.mark.filterwarnings("ignore:Sparse"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def loss_of(target: Tensor, **keywords: Any) -> Callable[..., Tensor]:
    return lambda input, linear_weight, linear_bias=None: F.linear_binary_cross_entropy_with_logits(
        input, linear_weight, target, linear_bias=linear_bias, **keywords
    )


def plain_of(dense: Tensor, **keywords: Any) -> Callable[..., Tensor]:
    return lambda *leaves: plain(list(leaves), dense, **keywords)


def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: (function(*tensors) ** 2).sum()


def same(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_in_all_modes(kind: str, reduction: str, device: str) -> None:
    case = make_case(*SMALL, kind, device=device)
    function = loss_of(case.target, reduction=reduction)
    assert gradcheck(
        function, case.leaves(), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(function, case.leaves(), check_fwd_over_rev=True, check_batched_grad=True)


def test_gradcheck_of_target_and_weights(device: str) -> None:
    case = make_case(*SMALL, device=device)
    weights = [(torch.rand(shape, dtype=torch.float64, device=device) + 0.5).requires_grad_() for shape in ((3, 1), 4)]
    target = torch.rand(3, 4, dtype=torch.float64, device=device).requires_grad_()

    def function(target: Tensor, weight: Tensor, pos_weight: Tensor, *leaves: Tensor) -> Tensor:
        input, linear_weight, linear_bias = leaves
        return F.linear_binary_cross_entropy_with_logits(
            input, linear_weight, target, linear_bias=linear_bias, weight=weight, pos_weight=pos_weight
        )

    assert gradcheck(function, (target, *weights, *case.leaves()), check_forward_ad=True)
    assert gradgradcheck(function, (target, *weights, *case.leaves()))


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo], ids=str)
def test_derivative_of_sparse_values(layout: torch.layout, device: str) -> None:
    case = make_case(*SMALL, device=device)
    values = torch.tensor([0.25, 1.0, 0.5], dtype=torch.float64, device=device).requires_grad_()
    columns = torch.tensor([1, 0, 3], device=device)

    def function(values: Tensor) -> Tensor:
        if layout == torch.sparse_csr:
            crow = torch.tensor([0, 1, 1, 3], device=device)
            target = torch.sparse_csr_tensor(crow, columns, values, (3, 4))
        else:
            rows = torch.tensor([0, 2, 2], device=device)
            target = torch.sparse_coo_tensor(torch.stack([rows, columns]), values, (3, 4))
        return F.linear_binary_cross_entropy_with_logits(case.input, case.linear_weight, target)

    def dense(values: Tensor) -> Tensor:
        rows = torch.tensor([0, 2, 2], device=device)
        target = torch.zeros(3, 4, dtype=torch.float64, device=device).index_put((rows, columns), values)
        return F.binary_cross_entropy_with_logits(case.input @ case.linear_weight.T, target)

    (actual,) = torch.autograd.grad(function(values), values)
    (expected,) = torch.autograd.grad(dense(values), values)
    same(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [SMALL, BLOCKS], ids=["small", "blocks"])
def test_double_backward(shape: tuple[int, int, int], kind: str, device: str) -> None:
    case = make_case(*shape, kind, device=device)
    results = []
    for function in (loss_of(case.target), plain_of(case.dense)):
        leaves = case.leaves()
        first = torch.autograd.grad(scalar(function)(*leaves), leaves, create_graph=True)
        assert all(gradient.requires_grad for gradient in first)
        results.append(torch.autograd.grad(sum((gradient**2).sum() for gradient in first), leaves))  # type: ignore[arg-type]
    same(*results)


@pytest.mark.parametrize("kind", ["dense", "coo", "class indices"])
@pytest.mark.parametrize("shape", [SMALL, BLOCKS], ids=["small", "blocks"])
def test_transforms(shape: tuple[int, int, int], kind: str, device: str) -> None:
    case = make_case(*shape, kind, device=device)
    leaves = tuple(leaf.detach() for leaf in case.leaves())
    ours, expected = loss_of(case.target), plain_of(case.dense)
    everything = (0, 1, 2)
    same(torch.func.grad(scalar(ours), everything)(*leaves), torch.func.grad(scalar(expected), everything)(*leaves))
    tangents = tuple(torch.randn_like(leaf) for leaf in leaves)
    same(torch.func.jvp(ours, leaves, tangents), torch.func.jvp(expected, leaves, tangents))
    with fwAD.dual_level():
        output = fwAD.unpack_dual(ours(*map(fwAD.make_dual, leaves, tangents)))
    same(output.tangent, torch.func.jvp(expected, leaves, tangents)[1])
    stacked = torch.stack([leaves[0], leaves[0] + 1])
    same(torch.vmap(ours, (0, None, None))(stacked, *leaves[1:]), torch.stack([expected(x, *leaves[1:]) for x in stacked]))  # fmt: skip
    if shape == SMALL:
        same(torch.func.hessian(ours, everything)(*leaves), torch.func.hessian(expected, everything)(*leaves))


def test_gradient_of_each_example(device: str) -> None:
    case = make_case(5, 3, 4, "class indices", device=device)
    dense = case.dense.double()

    def ours(input: Tensor, target: Tensor) -> Tensor:
        return F.linear_binary_cross_entropy_with_logits(input, case.linear_weight, target)

    def expected(input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(input @ case.linear_weight.T, target)

    want = torch.vmap(torch.func.grad(expected))(case.input, dense)
    same(torch.vmap(torch.func.grad(ours))(case.input, dense), want)
    same(torch.vmap(torch.func.grad(ours))(case.input, case.target), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_retained_graph_and_batched_gradients(dtype: torch.dtype, device: str) -> None:
    case = make_case(*BLOCKS, "csr", dtype, device=device)
    leaves = case.leaves()
    loss = loss_of(case.target)(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    factor = torch.tensor(3.0, dtype=dtype, device=device)
    second = torch.autograd.grad(loss, leaves, factor, retain_graph=True)
    third = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    tolerance = {"rtol": 1e-12, "atol": 0} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-6}
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(3 * a, b, **tolerance)
    batched = torch.autograd.grad(
        loss, leaves, torch.tensor([1.0, 3.0], dtype=dtype, device=device), is_grads_batched=True
    )
    loose = tolerance if dtype == torch.float64 else {"rtol": 2e-2, "atol": 1e-4}
    for a, b in zip(batched, zip(first, second, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b), **loose)


def test_checkpointing_and_saved_tensor_hooks(device: str) -> None:
    case = make_case(*BLOCKS, "csr", device=device)
    expected = case.leaves()
    loss_of(case.target)(*expected).backward()

    leaves = case.leaves()
    checkpoint(loss_of(case.target), *leaves, use_reentrant=False).backward()
    same([leaf.grad for leaf in leaves], [leaf.grad for leaf in expected])

    leaves = case.leaves()
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(case.target)(*leaves)
    torch.autograd.grad(loss, leaves, retain_graph=True)
    same(torch.autograd.grad(loss, leaves), tuple(leaf.grad for leaf in expected))  # computed anew, from what was saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SMALL, BLOCKS], ids=["small", "blocks"])
def test_autocast(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    """Parameters in float32, and an input of any dtype: what a layer before has computed is in half precision."""
    case = make_case(*shape, "csr", torch.float32, device=device)
    case.input = case.input.to(dtype)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        leaves, others = case.leaves(), case.leaves()
        loss = loss_of(case.target)(*leaves)
        expected = F.binary_cross_entropy_with_logits(torch.nn.functional.linear(*others), case.dense)
        logits = torch.nn.functional.linear(*others)
    assert loss.dtype == expected.dtype == torch.float32
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for leaf, got, want in zip(
        leaves, torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, others), strict=True
    ):
        assert got.dtype == leaf.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=float(want.abs().max()) * 1e-2)


def test_a_gradient_scaler_meets_no_underflow(device: str) -> None:
    """float16 gradients of a mean over four million elements are below its smallest number without the scale."""
    case = make_case(*BLOCKS, "class indices", torch.float16, device=device)
    leaves, exact = case.leaves(), case.leaves(torch.float64)
    scale = 2.0**15
    (loss_of(case.target)(*leaves) * scale).backward()
    (plain(exact, case.dense) * scale).backward()
    for leaf, want in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        assert want.grad is not None
        torch.testing.assert_close(leaf.grad.double(), want.grad, rtol=0, atol=1e-3 * float(want.grad.abs().max()))


class Model(torch.nn.Module):
    def __init__(self, rows: int, features: int, labels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loss = bce_ext.LinearBCEWithLogitsLoss(features, labels, dtype=torch.float64)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.loss(input * 2, target)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", ["dense", "class indices"])
@pytest.mark.parametrize("shape", [SMALL, BLOCKS], ids=["small", "blocks"])
def test_compile_without_graph_breaks(shape: tuple[int, int, int], kind: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    model = Model(*shape)
    # inductor's compiler takes long: once, where the blocks must survive it.
    backend = "inductor" if shape == BLOCKS and not dynamic else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    for more in range(2):
        case = make_case(shape[0] + more, *shape[1:], kind)
        results = []
        for function in (compiled, model):
            model.zero_grad()
            input = case.input.clone().requires_grad_()
            loss = function(input, case.target)
            loss.backward()
            results.append([loss.detach(), input.grad, *(p.grad for p in model.parameters())])
        same(*results)


def test_compiled_code_keeps_the_blocks() -> None:
    from torch._dynamo.testing import AotEagerAndRecordGraphs

    torch._dynamo.reset()
    recorder = AotEagerAndRecordGraphs()
    case = make_case(*BLOCKS, "class indices")
    leaves = case.leaves()
    torch.compile(loss_of(case.target), backend=recorder, fullgraph=True)(*leaves).backward()
    called = [node.target for node in recorder.fw_graphs[0].graph.nodes if node.op == "call_function"]
    assert OPS._linear_bce_loss_and_grads.default in called
    assert not any("mm" in str(target) for target in called)


@pytest.mark.parametrize("shape", [SMALL, BLOCKS], ids=["small", "blocks"])
def test_products_are_counted(shape: tuple[int, int, int]) -> None:
    """By FlopCounterMode, as those of F.linear, forward and backward."""
    case = make_case(*shape, "class indices")
    counts = []
    for loss in (lambda *leaves: plain(list(leaves), case.dense), loss_of(case.target)):
        for wanted in (0, 1, 2):
            leaves = [leaf.requires_grad_(i < wanted) for i, leaf in enumerate(case.leaves())]
            with FlopCounterMode(display=False) as counter:
                value = loss(*leaves)
                if wanted:
                    value.backward()
            counts.append(counter.get_total_flops())
    assert counts[:3] == counts[3:]
    assert counts[2] == 6 * math.prod(shape)


@pytest.mark.parametrize("kind", ["dense", "class indices"])
@pytest.mark.parametrize("shape", [SMALL, BLOCKS], ids=["small", "blocks"])
def test_compiled_autograd(shape: tuple[int, int, int], kind: str) -> None:
    """With a factor, more than once, and by turns with eager mode: nobody may scale what another one gets."""
    case = make_case(*shape, kind)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    results = []
    for compiled in ((False, False, False), (True, True, True), (True, False, True)):
        leaves = case.leaves()
        loss = loss_of(case.target)(*leaves)
        for is_compiled in compiled:
            compiler = torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend))
            with compiler if is_compiled else nullcontext():
                results.append(torch.autograd.grad(loss, leaves, torch.tensor(2.0).double(), retain_graph=True))
    assert graphs
    for actual in results[1:]:
        same(actual, results[0])


@pytest.mark.parametrize("shape", [SMALL, BLOCKS], ids=["small", "blocks"])
def test_class_indices_that_are_too_large_raise_wherever_they_are(shape: tuple[int, int, int]) -> None:
    case = make_case(*shape, "class indices")
    target = case.target.clone()
    target[1] = shape[2]

    def compiled(target: Tensor) -> Tensor:
        return torch.compile(loss_of(target), fullgraph=True, backend="aot_eager")(case.input, case.linear_weight)

    text = r"out of bounds|below the number of labels|inside of the logits"
    for call in (
        lambda target: loss_of(target)(case.input, case.linear_weight),
        compiled,
        lambda target: torch.func.grad(loss_of(target))(case.input, case.linear_weight),
        lambda target: torch.func.grad(lambda x, y: loss_of(y)(x, case.linear_weight))(case.input, target),
        lambda target: torch.vmap(lambda x, y: loss_of(y)(x, case.linear_weight))(case.input[:, None], target[:, None]),
    ):
        call(case.target)
        with pytest.raises((IndexError, RuntimeError), match=text):
            call(target)


@pytest.mark.parametrize("shape", [SMALL, BLOCKS], ids=["small", "blocks"])
def test_export(shape: tuple[int, int, int]) -> None:
    model = Model(*shape)
    case = make_case(*shape, "class indices")
    exported = torch.export.export(model, (case.input, case.target))
    same(exported.module()(case.input, case.target), model(case.input, case.target))


def test_scripted(device: str) -> None:
    @torch.jit.script
    def function(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
        return torch.ops.bce_ext.linear_binary_cross_entropy_with_logits(  # type: ignore[no-any-return]
            input, linear_weight, target, reduction=2, ignore_index=-1
        )

    case = make_case(*BLOCKS, bias=False, device=device)
    same(function(*case.leaves(), case.target), plain(case.leaves(), case.dense, reduction="sum"))


@pytest.mark.parametrize("kind", ["dense", "class indices"])
@pytest.mark.parametrize("shape", [SMALL, BLOCKS], ids=["small", "blocks"])
def test_traced(shape: tuple[int, int, int], kind: str, device: str) -> None:
    case, other = (make_case(*shape, kind, device=device, seed=seed) for seed in (0, 1))
    traced = torch.jit.trace(F.linear_binary_cross_entropy_with_logits, (case.input, case.linear_weight, case.target))
    expected = F.linear_binary_cross_entropy_with_logits(other.input, other.linear_weight, other.target)
    same(traced(other.input, other.linear_weight, other.target), expected)


class Called(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_small_problem_is_the_two_calls(reduction: str, device: str) -> None:
    case = make_case(*SMALL, device=device)
    with Called() as ours:
        loss_of(case.target, reduction=reduction)(*case.leaves()).sum().backward()
    with Called() as theirs:
        logits = torch.nn.functional.linear(*case.leaves())
        F.binary_cross_entropy_with_logits(logits, case.target, reduction=reduction).sum().backward()
    assert ours.names == theirs.names


def test_deterministic_mode(device: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        case = make_case(*BLOCKS, "coo", device=device)
        leaves = case.leaves()
        loss_of(case.target)(*leaves).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    same(loss_of(case.target)(*case.leaves()), plain(case.leaves(), case.dense))


def opcheck(op: Any, *args: Any, **kwargs: Any) -> None:
    assert set(torch.library.opcheck(op, args, kwargs).values()) == {"SUCCESS"}


@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("kind", ["dense", "bool", "class indices"])
def test_opcheck_of_the_public_operator(kind: str, reduction: int, device: str) -> None:
    case = make_case(*SMALL, kind, torch.float32, device=device)
    input, linear_weight, linear_bias = case.leaves()
    opcheck(
        OPS.linear_binary_cross_entropy_with_logits.default,
        input, linear_weight, case.target, linear_bias=linear_bias, reduction=reduction, label_smoothing=0.1,
    )  # fmt: skip


def internal_arguments(kind: str, device: str, shape: tuple[int, int, int], requires_grad: bool) -> tuple[Any, ...]:
    case = make_case(*shape, kind, torch.float32, device=device)
    leaves = [leaf.requires_grad_(requires_grad) for leaf in case.leaves()]
    target, indices = case.target, None
    if kind == "coo":
        target, indices = case.target._values(), case.target._indices()
    weights = [torch.rand(shape[2], device=device), torch.rand(shape[0], 1, device=device)]
    return (*leaves, target, indices, *weights, torch.tensor(5.0, device=device), [0.1, 0.5])


@pytest.mark.parametrize("kind", ["dense", "coo", "class indices"])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("mask", [[True, True, True], [False, True, False], [False, False, False]], ids=str)
def test_opcheck_of_the_blocks(mask: list[bool], requires_grad: bool, kind: str, device: str) -> None:
    args = internal_arguments(kind, device, SMALL, requires_grad)
    grad_output = torch.tensor(2.0, device=device) if mask[0] else None
    opcheck(OPS._linear_bce_loss_and_grads.default, *args, 7, torch.float32, grad_output, mask)


@pytest.mark.parametrize("kind", ["dense", "coo", "class indices"])
@pytest.mark.parametrize("shape", [SMALL, BLOCKS], ids=["small", "blocks"])
def test_opcheck_of_the_loss(shape: tuple[int, int, int], kind: str, device: str) -> None:
    opcheck(OPS._linear_bce.default, *internal_arguments(kind, device, shape, True), 1, torch.float32)
