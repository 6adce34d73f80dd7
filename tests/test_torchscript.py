"""Scripted code that calls the operators is saved, and runs forward and backward in a process that knows the operator library only."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from callables import EVERY_FORMULA, Member
from reference import REDUCTION_NUMBER, REDUCTIONS
from torch import Tensor, nn

import bce_ext
import bce_ext.functional
from bce_ext.functional import binary_cross_entropy, binary_cross_entropy_with_logits

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")

LIBRARY = Path(bce_ext.__file__).with_name("libbce_ext.so")

# Loads a scripted program and its input, runs forward and backward twice each (TorchScript optimises after it has seen
# a call), saves the results.
LOAD_AND_RUN = """
import sys
import torch

torch.ops.load_library(sys.argv[1])
program = torch.jit.load(sys.argv[2])
arguments = torch.load(sys.argv[3])
for _ in range(3):
    input = arguments[0].detach().requires_grad_()
    loss = program(input, *arguments[1:])
    (gradient,) = torch.autograd.grad(loss, input, torch.ones_like(loss))
assert "bce_ext" not in sys.modules
torch.save((loss.detach(), gradient), sys.argv[4])
"""


class WithLogits(nn.Module):
    """As a user writes it: the operator in the place of the function, a buffer for its weight."""

    def __init__(self, reduction: int) -> None:
        super().__init__()
        self.reduction = reduction
        self.register_buffer("pos_weight", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return torch.ops.bce_ext.binary_cross_entropy_with_logits(  # type: ignore[no-any-return]
            input, target, pos_weight=self.pos_weight, reduction=self.reduction
        )


class Probabilities(nn.Module):
    def __init__(self, reduction: int) -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return torch.ops.bce_ext.binary_cross_entropy(torch.sigmoid(input), target, None, self.reduction)  # type: ignore[no-any-return]


@torch.jit.script
def function_none(input: Tensor, target: Tensor) -> Tensor:
    return torch.ops.bce_ext.binary_cross_entropy_with_logits(input, target, None, None, 0)  # type: ignore[no-any-return]


@torch.jit.script
def function_mean(input: Tensor, target: Tensor) -> Tensor:
    return torch.ops.bce_ext.binary_cross_entropy_with_logits(input, target)  # type: ignore[no-any-return]


@torch.jit.script
def function_sum(input: Tensor, target: Tensor) -> Tensor:
    return torch.ops.bce_ext.binary_cross_entropy_with_logits(input, target, reduction=2)  # type: ignore[no-any-return]


@torch.jit.script
def functional_with_weights(input: Tensor, target: Tensor) -> Tensor:
    weight = torch.ones(3)
    return binary_cross_entropy_with_logits(input, target, weight, reduction="sum", pos_weight=2 * weight)


@torch.jit.script
def functional_probabilities(input: Tensor, target: Tensor) -> Tensor:
    return binary_cross_entropy(torch.sigmoid(input), target, torch.ones(3), reduction="mean")


def programs() -> dict[str, Any]:
    weights = {"weight": torch.tensor([1.0, 0.5, 2.0])}
    all_programs = {
        "function_none": function_none,
        "function_mean": function_mean,
        "function_sum": function_sum,
        "functional_with_weights": functional_with_weights,
        "functional_probabilities": functional_probabilities,
    }
    for reduction in REDUCTIONS:
        number = REDUCTION_NUMBER[reduction]
        all_programs[f"module_that_calls_the_operator_{reduction}"] = WithLogits(number)
        all_programs[f"module_that_calls_the_operator_of_probabilities_{reduction}"] = Probabilities(number)
        all_programs[f"BCEWithLogitsLoss_{reduction}"] = bce_ext.BCEWithLogitsLoss(reduction=reduction)
        all_programs[f"BCEWithLogitsLoss_weights_{reduction}"] = bce_ext.BCEWithLogitsLoss(
            **weights, pos_weight=torch.tensor([3.0, 2.0, 1.0]), reduction=reduction
        )
        all_programs[f"BCELoss_weight_{reduction}"] = WithSigmoid(bce_ext.BCELoss(**weights, reduction=reduction))
    return all_programs


class WithSigmoid(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.loss(torch.sigmoid(input), target)  # type: ignore[no-any-return]


PROGRAMS = programs()
INPUT = torch.linspace(-4, 4, 33).view(11, 3)
TARGET = torch.linspace(0, 1, 33).view(11, 3).flip(0)


def run(program: Any) -> tuple[Tensor, Tensor]:
    input = INPUT.detach().requires_grad_()
    loss = program(input, TARGET)
    (gradient,) = torch.autograd.grad(loss, input, torch.ones_like(loss))
    return loss.detach(), gradient


def scripted(program: Any) -> Any:
    return program if isinstance(program, torch.jit.ScriptFunction) else torch.jit.script(program)


@pytest.mark.parametrize("name", PROGRAMS)
def test_scripted_programs_do_as_eager_ones(name: str) -> None:
    program = PROGRAMS[name]
    script = scripted(program)
    expected = run(program)
    for _ in range(3):
        for actual, value in zip(run(script), expected, strict=True):
            torch.testing.assert_close(actual, value, rtol=0, atol=0)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Tensor]]:
    """What each program computes after it was saved and loaded in a new process: one process for all of them, since it is the start that costs."""
    directory = tmp_path_factory.mktemp("programs")
    torch.save((INPUT, TARGET), directory / "arguments.pt")
    names = directory / "names"
    names.write_text("\n".join(PROGRAMS))
    for name, program in PROGRAMS.items():
        torch.jit.save(scripted(program), str(directory / f"{name}.ts"))
    loop = f"""
