"""Peak memory beyond the inputs, a fresh process for each figure."""

from __future__ import annotations

from collections.abc import Sequence

from cases import Case
from processes import in_fresh_process, peak_memory
from report import Row, case_row
from terminal import print_table


def run_memory(cases: Sequence[Case], implementations: Sequence[str]) -> list[Row]:
    rows = []
    for case in cases:
        for name in implementations:
            peak = in_fresh_process(peak_memory, case, name)
            logits = case.numel * case.itemsize
            rows.append({**case_row(case, name), "peak_bytes": peak, "peak_over_logits": peak / logits})
    columns = ("dtype", "weights", "reduction", "mode", "numel", "implementation")
    print_table(
        "Peak memory beyond the inputs",
        (*columns, "MB", "peak / logits"),
        ([*(row[column] for column in columns), row["peak_bytes"] / 1e6, row["peak_over_logits"]] for row in rows),
    )
    return rows
