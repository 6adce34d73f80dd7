"""What comes out: rows and CSV files."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cases import Case
from timing import Timing

import bce_ext

Row = dict[str, Any]  # a line of a CSV file


def case_row(case: Case, implementation: str) -> Row:
    shape = "x".join(map(str, case.shape))
    return {**asdict(case), "shape": shape, "numel": case.numel, "implementation": implementation}


def timing_rows(case: Case, timings: dict[str, Timing]) -> list[Row]:
    return [
        {
            **case_row(case, name),
            **asdict(timing),
            "gb_per_s": case.bytes_moved(name) / timing.median / 1e9,
            "speedup": timings["native"].median / timing.median,
        }
        for name, timing in timings.items()
    ]


def environment(device: str) -> dict[str, object]:
    """The versions and the machine."""
    models = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    facts: dict[str, object] = {
        "torch": torch.__version__,
        **{f"bce_ext {name}": fact for name, fact in bce_ext.build_info().items()},
        "python": platform.python_version(),
        "cpu": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "cpu capability of torch": torch.backends.cpu.get_cpu_capability(),
        "transparent huge pages": "".join(_lines("/sys/kernel/mm/transparent_hugepage/enabled")),
        "load average": os.getloadavg()[0],
    }
    if device != "cpu":
        facts["gpu"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return facts


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
