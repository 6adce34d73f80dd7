"""The speed and the memory that are aimed at on a CPU, case by case, and whether this machine reaches them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cases import Case, candidates
from processes import busy_core, in_fresh_process, peak_memory, timings_and_page_faults
from report import Row, case_row
from terminal import print_table, track
from timing import Timing, measure


@dataclass(frozen=True)
class Aim:
    against: str  # native | compile | sum: x.sum().backward() | add: torch.add(x, t, out=y)
    bound: float | None  # of the speed-up, or with at_most of our share of theirs; None: only measured
    at_most: bool = False

    def __str__(self) -> str:
        return "" if self.bound is None else f"{'<=' if self.at_most else '>='} {self.bound:g}"


@dataclass(frozen=True)
class Outcome:
    name: str
    case: Case
    aim: Aim
    ours: object
    theirs: object
    ratio: float

    @property
    def verdict(self) -> str:
        if self.aim.bound is None:
            return ""
        reached = self.ratio <= self.aim.bound if self.aim.at_most else self.ratio >= self.aim.bound
        return "yes" if reached else "NO"

    @property
    def row(self) -> Row:
        sides = {"against": self.aim.against, "ours": str(self.ours), "theirs": str(self.theirs)}
        verdict = {"ratio": self.ratio, "aim": str(self.aim), "reached": self.verdict}
        return {"name": self.name, **sides, **verdict, **case_row(self.case, "ours")}


SMALL = (Aim("native", 1.6), Aim("sum", 1.2, at_most=True))
POS_WEIGHT = (Aim("native", 22),)
TIMES = (
    ("16M", Case((4096, 4096)), (Aim("native", 13), Aim("compile", 4.5))),
    ("1M", Case((1024, 1024)), (Aim("native", 7), Aim("compile", 4.5))),
    ("64k", Case((256, 256)), (Aim("native", 5),)),
    ("1 element", Case((1,)), SMALL),
    ("1,000 elements", Case((1000,)), SMALL),
    ("4096x4096, pos_weight [C]", Case((4096, 4096), weights="pos_weight[C]"), POS_WEIGHT),
    ("16x64x128x128, pos_weight [C,1,1]", Case((16, 64, 128, 128), weights="pos_weight[C,1,1]"), POS_WEIGHT),
    ("16M, bfloat16", Case((4096, 4096), "bfloat16"), (Aim("native", 8),)),
    ("16M, bfloat16, bool target", Case((4096, 4096), "bfloat16", "bool"), (Aim("native", 10),)),
    ("16M, reduction none", Case((4096, 4096), reduction="none"), (Aim("native", 6),)),
    ("16M, forward under no_grad", Case((4096, 4096), mode="inference"), (Aim("native", 15),)),
    ("4M, float64", Case((2048, 2048), "float64"), (Aim("native", 4),)),
)
FORWARD = (Case((4096, 4096), mode="forward"), Aim("add", 1.4, at_most=True))
# Our peak over the logits: the gradient and nothing else, give or take what the process itself needs meanwhile.
MEMORY = (Case((4096, 4096)), Case((4096, 4096), weights="pos_weight[C]"))
GRADIENT_ONLY = Aim("native", 1.05, at_most=True)
BUSY = (Case((1024, 1024)), (Aim("native", None), Aim("compile", None)))


def check_aims(threads: int, seconds: float) -> list[Row]:
    count = sum(len(aims) for *_, aims in TIMES) + 1 + len(MEMORY) + len(BUSY[1])
    outcomes = list(track(_outcomes(threads, seconds), "aims", count))
    print_table(
        f"Aims, {threads} threads: medians [20 %, 80 % quantiles]",
        ("case", "against", "ours", "theirs", "ratio", "aim", "reached"),
        ([o.name, o.aim.against, o.ours, o.theirs, o.ratio, o.aim, o.verdict] for o in outcomes),
    )
    return [outcome.row for outcome in outcomes]


def _outcomes(threads: int, seconds: float) -> Iterator[Outcome]:
    for name, case, aims in TIMES:
        yield from _compare(name, replace(case, threads=threads), aims, seconds)

    case, aim = FORWARD
    case = replace(case, threads=threads)
    arguments = (case, ("ours", aim.against), seconds)
    timings, faults = in_fresh_process(timings_and_page_faults, *arguments)
    yield _outcome(f"16M, forward: {faults:.0f} page faults a call", case, aim, timings)

    for case in MEMORY:
        case = replace(case, threads=threads)
        ours, theirs = (in_fresh_process(peak_memory, case, name) for name in ("ours", GRADIENT_ONLY.against))
        share = ours / (case.numel * case.itemsize)
        sides = (f"{ours / 1e6:.0f} MB", f"{theirs / 1e6:.0f} MB")
        yield Outcome(f"16M, weights {case.weights}: peak memory / logits", case, GRADIENT_ONLY, *sides, share)

    case, aims = BUSY
    with busy_core():
        yield from _compare("1M, another process on one core", replace(case, threads=threads), aims, 3 * seconds)


def _compare(name: str, case: Case, aims: tuple[Aim, ...], seconds: float) -> Iterator[Outcome]:
    timings = measure(candidates(case, ("ours", *(aim.against for aim in aims))), seconds, min_rounds=15)
    for aim in aims:
        yield _outcome(name, case, aim, timings)


def _outcome(name: str, case: Case, aim: Aim, timings: dict[str, Timing]) -> Outcome:
    ours, theirs = timings["ours"], timings[aim.against]
    ratio = ours.median / theirs.median if aim.at_most else theirs.median / ours.median
    return Outcome(name, case, aim, ours, theirs, ratio)
