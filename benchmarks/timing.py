"""Timing: candidates take turns in one run, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
Candidate = Callable[[int], float]  # makes so many calls and returns the seconds that they took

MAX_CALLS = 1000
MAX_ROUNDS = 500


@dataclass(frozen=True)
class Timing:
    """Seconds for a call: the median and the 20 % and 80 % quantiles over the rounds."""

    low: float
    median: float
    high: float
    rounds: int

    def __str__(self) -> str:
        scale, unit = (1e6, "us") if self.median < 1e-3 else (1e3, "ms")
        digits = 2 if self.median * scale < 10 else 1 if self.median * scale < 100 else 0
        low, median, high = (f"{seconds * scale:.{digits}f}" for seconds in (self.low, self.median, self.high))
        return f"{median} {unit} [{low}, {high}]"


def _sample_seconds() -> float:
    """How long a sample takes: beside it, the clock is nothing, and on a GPU the wait for the device at its end."""
    return 1e-2 if torch.cuda.is_initialized() else 5e-4


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def repeat(step: Callable[[], object], device: str) -> Candidate:
    def run(calls: int) -> float:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            step()
        _synchronize(device)
        return time.perf_counter() - start

    return run


def repeat_prepared(prepare: Callable[[], T], step: Callable[[T], object], device: str) -> Candidate:
    """As :func:`repeat`, with a preparation of every call that is not timed."""

    def run(calls: int) -> float:
        prepared = [prepare() for _ in range(calls)]
        _synchronize(device)
        start = time.perf_counter()
        for item in prepared:
            step(item)
        _synchronize(device)
        return time.perf_counter() - start

    return run


def measure(candidates: dict[str, Candidate], seconds: float, min_rounds: int) -> dict[str, Timing]:
    """Times the candidates in turns for about so many seconds, and at least for so many rounds."""
    calls = {}
    round_seconds = 0.0
    for name, run in candidates.items():
        run(1)  # compiles
        run(1)  # starts threads, fills caches
        calls[name] = min(MAX_CALLS, max(1, round(_sample_seconds() / run(1))))
        round_seconds += run(1) + run(calls[name])
    rounds = min(MAX_ROUNDS, max(min_rounds, int(seconds / round_seconds)))

    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                # The caches hold what another candidate left, and have yet to write it back: tens of megabytes after one that writes
                # through them, nothing after one that does not. A sample pays for its own only.
                candidates[name](1)
                samples[name].append(candidates[name](calls[name]) / calls[name])
    finally:
        gc.enable()
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(fifths[0], statistics.median(values), fifths[-1], len(values))
