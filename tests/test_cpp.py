"""A C++ program loads the operator library, in a process without Python, and runs forward and backward."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import bce_ext

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(bce_ext.__file__).with_name("libbce_ext.so")
TORCH_LIBRARIES = Path(torch.__file__).parent / "lib"


def run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example of the documentation."""
    target = tmp_path_factory.mktemp("cpp") / "example"
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    link = [
        f"-L{TORCH_LIBRARIES}",
        f"-Wl,-rpath,{TORCH_LIBRARIES}",
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        "-ldl",
    ]
    if torch.version.cuda is not None:
        link += ["-ltorch_cuda", "-lc10_cuda"]
    run("g++", "-std=c++20", "-O0", abi, *includes, ROOT / "examples" / "cpp" / "main.cpp", "-o", target, *link)
    return target


def test_forward_and_backward_agree_with_native(program: Path) -> None:
    assert "gradients agree" in run(program, LIBRARY)


def test_no_python_is_loaded(program: Path) -> None:
    for file in (program, LIBRARY):
        libraries = run("ldd", file)
        assert "libtorch_cpu" in libraries
        assert not re.search(r"libpython|libtorch_python", libraries), libraries


def test_a_missing_library_is_named(program: Path) -> None:
    result = subprocess.run([program, "/nowhere/libbce_ext.so"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "/nowhere/libbce_ext.so" in result.stderr
