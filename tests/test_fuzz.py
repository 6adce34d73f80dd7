"""The fuzz of `make sanitize`: a few of its cases on the ordinary build, and that it sees what it is there to see."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fuzz import server
from fuzz.cases import Case, make_case
from fuzz.schemas import operators
from fuzz.server import failure_of
from fuzz.shrink import shrink

TESTS = str(Path(__file__).parent)


def fuzz(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "fuzz", *arguments]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths} | environment, capture_output=True, text=True, check=False
    )


def test_nothing_but_clean_exceptions_and_right_answers() -> None:
    result = fuzz("--cases", "600")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "600 cases of seed 0" in result.stdout


def test_every_operator_is_called() -> None:
    assert {make_case(0, number).operator for number in range(300)} == {operator.name for operator in operators()}


def test_a_number_gives_the_same_case_everywhere() -> None:
    programs = {fuzz("--case", "77", "--show", PYTHONHASHSEED=seed).stdout for seed in ("1", "2")}
    assert programs == {f"{make_case(0, 77)}\n"}


BAD_CALLS = {
    "import ctypes; ctypes.string_at(0)": "SIGSEGV",
    "import os; os.abort()": "SIGABRT",
    "raise SystemError('an error that no operator may raise')": "SystemError: an error that no operator may raise",
    "raise RuntimeError('x INTERNAL ASSERT FAILED at y')": "INTERNAL ASSERT FAILED",
    "while True: pass": "did not return",
    "result = torch.tensor(7.0)": "wrong answer: loss",
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_a_failure_is_seen_and_named(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "TIME_LIMIT", 1)
    setup = ("input = torch.rand(3)", "target = torch.rand(3)")
    case = Case(0, "binary_cross_entropy_with_logits", setup, (), (call,), has_answer=True)
    what, _ = failure_of(case, tmp_path)
    assert BAD_CALLS[call] in what


@pytest.mark.parametrize(
    "call",
    ["raise ValueError('a clean one')", "result = torch.ops.bce_ext.binary_cross_entropy_with_logits(input, target)"],
)
def test_what_is_no_failure(call: str, tmp_path: Path) -> None:
    setup = ("input = torch.rand(3)", "target = torch.rand(3)")
    case = Case(0, "binary_cross_entropy_with_logits", setup, (), (call,), has_answer=True)
    assert failure_of(case, tmp_path)[0] == ""


def test_a_program_is_shrunk_to_what_fails() -> None:
    case = replace(make_case(0, 5), setup=("a = 1", "b = 2", "c = 3"), modes=("no_grad",), call=("d(b)", "e()"))
    smallest = shrink(case, lambda other: "b = 2" in other.setup and "d(b)" in other.call)
    assert (smallest.setup, smallest.modes, smallest.call) == (("b = 2",), (), ("d(b)",))
