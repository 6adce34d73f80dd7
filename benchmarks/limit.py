"""How near each path comes to the memory: its time over that of its bytes, at the speed of an addition in the same rounds."""

from __future__ import annotations

from dataclasses import asdict, replace

from cases import Case, candidates
from report import Row, case_row
from terminal import print_table, track
from timing import Candidate, measure

LARGE = Case((4096, 4096))
IMAGES = Case((16, 64, 128, 128))
LARGE_SHAPE = {"cpu": LARGE.shape, "cuda": (1 << 16, 1 << 11)}  # several times the caches
PATHS = {
    "mean": LARGE,
    "bool target": replace(LARGE, target="bool"),
    "int64 target": replace(LARGE, target="int64"),
    "weight [N, 1]": replace(LARGE, weights="weight[N,1]"),
    "weight of the full shape": replace(LARGE, weights="weight"),
    "pos_weight [C]": replace(LARGE, weights="pos_weight[C]"),
    "pos_weight, one number": replace(LARGE, weights="pos_weight"),
    "bfloat16": replace(LARGE, dtype="bfloat16"),
    "bfloat16, bool target": replace(LARGE, dtype="bfloat16", target="bool"),
    "float16": replace(LARGE, dtype="float16"),
    "float64": replace(LARGE, dtype="float64"),
    "reduction none": replace(LARGE, reduction="none"),
    "BCELoss": replace(LARGE, loss="probabilities"),
    "BCELoss, bool target": replace(LARGE, loss="probabilities", target="bool"),
    "BCELoss, reduction none": replace(LARGE, loss="probabilities", reduction="none"),
    "channels_last logits, other targets": replace(IMAGES, layout="mixed"),
    "the same, bool target": replace(IMAGES, layout="mixed", target="bool"),
    "transposed logits, other targets": replace(LARGE, layout="mixed"),
    "no gradient": replace(LARGE, mode="inference"),
    "no gradient, bfloat16": replace(LARGE, mode="inference", dtype="bfloat16"),
    "mean, 1M elements": Case((1024, 1024)),
}
# Below, no memory is waited for: against the cheapest trip through autograd.
SMALL = {f"mean, {numel:,} elements": Case((numel,)) for numel in (1 << 16, 1 << 14, 1000, 1)}


def run_limit(device: str, threads: int, seconds: float, min_rounds: int) -> list[Row]:
    """Forward and backward of each path beside ``torch.add(x, y, out=z)``, and of small inputs beside ``x.sum().backward()``."""
    rows: list[Row] = []
    lines: list[list[object]] = []
    beside: dict[tuple[int, ...], dict[str, Candidate]] = {}
    for name, path in track((PATHS | SMALL).items(), "limit", len(PATHS | SMALL)):
        shape = LARGE_SHAPE[device] if path.shape == LARGE.shape else path.shape
        case = replace(path, shape=shape, threads=threads, device=device)
        # The addition is that of float32 numbers, whatever the path computes in: what counts is its bytes for a second. It is the same
        # for all paths of a size, as its speed depends on the pages that its tensors happen to have.
        plain = Case(case.shape, threads=threads, device=device)
        if case.shape not in beside:
            beside[case.shape] = candidates(plain, ("add", "sum"))
        timings = measure(candidates(case, ("ours",)) | beside[case.shape], seconds, min_rounds)
        seconds_of_a_byte = timings["add"].median / plain.bytes_moved("add")
        moved = case.bytes_moved("ours")
        ours = timings["ours"].median
        limit = moved * seconds_of_a_byte
        over_sum = ours / timings["sum"].median if case.mode == "full" else None
        lines.append([name, moved / case.numel, timings["ours"], f"{limit * 1e3:.3g} ms", ours / limit, over_sum])
        measured = {**asdict(timings["ours"]), "bytes": moved, "limit_seconds": limit}
        measured |= {"over_limit": ours / limit, "over_sum": over_sum}
        rows.append({"path": name, **case_row(case, "ours"), **measured})
    print_table(
        f"Against the memory, {threads} threads: medians [20 %, 80 % quantiles]",
        ("path", "bytes an element", "forward + backward", "its bytes, at the speed of add", "over that", "over sum"),
        lines,
    )
    return rows