import sys
directory = sys.argv[1]
source = {LOAD_AND_RUN!r}
for name in open(directory + "/names").read().split():
    sys.argv = ["", {str(LIBRARY)!r}, f"{{directory}}/{{name}}.ts", directory + "/arguments.pt", f"{{directory}}/{{name}}.out"]
    exec(source, {{"__name__": "program"}})
"""
    result = subprocess.run([sys.executable, "-c", loop, directory], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return {name: torch.load(directory / f"{name}.out") for name in PROGRAMS}


@pytest.mark.parametrize("name", PROGRAMS)
def test_saved_programs_run_without_the_python_package(name: str, results: dict[str, tuple[Tensor, Tensor]]) -> None:
    for actual, expected in zip(results[name], run(PROGRAMS[name]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_the_operator_stays_one_node_of_the_graph() -> None:
    nodes = [node.kind() for node in torch.jit.script(WithLogits(1)).graph.nodes()]
    assert "bce_ext::binary_cross_entropy_with_logits" in nodes


def test_an_optimised_frozen_module() -> None:
    module = torch.jit.freeze(torch.jit.script(WithLogits(1)).eval())
    torch.testing.assert_close(module(INPUT, TARGET), WithLogits(1)(INPUT, TARGET))


class Holder(torch.nn.Module):
    """A model that has its loss inside."""

    def __init__(self, loss: torch.nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.loss(input.sigmoid(), target)  # type: ignore[no-any-return]


@pytest.mark.parametrize("freeze", [torch.jit.freeze, torch.jit.optimize_for_inference], ids=lambda f: f.__name__)
@pytest.mark.parametrize("normalizer", [None, 4.0], ids=["plain", "normalizer"])
@pytest.mark.parametrize("loss", EVERY_FORMULA, ids=lambda loss: loss.name)
def test_a_frozen_model_with_a_loss_inside(
    loss: Member, normalizer: float | None, freeze: Callable[[torch.jit.ScriptModule], torch.jit.ScriptModule]
) -> None:
    module = Holder(loss.make_module(reduction="mean", normalizer=normalizer)).eval()
    frozen = freeze(torch.jit.script(module))
    torch.testing.assert_close(frozen(INPUT, TARGET), module(INPUT, TARGET), rtol=0, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_traced_modules(reduction: str) -> None:
    module = bce_ext.BCEWithLogitsLoss(weight=torch.tensor([1.0, 0.5, 2.0]), reduction=reduction)
    traced = torch.jit.trace(module, (INPUT, TARGET))
    for actual, expected in zip(run(traced), run(module), strict=True):
        torch.testing.assert_close(actual, expected)
    other = torch.ones(5, 3)  # not the size that it was traced with
    torch.testing.assert_close(traced(other, other), module(other, other))


def test_numbers_in_scripted_code() -> None:
    @torch.jit.script
    def loss_of(input: Tensor, target: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(input, target, 2.0, pos_weight=3.0, normalizer=5.0)

    expected = binary_cross_entropy_with_logits(INPUT, TARGET, 2.0, pos_weight=3.0, normalizer=5.0)
    torch.testing.assert_close(loss_of(INPUT, TARGET), expected, rtol=0, atol=0)
    module = bce_ext.BCEWithLogitsLoss(2.0, pos_weight=3.0)
    torch.testing.assert_close(torch.jit.script(module)(INPUT, TARGET, 5.0), expected, rtol=0, atol=0)
