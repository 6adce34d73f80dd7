"""Runs the program of a case and judges what comes of it."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

from .answers import wrong_answer
from .cases import HEADER, Case

CLEAN = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, OverflowError, MemoryError)
INTERNAL = re.compile(r"INTERNAL ASSERT FAILED|internal assert|please report a bug", re.IGNORECASE)


class Outcome(IntEnum):
    RETURNED = 0
    COMPARED = 1  # returned, and the answer was compared with the reference
    RAISED = 2
    NOT_BUILT = 3  # the arguments could not be made: torch refuses them before the operator is called
    FAILED = 4


class Stage(IntEnum):
    SETUP = 0
    CALL = 1
    ANSWER = 2


@dataclass(frozen=True)
class Verdict:
    outcome: Outcome
    failure: str = ""  # what went wrong, without what differs from case to case
    details: str = ""


@cache
def _namespace() -> dict[str, Any]:
    variables: dict[str, Any] = {}
    exec(HEADER, variables)
    return variables


def run(case: Case, at: Callable[[Stage], None] = lambda stage: None) -> Verdict:
    """Runs the case. `at` is told of each stage before it begins, since the process may not live to the next."""
    variables = dict(_namespace())
    at(Stage.SETUP)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exec(compile("\n".join(case.setup), "<setup>", "exec"), variables)
        except Exception as error:
            return Verdict(Outcome.NOT_BUILT, details=f"{type(error).__name__}: {error}")
        at(Stage.CALL)
        try:
            exec(compile(case.body, "<call>", "exec"), variables)
        except Exception as error:
            if isinstance(error, CLEAN) and not INTERNAL.search(str(error)):
                return Verdict(Outcome.RAISED, details=f"{type(error).__name__}: {error}")
            name = type(error).__name__
            return Verdict(
                Outcome.FAILED, f"{name}: {_general(str(error))}", "".join(traceback.format_exception(error))
            )
        at(Stage.ANSWER)
        if not case.has_answer:
            return Verdict(Outcome.RETURNED)
        with ExitStack() as contexts:
            # The products of a linear layer are in the precision of autocast; float64 stays what it is.
            for mode in case.modes:
                if mode.startswith("torch.autocast('cpu'"):
                    contexts.enter_context(eval(mode, variables))
            wrong = wrong_answer(case.operator, variables)
    if wrong is None:
        return Verdict(Outcome.RETURNED)
    return (
        Verdict(Outcome.FAILED, f"wrong answer: {wrong.partition(':')[0]}", wrong)
        if wrong
        else Verdict(Outcome.COMPARED)
    )


def _general(message: str) -> str:
    """The line of a message that tells, without its numbers: by it failures are grouped."""
    lines = message.strip().splitlines() or [""]
    line = next((line for line in lines if INTERNAL.search(line)), lines[0])
    return re.sub(r"-?\d+", "#", line)[:160]
