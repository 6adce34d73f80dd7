"""The CPU kernel as a plain C++ program under sanitizers, for each instruction set that this machine has."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_chunk_kernel_under_sanitizers(tmp_path: Path) -> None:
    program = tmp_path / "check_chunk_kernel"
    kernel = sorted((ROOT / "csrc" / "cpu").glob("block_kernel*.cpp"))
    assert kernel
    flags = ["-std=c++17", "-O1", "-g", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror"]
    # Use after scope would be tracked for each of thousands of temporaries, and compiling would take minutes.
    sanitizers = [
        "-fsanitize=address,undefined",
        "-fno-sanitize-address-use-after-scope",
        "-fno-sanitize-recover=all",
    ]
    source = Path(__file__).with_name("check_chunk_kernel.cpp")
    subprocess.run(["c++", *flags, *sanitizers, source, *kernel, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
