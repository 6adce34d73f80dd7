"""Labels divided among processes: the loss, its gradients and a training run are those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def run_in_processes(program: Path, *arguments: str, processes: int = 4) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(program), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


def test_against_one_process() -> None:
    run_in_processes(ROOT / "tests" / "sharded_worker.py")


@pytest.mark.parametrize(("processes", "options"), [(4, []), (2, ["--class-indices"])], ids=["sparse", "class indices"])
def test_the_example_trains_as_one_process_does(processes: int, options: list[str]) -> None:
    program = ROOT / "examples" / "sharded_labels.py"
    sizes = ("--labels", "20001", "--rows", "60", "--steps", "3")
    output = run_in_processes(program, *sizes, *options, processes=processes)
    assert "the same parameters" in output
