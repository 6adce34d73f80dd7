"""Native against ours over dtype, reduction, weights, size, threads and layout: no cell may be slower."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from cases import Case, candidates
from report import Row, timing_rows
from terminal import print_table, track
from timing import measure

MATRICES = {1: (1, 1), 1000: (10, 100), 1 << 16: (256, 256), 1 << 20: (1024, 1024), 1 << 24: (4096, 4096)}
IMAGES = {
    1: (1, 1, 1, 1),
    1000: (5, 8, 5, 5),
    1 << 16: (4, 64, 16, 16),
    1 << 20: (16, 64, 32, 32),
    1 << 24: (16, 64, 128, 128),
}
AXES = ("numel", "loss", "dtype", "target", "reduction", "weights", "layout", "mode", "threads")


@dataclass(frozen=True)
class Grid:
    sizes: tuple[int, ...] = tuple(MATRICES)
    dtypes: tuple[str, ...] = ("float32", "float64", "bfloat16", "float16")
    layouts: tuple[str, ...] = ("contiguous", "channels_last", "transposed", "mixed", "sliced")

    def cases(self, device: str, threads: Sequence[int]) -> Iterator[Case]:
        """Every combination of six axes, and the other axes one by one. A sum is a mean as far as time goes."""
        reductions = ("mean", "sum", "none")
        weightings = ("none", "weight", "pos_weight[C]", "pos_weight[C,1,1]")
        axes = product(self.sizes, self.dtypes, reductions, weightings, self.layouts, threads)
        for numel, dtype, reduction, weights, layout, thread_count in axes:
            large = numel > 1 << 20
            if large and (layout != "contiguous" or thread_count < max(threads)):
                continue  # they take seconds each
            if reduction == "sum" and (layout != "contiguous" or large):
                continue
            shapes = IMAGES if layout == "channels_last" or weights == "pos_weight[C,1,1]" else MATRICES
            options = {"reduction": reduction, "weights": weights, "layout": layout}
            case = Case(shapes[numel], dtype, **options, threads=thread_count, device=device)
            yield case
            if layout == "contiguous" and reduction != "sum" and not large:
                yield replace(case, mode="inference")
                yield replace(case, target="bool")
                if not weights.startswith("pos_weight"):
                    yield replace(case, loss="probabilities")


def run_grid(grid: Grid, device: str, threads: Sequence[int], seconds: float, min_rounds: int) -> list[Row]:
    """Measures every cell. One that looks close is measured again for longer, and that figure counts."""
    rows: list[Row] = []
    for case in track(list(grid.cases(device, threads)), "grid"):
        torch.set_num_threads(case.threads)
        runs = candidates(case, ("native", "ours"))
        timings = measure(runs, seconds, min_rounds)
        if timings["native"].median < 1.1 * timings["ours"].median:
            timings = measure(runs, 10 * seconds, 3 * min_rounds)
        rows += timing_rows(case, timings)
    torch.set_num_threads(max(threads))
    _print(rows)
    return rows


def _print(rows: list[Row]) -> None:
    ours = sorted((row for row in rows if row["implementation"] == "ours"), key=lambda row: row["speedup"])
    summary = []
    for axis in AXES:
        for value in sorted({row[axis] for row in ours}):
            speedups = [row["speedup"] for row in ours if row[axis] == value]
            summary.append([axis, value, len(speedups), speedups[0], statistics.median(speedups), speedups[-1]])
    print_table("Grid: times as fast as native", ("axis", "value", "cells", "lowest", "median", "highest"), summary)

    slower = [row for row in ours if row["speedup"] < 1]
    title = f"{len(slower)} of {len(ours)} cells are slower than native{'' if slower else '; the closest'}:"
    native = {tuple(row[axis] for axis in AXES): row for row in rows if row["implementation"] == "native"}
    lines = []
    for row in slower or ours[:10]:
        cell = tuple(row[axis] for axis in AXES)
        lines.append([*cell, native[cell]["median"] * 1e6, row["median"] * 1e6, row["speedup"]])
    print_table(title, (*AXES, "native us", "ours us", "speed-up"), lines)
