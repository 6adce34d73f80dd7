"""Time and bandwidth over the size, for forward, backward and both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cases import IMPLEMENTATIONS, Case, candidates
from report import Row, timing_rows
from terminal import print_table, track
from timing import Timing, measure

MODES = ("full", "forward", "backward", "inference")


def run_sweep(
    cases: Sequence[Case], exponents: Sequence[int], compiled: Sequence[int], seconds: float, min_rounds: int
) -> list[Row]:
    """Measures each case with these powers of two for its size, beside a copy and an addition in the same rounds."""
    rows: list[Row] = []
    for case in cases:
        by_cell: dict[tuple[str, int], list[Row]] = {}
        for exponent in track(exponents, f"sweep: {case.dtype}, weights {case.weights}"):
            for mode in MODES:
                cell = replace(case, shape=(1 << exponent // 2, 1 << exponent - exponent // 2), mode=mode)
                # Under no_grad it would have to be compiled once more, to show what forward shows already.
                compile = ("compile",) if exponent in compiled and mode != "inference" else ()
                timings = measure(candidates(cell, ("native", *compile, "ours", "add", "copy")), seconds, min_rounds)
                by_cell[mode, cell.numel] = timing_rows(cell, timings)
        columns = [column for name in IMPLEMENTATIONS for column in (name, "GB/s")]
        print_table(
            f"{case.dtype}, reduction {case.reduction}, weights {case.weights}, {case.threads} threads: "
            "medians [20 %, 80 % quantiles]",
            ["mode", "elements", *columns, "add GB/s", "copy GB/s", "x native", "x compile"],
            [[*cell, *_line(by_cell[cell])] for cell in sorted(by_cell, key=lambda cell: MODES.index(cell[0]))],
        )
        rows += [row for cell_rows in by_cell.values() for row in cell_rows]
    return rows


def _line(rows: list[Row]) -> list[object]:
    by_name = {row["implementation"]: row for row in rows}
    line: list[object] = []
    for name in IMPLEMENTATIONS:
        if name in by_name:
            row = by_name[name]
            # Backward of a mean moves no bytes.
            line += [Timing(row["low"], row["median"], row["high"], row["rounds"]), row["gb_per_s"] or None]
        else:
            line += [None, None]
    ours = by_name["ours"]
    compiled = by_name["compile"]["median"] / ours["median"] if "compile" in by_name else None
    return [*line, by_name["add"]["gb_per_s"], by_name["copy"]["gb_per_s"], ours["speedup"], compiled]
