"""The devices that every test of values runs on, and what the summary says of those that it could not."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

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
