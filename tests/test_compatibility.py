"""docs/compatibility.md: the tests that it names exist, and native does what it says of native."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "compatibility.md"
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(\w+)`", DOCUMENT.read_text())))
ROWS = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ") and not line.startswith("| |")]


@lru_cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("file", "name"), NAMED, ids=lambda part: part)
def test_named_tests_exist(file: str, name: str) -> None:
    assert name in names_in(file)


def test_every_row_names_a_test() -> None:
    assert len(ROWS) >= 40
    for row in ROWS:
        assert "::test_" in row, row


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.uint16], ids=str)
def test_native_refuses_integer_targets(dtype: torch.dtype) -> None:
    for function in (F.binary_cross_entropy_with_logits, F.binary_cross_entropy):
        with pytest.raises(RuntimeError):
            function(torch.rand(4), torch.ones(4).to(dtype))


def test_native_refuses_float8_targets() -> None:
    for function in (F.binary_cross_entropy_with_logits, F.binary_cross_entropy):
        with pytest.raises(RuntimeError):
            function(torch.rand(4), torch.ones(4).to(torch.float8_e5m2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_native_with_mixed_dtypes(dtype: torch.dtype) -> None:
    assert F.binary_cross_entropy_with_logits(torch.rand(4), torch.ones(4, dtype=dtype)).dtype == dtype
    with pytest.raises(RuntimeError, match="expected Float"):
        F.binary_cross_entropy(torch.rand(4), torch.ones(4, dtype=dtype))


def test_native_refuses_numbers_as_weights() -> None:
    input = torch.rand(4)
    with pytest.raises(TypeError):
        F.binary_cross_entropy_with_logits(input, input, pos_weight=3.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        torch.nn.BCEWithLogitsLoss(pos_weight=3.0)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        F.binary_cross_entropy(input, input, 3.0)  # type: ignore[arg-type]


def test_native_refuses_gradients_of_weights() -> None:
    input, weight = torch.rand(4), torch.rand(4, requires_grad=True)
    for weights in ({"weight": weight}, {"pos_weight": weight}):
        with pytest.raises(RuntimeError, match="not differentiable with respect to"):
            F.binary_cross_entropy_with_logits(input, input, **weights)
    with pytest.raises(RuntimeError, match="not differentiable with respect to"):
        F.binary_cross_entropy(input, input, weight)


def test_native_does_not_say_what_to_do_about_sizes() -> None:
    for function in (F.binary_cross_entropy_with_logits, F.binary_cross_entropy):
        with pytest.raises(ValueError, match="size") as error:
            function(torch.rand(7, 1), torch.rand(7))
        assert "squeeze" not in str(error.value)


def test_native_does_not_validate_when_compiled() -> None:
    input, target = torch.tensor([0.5, 1.5]), torch.zeros(2)
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        F.binary_cross_entropy(input, target)
    torch._dynamo.reset()
    assert torch.compile(F.binary_cross_entropy, fullgraph=True)(input, target).isnan()


def test_native_has_nan_for_infinite_logits() -> None:
    input, target = torch.tensor([-torch.inf, torch.inf]), torch.tensor([1.0, 1.0])
    assert F.binary_cross_entropy_with_logits(input, target, reduction="none").isnan().all()


def test_native_loses_the_tails() -> None:
    logit = torch.tensor(20.0, requires_grad=True)
    F.binary_cross_entropy_with_logits(logit, torch.tensor(1.0)).backward()
    assert logit.grad == 0
    assert F.binary_cross_entropy_with_logits(torch.tensor(-20.0), torch.tensor(0.0)) == 0
