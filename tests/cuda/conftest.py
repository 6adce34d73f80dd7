"""The driver of the CUDA kernels, and where it cannot be built."""

import pathlib
import sys

import harness
import pytest

FLAGS = {"plain": (), "sanitized": harness.SANITIZE}


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """The driver, once as it is and once under AddressSanitizer and UndefinedBehaviorSanitizer."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the shim's fibers are those of Linux")
    if not harness.has_compiler():
        pytest.skip("no C++ compiler")
    builds = {name: (tmp_path_factory.mktemp(name), flags) for name, flags in FLAGS.items()}
    return harness.build_all(builds)


@pytest.fixture(scope="session", params=FLAGS)
def program(request: pytest.FixtureRequest, programs: dict[str, pathlib.Path]) -> pathlib.Path:
    return programs[request.param]
