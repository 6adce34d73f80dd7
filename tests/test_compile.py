"""Compilers and tracers: torch.compile, compiled autograd, export, AOTInductor, make_fx, torch.jit.trace, meta and fake tensors."""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import reference
import torch
from callables import (
    Loss,
    every_loss,
    every_reduction,
    functional,
    make_input,
    probabilities_functional,
    takes_logits,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import bce_ext
import bce_ext.functional as F

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def _from_the_start() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_batch(
    loss: Loss, rows: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    shape = (rows, 6)
    weights = {"weight": reference.make_weights((rows, 1), dtype, device)}
    if takes_logits(loss):
        weights["pos_weight"] = reference.make_weights((6,), dtype, device)
    return make_input(loss, shape, dtype, device), reference.make_targets(shape, dtype, device), weights


def gradient(function: Callable[..., Tensor], input: Tensor, *rest: object, **weights: Tensor) -> tuple[Tensor, Tensor]:
    leaf = input.detach().clone().requires_grad_()
    output = function(leaf, *rest, **weights)
    output.sum().backward()
    assert leaf.grad is not None
    return output.detach(), leaf.grad


@every_reduction
@every_loss
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_fullgraph_gives_the_same_bits(loss: Loss, dynamic: bool, reduction: str, device: str) -> None:
    """With and without autograd. aot_eager runs everything of torch.compile but the code generation."""
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    input, target, weights = make_batch(loss, 5, device)
    torch.testing.assert_close(
        compiled(input, target, **weights, reduction=reduction),
        loss(input, target, **weights, reduction=reduction),
        rtol=0,
        atol=0,
    )
    torch.testing.assert_close(
        gradient(compiled, input, target, **weights, reduction=reduction),
        gradient(loss, input, target, **weights, reduction=reduction),
        rtol=0,
        atol=0,
    )
    assert not counters["graph_break"]


@every_loss
def test_no_recompiles_over_changing_batch_sizes(loss: Loss, device: str) -> None:
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    gradient(compiled, *make_batch(loss, 5, device)[:2])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (2, 7, 64, 1000):
            input, target, _ = make_batch(loss, rows, device)
            torch.testing.assert_close(gradient(compiled, input, target), gradient(loss, input, target), rtol=0, atol=0)


@every_loss
def test_sizes_become_dynamic_by_themselves_once(loss: Loss, device: str) -> None:
    """The default of torch.compile: static first, dynamic from the second size on."""
    counter = CompileCounter()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for rows in (5, 6, 7, 8, 9):
        compiled(*make_batch(loss, rows, device)[:2])
    assert counter.frame_count == 2


@needs_compiler
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_inductor_trains_a_model(dynamic: bool, device: str) -> None:
    """The code generator too: a layer, both losses one after the other, several steps."""

    def train(wrap: Callable[..., Callable[..., Tensor]]) -> list[Tensor]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(6, 6, device=device)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        with_logits, probabilities = bce_ext.BCEWithLogitsLoss(), bce_ext.BCELoss(reduction="sum")

        def objective(input: Tensor, target: Tensor) -> Tensor:
            logits = layer(input)
            return with_logits(logits, target) + 0.1 * probabilities(logits.sigmoid(), target)

        step = wrap(objective)
        losses = []
        for rows in (5, 5, 8):
            input, target, _ = make_batch(functional, rows, device)
            loss = step(input, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    compiled = train(lambda f: torch.compile(f, fullgraph=True, dynamic=dynamic))
    torch.testing.assert_close(compiled, train(lambda f: f), rtol=1e-5, atol=1e-6)
    assert not counters["graph_break"]


@every_reduction
@every_loss
def test_compiled_autograd(loss: Loss, reduction: str, device: str) -> None:
    input, target, weights = make_batch(loss, 5, device)
    expected = gradient(loss, input, target, **weights, reduction=reduction)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend, fullgraph=True)):
        actual = gradient(loss, input, target, **weights, reduction=reduction)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    assert graphs  # the backward pass was captured as a whole
    assert counters["compiled_autograd"]["captures"] == 1


@every_reduction
@every_loss
def test_compiled_autograd_scales_no_gradient_of_another(loss: Loss, reduction: str, device: str) -> None:
    """The same backward pass more than once, and by turns with eager mode."""
    input, target, weights = make_batch(loss, 5, device)
    for compiled in ((True, True, True), (False, True, False), (True, False, True)):
        leaf = input.clone().requires_grad_()
        value = loss(leaf, target, **weights, reduction=reduction).sum()
        gradients = []
        for is_compiled in compiled:
            compiler = torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager"))
            with compiler if is_compiled else nullcontext():
                (gradient_of_it,) = torch.autograd.grad(value, leaf, torch.full_like(value, 2), retain_graph=True)
            gradients.append(gradient_of_it)
        (expected,) = torch.autograd.grad(2 * loss(leaf, target, **weights, reduction=reduction).sum(), leaf)
        for actual in gradients:
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@every_loss
def test_compile_of_func_grad(loss: Loss, device: str) -> None:
    input, target, weights = make_batch(loss, 5, device, torch.float64)
    gradient_of = torch.func.grad(lambda x, y: loss(x, y, **weights))
    compiled = torch.compile(gradient_of, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input, target), gradient_of(input, target))


