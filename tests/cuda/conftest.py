"""The driver of the CUDA kernels, and where it cannot be built."""

import pathlib
import sys

import harness
import pytest


@pytest.fixture(scope="session", params=["plain", "sanitized"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The driver, once as it is and once under AddressSanitizer and UndefinedBehaviorSanitizer."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the shim's fibers are those of Linux")
    if not harness.has_compiler():
        pytest.skip("no C++ compiler")
    return harness.build(tmp_path_factory.mktemp("kernels"), harness.SANITIZE if request.param == "sanitized" else ())
