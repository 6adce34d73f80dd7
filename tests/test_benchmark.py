"""The benchmark runs from end to end. What it measures is not looked at: timings are no subject for a test."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_writes_tables_csv_and_plots(tmp_path: Path) -> None:
    for module in ("matplotlib", "rich"):
        pytest.importorskip(module)
    command = [sys.executable, ROOT / "benchmarks" / "benchmark.py", "--smoke", "--threads", "1", "--output", tmp_path]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert "Peak memory beyond the inputs" in output
    assert "cells are slower than native" in output
    for name in ("sweep", "grid", "memory"):
        with (tmp_path / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert {"ours"} <= {row["implementation"] for row in rows}
    for name in ("speedup", "bandwidth", "memory"):
        plot = tmp_path / f"{name}.svg"
        assert plot.stat().st_size < 150_000
        assert "</svg>" in plot.read_text()


def test_runs_without_rich_and_matplotlib(tmp_path: Path) -> None:
    program = ROOT / "benchmarks" / "benchmark.py"
    script = (
        "import runpy, sys; sys.modules.update(rich=None, matplotlib=None); sys.path.insert(0, sys.argv[1]); "
        "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    options = ["--smoke", "--threads", "1", "--only", "sweep", "grid", "--output", tmp_path]
    command = [sys.executable, "-c", script, program.parent, program, *options]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert "cells are slower than native" in output
    assert "CSV files, no plots since matplotlib is not installed" in output
    assert {file.name for file in tmp_path.glob("*.csv")} == {"sweep.csv", "grid.csv"}
