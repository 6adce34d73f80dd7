"""The memory of large outputs on a CPU is used again, belongs to nobody meanwhile, and behaves like any tensor's memory."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bce_ext
import bce_ext.functional as F

MIB = 2**20
LARGE = 34 * MIB  # elements: 136 MiB, more than is ever kept as our own


def gradient(numel: int, value: float = 0.5) -> Tensor:
    logits = torch.full((numel,), value, requires_grad=True)
    F.binary_cross_entropy_with_logits(logits, torch.ones(numel), reduction="sum").backward()
    assert logits.grad is not None
    return logits.grad


def expected(value: float) -> float:
    return float(torch.sigmoid(torch.tensor(value, dtype=torch.float64)) - 1)


@pytest.mark.parametrize(
    "numel",
    [
        256 * 1024,  # 1 MiB: the smallest that is kept
        512 * 1024 - 1,  # just below a huge page
        512 * 1024,  # one huge page
        LARGE + 3,  # a last huge page that is not whole
    ],
)
def test_a_freed_gradient_gives_its_memory_to_the_next_of_its_size(numel: int) -> None:
    first = gradient(numel)
    address = first.data_ptr()
    del first
    assert gradient(numel).data_ptr() == address


def test_a_gradient_that_is_alive_keeps_its_memory() -> None:
    first = gradient(LARGE, 0.25)
    second = gradient(LARGE, -3.0)
    assert first.data_ptr() != second.data_ptr()
    torch.testing.assert_close(first, torch.full_like(first, expected(0.25)))
    torch.testing.assert_close(second, torch.full_like(second, expected(-3.0)))


def test_used_memory_holds_nothing_of_its_past() -> None:
    gradient(LARGE, 9.0)
    smaller = gradient(LARGE - 12345, 0.125)
    torch.testing.assert_close(smaller, torch.full_like(smaller, expected(0.125)))


def test_a_much_larger_block_is_not_tied_up_by_a_small_gradient() -> None:
    large = gradient(LARGE)
    begin, end = large.data_ptr(), large.data_ptr() + large.nbytes
    del large
    assert not begin <= gradient(MIB).data_ptr() < end


def memory_of_kind(kind: str) -> int:
    """Bytes of this process, as Linux's /proc counts them."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(kind + ":"))


@pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's /proc")
def test_freed_memory_is_the_systems_to_take() -> None:
    large = gradient(LARGE)
    size = large.nbytes
    before = memory_of_kind("LazyFree")
    del large
    assert memory_of_kind("LazyFree") - before >= size - 4 * MIB  # the last huge page, and what happens meanwhile


@pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's /proc")
def test_what_is_kept_as_our_own_is_bounded() -> None:
    alive = [gradient(20 * MIB) for _ in range(2)]  # 80 MiB each, of 128 that may be our own
    size = alive[0].nbytes
    before = memory_of_kind("LazyFree")
    del alive
    assert memory_of_kind("LazyFree") - before >= size - 4 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's /proc")
def test_a_gradient_that_comes_back_at_each_step_stays_our_own() -> None:
    stale = [gradient(8 * MIB) for _ in range(4)]
    del stale  # fills what may be our own
    gradient(16 * MIB)
    before = memory_of_kind("LazyFree")
    for _ in range(3):
        gradient(16 * MIB)
    assert memory_of_kind("LazyFree") - before < 4 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's madvise")
def test_memory_that_the_system_took_is_replaced() -> None:
    large = gradient(LARGE, 9.0)
    begin, end = large.data_ptr(), large.data_ptr() + large.nbytes
    del large
    huge = memory_of_kind("AnonHugePages")
    dontneed = 4
    for page in range(begin, end, 2 * MIB):  # one small page out of every huge one, which splits them
        assert ctypes.CDLL(None).madvise(ctypes.c_void_p(page), ctypes.c_size_t(4096), dontneed) == 0
    grad = gradient(LARGE, 0.875)
    torch.testing.assert_close(grad, torch.full_like(grad, expected(0.875)))
    assert memory_of_kind("AnonHugePages") >= huge  # none, where the system has no huge pages