CALLS_OF_THE_FUNCTION: dict[str, Callable[..., Tensor]] = {
    "defaults": lambda x, y, w, p: bce_ext.BCEWithLogitsFunction.apply(x, y),
    "positional": lambda x, y, w, p: bce_ext.BCEWithLogitsFunction.apply(x, y, w, p, 0),
    "some_keywords": lambda x, y, w, p: bce_ext.BCEWithLogitsFunction.apply(x, y, pos_weight=p, reduction=2),
    "keywords": lambda x, y, w, p: bce_ext.BCEWithLogitsFunction.apply(target=y, input=x, weight=w),
    "aliased": lambda x, y, w, p, apply=bce_ext.BCEWithLogitsFunction.apply: apply(x, y, weight=w),
}


@pytest.mark.parametrize("weights_require_grad", [False, True], ids=["constant_weights", "weights_require_grad"])
@pytest.mark.parametrize("call", CALLS_OF_THE_FUNCTION)
def test_the_autograd_function(call: str, weights_require_grad: bool, device: str) -> None:
    """All the ways to pass arguments, in one graph; the gradients are those of the functional."""
    input, target, weights = make_batch(functional, 5, device, torch.float64)
    tensors = [input.requires_grad_(), target.requires_grad_()]
    tensors += [weight.requires_grad_(weights_require_grad) for weight in weights.values()]
    function = CALLS_OF_THE_FUNCTION[call]
    results = []
    for each in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        loss = each(*tensors)
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        results.append((loss, torch.autograd.grad(loss.square().sum(), wanted, materialize_grads=True)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("place", ["weight", "pos_weight", "probabilities"])
@pytest.mark.parametrize("how", ["eager", "compile", "trace"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_numbers_as_weights(how: str, place: str, device: str) -> None:
    """They are on the CPU, whatever the default device is, and so go with any device."""
    loss = bce_ext.functional.binary_cross_entropy_with_logits
    if place == "probabilities":
        loss, place = bce_ext.functional.binary_cross_entropy, "weight"
    input, target, _ = make_batch(probabilities_functional, 5, device)

    def subject(input: Tensor, target: Tensor) -> Tensor:
        return loss(input, target, **{place: 2.5}, reduction="sum")

    expected = gradient(loss, input, target, **{place: torch.tensor(2.5)}, reduction="sum")
    with torch.device("meta"):
        match how:
            case "compile":
                subject = torch.compile(subject, fullgraph=True, backend="aot_eager")
            case "trace":
                subject = torch.jit.trace(subject, (input, target))
        actual = gradient(subject, input, target)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


class Model(torch.nn.Module):
    """Logits in, three losses out."""

    def __init__(self) -> None:
        super().__init__()
        self.with_logits = bce_ext.BCEWithLogitsLoss(pos_weight=torch.arange(1.0, 7.0))
        self.probabilities = bce_ext.BCELoss(reduction="none")

    def forward(self, input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return (
            self.with_logits(input, target),
            self.probabilities(input.sigmoid(), target),
            torch.ops.bce_ext.binary_cross_entropy_with_logits(input, target, None, None, 2),
        )


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_export(strict: bool, device: str) -> None:
    model = Model().to(device)
    batch = torch.export.Dim("batch", min=2, max=4096)
    input, target, _ = make_batch(functional, 5, device)
    shapes = {"input": {0: batch}, "target": {0: batch}}
    for requires_grad in (False, True):
        example = input.clone().requires_grad_(requires_grad)
        program = torch.export.export(model, (example, target), dynamic_shapes=shapes, strict=strict)
        for lowered in (program, program.run_decompositions({})):
            for rows in (2, 5, 900):
                x, y, _ = make_batch(functional, rows, device)
                torch.testing.assert_close(lowered.module()(x, y), model(x, y), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_programs_hold_public_operators(strict: bool) -> None:
    """Whose schemas stay: a program may be saved, and read with a later version."""
    input, target = torch.rand(5, 3), torch.rand(5, 3)
    for module in (
        bce_ext.BCEWithLogitsLoss(pos_weight=3.0),
        bce_ext.BCELoss(),
        bce_ext.SigmoidFocalLoss(),
        bce_ext.LinearBCEWithLogitsLoss(3, 3),
    ):
        program = torch.export.export(module, (input, target), strict=strict)
        called = [str(node.target) for node in program.graph.nodes if "bce_ext" in str(node.target)]
        assert len(called) == 1
        assert "bce_ext._" not in called[0]


class PerRow(torch.nn.Module):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return bce_ext.BCEWithLogitsLoss()(input, target, input.shape[0])


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_export_of_a_number_that_depends_on_a_size(strict: bool, device: str) -> None:
    batch = torch.export.Dim("batch", min=2, max=4096)
    input, target, _ = make_batch(functional, 5, device)
    shapes = {"input": {0: batch}, "target": {0: batch}}
    program = torch.export.export(PerRow(), (input, target), dynamic_shapes=shapes, strict=strict)
    for rows in (2, 900):
        x, y, _ = make_batch(functional, rows, device)
        torch.testing.assert_close(program.module()(x, y), PerRow()(x, y), rtol=1e-6, atol=1e-7)


@needs_compiler
@pytest.mark.xfail(
    torch.__version__.startswith("2.11."),
    reason="seen with torch 2.11: the loaded model returns float64",
)
def test_aot_inductor(device: str, tmp_path: Path) -> None:
    if device == "cuda" and torch.__version__.startswith("2.11."):
        pytest.xfail("seen with torch 2.11: loading the model on CUDA ends the process")
    model = Model().to(device)
    batch = torch.export.Dim("batch", min=2, max=4096)
    input, target, _ = make_batch(functional, 5, device)
    program = torch.export.export(model, (input, target), dynamic_shapes={"input": {0: batch}, "target": {0: batch}})
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for rows in (2, 5, 900):
        x, y, _ = make_batch(functional, rows, device)
        torch.testing.assert_close(tuple(loaded(x, y)), model(x, y), rtol=1e-5, atol=1e-6)


@every_reduction
@every_loss
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(loss: Loss, tracing_mode: str, reduction: str, device: str) -> None:
    input, target, weights = make_batch(loss, 5, device)

    def with_gradient(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return gradient(loss, input, target, **weights, reduction=reduction)

    traced = make_fx(with_gradient, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(input, target)
    other, other_target = (input * 0.9).contiguous(), 1 - target
    torch.testing.assert_close(traced(other, other_target), with_gradient(other, other_target), rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@every_reduction
@every_loss
def test_jit_trace(loss: Loss, reduction: str, device: str) -> None:
    input, target, weights = make_batch(loss, 5, device)
    traced = torch.jit.trace(lambda x, y: loss(x, y, **weights, reduction=reduction), (input, target))
    other, other_target = (input * 0.9).contiguous(), 1 - target
    expected = gradient(loss, other, other_target, **weights, reduction=reduction)
    torch.testing.assert_close(gradient(traced, other, other_target), expected, rtol=0, atol=0)


@every_reduction
@every_loss
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_memory(loss: Loss, kind: str, reduction: str) -> None:
    """Shapes, strides and dtypes are those of real tensors, of the gradients too."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for dtype in (torch.float32, torch.bfloat16):
            real = reference.make_probabilities((2, 3, 4, 5), dtype, "cpu").contiguous(memory_format=memory_format)
            target = reference.make_targets((2, 3, 4, 5), torch.float32, "cpu")
            expected = gradient(loss, real, target, reduction=reduction)
            if kind == "meta":
                actual = gradient(loss, real.to("meta"), target.to("meta"), reduction=reduction)
            else:
                with FakeTensorMode() as mode:
                    actual = gradient(loss, mode.from_tensor(real), mode.from_tensor(target), reduction=reduction)
            for one, other in zip(actual, expected, strict=True):
                assert one.shape == other.shape
                assert one.dtype == other.dtype
                assert one.stride() == other.stride()
                assert one.device.type == ("meta" if kind == "meta" else "cpu")


BAD_CALLS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "target_size": lambda x: (x, x[:, :-1]),
    "target_dimension": lambda x: (x[:, :1], x[:, 0]),
    "weight_size": lambda x: (x, x, x[:, :-1]),
    "integer_input": lambda x: (x.long(), x),
    "complex_target": lambda x: (x, x.to(torch.complex64)),
}


@pytest.mark.parametrize("bad_call", BAD_CALLS)
@every_loss
def test_eager_and_compiled_validate_alike(loss: Loss, bad_call: str, device: str) -> None:
    """pytorch#193757: a mistake is a mistake in both worlds, and says the same."""
    arguments = BAD_CALLS[bad_call](torch.rand(4, 6, device=device))
    with pytest.raises((ValueError, RuntimeError)) as eager:
        loss(*arguments)
    with pytest.raises(Exception) as compiled:  # noqa: PT011 -- Dynamo wraps it in an exception of its own
        torch.compile(loss, backend="eager", fullgraph=True)(*arguments)
    assert str(eager.value).splitlines()[0] in str(compiled.value)


@pytest.mark.parametrize(
    "deprecated", [{"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": True}], ids=str
)
def test_deprecated_reductions_in_one_graph(deprecated: dict[str, bool]) -> None:
    input, target = torch.linspace(0.1, 0.9, 6), torch.linspace(0, 1, 6)
    for function in (F.binary_cross_entropy_with_logits, F.binary_cross_entropy):
        compiled = torch.compile(functools.partial(function, **deprecated), backend="eager", fullgraph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(compiled(input, target), function(input, target, **deprecated))
