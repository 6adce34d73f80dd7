"""Makes a program that fails smaller: takes out lines as long as it fails in the same way."""

from __future__ import annotations

from collections.abc import Callable

from .cases import Case, without


def shrink(case: Case, fails_alike: Callable[[Case], bool], most_runs: int = 40) -> Case:
    runs = 0
    smaller = True
    while smaller:
        smaller = False
        for part in ("call", "modes", "setup"):
            # From the last line on: what makes use of a line is gone before the line is.
            for index in reversed(range(len(getattr(case, part)))):
                if runs == most_runs:
                    return case
                runs += 1
                candidate = without(case, part, index)
                if fails_alike(candidate):
                    case = candidate
                    smaller = True
    return case
