"""The CPU kernel as a plain C++ program under sanitizers, for each instruction set that this machine has."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_chunk_kernel_under_sanitizers(tmp_path: Path) -> None:
    sources = [Path(__file__).with_name("check_chunk_kernel.cpp"), *(ROOT / "csrc" / "cpu").glob("block_kernel*.cpp")]
    assert len(sources) > 1
    flags = ["-std=c++17", "-O1", "-g1", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror"]
    # Use after scope would be tracked for each of thousands of temporaries, and compiling would take minutes.
    sanitizers = [
        "-fsanitize=address,undefined",
        "-fno-sanitize-address-use-after-scope",
        "-fno-sanitize-recover=all",
    ]

    def compiled(source: Path) -> Path:
        target = tmp_path / f"{source.stem}.o"
        subprocess.run(["c++", *flags, *sanitizers, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    program = tmp_path / "check_chunk_kernel"
    subprocess.run(["c++", *sanitizers, *objects, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
