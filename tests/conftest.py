"""The devices that every test of values runs on, and what the summary says of those that it could not."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

# Beside another process of the suite, a thread that waits for its next loop must not occupy the core. Read when torch is loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from gpu import WHY_NO_CUDA

# torch.compile's cache on disk knows our operators by their names: it must not answer with what it compiled for another build of the extension.
_COMPILE_CACHE = tempfile.TemporaryDirectory(prefix="bce_ext_compile_cache_")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _COMPILE_CACHE.name


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(WHY_NO_CUDA is not None, reason=str(WHY_NO_CUDA))]
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    gpu_cases = [r for r in terminalreporter.stats.get("skipped", []) if "gpu" in getattr(r, "keywords", {})]
    if gpu_cases:
        terminalreporter.write_line(f"{len(gpu_cases)} GPU cases were NOT RUN: {WHY_NO_CUDA}", yellow=True)


def pytest_configure(config: pytest.Config) -> None:
    # Programs that the tests start find the package of this tree, wherever pytest was started.
    root = str(config.rootpath)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers() -> int | None:
    """One process where there is a GPU, since tests measure what is allocated on it; else as many as pytest-xdist thinks fit."""
    return 0 if torch.cuda.is_available() else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        """A folder of tests is one file: they share what it builds."""

        def _split_scope(self, nodeid: str) -> str:
            folder, _, file = nodeid.partition("::")[0].removeprefix("tests/").rpartition("/")
            return folder or file

    return Scheduling(config, log)