def alone(function: Callable[..., None], *arguments: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """Calls a function of this file in a process of its own: what it measures, freed chunks of an old heap would blur."""
    file = Path(__file__)
    program = f"import sys; sys.path.insert(0, sys.argv[1]); import {file.stem} as t; t.{function.__name__}{arguments}"
    result = subprocess.run(
        [sys.executable, "-c", program, str(file.parent)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's /proc")
def test_the_number_of_blocks_that_are_kept_is_bounded() -> None:
    alone(frees_more_blocks_than_are_kept)


def frees_more_blocks_than_are_kept() -> None:
    size = 32 * MIB  # of which four may be our own
    gradient(size // 4)
    before = resident()
    alive = [gradient(size // 4) for _ in range(16)]
    assert resident() - before > 10 * size  # the measurement sees them
    del alive
    assert resident() - before < 6 * size


@pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's /proc")
@pytest.mark.parametrize(
    "mib",
    [
        20,  # from the heap of the C library, which keeps some of what is freed
        80,  # two of them: more than may be our own
        136,  # nobody's while they wait
    ],
)
def test_the_cache_can_be_emptied(mib: int) -> None:
    alone(empties_the_cache, mib)


def empties_the_cache(mib: int) -> None:
    alive = gradient(MIB, 0.5)
    bce_ext.empty_cache()
    before = resident()
    for _ in range(2):
        freed = [gradient(mib * MIB // 4) for _ in range(2)]
        del freed
        assert resident() - before > 1.5 * mib * MIB
        bce_ext.empty_cache()
        assert resident() - before < 0.5 * mib * MIB
    torch.testing.assert_close(alive, torch.full_like(alive, expected(0.5)))
    again = gradient(mib * MIB // 4, 0.75)
    torch.testing.assert_close(again, torch.full_like(again, expected(0.75)))


@pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's /proc")
def test_the_cache_can_be_emptied_without_python() -> None:
    """The operator is what C++ and TorchScript call."""
    alone(empties_the_cache_without_python)


def empties_the_cache_without_python() -> None:
    first = gradient(LARGE)
    del first
    before = resident()
    assert torch.ops.bce_ext.empty_cache() is None
    assert before - resident() > LARGE * 4 - 4 * MIB


def test_the_cache_can_be_emptied_while_others_use_it() -> None:
    stop = threading.Event()

    def empty() -> None:
        while not stop.is_set():
            bce_ext.empty_cache()

    thread = threading.Thread(target=empty)
    thread.start()
    try:
        for value in [0.1, 0.2, 0.3] * 3:
            grad = gradient(MIB, value)
            torch.testing.assert_close(grad, torch.full_like(grad, expected(value)))
    finally:
        stop.set()
        thread.join()


def frees_a_gradient() -> None:
    """Prints how many MiB of a freed gradient of 64 MiB stay, and how many of these the system may take."""
    gradient(1000)
    before = resident(), memory_of_kind("LazyFree")
    grad = gradient(16 * MIB)
    del grad
    print((resident() - before[0]) // MIB, (memory_of_kind("LazyFree") - before[1]) // MIB)


@pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's /proc")
@pytest.mark.parametrize(
    ("bound", "stays", "is_nobodys"),
    [
        ("64", True, False),  # just enough
        ("63", True, True),
        ("0", False, False),
        ("-1", True, False),  # 128, and a warning
        ("64 MiB", True, False),
    ],
)
def test_the_bound_of_the_environment(bound: str, stays: bool, is_nobodys: bool) -> None:
    result = alone(frees_a_gradient, BCE_EXT_CACHE_MIB=bound)
    mib, mib_of_nobody = map(int, result.stdout.split())
    assert (mib >= 60) == stays
    assert (mib_of_nobody >= 60) == is_nobodys
    assert ("expected BCE_EXT_CACHE_MIB to be a whole number of MiB" in result.stderr) != bound.isdecimal()


def test_the_storage_can_be_resized_shared_and_saved() -> None:
    grad = gradient(MIB, 0.5)
    grad.resize_(2 * MIB)
    torch.testing.assert_close(grad[:MIB], torch.full((MIB,), expected(0.5)))
    grad.resize_(MIB).share_memory_()
    assert grad.is_shared()
    torch.testing.assert_close(grad, torch.full((MIB,), expected(0.5)))


def test_the_profiler_sees_the_gradient() -> None:
    logits = torch.zeros(LARGE, requires_grad=True)
    target = torch.ones(LARGE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        F.binary_cross_entropy_with_logits(logits, target)
    allocated = max(event.cpu_memory_usage for event in profile.key_averages())
    assert LARGE * 4 <= allocated < LARGE * 4 + MIB


def test_threads_do_not_share_a_block() -> None:
    values = [0.1, 0.2, 0.3, 0.4]
    wrong = []

    def train(value: float) -> None:
        for _ in range(30):
            grad = gradient(MIB // 2, value)
            if not torch.allclose(grad, torch.full_like(grad, expected(value))):
                wrong.append(value)

    threads = [threading.Thread(target=train, args=(value,)) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def gradients_of_parent_and_child() -> None:
    threads = torch.get_num_threads()
    gradient(LARGE, 9.0)  # freed: parent and child both have the block
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        grad = gradient(LARGE, 0.75)
        os._exit(0 if torch.allclose(grad, torch.full_like(grad, expected(0.75))) else 1)
    grad = gradient(LARGE, -0.75)
    assert os.waitpid(child, 0)[1] == 0
    torch.testing.assert_close(grad, torch.full_like(grad, expected(-0.75)))
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_parent_and_forked_child_do_not_see_each_others_gradients() -> None:
    # Where another test made autograd start threads, torch refuses a backward pass in a forked process.
    alone(gradients_of_parent_and_child)
