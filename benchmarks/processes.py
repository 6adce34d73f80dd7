"""Measurements that need a process of their own, or beside them."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from cases import Case, Inputs, candidates, loss_function, loss_steps
from timing import Timing, measure

P = ParamSpec("P")
T = TypeVar("T")


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args, **kwargs).result()


def peak_memory(case: Case, implementation: str) -> int:
    """Peak bytes beyond the inputs. In a fresh process: in an old one the loss could use what others have freed."""
    torch.set_num_threads(case.threads)
    function = loss_function(case, implementation)

    def prepare(case: Case) -> Callable[[], object]:
        forward, _, full = loss_steps(case, Inputs(case), function)
        return torch.no_grad()(forward) if case.mode == "inference" else full

    # Compiles, starts threads: none of it is the memory of the loss. What is compiled is so for one size only; the
    # others start with a small one, as we keep the memory of a large gradient that was freed.
    prepare(case if implementation == "compile" else replace(case, shape=(16,) * len(case.shape)))()
    step = prepare(case)
    if case.device == "cpu":
        return peak_rss(step)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def peak_rss(step: Callable[[], object]) -> int:
    """Peak resident bytes of a call beyond what was resident before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to what is resident now
    before = _status_bytes("VmRSS")
    step()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def timings_and_page_faults(case: Case, names: tuple[str, ...], seconds: float) -> tuple[dict[str, Timing], float]:
    """Timings, and the page faults for each call of the first candidate once everything is warm."""
    torch.set_num_threads(case.threads)
    runs = candidates(case, names)
    timings = measure(runs, seconds, min_rounds=15)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    runs[names[0]](10)
    return timings, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10


@contextmanager
def busy_core() -> Iterator[None]:
    """Another process keeps one of our cores busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
    try:
        yield
    finally:
        process.kill()
        process.wait()
